"""Pictures with questions: what a model is measured on. Answers may be missing; then the model's own are used.

A sample comes from the synthetic documents (`tiny`), a LLaVA JSON file, a folder of pictures or a data set of the hub.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import pictures_in
from pmod_cli.core.paths import expanded
from pmod_cli.data.conversation import IMAGE, VIDEO, BadRow, ChatTurn, Conversation
from pmod_cli.data.documents import TASKS, seed_of
from pmod_cli.data.pictures import find_image, open_image
from pmod_cli.data.several import ALL_TASKS, document_of, film_of
from pmod_cli.data.sources import open_source

TINY = "tiny"
MOST_QUESTIONS = 3  # of one picture: they share its vision tokens
QUESTIONS = (
    "What is shown in the image?",
    "What text or numbers can be read in the image?",
    "Which things are in the image, and where are they?",
)
"""Asked where the data has pictures and no questions."""


@dataclass(frozen=True)
class Sample:
    """One picture, several, or a film, with questions.

    Attributes:
        task: What results are grouped by.
        images: File names, encoded bytes or PIL images, in the order of their places.
        questions: Text of each question. `<image>` marks the places of images, all of them in the first one.
        answers: As many, or none.
        folder: Where file names start from.
        videos: Films, whose places `<video>` marks in the same way.
    """

    task: str
    images: tuple[Any, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...] = ()
    folder: Path | None = None
    videos: tuple[Any, ...] = ()

    def conversation(self, answers: Sequence[str]) -> Conversation:
        """The first questions with these answers, one each."""
        pairs = zip(self.questions, answers, strict=False)
        turns = [turn for asked, said in pairs for turn in (ChatTurn("user", asked), ChatTurn("assistant", said))]
        return Conversation(tuple(turns), self.images, self.videos)


def read_samples(
    data: str,
    count: int,
    *,
    images: Path | None = None,
    questions: Sequence[str] = (),
    seed: int = 0,
    films: bool = False,
) -> list[Sample]:
    """Samples of any source, drawn by the seed.

    A file or data set may have several rows a picture. Each picture is asked about once before any is asked about
    again, with the questions of another row.

    Args:
        data: `tiny` or one of its tasks, a LLaVA JSON or JSONL file, a folder of pictures, or a data set of the hub.
        count: How many; of `tiny`, as equally many of each task as goes.
        images: Folder that the image names of a file start from; by default the file's own.
        questions: Asked about each picture instead of the data's own questions.
        seed: Of the draw.
        films: Whether `tiny` has the tasks of two pictures and of a film too.

    Raises:
        PmodError: nothing is there, a picture cannot be read, or there are fewer than `count`.
    """
    passed_over: Counter[str] = Counter()
    if tasks := tiny_tasks(data):
        tasks = ALL_TASKS if data == TINY and films else tasks
        shares = [count // len(tasks) + (index < count % len(tasks)) for index in range(len(tasks))]
        found = [
            sample for task, share in zip(tasks, shares, strict=True) for sample in tiny_samples(task, share, seed)
        ]
    elif expanded(data).is_dir() and not (expanded(data) / "dataset_info.json").is_file():
        found = _of_folder(expanded(data), count, seed)
    else:
        found = _of_rows(data, images, count, seed, questions, passed_over)
    found = [_asked(each, questions) for each in found if each.images or not questions]
    if len(found) < count:
        told = [f"{rows} row{'s' * (rows > 1)} {why}" for why, rows in passed_over.items()]
        raise PmodError(
            f"{data} has {len(found)} pictures to ask about, and `samples={count}` were asked for"
            + (f"; passed over: {', '.join(told)}" if told else "")
        )
    return found


def by_picture(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of the samples in groups that have no picture in common, in the order of the first of each.

    Raises:
        BadRow: a file that cannot be read.
    """
    group = list(range(len(samples)))  # of each sample, by the place of its first one
    first: dict[bytes, int] = {}  # of each picture, the place where it came first
    for place, sample in enumerate(samples):
        for picture in _pictures_of(sample):
            one, other = sorted((group[place], group[first.setdefault(picture, place)]))
            if one != other:
                group = [one if each == other else each for each in group]
    found: dict[int, list[int]] = {}
    for place, own in enumerate(group):
        found.setdefault(own, []).append(place)
    return list(found.values())


def tiny_tasks(data: str) -> tuple[str, ...]:
    """The synthetic tasks that a name stands for; none where it stands for something else."""
    names = [name.strip().removeprefix("tiny_") for name in data.split(",")]
    return TASKS if data == TINY else tuple(names) if all(name in ALL_TASKS for name in names) else ()


def tiny_samples(task: str, count: int, seed: int = 0, split: str = "train") -> list[Sample]:
    """Synthetic documents of one task, with answers; the seed moves to others of the split."""
    samples = []
    for index in range(count):
        number = seed_of(split, seed * 1_000_003 + 7_000_000 + index)
        document = document_of(task, number)
        turns = document.turns  # of a film in their order, in which the bundled model was trained
        if not document.is_film:
            turns = Random(number).sample(turns, min(MOST_QUESTIONS, len(turns)))
        asked = [turn.question for turn in turns]
        asked[0] = (f"{VIDEO}\n" if document.is_film else f"{IMAGE}\n" * document.pictures) + asked[0]
        images, videos = ((), (film_of(document),)) if document.is_film else (tuple(document.images), ())
        answers = tuple(turn.answer for turn in turns)
        samples.append(Sample(task, images, tuple(asked), answers, videos=videos))
    return samples


def _of_folder(folder: Path, count: int, seed: int) -> list[Sample]:
    names = [path.name for path in pictures_in(folder)]
    asked = (f"{IMAGE}\n{QUESTIONS[0]}", *QUESTIONS[1:])
    chosen = Random(seed).sample(names, min(count, len(names)))
    return [_readable(Sample(folder.name, (name,), asked, (), folder), f"{folder}") for name in chosen]


def _of_rows(
    data: str, images: Path | None, count: int, seed: int, questions: Sequence[str], passed_over: Counter[str]
) -> list[Sample]:
    """Samples of rows; those that cannot be asked about are counted in `passed_over`, by reason."""
    path = expanded(data)
    kind = "llava" if path.suffix.lower() in (".json", ".jsonl") else "hub"
    source = open_source(kind, data, None if images is None else str(images), answered=False)
    with_image = [row for row in range(len(source)) if source.lengths[row] > 0]
    samples: list[Sample] = []
    seen: Counter[bytes] = Counter()
    repeats: list[tuple[int, int]] = []  # how often the picture came before, and the row
    for row in Random(seed).sample(with_image, len(with_image)):
        if len(samples) == count:
            break
        where = f"row {row} of {source.name}"
        try:
            conversation = source[row]
            if (why := _unasked(conversation)) is not None:
                passed_over[why] += 1
                continue
            sample = _asked(_of_conversation(path.stem or data, conversation, source.images), questions)
            pictures = _pictures_of(sample)
        except BadRow as fault:
            raise PmodError(f"{where}: {fault.what}", hint="correct the row, or leave it out") from None
        if before := max((seen[picture] for picture in pictures), default=0):
            repeats.append((before, row))
        else:
            samples.append(_readable(sample, where))
        seen.update(pictures)
    if not questions:  # which would be asked about the same picture again
        for _, row in sorted(repeats, key=itemgetter(0))[: count - len(samples)]:
            again = _of_conversation(path.stem or data, source[row], source.images)
            samples.append(_readable(again, f"row {row} of {source.name}"))
    return samples


def _unasked(conversation: Conversation) -> str | None:
    """Why a row cannot be asked about: what can be has all of its images in a first question."""
    first = next((turn.text for turn in conversation.turns if turn.role == "user"), None)
    if first is None:
        return "without a question"
    if conversation.videos:
        return "with a film"
    return None if first.count(IMAGE) == len(conversation.images) else "with images behind the first question"


def _of_conversation(task: str, conversation: Conversation, folder: Path | None) -> Sample:
    """Questions and answers in turn, of a row that can be asked about."""
    asked = [turn.text for turn in conversation.turns if turn.role == "user"][:MOST_QUESTIONS]
    said = [turn.text for turn in conversation.turns if turn.role == "assistant"][: len(asked)]
    answers = tuple(said) if len(said) == len(asked) and all(said) else ()
    return Sample(task, conversation.images, tuple(asked), answers, folder)


def _asked(sample: Sample, questions: Sequence[str]) -> Sample:
    """The sample, or where questions are given its first picture with these, and no answers."""
    if not questions:
        return sample
    asked = (f"{IMAGE}\n{questions[0]}", *questions[1:])
    return Sample(sample.task, sample.images[:1], asked, folder=sample.folder)


def _pictures_of(sample: Sample) -> list[bytes]:
    """A digest of each image and film, which tells a picture whatever its name is.

    Raises:
        BadRow: no picture, or a file that cannot be read.
    """
    images = (_bytes_of(image, sample.folder) for image in sample.images)
    return [blake2b(each).digest() for each in (*images, *(film.pixels.tobytes() for film in sample.videos))]


def _bytes_of(image: Any, folder: Path | None) -> bytes:
    if isinstance(image, str):
        try:
            return find_image(image, folder).read_bytes()
        except OSError as error:
            raise BadRow(f"cannot read the image {image}: {error.strerror}") from None
    return image if isinstance(image, bytes) else open_image(image).tobytes()


def _readable(sample: Sample, where: str) -> Sample:
    """The sample; raises PmodError where one of its pictures cannot be opened."""
    for image in sample.images:
        try:
            open_image(image, sample.folder)
        except BadRow as fault:
            raise PmodError(f"{where}: {fault.what}", hint="remove the picture, or name other data") from None
    return sample
