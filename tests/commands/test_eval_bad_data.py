"""Bad data and bad models through the whole command: a sentence each, the other benchmarks go on, exit code 3."""

import json

import pytest
from datasets import Image, Value

from pmod_cli import cli
from pmod_cli.checkpoints.files import read_json
from pmod_cli.evaluation.benchmarks import BENCHMARKS
from tests import factories
from tests.evaluation import mirrors

BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS.values()}
NO_PICTURE = {"bytes": b"these bytes are no picture", "path": None}


def evaluate(*arguments) -> int:
    return cli.main(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """ChartQA as it should be; DocVQA with a damaged picture, AI2D without options, InfoVQA without rows."""
    root = mirrors.write(tmp_path_factory.mktemp("mirror"), ["chartqa"])
    (document,) = BY_NAME["docvqa"].data
    made = mirrors.mirrored("docvqa")
    made.rows["validation"][5]["image"] = NO_PICTURE
    mirrors.write_split(root, document, made.rows["validation"], made.features)
    (diagram,) = BY_NAME["ai2d"].data
    rows = [{"image": mirrors.picture(0), "question": "what?", "answer": "1"}]
    mirrors.write_split(root, diagram, rows, {"image": Image(), "question": Value("string"), "answer": Value("string")})
    (graphic,) = BY_NAME["infovqa"].data
    mirrors.write_split(root, graphic, [], mirrors.mirrored("infovqa").features)
    return root


def test_each_is_a_sentence_and_the_rest_goes_on(stock_model, mirror, workdir, capsys):
    code = evaluate("-t", "docvqa,ai2d,infovqa,chartqa", "-m", stock_model(), "--data-root", mirror, "-o", "run")
    printed = capsys.readouterr()
    assert code == 3
    assert "3 of 4 benchmark runs failed" in printed.err
    assert "Traceback" not in printed.err + printed.out
    failed = json.loads((workdir / "run" / "results.json").read_text())["failed"]
    assert len(failed) == 3
    assert "DocVQA: 1 of 8 questions could not be asked; row 5 of docvqa_val" in failed[0]
    assert "expected the columns image, question, options, answer; options not found" in failed[1]
    assert "no rows" in failed[2]
    for sentence in failed:
        assert sentence in printed.out
        assert "\n" not in sentence
    scores = {
        task["name"]: next(iter(task["scores"].values()))
        for task in json.loads((workdir / "run" / "results.json").read_text())["tasks"]
    }
    assert scores["chartqa"]["score"] is not None
    assert scores["chartqa"]["questions"] == 8
    assert scores["docvqa"]["score"] is None, "no score over the questions that are left"


def test_a_split_that_is_not_there(stock_model, mirror, workdir, capsys):
    assert evaluate("-t", "chartqa,gqa,okvqa", "-m", stock_model(), "--data-root", mirror, "-o", "run") == 2
    error = capsys.readouterr().err
    assert "the data of GQA, OK-VQA is not whole in" in error
    assert "pmod eval --fetch-data gqa,okvqa" in error
    assert not (workdir / "run").exists()


def test_a_prompt_longer_than_the_context(mirror, workdir, capsys):
    """Every prompt of ChartQA is longer than 40 tokens: none is put, the table counts them, and the run ends well."""
    model = factories.save_stock(workdir / "short", "llava", max_position_embeddings=40)
    assert evaluate("-t", "chartqa", "-m", model, "--data-root", mirror, "-o", "run") == 0
    (task,) = json.loads((workdir / "run" / "results.json").read_text())["tasks"]
    (score,) = task["scores"].values()
    assert (score["too_long_prompts"], score["empty_answers"], score["score"]) == (8, 8, 0.0)
    printed = capsys.readouterr().out
    assert "too long" in printed
    assert "exceeds the model's context" in printed


def test_another_architecture(workdir, capsys):
    model = factories.save_stock(workdir / "other")
    config = read_json(model / "config.json") | {"model_type": "bert", "architectures": ["BertModel"]}
    (model / "config.json").write_text(json.dumps(config))
    assert evaluate("-t", "tiny_doc", "-m", model, "--limit", 2, "-o", "run") == 2
    printed = capsys.readouterr()
    assert "is a checkpoint of another architecture: its model_type is 'bert', expected one of llava" in printed.err
    assert not (workdir / "run").exists()
