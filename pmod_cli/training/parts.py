"""The parts of a LLaVA that are frozen or trained at a rate of their own."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pmod_cli.families import FAMILIES
from pmod_cli.families.configs import known_family
from pmod_cli.training.run_settings import PARTS, TrainArgs

TOWER_LAYER = re.compile(r"vision_tower\..*layers\.(\d+)\.")


@dataclass
class PartCount:
    """Number of parameters of a part, and how many of them are trained."""

    parameters: int = 0
    trained: int = 0


def part_of(name: str) -> str:
    """Which of ``PARTS`` a parameter belongs to, by its name in the model."""
    if ".router." in name:
        return "router"
    if any(f".{named}." in f".{name}." for family in FAMILIES.values() for named in family.projector):
        return "projector"
    if "vision_tower." in name or ".visual." in name:
        return "vision_tower"
    return "language_model"


def freeze(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Let no gradient reach the parameters of ``parts``; those of the others stay as they are.

    What the vision tower has above the layer whose features are taken never gets a gradient: it is frozen in any case,
    since distributed training waits for each gradient that it expects.

    Args:
        model: a LLaVA, with or without adapters.
    """
    frozen, used = set(parts), _used_tower_layers(model.config)
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen or _above(name, used):
            parameter.requires_grad_(False)


def modules_of(model: nn.Module, parts: Iterable[str], name: str = "") -> list[str]:
    """Names of the largest modules whose parameters are all of one part, for each of ``parts``.

    A list of modules is no module that can be called, so its items are named instead. A parameter that lies beside
    modules of other parts (``image_newline``) is in none.

    Args:
        model: a LLaVA, or the module of it that is called ``name``.
    """
    own = {part_of(f"{name}.{inner}") for inner, _ in model.named_parameters()}
    if own.isdisjoint(parts):
        return []
    if len(own) == 1 and type(model).forward is not nn.Module.forward:
        return [name]
    return [
        found
        for child, module in model.named_children()
        for found in modules_of(module, parts, f"{name}.{child}" if name else child)
    ]


def repeat_in_backward(model: PreTrainedModel, frozen: Iterable[str]) -> None:
    """Gradient checkpointing of the decoder, and of a vision tower that is trained.

    A frozen tower needs no gradient and keeps nothing. Switched on for the whole model, as the Trainer does it, its
    inputs would require gradients too: the tower would be run twice and differentiated for nothing.

    Args:
        model: a LLaVA, with or without adapters.
        frozen: parts that are not trained.
    """
    llava = getattr(model, "get_base_model", lambda: model)().model
    llava.language_model.activation_checkpointing_enable()
    if "vision_tower" not in frozen:
        tower = llava.vision_tower if known_family(llava.config).tiled else llava.visual
        tower.activation_checkpointing_enable()


def _used_tower_layers(config: PretrainedConfig) -> int | None:
    """How many layers of the tower lead to the features; None: all of it."""
    if not known_family(config).tiled:
        return None
    depth = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return max(layer if layer >= 0 else depth + 1 + layer for layer in chosen)


def _above(name: str, used: int | None) -> bool:
    if used is None or part_of(name) != "vision_tower":
        return False
    layer = TOWER_LAYER.search(name)
    return int(layer[1]) >= used if layer else "post_layernorm" in name or ".head." in name


def count(model: nn.Module) -> dict[str, PartCount]:
    """Parameters of each part that the model has; a module that peft trains whole is counted once."""
    counted: dict[str, PartCount] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # beside the copy that is trained, peft keeps the module as it was
            continue
        part = counted.setdefault(part_of(name), PartCount())
        # A 4-bit weight holds two numbers in a byte; DeepSpeed ZeRO-3 leaves an empty one and notes its size.
        number = getattr(parameter, "ds_numel", parameter.numel())
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        number = shape.numel() if shape is not None else number
        part.parameters += number
        part.trained += number if parameter.requires_grad else 0
    return {part: counted[part] for part in PARTS if part in counted}


def parameter_groups(model: nn.Module, train: TrainArgs, decayed: Iterable[str]) -> list[dict]:
    """Optimizer groups of the trained parameters: by part, and within it by weight decay.

    Args:
        train: gives the learning rate of each part and the weight decay.
        decayed: names of the parameters that weight decay applies to.
    """
    decays = set(decayed)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), name in decays), []).append(parameter)
    return [
        {"params": groups[key], "part": key[0], "lr": train.rate(key[0]), "weight_decay": train.weight_decay * key[1]}
        for key in sorted(groups)
    ]


def gathered_alone(model: PreTrainedModel) -> list[str]:
    """Classes whose weights FSDP2 gathers one module at a time: decoder and tower layers.

    accelerate looks for every class that transformers names, and a LLaVA has no CLIP text embeddings.
    """
    return sorted({type(module).__name__ for module in model.modules()}.intersection(model._no_split_modules))


def use_liger(model: PreTrainedModel) -> None:
    """Put the fused RMSNorm, SwiGLU and rotary embedding in place of the decoder's, in this model.

    The Trainer's own switch goes by the model type and passes over p-MoD models without a word. The decoder is a stock
    one as far as these modules go, and the kernel takes the rotary tables that a routed layer gathers for each row.
    Liger's fused loss is left out: it belongs to the language model's own head, which a LLaVA does not call.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    decoder = model.model.language_model
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[decoder.config.model_type]
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=decoder)
