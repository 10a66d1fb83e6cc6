"""One profile: a stock model and its p-MoD on the same prompt, and its JSON form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pmod_cli.errors import PmodError
from pmod_cli.profiling import closed
from pmod_cli.profiling.cost import DecoderCost, VisionCost, decoder_cost, meta_model, vision_cost
from pmod_cli.profiling.kv_cache import DTYPE_BYTES, KvCost, kv_cache
from pmod_cli.profiling.published import Published, published_for
from pmod_cli.profiling.subject import Subject
from pmod_cli.profiling.workload import ImageTokens, Workload, image_tokens

SCHEMA_VERSION = 1
MEGA, GIGA, TERA = 10**6, 10**9, 10**12
MIB = 2**20

CONVENTIONS = {
    "paper": "decoder layers and lm_head on every position, without attention products and vision tower",
    "full": "paper, with attention products (scores and weighted values, full square), vision tower and projector",
}


@dataclass(frozen=True)
class Profile:
    """Everything that was counted, in FLOPs and bytes.

    Args:
        subject: The two configurations.
        workload: The prompt.
        image: How its image is cut.
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
    image: ImageTokens
    dtype: str
    stock: DecoderCost
    pmod: DecoderCost
    vision: VisionCost
    stock_kv: list[KvCost]
    pmod_kv: list[KvCost]
    published: Published | None

    def total(self, cost: DecoderCost, convention: str) -> int:
        """FLOPs of a prefill under one of `CONVENTIONS`."""
        if convention == "paper":
            return cost.matrix + cost.lm_head
        return cost.total + self.vision.tower + self.vision.projector

    def totals(self, convention: str) -> tuple[int, int]:
        """The same, stock and p-MoD."""
        return self.total(self.stock, convention), self.total(self.pmod, convention)

    def generation(self, cost: DecoderCost) -> int:
        """FLOPs of all new tokens together."""
        return sum(cost.decode(step) for step in range(1, self.workload.new_tokens + 1))

    @property
    def mean_retention(self) -> float:
        return sum(layer.retention for layer in self.pmod.layers) / len(self.pmod.layers)

    @property
    def unknown_operators(self) -> Counter[str]:
        """Operators that nobody counted; empty unless a library changed."""
        return self.stock.unknown_operators + self.pmod.unknown_operators + self.vision.unknown_operators

    def formula(self, cost: DecoderCost) -> int:
        """FLOPs of the decoder and lm_head by the closed formula."""
        positions = self.image.tokens + self.workload.text_tokens
        return closed.decoder_flops(
            self.subject.stock.text_config,
            [layer.tokens for layer in cost.layers],
            [layer.router_tokens for layer in cost.layers],
            positions,
        )


def profile(subject: Subject, workload: Workload, *, dtype: str = "auto") -> Profile:
    """Count a stock model and its p-MoD on one prompt, without weights.

    Args:
        subject: The two configurations.
        workload: The prompt.
        dtype: Dtype of the KV cache; auto is the checkpoint's own.

    Raises:
        PmodError: the prompt is longer than the model's context, or the model's decoder or vision tower is unknown.
    """
    stock, pmod = subject.stock, subject.pmod
    image = image_tokens(stock, workload.image_size)
    positions = image.tokens + workload.text_tokens
    context = stock.text_config.max_position_embeddings
    if positions + workload.new_tokens > context:
        raise PmodError(
            f"the prompt does not fit: {image.tokens} vision + {workload.text_tokens} text + {workload.new_tokens} new "
            f"tokens, and the context of {subject.name} is {context}",
            hint="lower --text-tokens, --new-tokens or --image-size",
        )
    routable = image.high_resolution if pmod.settings.target_tokens == "vision_hr" else image.tokens
    try:
        stock_model, pmod_model = meta_model(stock), meta_model(pmod)
    except ValueError as error:
        raise PmodError(f"{subject.name}: {error}", hint="pmod profile --model llava-next-7b") from error
    plain = [1.0] * len(pmod.retention)
    stock_cost = decoder_cost(stock_model, image, workload.text_tokens, routable, plain)
    pmod_cost = decoder_cost(pmod_model, image, workload.text_tokens, routable, pmod.retention)
    dtype = _cache_dtype(stock) if dtype == "auto" else dtype
    text = workload.text_tokens + workload.new_tokens
    return Profile(
        subject=subject,
        workload=workload,
        image=image,
        dtype=dtype,
        stock=stock_cost,
        pmod=pmod_cost,
        vision=vision_cost(stock_model, image),
        stock_kv=kv_cache(stock.text_config, dtype, [layer.vision_tokens for layer in stock_cost.layers], text),
        pmod_kv=kv_cache(stock.text_config, dtype, [layer.vision_tokens for layer in pmod_cost.layers], text),
        published=published_for(stock.text_config, image.tokens, workload.text_tokens, pmod.retention),
    )


def _cache_dtype(config: object) -> str:
    """The checkpoint's dtype by name; bfloat16 where it names none that a cache is kept in."""
    name = str(config.dtype or config.text_config.dtype).removeprefix("torch.")
    return name if name in DTYPE_BYTES else "bfloat16"


def to_json(result: Profile) -> dict[str, Any]:
    """The profile as one JSON-ready dict. Units are in the keys; TFLOPs and GFLOPs are decimal, MiB is 2**20 bytes."""
    image, workload = result.image, result.workload
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": result.subject.name,
            "source": result.subject.source,
            "decoder": result.subject.stock.text_config.model_type,
            "pmod": result.subject.pmod.pmod,
            "mean_retention_ratio": result.mean_retention,
        },
        "workload": {
            "image_width_px": image.width,
            "image_height_px": image.height,
            "tiles": image.tiles,
            "vision_tokens": image.tokens,
            "text_tokens": workload.text_tokens,
            "new_tokens": workload.new_tokens,
        },
        "flops": _flops_json(result),
        "kv_cache": _kv_json(result),
        "layers": [_layer_json(result, index) for index in range(len(result.pmod.layers))],
    }


def percent(part: float, whole: float) -> float:
    """Part of whole in percent; 100 where both are nothing."""
    return 100 * part / whole if whole else 100.0


def _flops_json(result: Profile) -> dict[str, Any]:
    stock, pmod, vision = result.stock, result.pmod, result.vision

    def pair(stock_flops: int, pmod_flops: int) -> dict[str, float]:
        return {
            "stock_tflops": stock_flops / TERA,
            "pmod_tflops": pmod_flops / TERA,
            "pmod_of_stock_percent": percent(pmod_flops, stock_flops),
        }

    conventions = {name: {"counts": counted, **pair(*result.totals(name))} for name, counted in CONVENTIONS.items()}
    if result.published:
        conventions["paper"]["published_stock_tflops"] = result.published.stock_tflops
        conventions["paper"]["published_pmod_tflops"] = result.published.pmod_tflops
    return {
        "flops_per_multiply_add": 2,
        "conventions": conventions,
        "parts": {
            "decoder_matrix_products": pair(stock.matrix, pmod.matrix),
            "attention_products": pair(stock.attention_products, pmod.attention_products),
            "lm_head": pair(stock.lm_head, pmod.lm_head),
            "vision_tower": pair(vision.tower, vision.tower),
            "projector": pair(vision.projector, vision.projector),
        },
        "decoder_by_closed_formula": pair(result.formula(stock), result.formula(pmod)),
        "first_decoded_token_stock_gflops": stock.decode(1) / GIGA,
        "first_decoded_token_pmod_gflops": pmod.decode(1) / GIGA,
        "new_tokens": pair(result.generation(stock), result.generation(pmod)),
        "uncounted_operators": dict(result.unknown_operators),
    }


def _kv_json(result: Profile) -> dict[str, Any]:
    vision = [sum(layer.vision for layer in kv) for kv in (result.stock_kv, result.pmod_kv)]
    total = [sum(layer.total for layer in kv) for kv in (result.stock_kv, result.pmod_kv)]
    report = {
        "dtype": result.dtype,
        "stock_vision_mib": vision[0] / MIB,
        "pmod_vision_mib": vision[1] / MIB,
        "vision_pmod_of_stock_percent": percent(vision[1], vision[0]),
        "stock_total_mib": total[0] / MIB,
        "pmod_total_mib": total[1] / MIB,
        "total_pmod_of_stock_percent": percent(total[1], total[0]),
        "paper_convention_percent": 100 * result.mean_retention,
    }
    if result.published:
        report["published_percent"] = result.published.kv_percent
    return report


def _layer_json(result: Profile, index: int) -> dict[str, Any]:
    stock, pmod = result.stock.layers[index], result.pmod.layers[index]
    return {
        "layer": index,
        "retention_ratio": pmod.retention,
        "kept_vision_tokens": pmod.vision_tokens,
        "tokens": pmod.tokens,
        "attention_gflops": pmod.attention / GIGA,
        "attention_products_gflops": pmod.attention_products / GIGA,
        "mlp_gflops": pmod.mlp / GIGA,
        "router_gflops": pmod.router / GIGA,
        "total_gflops": pmod.total / GIGA,
        "stock_total_gflops": stock.total / GIGA,
        "kv_cache_vision_mib": result.pmod_kv[index].vision / MIB,
        "kv_cache_text_mib": result.pmod_kv[index].text / MIB,
        "stock_kv_cache_mib": result.stock_kv[index].total / MIB,
    }
