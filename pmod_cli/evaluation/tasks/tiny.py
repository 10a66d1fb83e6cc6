"""The tiny tasks as lmms-eval tasks: their data comes from `pmod_cli.data`, their metrics from their big siblings."""

from __future__ import annotations

import numpy as np
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks.chartqa.utils import relaxed_correctness

from pmod_cli.core.videos import Video
from pmod_cli.data.several import PER_SECOND
from pmod_cli.evaluation import tiny_data


class TinyTask(ConfigurableTask):
    """An lmms-eval task whose data set is drawn instead of downloaded."""

    def __init__(self, config: dict) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """Load the drawn data set; the base class reads it through `load_from_disk`."""
        self.DATASET_PATH = str(tiny_data.folder(self.config.task.removeprefix("tiny_")))
        super().download({"load_from_disk": True})


def visual(doc: dict) -> list:
    """The image of a document, as every task of the suite gives it; or its pictures, which stand in it side by side."""
    image = doc["image"].convert("RGB")
    width = image.width // doc["pictures"]
    return [image.crop((left, 0, left + width, image.height)) for left in range(0, image.width, width)]


def film(doc: dict) -> list:
    """The film of a document."""
    return [Video(np.stack([np.asarray(frame) for frame in visual(doc)]), PER_SECOND)]


def relaxed(doc: dict, results: list[str]) -> dict[str, float]:
    """ChartQA's relaxed accuracy: numbers within 5 %, other answers exact."""
    return {"relaxed_overall": float(relaxed_correctness(results[0], doc["answer"]))}
