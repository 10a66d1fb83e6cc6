"""The data sets behind the paper's benchmarks: their place, rows and size, and the columns that lmms-eval reads."""

from __future__ import annotations

from dataclasses import dataclass

OWNER = "lmms-lab-encoder"  # who keeps the data sets of lmms-eval 0.7.3 on the hub


@dataclass(frozen=True)
class Source:
    """One split of one data set.

    Attributes:
        repository: Name on the hub, and folder in a mirror: `owner/name`.
        configuration: Of a repository that holds several data sets; empty where it holds one.
        split: The rows that are asked.
        rows: Their number on the hub; None where it is not known.
        megabytes: About what the files of the split take (10^6 bytes), from the hub's file lists; None: not known.
        columns: What lmms-eval reads of a row.
    """

    repository: str
    configuration: str = ""
    split: str = "test"
    rows: int | None = None
    megabytes: float | None = None
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.repository, self.configuration, self.split)))


def _source(name: str, configuration: str, split: str, rows: int, megabytes: float, columns: str) -> Source:
    return Source(f"{OWNER}/{name}", configuration, split, rows, megabytes, tuple(columns.split()))


_CHOICES = "choice_a choice_b choice_c choice_d"
_IMAGES = "image_1 image_2 image_3 image_4 image_5 image_6 image_7"
_MMBENCH = "image index question hint A B C D answer category L2-category source split"
_POPE = "image question answer question_id"
_DOCUMENT = "image question answers questionId"

SEED = (_source("SEED-Bench", "", "test", 17990, 27_200, f"image question {_CHOICES} answer data_type question_id"),)
RWQA = (_source("RealWorldQA", "", "test", 765, 678, "image question answer"),)
MME = (_source("MME", "", "test", 2374, 865, "image question answer question_id category"),)
MMB = (_source("MMBench", "en", "dev", 4329, 103, _MMBENCH),)
POPE = (
    _source("POPE", "Full", "adversarial", 3000, 85, _POPE),
    _source("POPE", "Full", "popular", 3000, 85, _POPE),
    _source("POPE", "Full", "random", 2910, 85, _POPE),
)
# The questions and the pictures of GQA are two data sets, joined by `imageId`.
GQA = (
    _source("GQA", "testdev_balanced_instructions", "testdev", 12578, 2.1, "imageId question answer"),
    _source("GQA", "testdev_balanced_images", "testdev", 398, 66, "id image"),
)
AI2D = (_source("ai2d", "", "test", 3088, 139, "image question options answer"),)
DOCVQA = (_source("DocVQA", "DocVQA", "validation", 5349, 2_300, _DOCUMENT),)
CHARTQA = (_source("ChartQA", "", "test", 2500, 73, "image question answer type"),)
TEXTVQA = (_source("textvqa", "", "validation", 5000, 920, "image question answers question_id"),)
INFOVQA = (_source("DocVQA", "InfographicVQA", "validation", 2801, 310, _DOCUMENT),)
OKVQA = (_source("OK-VQA", "", "val2014", 5046, 831, "image question answers question_id"),)
MMMU = (_source("MMMU", "", "validation", 900, 341, f"id question options answer question_type {_IMAGES}"),)
SQA = (_source("ScienceQA", "ScienceQA-IMG", "test", 2017, 130, "image question choices answer hint"),)
