"""A remote-code folder in other people's programs: compiled, in 8 and 4 bit, and by the example of its own card."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from pmod_cli.checkpoints import Options, convert
from pmod_cli.model import PmodSettings
from tests import factories

PROGRAM = Path(__file__).parent / "remote_use.py"
LAYERS = 12  # more than the recompilations that torch allows
SETTINGS = PmodSettings(schedule="list", values=tuple(1 - 0.07 * layer for layer in range(LAYERS)))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """`remote(kind, **text)`: a folder of a tiny model with random routers, each layer with a ratio of its own."""
    made = {}

    def make(kind: str, layers: int = LAYERS, **text: int) -> Path:
        key = (kind, layers, *text.items())
        if key not in made:
            root = tmp_path_factory.mktemp(kind)
            stock = factories.save_stock(root / "stock", kind, layers=layers, **text)
            settings = PmodSettings(schedule="list", values=SETTINGS.values[:layers])
            convert(stock, root / "my-model", settings, Options(to="remote-code", router_init="normal:1"))
            made[key] = root / "my-model"
        return made[key]

    return make


def run(folder: Path, *words: str, cwd: Path | None = None) -> str:
    """Standard output of a Python that has another home, and so no code of another test."""
    home = folder.parent / "home"
    more = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    # -I leaves PYTHONPATH out, and with it packages that are only there.
    paths = f"import sys; sys.path += {os.environ.get('PYTHONPATH', '').split(os.pathsep)!r}; "
    start = f"import runpy; sys.argv = {list(words)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", paths + start], env=os.environ | more, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def use(folder: Path, task: str) -> dict:
    return json.loads(run(folder, str(PROGRAM), task, str(folder)).splitlines()[-1])


def test_the_forward_of_llava_is_one_graph(remote):
    """From pixels to logits, compiled once for three prompts of unequal shapes, and not once a layer."""
    found = use(remote("llava"), "compile")
    assert found["layers"] == LAYERS
    assert found["graphs"] == 1
    assert max(found["differences"]) < 1e-4


def test_the_forward_of_llava_next_is_one_graph_behind_the_tower(remote):
    found = use(remote("llava_next"), "compile-merged")
    assert found["graphs"] == 1
    assert max(found["differences"]) < 1e-4


def test_pixels_of_tiles_break_the_graph_of_the_stock_model_too(remote):
    """What is said in docs/convert.md: the day this fails, it can be taken out there."""
    ours = remote("llava_next")
    broken = [use(folder, "compile").get("broken", "") for folder in (ours, ours.parent / "stock")]
    assert all("output_capturing.py" in what for what in broken), broken


@pytest.mark.parametrize(
    ("name", "most"),
    [("ao-int8", 1e-4), ("ao-int4", 1e-4), ("bnb-int8", 0.1), ("bnb-nf4", 0.05)],
)
def test_eight_and_four_bit(remote, name, most):
    """Logits are those of the rounded weights: exactly so, or as far as activations are rounded too (bitsandbytes)."""
    package = {"ao": "torchao", "bnb": "bitsandbytes"}[name.partition("-")[0]]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install 'pmod-cli[clients]'")
    found = use(remote("llava", layers=4, hidden_size=64, intermediate_size=128), name)
    assert found["changed"] >= 4 * 7
    assert found["routed"] == len(found["routers"]) == 3
    assert all(found["routers"]), "routers are not quantised"
    assert max(found["errors"]) < most
    assert all(len(words) == 4 for words in found["words"])


def test_the_example_of_the_card_runs_as_it_stands(remote, tmp_path):
    folder = remote("llava_next", layers=4)
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (folder.parent / "example.py").write_text(program)
    Image.effect_mandelbrot((64, 40), (-2, -1.5, 1, 1.5), 30).convert("RGB").save(folder.parent / "picture.png")
    said = run(folder, "example.py", cwd=folder.parent)
    assert said.strip()
