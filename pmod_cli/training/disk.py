"""The disk that a run needs for its training checkpoints and its result."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from pmod_cli.training.parts import Part
from pmod_cli.training.settings import Settings


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes. Logs and tokenizer files are left out: they are small.

    Attributes:
        checkpoint: one training checkpoint: weights and AdamW's two moments, or those of the adapters alone.
        result: the weights that the run leaves in the end.
        peak: at most at once: a new checkpoint is whole before the oldest goes, and the result before the last does.
        free: where the run folder will be; None where the run is planned for another machine.
    """

    checkpoint: int
    result: int
    peak: int
    free: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.peak <= self.free


def disk_of(
    settings: Settings, parameters: dict[str, Part], config: PretrainedConfig, steps: int, out: Path | None
) -> Disk:
    """The disk that a run needs.

    Args:
        settings: the whole run.
        parameters: of each part of its model.
        config: of the model that it starts from; the result keeps its dtype.
        steps: optimizer steps of the run.
        out: the run folder, or one above it; None where that is on another machine.
    """
    whole = sum(part.parameters for part in parameters.values())
    trained = sum(part.trained for part in parameters.values())
    lora = settings.lora.enabled
    checkpoint = 4 * ((trained if lora else whole) + 2 * trained)  # bytes of float32: weights, two moments
    stored = 2 if str(config.dtype).endswith("16") else 4  # the result has the dtype of the source
    result = 4 * trained if lora else 0
    result += 0 if lora and not settings.lora.merge else whole * stored
    saves = -(-steps // settings.train.save_steps)
    kept = min(settings.train.keep_checkpoints, saves)
    peak = max(min(kept + 1, saves) * checkpoint, kept * checkpoint + result)
    free = None
    if out is not None:
        absolute = out.expanduser().absolute()
        free = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    return Disk(checkpoint, result, peak, free)
