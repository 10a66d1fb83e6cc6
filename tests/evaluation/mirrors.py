"""Small mirrors of the fourteen data sets, with the columns of the real ones, and answers whose scores are known.

The scores were worked out by hand from the definitions in docs/eval.md; each table says why an answer is right or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from pmod_cli.evaluation import prompts
from pmod_cli.evaluation.benchmarks import Split, groups

TEXT, NUMBER, PICTURE = Value("string"), Value("int64"), Image()
OPTIONS = ("cat", "dog", "fox", "owl")
SIZES = ((40, 30), (64, 64), (33, 96), (90, 40))  # (width, height) in pixels


@dataclass
class Mirrored:
    """One benchmark in small.

    Attributes:
        rows: By split, the rows of the data set that holds the questions.
        said: By split, an answer to each row.
        score: The headline score of these answers, as the report prints it.
        items: Score of each answer, where lmms-eval scores single questions.
    """

    features: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    said: dict[str, list[str]]
    score: float
    items: list[float] | None = None
    pictures: list[dict[str, Any]] = field(default_factory=list)


def picture(seed: int) -> Pictures.Image:
    width, height = SIZES[seed % len(SIZES)]
    return Pictures.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def break_pictures(patch: pytest.MonkeyPatch, word: str) -> None:
    """While a test lasts, no picture of a question with this word can be read."""
    prepare = prompts.prepare

    def broken(processor: Any, index: int, question: str, images: Any, model_type: str) -> prompts.Prompt:
        if word in question:
            raise OSError("image file is truncated")
        return prepare(processor, index, question, images, model_type)

    patch.setattr(prompts, "prepare", broken)


def mirrored(name: str) -> Mirrored:
    """The small version of a benchmark of the paper, by the name that a user types."""
    return MAKERS[name]()


def write(root: Path, names: Iterable[str] | None = None) -> Path:
    """Write mirrors of the named benchmarks (None: all) as they lie on the hub, each with its card."""
    for benchmark in groups()["paper"]:
        if names is not None and benchmark.name not in names:
            continue
        made = mirrored(benchmark.name)
        for source in benchmark.data:
            if "question" in source.columns:
                write_split(root, source, made.rows[source.split], made.features)
            else:
                write_split(root, source, made.pictures, {"id": TEXT, "image": PICTURE})
    return root


def write_split(root: Path, source: Split, rows: list[dict[str, Any]], features: dict[str, Any]) -> Path:
    """One split as one parquet file, and the part of the card that says so."""
    folder = root / source.repository
    place = source.configuration or "data"
    file = folder / place / f"{source.split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {column: [row[column] for row in rows] for column in features}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(file)
    _declare(folder / "README.md", source, place)
    return file


def _declare(card: Path, source: Split, place: str) -> None:
    lines = card.read_text().splitlines()[1:-1] if card.is_file() else ["configs:"]
    head = f"- config_name: {source.configuration or 'default'}"
    part = [f"  - split: {source.split}", f"    path: {place}/{source.split}-*"]
    if head in lines:
        at = lines.index(head) + 2
        lines[at:at] = part
    else:
        lines += [head, "  data_files:", *part]
    card.write_text("\n".join(["---", *lines, "---"]) + "\n")


def _single(
    split: str, features: dict[str, Any], rows: list[dict[str, Any]], said: list[str], right: list[float]
) -> Mirrored:
    """A benchmark of one split whose score is the mean over its questions, times 100."""
    assert len(rows) == len(said) == len(right) >= 8
    return Mirrored(features, {split: rows}, {split: said}, 100 * sum(right) / len(right), right)


def seed() -> Mirrored:
    """The first letter counts, in either case. Video questions are asked, and are not in the headline."""
    table = [
        ("A", "image", "A"),  # right
        ("B", "image", "b. the dog"),  # right
        ("C", "image", "C"),  # right
        ("D", "image", "A"),
        ("A", "image", "The answer is A"),  # begins with T
        ("B", "image", ""),
        ("C", "video", "C"),
        ("D", "video", "A"),
    ]
    rows = [
        {
            "image": [picture(place)] * (1 if kind == "image" else 2),
            "question": f"what is in picture {place}?",
            **{f"choice_{letter}": word for letter, word in zip("abcd", OPTIONS, strict=True)},
            "answer": answer,
            "data_type": kind,
            "question_id": str(place),
        }
        for place, (answer, kind, _) in enumerate(table)
    ]
    texts = ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type", "question_id")
    features = {"image": List(PICTURE), **dict.fromkeys(texts, TEXT)}
    return Mirrored(features, {"test": rows}, {"test": [said for *_, said in table]}, 100 * 3 / 6)


def rwqa() -> Mirrored:
    """A letter is looked for in the answer; other answers have to be equal but for case and a full stop."""
    table = [
        ("A", "A", 1),
        ("B", "B. left", 1),
        ("C", "The correct answer is C", 1),
        ("A", "B", 0),
        ("B", "I do not know", 0),  # no letter in it
        ("4", "4.", 1),
        ("Yes", "yes", 1),
        ("No", "yes", 0),
    ]
    rows = [
        {"image": picture(place), "question": f"which way is sign {place}?", "answer": answer}
        for place, (answer, *_) in enumerate(table)
    ]
    features = {"image": PICTURE, "question": TEXT, "answer": TEXT}
    return _single("test", features, rows, [row[1] for row in table], [row[2] for row in table])


def mme() -> Mirrored:
    """Two questions about each picture: 100 x the share that is right, and 100 more where both are; summed over kinds.

    existence: (200 + 50) / 2 = 125; count: 50; so perception is 175. Cognition is 200.
    """
    table = [
        ("existence", "e1", "Yes", "Yes"),
        ("existence", "e1", "No", "No"),
        ("existence", "e2", "Yes", "Yes"),
        ("existence", "e2", "No", "yes, it is"),
        ("count", "c1", "No", "No."),
        ("count", "c1", "Yes", "maybe"),  # neither yes nor no
        ("commonsense_reasoning", "k1", "Yes", "y"),
        ("commonsense_reasoning", "k1", "No", "no"),
    ]
    rows = [
        {
            "image": picture(place // 2),
            "question": f"is there a thing {place} in it? Please answer yes or no.",
            "answer": answer,
            "question_id": identifier,
            "category": category,
        }
        for place, (category, identifier, answer, _) in enumerate(table)
    ]
    features = {"image": PICTURE, **dict.fromkeys(("question", "answer", "question_id", "category"), TEXT)}
    return Mirrored(features, {"test": rows}, {"test": [row[-1] for row in table]}, 175.0)


def mmb() -> Mirrored:
    """A letter, else the text of one option; where neither is found the answer is wrong."""
    table = [
        ("A", "A", 1),
        ("B", "B. dog", 1),
        ("C", "(C)", 1),
        ("D", "A", 0),
        ("A", "it is a cat", 1),
        ("B", "I cannot tell", 0),  # nothing found
        ("C", "", 0),  # nothing found
        ("D", "The answer is D", 1),
    ]
    rows = [
        {
            "index": place,
            "question": f"what is animal {place}?",
            "hint": "nan" if place % 2 else "look at the ears",
            **dict(zip("ABCD", OPTIONS, strict=True)),
            "answer": answer,
            "category": ("action", "nature")[place % 2],
            "L2-category": "coarse",
            "image": picture(place),
            "source": "here",
            "split": "dev",
        }
        for place, (answer, *_) in enumerate(table)
    ]
    texts = ("question", "hint", "A", "B", "C", "D", "answer", "category", "L2-category", "source", "split")
    features = {"index": NUMBER, "image": PICTURE, **dict.fromkeys(texts, TEXT)}
    return Mirrored(features, {"dev": rows}, {"dev": [row[1] for row in table]}, 100 * sum(row[2] for row in table) / 8)


def pope() -> Mirrored:
    """F1 of "yes" per split, averaged over the three.

    adversarial: 2 hits, 1 false alarm, 1 miss ("maybe" is no miss, as lmms-eval counts): F1 = 2/3. popular: all right,
    1. random: always yes, precision 1/2, recall 1: F1 = 2/3.
    """
    truth = ["yes"] * 4 + ["no"] * 4
    said = {
        "adversarial": ["Yes", "yes", "No", "maybe", "no", "Yes", "No", "no"],
        "popular": [answer.capitalize() for answer in truth],
        "random": ["Yes"] * 8,
    }
    rows = {
        split: [
            {
                "image": picture(place),
                "question": f"Is there a {OPTIONS[place % 4]} in the image?",
                "answer": answer,
                "question_id": f"{split}{place}",
            }
            for place, answer in enumerate(truth)
        ]
        for split in said
    }
    features = {"image": PICTURE, **dict.fromkeys(("question", "answer", "question_id"), TEXT)}
    return Mirrored(features, rows, said, 100 * (2 / 3 + 1 + 2 / 3) / 3)


def gqa() -> Mirrored:
    """Equal but for case and punctuation. The pictures are a data set of their own."""
    table = [
        ("red", "Red.", 1),
        ("yes", "yes", 1),
        ("dog", "a dog", 0),
        ("left", "right", 0),
        ("car", "", 0),
        ("table", "Table", 1),
        ("no", "No", 1),
        ("cat", "cats", 0),
    ]
    rows = [
        {"imageId": f"n{place % 2}", "question": f"what is thing {place}?", "answer": answer}
        for place, (answer, *_) in enumerate(table)
    ]
    features = dict.fromkeys(("imageId", "question", "answer"), TEXT)
    made = _single("testdev", features, rows, [row[1] for row in table], [row[2] for row in table])
    made.pictures = [{"id": f"n{place}", "image": picture(place)} for place in range(2)]
    return made


def ai2d() -> Mirrored:
    """A letter with a full stop at the beginning is cut out; then equal but for case and punctuation."""
    table = [
        (0, "A", 1),
        (1, "B. dog", 1),
        (2, " C.", 1),
        (3, "(D)", 1),
        (1, "A", 0),
        (1, "the dog", 0),
        (0, "", 0),
        (1, "b", 1),
    ]
    rows = [
        {"image": picture(place), "question": f"what eats {place}?", "options": list(OPTIONS), "answer": str(answer)}
        for place, (answer, *_) in enumerate(table)
    ]
    features = {"image": PICTURE, "question": TEXT, "options": List(TEXT), "answer": TEXT}
    return _single("test", features, rows, [row[1] for row in table], [row[2] for row in table])


def _documents(table: list[tuple[list[str], str, float]]) -> Mirrored:
    rows = [
        {
            "image": picture(place),
            "question": f"what is written in line {place}?",
            "answers": answers,
            "questionId": str(place),
        }
        for place, (answers, *_) in enumerate(table)
    ]
    features = {"image": PICTURE, "question": TEXT, "answers": List(TEXT), "questionId": TEXT}
    return _single("validation", features, rows, [row[1] for row in table], [row[2] for row in table])


def docvqa() -> Mirrored:
    """1 minus edit distance over the longer length, to the nearest accepted answer; below 0.5 it is 0."""
    return _documents(
        [
            (["10"], "10", 1),
            (["total sum", "sum"], "sum", 1),
            (["abcd"], "abce", 0.75),
            (["ab"], "ax", 0.5),
            (["ab"], "xy", 0),
            (["12 March"], "12 march", 1),
            (["x"], "it cannot be read", 0),
            (["1998"], "", 0),
        ]
    )


def infovqa() -> Mirrored:
    """As DocVQA."""
    return _documents(
        [
            (["50%"], "50%", 1),
            (["50%"], "50", 2 / 3),
            (["blue", "navy"], "Navy", 1),
            (["seven"], "7", 0),
            (["abcdef"], "abcxyz", 0.5),
            (["a"], "b", 0),
            (["usa"], "it says usa", 0),  # 8 letters too many of 11
            (["10"], "", 0),
        ]
    )


def chartqa() -> Mirrored:
    """Numbers within 5 %, percentages divided by 100; everything else equal but for case."""
    table = [
        ("100", "104", 1),
        ("100", "106", 0),
        ("50%", "50%", 1),
        ("50%", "50", 0),  # 0.5 against 50
        ("Yes", "yes", 1),
        ("Red", "Blue", 0),
        ("12", "about 12", 0),  # no number by itself
        ("3.5", "", 0),
    ]
    rows = [
        {
            "image": picture(place),
            "question": f"what is the value of bar {place}?",
            "answer": answer,
            "type": ("human_test", "augmented_test")[place % 2],
        }
        for place, (answer, *_) in enumerate(table)
    ]
    features = {"image": PICTURE, **dict.fromkeys(("question", "answer", "type"), TEXT)}
    return _single("test", features, rows, [row[1] for row in table], [row[2] for row in table])


def _ten_people(split: str, table: list[tuple[int, str, str, float]]) -> Mirrored:
    """Rows of ten accepted answers, the first so many of which are the given one."""
    rows = [
        {
            "image": picture(place),
            "question": f"what does sign {place} say?",
            "answers": [answer] * people + [f"other {place} {person}" for person in range(10 - people)],
            "question_id": place,
        }
        for place, (people, answer, *_) in enumerate(table)
    ]
    features = {"image": PICTURE, "question": TEXT, "answers": List(TEXT), "question_id": NUMBER}
    return _single(split, features, rows, [row[2] for row in table], [row[3] for row in table])


def textvqa() -> Mirrored:
    """min(1, agreeing people / 3), averaged over leaving out each of the ten; without articles, case and full stops.

    Three of ten: one of the three is left out (2/3, three times), or another (1, seven times): 0.9. Two: 0.6. One: 0.3.
    """
    return _ten_people(
        "validation",
        [
            (10, "stop", "stop", 1),
            (10, "stop", "Stop.", 1),
            (10, "stop", "the stop", 1),
            (3, "exit", "exit", 0.9),
            (2, "exit", "exit", 0.6),
            (1, "exit", "exit", 0.3),
            (10, "stop", "go", 0),
            (10, "stop", "", 0),
        ],
    )


def okvqa() -> Mirrored:
    """As TextVQA; number words become digits."""
    return _ten_people(
        "val2014",
        [
            (10, "surfing", "surfing", 1),
            (10, "2", "two", 1),
            (3, "horse", "Horse", 0.9),
            (2, "horse", "a horse", 0.6),
            (10, "horse", "Unanswerable", 0),
            (10, "horse", "horses", 0),
            (10, "kitchen", "kitchen.", 1),
            (10, "horse", "", 0),
        ],
    )


def mmmu() -> Mirrored:
    """A letter, else in a longer answer the text of an option, else an option drawn at random; open answers: contained.

    The sixth has an answer that is none of its options, so that the draw cannot hit it.
    """
    table = [
        ("multiple-choice", "A", "A", 1),
        ("multiple-choice", "B", "(B)", 1),
        ("multiple-choice", "C", "The answer is C.", 1),
        ("multiple-choice", "D", "A", 0),
        ("multiple-choice", "A", "it must be one cat on the hill", 1),
        ("multiple-choice", "F", "hm", 0),  # drawn
        ("open", "12", "the result is 12", 1),
        ("open", "oxygen", "Oxygen.", 1),
    ]
    rows = [
        {
            "id": f"validation_{('Art', 'Math')[place % 2]}_{place}",
            "question": f"<image 1> what is shown in {place}?" + (" Is it like <image 2>?" if place == 1 else ""),
            "options": str(list(OPTIONS)) if kind == "multiple-choice" else "[]",
            "answer": answer,
            "question_type": kind,
            "image_1": picture(place),
            **{f"image_{number}": picture(9) if (number, place) == (2, 1) else None for number in range(2, 8)},
        }
        for place, (kind, answer, *_) in enumerate(table)
    ]
    texts = ("id", "question", "options", "answer", "question_type")
    features = {**dict.fromkeys(texts, TEXT), **{f"image_{number}": PICTURE for number in range(1, 8)}}
    right = sum(row[-1] for row in table)
    return Mirrored(features, {"validation": rows}, {"validation": [row[2] for row in table]}, 100 * right / 8)


def sqa() -> Mirrored:
    """The letter alone in either case, or a capital letter and a full stop at the beginning; nothing else."""
    table = [
        (0, "A", 1),
        (1, "B. dog", 1),
        (2, "c", 1),
        (3, "(D)", 0),
        (1, "The answer is B", 0),
        (0, "B", 0),
        (2, "", 0),
        (1, "b", 1),
    ]
    rows = [
        {
            "image": picture(place),
            "question": f"which is number {place}?",
            "choices": list(OPTIONS),
            "answer": answer,
            "hint": "" if place % 2 else "animals have names",
        }
        for place, (answer, *_) in enumerate(table)
    ]
    features = {"image": PICTURE, "question": TEXT, "choices": List(TEXT), "answer": NUMBER, "hint": TEXT}
    return _single("test", features, rows, [row[1] for row in table], [row[2] for row in table])


MAKERS: dict[str, Callable[[], Mirrored]] = {
    "seed": seed,
    "rwqa": rwqa,
    "mme": mme,
    "mmb": mmb,
    "pope": pope,
    "gqa": gqa,
    "ai2d": ai2d,
    "docvqa": docvqa,
    "chartqa": chartqa,
    "textvqa": textvqa,
    "infovqa": infovqa,
    "okvqa": okvqa,
    "mmmu": mmmu,
    "sqa": sqa,
}
