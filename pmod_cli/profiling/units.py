"""Units of what is shown: decimal FLOPs, binary bytes."""

MEGA, GIGA, TERA = 10**6, 10**9, 10**12
KIB, MIB, GIB = 2**10, 2**20, 2**30


def percent(part: float, whole: float) -> float:
    """Part of whole in percent; 100 where both are nothing."""
    return 100 * part / whole if whole else 100.0
