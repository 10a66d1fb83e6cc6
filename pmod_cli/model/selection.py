"""What decides which K vision tokens a layer keeps, as a protocol.

A selection is one class, registered by name, that returns scores. What always holds is seen to here and in
`Routing.gather_plan`: text is kept, K is exact, padding comes last, equal scores go to the lowest position, and a row
of a batch gets what it would get alone. It is asked at the layers of `PmodSettings.select_at`; the layers up to the
next one hold its ranking, each with a K of its own.

Other packages add theirs with `SELECTIONS.register(name)` or an entry point of the group `pmod_cli.selections`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .registry import BadPlugin
from .routing import Routing


class Selection:
    """Base class. One object serves a model; it must keep nothing of a prefill.

    Args:
        seed: Of selections that draw.

    Attributes:
        finite: Whether `scores` never holds NaN or infinite values. Where it may, they are replaced, at a cost of one
            operator: NaN and -inf rank last of the vision tokens, +inf first.
        attends: Whether it reads rotary tables, so that it can be asked only inside the decoder.
        in_tower: A method where it also works in the vision tower, `(TowerLayer, share, packed)` to the patches
            `(T, P, D)` in the place of the layer's own and their ranks `(T, P)`, which are at hand as `routing.ranks`;
            with `packed` the kept ones stand in front. See `model/tower.py`.
        looks_ahead: Whether a score may depend on tokens behind its own, such as the question. Where it does not, a
            conversation goes on from the cache as if it had been computed from its start.
    """

    finite = False
    attends = False
    in_tower: Callable[..., tuple[Tensor, Tensor]] | None = None
    looks_ahead = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Scores of one layer's tokens, higher is kept; those of text and padding are ignored.

        A row's scores may depend on that row alone, and not on how many rows or how much padding stand beside it.

        Args:
            hidden_states: `(B, N, D)`, the residual stream in front of the layer.
            routing: Of the prefill: `target` (which tokens are vision tokens), `counts`, `ordinals`, `alive` (real
                tokens that were not dropped for good), `last` (the last real token), `weights` (the router's, None in
                a layer without one), `position_embeddings` (rotary tables).
            layer: The decoder layer: `ratio`, `self_attn`, `input_layernorm`, `self_attn.layer_idx` and so on.

        Returns:
            `(B, N)`, float, without a gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores")

    def order(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Positions of each row's tokens as a layer ranks them: text, vision tokens from the best, padding.

        Returns:
            `(B, N)` int64.

        Raises:
            BadPlugin: The scores are no tensor, or have another shape than `(B, N)`.
        """
        scores = self.scores(hidden_states, routing, layer)
        if not isinstance(scores, Tensor) or scores.shape != routing.target.shape:
            found = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            expected = f"a tensor of shape {tuple(routing.target.shape)}"
            raise BadPlugin(f"the scores of {type(self).__name__} are {found}, expected {expected}")
        scores = scores.detach()
        if not self.finite:
            scores = scores if scores.is_floating_point() else scores.to(routing.rank_base.dtype)
            most = torch.finfo(scores.dtype).max
            scores = scores.nan_to_num(nan=-most, posinf=most, neginf=-most)
        # Stable, so that ties go to the lowest position: `topk` promises no order among them.
        base = routing.rank_base if routing.standing is None else routing.standing
        return (scores + base).argsort(dim=1, descending=True, stable=True)


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether the vision tokens that a LLaVA keeps may depend on what stands behind them: the question, or padding.

    Args:
        model: Stock or p-MoD, without adapters around it.
    """
    decoder = getattr(model.model, "language_model", None)
    used = [getattr(decoder, "selection", None), *(getattr(decoder, "before", None) or ())[:1]]
    return any(selection is not None and selection.looks_ahead for selection in used)


def uncast(states: Tensor) -> torch.autocast:
    """Autocast off while it lasts: it would make products of float32 in bfloat16, and training keep other tokens."""
    return torch.autocast(states.device.type, enabled=False)
