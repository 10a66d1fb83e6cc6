"""The adapter against plain `generate`, batches against single rows, and the rules of a prompt."""

from functools import cache

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pmod_cli.checkpoints import convert, load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import adapter, prompts
from pmod_cli.evaluation.adapter import PmodModel
from pmod_cli.evaluation.journal import Answer
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.budgets import PromptBudget
from tests.evaluation.mirrors import break_pictures
from tests.factories import KINDS

QUESTIONS = (
    ("what is the price of ham?", [(64, 64)]),
    ("is there a red circle?", [(40, 90)]),
    ("what colour is the ring?", [(96, 33), (20, 20)]),
    ("what shape is the green object and what is the value of rye?", [(64, 32)]),
    ("which bar is the longest?", []),
    ("what is the value of fig?", [(31, 77)]),
    ("what is the value of nut?", [(64, 64)]),
)


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


DOCS = [
    {"question": text, "images": [picture(size, seed=7 * row + place) for place, size in enumerate(sizes)]}
    for row, (text, sizes) in enumerate(QUESTIONS)
]


def requests(**settings) -> list[Instance]:
    settings = {"max_new_tokens": 6, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]} | settings
    return [
        Instance(
            "generate_until",
            (doc["question"], settings, lambda doc: doc["images"], index, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": index, "repeats": 1},
        )
        for index, doc in enumerate(DOCS)
    ]


def asked(path, batch_size=1, **options) -> PmodModel:
    model, processor = load_model(path, dtype="float32")
    adapted = PmodModel(str(path), batch_size, model=model, processor=processor, **options)
    adapted.task_dict["t"] = {"test": DOCS}
    return adapted


def texts(adapted: PmodModel, **settings) -> list[str]:
    return [answer.text for answer in adapted.generate_until(requests(**settings))]


@pytest.fixture(scope="module")
def pmod_model(stock_model, tmp_path_factory):
    """A p-MoD checkpoint with routers that rank: two of four layers keep a part of the vision tokens."""
    target = tmp_path_factory.mktemp("pmod") / "model"
    convert(stock_model(), target, PmodSettings(schedule="list", values=(1.0, 0.4, 1.0, 0.2)))
    model, processor = load_model(target)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(target.with_name("trained"))
    processor.save_pretrained(target.with_name("trained"))
    return target.with_name("trained")


@pytest.fixture(scope="module")
def alone():
    """`alone(path)`: what a checkpoint says to each prompt at batch size 1, asked once."""
    return cache(lambda path: tuple(texts(asked(path))))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_plain_generate(stock_model, alone, kind):
    """One image-text prompt at a time, through transformers' own template and generate."""
    path = stock_model(kind)
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    expected = []
    for doc in DOCS:
        content = [{"type": "image", "image": image} for image in doc["images"]]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert len(set(expected)) > 2, "a model that says the same to everything would prove nothing"
    assert list(alone(path)) == expected


@pytest.mark.parametrize("name", ["llava", "llava_next", "pmod"])
def test_batches_do_not_change_answers(stock_model, pmod_model, alone, name, monkeypatch):
    monkeypatch.setattr(prompts, "WINDOW", 1)  # several windows: rows are sorted within each, answers put back in order
    path = pmod_model if name == "pmod" else stock_model(name)
    for batch_size in (4, 16):
        assert texts(asked(path, batch_size)) == list(alone(path))


@pytest.mark.parametrize("method", ["divprune", "random"])
def test_a_budget_is_solved_for_each_prompt_whatever_stands_beside_it(stock_model, method):
    """Answers are those of the prompt alone under its own settings, and these differ from prompt to prompt."""
    model, processor = load_model(stock_model(), dtype="float32", pmod={"method": method, "mean": 0.5})
    budget = PromptBudget(Sizes.of(model.config), method, 0.6)

    def answers(batch_size, given, places=range(len(DOCS))):
        adapted = PmodModel("m", batch_size, selection=method, seed=3, model=model, processor=processor, budget=given)
        adapted.task_dict["t"] = {"test": DOCS}
        return dict(pair for batch in adapted.answers([asks[place] for place in places]) for pair in batch)

    asks = requests(max_new_tokens=8)
    found = answers(1, budget)
    assert {place: answer.text for place, answer in answers(16, budget).items()} == {
        place: answer.text for place, answer in found.items()
    }
    shapes = {place: (one.vision_tokens, one.input_tokens - one.vision_tokens) for place, one in found.items()}
    assert shapes[4][0] == 0 < shapes[0][0]
    settings = {place: budget.settings(*shape) for place, shape in shapes.items()}
    assert len(set(settings.values())) > 2
    for place in (0, 2, 3):
        model.set_method(settings[place].to_dict())
        (answer,) = answers(1, None, [place]).values()
        assert answer.text == found[place].text


def test_random_selection_keeps_other_tokens(pmod_model):
    by_router = texts(asked(pmod_model), max_new_tokens=12)
    assert texts(asked(pmod_model, selection="random", seed=1), max_new_tokens=12) != by_router
    with pytest.raises(ValueError, match="selection"):
        asked(pmod_model, selection="best")


def test_selection_needs_routers(stock_model):
    with pytest.raises(PmodError, match="stock model"):
        asked(stock_model(), selection="random")


def test_until_and_length(stock_model):
    adapted = asked(stock_model(), batch_size=8)
    answers = adapted.generate_until(requests(max_new_tokens=8))
    whole, lengths = [answer.text for answer in answers], [answer.token_counts.output_tokens for answer in answers]
    assert max(lengths) == 8
    stop = max(whole, key=len).split()[1]
    assert texts(adapted, max_new_tokens=8, until=[stop]) == [text.split(stop)[0].strip() for text in whole]


def test_an_answer_says_how_it_came_about(stock_model):
    adapted = asked(stock_model(), batch_size=3)
    batches = list(adapted.answers(requests(max_new_tokens=4)))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    answers = {place: answer for batch in batches for place, answer in batch}
    assert sorted(answers) == list(range(len(DOCS)))
    assert [answers[place].text for place in range(len(DOCS))] == texts(adapted, max_new_tokens=4)
    assert all(answer.prompt.endswith("ASSISTANT:") for answer in answers.values())
    assert [answer.batch for answer in answers.values()] == [3, 3, 3, 3, 3, 3, 1]
    assert all(answer.cut == (answer.output_tokens == 4) for answer in answers.values())
    assert all(answer.seconds > 0 and answer.input_tokens > 0 for answer in answers.values())


def test_a_picture_that_cannot_be_read_leaves_the_others(stock_model, monkeypatch):
    break_pictures(monkeypatch, "price")
    adapted = asked(stock_model(), batch_size=4)
    answers = {place: answer for batch in adapted.answers(requests()) for place, answer in batch}
    assert answers[0] == adapter.Unanswered("OSError: image file is truncated")
    assert all(isinstance(answers[place], Answer) for place in range(1, len(DOCS)))
    with pytest.raises(PmodError, match="image file is truncated"):
        texts(adapted)


def test_a_prompt_longer_than_the_context_is_not_put(stock_model, alone):
    adapted, whole = asked(stock_model(), batch_size=4), alone(stock_model())
    lengths = {place: answer.input_tokens for batch in adapted.answers(requests()) for place, answer in batch}
    longest = max(lengths, key=lengths.get)
    adapted.model.config.get_text_config().max_position_embeddings = lengths[longest]
    answers = {place: answer for batch in adapted.answers(requests()) for place, answer in batch}
    assert (answers[longest].too_long, answers[longest].text) == (True, "")
    shorter = [place for place, length in lengths.items() if length < lengths[longest]]
    assert shorter
    assert [answers[place].text for place in shorter] == [whole[place] for place in shorter]


@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_halves_the_batch(stock_model, alone, monkeypatch, most):
    """A device on which more than `most` rows do not fit: no answer is lost or different, and the size stays small."""
    adapted = asked(stock_model(), batch_size=8, halve=True)
    expected, tried, generate = list(alone(stock_model())), [], adapted.model.generate

    def full(input_ids, **inputs):
        tried.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(input_ids=input_ids, **inputs)

    monkeypatch.setattr(adapted.model, "generate", full)
    assert texts(adapted) == expected
    assert tried[:3] == ([7, 4, 2, 1] if most == 1 else [7, 4, 2])[:3]
    assert max(tried[tried.index(most if most == 1 else 2) :]) <= most
    texts(adapted)
    assert adapted.batch_size <= most

    fixed = asked(stock_model(), batch_size=8)
    monkeypatch.setattr(fixed.model, "generate", full)
    with pytest.raises(torch.OutOfMemoryError):
        texts(fixed)


def test_clean_keeps_the_model_and_repr_is_stable(stock_model):
    adapted = asked(stock_model())
    before = repr(adapted)
    adapted.clean()
    assert texts(adapted)
    assert repr(adapted) == before == repr(asked(stock_model(), batch_size=4))


def test_likelihood_is_refused(stock_model):
    with pytest.raises(PmodError, match="generated answers only"):
        asked(stock_model()).loglikelihood([])


def test_lmms_eval_finds_the_adapter():
    from lmms_eval.models import get_model

    assert get_model("pmod") is PmodModel


def test_loads_by_name_as_lmms_eval_does(stock_model, alone):
    adapted = PmodModel.create_from_arg_string(
        f"pretrained={stock_model()},dtype=float32", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    adapted.task_dict["t"] = {"test": DOCS}
    assert texts(adapted) == list(alone(stock_model()))


def test_marked_image_places_stay(stock_model):
    processor = AutoProcessor.from_pretrained(stock_model())
    assert prompts.render(processor, "left <image> or right <image>?", 2).count("<image>") == 2
    assert "left <image> or right <image>?" in prompts.render(processor, "left <image> or right <image>?", 2)
    first = prompts.render(processor, "this <image> again?", 2)
    assert first.count("<image>") == 2
    assert first.index("<image>") < first.index("this")
    assert "<image>" not in prompts.render(processor, "no picture here", 0)


def test_no_chat_template(stock_model):
    processor = AutoProcessor.from_pretrained(stock_model())
    processor.chat_template = None
    with pytest.raises(PmodError, match="no chat template"):
        prompts.render(processor, "why?", 0)


def test_sampling_is_greedy_unless_the_task_samples():
    greedy = {"do_sample": False, "num_beams": 1}
    assert adapter._sampling({"temperature": 0, "top_p": 1.0}) == greedy
    assert adapter._sampling({"temperature": 0.7, "do_sample": False}) == greedy
    assert adapter._sampling({"temperature": 0.7, "top_p": 0.9}) == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "num_beams": 1,
    }
