"""Everything of docs/reproduce.md that needs no GPU, on made-up data in the layout of the real ones.

    python -m tests.reproduce --llm lmsys/vicuna-7b-v1.5 --vision-tower openai/clip-vit-large-patch14-336

looks at rows with the paper's recipes, plans each run, and counts what the result costs. The language model, the tower
and the projector are folders, files or names on the hub; their weights are read for their shapes alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

ROWS = 200
FOLDERS = {  # below data/, as the rows name them; the last ones are of text alone
    "projector-pretrain": ("00000", "00461"),
    "llava-1.5-7b": (
        *("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"),
        "",
    ),
    "llava-next-7b": ("llava_next_images", ""),
}
FILES = {
    "projector-pretrain": "blip_laion_cc_sbu_558k.json",
    "llava-1.5-7b": "llava_v1_5_mix665k.json",
    "llava-next-7b": "llava_next_data.json",
}
SIZES = ((640, 480), (336, 336), (480, 640), (1024, 300), (90, 120))
RUNS = (*FILES, "llava-1.5-7b-baseline", "llava-next-7b-baseline")


def make_data(root: Path, rows: int = ROWS) -> None:
    """Write the three files and their pictures below `root`."""
    for recipe, folders in FOLDERS.items():
        listed = [_row(root, recipe, folders[number % len(folders)], number) for number in range(rows)]
        (root / FILES[recipe]).write_text(json.dumps(listed), encoding="utf-8")


def _row(root: Path, recipe: str, folder: str, number: int) -> dict:
    """One row: a caption for the projector, else a conversation of two questions."""
    answered = [{"from": "human", "value": "What is in the picture?"}, {"from": "gpt", "value": f"A box, {number}."}]
    if recipe != "projector-pretrain":
        answered += [{"from": "human", "value": "Answer with one word."}, {"from": "gpt", "value": "Box"}]
    row = {"id": f"{number:012d}", "conversations": answered}
    if not folder:
        return row
    name = f"{folder}/{number:012d}.jpg"
    (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZES[number % len(SIZES)], (number % 256, 90, 160)).save(root / name)
    answered[0]["value"] = f"<image>\n{answered[0]['value']}" if number % 2 else f"{answered[0]['value']}\n<image>"
    return {**row, "image": name}


def steps(root: Path, parts: Sequence[str], gpu: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(what is checked, arguments of `pmod`) in the order of the page."""
    here = ("--set", f"data.images={root}")
    for recipe, file in FILES.items():
        own = [part for part in parts if recipe != "projector-pretrain" or not part.startswith("model.projector=")]
        words = [word for part in own for word in ("--set", part)]
        data = ("--set", f"data.path={root / file}", *here)
        yield f"rows of {recipe}", ("finetune", "--recipe", recipe, "--check-data", *data, *words, "-o", str(root))
    for recipe in RUNS:
        smaller = ("--batch-size", "16") if recipe == "projector-pretrain" else ()
        run = ("finetune", "--recipe", recipe, "--dry-run", "--gpu", gpu, "--num-processes", "8", *smaller)
        yield f"plan of {recipe}", run
        two = ("--num-processes", "16", "--num-machines", "2", "--main-process-ip", "node0", "-o", str(root / "out"))
        yield f"plan of {recipe} on two machines", (*run[:6], *two, *smaller)
    for model in ("llava-1.5-7b", "llava-next-7b"):
        yield f"what {model} saves", ("profile", "--model", model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="language model; without it the rows are not looked at")
    parser.add_argument("--vision-tower", help="CLIP tower")
    parser.add_argument("--projector", help="mm_projector.bin, or a repository that has it (default: the paper's)")
    parser.add_argument("--gpu", default="a100-80gb", help="what to plan for")
    parser.add_argument("--rows", type=int, default=ROWS)
    given = parser.parse_args(arguments)
    names = {"llm": given.llm, "vision_tower": given.vision_tower, "projector": given.projector}
    parts = [f"model.{key}={value}" for key, value in names.items() if value]
    failed = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_data(root, given.rows)
        for title, words in steps(root, parts, given.gpu):
            if "--check-data" in words and given.llm is None:
                continue
            done = subprocess.run([sys.executable, "-m", "pmod_cli", *words], capture_output=True, text=True)
            told = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
            print(f"{'ok' if done.returncode == 0 else 'FAILED'}: {title}\n    pmod {' '.join(words)}", flush=True)
            print("".join(f"    {line}\n" for line in told), end="", flush=True)
            failed += [title] if done.returncode else []
    print(f"{len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
