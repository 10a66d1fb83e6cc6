"""What a run is trained on: its rows, the collator that makes batches of them, the order they come in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from accelerate import PartialState
from torch import isin
from torch import tensor as as_tensor
from torch.utils.data import Dataset, Sampler

from pmod_cli.core.errors import PmodError
from pmod_cli.data.check import DataReport, check_rows, refuse_bad
from pmod_cli.data.collator import Collator, ModalityBatches
from pmod_cli.data.dataset import build_dataset
from pmod_cli.data.documents import seed_of
from pmod_cli.data.pictures import padding_processor
from pmod_cli.data.rows import row
from pmod_cli.data.several import document_of
from pmod_cli.training.answers import POSITIONS, positions
from pmod_cli.training.folder import SKIPPED
from pmod_cli.training.run_settings import DataArgs, Settings, processes
from pmod_cli.training.start import processor_of

if TYPE_CHECKING:
    from transformers import ProcessorMixin

COUNTS = "counts"  # in a batch: its `Counts`


class Counts(NamedTuple):
    """Of one batch: tokens without padding, and the vision tokens of each row.

    Counted where it is made, so that nobody has to ask the device.
    """

    tokens: int
    vision: tuple[int, ...]


class Counting:
    """A collator that also counts.

    Args:
        collate: makes a batch with ``input_ids``, ``labels`` and ``attention_mask`` of rows.
        processor: of the model.
        vision_tokens: ids of the tokens of images and videos.
    """

    def __init__(
        self, collate: Callable[[Sequence], dict], processor: "ProcessorMixin", vision_tokens: Sequence[int]
    ) -> None:
        self.collate, self.processor, self.vision_tokens = collate, processor, as_tensor(list(vision_tokens))

    def __call__(self, rows: Sequence) -> dict:
        """The batch, with ``COUNTS`` and ``POSITIONS``."""
        batch = self.collate(rows)
        vision = isin(batch["input_ids"], self.vision_tokens).sum(dim=1).tolist()
        counts = Counts(int(batch["attention_mask"].sum()), tuple(vision))
        return {**batch, COUNTS: counts, POSITIONS: positions(batch["labels"])}


@dataclass
class Data:
    """What a run reads.

    Attributes:
        rows: the data set.
        collate: makes a batch of its rows.
        processor: what reads the pictures, to be saved with the model: LLaVA-1.5's pads them to a square.
        sampler: the order of the rows; None is a shuffle.
        longest: tokens of the longest row that was looked at; 0 where none was.
    """

    rows: Dataset
    collate: Callable[[Sequence], dict]
    processor: "ProcessorMixin"
    sampler: Sampler | None = None
    longest: int = 0

    @property
    def rows_per_epoch(self) -> int:
        """As the sampler gives them."""
        return len(self.rows if self.sampler is None else self.sampler)


def open_data(settings: Settings, processor: "ProcessorMixin", out: Path) -> Data:
    """The data of a run.

    Args:
        settings: ``data`` says which.
        out: the run folder, where rows that are left out are listed.

    Raises:
        PmodError: the data cannot be found or read, bad rows in a sample of it, synthetic documents without a number.
    """
    processor = padding_processor(processor)
    if settings.data.kind == "synthetic":
        return Data(SyntheticDocuments(settings.data, _images(settings)), Collator(processor), processor)
    rows = build_dataset(settings.data, processor, skipped=out / SKIPPED)
    sampler, longest = None, 0
    if PartialState().is_main_process:
        report = check_rows(rows)
        refuse_bad(report, skip=settings.data.on_bad_row == "skip")
        longest = report.longest_after(settings.data.max_length)
    if settings.data.group_by_modality:
        train, batches = settings.train, settings.accumulation(processes()) * processes()
        sampler = ModalityBatches(rows.lengths, train.batch_size, batches, train.seed)
    return Data(rows, Collator(processor), processor, sampler, longest)


def beyond_context(longest: int, context: int | None) -> str | None:
    """That the longest row has more tokens than the decoder was made for, which is trained all the same; or None."""
    if context is None or longest <= context:
        return None
    return (
        f"the longest row has {longest:,} tokens, and the decoder was made for {context:,}: "
        f"`data.max_length={context}` cuts what is longer"
    )


def check_all(settings: Settings) -> DataReport:
    """Look at every row of a recipe's data.

    Raises:
        PmodError: the data cannot be read; they are synthetic, and drawn as they should be.
    """
    if settings.data.kind == "synthetic":
        raise PmodError("data.kind: synthetic documents are drawn, there is nothing to check")
    return check_rows(build_dataset(settings.data, processor_of(settings)), sample=None)


def _images(settings: Settings) -> int:
    """Different images of the run: as many as it was told, else as it uses."""
    return settings.data.rows or (settings.train.max_steps or 0) * settings.rows_per_step(processes())


class SyntheticDocuments(Dataset):
    """Rows ``{"images": [image], "messages": [...]}``, each drawn when it is asked for, the same at every time.

    Args:
        data: which tasks, how many questions an image, and the first index in the train split.
        images: number of rows; the tasks take turns.
    """

    def __init__(self, data: DataArgs, images: int) -> None:
        self.data, self.images = data, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict:
        seed = seed_of("train", self.data.first + index)
        document = document_of(self.data.tasks[index % len(self.data.tasks)], seed)
        asked = len(document.turns) if self.data.turns is None else min(self.data.turns, len(document.turns))
        return row(document, Random(seed).sample(document.turns, asked))
