"""`pmod demo` as a user runs it, cut short: every verb, one folder, and a second run that does nothing again."""

import json

import pytest

pytest.importorskip("lmms_eval", reason="needs the eval extra")


@pytest.mark.slow
def test_demo_runs_all_verbs_and_goes_on(pmod, workdir):
    arguments = ("demo", "--out", "all", "--max-steps", 1, "--limit", 1)
    first = pmod(*arguments, cwd=workdir, timeout=600)
    assert first.returncode == 0, first.stderr
    for said in ("tiny doc", "tiny presence", "paper convention", "all/kept.png"):
        assert said in first.stdout
    for written in ("converted/config.json", "p-mod/model.safetensors", "eval/results.json", "kept.png", "image.png"):
        assert (workdir / "all" / written).is_file(), written
    assert json.loads((workdir / "all" / "p-mod" / "config.json").read_text())["router_state"] == "trained"

    second = pmod(*arguments, cwd=workdir, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("done before:") == 5
    assert second.stdout == first.stdout
