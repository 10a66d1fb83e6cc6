"""Synthetic documents of several pictures: two to choose from, and a film in which a digit moves and changes.

``which`` asks which of two pictures shows an object, ``moving`` what the moving digit read in the last frame. Both need
what one still picture cannot have: a token has to be told by its picture, or by its time.
"""

from random import Random

import numpy as np

from pmod_cli.core.videos import Video
from pmod_cli.data.documents import CELL, TASKS, Canvas, Document, Mark, Turn, draw, scatter, side_by_side

SEVERAL = ("which", "moving")
ALL_TASKS = (*TASKS, *SEVERAL)
SIZES = {"which": (96, 48), "moving": (48, 48)}  # pixels of a picture, width and height
NUMBERED = ("first", "second")
FRAMES = (4, 6)  # even: two frames are one to Qwen3-VL's tower
PER_SECOND = 2.0  # frames


def document_of(task: str, seed: int) -> Document:
    """A document of any task, a still one of 96 by 96 pixels."""
    return draw_several(task, seed) if task in SEVERAL else draw(task, seed)


def film_of(document: Document) -> Video:
    """The frames of a film."""
    return Video(np.stack([np.asarray(image) for image in document.images]), PER_SECOND)


def draw_several(task: str, seed: int) -> Document:
    """Draw one document; the same task and seed give the same document.

    Args:
        task: one of ``SEVERAL``.
        seed: any integer; see ``documents.seed_of``.

    Raises:
        ValueError: an unknown task.
    """
    if task not in SEVERAL:
        raise ValueError(f"unknown task {task!r}: expected one of {SEVERAL}")
    compose = {"which": _which, "moving": _moving}[task]
    return compose(seed, Random(f"{task} {seed}"), SIZES[task])


def _which(seed: int, random: Random, size: tuple[int, int]) -> Document:
    """Two pictures of objects; asked for are those that one of them alone shows."""
    canvases = [Canvas(random, size) for _ in NUMBERED]
    objects = [scatter(canvas) for canvas in canvases]
    looks = [{(colour, shape) for colour, shape, _ in shown} for shown in objects]
    turns, marks = [], []
    for number, (canvas, shown) in enumerate(zip(canvases, objects, strict=True)):
        marks += [
            Mark(side_by_side(mark.box, number, size), mark.shows, mark.belongs, place=NUMBERED[number])
            for mark in canvas.marks
        ]
        turns += [
            Turn(
                f"which of the two pictures shows a {colour} {shape}?",
                NUMBERED[number],
                side_by_side(box, number, size),
            )
            for colour, shape, box in shown
            if (colour, shape) not in looks[1 - number]
        ]
    if not turns:  # both show the same: start again
        return _which(seed, random, size)
    random.shuffle(turns)
    return Document.of([canvas.finish() for canvas in canvases], "which", seed, turns, marks)


def _moving(seed: int, random: Random, size: tuple[int, int]) -> Document:
    """A film: a digit goes from cell to cell, and changes on its way, among digits that stay."""
    columns, rows = size[0] // CELL, size[1] // CELL
    path = _walk(random, columns, rows, random.choice(FRAMES))
    digits = _digits(random, len(path))
    canvas = Canvas(random, size)
    free = [(x, y) for x in range(columns) for y in range(rows) if (x, y) not in path]
    for x, y in random.sample(free, random.randint(3, 6)):
        canvas.write(str(random.randint(0, 9)), x, y, "still")
    paper, marks = canvas.image, []
    for number in range(len(path)):  # what stays is on every frame
        marks += [Mark(side_by_side(mark.box, number, size), mark.shows, "still") for mark in canvas.marks]
    frames, boxes = [], []
    for number, ((x, y), digit) in enumerate(zip(path, digits, strict=True)):
        canvas.image = paper.copy()
        box = side_by_side(canvas.write(digit, x, y, "moving"), number, size)
        frames.append(canvas.finish())
        boxes.append(box)
        marks.append(Mark(box, digit, NUMBERED[number % 2]))
    turns = [Turn(f"what did the moving digit read at the {when}?", digits[at], boxes[at]) for when, at in _ENDS]
    return Document.of(frames, "moving", seed, turns, marks, is_film=True)


_ENDS = (("end", -1), ("start", 0))


def _walk(random: Random, columns: int, rows: int, steps: int) -> list[tuple[int, int]]:
    """Cells of a way that never comes back to a cell."""
    while True:
        path = [(random.randrange(columns), random.randrange(rows))]
        while len(path) < steps:
            x, y = path[-1]
            beside = [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
            free = [(a, b) for a, b in beside if 0 <= a < columns and 0 <= b < rows and (a, b) not in path]
            if not free:
                break
            path.append(random.choice(free))
        else:
            return path


def _digits(random: Random, count: int) -> list[str]:
    """Digits of which about every second differs from the one before, and the last from the first."""
    while True:
        digits = [random.randint(0, 9)]
        while len(digits) < count:
            digits.append(random.randint(0, 9) if random.random() < 0.5 else digits[-1])
        if digits[-1] != digits[0]:
            return [str(digit) for digit in digits]
