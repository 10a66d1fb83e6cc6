"""Measures small-llava-next on unseen documents: ``python -m tests.beds.small_llava_next.measure --model DIR``.

One question a prompt, through the stock processor and greedy generation, exact match, bfloat16. Two controls: the image
blanked, which tells what guessing gives; and the answer's region alone painted over, which tells that it is read there.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from pmod_cli.data.documents import Document
from pmod_cli.evaluation.intervals import rate_interval
from tests.beds.tiny_llava_next.measure import answers, kinds, prompts, unseen_documents

TAUGHT = ("doc", "chart", "attribute", "presence")
BATCH = 20  # prompts


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
    task: str,
    count: int,
    control: str = "none",
) -> dict[str, list[float]]:
    """Exact match in percent with its 95 % interval, and the questions asked, by kind of question.

    Args:
        count: unseen documents.
        control: "none", "blank" or "erased".
    """
    right = defaultdict(list)
    documents = unseen_documents(task, count)
    for start in range(0, count, BATCH):
        some = documents[start : start + BATCH]
        seen = [erased(document) for document in some] if control == "erased" else some
        said = answers(model, processor, prompts(processor, seen, blank=control == "blank"))
        for document, answer in zip(some, said, strict=True):
            right[kinds(document)].append(answer.strip() == document.turns[0].answer)
    found = {}
    for kind, hits in right.items():
        shares = (sum(hits) / len(hits), *rate_interval(sum(hits), len(hits)))
        found[kind] = [*(round(100 * share, 1) for share in shares), len(hits)]
    return found


def main() -> None:
    """The command line of this module: prints a JSON line for each task and control."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="documents a task")
    parser.add_argument("--controls-count", type=int, default=200, help="documents a task of each control")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    counts = {"none": arguments.count, "blank": arguments.controls_count, "erased": arguments.controls_count}
    for control, count in counts.items():
        for task in TAUGHT if count else ():
            found = measure(model, processor, task, count, control)
            print(json.dumps({"control": control, "task": task, **found}), flush=True)


if __name__ == "__main__":
    main()
