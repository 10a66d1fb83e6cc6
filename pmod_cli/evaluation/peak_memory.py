"""Peak memory of a stretch of work: of the accelerator where there is one, else of this process."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Starts to watch when it is made.

    Args:
        device: Where the model is. `cuda`: what torch allocated there. `cpu`: the resident memory of the process,
            Python and libraries included; Linux only.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._resettable = _reset_resident_peak()

    def mib(self) -> float | None:
        """The peak since then in MiB (2^20 bytes); None where the system does not tell."""
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self.device) / MIB
        return _resident_peak_mib() if self._resettable else None


def _reset_resident_peak() -> bool:
    try:
        _CLEAR.write_text("5")  # the one value that resets only the peak
    except OSError:
        return False
    return True


def _resident_peak_mib() -> float | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None
