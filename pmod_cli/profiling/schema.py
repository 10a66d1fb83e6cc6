"""A counted profile as JSON. Units are in the keys; TFLOPs and GFLOPs are decimal, MiB is 2**20 bytes."""

from __future__ import annotations

from typing import Any

from pmod_cli.profiling.count.trace import FLOPS_PER_MAC
from pmod_cli.profiling.latency_report import latency_json
from pmod_cli.profiling.measure.latency import Latency
from pmod_cli.profiling.report import CONVENTIONS, Profile
from pmod_cli.profiling.units import GIGA, MIB, TERA, percent

SCHEMA_VERSION = 2


def to_json(result: Profile, latency: Latency | None = None, *, macs: bool = False) -> dict[str, Any]:
    """The profile as one JSON-ready dict.

    Args:
        result: What was counted.
        latency: What was measured, if anything was.
        macs: Also say every pair of FLOPs in multiply-adds.
    """
    workload = result.workload
    measured = {} if latency is None else {"latency": latency_json(result, latency)}
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
            "batch_size": len(result.rows),
            "images_per_row": workload.images,
            "text_tokens": workload.text_tokens,
            "new_tokens": workload.new_tokens,
            "padded_length_tokens": result.longest.tokens,
            "rows": [
                {
                    "image_width_px": row.images[0].width,
                    "image_height_px": row.images[0].height,
                    "tiles": row.tiles,
                    "vision_tokens": row.vision_tokens,
                }
                for row in result.rows
            ],
        },
        "flops": _flops_json(result, macs),
        "kv_cache": _kv_json(result),
        "layers": [_layer_json(result, index) for index in range(len(result.pmod.layers))],
        **measured,
    }


def _flops_json(result: Profile, macs: bool) -> dict[str, Any]:
    stock, pmod, vision = result.stock, result.pmod, result.vision
    steps, checkpointed = result.training(), result.training(checkpointing=True)

    def pair(stock_flops: int, pmod_flops: int) -> dict[str, float]:
        said = {
            "stock_tflops": stock_flops / TERA,
            "pmod_tflops": pmod_flops / TERA,
            "pmod_of_stock_percent": percent(pmod_flops, stock_flops),
        }
        in_macs = {"stock_tmacs": stock_flops / FLOPS_PER_MAC / TERA, "pmod_tmacs": pmod_flops / FLOPS_PER_MAC / TERA}
        return said | in_macs if macs else said

    conventions = {name: {"counts": counted, **pair(*result.totals(name))} for name, counted in CONVENTIONS.items()}
    if result.published:
        conventions["paper"]["published_stock_tflops"] = result.published.tflops.stock
        conventions["paper"]["published_pmod_tflops"] = result.published.tflops.pmod
    return {
        "flops_per_multiply_add": FLOPS_PER_MAC,
        "conventions": conventions,
        "parts": {
            "decoder_matrix_products": pair(stock.matrix, pmod.matrix),
            "attention_products": pair(stock.attention_products, pmod.attention_products),
            "lm_head": pair(stock.lm_head, pmod.lm_head),
            "vision_tower": pair(vision.tower, vision.tower),
            "projector": pair(vision.projector, vision.projector),
        },
        "decoder_by_closed_formula": pair(*(result.formula(pmod=which).decoder for which in (False, True))),
        "first_decoded_token_stock_gflops": stock.decode(1) / GIGA,
        "first_decoded_token_pmod_gflops": pmod.decode(1) / GIGA,
        "new_tokens": pair(result.generation(stock), result.generation(pmod)),
        "training_step": {
            "forward": pair(*(step.forward for step in steps)),
            "backward": pair(*(step.backward for step in steps)),
            "step": pair(*(step.step for step in steps)),
            "step_with_gradient_checkpointing": pair(*(step.step for step in checkpointed)),
        },
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
        report["published_percent"] = result.published.kv_percent.pmod
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
