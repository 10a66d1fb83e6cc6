"""`pmod ask` as a user runs it: what is on stdout, what on stderr, exit codes."""

import json
import shutil
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from PIL import Image

from pmod_cli import checkpoints, cli
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.budgets import cost_of, prompt_of, solve

SETTINGS = PmodSettings(schedule="list", values=(1.0, 0.5, 0.3, 0.15))
FOREIGN = "this is a bundled model or made from one"


def call(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def routed(tmp_path_factory, stock_model):
    """A p-MoD checkpoint of four layers; its routers are untrained."""
    folder = tmp_path_factory.mktemp("ask") / "routed"
    checkpoints.convert(stock_model(), folder, SETTINGS)
    return folder


@pytest.fixture
def ready(workdir):
    """A directory with a document, whose questions are returned, and a picture that is none."""
    document = draw("doc", seed_of("test", 0))
    document.image.save(workdir / "doc.png")
    Image.effect_noise((96, 64), 90).convert("RGB").save(workdir / "noise.png")
    return document.turns


def test_the_bundled_model_reads_its_documents(ready, pmod, workdir):
    turn = ready[0]
    run = pmod("ask", "doc.png", turn.question, "-m", "tiny-llava-next", "--device", "cpu", "--stats", cwd=workdir)
    assert (run.returncode, run.stdout) == (0, f"{turn.answer}\n"), run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("first token after ")
    assert (
        "3 new tokens; prompt of 204 tokens; a layer keeps 192.0 of 192 vision tokens (100%); KV cache 2.8 MiB" in line
    )
    assert sorted(path.name for path in workdir.iterdir()) == ["doc.png", "noise.png"]


def test_a_conversation_goes_on_from_the_cache(ready, capsys, monkeypatch):
    questions = "".join(f"{turn.question}\n" for turn in ready[1:4])
    monkeypatch.setattr(sys, "stdin", StringIO(f"{questions}\n/image noise.png\n{ready[0].question}\n"))
    assert call("ask", "doc.png", ready[0].question, "-i", "-m", "tiny-llava-next", "--device", "cpu", "--stats") == 0
    written = capsys.readouterr()
    assert written.out.splitlines()[:4] == [turn.answer for turn in ready[:4]]
    numbers = [line for line in written.err.splitlines() if line.startswith("first token")]
    assert ["from the cache" in line for line in numbers] == [False, True, True, True, False]
    assert written.err.count(FOREIGN) == 1  # of the second picture
    assert "the whole conversation is computed anew" in written.err


def test_a_foreign_picture_is_said_once(ready, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("what is it?\nwhat is it?\n"))
    assert call("ask", "noise.png", "-i", "-m", "tiny-llava-next", "--device", "cpu", "--quiet") == 0
    written = capsys.readouterr()
    assert written.err.count(FOREIGN) == 1
    assert len(written.out.splitlines()) == 2


def test_beside_others(ready, routed, stock_model, capsys):
    options = ("--device", "cpu", "--max-new-tokens", 4, "-m", routed)
    assert call("ask", "doc.png", "what is it?", "--against", "stock,uniform", "--stats", *options) == 0
    written = capsys.readouterr()
    assert [line.split(":")[0] for line in written.out.splitlines()] == ["routed", "stock", "uniform"]
    assert "the routers are untrained" in written.err
    kept = [line.split("a layer keeps ")[1].split(" of ")[0] for line in written.err.splitlines() if "keeps" in line]
    assert len(kept) == 3
    assert kept[0] == kept[2] != kept[1]

    assert call("ask", "doc.png", "what is it?", "--against", "stock", "--json", *options) == 0
    written = json.loads(capsys.readouterr().out)
    assert set(written) == {"schema_version", "image", "question", "answers"}
    ours, stock = written["answers"]
    assert ours["kv_bytes"] < stock["kv_bytes"]
    assert ours["vision_tokens"] == stock["kept_tokens"]
    assert (ours["new_tokens"], ours["finish_reason"]) in {(4, "length"), (ours["new_tokens"], "stop")}


def test_equal_seeds_give_equal_answers(ready, routed, capsys):
    answers = []
    for seed in (1, 1, 2, 3):
        options = ("-m", routed, "--device", "cpu", "--temperature", 2, "--seed", seed, "--max-new-tokens", 8)
        assert call("ask", "doc.png", "what is it?", *options) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_random_tokens_are_drawn_by_the_seed(ready, routed, capsys):
    answers = []
    for seed in (0, 0, 1, 2, 3):
        options = (
            "-m",
            routed,
            "--against",
            "random",
            "--device",
            "cpu",
            "--seed",
            seed,
            "--max-new-tokens",
            8,
            "--json",
        )
        assert call("ask", "doc.png", "what is it?", *options) == 0
        answers.append([each["answer"] for each in json.loads(capsys.readouterr().out)["answers"]])
    assert len({ours for ours, _ in answers}) == 1
    assert answers[0] == answers[1]
    assert len({drawn for _, drawn in answers}) > 1


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["doc.png"], "what is the question?", "-i to ask several"),
        (["doc.png", "  "], "the question is empty", ""),
        (["doc.png", "-i", "--json"], "--json is one object", "leave one of them out"),
        (["none.png", "what?"], "none.png: no such image file", ""),
        (["https://a.b/c.png", "what?"], "c.png: no such image file", "nothing is downloaded: save the picture"),
        (["doc.png", "what is <image>?"], "the text holds <image>", "leave it out"),
        (["doc.png", "caf\udce9?"], "the text is no UTF-8: caf\\xe9?", "locale"),
        (["doc.png", "a " * 2500], "tokens, those of its pictures included; the model takes 2,048", ""),
        (["doc.png", "what?", "--against", "nothing-such"], "nothing-such", ""),
        (["doc.png", "what?", "-m", "./nowhere"], "there is no folder ./nowhere", "pmod convert"),
    ],
)
def test_bad_input_is_a_sentence(ready, routed, capsys, caplog, arguments, what, hint):
    options = [] if "-m" in arguments else ["-m", routed]
    assert call("ask", *arguments, *options, "--device", "cpu") == 2
    written = capsys.readouterr()
    assert written.out == ""
    message = " ".join(written.err.split())
    assert what in message
    assert hint in message
    assert "Traceback" not in message
    assert caplog.text == ""


def test_a_question_that_fails_leaves_the_others_answered(ready, routed, capsys, monkeypatch):
    lines = b"what is it?\n/image none.png\n/image ~draft.png\n/image\n/what\ncaf\xe9?\nwhat is it?\n"
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(lines), encoding="utf-8"))
    assert call("ask", "doc.png", "-i", "-m", routed, "--device", "cpu", "--max-new-tokens", 3) == 3
    written = capsys.readouterr()
    assert len(written.out.splitlines()) == 2
    assert "none.png: no such image file" in written.err
    assert "~draft.png: no such image file" in written.err
    assert "the text is no UTF-8: caf\\xe9?" in written.err
    assert "which picture?" in written.err
    assert "/what is no command" in written.err


def test_a_picture_that_the_model_refuses_is_not_shown_with_the_next_question(ready, capsys, monkeypatch, workdir):
    Image.new("RGB", (3000, 10), "red").save(workdir / "line.png")
    monkeypatch.setattr(sys, "stdin", StringIO("what is it?\n/image line.png\nwhat is it?\n"))
    options = ("-m", "tiny-qwen3-vl", "--device", "cpu", "--max-new-tokens", 3)
    assert call("ask", "doc.png", "-i", *options) == 3
    written = capsys.readouterr()
    assert len(written.out.splitlines()) == 2
    assert written.err.count("aspect ratio") == 1


def test_a_question_that_one_cannot_take_is_forgotten_by_all(ready, routed, stock_model, capsys, monkeypatch, workdir):
    """Else the first would be shown the picture twice, and would answer beside a question that nobody else knows."""
    shutil.copytree(stock_model(), workdir / "short")
    config = json.loads((workdir / "short" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 400
    (workdir / "short" / "config.json").write_text(json.dumps(config))
    options = ("-m", routed, "--against", "short", "--device", "cpu", "--max-new-tokens", 6, "--stats")
    assert call("ask", "doc.png", "what is it?", *options) == 0
    once = capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", StringIO(f"{'a ' * 400}\nwhat is it?\n"))
    assert call("ask", "doc.png", "-i", *options) == 3
    again = capsys.readouterr()
    assert "the model takes 400" in again.err
    assert again.out.splitlines()[-2:] == once.out.splitlines()

    def kept(written):
        return [line.split("; ", 3)[2:] for line in written.err.splitlines() if line.startswith("first token")][-2:]

    assert kept(again) == kept(once)


def test_why_an_answer_is_cut_off(ready, stock_model, capsys, workdir):
    """A longer answer is no help where the context is full."""
    shutil.copytree(stock_model(), workdir / "short")
    config = json.loads((workdir / "short" / "config.json").read_text())
    for room, told in ((1000, "--max-new-tokens allows a longer one"), (2, "the context of the model is full")):
        options = ("-m", workdir / "short", "--device", "cpu", "--max-new-tokens", 3, "--json")
        assert call("ask", "doc.png", "what is it?", *options) == 0
        (found,) = json.loads(capsys.readouterr().out)["answers"]
        assert found["finish_reason"] == "length"
        config["text_config"]["max_position_embeddings"] = found["prompt_tokens"] + room
        (workdir / "short" / "config.json").write_text(json.dumps(config))
        assert call("ask", "doc.png", "what is it?", *options[:-1]) == 0
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("budget", [0.4, 0.6])
def test_a_budget_is_met_on_the_prompt_that_is_asked(ready, capsys, budget):
    options = ("-m", "tiny-llava-next", "--device", "cpu", "--max-new-tokens", 2, "--json")
    assert call("ask", "doc.png", ready[0].question, "--against", f"fastv@{budget}", *options) == 0
    _, found = json.loads(capsys.readouterr().out)["answers"]
    vision, text = found["vision_tokens"], found["prompt_tokens"] - found["vision_tokens"]
    sizes = Sizes.of(json.loads((checkpoints.bundled_path() / "config.json").read_text()))
    rows = prompt_of(vision, text)
    settings = solve("fastv", budget, sizes, rows)
    assert cost_of(sizes, settings, rows).flops == pytest.approx(budget, rel=0.01)
    assert found["kept_tokens"] == pytest.approx(vision * settings.mean_retention(32), abs=1)
