"""Every test runs offline, in a home of its own, in a terminal of 100 columns without colour, on one thread."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

# Read by libraries when they are imported, hence before any of them is.
_HOME = tempfile.TemporaryDirectory(prefix="pmod-tests-")
os.environ.update(
    HF_HOME=_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLCONFIGDIR=_HOME.name,
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # threads that wait for each other burn more time than they save on models this small
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="100",
    NO_COLOR="1",
)
# Without bytecode every process that a test starts would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT", "PMOD_MODEL", "PMOD_DEBUG", "FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _reset_output() -> None:
    """--quiet and --no-progress of one test do not reach the next."""
    from pmod_cli.core import output

    output.set_quiet(False)
    output.set_progress(True)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is also the current one, so that ./.pmod/current is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def stock_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`stock_model(kind="llava_next", decoder="llama", **options)`: a tiny random checkpoint, made once a session.

    Read-only by convention: a test that changes one copies it first. Options are those of `factories.save_stock`.
    """
    from tests.factories import save_stock

    root, made = tmp_path_factory.mktemp("stock"), {}

    def get(kind: str = "llava_next", decoder: str = "llama", **options) -> Path:
        key = (kind, decoder, *sorted(options.items()))
        if key not in made:
            made[key] = save_stock(root / f"{kind}-{decoder}-{len(made)}", kind, decoder, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pmod() -> Callable[..., subprocess.CompletedProcess]:
    """`pmod("convert", "x", cwd=..., env=...)` as a user runs it; the result has returncode, stdout, stderr as text."""

    def run(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120):
        return subprocess.run(
            [sys.executable, "-m", "pmod_cli", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none was found"))
