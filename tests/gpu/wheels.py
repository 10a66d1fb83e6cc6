"""`make gpu-wheels`: what a machine with a GPU and no package index lacks, for Python 3.12 on x86-64 Linux.

Versions are those of the lock. What torch 2.11 and transformers 5.17 bring along is there already (`THERE`), and what
only other tests and tools need is left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).parent.parent.parent
TARGET = {"python_version": "3.12", "sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
LIMIT = 80 * 2**20  # bytes, with the tree
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
THERE = """
    torch numpy pandas pyarrow matplotlib pillow protobuf sentencepiece sympy mpmath networkx jinja2 markupsafe
    setuptools pyyaml regex requests urllib3 certifi idna charset-normalizer tqdm packaging typing_extensions psutil
    typer rich pygments markdown-it-py mdurl shellingham click annotated-doc anyio h11 fonttools kiwisolver contourpy
    cycler pyparsing python-dateutil six tzdata aiohttp multidict yarl frozenlist propcache aiosignal aiohappyeyeballs
    attrs xxhash lxml hf-xet pytest pluggy iniconfig pytest-xdist execnet
"""
LEFT_OUT = """
    decord tensorboard tensorboard-data-server grpcio absl-py werkzeug markdown hatchling pathspec trove-classifiers
    editables playwright greenlet pyee ruff mypy mypy_extensions librt ast_serialize types-pyyaml coverage pytest-cov
    chardet torchvision qwen-vl-utils mkdocs mkdocs-material mkdocs-material-extensions mkdocs-get-deps babel
    backrefs colorama ghp-import mergedeep paginate pymdown-extensions pyyaml-env-tag watchdog
"""
SOURCE_ONLY = ["fvcore", "iopath"]
BESIDE_THE_LOCK = ["deepspeed==0.19.8", "hjson==3.1.0"]  # needs a compiler only for kernels that are not used here
TOO_LARGE = {
    "bitsandbytes": "42 MB: QLoRA is skipped there",
    "flash-attn": "no wheel exists: SDPA's flash kernel is used",
}


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".wheels"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()  # two versions of one package would stop the installation
    there = [_plain(name) for name in (THERE + LEFT_OUT).split()]
    wanted = [line for line in _lock() if _plain(line) not in there]
    source = [line for line in wanted if _plain(line) in SOURCE_ONLY]
    binary = [line for line in wanted if line not in source]
    target = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3"]
    target += ["--abi=none", *(f"--platform={platform}" for platform in PLATFORMS)]
    _pip("download", "--no-deps", *target, "--dest", str(folder), *binary)
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *source, *BESIDE_THE_LOCK)
    foreign = [
        wheel.name for wheel in folder.glob("*.whl") if "none-any" not in wheel.name and "x86_64" not in wheel.name
    ]
    wheels = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree = sum((ROOT / name).stat().st_size for name in tracked.split("\0") if name and (ROOT / name).is_file())
    print(f"{folder}: {wheels / 2**20:.1f} MiB of wheels, {tree / 2**20:.1f} MiB of tree")
    for name, why in TOO_LARGE.items():
        print(f"not carried: {name}, {why}")
    if foreign:
        print(f"not for the target: {', '.join(foreign)}", file=sys.stderr)
    if wheels + tree > LIMIT:
        print(f"together more than {LIMIT / 2**20:.0f} MiB", file=sys.stderr)
    return int(bool(foreign) or wheels + tree > LIMIT)


def _lock() -> list[str]:
    """`name==version` of each package of the lock that is meant for the target; hashes and markers are left out."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line.split("\\")[0].split(";") for line in lines if "==" in line and line[0] not in "# "]
    return [name.strip() for name, *markers in pinned if all(Marker(marker).evaluate(TARGET) for marker in markers)]


def _plain(requirement: str) -> str:
    return requirement.split("==")[0].lower().replace("_", "-")


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
