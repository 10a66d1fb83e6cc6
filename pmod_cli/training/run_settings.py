"""What a fine-tuning run is told: groups of settings, written as they appear in a recipe."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import ceil
from typing import Any, Literal

from pmod_cli.core.errors import PmodError
from pmod_cli.families.llava import LLAVA
from pmod_cli.families.llava_next import LLAVA_NEXT
from pmod_cli.model import SCHEDULES, SELECTIONS
from pmod_cli.profiling.count.training import PARTS

# Settings of `data` that nothing of drawn documents depends on.
OF_ROWS = ("path", "images", "template", "max_length", "video_fps", "video_frames", "on_bad_row", "group_by_modality")


def at_least(minimum: float, default: float | None, *, below: float | None = None) -> Any:
    """A number field that may not be below ``minimum``, nor reach ``below``."""
    return field(default=default, metadata={"min": minimum, "below": below})


def above(bound: float, default: float) -> Any:
    """A number field that has to be more than ``bound``."""
    return field(default=default, metadata={"above": bound})


def one_of(names: Iterable[str], default: str | None) -> Any:
    """A string field that is one of ``names``, which are read when a value is given."""
    return field(default=default, metadata={"names": names})


def needed(value: str | None, key: str) -> str:
    """The value of a setting that this kind of run cannot do without.

    Raises:
        PmodError: it is null.
    """
    if value is None:
        raise PmodError(f"`{key}` is not given, and this run needs it", hint="pmod finetune --print-config")
    return value


@dataclass
class ModelArgs:
    """What is trained, and at which precision.

    Attributes:
        name: folder, alias or hub id of the checkpoint to start from, stock or p-MoD; null is the current one.
        llm: instead of ``name``, a base language model, which with a vision tower and a projector becomes a LLaVA.
        vision_tower: the CLIP of such a start.
        projector: the projector of such a start, as the original code saves it; null is a new, random one.
        kind: the LLaVA that such a start becomes.
        precision: the numbers of forward and backward; the weights being trained are always float32.
            auto is bfloat16 on a GPU and float32 on a CPU.
        quantize: nf4 holds the frozen weights of the decoder in 4 bits (QLoRA); needs ``lora.enabled`` and CUDA.
        attention: the attention kernel.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        liger_kernel: fused norms, rotary embedding and MLP of the liger-kernel package; needs a GPU.
        freeze: parts that stay as they are, of language_model, projector, vision_tower, router.
        router_start: where untrained routers start: zero as in the paper; attention, on what the stock weights attend
            to, for short runs; or calibrated, as pmod calibrate fits routers, for the schedule that is given. Trained
            and calibrated routers, and a stock model, are left as they are.
        calibration_images: rows of the train split that such a calibration reads, the first ones with images.
    """

    name: str | None = None
    llm: str | None = None
    vision_tower: str | None = None
    projector: str | None = None
    kind: str = one_of((LLAVA.name, LLAVA_NEXT.name), LLAVA_NEXT.name)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "nf4"] = "none"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    liger_kernel: bool = False
    freeze: list[str] = field(default_factory=lambda: ["vision_tower"])
    router_start: Literal["zero", "attention", "calibrated"] = "zero"
    calibration_images: int = at_least(1, 96)


@dataclass
class PmodArgs:
    """How the model is routed: what ``pmod convert`` would be told. Null is the checkpoint's own, else the paper's.

    Attributes:
        enabled: true converts a stock checkpoint first; false trains it as it is, as a baseline; null is true where one
            of the settings below is given, and otherwise takes the checkpoint as it is.
        schedule: name of a retention schedule; list takes the ratios as they are.
        shift: beta of a decaying schedule, cosine or linear.
        mean: wanted mean retention ratio, instead of a shift.
        max_ratio: ratios above it become plain layers.
        min_ratio: floor of the decaying schedules.
        values: for schedule list, one ratio per layer.
        norm: weight normalisation: tanh, softmax, shifted_softmax, sigmoid, none, or activation_scale_bias.
        alpha: range of tanh and shifted_softmax.
        string: whether a skipped vision token is scaled by its weight (STRing) or passes unchanged.
        target_tokens: vision_all, vision_hr, vision_image or vision_video.
        quota: row, or per_image: K of each image and frame apart.
        select_at: layers that choose; those up to the next one hold the choice and have no router. Without it every
            routed layer chooses.
        selection: how the kept tokens are chosen: router, a control that keeps as many, or another selection. The
            result keeps it. Null is the checkpoint's own.
    """

    enabled: bool | None = None
    schedule: str | None = one_of(SCHEDULES, None)
    shift: float | None = None
    mean: float | None = None
    max_ratio: float | None = None
    min_ratio: float | None = None
    values: list[float] | None = None
    norm: str | None = None
    alpha: float | None = None
    string: bool | None = None
    target_tokens: Literal["vision_all", "vision_hr", "vision_image", "vision_video"] | None = None
    quota: Literal["row", "per_image"] | None = None
    select_at: list[int] | None = None
    selection: str | None = one_of(SELECTIONS, None)

    @property
    def stated(self) -> dict[str, Any]:
        """Those that were given of the settings that say how the model is routed."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "enabled"}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def given(self) -> dict[str, Any]:
        """Those of them that a conversion is told. A selection may be changed later."""
        return {name: value for name, value in self.stated.items() if name != "selection"}


@dataclass
class LoraArgs:
    """Low-rank adapters on the decoder instead of all its weights. Routers, and parts not frozen, are trained whole.

    Attributes:
        enabled: train adapters.
        rank: width of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: of the adapters' input.
        targets: the linear maps of a decoder layer that get an adapter.
        merge: whether a finished run folds the adapters into the weights, so that it is a checkpoint at once; otherwise
            it leaves the adapter, and ``pmod finetune --merge`` does that later.
    """

    enabled: bool = False
    rank: int = at_least(1, 128)
    alpha: float = at_least(0, 256.0)
    dropout: float = at_least(0, 0.05, below=1)
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    merge: bool = True


@dataclass
class DataArgs:
    """What it is trained on.

    Attributes:
        kind: synthetic documents, drawn as they are needed; llava, a JSON or JSONL file in LLaVA's layout or with
            ``messages``; hub, a Hugging Face data set with columns ``messages`` and ``images``.
        path: the file, or the name of the data set.
        images: the folder that the image paths of the rows start from.
        template: how a conversation becomes text: auto asks the processor's own chat template.
        max_length: tokens of a row, vision tokens included; longer ones are cut behind the image; null cuts nothing.
        video_fps: frames that are taken of a second of a video; the pictures of a folder are so many a second.
        video_frames: frames of a video at most; models that read a frame as a tile are given so many of each.
        on_bad_row: whether a row that cannot be used ends the run, or is left out and written to a file.
        group_by_modality: batches of images only or of text only, of similar length.
        rows: synthetic: number of different images, after which they repeat; null is as many as the run uses. Of other
            data, what ``--dry-run`` reckons with while the file is not there.
        tasks: synthetic: the kinds of document, in turn: doc, chart, attribute, presence, above, dearer, where; of two
            pictures which, of a film moving.
        turns: synthetic: questions asked about each image; null asks all there are.
        first: synthetic: index of the first image in the train split; the bundled model was trained on lower ones.
        workers: processes that prepare rows beside the training, 0 does it in the training process.
    """

    kind: Literal["synthetic", "llava", "hub"] = "synthetic"
    path: str | None = None
    images: str | None = None
    template: Literal["auto", "vicuna_v1", "mistral", "llama3", "qwen", "plain"] = "auto"
    max_length: int | None = at_least(1, None)
    video_fps: float = at_least(0.01, 2.0)
    video_frames: int = at_least(1, 32)
    on_bad_row: Literal["error", "skip"] = "error"
    group_by_modality: bool = False
    rows: int | None = at_least(1, None)
    tasks: list[str] = field(default_factory=lambda: ["doc", "chart", "attribute", "presence"])
    turns: int | None = at_least(1, None)
    first: int = at_least(0, 10_000_000)
    workers: int = at_least(0, 0)


@dataclass
class TrainArgs:
    """How it is trained: AdamW, one learning rate for each part, and what is logged and kept.

    Attributes:
        epochs: passes over the data, where ``max_steps`` is not given.
        max_steps: number of optimizer steps.
        loss: answers, the cross-entropy of the given answers; or distill, that and the KL divergence from the stock
            model's own logits at the same tokens. The teacher is the same weights with adapters off and every layer
            plain, so it needs ``lora.enabled`` and no second model.
        batch_size: rows in one forward pass on one device.
        gradient_accumulation: forward passes to one optimizer step.
        global_batch_size: rows of one optimizer step over all devices; replaces ``gradient_accumulation``, so that the
            run is the same on any number of devices.
        learning_rate: peak learning rate of the language model, and of each part without its own.
        projector_learning_rate: that of the projector; null is ``learning_rate``.
        vision_tower_learning_rate: that of the vision tower, where it is not frozen; null is ``learning_rate``.
        router_learning_rate: that of the routers; null is ``learning_rate``.
        lr_schedule: how the rates go down after the warm-up.
        warmup_steps: steps in which the rates rise from zero; below 1 a share of all steps.
        weight_decay: AdamW's decay; not applied to biases and norms.
        adam_beta2: AdamW's second moment decay.
        max_grad_norm: gradients longer than this are scaled down to it; 0 is never.
        tf32: matrix products of float32 in TF32, on GPUs that have it.
        seed: seed of the order of the rows and of everything else that is random.
        engine: how several processes share the work: DDP, FSDP2, or DeepSpeed ZeRO 1, 2, 3; auto is DDP.
        report_to: where the log goes besides the run folder: tensorboard, wandb or none.
        log_steps: steps between two lines of the log.
        save_steps: steps between two training checkpoints, from which a run can go on.
        keep_checkpoints: number of training checkpoints kept while the run lasts.
    """

    epochs: float = above(0, 1.0)
    max_steps: int | None = at_least(1, None)
    loss: Literal["answers", "distill"] = "answers"
    batch_size: int = at_least(1, 16)
    gradient_accumulation: int = at_least(1, 1)
    global_batch_size: int | None = at_least(1, None)
    learning_rate: float = at_least(0, 2e-5)
    projector_learning_rate: float | None = at_least(0, None)
    vision_tower_learning_rate: float | None = at_least(0, None)
    router_learning_rate: float | None = at_least(0, None)
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: float = at_least(0, 0.03)
    weight_decay: float = at_least(0, 0.0)
    adam_beta2: float = at_least(0, 0.999, below=1)
    max_grad_norm: float = at_least(0, 1.0)
    tf32: bool = True
    seed: int = at_least(0, 0)
    engine: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    log_steps: int = at_least(1, 10)
    save_steps: int = at_least(1, 100)
    keep_checkpoints: int = at_least(1, 1)

    def rate(self, part: str) -> float:
        """The peak learning rate of one of ``PARTS``."""
        own = None if part == "language_model" else getattr(self, f"{part}_learning_rate")
        return self.learning_rate if own is None else own


@dataclass
class Settings:
    """A whole run.

    ``name`` is the recipe's, and names the run folder; ``eval`` are tasks to be scored at the end, on
    ``eval_limit`` questions of each, drawn as ``pmod eval --limit`` draws them (null is all).
    """

    name: str = "finetune"
    model: ModelArgs = field(default_factory=ModelArgs)
    pmod: PmodArgs = field(default_factory=PmodArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
    data: DataArgs = field(default_factory=DataArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: list[str] = field(default_factory=list)
    eval_limit: int | None = at_least(1, None)

    def dtype_on(self, device: str) -> str:
        """The dtype of forward and backward on a device: float32 or bfloat16."""
        if self.model.precision == "auto":
            return "bfloat16" if device.startswith("cuda") else "float32"
        return self.model.precision

    def accumulation(self, processes: int = 1) -> int:
        """Forward passes to one optimizer step; ValueError where the global batch is no multiple of one pass."""
        if self.train.global_batch_size is None:
            return self.train.gradient_accumulation
        passes, rest = divmod(self.train.global_batch_size, self.train.batch_size * processes)
        if rest or not passes:
            raise ValueError(
                f"train.global_batch_size: {self.train.global_batch_size} is no multiple of "
                f"{self.train.batch_size} rows x {processes} processes"
            )
        return passes

    def rows_per_step(self, processes: int = 1) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.train.batch_size * self.accumulation(processes) * processes

    def steps(self, rows: int, processes: int = 1) -> int:
        """Optimizer steps of the whole run over a data set of ``rows`` rows."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        return max(1, ceil(self.train.epochs * self._steps_of_epoch(rows, processes)))

    def rows_read(self, steps: int, rows: int, processes: int = 1) -> int:
        """Rows of so many steps over a data set of ``rows`` rows: the last step of an epoch has what is left of it."""
        together = self.train.batch_size * processes
        epoch = rows if processes == 1 else ceil(rows / together) * together  # each process has as many
        whole, rest = divmod(steps, self._steps_of_epoch(rows, processes))
        return whole * epoch + min(rest * self.rows_per_step(processes), epoch)

    def _steps_of_epoch(self, rows: int, processes: int) -> int:
        return ceil(ceil(rows / (self.train.batch_size * processes)) / self.accumulation(processes))

    def conflicts(self) -> list[str]:
        """What is wrong between settings that are each right."""
        model, data, train, found = self.model, self.data, self.train, []
        if set(PARTS) <= set(model.freeze):
            found.append("model.freeze: every part is frozen, nothing is left to train")
        if model.llm is not None and model.name is not None:
            found.append("model.llm: the run starts from model.name or from model.llm, not from both")
        if model.llm is None and (model.vision_tower or model.projector):
            found.append("model.vision_tower, model.projector: expected model.llm with them")
        if model.llm is not None and model.vision_tower is None:
            found.append("model.llm: expected model.vision_tower with it")
        if train.loss == "distill" and not self.lora.enabled:
            found.append("train.loss: distill learns from the weights without adapters; expected lora.enabled: true")
        if self.lora.enabled and "language_model" in model.freeze:
            found.append("lora.enabled: the language model is in model.freeze, nothing would be adapted")
        if self.lora.enabled and not self.lora.targets:
            found.append("lora.targets: expected at least one linear map, got none")
        if self.eval and self.lora.enabled and not self.lora.merge:
            found.append("eval: an adapter that is not merged cannot be scored; expected lora.merge: true with it")
        if model.quantize != "none" and not self.lora.enabled:
            found.append("model.quantize: 4-bit weights cannot be trained; expected lora.enabled: true with it")
        if self.pmod.enabled is False and self.pmod.stated:
            found.append(f"pmod.enabled: false, yet pmod.{next(iter(self.pmod.stated))} is given")
        unread = [name for name in OF_ROWS if getattr(data, name) != getattr(DataArgs, name)]
        if data.kind == "synthetic" and unread:
            found.append(
                f"data.{', data.'.join(unread)}: synthetic documents are drawn; expected data.kind llava or hub"
            )
        if data.kind == "synthetic" and not data.tasks:
            found.append("data.tasks: expected at least one kind of document, got none")
        if data.kind != "synthetic" and data.path is None:
            found.append(f"data.path: expected the file or data set of data.kind {data.kind}")
        if train.global_batch_size is not None and train.gradient_accumulation != 1:
            found.append("train.global_batch_size: replaces train.gradient_accumulation; give one of them")
        return found


def processes() -> int:
    """Processes of the run; each knows it from the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
