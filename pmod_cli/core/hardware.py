"""Which accelerators there are, asked without importing torch where there can be none."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

from pmod_cli.core.errors import PmodError

# What the driver of a GPU leaves on Linux: NVIDIA, AMD, Windows' own, and what other makers' drivers share.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri")

KERNELS = ("sdpa", "eager", "flash_attention_2")


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


def require_device(device: str, processes: int = 1) -> None:
    """Refuse a device that is not on this machine.

    Args:
        device: cpu, cuda, cuda:N or mps.
        processes: Processes of this machine; on GPUs each takes one of its own.

    Raises:
        PmodError: there is none, or there are fewer than processes.
    """
    kind, _, number = device.partition(":")
    if kind == "mps" and find_accelerator() != "mps":
        raise PmodError("the device is mps, and there is none on this machine", hint="`device=cpu`")
    if kind != "cuda":
        return
    found = count_gpus()
    if processes > 1 and (number or found < processes):
        there = f"the device is {device} alone" if number else f"there are {found}"
        one = "one process with a larger `batch_size` keeps one GPU busy" if found else "`device=cpu`"
        raise PmodError(f"{processes} processes on this machine take a GPU each, and {there}", hint=one)
    if found <= int(number or 0):
        there = f"there are only {found} CUDA GPUs" if found else "no CUDA GPU can be used on this machine"
        raise PmodError(f"the device is {device}, and {there}", hint="`device=cuda`" if found else "`device=cpu`")


def require_attention(kernel: str, device: str) -> None:
    """Refuse an attention kernel that is unknown, or that this machine or installation does not have.

    Raises:
        PmodError: names what it needs.
    """
    if kernel not in KERNELS:
        raise PmodError(f"no attention kernel is called {kernel!r}: expected one of {', '.join(KERNELS)}")
    if kernel != "flash_attention_2":
        return
    if not device.startswith("cuda"):
        raise PmodError(f"attention {kernel} needs a CUDA GPU, and the device is {device}", hint="take sdpa")
    if find_spec("flash_attn") is None:
        raise PmodError(f"attention {kernel} needs flash-attn, which is not installed", hint="take sdpa")
