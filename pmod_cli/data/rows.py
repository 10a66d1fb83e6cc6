"""The synthetic documents as rows: chat-template messages for training, and a LLaVA JSON with the box of each answer.

    python -m pmod_cli.data.rows --task doc --count 100 --out doc
    pmod visualize doc/rows.json --model DIR

asks whether the patches that the bundled model keeps are those that answers are read from.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pmod_cli.core.atomic import write_json
from pmod_cli.core.folders import staged_directory
from pmod_cli.data.conversation import IMAGE
from pmod_cli.data.documents import TASKS, Document, Turn, draw, seed_of
from pmod_cli.data.several import film_of

Messages = list[dict]


def conversation(document: Document, turns: Sequence[Turn] | None = None) -> Messages:
    """The chat messages of a document: its pictures with the first question, then answers and questions in turn.

    Args:
        document: what is asked about; its image is not copied into the messages.
        turns: the turns to include, in order; by default all of the document's.

    Raises:
        ValueError: no turn to include.
    """
    turns = document.turns if turns is None else turns
    if not turns:
        raise ValueError("a conversation needs one turn at least")
    messages: Messages = []
    for turn in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    kind, count = ("video", 1) if document.is_film else ("image", document.pictures)
    messages[0]["content"][:0] = [{"type": kind}] * count
    return messages


def question(document: Document) -> Messages:
    """The chat messages of a document's first question, to be rendered with ``add_generation_prompt=True``."""
    return conversation(document, document.turns[:1])[:1]


def row(document: Document, turns: Sequence[Turn] | None = None) -> dict:
    """A training row, ``{"images": images, "messages": messages}``, or with ``videos``, as the collator takes it."""
    pictures = {"videos": [film_of(document)]} if document.is_film else {"images": document.images}
    return {**pictures, "messages": conversation(document, turns)}


def write_rows(folder: Path, task: str, count: int) -> None:
    """Write the first `count` test documents that have a question with a place, and `rows.json`, into a new folder.

    Raises:
        PmodError: the folder exists.
    """
    rows: list[dict] = []
    index = 0
    with staged_directory(folder, "data") as staging:
        while len(rows) < count:
            document = draw(task, seed_of("test", index))
            index += 1
            turn = next((turn for turn in document.turns if turn.region), None)
            if turn is None:  # "is there a red circle?" of a circle that is not there
                continue
            name = f"{task}-{document.seed}.png"
            document.image.save(staging / name)
            asked = {"from": "human", "value": f"{IMAGE}\n{turn.question}"}
            conversation = [asked, {"from": "gpt", "value": turn.answer}]
            rows.append({"image": name, "conversations": conversation, "boxes": [turn.region]})
        write_json(staging / "rows.json", rows)


def main() -> None:
    """The program `python -m pmod_cli.data.rows`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--count", type=int, default=100, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    write_rows(arguments.out, arguments.task, arguments.count)


if __name__ == "__main__":
    main()
