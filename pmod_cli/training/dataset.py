"""The synthetic documents as a data set of conversation rows."""

from random import Random

from torch.utils.data import Dataset

from pmod_cli.data.documents import draw, seed_of
from pmod_cli.data.rows import row
from pmod_cli.training.settings import DataArgs


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
        document = draw(self.data.tasks[index % len(self.data.tasks)], seed)
        asked = len(document.turns) if self.data.turns is None else min(self.data.turns, len(document.turns))
        return row(document, Random(seed).sample(document.turns, asked))
