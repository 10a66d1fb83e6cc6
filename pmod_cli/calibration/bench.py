"""Samples in front of layers, and how far a schedule takes the answers from the stock model's: what a search asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pmod_cli import __version__
from pmod_cli.calibration.asked import AskedBatch
from pmod_cli.calibration.importance import fisher_information, received_attention, target_of
from pmod_cli.calibration.measured import Measured, digest
from pmod_cli.calibration.regression import FOLDS, Moments
from pmod_cli.calibration.replay import Replay, Stream
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings

TARGETS = ("text", "fisher", "attention")


@dataclass(frozen=True)
class Schedule:
    """What each layer keeps, and which layers choose.

    Attributes:
        ratios: Retention ratio of each layer, length L.
        select_at: Layers that choose, ascending; empty where each layer that keeps less than all does.
    """

    ratios: tuple[float, ...]
    select_at: tuple[int, ...] = ()

    def settings(self) -> PmodSettings:
        """The settings of a checkpoint with this schedule."""
        chosen = self.select_at or None
        return PmodSettings(schedule="list", values=self.ratios, select_at=chosen)

    @property
    def choosers(self) -> tuple[int, ...]:
        """Layers that choose, and so have a router."""
        return self.select_at or tuple(layer for layer, ratio in enumerate(self.ratios) if ratio < 1)

    @property
    def retention(self) -> float:
        """Mean ratio over the layers."""
        return sum(self.ratios) / len(self.ratios)

    def served(self, chooser: int) -> list[int]:
        """Layers that keep some tokens by the choice of this one."""
        behind = [layer for layer in self.select_at if layer > chooser]
        end = behind[0] if behind else len(self.ratios)
        return [layer for layer in range(chooser, end) if 0 < self.ratios[layer] < 1] or [chooser]


class CrossFitted(nn.Module):
    """A router of all pictures, and for each fold of them one that was fitted on the others.

    Args:
        make: Makes a router.

    Attributes:
        fold: Of the pictures that are asked now; None asks the router of all.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.whole, self.crossed = make(), nn.ModuleList(make() for _ in range(FOLDS))
        self.fold: int | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `(B, N, 1)` of the residual stream `(B, N, D)`."""
        return (self.whole if self.fold is None else self.crossed[self.fold])(hidden)


class Bench:
    """Answered samples beside what the stock model says to them.

    Where the batches have folds, a fitted router is asked about pictures that it was not fitted on.

    Args:
        replay: The model; its decoder is given schedules and routers in place.
        batches: Rows with the stock model's own answers.
        targets: Which importances are computed, of `TARGETS`.
        folds: Of each batch, below `FOLDS`.
        seed: Of what is drawn.
        measured: Keeps divergences for a run that is stopped; None where nothing has to be kept.
    """

    def __init__(
        self,
        replay: Replay,
        batches: Sequence[AskedBatch],
        targets: Sequence[str] = TARGETS,
        *,
        folds: Sequence[int] = (),
        seed: int = 0,
        measured: Measured | None = None,
    ) -> None:
        self.replay, self.folds, self.measured = replay, folds, measured
        self.routers: dict[int, nn.Module] = {}
        self.apply(Schedule((1.0,) * len(replay)))
        with torch.no_grad():
            self.start = [replay.begin(batch) for batch in batches]
            self.stock = [replay.logits(stream).log_softmax(-1) for stream in self.start]
            self.importance: list[dict[str, Tensor]] = [
                received_attention(replay, stream) if {"text", "attention"} & set(targets) else {}
                for stream in self.start
            ]
        if "fisher" in targets:
            for stream, found in zip(self.start, self.importance, strict=True):
                found["fisher"] = fisher_information(replay, stream, seed=seed)
        self.tokens = sum(len(stream.targets) for stream in self.start)
        self.asked = [tensor for batch in batches for tensor in batch.inputs.values()]

    def apply(
        self, schedule: Schedule, routers: dict[int, nn.Module] | None = None, selection: str = "router", seed: int = 0
    ) -> None:
        """Gives the decoder a schedule, and routers to the layers that choose.

        Args:
            schedule: What each layer keeps.
            routers: By layer.
            selection: What ranks the tokens: `router`, or a control.
            seed: Of a control that draws.
        """
        self.routers = {layer: router for layer, router in (routers or {}).items() if layer in schedule.choosers}
        self.selection = (selection, seed)
        for index, layer in enumerate(self.replay.layers):
            layer.register_module("router", self.routers.get(index))
        self.replay.decoder.apply_settings(schedule.settings())
        if selection != "router":
            self.replay.decoder.set_selection(selection, seed=seed)

    def streams_at(self, layer: int, start: Sequence[Stream] | None = None) -> list[Stream]:
        """Streams of their own in front of a layer, run there under the decoder's schedule.

        Args:
            layer: Where to.
            start: Streams at or in front of it; by default those in front of layer 0.
        """
        with torch.no_grad():
            return [self.replay.advance(stream.fork(), layer) for stream in self._asked(start)]

    def divergence(self, streams: Sequence[Stream] | None = None) -> float:
        """KL of the stock model's answer tokens to those of the decoder's schedule, in nats a token.

        Args:
            streams: Where the pass starts: below that, schedules must not differ.
        """
        return self.judged(streams)[0]

    @torch.no_grad()
    def judged(self, streams: Sequence[Stream] | None = None) -> tuple[float, Tensor, int]:
        """(divergence; the share of each row in it, adding up to it; rows in which no answer token changed).

        A token is unchanged if it is still the likeliest, or was not before. The shares are float64, on the host.

        Raises:
            PmodError: an answer is no number, as where the model's dtype overflows.
        """
        if self.measured is None:
            shares, same = self._judge(streams)
        else:
            shares, same = self.measured(self._key(), lambda: self._judge(streams))
        share = torch.tensor(shares, dtype=torch.float64)
        if not share.isfinite().all():
            dtype = str(self.replay.model.dtype).removeprefix("torch.")
            raise PmodError(
                f"the model's answers are no numbers in {dtype}",
                hint="`dtype=float32`; if it is that already, the weights are damaged",
            )
        return max(0.0, float(share.sum())), share, same

    def _judge(self, streams: Sequence[Stream] | None) -> tuple[list[float], int]:
        shares, same = [], 0
        for stream, stock in zip(self._asked(streams), self.stock, strict=True):
            ours = self.replay.logits(stream).log_softmax(-1)
            tokens = torch.stack(
                [(stock.exp() * (stock - ours)).sum(-1), (ours.argmax(-1) != stock.argmax(-1)).float()]
            )
            rows = torch.zeros(2, len(stream.hidden)).to(tokens).index_add_(1, stream.rows, tokens)
            shares.append(rows[0].cpu().double() / self.tokens)
            same += int((rows[1] == 0).sum())
        return torch.cat(shares).tolist(), same

    @cached_property
    def _about(self) -> str:
        """What the model is asked, and what it answers as it is, tell which model and data these are."""
        return digest(__version__, list(self.folds), tensors=[*self.asked, *self.stock])

    def _key(self) -> str:
        """Of what `judged` would measure now: the samples, the model, what its layers keep, and who chooses."""
        layers = [[each.ratio, each.chosen_at, each.held, each.keep_keys] for each in self.replay.layers]
        routers = [tensor for _, router in sorted(self.routers.items()) for tensor in router.state_dict().values()]
        return digest(self._about, layers, sorted(self.routers), self.selection, tensors=routers)

    def _asked(self, streams: Sequence[Stream] | None) -> Iterator[Stream]:
        """Streams in turn, by default those in front of layer 0, with the routers that were not fitted on them."""
        for place, stream in enumerate(streams or self.start):
            for router in self.routers.values():
                if isinstance(router, CrossFitted):
                    router.fold = self.folds[place] if self.folds else None
            yield stream

    def hidden(self) -> list[float]:
        """For each layer, the divergence with images hidden from it on: text alone goes further. Length L."""
        self.apply(Schedule((1.0,) * len(self.replay)))
        streams, found = [stream.fork() for stream in self.start], []
        for layer in range(len(self.replay)):
            with self.replay.keeping(range(layer, len(self.replay)), 0.0):
                found.append(self.divergence(streams))
            streams = self.streams_at(layer + 1, streams)
        return found

    def thinned(
        self, streams: Sequence[Stream], first: int, ratios: Sequence[float], *, together: int = 1
    ) -> dict[int, dict[float, float]]:
        """For each layer from `first` on, the divergence with that layer alone at each of the ratios.

        What lies below a layer is computed once. The decoder has its schedule and routers.

        Args:
            streams: In front of `first`.
            first: A layer at or in front of which no layer holds an earlier choice.
            ratios: To try.
            together: How many neighbours are changed at once; they are found under the first of them.
        """
        found: dict[int, dict[float, float]] = {}
        streams = [stream.fork() for stream in streams]
        for layer in range(first, len(self.replay), together):
            behind, found[layer] = min(layer + together, len(self.replay)), {}
            for ratio in ratios:
                with self.replay.keeping(range(layer, behind), ratio):
                    found[layer][ratio] = self.divergence(streams)
            streams = self.streams_at(behind, streams)
        return found

    @torch.no_grad()
    def fit(
        self, schedule: Schedule, chooser: int, target: str, streams: Sequence[Stream]
    ) -> tuple[CrossFitted, float, float]:
        """A router for a layer that chooses, from streams in front of it.

        Returns:
            The router, its correlation with the target on pictures left out, and the shrinkage of the ridge.
        """
        moments, served = Moments(), schedule.served(chooser)
        ratio = sum(schedule.ratios[layer] for layer in served) / len(served)
        for place, (stream, importance) in enumerate(zip(streams, self.importance, strict=True)):
            wanted = importance[target][served].sum(dim=0)
            assert stream.routing is not None  # a sample has an image
            for row, vision in enumerate(stream.routing.target):
                fold = self.folds[place] if self.folds else moments.pictures % FOLDS
                moments.add(stream.hidden[row][vision], target_of(target, wanted[row][vision], ratio), fold)
        router = CrossFitted(self._router)
        return router, *moments.fit(router.whole, router.crossed)

    def zero_routers(self, schedule: Schedule) -> dict[int, nn.Module]:
        """Routers as `convert` makes them: all tokens tie."""
        return {layer: self._router() for layer in schedule.choosers}

    def _router(self) -> nn.Module:
        from pmod_cli.model.layer import Router

        like = self.replay.layers[0].input_layernorm.weight
        return Router(like.shape[0], device=like.device, dtype=like.dtype).requires_grad_(False)
