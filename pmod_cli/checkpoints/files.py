"""Weights on disk, read from index and headers: where each tensor's bytes are. No weight is loaded.

Safetensors files need no torch; pickled ones do, and only their tables are read, by torch's restricted unpickler.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pmod_cli.core import json_text
from pmod_cli.core.errors import PmodError, first_line

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
FETCH = "fetch it again"
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32"}
TORCH_NAMES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Tensor:
    """Bytes of one tensor, row-major.

    Attributes:
        path: File that holds them.
        dtype: As safetensors names it: `F32`, `BF16`, ...
        shape: Its sizes.
        offset: First byte in the file.
        loaded: The tensor itself, where its bytes do not lie in the file in one piece (old or strided pickles).
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    loaded: Any = field(default=None, compare=False, repr=False)

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def nbytes(self) -> int:
        """Size in bytes: every dtype of the format names its bits, except BOOL, which takes a byte."""
        bits = re.search(r"\d+", self.dtype)
        return prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def is_zero(tensor: Tensor) -> bool:
    """Whether every byte of a tensor is zero; it is read in pieces, up to the first that is not."""
    if tensor.loaded is not None:
        return not tensor.loaded.any()
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        pieces = (file.read(min(1 << 20, tensor.nbytes - start)) for start in range(0, tensor.nbytes, 1 << 20))
        return not any(map(any, pieces))


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        PmodError: the file is absent, holds something else, or names a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise PmodError(f"{path} names {twice!r} twice", hint=FETCH)
        return value

    try:
        value = json_text.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise PmodError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise PmodError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise PmodError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def refuse_outside(folder: Path, path: Path) -> None:
    """Hold a file that is to be copied to its folder: a symbolic link could bring any file of the machine along.

    Links within the folder are fine, and those of a snapshot of the Hugging Face cache to the blobs of its repository.

    Raises:
        PmodError: it is a link to somewhere else.
    """
    real, home = path.resolve(), folder.resolve()
    blobs = [parent.parent / "blobs" for parent in (home, *home.parents) if parent.name == "snapshots"]
    if not real.is_relative_to(home) and not any(real.is_relative_to(place) for place in blobs):
        raise PmodError(
            f"{path} is a symbolic link out of its folder, to {real}: its contents would go into the result",
            hint="put the file itself in its place, if it belongs there",
        )


def shard_names(folder: Path) -> list[str]:
    """Weight files in order. A single file wins over an index, as it does when the checkpoint is loaded.

    Raises:
        PmodError: there are none, or the index names something outside the folder.
    """
    for single, index in ((SINGLE, INDEX), (PICKLED_SINGLE, PICKLED_INDEX)):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            names = sorted(set(_weight_map(folder / index).values()))
            ending = Path(single).suffix
            for name in names:
                if name != Path(name).name or not name.endswith(ending):
                    raise PmodError(f"{folder / index} names {name!r}: expected a {ending} file in the same folder")
            return names
    raise PmodError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")


def missing_files(folder: Path, *, weights: bool = True) -> list[str]:
    """Names of the files that a whole checkpoint would have and `folder` has not."""
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if weights and not any((folder / name).is_file() for name in (SINGLE, INDEX, PICKLED_SINGLE, PICKLED_INDEX)):
        missing.append(f"{SINGLE} (or {INDEX})")
    elif weights:
        missing += [name for name in shard_names(folder) if not (folder / name).is_file()]
    return missing


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, from the headers, checked against the index.

    Raises:
        PmodError: a file is absent or damaged, or index and headers differ.
    """
    tensors: dict[str, Tensor] = {}
    shards = shard_names(folder)
    for shard in shards:
        found = read_file(folder / shard)
        if twice := sorted(tensors.keys() & found.keys()):
            files = f"{tensors[twice[0]].file} and in {shard}"
            raise PmodError(f"{folder} holds {len(twice)} tensors twice: {twice[0]} is in {files}", hint=FETCH)
        tensors |= found
    index = folder / (INDEX if shards[0].endswith(".safetensors") else PICKLED_INDEX)
    if shards[0] in (SINGLE, PICKLED_SINGLE):
        return tensors
    differing = [n for n, file in _weight_map(index).items() if n not in tensors or tensors[n].file != file]
    if differing:
        raise PmodError(
            f"{index} names {len(differing)} tensors that its files lack: {', '.join(differing[:5])}",
            hint=FETCH,
        )
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of one weight file, safetensors or pickled.

    Raises:
        PmodError: the file is absent, damaged, or a pickle that needs code of its own to be read.
    """
    if not path.is_file():
        raise PmodError(f"{path.parent} lacks {path.name}, which its index names", hint=FETCH)
    return _read_header(path) if path.suffix == ".safetensors" else _read_pickle(path)


def header_digest(path: Path) -> str | None:
    """SHA-256 of a safetensors header (names, shapes, dtypes, offsets): a fingerprint that costs no read of weights.

    None of a pickle, which has no header.
    """
    if path.suffix != ".safetensors":
        return None
    with open(path, "rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def encode_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The start of a safetensors file, up to its data, for tensors of (dtype, shape) in this order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + Tensor(Path(), dtype, shape).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts at a multiple of eight
    return len(encoded).to_bytes(8, "little") + encoded


def _read_header(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks lengths, offsets, overlaps and dtypes
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise PmodError(f"{path} is not a whole safetensors file: {error}", hint=FETCH) from error
    header.pop("__metadata__", None)
    return {  # in the order of their bytes, so that what is copied is copied in long runs
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Names, shapes and places by torch's restricted unpickler, which runs no code and here reads no weights."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            values = torch.load(path, map_location="cpu", weights_only=True)
        lies = {name: _lies_whole(tensor) for name, tensor in values.items()}
        loaded = {} if all(lies.values()) else torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # of a damaged file, or one that holds more than tensors, the reader raises nearly anything
        raise PmodError(
            f"{path} is pickled, and loading such a pickle can run any code; torch's safe reader says: "
            f"{first_line(error)}",
            hint="take a safetensors version of the model: most repositories have one",
        ) from error
    tensors = {}
    for name, tensor in values.items():
        dtype = DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise PmodError(f"{path}: {name} is {tensor.dtype}, expected float32, bfloat16 or float16 weights")
        if lies[name]:
            offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
            tensors[name] = Tensor(path, dtype, tuple(tensor.shape), offset)
        else:
            tensors[name] = Tensor(path, dtype, tuple(tensor.shape), loaded=loaded[name].contiguous())
    return tensors


def _lies_whole(tensor: Any) -> bool:
    """Whether the tensor's bytes are one range of the file, whose start torch tells."""
    return tensor.is_contiguous() and getattr(tensor.untyped_storage(), "_checkpoint_offset", None) is not None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise PmodError(f"{index} has no weight_map of tensor names to file names")
    if not weight_map:
        raise PmodError(f"{index} names no tensor", hint=FETCH)
    return weight_map
