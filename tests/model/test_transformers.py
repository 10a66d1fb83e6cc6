"""transformers' own common tests of a model class, run on the stock class and on ours: what holds there holds here.

    python -m pytest -m soak tests/model/test_transformers.py -s     # two minutes

They come with the source distribution of the installed release, from the package index. Its tests of generation and
export are not in it; of these, ours stand in test_families.py, test_parity.py and test_compile.py.
"""

import importlib
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers

from pmod_cli import model as pmod_model
from pmod_cli.families import FAMILIES
from tests.model import visual
from tests.model.models import ROUTED_FROM_START

pytestmark = pytest.mark.soak

PACKAGE = "transformers_common_tests"
NOT_SHIPPED = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""Modules that the common tests import and the source distribution lacks, and the class that is imported."""

MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")

BY_NATURE = {"test_attention_outputs": "a routed layer's attention is as wide as the tokens that it keeps"}
"""Tests that a routed class does not pass where stock does, and why."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """The module of the common tests."""
    for marker in MARKERS:
        request.config.addinivalue_line("markers", marker)
    folder = tmp_path_factory.mktemp("suite")
    pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder),
        f"transformers=={transformers.__version__}")  # fmt: skip
    pip("install", "--no-deps", "--target", str(folder), "parameterized")
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.name.endswith(".py"):
                member.name = f"{PACKAGE}/{parts[2]}"
                tar.extract(member, folder, filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name, kind in NOT_SHIPPED.items():
            parent, _, _ = name.rpartition(".")
            patch.setitem(sys.modules, f"{PACKAGE}.{parent}", types.ModuleType(parent))
            module = types.ModuleType(name)
            setattr(module, kind, type(kind, (), {}))
            patch.setitem(sys.modules, f"{PACKAGE}.{name}", module)
        yield importlib.import_module(f"{PACKAGE}.test_modeling_common")


class Inputs:
    """What the common tests ask of a model's tester: a small configuration and inputs of two rows with one image."""

    batch_size = 2
    is_training = True

    def __init__(self, kind: str, routed: bool) -> None:
        self.kind, self.more = kind, {"pmod": dict(ROUTED_FROM_START)} if routed else {}
        text = self.get_config().get_text_config()
        self.seq_length = self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]
        self.num_hidden_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size
        self.num_attention_heads, self.vocab_size = text.num_attention_heads, text.vocab_size

    def get_config(self):
        return visual.stock_config(self.kind, **self.more)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        side = 8 if FAMILIES[self.kind].tiled else 16
        rows = [visual.Row([(side, side)])] * self.batch_size
        return config, visual.prompt(self.kind, config, rows)


def outcomes(common, kind: str, routed: bool) -> dict[str, str]:
    """What became of each common test: `passed`, `skipped`, or the last line of what it raised."""
    family = FAMILIES[kind]
    name = family.routed_class if routed else family.stock_class
    classes = (getattr(pmod_model if routed else transformers, name),)

    # By these names the tests know which classes take labels and have a language modelling head.
    common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[classes[0].config_class.model_type] = name

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = classes
        _is_composite = True
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = Inputs(kind, routed)

    found: dict[str, str] = {}
    for test in unittest.TestLoader().loadTestsFromTestCase(Case):
        result = unittest.TestResult()
        test.run(result)
        failed = result.failures + result.errors
        if failed:
            found[test._testMethodName] = failed[0][1].strip().splitlines()[-1]
        else:
            found[test._testMethodName] = "skipped" if result.skipped else "passed"
    return found


@pytest.mark.parametrize("kind", visual.KINDS)
def test_what_passes_on_stock_passes_on_ours(common, kind):
    torch.manual_seed(0)
    stock, ours = outcomes(common, kind, routed=False), outcomes(common, kind, routed=True)
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    print(f"{kind}: stock passes {len(passed)}; ours {sum(ours[name] == 'passed' for name in passed)} of these")
    lost = {name: ours[name] for name in passed if ours[name] != "passed" and name not in BY_NATURE}
    assert len(passed) >= 40
    assert not lost, "\n".join(f"{name}: {why}" for name, why in lost.items())
