"""Measures the tiny model on unseen documents: ``python -m tests.beds.tiny_llava_next.measure --model DIR``.

One question a prompt, through the stock processor and greedy generation, exact match with its 95 % interval. Then two
controls: the image blanked, which tells what guessing gives, and the tokens of the answer hidden, which tells that it
is read where it stands. ``pmod profile --report depth`` tells in which layers.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from pmod_cli.data.documents import CELL, TASKS, Document, draw, seed_of
from pmod_cli.data.rows import question
from pmod_cli.evaluation.intervals import rate_interval
from pmod_cli.model.cache import CACHE_NAME

BASE = 6  # patches of the whole image, a side


def unseen_documents(task: str, count: int) -> list[Document]:
    """The first ``count`` unseen documents of a task; each is asked its first question."""
    return [draw(task, seed_of("test", index)) for index in range(count)]


def prompts(processor: ProcessorMixin, documents: list[Document], blank: bool = False) -> dict[str, Tensor]:
    """Model inputs of B documents, padded on the left, each with its first question and the generation prompt."""
    texts = [
        processor.apply_chat_template(question(document), tokenize=False, add_generation_prompt=True)
        for document in documents
    ]
    images = [Image.new("RGB", document.image.size, "white") if blank else document.image for document in documents]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


@torch.inference_mode()
def answers(model: PreTrainedModel, processor: ProcessorMixin, inputs: dict[str, Tensor]) -> list[str]:
    """What the model says to each prompt, greedily, six tokens at most."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_tokens(document: Document) -> list[int]:
    """The tokens among those of the image on which the answer to the first question stands, whole image and tiles.

    Empty where it stands nowhere ("is there a red circle?").
    """
    region = document.turns[0].region
    if region is None:
        return []
    columns, rows = document.image.width // CELL, document.image.height // CELL
    across, down = columns / BASE, rows / BASE  # cells to a patch of the whole image
    x0, y0, x1, y1 = region[0] // CELL, region[1] // CELL, -(-region[2] // CELL), -(-region[3] // CELL)
    cells = [(x, y) for y in range(y0, y1) for x in range(x0, x1)]
    whole = {int(y / down) * BASE + int(x / across) for x, y in cells}
    return sorted(whole | {BASE * BASE + y * (columns + 1) + x for x, y in cells})


@contextmanager
def hidden_vision(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Hide tokens of the prompts, bool (B, N), from every other token in every layer."""
    rows, length = hidden.shape

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states, cache = args[0] if args else kwargs["hidden_states"], kwargs[CACHE_NAME]
        mask, new, device = kwargs.get("attention_mask"), states.shape[1], states.device
        past = cache.get_seq_length(module.self_attn.layer_idx)
        if mask is None:
            mask = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)[None, None]
        keys = torch.zeros(rows, past + new, dtype=torch.bool, device=device)
        keys[:, :length] = hidden.to(device)
        queries = keys[:, past:]  # a hidden token still sees itself, lest its row of attention be empty
        own = torch.eye(new, past + new, dtype=torch.bool, device=device).roll(past, 1) & queries[:, :, None]
        shut = (keys[:, None] & ~own)[:, None]
        mask = mask & ~shut if mask.dtype == torch.bool else mask.masked_fill(shut, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_answers(model: PreTrainedModel, inputs: dict[str, Tensor], documents: list[Document]) -> Tensor:
    """Where in the prompts the answers stand, bool (B, N), for `hidden_vision`."""
    vision = inputs["input_ids"] == model.config.image_token_index
    hidden = torch.zeros_like(vision)
    for row, document in enumerate(documents):
        hidden[row, vision[row].nonzero()[answer_tokens(document), 0]] = True
    return hidden


def kinds(document: Document) -> str:
    """The row of the table a document's first question belongs to."""
    return "chart, longest" if document.turns[0].question.startswith("which bar") else document.task


def erased(document: Document) -> Document:
    """The document with paper where the answer to its first question stands, if it stands anywhere."""
    region = document.turns[0].region
    if region is None:
        return document
    image = document.image.copy()
    image.paste((240, 240, 240), region)
    return replace(document, image=image)


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    count: int,
    control: str | None = None,
    batch_size: int = 32,
    tasks: Iterable[str] = TASKS,
) -> dict[str, list[float]]:
    """Exact match in percent by kind of question, over ``count`` unseen documents of each task.

    Args:
        control: None, "blank", "erased" or "hidden".

    Returns:
        Of each kind the percent, its 95 % interval, and the number of questions.
    """
    right = defaultdict(list)
    for task in tasks:
        documents = unseen_documents(task, count)
        for start in range(0, count, batch_size):
            some = documents[start : start + batch_size]
            shown = [erased(document) for document in some] if control == "erased" else some
            inputs = prompts(processor, shown, blank=control == "blank")
            if control == "hidden":
                with hidden_vision(model, hidden_answers(model, inputs, some)):
                    said = answers(model, processor, inputs)
            else:
                said = answers(model, processor, inputs)
            for document, answer in zip(some, said, strict=True):
                right[kinds(document)].append(answer.strip() == document.turns[0].answer)
    found = {}
    for kind, hits in right.items():
        shares = (sum(hits) / len(hits), *rate_interval(sum(hits), len(hits)))
        found[kind] = [*(round(100 * share, 1) for share in shares), len(hits)]
    return found


def main() -> None:
    """The command line of this module: prints one JSON line a condition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="documents a task")
    parser.add_argument("--controls-count", type=int, default=1000, help="documents a task of the controls")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    for control, count in (
        (None, arguments.count),
        ("blank", arguments.controls_count),
        ("hidden", arguments.controls_count),
    ):
        found = measure(model, processor, count, control, arguments.batch_size)
        print(json.dumps({"condition": control or "as it is", "questions": count, **found}), flush=True)


if __name__ == "__main__":
    main()
