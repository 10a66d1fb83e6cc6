"""The scores that the paper printed, to stand beside measured ones. Never used to compute anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pmod_cli.evaluation.suite import PAPER

MME_IN_AVERAGE = 1 / 20  # MME's points are divided by 20 before the paper averages them


@dataclass(frozen=True)
class Published:
    """Two rows of the paper's tables (7B models over Vicuna), by the names of the benchmarks.

    Attributes:
        name: What the paper calls the baseline; its p-MoD was trained on the same rows.
        baseline: Scores of the plain model.
        pmod: Scores of its p-MoD.
        averages: By group, the printed averages of the two.
    """

    name: str
    baseline: dict[str, float]
    pmod: dict[str, float]
    averages: dict[str, tuple[float, float]]


def _rows(name: str, baseline: str, pmod: str, averages: dict[str, tuple[float, float]]) -> Published:
    """Scores in the order of the paper's columns, which is that of the suite."""
    names = [benchmark.name for benchmark in PAPER]
    scores = [dict(zip(names, map(float, row.split()), strict=True)) for row in (baseline, pmod)]
    return Published(name, *scores, averages)


PUBLISHED = {
    "llava": _rows(
        "LLaVA-1.5 7B",
        "66.2 55.6 1506.8 64.1 85.9 61.9 55.2  28.1 18.2 46.0 25.8 53.4 36.6 69.7",
        "66.5 55.7 1482.8 65.4 85.5 62.2 56.2  27.6 16.8 44.8 26.8 56.0 36.3 69.3",
        {"general": (66.3, 66.5), "text-rich": (39.7, 39.7)},
    ),
    "llava_next": _rows(
        "LLaVA-NeXT 7B",
        "68.9 57.6 1519.3 67.5 87.2 63.5 64.0  70.1 61.6 62.7 34.7 54.0 35.3 69.7",
        "69.0 57.6 1495.5 67.3 86.8 63.3 65.1  70.0 61.8 60.5 34.1 55.1 36.0 71.0",
        {"general": (69.2, 69.1), "text-rich": (55.5, 55.5)},
    ),
}
VICUNA_7B = {"layers": 32, "hidden_size": 4096, "decoder": "llama"}


def beside(score: float | None, name: str, model: dict[str, Any]) -> dict[str, Any] | None:
    """The paper's two numbers for a benchmark or a group of benchmarks, and how far a measured one is from its own.

    Args:
        score: The measured number.
        name: Of a benchmark of the paper, or of a group, for its average.
        model: What the model is: a p-MoD is compared with the paper's p-MoD, a plain one with the baseline.

    Returns:
        None where the paper has no such number.
    """
    published = PUBLISHED.get(str(model.get("model_type", "")).removeprefix("pmod_"))
    if published is None:
        return None
    if name in published.averages:
        baseline, pmod = published.averages[name]
    elif name in published.baseline:
        baseline, pmod = published.baseline[name], published.pmod[name]
    else:
        return None
    own = baseline if model.get("routers") == "stock" else pmod
    return {"baseline": baseline, "pmod": pmod, "difference": None if score is None else score - own}


def is_the_papers(model: dict[str, Any]) -> bool:
    """Has the model the size and decoder of the paper's?"""
    return all(model.get(key) == value for key, value in VICUNA_7B.items())
