"""Measures the tiny model on unseen documents: ``python -m tests.beds.tiny_llava_next.measure --model DIR``.

One question a prompt, through the stock processor and greedy generation, exact match. Then the same with the image
blanked, which tells what guessing gives, and with vision tokens hidden from some layer on, which tells how deep the
decoder still reads the image: without that, an ablation on this model would say nothing about dropping tokens.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from pmod_cli.data.documents import TASKS, Document, draw, seed_of
from pmod_cli.data.rows import question
from pmod_cli.model.cache import CACHE_NAME


def unseen_documents(task: str, count: int) -> list[Document]:
    """The first ``count`` unseen documents of a task; each is asked its first question."""
    return [draw(task, seed_of("test", index)) for index in range(count)]


def prompts(processor: ProcessorMixin, documents: list[Document], blank: bool = False) -> dict[str, Tensor]:
    """Model inputs of B documents, padded on the left, each with its first question and the generation prompt."""
    texts = [
        processor.apply_chat_template(question(document.turns[0]), tokenize=False, add_generation_prompt=True)
        for document in documents
    ]
    images = [Image.new("RGB", document.image.size, "white") if blank else document.image for document in documents]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


@torch.inference_mode()
def answers(model: PreTrainedModel, processor: ProcessorMixin, inputs: dict[str, Tensor]) -> list[str]:
    """What the model says to each prompt, greedily, six tokens at most."""
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def hidden_vision(model: PreTrainedModel, inputs: dict[str, Tensor], first_layer: int, share: float) -> Iterator[None]:
    """Hide a random share of the vision tokens, drawn anew for each row, from every layer from ``first_layer`` on."""
    ids = inputs["input_ids"]
    vision = ids == model.config.image_token_index
    hidden = vision & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < share)

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states, cache = args[0] if args else kwargs["hidden_states"], kwargs[CACHE_NAME]
        mask, new = kwargs.get("attention_mask"), states.shape[1]
        past = cache.get_seq_length(module.self_attn.layer_idx)
        if mask is None:
            mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None]
        keys = torch.zeros(len(ids), past + new, dtype=torch.bool)
        keys[:, : ids.shape[1]] = hidden
        queries = keys[:, past:]  # a hidden token still sees itself, lest its row of attention be empty
        own = torch.eye(new, past + new, dtype=torch.bool).roll(past, 1) & queries[:, :, None]
        shut = (keys[:, None] & ~own)[:, None]
        mask = mask & ~shut if mask.dtype == torch.bool else mask.masked_fill(shut, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    layers = model.model.language_model.layers[first_layer:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kinds(document: Document) -> str:
    """The row of the table a document's first question belongs to."""
    return "chart, longest" if document.turns[0].question.startswith("which bar") else document.task


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    count: int,
    *,
    blank: bool = False,
    hide: tuple[int, float] | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Exact match in percent by kind of question, over ``count`` unseen documents of each task."""
    right = defaultdict(list)
    for task in TASKS:
        documents = unseen_documents(task, count)
        for start in range(0, count, batch_size):
            some = documents[start : start + batch_size]
            inputs = prompts(processor, some, blank)
            if hide is None:
                said = answers(model, processor, inputs)
            else:
                with hidden_vision(model, inputs, *hide):
                    said = answers(model, processor, inputs)
            for document, answer in zip(some, said, strict=True):
                right[kinds(document)].append(answer.strip() == document.turns[0].answer)
    return {kind: round(100 * sum(hits) / len(hits), 1) for kind, hits in right.items()}


def main() -> None:
    """The command line of this module: prints one JSON line a condition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="documents a task")
    parser.add_argument("--hide-count", type=int, default=100, help="documents a task where vision tokens are hidden")
    parser.add_argument("--hide-from", type=int, nargs="*", default=[0, 8, 12, 16, 20, 24], help="first layer hidden")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)

    def show(condition: str, **options) -> None:
        print(json.dumps({"condition": condition, **measure(model, processor, **options)}), flush=True)

    show("as it is", count=arguments.count)
    show("blank image", count=arguments.count, blank=True)
    for layer in arguments.hide_from:
        for share in (0.5, 1.0):
            show(f"{share:.0%} hidden from layer {layer}", count=arguments.hide_count, hide=(layer, share))


if __name__ == "__main__":
    main()
