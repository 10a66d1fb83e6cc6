"""What a fine-tuning run is told: three groups of settings, written as they appear in a recipe."""

from dataclasses import dataclass, field
from typing import Literal

# The parts of a LLaVA that can be frozen, or trained at a rate of their own.
PARTS = ("language_model", "projector", "vision_tower", "router")


def at_least(minimum: float, default: float | None):
    """A number field that may not be below ``minimum``."""
    return field(default=default, metadata={"min": minimum})


@dataclass
class ModelArgs:
    """What is trained, and at which precision.

    Attributes:
        name: folder, alias or hub id of the checkpoint to start from, stock or p-MoD; null is the current one.
        precision: the numbers of forward and backward; the weights being trained are always float32.
            auto is bfloat16 on a GPU and float32 on a CPU.
        attention: the attention kernel.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        freeze: parts that stay as they are, of language_model, projector, vision_tower, router.
        router_start: where untrained routers start: zero as in the paper, or attention, calibrated on what the stock
            weights attend to; for short runs. Trained routers, and a stock model, are left as they are.
        calibration_images: images of the train split that such a calibration reads.
    """

    name: str | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    freeze: list[str] = field(default_factory=lambda: ["vision_tower"])
    router_start: Literal["zero", "attention"] = "zero"
    calibration_images: int = at_least(1, 96)


@dataclass
class DataArgs:
    """What it is trained on: synthetic documents, drawn as they are needed.

    Attributes:
        tasks: the kinds of document, in turn: doc, chart, attribute, presence.
        turns: questions asked about each image; null asks all there are.
        images: number of different images, after which they repeat; null is as many as the run uses.
        first: index of the first image in the train split; the bundled model was trained on lower ones.
        workers: processes that draw images beside the training, 0 draws in the training process.
    """

    tasks: list[str] = field(default_factory=lambda: ["doc", "chart", "attribute", "presence"])
    turns: int | None = at_least(1, None)
    images: int | None = at_least(1, None)
    first: int = at_least(0, 10_000_000)
    workers: int = at_least(0, 0)


@dataclass
class TrainArgs:
    """How it is trained: AdamW, one learning rate for each part, and what is logged and kept.

    Attributes:
        max_steps: number of optimizer steps.
        batch_size: images in one forward pass on one device.
        gradient_accumulation: forward passes to one optimizer step.
        learning_rate: peak learning rate of the language model, and of each part without its own.
        projector_learning_rate: that of the projector; null is ``learning_rate``.
        vision_tower_learning_rate: that of the vision tower, where it is not frozen; null is ``learning_rate``.
        router_learning_rate: that of the routers; null is ``learning_rate``.
        lr_schedule: how the rates go down after the warm-up.
        warmup_steps: steps in which the rates rise from zero; below 1 a share of all steps.
        weight_decay: AdamW's decay; not applied to biases and norms.
        adam_beta2: AdamW's second moment decay.
        max_grad_norm: gradients longer than this are scaled down to it; 0 is never.
        seed: seed of the order of the images and of everything else that is random.
        log_steps: steps between two lines of the log.
        save_steps: steps between two training checkpoints, from which a run can go on.
        keep_checkpoints: number of training checkpoints kept while the run lasts.
    """

    max_steps: int = at_least(1, 200)
    batch_size: int = at_least(1, 16)
    gradient_accumulation: int = at_least(1, 1)
    learning_rate: float = at_least(0, 2e-5)
    projector_learning_rate: float | None = at_least(0, None)
    vision_tower_learning_rate: float | None = at_least(0, None)
    router_learning_rate: float | None = at_least(0, None)
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: float = at_least(0, 0.03)
    weight_decay: float = at_least(0, 0.0)
    adam_beta2: float = at_least(0, 0.999)
    max_grad_norm: float = at_least(0, 1.0)
    seed: int = at_least(0, 0)
    log_steps: int = at_least(1, 10)
    save_steps: int = at_least(1, 100)
    keep_checkpoints: int = at_least(1, 1)

    def rate(self, part: str) -> float:
        """The peak learning rate of one of ``PARTS``."""
        own = None if part == "language_model" else getattr(self, f"{part}_learning_rate")
        return self.learning_rate if own is None else own


@dataclass
class Settings:
    """A whole run. ``name`` is the recipe's, and names the run folder."""

    name: str = "finetune"
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    train: TrainArgs = field(default_factory=TrainArgs)

    @property
    def images_used(self) -> int:
        """Images one process sees in the whole run."""
        return self.train.max_steps * self.train.batch_size * self.train.gradient_accumulation
