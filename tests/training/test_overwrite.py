"""`finetune --overwrite`: the old run stays until the new one is whole, and nothing goes that is not a run's."""

import os
import signal
from pathlib import Path

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import held, staging_of
from pmod_cli.core.markers import MARKER
from pmod_cli.training.folder import SETTINGS, STATE
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune


def settings_of(model: Path, *overrides: str):
    given = ["train.max_steps=1", "train.batch_size=1", "data.turns=1", "train.report_to=none"]
    return load_settings(None, [f"model.name={model}", "model.router_start=zero", *given, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(routed, tmp_path_factory) -> Path:
    """A finished run; no test may change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    finetune(settings_of(routed), out)
    return out


def test_weights_are_as_open_as_the_other_files(finished):
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in finished.iterdir() if path.is_file()}
    assert set(modes.values()) == {modes["config.json"]}, modes
    assert "model.safetensors" in modes


def refused(message: str, *others, **options) -> None:
    with pytest.raises(PmodError, match=message):
        finetune(*others, overwrite=True, **options)


def test_what_is_refused_changes_nothing(routed, finished, tmp_path):
    """A foreign folder with some config.yaml; the model that is read, by its own name and by a symlink; a foreign file
    in a run; data that cannot be opened; a folder that another run writes."""
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / SETTINGS).write_text("foo: 1")
    (project / "sub" / "thesis.txt").write_text("x")
    refused(f"lacks {MARKER}", settings_of(routed), project)
    assert contents(project) == {SETTINGS: b"foo: 1", "sub/thesis.txt": b"x"}

    before = contents(finished)
    (tmp_path / "link").symlink_to(finished)
    for source, target in ((finished, finished), (tmp_path / "link", finished), (finished, tmp_path / "link")):
        refused("this run reads", settings_of(source), target)
    (finished / "thesis.txt").write_text("x")
    refused(r"did not write: thesis\.txt", settings_of(routed), finished)
    (finished / "thesis.txt").unlink()
    missing = settings_of(routed, "data.kind=llava", f"data.path={tmp_path / 'missing.json'}")
    refused(r"missing\.json", missing, finished)
    with held(finished):
        refused("another run is writing", settings_of(routed), finished)
    with held(tmp_path / "new"), pytest.raises(PmodError, match="another run is writing"):
        finetune(settings_of(routed), tmp_path / "new")
    assert contents(finished) == before
    assert [path.name for path in finished.parent.iterdir()] == ["run"]


def test_an_overwriting_run_that_was_interrupted_goes_on(routed, finished, tmp_path):
    """The old run stays meanwhile. Other settings start anew; the same ones go on and take its place."""
    out = tmp_path / "run"
    os.rename(finished, out)
    try:
        before = contents(out)
        seed_1, seed_2 = (settings_of(routed, f"train.seed={seed}", "train.max_steps=3") for seed in (1, 2))

        def interrupt(step):
            if step.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        assert finetune(seed_2, out, overwrite=True, on_step=interrupt).status == "interrupted"
        assert finetune(seed_1, out, overwrite=True, on_step=interrupt).status == "interrupted"
        assert contents(out) == before
        assert (staging_of(out) / STATE / "checkpoint-2").is_dir()
        steps = []
        report = finetune(seed_1, out, overwrite=True, on_step=lambda step: steps.append(step.step))
        assert (report.status, report.path, steps) == ("finished", out, [3])
        assert load_settings(out / SETTINGS).train.seed == 1
        assert (out / "config.json").is_file()
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert not (out / STATE).exists()
    finally:
        os.rename(out, finished)
