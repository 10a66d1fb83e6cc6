"""Paths as people type them."""

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With the home folder in place of `~`. A name such as `~draft`, which is no user's, stays what it is.

    `Path.expanduser` ends in a RuntimeError there.
    """
    return Path(os.path.expanduser(path))
