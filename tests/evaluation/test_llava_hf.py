"""Our adapter beside lmms-eval's own `llava_hf`: the same stock model, tasks and prompts, one question at a time."""

from argparse import Namespace

import pytest

from pmod_cli.checkpoints import bundled_path, load_model, load_processor
from pmod_cli.evaluation import suite
from pmod_cli.evaluation.adapter import PmodModel
from pmod_cli.evaluation.questions import load_tasks
from tests.evaluation import mirrors

pytestmark = pytest.mark.slow
TINY = ("tiny_doc", "tiny_chart", "tiny_attribute", "tiny_presence")
MIRRORED = ("mme", "gqa", "docvqa", "chartqa", "ai2d", "sqa")
QUESTIONS = 8  # per task

# `llava_hf` hands its template one text, which begins with the image places; the model's own takes a list of parts.
# Both come to the same prompt.
TEMPLATE = "{% for message in messages %}USER: {{ message['content'] }} ASSISTANT:{% endfor %}"


def run(model, root, out) -> dict:
    """Real lmms-eval from the questions to the scores."""
    from lmms_eval.evaluator import evaluate

    tasks = {}
    for name in (*TINY, *MIRRORED):
        tasks |= load_tasks(suite.resolve([name])[0], root)
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
    model.task_dict.update({name: task.dataset for name, task in tasks.items()})
    arguments = Namespace(output_path=str(out), process_with_media=False)
    return evaluate(lm=model, task_dict=tasks, limit=QUESTIONS, bootstrap_iters=0, cli_args=arguments)


def llava_hf(path):
    """lmms-eval's LLaVA of Hugging Face, on the CPU in float32."""
    pytest.importorskip("decord", reason="llava_hf imports it")
    from lmms_eval.models.simple.llava_hf import LlavaHf

    # Its default device map is one that transformers refuses today.
    model = LlavaHf(str(path), device="cpu", device_map="cpu", dtype="float32", chat_template=TEMPLATE)
    # Where torchvision is installed it would resize pictures by that; see docs/eval.md, "Image backend".
    model._image_processor.image_processor = load_processor(path).image_processor
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    root = mirrors.write(tmp_path_factory.mktemp("mirror"), MIRRORED)
    path = bundled_path("tiny-llava-next")
    theirs = llava_hf(path)
    model, processor = load_model(path, dtype="float32")
    ours = PmodModel(str(path), batch_size=1, model=model, processor=processor)
    return [run(model, root, tmp_path_factory.mktemp("run")) for model in (ours, theirs)]


def answers(results: dict, task: str) -> list[str]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0].strip() for sample in samples]


def test_answers_are_equal(both):
    ours, theirs = both
    assert set(ours["samples"]) == set(theirs["samples"])
    asked = {task: (answers(ours, task), answers(theirs, task)) for task in ours["samples"]}
    assert {task: pair for task, pair in asked.items() if pair[0] != pair[1]} == {}
    assert len({answer for pair in asked.values() for answer in pair[0]}) > 20, (
        "a model that says one thing proves nothing"
    )


def test_scores_are_equal(both):
    ours, theirs = ([results["results"], results["n-samples"]] for results in both)
    assert ours == theirs
    scores = {task: values for task, values in both[0]["results"].items() if task in both[0]["samples"]}
    above_zero = [
        task for task, values in scores.items() if any(isinstance(v, float) and v > 0 for v in values.values())
    ]
    assert len(above_zero) >= 5, scores
