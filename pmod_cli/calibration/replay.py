"""A decoder run layer by layer: what lies below a layer is computed once, however often the rest is tried.

The layers are the p-MoD layers themselves, so what is measured here is what a p-MoD model computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmod_cli.calibration.asked import AskedBatch
from pmod_cli.data.rendered import IGNORED
from pmod_cli.families import family_of
from pmod_cli.model import PmodSettings, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOBODY = -1  # stands for the layer that chooses where none does: tokens in the order of their positions


@dataclass
class Stream:
    """One batch in front of one layer.

    Attributes:
        layer: Index of the layer that comes next.
        hidden: `(B, N, D)`, the residual stream in front of it.
        routing: What the layers share; None without vision tokens.
        tables: Rotary tables, `(1, N, d)` each.
        predicts: `(B, N)` bool, the tokens that an answer token follows; A in all.
        targets: `(A,)` int64, these answer tokens.
        rows: `(A,)` int64, the row of each in the batch.
        deepstack: `(B, N, D)` each, what the model adds to the residual stream behind its first layers (DeepStack):
            features in the places of vision tokens, else zero.
    """

    layer: int
    hidden: Tensor
    routing: Routing | None
    tables: tuple[Tensor, Tensor]
    predicts: Tensor
    targets: Tensor
    rows: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def behind(self, layer: int, hidden: Tensor) -> Tensor:
        """The residual stream `(B, N, D)` behind a layer, of what the layer has left there."""
        return hidden + self.deepstack[layer] if layer < len(self.deepstack) else hidden

    def fork(self, *, layer: int | None = None, hidden: Tensor | None = None) -> Stream:
        """A stream of its own from here on: choices that its layers make are not seen by this one."""
        routing = self.routing
        if routing is not None:
            routing = replace(routing, weights=None, _orders=dict(routing._orders), _plans={})
        return replace(
            self,
            layer=self.layer if layer is None else layer,
            hidden=self.hidden if hidden is None else hidden,
            routing=routing,
        )


class _Reached(Exception):
    """The first layer has been called."""


class Replay:
    """A model whose decoder can be run from any layer on.

    Args:
        model: A LLaVA, stock or p-MoD, in eval mode and with SDPA attention. A stock decoder gets p-MoD layers in its
            place, which keep every token and so compute what they did.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from pmod_cli.model.decoder import RoutedDecoder

        self.model, self.decoder = model, model.model.language_model
        self.layers = self.decoder.layers
        if not isinstance(self.decoder, RoutedDecoder):
            self.keep_all()

    def __len__(self) -> int:
        """L, decoder layers."""
        return len(self.layers)

    def keep_all(self) -> None:
        """Makes the model the stock one: every layer keeps every token, and routers are gone.

        Nothing is left of the settings that a p-MoD model came with: which vision tokens it routes, and what ranks
        them in its tower, is said in front of the decoder.
        """
        from pmod_cli.model.decoder import route_layers
        from pmod_cli.model.modeling import RoutedModel

        settings = PmodSettings(schedule="list", values=(1.0,) * len(self))
        route_layers(self.decoder, settings)
        if isinstance(self.model.model, RoutedModel):
            self.model.model.apply_settings(settings)

    def begin(self, batch: AskedBatch) -> Stream:
        """A batch in front of layer 0, as the model itself puts it there."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.inputs.items()}
        labels, ids = inputs.pop("labels"), inputs["input_ids"]
        front = self._front(inputs)
        routing = front.get("routing")
        if routing is None and "pixel_values" in inputs:  # of a stock model
            family = family_of(self.model.config.model_type)
            assert family is not None  # of a model that was loaded
            own = [ids == getattr(self.model.config, token) for token in family.vision_tokens]
            vision = torch.stack(own).any(dim=0)
            routing = Routing.build(vision, inputs["attention_mask"])
        if routing is not None:
            routing.hold(NOBODY, routing.rank_base.argsort(dim=1, descending=True, stable=True))
        predicts = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
        return Stream(
            layer=0,
            hidden=front["hidden_states"],
            routing=routing if routing is not None and routing.any_target else None,
            tables=front["position_embeddings"],
            predicts=predicts,
            targets=labels[:, 1:][predicts[:, :-1]],
            rows=predicts.nonzero()[:, 0],
            deepstack=front["deepstack"],
        )

    def _front(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What layer 0 is called with; nothing behind that is computed."""
        found: dict[str, Any] = {}

        def note_deepstack(decoder, arguments, named):
            features, places = named.get("deepstack_visual_embeds") or (), named.get("visual_pos_masks")
            blank = named["inputs_embeds"].new_zeros(()).expand(named["inputs_embeds"].shape)
            found["deepstack"] = tuple(blank.masked_scatter(places[..., None], each.to(blank)) for each in features)

        def stop(layer, arguments, named):
            found.update(named | ({"hidden_states": arguments[0]} if arguments else {}))
            raise _Reached

        handles = [self.decoder.register_forward_pre_hook(note_deepstack, with_kwargs=True)]
        handles.append(self.layers[0].register_forward_pre_hook(stop, with_kwargs=True))
        try:
            self.model(**inputs, use_cache=False)
        except _Reached:
            return found
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError("the model has not called its first layer")

    def advance(self, stream: Stream, to: int | None = None) -> Stream:
        """Runs a stream, in place, up to the layer `to`, by default by one layer."""
        for index in range(stream.layer, stream.layer + 1 if to is None else to):
            # Padding stands at the right and attention is causal, so no layer needs a mask.
            left = self.layers[index](
                stream.hidden,
                attention_mask=None,
                position_embeddings=stream.tables,
                routing=stream.routing,
                use_cache=False,
            )
            stream.hidden, stream.layer = stream.behind(index, left), index + 1
        return stream

    def logits(self, stream: Stream, *, layer: int | None = None, hidden: Tensor | None = None) -> Tensor:
        """`(A, vocabulary)` float32 or float64: runs the rest of the decoder beside the stream, which stays as it is.

        Args:
            stream: Where to start.
            layer: The next layer, if another than the stream's.
            hidden: `(B, N, D)`, the residual stream in front of it, if another than the stream's.
        """
        end = self.advance(stream.fork(layer=layer, hidden=hidden), len(self))
        logits = self.model.lm_head(self.decoder.norm(end.hidden[end.predicts]))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextmanager
    def keeping(self, layers: Iterable[int], ratio: float) -> Iterator[None]:
        """While this lasts, these layers keep `ratio` of the vision tokens.

        Which ones, is said by the layer that chooses for them; without one, the first ones are kept.
        """
        chosen = [self.layers[index] for index in layers]
        before = [(layer, layer.ratio, layer.selects, layer.chosen_at, layer.keep_keys) for layer in chosen]
        try:
            for layer in chosen:
                layer.ratio, layer.selects, layer.keep_keys = ratio, ratio < 1, False
                layer.chosen_at = NOBODY if layer.chosen_at is None else layer.chosen_at
            yield
        finally:
            for layer, layer.ratio, layer.selects, layer.chosen_at, layer.keep_keys in before:  # noqa: B007 - restores
                pass


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`(A,)`: minus the log-likelihood of each answer token, in nats."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
