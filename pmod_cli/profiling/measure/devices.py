"""GPUs by name: memory, peak arithmetic and bandwidth, as their makers state them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import GIB, GIGA, MIB, TERA

MOST_GB = 10**6  # of a device


@dataclass(frozen=True)
class Device:
    """What a device can do at best.

    Args:
        name: As people call it.
        memory: Bytes.
        flops: Dense bfloat16 matrix products with float32 accumulation a second (float16 where there is no bfloat16);
            0 unknown.
        bandwidth: Bytes of memory traffic a second; 0 unknown.
        source: Where the numbers stand.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    source: str


def _nvidia(name: str, memory_mib: int, tflops: float, gb_per_s: float, source: str) -> Device:
    return Device(name, memory_mib * MIB, tflops * TERA, gb_per_s * GIGA, source)


# Memory is what the driver reports, where error correction has taken its part. Arithmetic and bandwidth are the
# makers'; where a datasheet gives throughput with sparsity, this is the dense half.
DEVICES = {
    "t4": _nvidia("T4", 15360, 65, 320, "NVIDIA T4 datasheet (float16)"),
    "v100-32gb": _nvidia("V100 32GB", 32768, 125, 900, "NVIDIA V100 datasheet (float16)"),
    "rtx-3090": _nvidia("RTX 3090", 24576, 71, 936, "NVIDIA Ampere GA102 whitepaper"),
    "rtx-4090": _nvidia("RTX 4090", 24564, 165.2, 1008, "NVIDIA Ada GPU architecture whitepaper"),
    "a10": _nvidia("A10", 23028, 125, 600, "NVIDIA A10 datasheet"),
    "l4": _nvidia("L4", 23034, 121, 300, "NVIDIA L4 datasheet"),
    "l40s": _nvidia("L40S", 46068, 362, 864, "NVIDIA L40S datasheet"),
    "a6000": _nvidia("RTX A6000", 49140, 154.8, 768, "NVIDIA RTX A6000 datasheet"),
    "a100-40gb": _nvidia("A100 40GB", 40960, 312, 1555, "NVIDIA A100 datasheet"),
    "a100-80gb": _nvidia("A100 80GB SXM", 81920, 312, 2039, "NVIDIA A100 datasheet"),
    "h100": _nvidia("H100 SXM", 81559, 989, 3350, "NVIDIA H100 datasheet"),
    "h200": _nvidia("H200 SXM", 143771, 989, 4800, "NVIDIA H200 datasheet"),
}


def named_device(name: str, hint: str | None = None) -> Device:
    """A device by name, in any spelling of case, blanks and dashes.

    Args:
        hint: What else may be given.

    Raises:
        PmodError: an unknown name.
    """
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    if wanted not in DEVICES:
        near = difflib.get_close_matches(wanted, DEVICES, n=3, cutoff=0.4)
        others = f"Near: {', '.join(near)}" if near else f"Known: {', '.join(DEVICES)}"
        raise PmodError(f"no GPU is known as {name!r}. {others}", hint=hint)
    return DEVICES[wanted]


def parse_memory(text: str) -> Device:
    """A device from `24GB`, `80GiB` or a name. A GPU sold as 24 GB has 24 x 2**30 bytes, so both units mean that.

    Raises:
        PmodError: neither a size nor a known name.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text.strip().lower(), re.ASCII)
    if match is None:
        return named_device(text, hint="24GB names a size")
    size = float(match[1])
    if not 0 < size <= MOST_GB:
        raise PmodError(
            f"{text:.60} is no memory: expected a size above 0 and up to {MOST_GB} GB",
            hint="such as 24GB",
        )
    return Device(f"{size:g} GB", round(size * GIB), 0, 0, "as given")
