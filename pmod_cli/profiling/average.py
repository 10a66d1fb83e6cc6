"""The average cost over the rows of a real data set, by formulas. Of an image only the header is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import image_size
from pmod_cli.core.text import GIGA, MIB, TERA, percent
from pmod_cli.core.videos import Frames
from pmod_cli.data.conversation import IMAGE, VIDEO, BadRow, Conversation
from pmod_cli.data.pictures import find_image, open_video
from pmod_cli.data.sources import LlavaFile
from pmod_cli.families.sizes import Sizes, image_tokens, video_tokens
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.memory import kv_bytes
from pmod_cli.profiling.count.training import TrainingSetup, training_flops
from pmod_cli.profiling.count.workload import Routed, Row
from pmod_cli.profiling.subject import Subject
from pmod_cli.reporting import plain_table


@dataclass(frozen=True)
class Average:
    """Means over the rows, each row by itself, without padding.

    Args:
        rows: How many there were.
        with_image: How many have images or videos.
        vision_tokens: V: mean, median and largest.
        text_tokens: The same.
        tiles: Mean passes through the vision tower.
        stock_flops: Mean FLOPs of a prefill, convention `full`.
        pmod_flops: The same.
        stock_paper_flops: Convention `paper`.
        pmod_paper_flops: The same.
        stock_step_flops: Mean FLOPs of a training step's forward and backward pass.
        pmod_step_flops: The same.
        stock_kv: Mean bytes of the KV cache after the prefill.
        pmod_kv: The same.
    """

    rows: int
    with_image: int
    vision_tokens: tuple[float, float, int]
    text_tokens: tuple[float, float, int]
    tiles: float
    stock_flops: float
    pmod_flops: float
    stock_paper_flops: float
    pmod_paper_flops: float
    stock_step_flops: float
    pmod_step_flops: float
    stock_kv: float
    pmod_kv: float


def read_rows(
    file: Path, images: Path | None, sizes: Sizes, count_text: Callable[[str], int], limit: int | None = None
) -> list[Row]:
    """The rows of a LLaVA JSON or JSONL file.

    Args:
        images: Folder that image names start from; the file's own if None.
        sizes: The model that would see them.
        count_text: Text tokens of a conversation, image marks left out.
        limit: First rows only.

    Raises:
        PmodError: No such file, a row that cannot be understood, or an image that is not there: with the row's number.
    """
    source = LlavaFile(file, images)
    frames = Frames(exact=not hasattr(sizes.tower, "temporal"))  # as training takes them; what is no grid is a tile
    rows, seen = [], {}
    for number in range(len(source) if limit is None else min(limit, len(source))):
        try:
            conversation = source[number]
            for name in conversation.images:
                if not isinstance(name, str | bytes):
                    raise BadRow(f"expected a file name, found {type(name).__name__}")
                if name not in seen:
                    seen[name] = _size(name, source.images)
            count = len(conversation.images)
            cut = [image_tokens(sizes, seen[name], count) for name in conversation.images]
            between = 0
            for name in conversation.videos:
                if sizes.family.video_tokens is None:
                    raise BadRow(f"it has a video, and {sizes.family.title} takes images alone")
                video = open_video(name, source.images, frames)
                cut.append(video_tokens(sizes, video.size))
                between += sizes.family.frame_text(video.size[0], video.per_second)
        except PmodError as error:  # a row that cannot be read, or a picture that the processor refuses
            raise PmodError(f"{file}, row {number}: {error.what}", hint="mend or remove the row") from error
        rows.append(Row(tuple(cut), count_text(_text(conversation)) + between))
    if not rows:
        raise PmodError(f"{file} has no rows", hint="expected a JSON array or JSON lines in LLaVA's layout")
    return rows


def average(sizes: Sizes, rows: Sequence[Row], routed: Routed, dtype: str) -> Average:
    """Count every row by itself and take means. Rows of equal sizes are counted once.

    Args:
        rows: As `read_rows` gives them.
    """
    counted: dict[Row, tuple[int, ...]] = {}
    setup, models = TrainingSetup(), (Routed.stock(sizes.decoder.layers), routed)
    for row in rows:
        if row not in counted:
            both = []
            for which in models:
                prefill, step = formulas.prefill(sizes, [row], which), training_flops(sizes, [row], setup, which).step
                both.append((prefill.full, prefill.paper, step, kv_bytes(sizes, [row], dtype, routed=which)))
            counted[row] = tuple(number for pair in zip(*both, strict=True) for number in pair)
    means = [sum(column) / len(rows) for column in zip(*(counted[row] for row in rows), strict=True)]

    def spread(numbers: list[int]) -> tuple[float, float, int]:
        return sum(numbers) / len(numbers), statistics.median(numbers), max(numbers)

    return Average(
        len(rows),
        sum(bool(row.images) for row in rows),
        spread([row.vision_tokens for row in rows]),
        spread([row.text_tokens for row in rows]),
        sum(row.tiles for row in rows) / len(rows),
        *means,
    )


def tokenizer_of(subject: Subject) -> Callable[[str], int]:
    """Counts text with the tokenizer beside the model's configuration.

    Raises:
        PmodError: There is none, as with a built-in configuration.
    """
    folder = Path(subject.source).parent
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise PmodError(
            f"{subject.name} has no tokenizer here to count text with ({subject.source})",
            hint="`text_tokens=200` gives every row as many, or `model` names a checkpoint folder",
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer(text)["input_ids"])


def _size(image: str | bytes, folder: Path) -> tuple[int, int]:
    """Width and height in pixels of the image as training would open it, from the header: nothing is decoded."""
    try:
        if isinstance(image, bytes):
            return image_size(image, "its image")
        return image_size(find_image(image, folder), image)
    except BadRow:
        raise
    except PmodError as error:
        raise BadRow(error.what) from None


def _text(conversation: Conversation) -> str:
    return "\n".join(turn.text.replace(IMAGE, "").replace(VIDEO, "") for turn in conversation.turns)


def average_tables(average: Average) -> list[Table]:
    """What the rows are like, and what a row costs on average."""
    seen = plain_table(f"{average.rows:,} rows, {average.with_image:,} with images", "a row", "mean", "median", "most")
    for name, (mean, median, most) in (("vision tokens", average.vision_tokens), ("text tokens", average.text_tokens)):
        seen.add_row(name, f"{mean:,.1f}", f"{median:,.1f}", f"{most:,}")
    seen.add_row("tiles", f"{average.tiles:.2f}", "", "")
    cost = plain_table("Mean of a row by itself", "", "stock", "p-MoD", "of stock")
    for name, kind, unit in (
        ("prefill, full convention, TFLOPs", "flops", TERA),
        ("prefill, paper convention, TFLOPs", "paper_flops", TERA),
        ("training step, TFLOPs", "step_flops", TERA),
        ("KV cache after the prefill, MiB", "kv", MIB),
    ):
        stock, pmod = (getattr(average, f"{which}_{kind}") for which in ("stock", "pmod"))
        if unit is TERA and stock < TERA:
            name, unit = name.replace("TFLOPs", "GFLOPs"), GIGA
        cost.add_row(name, f"{stock / unit:,.3f}", f"{pmod / unit:,.3f}", f"{percent(pmod, stock):.1f} %")
    return [seen, cost]


def average_json(average: Average) -> dict[str, Any]:
    """The average, units in the keys."""
    values = asdict(average)
    named = {key: values.pop(key) for key in ("rows", "with_image")}
    for key in ("vision_tokens", "text_tokens"):
        mean, median, most = values.pop(key)
        named[key] = {"mean": mean, "median": median, "most": most}
    named["mean_tiles"] = values.pop("tiles")
    return named | {
        f"mean_{key}_bytes" if key.endswith("kv") else f"mean_{key}": value for key, value in values.items()
    }
