"""What a run leaves beside its weights: the log, a summary, curves, a model card."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerState

from pmod_cli.checkpoints.atomic import write_json, write_text
from pmod_cli.training import folder
from pmod_cli.training.settings import Settings

if TYPE_CHECKING:
    from pmod_cli.training.run import FinetuneReport


@dataclass(frozen=True)
class Summary:
    """What a run took, over all its processes.

    Attributes:
        device: what it ran on; of several processes, what the first one did.
        processes: how many shared it.
        device_hours: wall time times processes.
        tokens_per_second: text and vision tokens without padding, of all processes together.
        peak_memory_gib: of the first process: on a GPU what was allocated, else the most it held.
    """

    device: str
    processes: int
    device_hours: float
    tokens_per_second: float
    peak_memory_gib: float

    @classmethod
    def of(cls, state: TrainerState, seconds: float, processes: int, device: str) -> "Summary":
        memory = max((line.get("memory_gib", 0.0) for line in state.log_history), default=0.0)
        return cls(
            device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
            processes=processes,
            device_hours=seconds * processes / 3600,
            tokens_per_second=state.num_input_tokens_seen / max(seconds, 1e-9),
            peak_memory_gib=memory,
        )


def write_reports(staging: Path, settings: Settings, report: "FinetuneReport", state: TrainerState) -> None:
    """Fill the folder with the log, the summary, the curves and the card of a finished run."""
    lines = state.log_history
    write_text(staging / folder.LOG, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(staging / folder.SUMMARY, {"schema_version": 1, **_plain(report)})


def _plain(report: "FinetuneReport") -> dict:
    return {**asdict(report), "path": str(report.path)}
