"""The table of `tests.from_start`, without its training: whose numbers it may hold."""

import json
import sys

import pytest

from pmod_cli.data.documents import TASKS
from tests import from_start


def test_cells_of_other_steps_are_in_no_table(tmp_path, monkeypatch, capsys):
    """The table says of how many steps it is."""
    for folder in ("start", "cells"):
        (tmp_path / folder).mkdir()
    cell = {"steps": 60, "score_percent": dict.fromkeys(TASKS, 90.0), "seconds": 1.0, "peak_memory_mib": None}
    (tmp_path / "cells" / "stock-seed0.json").write_text(json.dumps(cell))
    words = ["from_start", "--out", str(tmp_path), "--seeds", "1", "--arms", "stock", "--steps"]
    monkeypatch.setattr(sys, "argv", [*words, "40"])
    with pytest.raises(SystemExit, match="is of 60 steps, not 40"):
        from_start.main()
    assert not (tmp_path / "table.json").exists()
    monkeypatch.setattr(sys, "argv", [*words, "60"])
    from_start.main()
    assert "seed 0, stock: 90.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["steps"] == 60
