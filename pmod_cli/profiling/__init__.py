"""What a model costs, stock beside p-MoD: counted before it runs, without weights, and measured when it runs.

Without torch: sizes -> anyres -> workload -> closed and training, the formulas. Traced: subject -> operators -> cost ->
kv_cache -> report, one profile. Measured: contestants -> phases -> clock and breakdown -> latency. `devices`
holds other people's numbers. Shown: tables, schema (JSON), latency_report.

Names resolve on first use, so that formulas cost no import of torch.
"""

from importlib import import_module

_HOMES = {
    "sizes": ("Sizes",),
    "workload": ("Row", "Workload"),
    "closed": ("Prefill", "prefill"),
    "training": ("TrainingSetup", "training_flops", "training_memory"),
    "subject": ("Subject", "load_subject", "scaled"),
    "report": ("CONVENTIONS", "Profile", "profile"),
    "latency": ("LatencySettings", "measure"),
    "schema": ("to_json",),
    "clock": ("interleaved", "peak_bytes", "threads", "timed"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
