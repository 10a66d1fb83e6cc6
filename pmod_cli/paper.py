"""The numbers that the paper printed (p-MoD, arXiv 2412.04449v1), by name, with the table they stand in.

They are shown beside a measured or counted number. Nothing is computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TEXT_TOKENS = 58  # of the prompt whose TFLOPs are in Table 1
MME_IN_AVERAGE = 1 / 20  # MME's points are divided by 20 before Table 1 averages them
VICUNA_7B = {  # the decoder of both models, as its config.json says
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
TABLE_1, TABLE_2 = "Table 1", "Table 2"
_COLUMNS = {  # of each table: name of the benchmark -> what to call it in words
    TABLE_1: {
        "seed": "SEED",
        "rwqa": "RealWorldQA",
        "mme": "MME",
        "mmb": "MMBench",
        "pope": "POPE",
        "gqa": "GQA",
        "ai2d": "AI2D",
    },
    TABLE_2: {
        "docvqa": "DocVQA",
        "chartqa": "ChartQA",
        "textvqa": "TextVQA",
        "infovqa": "InfoVQA",
        "okvqa": "OK-VQA",
        "mmmu": "MMMU",
        "sqa": "ScienceQA",
    },
}
BENCHMARKS = {name: words for columns in _COLUMNS.values() for name, words in columns.items()}


@dataclass(frozen=True)
class Pair:
    """One number, printed for a stock model and for its p-MoD.

    Attributes:
        stock: Of the stock model (the paper's baseline).
        pmod: Of its p-MoD, trained on the same rows.
        where: The table.
    """

    stock: float
    pmod: float
    where: str


@dataclass(frozen=True)
class Model:
    """A stock model of the paper and its p-MoD.

    Attributes:
        name: The paper's name of the stock model.
        repository: Name of the published p-MoD on the hub, without its owner.
        vision_tokens: V of the prompt whose TFLOPs were counted.
        tflops: Prefill, 10^12 floating-point operations.
        kv_percent: KV cache of the vision tokens, percent of the stock model's.
        scores: By benchmark, in percent; MME in its own points.
        averages: By group of benchmarks, in percent.
    """

    name: str
    repository: str
    vision_tokens: int
    tflops: Pair
    kv_percent: Pair
    scores: Mapping[str, Pair]
    averages: Mapping[str, Pair]

    def score_of(self, name: str) -> Pair | None:
        """The scores of a benchmark, or the averages of a group; None where the paper has neither."""
        return self.averages.get(name) or self.scores.get(name)


def _scores(table: str, stock: str, pmod: str) -> dict[str, Pair]:
    """Two rows of a table, as they are printed: one score a column."""
    rows = zip(_COLUMNS[table], map(float, stock.split()), map(float, pmod.split()), strict=True)
    return {name: Pair(of_stock, of_pmod, table) for name, of_stock, of_pmod in rows}


MODELS = {  # by the model type of the stock model
    "llava": Model(
        name="LLaVA-1.5 7B",
        repository="p-MoD-LLaVA-v1.5-7B",
        vision_tokens=576,
        tflops=Pair(8.38, 4.92, TABLE_1),
        kv_percent=Pair(100.0, 53.8, TABLE_1),
        scores=_scores(TABLE_1, "66.2 55.6 1506.8 64.1 85.9 61.9 55.2", "66.5 55.7 1482.8 65.4 85.5 62.2 56.2")
        | _scores(TABLE_2, "28.1 18.2 46.0 25.8 53.4 36.6 69.7", "27.6 16.8 44.8 26.8 56.0 36.3 69.3"),
        averages={"general": Pair(66.3, 66.5, TABLE_1), "text-rich": Pair(39.7, 39.7, TABLE_2)},
    ),
    "llava_next": Model(
        name="LLaVA-NeXT 7B",
        repository="p-MoD-LLaVA-NeXT-7B",
        vision_tokens=2928,
        tflops=Pair(39.46, 21.94, TABLE_1),
        kv_percent=Pair(100.0, 53.8, TABLE_1),
        scores=_scores(TABLE_1, "68.9 57.6 1519.3 67.5 87.2 63.5 64.0", "69.0 57.6 1495.5 67.3 86.8 63.3 65.1")
        | _scores(TABLE_2, "70.1 61.6 62.7 34.7 54.0 35.3 69.7", "70.0 61.8 60.5 34.1 55.1 36.0 71.0"),
        averages={"general": Pair(69.2, 69.1, TABLE_1), "text-rich": Pair(55.5, 55.5, TABLE_2)},
    ),
}
