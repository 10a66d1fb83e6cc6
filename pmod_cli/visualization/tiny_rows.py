"""Unseen synthetic documents as a LLaVA JSON with the box of each answer, for `pmod visualize`.

    python -m pmod_cli.visualization.tiny_rows --task doc --count 100 --out doc
    pmod visualize doc/rows.json --model DIR

asks whether the patches that the bundled model keeps are those that answers are read from.
"""

import argparse
from pathlib import Path

from pmod_cli.core.atomic import write_json
from pmod_cli.core.folders import staged_directory
from pmod_cli.data.documents import TASKS, draw, seed_of


def write_rows(folder: Path, task: str, count: int) -> None:
    """Write the first `count` test documents that have a question with a place, and `rows.json`, into a new folder.

    Raises:
        PmodError: the folder exists.
    """
    rows, index = [], 0
    with staged_directory(folder, "data") as staging:
        while len(rows) < count:
            document = draw(task, seed_of("test", index))
            index += 1
            turn = next((turn for turn in document.turns if turn.region), None)
            if turn is None:  # "is there a red circle?" of a circle that is not there
                continue
            name = f"{task}-{document.seed}.png"
            document.image.save(staging / name)
            conversation = [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]
            rows.append({"image": name, "conversations": conversation, "boxes": [turn.region]})
        write_json(staging / "rows.json", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--count", type=int, default=100, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    write_rows(arguments.out, arguments.task, arguments.count)


if __name__ == "__main__":
    main()
