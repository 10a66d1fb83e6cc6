"""Three counters agree: our formulas, fvcore's trace with our handles, and torch's own flop counter."""

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from pmod_cli.checkpoints import ALIASES, builtin_config
from pmod_cli.model import PmodSettings
from pmod_cli.profiling import Routed, Sizes, Workload, load_subject, prefill, profile
from pmod_cli.profiling.count import trace
from pmod_cli.profiling.count.workload import Row
from tests import factories
from tests.conftest import ROOT

SCHEDULES = {
    "cosine": {},
    "linear": {"schedule": "linear", "mean": 0.4},
    "stepped": {"schedule": "stepped"},
    "interleaved": {"schedule": "interleaved"},
    "constant": {"schedule": "constant", "mean": 0.3},
    "shifted": {"shift": 0.3, "max_ratio": 0.7, "min_ratio": 0.1},
    "every layer routed": {"max_ratio": 1.1, "schedule": "constant", "mean": 1.0},
    "held choice": {"schedule": "constant", "mean": 0.3, "select_at": [0, 3]},
}
NAMES = [name for name in ALIASES if not name.startswith(("tiny", "p-mod"))]
LARGEST = ("llava-1.5-13b", "llava-next-34b", "llava-next-72b", "llava-next-110b")  # half of the time
LARGE = [
    pytest.param(name, schedule, marks=[pytest.mark.slow] if name in LARGEST else [])
    for name, schedule in zip(NAMES, cycle(SCHEDULES))
]


def torchs_count(config: PreTrainedConfig, rows: list[Row], target_tokens: str | None) -> int:
    """FLOPs of vision tower, projector, all layers and lm_head by `torch.utils.flop_counter` on the meta device.

    It sees fused attention there. Images of one row are as many calls of the tower as it has tiles; layers run one
    after the other on the merged sequence, as the model runs them.
    """
    model = trace.meta_model(config)
    decoder, tower = model.model.language_model, config.vision_config
    positions = max(row.tokens for row in rows)
    states = torch.empty(len(rows), positions, config.text_config.hidden_size, device="meta", dtype=torch.bfloat16)
    tables = decoder.rotary_emb(states, torch.arange(positions, device="meta")[None])
    routed = {} if target_tokens is None else {"routing": trace.batch_routing(rows, target_tokens)}
    tiles = sum(row.tiles for row in rows)
    pixels = torch.empty(tiles, 3, tower.image_size, tower.image_size, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        model.model.multi_modal_projector(features)
        for layer in decoder.layers:
            states = layer(states, position_embeddings=tables, **routed)
        model.lm_head(states)
    return counter.get_total_flops()


@pytest.mark.parametrize(("alias", "schedule"), LARGE)
def test_large_models(alias: str, schedule: str) -> None:
    """Every published model at its real sizes, stock and p-MoD, to 0.1 %.

    torch counts the towers of one image size here, those of native resolution in `test_families`.
    """
    subject = load_subject(alias, SCHEDULES[schedule])
    result = profile(subject, Workload(image_sizes=((500, 300),), text_tokens=41))
    for pmod in (False, True):
        traced, config = (result.pmod, subject.pmod) if pmod else (result.stock, subject.stock)
        total = result.total(traced, "full")
        assert result.formula(pmod=pmod).full == pytest.approx(total, rel=1e-3)
        if hasattr(config.vision_config, "image_size"):
            assert torchs_count(config, result.rows, "vision_all" if pmod else None) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target_tokens", ["vision_all", "vision_hr"])
def test_any_schedule_and_a_padded_batch(workdir: Path, schedule: str, target_tokens: str) -> None:
    factories.config("llava_next", "qwen2", layers=8).to_json_file(workdir / "config.json")
    subject = load_subject("config.json", {**SCHEDULES[schedule], "target_tokens": target_tokens})
    result = profile(subject, Workload(image_sizes=((50, 30), (20, 90)), images=2, text_tokens=7))
    formula = result.formula(pmod=True)
    assert formula.full == pytest.approx(result.total(result.pmod, "full"), rel=1e-3)
    assert formula.paper == pytest.approx(result.total(result.pmod, "paper"), rel=1e-3)
    assert torchs_count(subject.pmod, result.rows, target_tokens) == pytest.approx(formula.full, rel=1e-3)
    if schedule == "every layer routed":
        assert formula.decoder > result.formula(pmod=False).decoder  # routers
    if schedule == "held choice":
        assert [layer.router > 0 for layer in result.pmod.layers] == [layer in (0, 3) for layer in range(8)]


def test_sizes_left_out_of_a_config_json_are_the_defaults_of_their_class() -> None:
    for kind in (LlamaConfig, MistralConfig, Qwen2Config):
        short = {"model_type": "llava", "text_config": {"model_type": kind.model_type}}
        whole = {"model_type": "llava", "text_config": kind().to_dict()}
        assert Sizes.of(short) == Sizes.of(whole), kind
    tiny = factories.config("llava_next")
    assert Sizes.of(json.loads(tiny.to_json_string(use_diff=False))) == Sizes.of(tiny)


def test_the_formula_needs_no_torch(workdir: Path) -> None:
    """Its users solve for a schedule while they convert, which writes headers and needs no torch."""
    file = workdir / "config.json"
    file.write_text(builtin_config("llava-next-7b").to_json_string(use_diff=False))
    code = (
        "import json, sys\n"
        "from pmod_cli.model import PmodSettings\n"
        "from pmod_cli.profiling import Routed, Sizes, Workload, prefill\n"
        "sizes = Sizes.of(json.load(open(sys.argv[1])))\n"
        "rows = Workload(((672, 672),)).rows(sizes)\n"
        "print(prefill(sizes, rows, Routed(PmodSettings().retention(sizes.decoder.layers))).decoder)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1e12 == pytest.approx(23.83, abs=0.005)


def test_half_of_the_square_is_what_a_causal_kernel_computes() -> None:
    sizes = Sizes.of(builtin_config("llava-1.5-7b"))
    rows = Workload().rows(sizes)
    whole, half = prefill(sizes, rows), prefill(sizes, rows, attention=0.5)
    assert half.attention_products * 2 == whole.attention_products
    assert half.paper == whole.paper
    assert PmodSettings().retention(32)[-1] == 0.15
    assert prefill(sizes, rows, Routed(PmodSettings().retention(32))).decoder < whole.decoder
