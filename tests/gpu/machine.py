"""The two machines that a step can run on: a GPU at full size, or a CPU at toy size, to show that all works."""

from __future__ import annotations

import gc
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from pmod_cli.profiling.count.workload import Workload
from pmod_cli.profiling.measure.clock import Timing, interleaved
from pmod_cli.profiling.measure.phases import PMOD, STOCK, ModelPair, random_pair
from pmod_cli.profiling.subject import Subject, load_subject, scaled
from tests.bench.__main__ import Batch

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
    "triton",
    "lmms-eval",
)
SMALL_IMAGE = ((336, 336),)  # of the toy runs


@dataclass(frozen=True)
class Machine:
    """Where and at which size.

    Args:
        cpu: Toy size, on the CPU.
    """

    cpu: bool

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    @property
    def dtype(self) -> str:
        return "float32" if self.cpu else "bfloat16"

    @property
    def rounds(self) -> int:
        """Timed calls of each model."""
        return 2 if self.cpu else 10

    def subject(self, alias: str) -> Subject:
        """Both configurations of a model, at the size of this machine."""
        subject = load_subject(alias)
        if not self.cpu:
            return subject
        small = scaled(subject, hidden_size=64, layers=3)
        for config in (small.stock, small.pmod):
            config.vision_config.num_hidden_layers = 2
            config.text_config.vocab_size, config.image_token_id = 1024, 1023
        return small

    def pair(self, subject: Subject) -> ModelPair:
        """Both on one set of random weights, made on the device."""
        return random_pair(subject, device=self.device, dtype=self.dtype, attention="sdpa")

    def rows(self, number: int) -> int:
        """Rows of a batch: at toy size never more than four."""
        return min(number, 4) if self.cpu else number

    def workload(self, subject: Subject, rows: int, new_tokens: int = 0) -> Workload:
        """The paper's prompt: 2,928 (LLaVA-1.5: 576) vision and 58 text tokens; a smaller image on a CPU."""
        sizes = SMALL_IMAGE if self.cpu and hasattr(subject.stock, "image_grid_pinpoints") else ()
        return Workload(image_sizes=sizes, batch_size=self.rows(rows), new_tokens=new_tokens)

    def batch(self, pair: ModelPair, subject: Subject, rows: int, new_tokens: int = 0, kind=Batch) -> Batch:
        """A batch that both models run."""
        return kind(pair, subject, self.workload(subject, rows, new_tokens), self.device)

    def time(self, calls: dict, per: int = 1) -> dict[str, Timing]:
        """Each call in turn: CUDA events on a GPU, CPU seconds elsewhere."""
        return interleaved(calls, device=self.device, warmup=1 if self.cpu else 2, repeats=self.rounds, per=per)

    def both(self, batch: Batch, phase: str) -> dict:
        """One phase of the two models, to be timed."""
        return {name: batch.call(phase, name) for name in (STOCK, PMOD)}

    def clear(self) -> None:
        """Gives back what the last batch held."""
        gc.collect()
        if not self.cpu:
            torch.cuda.empty_cache()

    def about(self) -> dict:
        """Names and versions for the report."""
        found = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        if self.cpu:
            return {"machine": platform.machine(), "device": "CPU, toy size", "versions": found}
        properties = torch.cuda.get_device_properties(0)
        return {
            "machine": platform.machine(),
            "device": properties.name,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "versions": found,
        }
