"""The runner on its own: a step that fails or hangs ends alone, what it found stays, and two runs are compared."""

import json
import sys
from dataclasses import asdict

import pytest

from tests.gpu import __main__ as program
from tests.gpu.__main__ import STEPS, Run, Step
from tests.gpu.rows import Row
from tests.gpu.table import compare, markdown


def line(name: str, value: float, goal: float) -> str:
    row = Row(name, value, goal=goal)
    return json.dumps(asdict(row) | {"met": row.met})


ABOUT = json.dumps({"device": "a machine", "versions": {"torch": "2", "transformers": "5"}})
CODE = {
    "machine": f"print({ABOUT!r})",
    "prefill": f"print({line('b1', 0.5, 0.6)!r}, flush=True); raise SystemExit('the device is lost')",
    "decode": f"print({line('b16', 0.9, 0.8)!r}, flush=True); import time; time.sleep(60)",
    "memory": f"print({line('cache', 1.0, 1.0)!r})",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "_words", lambda self, name: [sys.executable, "-c", CODE[name]])
    return Run(tmp_path, cpu=False)


def test_a_step_that_fails_or_hangs_ends_alone(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "LEAST", 1)
    monkeypatch.setitem(STEPS, "decode", Step("speed", 2))
    assert run.all(["prefill", "decode", "memory"]) == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: step["status"] for name, step in written["steps"].items()} == {
        "prefill": "failed",
        "decode": "out of time",
        "memory": "done",
    }
    assert [step["rows"][0]["met"] for step in written["steps"].values()] == [True, False, True]
    assert written["steps"]["prefill"]["error"] == "the device is lost"
    table = (tmp_path / "gpu.md").read_text()
    assert table == markdown(written) == capsys.readouterr().out.removesuffix("\n")
    assert "| b16 | **0.9** | ≤ 0.8 |" in table


def test_steps_without_time_are_left_out(run, monkeypatch):
    monkeypatch.setattr(program, "TOTAL", 0)
    assert run.all(["memory"]) == 1
    assert run.found["steps"]["memory"]["status"] == "left out"


def test_what_changed_is_named():
    def made(**values: float) -> dict:
        rows = [json.loads(line(name, value, 0.6)) for name, value in values.items()]
        return {"machine": {"device": "a"}, "steps": {"prefill": {"rows": rows}}}

    changes = list(compare(made(b1=0.5, b4=0.55, b16=0.5), made(b1=0.5, b4=0.7, b64=0.5)))
    assert changes == [
        "prefill: b4: 0.55 to 0.7 (+27.3 %); goal missed now",
        "prefill: b16: only in the old run",
        "prefill: b64: only in the new run",
    ]


def test_an_out_that_is_no_folder_is_a_sentence(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        monkeypatch.setattr(sys, "argv", ["gpu", "--steps", "tiny", "-o", str(tmp_path / out)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == 2
        assert "cannot be a folder of results" in capsys.readouterr().err
