"""The most memory that a process held: from a moment on, or since it began."""

import resource
import sys
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
        self.device, self._known = device, True
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                _CLEAR.write_text("5")  # the one value that resets only the peak
            except OSError:
                self._known = False

    def mib(self) -> float | None:
        """The peak since then in MiB (2^20 bytes); None where the system does not tell."""
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self.device) / MIB
        lines = _STATUS.read_text().splitlines() if self._known else []
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def peak_memory() -> int:
    """Bytes: on a GPU the most that torch allocated there, else the most that this process held.

    Since the process began, or since the last `PeakMemory` was made.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
