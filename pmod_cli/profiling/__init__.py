"""What a model costs, stock beside p-MoD: counted before it runs, without weights, and measured when it runs.

`count/` has the formulas, the fvcore trace that checks them, KV cache and memory; `measure/` runs and times models.
On top: `subject` (a name to two configurations), `comparison` (one counted profile), `cost_sweep` and `average` (many
of them), and what is shown: tables, JSON, figures.

Names resolve on first use, so that formulas cost no import of torch.
"""

from importlib import import_module
from typing import Any

from pmod_cli.families.sizes import Sizes as Sizes

_HOMES = {
    "count.workload": ("Routed", "Row", "Workload"),
    "count.formulas": ("Prefill", "prefill"),
    "count.training": ("TrainingSetup", "training_flops", "training_memory"),
    "subject": ("Subject", "load_subject", "scaled"),
    "comparison": ("CONVENTIONS", "Profile", "profile"),
    "measure.latency": ("LatencySettings", "measure_latency"),
    "count_report": ("to_json",),
    "measure.clock": ("interleaved", "peak_bytes", "threads", "timed"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["Sizes", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
