"""A film that every decoder reads, written without one: JPEG pictures in an AVI file."""

import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image


def write_avi(path: Path, pictures: Sequence[Image.Image], per_second: int) -> None:
    """Write pictures of one size as a Motion JPEG film."""
    width, height = pictures[0].size
    frames = []
    for picture in pictures:
        made = BytesIO()
        picture.save(made, "JPEG", quality=95)
        frames.append(made.getvalue() + b"\0" * (len(made.getvalue()) % 2))
    count, rate = len(frames), (per_second, 1)
    header = struct.pack("<14I", 10**6 // per_second, 0, 0, 0x10, count, 0, 1, 0, width, height, 0, 0, 0, 0)
    stream = struct.pack(
        "<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, rate[1], rate[0], 0, count, 0, 0, 0, 0, 0, width, height
    )
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", 3 * width * height, 0, 0, 0, 0)
    films = b"".join(_chunk(b"00dc", frame) for frame in frames)
    index, place = b"", 4
    for frame in frames:
        index += struct.pack("<4sIII", b"00dc", 0x10, place, len(frame))
        place += 8 + len(frame)
    lists = _list(b"hdrl", _chunk(b"avih", header) + _list(b"strl", _chunk(b"strh", stream) + _chunk(b"strf", form)))
    path.write_bytes(_chunk(b"RIFF", b"AVI " + lists + _list(b"movi", films) + _chunk(b"idx1", index)))


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data


def _list(name: bytes, data: bytes) -> bytes:
    return _chunk(b"LIST", name + data)
