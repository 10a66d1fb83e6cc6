"""The four parts of a LLaVA that are frozen or trained at a rate of their own."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pmod_cli.training.settings import PARTS, TrainArgs

if TYPE_CHECKING:
    from torch import nn


def part_of(name: str) -> str:
    """Which of ``PARTS`` a parameter belongs to, by its name in the model."""
    if ".router." in name:
        return "router"
    if "vision_tower." in name:
        return "vision_tower"
    if "multi_modal_projector." in name or name.endswith("image_newline"):
        return "projector"
    return "language_model"


def freeze(model: "nn.Module", parts: Iterable[str]) -> None:
    """Let gradients reach every parameter outside ``parts``, and none inside."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)


def count(model: "nn.Module") -> dict[str, tuple[int, bool]]:
    """Number of parameters of each part that the model has, and whether they are trained."""
    counted = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        counted[part] = (counted.get(part, (0, False))[0] + parameter.numel(), parameter.requires_grad)
    return {part: counted[part] for part in PARTS if part in counted}


def parameter_groups(model: "nn.Module", train: TrainArgs, decayed: Iterable[str]) -> list[dict]:
    """Optimizer groups of the trained parameters: by part, and within it by weight decay.

    Args:
        model: the model, frozen where it is to be.
        train: gives the learning rate of each part and the weight decay.
        decayed: names of the parameters that weight decay applies to.
    """
    decayed, groups = set(decayed), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), name in decayed), []).append(parameter)
    return [
        {"params": groups[key], "part": key[0], "lr": train.rate(key[0]), "weight_decay": train.weight_decay * key[1]}
        for key in sorted(groups)
    ]
