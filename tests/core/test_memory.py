"""The most memory that was held since a watch began, not since the process did."""

import sys

import pytest

from pmod_cli.core.memory import MIB, PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process from a moment on")
def test_a_peak_starts_anew_and_keeps_what_was_freed():
    first = PeakMemory("cpu")
    held = bytearray(96 * MIB)
    before = first.mib()
    del held
    assert first.mib() > before - 2  # freed, and still the peak, but for what the kernel counts late
    assert PeakMemory("cpu").mib() < before - 64  # a second watch does not see it
