"""Samples a second beside lmms-eval's own `llava_hf`: one thread, the tiny tasks, in turns in one process."""

import statistics
import time

import pytest
import torch

from pmod_cli.checkpoints import bundled_path, load_model
from pmod_cli.evaluation import suite
from pmod_cli.evaluation.adapter import PmodModel
from pmod_cli.evaluation.questions import load_tasks
from tests.evaluation.test_llava_hf import TINY, llava_hf

QUESTIONS = 48  # per task
TURNS = 3

pytestmark = pytest.mark.soak


def adapted(path) -> PmodModel:
    model, processor = load_model(path, dtype="float32")
    return PmodModel(str(path), batch_size=8, model=model, processor=processor)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def questions(models) -> list:
    """The same questions of four tiny tasks for each of the models, in turn."""
    asked = []
    for name in TINY:
        (task,) = load_tasks(suite.resolve([name])[0]).values()
        task.set_config(key="num_fewshot", value=0)
        for model in models:
            model.task_dict[name] = task.dataset
        task.build_all_requests(limit=QUESTIONS, rank=0, world_size=1)
        asked.append(task.instances)
    return asked


@pytest.mark.parametrize(("kind", "at_least"), [("random", 2.5), ("trained", 1.5)])
def test_batches_of_eight_beside_llava_hf(stock_model, kind, at_least):
    """`random` is the stock model of the tests, 4 layers; `trained` the bundled one, 32 layers and answers of 2 tokens.

    A batch saves the cost of calls, not of arithmetic: the prefill of the second is all arithmetic, so it gains less.
    """
    path = stock_model() if kind == "random" else bundled_path()
    models = {"llava_hf": llava_hf(path), "pmod": adapted(path)}
    seconds = {name: [] for name in models}
    for instances in questions(models.values()):
        for turn in range(TURNS + 1):
            for name, model in models.items():
                started = time.process_time()
                model.generate_until(instances)
                if turn:  # the first warms up
                    seconds[name].append((time.process_time() - started) / len(instances))
    a_second = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    ratio = a_second["pmod"] / a_second["llava_hf"]
    print(
        f"{kind}: {', '.join(f'{name} {value:.1f}' for name, value in a_second.items())} samples/s, {ratio:.2f} times"
    )
    assert ratio >= at_least, a_second


def test_time_outside_generate(monkeypatch):
    """Decoding pictures, prompts, batches, texts: at most a tenth of the time, with the bundled model."""
    model, inside = adapted(bundled_path()), [0.0]
    generate = model.model.generate

    def timed(**inputs):
        started = time.perf_counter()
        ids = generate(**inputs)
        inside[0] += time.perf_counter() - started
        return ids

    asked = questions([model])
    monkeypatch.setattr(model.model, "generate", timed)
    model.generate_until(asked[0])
    inside[0], started = 0.0, time.perf_counter()
    for instances in asked:
        model.generate_until(instances)
    outside = 1 - inside[0] / (time.perf_counter() - started)
    print(f"outside generate: {100 * outside:.1f} % of the time")
    assert outside <= 0.10
