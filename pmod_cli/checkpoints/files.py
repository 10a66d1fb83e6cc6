"""The Hugging Face layout of a checkpoint folder, read from config, index and headers. No weight is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pmod_cli.errors import PmodError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is, and its shape and dtype as the header says (`F32`, `BF16`, ...)."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes: every dtype of the format names its bits, except BOOL, which takes a byte."""
        bits = re.search(r"\d+", self.dtype)
        return prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        PmodError: the file is absent or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PmodError(f"{path.parent} has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PmodError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise PmodError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def shard_names(folder: Path) -> list[str]:
    """Weight files in order. A single file wins over an index, as it does when the checkpoint is loaded.

    Raises:
        PmodError: there are none, they are pickled, or the index names something outside the folder.
    """
    if (folder / SINGLE).exists():
        return [SINGLE]
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise PmodError(
                f"{folder} has only pickled weights ({', '.join(pickled[:3])}), and loading a pickle can run any code",
                hint="take a safetensors version of the model: most repositories have one",
            )
        raise PmodError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise PmodError(f"{folder / INDEX} names {name!r}: expected a .safetensors file in the same folder")
    return names


def missing_files(folder: Path, *, weights: bool = True) -> list[str]:
    """Names of the files that a whole checkpoint would have and `folder` has not."""
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if weights and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        missing.append(f"{SINGLE} (or {INDEX})")
    elif weights and (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        missing += [name for name in shard_names(folder) if not (folder / name).is_file()]
    return missing


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, from the headers, checked against the index.

    Raises:
        PmodError: a file is absent or damaged, or index and headers differ.
    """
    tensors: dict[str, Tensor] = {}
    for shard in shard_names(folder):
        tensors |= _read_header(folder / shard)
    if (folder / SINGLE).exists():
        return tensors
    differing = [n for n, file in _weight_map(folder).items() if n not in tensors or tensors[n].file != file]
    if differing:
        raise PmodError(
            f"{folder / INDEX} names {len(differing)} tensors that its files lack: {', '.join(differing[:5])}",
            hint="fetch the checkpoint again",
        )
    return tensors


def header_digest(path: Path) -> str:
    """SHA-256 of a safetensors header (names, shapes, dtypes, offsets): a fingerprint that costs no read of weights."""
    with open(path, "rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of zeros, in any dtype of the format and without torch: numpy has no bfloat16."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + Tensor(path.name, dtype, shape).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts at a multiple of eight
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(end))


def _read_header(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {n: Tensor(path.name, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except FileNotFoundError:
        raise PmodError(f"{path.parent} lacks {path.name}, which its index names", hint="fetch it again") from None
    except SafetensorError as error:
        raise PmodError(f"{path} is not a whole safetensors file: {error}", hint="fetch it again") from error


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise PmodError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    return weight_map
