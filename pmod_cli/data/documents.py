"""Synthetic documents drawn from an integer seed: a receipt, a bar chart, coloured shapes; each with questions.

Four tasks stand for the four kinds of benchmark the paper reports: ``doc`` for DocVQA, ``chart`` for ChartQA,
``attribute`` for GQA, ``presence`` for POPE. Two ask for two look-ups in a row: ``above`` for the price of the item one
line above another, ``dearer`` for the dearer one of two. ``where`` is grounding: in which field of a grid something
stands. Answers sit on a few patches at places that vary, so they cannot be guessed, and a label always comes before its
value in reading order, since a causal decoder cannot look ahead.
"""

from dataclasses import dataclass
from itertools import pairwise, permutations
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from pmod_cli.data.glyphs import HEIGHT, WIDTH, glyph

TASKS = ("doc", "chart", "attribute", "presence", "above", "dearer", "where")
SPLITS = ("train", "test")
CELL = 8  # pixels: glyphs are set on this grid, one cell per patch of the bundled model, jittered inside the cell
FIELD = 32  # pixels: each object lies within one field of this grid, which ``where`` asks for

# Each label starts with a letter of its own.
LABELS = tuple(
    ["bun", "cod", "dip", "egg", "fig", "gum", "ham", "ice", "jam", "nut", "oil", "pie", "rye", "soy", "tea", "yam"]
)
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Look:
    """A look-up that comes before the answer's: a word of the question, the box it is looked up in, what that tells."""

    word: str
    box: Box
    tells: str


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: as it is asked.
        answer: as it is expected.
        region: pixel box (x0, y0, x1, y1) that the answer is read from, if any.
        looks: the look-ups that have to come before.
    """

    question: str
    answer: str
    region: Box | None
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Mark:
    """One drawn thing.

    Attributes:
        box: in pixels.
        shows: the word that one patch of it shows: glyph, bar, colour.
        belongs: the word that it takes the neighbours to tell: the label of its line, the shape of an object.
        above: the label one line above a label that may be asked about.
        place: the word for the picture that it is in.
    """

    box: Box
    shows: str
    belongs: str
    above: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Document:
    """A drawn image (RGB), the turns that may be asked about it, and everything that was drawn on it.

    Several pictures, or the frames of a film, are one image in which they stand side by side, and so do all boxes.
    """

    task: str
    seed: int
    image: Image.Image
    turns: list[Turn]
    marks: list[Mark]
    pictures: int = 1
    is_film: bool = False

    @classmethod
    def of(
        cls,
        images: list[Image.Image],
        task: str,
        seed: int,
        turns: list[Turn],
        marks: list[Mark],
        *,
        is_film: bool = False,
    ) -> "Document":
        """A document of several pictures of one size."""
        strip = Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))
        return cls(task, seed, strip, turns, marks, len(images), is_film)

    @property
    def images(self) -> list[Image.Image]:
        """Its pictures, or its frames, one by one."""
        width, height = self.image.width // self.pictures, self.image.height
        return [self.image.crop((n * width, 0, (n + 1) * width, height)) for n in range(self.pictures)]


def side_by_side(box: Box, number: int, size: tuple[int, int]) -> Box:
    """The box of a thing in picture ``number`` of several of one size (width, height) that stand side by side."""
    across = number * size[0]
    return box[0] + across, box[1], box[2] + across, box[3]


def seed_of(split: str, index: int) -> int:
    """The seed of document ``index`` of a split: even for train, odd for test, so that the splits share none.

    Raises:
        ValueError: an unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"a document is named by one of {SPLITS} and an index >= 0, not by {split!r} and {index}")
    return 2 * index + SPLITS.index(split)


def draw(task: str, seed: int, size: tuple[int, int] = (96, 96)) -> Document:
    """Draw one document; the same task, seed and size give the same document.

    Args:
        task: one of ``TASKS``.
        seed: any integer; see ``seed_of``.
        size: width and height in pixels, multiples of 8, at least 96 by 48.

    Raises:
        ValueError: an unknown task or a size that cannot hold a document.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {TASKS}")
    if size[0] < 96 or size[1] < 48 or size[0] % CELL or size[1] % CELL:
        raise ValueError(f"a document is at least 96x48 pixels and a multiple of {CELL} both ways, not {size}")
    canvas = Canvas(Random(f"{task} {seed}"), size)
    compose = {
        "doc": _receipt,
        "chart": _chart,
        "attribute": _attribute,
        "presence": _presence,
        "above": _above,
        "dearer": _dearer,
        "where": _where,
    }[task]
    turns = compose(canvas)
    return Document(task, seed, canvas.finish(), turns, canvas.marks)


class Canvas:
    """Paper with a random tint, ink of a random darkness, and a record of what was put on it."""

    def __init__(self, random: Random, size: tuple[int, int]):
        self.random = random
        self.width, self.height = size
        self.columns, self.rows = size[0] // CELL, size[1] // CELL
        self.start()

    def start(self) -> None:
        """Take clean paper, of another tint and with another ink."""
        self.image = Image.new("RGB", (self.width, self.height), tuple(self.random.randint(225, 255) for _ in range(3)))
        self.pen = ImageDraw.Draw(self.image)
        self.ink = tuple(self.random.randint(0, 70) for _ in range(3))
        self.marks: list[Mark] = []

    def write(self, text: str, column: int, row: int, belongs: str, above: str | None = None) -> Box:
        """Set ``text``, one glyph per cell, and return its box."""
        x, y = column * CELL, row * CELL
        for i, character in enumerate(text):
            left = x + i * CELL + self.random.randint(0, CELL - WIDTH)
            top = y + self.random.randint(0, CELL - HEIGHT)
            bitmap = Image.fromarray(glyph(character).astype(np.uint8) * 255, "L")
            self.image.paste(self.ink, (left, top), bitmap)
            self.marks.append(Mark((x + i * CELL, y, x + (i + 1) * CELL, y + CELL), character, belongs, above))
        return x, y, x + len(text) * CELL, y + CELL

    def finish(self) -> Image.Image:
        """Add a little noise and hand the picture over."""
        noise = np.random.default_rng(self.random.getrandbits(32)).integers(-8, 9, (self.height, self.width, 3))
        return Image.fromarray((np.asarray(self.image) + noise).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class _Line:
    """One line of a receipt and where its label and its value stand."""

    label: str
    value: str
    label_box: Box
    value_box: Box


def _lines(canvas: Canvas) -> list[_Line]:
    """Five to eight lines ``ham 47`` at free places, two side by side where they fit."""
    random = canvas.random
    entry = 6  # cells: three letters, a space, two digits
    slots = [(row, start) for row in range(canvas.rows) for start in range(canvas.columns // entry)]
    count = random.randint(min(5, len(slots)), 8)
    slack = {row: random.randint(0, canvas.columns % entry) for row in range(canvas.rows)}
    lonely = {row: random.randint(0, canvas.columns - entry) for row in range(canvas.rows)}
    chosen = sorted(random.sample(slots, count))
    lines = []
    for (row, start), label in zip(chosen, random.sample(LABELS, count), strict=True):
        alone = sum(other == row for other, _ in chosen) == 1
        column = lonely[row] if alone else start * entry + slack[row]
        lines.append(_line(canvas, row, column, label))
    return lines


def _line(canvas: Canvas, row: int, column: int, label: str, above: str | None = None) -> _Line:
    value = str(canvas.random.randint(10, 99))
    label_box = canvas.write(label, column, row, label, above)
    return _Line(label, value, label_box, canvas.write(value, column + 4, row, label))


def _receipt(canvas: Canvas) -> list[Turn]:
    """The price of each item of a receipt."""
    turns = [Turn(f"what is the price of {line.label}?", line.value, line.value_box) for line in _lines(canvas)]
    canvas.random.shuffle(turns)
    return turns


def _above(canvas: Canvas) -> list[Turn]:
    """A list of four to seven lines at a free place; asked for is the price of the item one line above a named one."""
    random = canvas.random
    count = random.randint(4, min(7, canvas.rows))
    top, column = random.randint(0, canvas.rows - count), random.randint(0, canvas.columns - 6)
    lines, above = [], None
    for row, label in enumerate(random.sample(LABELS, count), top):
        lines.append(_line(canvas, row, column, label, above))
        above = label
    turns = [
        Turn(
            f"what is the price of the item above {line.label}?",
            over.value,
            over.value_box,
            (Look(line.label, line.label_box, over.label),),
        )
        for over, line in pairwise(lines)
    ]
    random.shuffle(turns)
    return turns


def _dearer(canvas: Canvas) -> list[Turn]:
    """Which of two items of a receipt is dearer? Their prices are 10 apart at least."""
    random = canvas.random
    lines = _lines(canvas)
    pairs = [(a, b) for a, b in permutations(lines, 2) if abs(int(a.value) - int(b.value)) >= 10]
    if not pairs:  # all prices within ten: start again on clean paper
        canvas.start()
        return _dearer(canvas)
    turns = []
    for a, b in random.sample(pairs, min(6, len(pairs))):
        best = max(a, b, key=lambda line: int(line.value))
        region = (best.label_box[0], best.label_box[1], best.value_box[2], best.value_box[3])
        looks = tuple(Look(line.label, line.value_box, line.value) for line in (a, b))
        turns.append(Turn(f"which is dearer, {a.label} or {b.label}?", best.label, region, looks))
    return turns


def _chart(canvas: Canvas) -> list[Turn]:
    """Four to six horizontal bars: label, value, then a bar as long as the value; the longest leads by a patch."""
    random = canvas.random
    count = random.randint(4, 6)
    rows = sorted(random.sample(range(canvas.rows), count))
    labels = random.sample(LABELS, count)
    values = random.sample(range(10, 82), count - 1)
    best = random.randint(max(values) + 18, 99)
    values.insert(random.randrange(count), best)
    origin = 6 * CELL
    fill = COLOURS[random.choice(list(COLOURS))]
    turns = []
    for row, label, value in zip(rows, labels, values, strict=True):
        canvas.write(label, 0, row, label)
        region = canvas.write(str(value), 4, row, label)
        end = origin + round(value / 100 * (canvas.width - origin))
        box = (origin, row * CELL + 1, end, row * CELL + CELL - 1)
        canvas.pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)
        canvas.marks.append(Mark(box, "bar", label))
        turns.append(Turn(f"what is the value of {label}?", str(value), region))
        if value == best:
            longest = Turn("which bar is the longest?", label, (0, row * CELL, end, (row + 1) * CELL))
    random.shuffle(turns)
    turns.insert(0 if random.random() < 0.5 else random.randint(1, count), longest)
    return turns


def scatter(canvas: Canvas) -> list[tuple[str, str, Box]]:
    """Three to six objects (colour, shape, box) of different looks, sizes and places, none overlapping."""
    random = canvas.random
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    spots = [(x, y) for y in range(0, canvas.height - 23, FIELD) for x in range(0, canvas.width - 23, FIELD)]
    count = random.randint(3, min(6, len(spots)))
    objects = []
    for (x, y), (colour, shape) in zip(sorted(random.sample(spots, count)), random.sample(looks, count), strict=True):
        side = random.randint(15, 23)
        left = x + random.randint(0, min(FIELD, canvas.width - x) - side)
        top = y + random.randint(0, min(FIELD, canvas.height - y) - side)
        box = (left, top, left + side, top + side)
        _shape(canvas.pen, shape, box, COLOURS[colour])
        canvas.marks.append(Mark(box, colour, shape))
        objects.append((colour, shape, box))
    return objects


def _shape(pen: ImageDraw.ImageDraw, shape: str, box: Box, fill: tuple[int, int, int]) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    third = (right - left) // 3
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=fill, width=4)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=fill)
    elif shape == "cross":
        pen.rectangle((left + third, top, right - third, bottom), fill=fill)
        pen.rectangle((left, top + third, right, bottom - third), fill=fill)


def _attribute(canvas: Canvas) -> list[Turn]:
    """The colour of the only object of a shape, the shape of the only object of a colour."""
    objects = scatter(canvas)
    colours, shapes = [c for c, _, _ in objects], [s for _, s, _ in objects]
    turns = []
    for colour, shape, box in objects:
        if shapes.count(shape) == 1:
            turns.append(Turn(f"what colour is the {shape}?", colour, box))
        if colours.count(colour) == 1:
            turns.append(Turn(f"what shape is the {colour} object?", shape, box))
    if not turns:  # three objects or more that pair up in colour and in shape: start again on clean paper
        canvas.start()
        return _attribute(canvas)
    canvas.random.shuffle(turns)
    return turns[:6]


def _presence(canvas: Canvas) -> list[Turn]:
    """Is there a red circle? Half yes; half of the noes have the colour and the shape, but on different objects."""
    random = canvas.random
    objects = scatter(canvas)
    there = {(colour, shape) for colour, shape, _ in objects}
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there]
    hard = [(c, s) for c, s in absent if any(c == x for x, _ in there) and any(s == y for _, y in there)]
    half = 3
    turns = [
        Turn(_is_there(colour, shape), "yes", box) for colour, shape, box in random.sample(objects, half)
    ]  # there are three objects at least
    for _ in range(half):
        colour, shape = random.choice(hard if hard and random.random() < 0.5 else absent)
        turns.append(Turn(_is_there(colour, shape), "no", None))
    random.shuffle(turns)
    return turns


def _is_there(colour: str, shape: str) -> str:
    return f"is there a {colour} {shape}?"


def field_of(box: Box) -> str:
    """The field that an object lies in: ``b3`` is in the second row, third from the left."""
    return f"{'abcdefghi'[box[1] // FIELD]}{box[0] // FIELD + 1}"


def _where(canvas: Canvas) -> list[Turn]:
    """Where is the red ring? The answer is its field of the grid."""
    turns = [Turn(f"where is the {colour} {shape}?", field_of(box), box) for colour, shape, box in scatter(canvas)]
    canvas.random.shuffle(turns)
    return turns
