"""Sizes as people read them: decimal units for FLOPs, files and disks, binary ones for memory."""

from __future__ import annotations

MEGA, GIGA, TERA = 10**6, 10**9, 10**12
KIB, MIB, GIB = 2**10, 2**20, 2**30


def percent(part: float, whole: float) -> float:
    """Part of whole in percent; 100 where both are nothing."""
    return 100 * part / whole if whole else 100.0


def disk_size(number: float) -> str:
    """Bytes of files: `512 B`, `3.4 MB`, `14 GB`."""
    return _in_unit(number, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory_size(number: float) -> str:
    """Bytes of memory: `512 B`, `3.4 MiB`, `14 GiB`."""
    return _in_unit(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _in_unit(number: float, factor: int, units: tuple[str, ...]) -> str:
    """Three digits tell what fits: one behind the point below 100, none above, and none that is 0."""
    for unit in units:
        digits = 0 if unit == "B" or number >= 99.95 else 1
        if round(number, digits) < factor or unit == units[-1]:
            return f"{number:,.{digits}f}".removesuffix(".0") + f" {unit}"
        number /= factor
    raise AssertionError("the last unit takes every number")
