"""One profile: a stock model and its p-MoD on the same batch, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pmod_cli import paper
from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.memory import DTYPE_BYTES, KvCost, kv_cache
from pmod_cli.profiling.count.trace import DecoderCost, VisionCost, decoder_cost, meta_model, vision_cost
from pmod_cli.profiling.count.training import TrainingFlops, TrainingSetup, training_flops
from pmod_cli.profiling.count.workload import Routed, Row, Workload
from pmod_cli.profiling.subject import Subject

CONVENTIONS = {
    "paper": "decoder layers and lm_head on every position, without attention products and vision tower",
    "full": "paper, with attention products (scores and weighted values, full square), selection, tower and projector",
    "generate": "full, with lm_head on the last position alone, as generate computes it",
}


@dataclass(frozen=True)
class Profile:
    """Everything that was counted, in FLOPs and bytes.

    Args:
        subject: The two configurations.
        workload: The batch, as it was asked for.
        sizes: Of the model, as formulas need them.
        rows: Its rows, length B.
        dtype: Dtype of the KV cache.
        stock: The stock decoder's prefill.
        pmod: The p-MoD decoder's prefill.
        vision: Vision tower and projector, the same for both.
        stock_kv: KV cache per layer after the prefill and the new tokens, stock.
        pmod_kv: The same for p-MoD.
        published: The paper's row for this case, if it has one.
    """

    subject: Subject
    workload: Workload
    sizes: Sizes
    rows: list[Row]
    dtype: str
    stock: DecoderCost
    pmod: DecoderCost
    vision: VisionCost
    stock_kv: list[KvCost]
    pmod_kv: list[KvCost]
    published: paper.Model | None

    def total(self, cost: DecoderCost, convention: str) -> int:
        """FLOPs of a prefill under one of `CONVENTIONS`."""
        if convention == "paper":
            return cost.matrix + cost.lm_head
        seen = cost.total + self.vision.total
        return seen if convention == "full" else seen - cost.lm_head + self.last_logits(cost)

    def totals(self, convention: str) -> tuple[int, int]:
        """The same, stock and p-MoD."""
        return self.total(self.stock, convention), self.total(self.pmod, convention)

    def last_logits(self, cost: DecoderCost) -> int:
        """FLOPs of lm_head on the last position of each row."""
        return cost.lm_head // self.longest.tokens

    def generation(self, cost: DecoderCost) -> int:
        """FLOPs of all new tokens together."""
        return sum(cost.decode(step) for step in range(1, self.workload.new_tokens + 1))

    @property
    def mean_retention(self) -> float:
        """Share of the routed vision tokens that a layer processes, mean over the layers."""
        return self.routed.mean_retention

    @property
    def unknown_operators(self) -> Counter[str]:
        """Operators that nobody counted; empty unless a library changed."""
        return self.stock.unknown_operators + self.pmod.unknown_operators + self.vision.unknown_operators

    def training(self, *, checkpointing: bool = False) -> tuple[TrainingFlops, TrainingFlops]:
        """A training step on this batch, stock and p-MoD: all but the vision tower is trained, as in the paper."""
        setup = TrainingSetup(checkpointing=checkpointing)
        stock, pmod = (training_flops(self.sizes, self.rows, setup, routed) for routed in (None, self.routed))
        return stock, pmod

    @property
    def routed(self) -> Routed:
        """What the p-MoD changes."""
        return Routed.of(self.subject.pmod)

    @property
    def longest(self) -> Row:
        """The row to whose length the batch is padded."""
        return max(self.rows, key=lambda row: row.tokens)

    def formula(self, *, pmod: bool) -> formulas.Prefill:
        """The prefill of one of the two by the formula, without tracing anything."""
        return formulas.prefill(self.sizes, self.rows, self.routed if pmod else None)

    @property
    def headline(self) -> str:
        """What was profiled, in one line."""
        rows, longest = len(self.rows), self.longest
        shown = [[image for image in row.images if not image.video] for row in self.rows]
        parts = []
        if any(shown):
            kinds = dict.fromkeys(f"{images[0].width}x{images[0].height}" for images in shown if images)
            number = f"{self.workload.images} images" if self.workload.images > 1 else "one image"
            tiles = ", ".join(dict.fromkeys(str(sum(image.tiles for image in images)) for images in shown))
            cut = f" in {tiles} tile(s)" if self.sizes.family.tiled else ""
            parts.append(f"{number} of {' or '.join(kinds)} pixels{cut}")
        parts += [f"a video of {frames} frames of {wide}x{high} pixels" for frames, wide, high in self.workload.videos]
        batch = f"{rows} rows, each " if rows > 1 else ""
        padded = ", padded to the longest" if any(row.tokens < longest.tokens for row in self.rows) else ""
        return (
            f"{self.subject.name}: {batch}{', '.join(parts)}, "
            f"{longest.vision_tokens} vision + {longest.text_tokens} text tokens{padded}"
        )


def profile(subject: Subject, workload: Workload, *, dtype: str = "auto") -> Profile:
    """Count a stock model and its p-MoD on one batch, without weights.

    Args:
        dtype: Dtype of the KV cache; auto is the checkpoint's own.

    Raises:
        PmodError: the prompt is longer than the model's context, or the model's decoder or vision tower is unknown.
    """
    stock, pmod = subject.stock, subject.pmod
    sizes = subject.sizes
    rows = workload.rows(sizes)
    longest = max(rows, key=lambda row: row.tokens)
    context = sizes.decoder.context
    if longest.tokens + workload.new_tokens > context:
        raise PmodError(
            f"the prompt does not fit: {longest.vision_tokens} vision + {longest.text_tokens} text + "
            f"{workload.new_tokens} new tokens, and the context of {subject.name} is {context}",
            hint="lower `text_tokens`, `new_tokens`, `images` or `image_size`",
        )
    try:
        stock_model, pmod_model = meta_model(stock), meta_model(pmod)
    except ValueError as error:
        raise PmodError(f"{subject.name}: {error}", hint="pmod profile --model llava-next-7b") from error
    stock_cost = decoder_cost(stock_model, rows, Routed.stock(sizes.decoder.layers))
    pmod_cost = decoder_cost(pmod_model, rows, Routed.of(pmod))
    dtype = cache_dtype(stock) if dtype == "auto" else dtype
    prompt = (longest.text_tokens, workload.new_tokens, len(rows))
    stock_kv, pmod_kv = (
        kv_cache(sizes.decoder, dtype, [layer.cached for layer in cost.layers], *prompt)
        for cost in (stock_cost, pmod_cost)
    )
    return Profile(
        subject=subject,
        workload=workload,
        sizes=sizes,
        rows=rows,
        dtype=dtype,
        stock=stock_cost,
        pmod=pmod_cost,
        vision=vision_cost(stock_model, rows),
        stock_kv=stock_kv,
        pmod_kv=pmod_kv,
        published=printed_case(subject, workload),
    )


def cache_dtype(config: Any) -> str:
    """The checkpoint's dtype by name; bfloat16 where it names none that a cache is kept in."""
    name = str(config.dtype or config.text_config.dtype).removeprefix("torch.")
    return name if name in DTYPE_BYTES else "bfloat16"


def printed_case(subject: Subject, workload: Workload) -> paper.Model | None:
    """The paper's model whose printed numbers are of this very case: model, prompt and what its layers keep; else None.

    Norm, alpha and STRing may differ: they cost the same.
    """
    stock, settings, own = subject.stock, subject.pmod.settings, PmodSettings()
    model, rows = paper.MODELS.get(stock.model_type), workload.rows(subject.sizes)
    prompts = [(len(row.images), row.vision_tokens, row.text_tokens) for row in rows]
    if model is None or prompts != [(1, model.vision_tokens, paper.TEXT_TOKENS)]:
        return None
    if any(getattr(stock.text_config, key, None) != value for key, value in paper.VICUNA_7B.items()):
        return None
    layers = stock.text_config.num_hidden_layers
    same = settings.selection == own.selection and Routed.by(settings, layers) == Routed.by(own, layers)
    return model if same else None
