"""Seeded damage to a checkpoint folder: its config, its index, its weight files."""

import json
import os
import random
import struct
from pathlib import Path

JUNK = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "32", "\x00", "\ud800", "../..", "/etc/passwd", "a/b/c/d", "é" * 300),
    *([], [[]], [1, 2], [[1, 2], [3]], {}, {"model_type": "llama"}, {"": None}),
]


def mutate(folder: Path, seed: int) -> str:
    """Damage one thing in a copy of a checkpoint; returns what was done."""
    draw = random.Random(seed)
    kinds = [config_value, config_text, weights_header, weights_bytes, weights_swapped]
    kinds += [index_value, index_value] if list(folder.glob("*.index.json")) else [config_value]
    kind = draw.choice(kinds)
    return f"{kind.__name__}: {kind(folder, draw)}"


def config_value(folder: Path, draw: random.Random) -> str:
    return change(folder / "config.json", draw)


def index_value(folder: Path, draw: random.Random) -> str:
    path = next(iter(folder.glob("*.index.json")))
    index = json.loads(path.read_text())
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    what = draw.choice(["escape", "absent", "twice", "moved", "lost", "junk", "any"])
    name = draw.choice(names)
    if what == "any":
        return change(path, draw)
    if what == "twice":
        text = path.read_text()
        line = f'"{name}": "{draw.choice(files)}",'
        path.write_text(text.replace('"weight_map": {', '"weight_map": {' + line, 1))
        return f"{what} {name}"
    if what == "lost":
        del index["weight_map"][name]
    else:
        outside = ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", ".", "..", "\x00.safetensors"]
        value = {"escape": draw.choice(outside), "absent": "model-00099.safetensors", "moved": draw.choice(files)}
        index["weight_map"][name] = value[what] if what in value else draw.choice(JUNK)
    path.write_text(json.dumps(index))
    return f"{what} {name}"


def change(path: Path, draw: random.Random) -> str:
    """Set or delete one value anywhere in a JSON file."""
    root = json.loads(path.read_text())
    places = []

    def walk(value) -> None:
        if isinstance(value, dict):
            places.extend((value, key) for key in value)
            for inner in value.values():
                walk(inner)

    walk(root)
    holder, key = draw.choice(places)
    if draw.random() < 0.2:
        del holder[key]
        what = f"del {key}"
    else:
        holder[key] = draw.choice(JUNK)
        what = f"{key} = {str(holder[key])[:40]!a}"
    path.write_text(json.dumps(root))
    return what


def config_text(folder: Path, draw: random.Random) -> str:
    path = folder / "config.json"
    data = path.read_bytes()
    what = draw.choice(["cut", "empty", "deep", "bytes", "list", "absent", "folder"])
    if what == "absent":
        path.unlink()
        return what
    if what == "folder":
        path.unlink()
        path.mkdir()
        return what
    noise = bytes(draw.randrange(256) for _ in range(50))
    path.write_bytes(
        {
            "cut": data[: draw.randrange(len(data))],
            "empty": b"",
            "deep": b"[" * 100_000,
            "bytes": noise,
            "list": b"[]",
        }[what]
    )
    return what


def weights_header(folder: Path, draw: random.Random) -> str:
    """Change a value in the header of a safetensors file, or its bytes; in a pickle, bytes near its ends."""
    path = draw.choice(weight_files(folder))
    data = bytearray(path.read_bytes())
    if path.suffix != ".safetensors":
        return weights_bytes(folder, draw)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = draw.choice(["dtype", "shape", "offsets", "name", "entry", "length", "flip"])
    if what == "length":
        data[:8] = struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 2**40, 2**63]))
    elif what == "flip":
        for _ in range(draw.randrange(1, 5)):
            data[8 + draw.randrange(length)] = draw.randrange(256)
    else:
        if what == "dtype":
            entry["dtype"] = draw.choice(["F16", "I32", "U8", "I4", "F99", "F8_E4M3", None, 3])
        elif what == "shape":
            entry["shape"] = draw.choice([[], entry["shape"][::-1], [*entry["shape"], 1], [-1], [2**62, 4], "x", [0]])
        elif what == "offsets":
            start, end = entry["data_offsets"]
            entry["data_offsets"] = draw.choice(
                [[start, end + 4], [end, start], [start - 4, end], [0, 0], [2**63, 2**63], []]
            )
        elif what == "name":
            header[draw.choice(["x", "", "model.layers.99.input_layernorm.weight", name + ".router.weight"])] = (
                header.pop(name)
            )
        else:
            header[name] = draw.choice(JUNK[:-6])
        encoded = json.dumps(header).encode()
        data[: 8 + length] = struct.pack("<Q", len(encoded)) + encoded
    path.write_bytes(data)
    return f"{path.name} {what} {name}"


def weights_bytes(folder: Path, draw: random.Random) -> str:
    path = draw.choice(weight_files(folder))
    what = draw.choice(["cut", "empty", "longer", "absent", "noise", "start"])
    if what == "absent":
        path.unlink()
    elif what in ("cut", "empty"):
        os.truncate(path, draw.randrange(path.stat().st_size) if what == "cut" else 0)
    elif what == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    elif what == "noise":
        path.write_bytes(bytes(draw.randrange(256) for _ in range(200)))
    else:
        data = bytearray(path.read_bytes())
        data[: draw.randrange(1, 64)] = bytes(draw.randrange(256) for _ in range(8))
        path.write_bytes(data)
    return f"{path.name} {what}"


def weights_swapped(folder: Path, draw: random.Random) -> str:
    """Two shards change their names, or one becomes the other; a single one becomes the tower's, if there is one."""
    files = weight_files(folder)
    if len(files) < 2:
        return weights_bytes(folder, draw)
    a, b = draw.sample(files, 2)
    if draw.random() < 0.5:
        a.write_bytes(b.read_bytes())
    else:
        aside = folder / "aside"
        a.rename(aside)
        b.rename(a)
        aside.rename(b)
    return f"{a.name} {b.name}"


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
