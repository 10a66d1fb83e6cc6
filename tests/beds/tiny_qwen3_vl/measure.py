"""Measures the tiny Qwen3-VL on unseen documents: ``python -m tests.beds.tiny_qwen3_vl.measure --model DIR``.

One question a prompt, through the stock processor and greedy generation, exact match with its 95 % interval; then the
same with every picture blanked, which tells what guessing gives.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from pmod_cli.data.documents import Document, seed_of
from pmod_cli.data.rows import question
from pmod_cli.data.several import ALL_TASKS, document_of, film_of
from pmod_cli.data.vision import clips
from pmod_cli.evaluation.intervals import rate_interval
from tests.beds.tiny_llava_next.measure import answers, kinds


def unseen_documents(task: str, count: int) -> list[Document]:
    """The first ``count`` unseen documents of a task; each is asked its first question."""
    return [document_of(task, seed_of("test", index)) for index in range(count)]


def prompts(processor: ProcessorMixin, documents: list[Document], blank: bool = False) -> dict[str, Tensor]:
    """Model inputs of B documents of one task, padded on the left, each with its first question."""
    if blank:
        documents = [replace(each, image=Image.new("RGB", each.image.size, "white")) for each in documents]
    texts = [
        processor.apply_chat_template(question(document), tokenize=False, add_generation_prompt=True)
        for document in documents
    ]
    if documents[0].is_film:
        given = clips(processor, [film_of(document) for document in documents])
    else:
        given = {"images": [document.images for document in documents]}
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **given)


def measure(
    model: PreTrainedModel, processor: ProcessorMixin, count: int, blank: bool = False, batch_size: int = 25
) -> dict[str, list[float]]:
    """Exact match in percent by kind of question, over ``count`` unseen documents of each task, with its interval."""
    right = defaultdict(list)
    for task in ALL_TASKS:
        documents = unseen_documents(task, count)
        for start in range(0, count, batch_size):
            some = documents[start : start + batch_size]
            said = answers(model, processor, prompts(processor, some, blank))
            for document, answer in zip(some, said, strict=True):
                right[kinds(document)].append(answer.strip() == document.turns[0].answer)
    return {
        kind: [round(100 * share, 1) for share in (sum(hits) / len(hits), *rate_interval(sum(hits), len(hits)))]
        for kind, hits in right.items()
    }


def main() -> None:
    """The command line of this module: prints one JSON line a condition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500, help="documents a task")
    parser.add_argument("--controls-count", type=int, default=200, help="documents a task of the control")
    parser.add_argument("--batch-size", type=int, default=25)
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    for blank, count in ((False, arguments.count), (True, arguments.controls_count)):
        found = measure(model, processor, count, blank, arguments.batch_size)
        name = "blank" if blank else "as it is"
        print(json.dumps({"condition": name, "questions": count, **found}), flush=True)


if __name__ == "__main__":
    main()
