"""A measurement as tables and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pmod_cli.core.text import MIB, TERA
from pmod_cli.profiling.comparison import Profile
from pmod_cli.profiling.count.memory import kv_bytes
from pmod_cli.profiling.measure.latency import Latency, PhaseResult, peak_share
from pmod_cli.profiling.measure.phases import DECODE, PHASES, STOCK
from pmod_cli.reporting import plain_table


def latency_table(result: Profile, latency: Latency) -> Table:
    """Times of each phase and model, beside the ratio that their counts allow."""
    clock = "GPU" if _on_gpu(latency) else "CPU"
    headings = (f"{clock} ms", "±", "tokens/s", "ratio", "limit", "causal", "of peak", "peak MiB")
    title = f"Measured on {latency.device.name}: {_how(latency)}"
    table = plain_table(title, "phase", *headings, space=1)
    for phase in latency.phases:
        table.add_row(phase.phase + (", a token" if phase.phase == DECODE else ""), style="bold")
        for name, timing in phase.timings.items():
            share = max((share for share in peak_share(phase, name, latency.device) if share), default=None)
            table.add_row(
                f"  {name}",
                f"{1e3 * timing.median():,.1f}",
                f"{100 * timing.spread:.1f}%",
                f"{tokens(result, phase) / timing.median('wall'):,.0f}",
                f"{phase.ratio(name):.3f}",
                f"{phase.limit(name):.3f}",
                f"{phase.causal_limit(name):.3f}",
                "-" if share is None else f"{100 * share:.0f}%",
                f"{phase.peaks[name] / MIB:,.0f}" if name in phase.peaks else "-",
            )
        table.add_section()
    return table


def cache_table(result: Profile, latency: Latency) -> Table:
    """Bytes that the cache holds after a prefill, beside the count."""
    table = plain_table("KV cache after the prefill", "model", "held, bytes", "counted, bytes", "of stock")
    counted = predicted_cache(result)
    for name, held in latency.cache_bytes.items():
        share = held / latency.cache_bytes[STOCK]
        table.add_row(name, f"{held:,}", f"{counted[name == STOCK]:,}", f"{100 * share:.1f} %")
    return table


def parts_table(latency: Latency) -> Table:
    """Share of the time to first token by part of the model."""
    table = plain_table("Time to first token by part, percent", "part", *latency.parts)
    for part in dict.fromkeys(part for shares in latency.parts.values() for part in shares):
        cells = (shares.get(part) for shares in latency.parts.values())
        table.add_row(part, *("-" if share is None else f"{100 * share:.1f}" for share in cells))
    return table


def notes(latency: Latency) -> list[str]:
    """What the columns mean, for the reader of the tables."""
    phases = [f"{phase.phase}: {PHASES[phase.phase]}" for phase in latency.phases]
    return [
        *phases,
        "tokens/s by wall time, padding left out; peak MiB beyond weights and inputs",
        f"ratio to stock: median over {latency.settings.repeats} rounds of the ratio within a round; "
        f"{latency.settings.warmup} more to warm up. ±: half the distance of the quartiles",
        "limit: the FLOP ratio, full square of attention; causal: half of it, as a causal kernel computes. "
        "Decoding: the ratio of the bytes of weights and cache that are read",
        f"of peak: arithmetic, or memory traffic while decoding, of {latency.device.source}",
    ]


def tokens(result: Profile, phase: PhaseResult) -> int:
    """Tokens that one timed unit passes through the model, padding left out."""
    return len(result.rows) if phase.phase == DECODE else sum(row.tokens for row in result.rows)


def predicted_cache(result: Profile) -> tuple[int, int]:
    """Counted bytes after a prefill, before any token is decoded: p-MoD, stock."""
    pmod, stock = (kv_bytes(result.sizes, result.rows, result.dtype, routed=routed) for routed in (result.routed, None))
    return pmod, stock


def latency_json(result: Profile, latency: Latency) -> dict[str, Any]:
    """The measurement, units in the keys."""
    settings = latency.settings
    counted = predicted_cache(result)
    return {
        "device": settings.device,
        "device_name": latency.device.name,
        "clock": "cuda events" if _on_gpu(latency) else "process cpu time",
        "threads": latency.num_threads,
        "dtype": latency.dtype,
        "attention": latency.attention,
        "warmup_rounds": settings.warmup,
        "rounds": settings.repeats,
        "decoded_tokens_per_call": latency.steps,
        "device_peak_tflops_per_s": latency.device.flops / TERA or None,
        "device_peak_gb_per_s": latency.device.bandwidth / 1e9 or None,
        "device_peaks_source": latency.device.source,
        "cache": {
            name: {"held_bytes": held, "counted_bytes": counted[name == STOCK]}
            for name, held in latency.cache_bytes.items()
        },
        "phases": [
            {"phase": phase.phase, "model": name, **_phase_json(result, latency, phase, name)}
            for phase in latency.phases
            for name in phase.timings
        ],
        "first_token_share_by_part": latency.parts,
    }


def _phase_json(result: Profile, latency: Latency, phase: PhaseResult, name: str) -> dict[str, Any]:
    timing = phase.timings[name]
    compute, traffic = peak_share(phase, name, latency.device)
    return {
        "median_ms": 1e3 * timing.median(),
        "spread_percent": 100 * timing.spread,
        "cpu_ms": 1e3 * timing.median("cpu"),
        "wall_ms": 1e3 * timing.median("wall"),
        "tokens_per_s": tokens(result, phase) / timing.median("wall"),
        "ratio_to_stock": phase.ratio(name),
        "wall_ratio_to_stock": phase.ratio(name, "wall"),
        "limit_ratio": phase.limit(name),
        "causal_limit_ratio": phase.causal_limit(name),
        "tflops": phase.flops[name] / TERA,
        "read_mib": phase.bytes_read[name] / MIB if name in phase.bytes_read else None,
        "share_of_peak_arithmetic": compute,
        "share_of_peak_bandwidth": traffic,
        "peak_memory_mib": phase.peaks[name] / MIB if name in phase.peaks else None,
        "samples_ms": [1e3 * sample.seconds / timing.per for sample in timing.samples],
    }


def _on_gpu(latency: Latency) -> bool:
    return latency.phases[0].timings[STOCK].samples[0].device is not None


def _how(latency: Latency) -> str:
    threads = f"{latency.num_threads} thread{'s' if latency.num_threads > 1 else ''}, "
    return f"{'' if _on_gpu(latency) else threads}{latency.dtype}, {latency.attention}"
