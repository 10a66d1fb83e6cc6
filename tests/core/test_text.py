"""Sizes in the unit that fits them: no size that is something is shown as nothing."""

import pytest

from pmod_cli.core.text import disk_size, memory_size


@pytest.mark.parametrize(
    ("number", "disk", "memory"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1_500, "1.5 kB", "1.5 KiB"),
        (8_761_344, "8.8 MB", "8.4 MiB"),
        (999_960, "1 MB", "977 KiB"),
        (999_999_999, "1 GB", "954 MiB"),
        (24 * 2**30, "25.8 GB", "24 GiB"),
        (123_456_789_012, "123 GB", "115 GiB"),
        (5_000_000_000_000_000, "5,000 TB", "4,547 TiB"),
    ],
)
def test_sizes(number, disk, memory):
    assert (disk_size(number), memory_size(number)) == (disk, memory)
