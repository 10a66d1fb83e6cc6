"""The models that are asked: checked by their configuration first, then loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import printable
from pmod_cli.families.configs import known_family
from pmod_cli.visualization.record import parse_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from pmod_cli.checkpoints import Resolved


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be asked.

    Attributes:
        name: what pictures call it.
        router_state: "stock" for a model whose attention is read, instead of a router's choice.
        selection: what chooses its tokens; None is the checkpoint's own.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    router_state: str
    selection: str | None = None


def check_checkpoint(found: Resolved, name: str, *, layers: str, parts: str) -> None:
    """Can this checkpoint be drawn? Read from its configuration alone.

    Raises:
        PmodError: a stock LLaVA, of which there is nothing to draw; layers or parts that the model does not have.
    """
    from pmod_cli.checkpoints import router_state

    if router_state(found.path) == "stock":
        raise PmodError(
            f"{name} is a stock LLaVA: each of its layers processes every token, so there is no selection to draw",
            hint=f"pmod convert {name}",
        )
    config = _config(found.path)
    parse_layers(layers, config.text_config.num_hidden_layers)
    if parts in ("base", "tiles") and not (family := known_family(config)).high_resolution:
        raise PmodError(f"`parts={parts}`: {name} is a {family.title}, which sees one picture", hint="`parts=separate`")


def check_pair(first: Resolved, second: Resolved) -> None:
    """Raises PmodError where two checkpoints have different numbers of layers."""
    depths = [_config(found.path).text_config.num_hidden_layers for found in (first, second)]
    if depths[0] != depths[1]:
        raise PmodError(
            f"{first.path} has {depths[0]} layers and {second.path} {depths[1]}: nothing can be compared",
            hint="compare checkpoints of the same stock model",
        )


def load_checkpoint(found: Resolved, name: str, *, dtype: str, device: str) -> LoadedModel:
    """Load a checkpoint; a stock one with eager attention, the only kind that gives its maps away."""
    from pmod_cli.checkpoints import load_model, router_state

    state = router_state(found.path)
    attention = "eager" if state == "stock" else "sdpa"
    model, processor = load_model(found.path, dtype=dtype, device=device, attn_implementation=attention)
    shown = found.path.resolve().name if found.origin == "folder" else name
    return LoadedModel(printable(shown), model, processor, state)


def _config(path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    import pmod_cli.model.configuration  # noqa: F401 - registers the p-MoD configurations

    return AutoConfig.from_pretrained(path, local_files_only=True)
