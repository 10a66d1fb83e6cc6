"""Which releases of transformers p-MoD is tested with, and what becomes of the others.

Stock layers, caches and models are subclassed closely, so a new release may change what routing builds on. An older one
is refused. A newer one is tried first: on the first load, a small random model has to compute what it must.
"""

import re
from importlib.metadata import version

OLDEST, NEWEST = (5, 20), (5, 24)
REQUIREMENT = f"transformers>={'.'.join(map(str, OLDEST))},<{NEWEST[0]}.{NEWEST[1] + 1}"
RELEASE = tuple(int(number) for number in re.findall(r"\d+", version("transformers"))[:2])


class UnsupportedTransformers(ImportError):
    """This release of transformers is too old, or it does not do what p-MoD builds on."""

    def __init__(self, reason: str) -> None:
        oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
        super().__init__(
            f"transformers {version('transformers')} {reason}; p-MoD is tested with {oldest} to {newest}: "
            f"pip install '{REQUIREMENT}'",
            name="transformers",
        )


if RELEASE < OLDEST:
    raise UnsupportedTransformers("is too old")
