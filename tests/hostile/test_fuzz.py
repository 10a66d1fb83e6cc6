"""Damaged recipes, LLaVA rows, journals and results: a sentence and exit code 2, or what is right in them; never a
traceback, a wait of ten seconds or two gigabytes."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pmod_cli.cli import main
from pmod_cli.core.chat import at_most
from pmod_cli.core.errors import PmodError
from pmod_cli.data.check import check_rows
from pmod_cli.data.dataset import build_dataset
from pmod_cli.evaluation.journal import Answer, Journal
from pmod_cli.training.recipe import dump, load_settings
from pmod_cli.visualization.inputs import find_items
from tests.data.tokenizers import processor_of
from tests.evaluation.test_compare import write_run
from tests.hostile.mutations import damage_text, mutate, mutate_yaml

SECONDS = 10  # of the CPU
WAITS = 60  # seconds by the clock: the machine may have other work
MEMORY = 2 << 30  # bytes more than the process had before
RECIPE = """\
# Everything a recipe may hold.
base: tiny
name: mine
model: {freeze: [vision_tower], attention: sdpa}
pmod:
  schedule: list
  values: [1.0, 0.5, 0.25]
  string: true
data:
  kind: synthetic
  tasks: [doc, chart]
train:
  max_steps: 3
  batch_size: 2
  learning_rate: 2e-5
  warmup_steps: 0.03
eval: [tiny]
"""


def recipe(folder: Path, draw: random.Random, capsys) -> tuple[str, str]:
    path = folder / "mine.yaml"
    path.write_text(RECIPE)
    done = mutate_yaml(path, draw)
    code = main(["finetune", "--recipe", str(path), "--print-config"])
    out, err = capsys.readouterr()
    if code:
        assert code == 2, err
        assert out == ""
        assert err.startswith("error: ")
        return done, "refused"
    again = folder / "again.yaml"
    again.write_text(out)
    assert dump(load_settings(again)) == out
    return done, "taken"


def rows(folder: Path, draw: random.Random, capsys) -> tuple[str, str]:
    """Both readers of LLaVA rows: the one of training, and the one of pictures."""
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog\u2028."}]
    plain = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    found = [{"image": "a.png", "conversations": said, "boxes": [[0, 0, 8, 8]]}, {"conversations": plain}] * 2
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    lines = draw.random() < 0.5
    path = folder / f"rows.{'jsonl' if lines else 'json'}"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in found) if lines else json.dumps(found)
    path.write_text(text, encoding="utf-8")
    done = mutate(path, draw, lines)
    outcomes = []
    for read in (_train_on, _look_at):
        try:
            outcomes.append("taken" if read(path) else "in part")
        except PmodError as error:
            outcomes.append("refused" if error.code == 2 else f"failed with {error.code}: {error.what}")
    assert not [outcome for outcome in outcomes if outcome.startswith("failed")], outcomes
    return done, ", ".join(outcomes)


def _train_on(path: Path) -> bool:
    settings = SimpleNamespace(
        **{"kind": "llava", "path": str(path), "images": None, "template": "vicuna_v1", "max_length": None},
        **{"on_bad_row": "error", "video_fps": 2.0, "video_frames": 4},
    )
    data = build_dataset(settings, _PROCESSOR[0])
    report = check_rows(data, None)
    bad = {fault.row for fault in report.bad}
    for number in range(min(len(data), 8)):
        if number not in bad:
            assert len(data.encoder(data.source[number], data.source.images)["input_ids"])
    return not bad


def _look_at(path: Path) -> bool:
    return all(item.path.parent is not None for item in find_items([path]))


_PROCESSOR: list = []


def journal(folder: Path, draw: random.Random, capsys) -> tuple[str, str]:
    """What is read back is what was written, or less; then the writer goes on."""
    written = {f"key{n}": Answer(f"answer {n}\u2028", "why?\n", 12, 2, seconds=0.25, batch=n + 1) for n in range(4)}
    whole = Journal(folder, "doc", rank=0)
    whole.append(written.items())
    if draw.random() < 0.5:
        changed, done = damage_text(whole.path.read_bytes(), draw)
        whole.path.write_bytes(changed)
    else:
        done = mutate(whole.path, draw, lines=True)
    known = whole.read()
    assert known.items() <= written.items()
    more = Answer("more")
    whole.append([("more", more)])
    assert whole.read() == known | {"more": more}
    return done, "whole" if known == written else "in part"


def results(folder: Path, draw: random.Random, capsys) -> tuple[str, str]:
    first = write_run(folder / "a", [1.0, 1.0, 0.0, 0.0])
    second = write_run(folder / "b", [1.0, 0.0, 0.0, 1.0])
    damaged = draw.choice([first, second])
    if draw.random() < 0.6:
        done = mutate(damaged / "results.json", draw)
    else:
        done = mutate(damaged / "answers" / "m" / "docvqa.jsonl", draw, lines=True)
    shown = draw.choice(["table", "json", "markdown", "csv"])
    code = main(["eval", "--compare", str(first), str(second), "--format", shown])
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert bool(out) == (code == 0)
    assert code == 0 or "error: " in err
    return done, "refused" if code else "taken"


def run(kind: Callable, seeds: range, folder: Path, capsys) -> tuple[Counter, float]:
    """Outcomes of some seeds, each in a folder of its own, and the most CPU seconds that one of them took."""
    outcomes, slowest = Counter(), 0.0
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        draw = random.Random(f"{kind.__name__}/{seed}")
        signal.signal(signal.SIGALRM, lambda *_, seed=seed: pytest.fail(f"seed {seed} hangs"))
        signal.alarm(WAITS)
        started, done = time.process_time(), "damage"
        try:
            with at_most(MEMORY):
                done, outcome = kind(place, draw, capsys)
        except BaseException as error:
            raise AssertionError(f"{kind.__name__}, seed {seed}") from error
        finally:
            signal.alarm(0)
        seconds = time.process_time() - started
        assert seconds < SECONDS, f"{kind.__name__}, seed {seed}: {done}"
        outcomes[outcome] += 1
        slowest = max(slowest, seconds)
        shutil.rmtree(place)
    return outcomes, slowest


@pytest.fixture(autouse=True)
def processor():
    if not _PROCESSOR:
        _PROCESSOR.append(processor_of("vicuna_v1"))


@pytest.mark.parametrize("kind", [recipe, rows, journal, results])
def test_thirty_of_each(kind, tmp_path, workdir, capsys):
    outcomes, _ = run(kind, range(30), tmp_path, capsys)
    assert outcomes.total() == 30
    assert len(outcomes) > 1, outcomes  # some damage is refused, and some is none


@pytest.mark.soak
@pytest.mark.parametrize("block", range(5))
@pytest.mark.parametrize(("kind", "count"), [(recipe, 200), (rows, 200), (journal, 100), (results, 200)])
def test_three_and_a_half_thousand(kind, count, block, tmp_path, workdir, capsys):
    outcomes, slowest = run(kind, range(1000 + count * block, 1000 + count * (block + 1)), tmp_path, capsys)
    assert outcomes.total() == count
    with capsys.disabled():
        print(f"\n{kind.__name__}: {dict(outcomes)}, at most {slowest:.2f} s", end=" ")
