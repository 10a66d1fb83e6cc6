"""Measures small-llava-next on unseen documents: ``python -m tests.beds.small_llava_next.measure --model DIR``.

One question a prompt, through the stock processor and greedy generation, exact match, bfloat16. Two controls: the image
blanked, which tells what guessing gives; and the answer's region alone painted over, which tells that it is read there.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.beds.tiny_llava_next.measure import measure

TAUGHT = ("doc", "chart", "attribute", "presence")
BATCH = 20  # prompts


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
            found = measure(model, processor, count, control, BATCH, [task])
            print(json.dumps({"control": control, "task": task, **found}), flush=True)


if __name__ == "__main__":
    main()
