"""Seeded damage to saved selections and to pictures, for the fuzz tests."""

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from tests.checkpoints.mutations import JUNK

KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "TGA", "JPEG2000", "ICNS", "PCX", "SGI", "DIB")
EDGES = (0, 1, 7, 127, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1)
DTYPES = ("?", "|u1", "<i8", ">i8", "<f4", "<f8", "<f2", "<c16", "<U4", "|S3", "<M8[s]", "|V8")


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """Bytes set, cut, doubled or swapped, wherever it hits."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data)) if data else 0
        what = draw.choice(["byte", "byte", "number", "cut", "insert", "repeat", "head"])
        if what == "byte":
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif what == "number":
            data[place : place + 4] = struct.pack(draw.choice("<>") + "I", draw.choice(EDGES))
        elif what == "cut":
            del data[place : place + draw.choice([1, 16, len(data)])]
        elif what == "insert":
            data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
        elif what == "repeat":
            data[place:place] = data[place : place + 64] * draw.choice([1, 50])
        else:  # headers hold the sizes
            place = draw.randrange(min(64, len(data) or 1))
            data[place : place + 2] = struct.pack(">H", draw.choice([0, 1, 9999, 65535]))
    return bytes(data)


def picture(draw: random.Random) -> tuple[str, bytes]:
    """A small picture of some kind and mode, then damaged; of a PNG also with right checksums."""
    kind = draw.choice(KINDS)
    mode = draw.choice(["RGB", "L", "P", "1", "RGBA", "LA", "I;16", "CMYK", "I", "F"])
    image = Image.frombytes("RGB", (48, 32), random.Random(draw.random()).randbytes(48 * 32 * 3))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert("L").convert(mode) if mode in ("I", "F", "LA") else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = draw.randrange(10)
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, exif=exif)
    except (OSError, ValueError, KeyError):  # this kind has no such mode
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind, exif=exif)
    data = bytes_changed(buffer.getvalue(), draw)
    return f"{kind} {mode}", checksums_mended(data) if kind == "PNG" and draw.random() < 0.5 else data


def checksums_mended(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums, so that damage reaches the decoder."""
    mended, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        length = min(struct.unpack(">I", data[place : place + 4])[0], len(data) - place - 12)
        body = data[place + 4 : place + 8 + length]
        mended += struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return bytes(mended)


def selection(good: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A saved selection with one thing changed: a byte of the file, a member, an array, a header, a word."""
    kind = draw.choice([file_bytes, member_bytes, array_values, array_kind, array_header, word, word])
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return kind.__name__, kind(good, members, draw)


def file_bytes(good: bytes, members: Mapping[str, bytes], draw: random.Random) -> bytes:
    return bytes_changed(good, draw)


def member_bytes(good: bytes, members: Mapping[str, bytes], draw: random.Random) -> bytes:
    name = draw.choice(sorted(members))
    return packed({**members, name: bytes_changed(members[name], draw)}, draw)


def array_values(good: bytes, members: Mapping[str, bytes], draw: random.Random) -> bytes:
    name = draw.choice(sorted(set(members) - {"about.npy"}))
    array = np.load(io.BytesIO(members[name])).copy()
    flat = array.reshape(-1).view(np.uint8)
    special = [np.nan, np.inf, -np.inf, -1, 1e300, 2**62]
    for _ in range(draw.randint(1, 5) if flat.size else 0):
        if array.dtype.kind in "fi" and draw.random() < 0.7:
            with np.errstate(all="ignore"):
                array.reshape(-1)[draw.randrange(array.size)] = np.float64(draw.choice(special)).astype(array.dtype)
        else:
            flat[draw.randrange(flat.size)] = draw.randrange(256)
    return packed({**members, name: saved(array)}, draw)


def array_kind(good: bytes, members: Mapping[str, bytes], draw: random.Random) -> bytes:
    name = draw.choice(sorted(set(members) - {"about.npy"}))
    array = np.load(io.BytesIO(members[name]))
    changed = {
        "dtype": lambda: array.astype(draw.choice(["i8", "f4", "f2", "u1", "c16", "U4", "S3", "?"]), casting="unsafe"),
        "fewer": lambda: array[: len(array) // 2],
        "turned": lambda: array.T,
        "axis": lambda: array[None],
        "none": lambda: array[:0],
        "back": lambda: array[::-1],
        "fortran": lambda: np.asfortranarray(array),
        "large": lambda: np.zeros((draw.choice([10**6, 3 * 10**7]),), array.dtype),
    }
    with np.errstate(all="ignore"):
        return packed({**members, name: saved(changed[draw.choice(sorted(changed))]())}, draw)


def array_header(good: bytes, members: Mapping[str, bytes], draw: random.Random) -> bytes:
    name = draw.choice(sorted(members))
    lengths = (0, 1, 2, 3, 32, 40_000, 2**31, 2**63, -1)
    shape = tuple(draw.choice(lengths) for _ in range(draw.randint(0, 4)))
    stated = {"descr": draw.choice(DTYPES), "fortran_order": draw.random() < 0.3, "shape": shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, stated)
    buffer.write(bytes(draw.choice([0, 100, 10**7])))
    return packed({**members, name: buffer.getvalue()}, draw)


def word(good: bytes, members: Mapping[str, bytes], draw: random.Random) -> bytes:
    about = json.loads(str(np.load(io.BytesIO(members["about.npy"]))))
    key = draw.choice(sorted(about))
    if draw.random() < 0.2:
        del about[key]
    else:
        about[key] = draw.choice([*JUNK, ["image"], ["base", "tiles"], [[0, 0, 1, 1]], "x" * 10**5, "\u202e$\\frac"])
    return packed({**members, "about.npy": saved(np.array(json.dumps(about)))}, draw)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def packed(members: Mapping[str, bytes], draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()
