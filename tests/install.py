"""`make setup`: what requirements.lock names, into the environment of the Python that runs this. Standard library only.

    python tests/install.py            # the lock, pmod itself, and what torch lacks
    python tests/install.py lock       # writes requirements.lock anew from what is installed

Everything but torch and torchvision has to match a digest in the lock. They come in several builds of one version (with
CUDA, without, from pytorch.org's own index), whose digests no single index lists, so only their versions are held. A
build with CUDA needs libraries that are packages of their own: they are installed only where `import torch` asks for
them. The operators of torchvision are compiled for one build of torch: beside another it is made to do without.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from importlib.metadata import distributions, requires
from pathlib import Path

LOCK = Path("requirements.lock")
INDEX = os.environ.get("PYTORCH_INDEX")  # where torch alone is taken from
PIP = [sys.executable, "-m", "pip"]


def install() -> None:
    lock = LOCK.read_text(encoding="utf-8")
    builds = re.findall(r"^torch(?:vision)?==\S+", lock, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        hashed = Path(folder) / LOCK.name
        hashed.write_text(re.sub(r"^torch(?:vision)?==\S+", "", lock, flags=re.MULTILINE), encoding="utf-8")
        _pip("install", "--quiet", "--no-deps", "--require-hashes", "--requirement", str(hashed))
    _pip("install", "--quiet", "--no-deps", *(["--index-url", INDEX] if INDEX else []), *builds)
    _pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
    if (error := _import_error("torch")) is not None:
        _complete_torch(error)
    if (error := _import_error("torchvision")) is not None:
        _spare_operators(error)


def _complete_torch(error: str) -> None:
    """Installs the libraries that a build of torch with CUDA needs."""
    missing = _missing("torch")
    if not missing:
        sys.exit(f"torch does not run on this machine: {error}")
    print(
        f"This build of torch needs {len(missing)} more packages ({error}): {_size(missing)}.\n"
        "A build without CUDA needs none of them. To take it instead: Ctrl-C, then\n"
        "  make clean && make setup PYTORCH_INDEX=URL\n"
        "with the URL that pytorch.org/get-started/locally shows for pip and CPU.",
        file=sys.stderr,
        flush=True,
    )
    _pip("install", "--quiet", *missing)
    if (error := _import_error("torch")) is not None:
        sys.exit(f"torch still does not run on this machine: {error}")


UNCOMPILED = """

# Written by pmod's `make setup`: this build's operators are compiled for another build of torch. Declared, they let the
# package be imported; its transforms, which are all that image and video processors use, are plain Python.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def _spare_operators(error: str) -> None:
    """Lets torchvision be imported beside a torch that its compiled operators do not fit."""
    file = Path(sysconfig.get_path("purelib"), "torchvision", "extension.py")
    if "operator torchvision::" in error and file.is_file() and UNCOMPILED not in file.read_text(encoding="utf-8"):
        file.write_text(file.read_text(encoding="utf-8") + UNCOMPILED, encoding="utf-8")
        error = _import_error("torchvision")
    if error is not None:
        sys.exit(f"torchvision does not run on this machine: {error}")


def _pip(*arguments: str) -> None:
    result = subprocess.run([*PIP, *arguments])
    if result.returncode:
        sys.exit(f"pip {arguments[0]} failed: what it printed above tells why. Run the same command again to go on")


def _import_error(module: str) -> str | None:
    """The last line of what importing `module` prints, or None if it works."""
    result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    return (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1] if result.returncode else None


def _missing(package: str) -> list[str]:
    """What a package declares for this machine and is not installed."""
    from packaging.requirements import Requirement  # part of the lock
    from packaging.utils import canonicalize_name

    present = {canonicalize_name(each.name) for each in distributions()}
    declared = [Requirement(line) for line in requires(package) or []]
    return [
        f"{each.name}{'[' + ','.join(sorted(each.extras)) + ']' if each.extras else ''}{each.specifier}"
        for each in declared
        if (each.marker is None or each.marker.evaluate({"extra": ""})) and canonicalize_name(each.name) not in present
    ]


def _size(requirements: list[str]) -> str:
    """How much is downloaded for `requirements`, in words; the index is asked for the size of each file."""
    unknown = "several GB to download, and about twice that on the disk"
    free = f"{shutil.disk_usage('.').free / 1e9:.0f} GB are free here"
    report = subprocess.run(
        [*PIP, "install", "--quiet", "--dry-run", "--report", "-", *requirements], capture_output=True, text=True
    )
    try:
        urls = [each["download_info"]["url"] for each in json.loads(report.stdout)["install"]]
        total = 0
        for url in urls:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as reply:
                total += int(reply.headers["Content-Length"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{unknown}; {free}"
    return f"{total / 1e9:.1f} GB to download, and about twice that on the disk; {free}"


def lock() -> None:
    """Pins what is installed, with the digests of all files that the index has of each version."""
    old = LOCK.read_text(encoding="utf-8")
    markers = dict(re.findall(r"^([\w.-]+)==\S+ ; (.+?)(?: \\)?$", old, re.MULTILINE))  # where there is no such package
    command = [*PIP, "freeze", "--all", "--exclude", "pip", "--exclude", "pmod-cli"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    pins = [re.sub(r"\+\S+$", "", line) for line in frozen]
    pins = [f"{pin} ; {markers[name]}" if (name := pin.partition("==")[0]) in markers else pin for pin in pins]
    with tempfile.TemporaryDirectory() as folder:
        _pip("install", "--quiet", "--target", folder, "uv")  # knows all platforms; pip digests only files of its own
        command = [f"{folder}/bin/uv", "pip", "compile", "--quiet", "--no-deps", "--universal", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "-"]
        hashed = subprocess.run(command, input="\n".join(pins), capture_output=True, text=True)
    if hashed.returncode:
        sys.exit(f"uv could not write the lock: {hashed.stderr}")
    pinned = re.sub(r"^(torch(?:vision)?==\S+)(?: \\\n +--hash=\S+)+", r"\1", hashed.stdout, flags=re.MULTILINE)
    new = LOCK.with_suffix(".lock.new")
    new.write_text("".join(re.findall(r"^#.*\n", old, re.MULTILINE)) + pinned, encoding="utf-8")
    new.replace(LOCK)


if __name__ == "__main__":
    lock() if sys.argv[1:] == ["lock"] else install()
