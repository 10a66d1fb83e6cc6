"""What a run says of itself: the log, the counts in it, the summary and the card."""

import pytest

from pmod_cli.checkpoints import convert, load_model
from pmod_cli.data.collator import Collator
from pmod_cli.model import PmodSettings
from pmod_cli.training.cost import run_flops
from pmod_cli.training.folder import CARD
from pmod_cli.training.run import finetune
from pmod_cli.training.run_data import SyntheticDocuments
from tests.training.test_finetune import log, run_settings

COUNTED = ("vision_tokens", "vision_tokens_kept")


def test_tokens_are_counted_once(routed, tmp_path):
    """In the report, the log and the summary, and in the FLOPs that come of them; padding is none."""
    settings = run_settings(routed)
    settings.data.turns = None  # rows of several lengths
    report = finetune(settings, tmp_path / "run")
    model, processor = load_model(routed)
    collate, documents = Collator(processor), SyntheticDocuments(settings.data, 6)
    rows = [collate([documents[index]])["input_ids"] for index in range(6)]
    tokens, vision = sum(ids.numel() for ids in rows), sum(int((ids == processor.image_token_id).sum()) for ids in rows)
    lines = log(tmp_path / "run")
    assert report.tokens == lines[-1]["num_input_tokens_seen"] == tokens
    assert sum(line["vision_tokens"] for line in lines) == vision
    assert report.summary.tokens_per_second * report.seconds == pytest.approx(tokens, rel=0.01)
    flops = run_flops(settings, model.config, 6, tokens, vision)
    assert report.summary.tflops_per_second * report.seconds * 1e12 == pytest.approx(flops, rel=0.01)


class Killed(Exception):
    pass


def test_what_a_killed_run_counted_is_counted_after_it_too(routed, tmp_path):
    """Checkpoints lie between the lines of the log: what a run goes on from has the counts of all steps up to it."""
    settings = run_settings(routed, max_steps=5, log_steps=2, save_steps=3)

    def kill(step):
        if step.step == 4:
            raise Killed

    whole = finetune(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        finetune(settings, tmp_path / "broken", on_step=kill)
    broken = finetune(settings, tmp_path / "broken")
    assert broken.tokens == whole.tokens
    totals = [[sum(line[key] for line in log(run.path)) for key in COUNTED] for run in (whole, broken)]
    assert totals[0] == totals[1]
    assert [line["step"] for line in log(broken.path)] == [2, 3, 4, 5]


def test_each_line_has_the_router_weights_of_its_own_step(routed, tmp_path):
    """Also the last one, where the steps are no multiple of the interval."""
    for interval in (1, 3):
        settings = run_settings(routed, max_steps=5, log_steps=interval, router_learning_rate=1e-2)
        finetune(settings, tmp_path / str(interval))
    every, third = log(tmp_path / "1"), log(tmp_path / "3")
    assert [line["step"] for line in third] == [3, 5]
    for line in third:
        routers = {key: value for key, value in line.items() if key.startswith("router/")}
        assert routers
        assert routers == {key: every[line["step"] - 1][key] for key in routers}


def test_the_card_names_the_kind_of_model(stock, tmp_path):
    """A p-MoD model may have no router at all, where another method chooses its tokens."""
    convert(stock, tmp_path / "routed", PmodSettings(method="fastv", mean=0.6))
    for source, named in ((stock, "stock LLaVA-NeXT"), (tmp_path / "routed", "p-MoD LLaVA-NeXT")):
        report = finetune(run_settings(source, max_steps=1), tmp_path / named)
        assert "router" not in report.parameters
        assert f"A {named} model, fine-tuned" in (report.path / CARD).read_text()
