"""Which accelerators there are, asked without importing torch where there can be none."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# What the driver of a GPU leaves on Linux: NVIDIA, AMD, Windows' own, and what other makers' drivers share.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri")


def may_have_accelerator() -> bool:
    """False where torch can find none: then nobody has to wait until it is imported."""
    if sys.platform != "linux" or any(Path(file).exists() for file in DEVICE_FILES):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def count_gpus() -> int:
    """CUDA devices that torch may use here. It opens none of them."""
    if not may_have_accelerator():
        return 0
    import torch

    return torch.cuda.device_count()


def find_accelerator() -> str | None:
    """The kind of the accelerator that torch would take, such as `cuda` or `mps`; None where there is none."""
    if not may_have_accelerator():
        return None
    import torch

    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else accelerator.type
