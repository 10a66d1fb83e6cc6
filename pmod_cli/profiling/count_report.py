"""A counted profile as tables that fit 80 columns, and as JSON. All numbers come from `report.Profile`.

Units are in the keys of the JSON; TFLOPs and GFLOPs are decimal, MiB is 2**20 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.table import Table

from pmod_cli.core.text import GIGA, KIB, MEGA, MIB, TERA, percent
from pmod_cli.profiling.comparison import CONVENTIONS, Profile
from pmod_cli.profiling.count.memory import KvCost
from pmod_cli.profiling.count.trace import FLOPS_PER_MAC, LayerCost
from pmod_cli.profiling.latency_report import latency_json
from pmod_cli.profiling.measure.latency import Latency
from pmod_cli.reporting import plain_table


@dataclass(frozen=True)
class _Unit:
    """What numbers of a table are printed in."""

    name: str
    size: int

    def show(self, number: int, digits: int = 2) -> str:
        return f"{number / self.size:,.{digits}f}"


_SIZES = (("T", TERA), ("G", GIGA), ("M", MEGA))


def _units(result: Profile, macs: bool) -> tuple[_Unit, _Unit]:
    """Of a whole prefill, and of one layer or one decoded token: the next smaller. A 7B has TFLOPs and GFLOPs."""
    large = 0 if result.stock.total >= TERA else 1
    one, flops = ("MACs", FLOPS_PER_MAC) if macs else ("FLOPs", 1)
    whole, part = (_Unit(prefix + one, size * flops) for prefix, size in _SIZES[large : large + 2])
    return whole, part


def _kv_unit(result: Profile) -> _Unit:
    total = sum(layer.total for layer in result.stock_kv)
    return _Unit("MiB", MIB) if total >= 10 * MIB else _Unit("KiB", KIB)


def sections(result: Profile, report: str, *, macs: bool = False) -> list[Table]:
    """The tables of a report: `flops`, `kv` or `all`."""
    counted = [table(result, macs=macs) for table in (layers_table, flops_table, decode_table, training_table)]
    if report == "flops":
        return [*counted, kv_table(result)]
    return [*(counted if report == "all" else ()), kv_layers_table(result), kv_table(result)]


def layers_table(result: Profile, *, macs: bool = False) -> Table:
    """FLOPs and KV cache of every p-MoD layer; neighbours that cost the same share a row, and so does all of stock."""
    unit, kv_unit = _units(result, macs)[1], _kv_unit(result)
    ranking = "choice" if any(layer.selector for layer in result.pmod.layers) else "router"
    headings = ("ratio", "kept", "tokens", "attention", "products", "MLP", ranking, "total", "of stock", "KV")
    title = f"Each decoder layer: {unit.name} of the prefill, KV cache in {kv_unit.name}"
    table = plain_table(title, "layers", *headings, space=1)

    def cells(layer: LayerCost, kv: KvCost) -> list[str]:
        parts = (layer.attention, layer.attention_products, layer.mlp)
        return [
            f"{layer.retention:.3f}",
            f"{layer.vision_tokens}",
            f"{layer.tokens}",
            *(unit.show(part, 1) for part in parts),
            unit.show(ranks) if (ranks := layer.router + layer.selector) else "-",
            unit.show(layer.total, 1),
            _share(layer.total, stock.total),
            kv_unit.show(kv.total),
        ]

    stock = result.stock.layers[0]
    table.add_row("stock", *cells(stock, result.stock_kv[0]), style="dim")
    pairs = zip(result.pmod.layers, result.pmod_kv, strict=True)
    for _, group in groupby(pairs, key=lambda pair: (pair[0].retention, pair[0].vision_tokens, pair[0].total)):
        same = list(group)
        first, last = same[0][0].layer, same[-1][0].layer
        table.add_row(f"{first}" if first == last else f"{first}-{last}", *cells(*same[0]))
    return table


def flops_table(result: Profile, *, macs: bool = False) -> Table:
    """FLOPs of the prefill by part and by convention."""
    unit = _units(result, macs)[0]
    number = sum(row.tiles for row in result.rows)
    seen = f", {number} tile{'s' if number > 1 else ''}" if result.sizes.family.tiled else ""
    notes = {"lm_head": ", every position", "vision_tower": seen}
    table = plain_table(f"Prefill, {unit.name}", "part", "stock", "p-MoD", "of stock", "published")
    for part, pair in _parts(result).items():
        name = part if part == "lm_head" else part.replace("_", " ")
        table.add_row(name + notes.get(part, ""), *_pair(unit, *pair))
    table.add_section()
    published = result.published
    said = f"{published.tflops.stock} -> {published.tflops.pmod}" if published else ""
    table.add_row("paper convention", *_pair(unit, *result.totals("paper")), said, style="bold")
    more = " + selection" if "selection" in _parts(result) else ""
    table.add_row(f"paper + attention products{more}", *_pair(unit, result.stock.total, result.pmod.total))
    table.add_row("full convention", *_pair(unit, *result.totals("full")), style="bold")
    table.add_row("full, last logits alone (generate)", *_pair(unit, *result.totals("generate")))
    return table


def decode_table(result: Profile, *, macs: bool = False) -> Table:
    """FLOPs of decoding after the prefill."""
    unit = _units(result, macs)[1]
    table = plain_table(f"Decoding, {unit.name}", "tokens", "stock", "p-MoD", "of stock")
    table.add_row("the first", *_pair(unit, result.stock.decode(1), result.pmod.decode(1)))
    if new_tokens := result.workload.new_tokens:
        table.add_row(
            f"all {new_tokens}", *_pair(unit, *(result.generation(cost) for cost in (result.stock, result.pmod)))
        )
    return table


def training_table(result: Profile, *, macs: bool = False) -> Table:
    """FLOPs of one training step on the batch: all parts but the vision tower are trained."""
    unit = _units(result, macs)[0]
    table = plain_table(f"Training step, {unit.name}", "part", "stock", "p-MoD", "of stock")
    for part, pair in _training(result).items():
        name = part.removeprefix("step_").replace("_", " ")
        table.add_row(name, *_pair(unit, *pair), style="bold" if part == "step" else None)
    return table


def kv_table(result: Profile) -> Table:
    """KV cache by kind of token."""
    unit = _kv_unit(result)
    table = plain_table(f"KV cache, {unit.name} in {result.dtype}", "tokens", "stock", "p-MoD", "of stock", "published")
    text = f"{result.longest.text_tokens + result.workload.new_tokens} text"
    for name, kind in (("vision", "vision"), (text, "text"), ("vision + text", "total")):
        sizes = [sum(getattr(layer, kind) for layer in kv) for kv in (result.stock_kv, result.pmod_kv)]
        table.add_row(name, *_pair(unit, *sizes))
    table.add_section()
    said = f"{result.published.kv_percent.pmod} %" if result.published else ""
    kept = _share(result.routed.mean_tokens(result.rows), 1)
    table.add_row("paper convention: vision, K not rounded", "", "", kept, said, style="bold")
    return table


def kv_layers_table(result: Profile) -> Table:
    """KV cache of every layer, vision and text apart."""
    unit = _kv_unit(result)
    headings = ("retention", "kept K", "vision", "text", "total", "of stock")
    table = plain_table(f"KV cache of each layer, {unit.name}", "layer", *headings)
    for layer, stock, kv in zip(result.pmod.layers, result.stock_kv, result.pmod_kv, strict=True):
        sizes = (unit.show(size) for size in (kv.vision, kv.text, kv.total))
        share = _share(kv.total, stock.total)
        table.add_row(f"{layer.layer}", f"{layer.retention:.3f}", f"{layer.vision_tokens}", *sizes, share)
    return table


def _parts(result: Profile) -> dict[str, tuple[int, int]]:
    """FLOPs of the prefill by part, stock and p-MoD. They sum up to the full convention."""
    stock, pmod, vision = result.stock, result.pmod, result.vision
    return {
        "decoder_matrix_products": (stock.matrix, pmod.matrix),
        "attention_products": (stock.attention_products, pmod.attention_products),
        **({"selection": (stock.selector, pmod.selector)} if pmod.selector else {}),  # where no router ranks
        "lm_head": (stock.lm_head, pmod.lm_head),
        "vision_tower": (vision.tower,) * 2,
        "projector": (vision.projector,) * 2,
    }


def _training(result: Profile) -> dict[str, tuple[int, int]]:
    """FLOPs of a training step by pass, and of the whole step with and without checkpointing, stock and p-MoD."""
    steps = result.training()
    passes = {name: tuple(getattr(step, name) for step in steps) for name in ("forward", "backward", "step")}
    again = tuple(step.step for step in result.training(checkpointing=True))
    return {**passes, "step_with_gradient_checkpointing": again}


def _pair(unit: _Unit, stock: int, pmod: int) -> list[str]:
    return [unit.show(stock), unit.show(pmod), _share(pmod, stock)]


def _share(part: float, whole: float) -> str:
    """Percent with one digit. Rounded twice, so that a mean of 0.5375 less a float's last bit is still 53.8 %."""
    return "-" if (share := _of_stock(part, whole)) is None else f"{round(share, 6):.1f} %"


def _of_stock(part: float, whole: float) -> float | None:
    """Percent; None of what the stock model has nothing of."""
    return percent(part, whole) if whole or not part else None


SCHEMA_VERSION = 2


def to_json(result: Profile, latency: Latency | None = None, *, macs: bool = False) -> dict[str, Any]:
    """The profile as one JSON-ready dict.

    Args:
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
            "images_per_row": workload.images if workload.image_sizes or not workload.videos else 0,
            "text_tokens": result.longest.text_tokens,
            "new_tokens": workload.new_tokens,
            **({"videos": [list(video) for video in workload.videos]} if workload.videos else {}),
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
    stock, pmod = result.stock, result.pmod

    def pair(stock_flops: int, pmod_flops: int) -> dict[str, float | None]:
        said = {
            "stock_tflops": stock_flops / TERA,
            "pmod_tflops": pmod_flops / TERA,
            "pmod_of_stock_percent": _of_stock(pmod_flops, stock_flops),
        }
        in_macs = {"stock_tmacs": stock_flops / FLOPS_PER_MAC / TERA, "pmod_tmacs": pmod_flops / FLOPS_PER_MAC / TERA}
        return {**said, **(in_macs if macs else {})}

    conventions = {name: {"counts": counted, **pair(*result.totals(name))} for name, counted in CONVENTIONS.items()}
    if result.published:
        conventions["paper"]["published_stock_tflops"] = result.published.tflops.stock
        conventions["paper"]["published_pmod_tflops"] = result.published.tflops.pmod
    return {
        "flops_per_multiply_add": FLOPS_PER_MAC,
        "conventions": conventions,
        "parts": {part: pair(*both) for part, both in _parts(result).items()},
        "decoder_by_closed_formula": pair(*(result.formula(pmod=which).decoder for which in (False, True))),
        "first_decoded_token_stock_gflops": stock.decode(1) / GIGA,
        "first_decoded_token_pmod_gflops": pmod.decode(1) / GIGA,
        "new_tokens": pair(result.generation(stock), result.generation(pmod)),
        "training_step": {part: pair(*both) for part, both in _training(result).items()},
        "uncounted_operators": dict(result.unknown_operators),
    }


def _kv_json(result: Profile) -> dict[str, Any]:
    report: dict[str, Any] = {"dtype": result.dtype}
    for kind in ("vision", "total"):
        stock, pmod = (sum(getattr(layer, kind) for layer in kv) for kv in (result.stock_kv, result.pmod_kv))
        report |= {f"stock_{kind}_mib": stock / MIB, f"pmod_{kind}_mib": pmod / MIB}
        report[f"{kind}_pmod_of_stock_percent"] = percent(pmod, stock)
    report["paper_convention_percent"] = 100 * result.routed.mean_tokens(result.rows)
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
        "selection_gflops": pmod.selector / GIGA,
        "total_gflops": pmod.total / GIGA,
        "stock_total_gflops": stock.total / GIGA,
        "kv_cache_vision_mib": result.pmod_kv[index].vision / MIB,
        "kv_cache_text_mib": result.pmod_kv[index].text / MIB,
        "stock_kv_cache_mib": result.stock_kv[index].total / MIB,
    }
