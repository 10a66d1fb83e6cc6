"""A start for routers that is not a tie: what the stock model looks at, as far as a linear router can tell.

Zero routers tie all vision tokens. The first steps then choose by chance, and the choice swings from step to step
however small the learning rate is, since a ranking knows directions only: in a short run the model never gets a stable
set of tokens to learn from. Here each router starts as a linear regression while the stock weights, with every token
kept, read some training batches. `attention`: which vision tokens are among the K most attended to in its layer, K the
mean of what the layers keep that its choice serves.
`calibrated`: how much text attends to each token in the layers that the choice serves, fitted as `pmod calibrate` does.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pmod_cli.calibration.bench import Schedule
from pmod_cli.calibration.regression import FOLDS, Moments
from pmod_cli.calibration.regression import SPREAD as CALIBRATED_SPREAD
from pmod_cli.families.configs import vision_token_ids
from pmod_cli.model import kept_tokens
from pmod_cli.model.configuration import RoutedConfig
from pmod_cli.model.layer import Router

RIDGE = 1e-2  # of the mean feature variance
SPREAD = 0.25  # standard deviation of the calibrated logits: under tanh, weights start within about 5 % of 1


@torch.no_grad()
def calibrate_routers(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[int, float]:
    """Sets the routers of a p-MoD model, in place, from what its layers attend to.

    Args:
        model: A p-MoD model whose other weights are trained.
        batches: Inputs of the model with images, `input_ids` `(B, N)` padded on the right.

    Returns:
        By layer, the correlation of the routers' logits with being among the K most attended to, on the same batches.
    """
    config = model.config
    layers = {i: model.model.language_model.layers[i] for i in config.routed_layers}
    moments = {i: _Moments() for i in layers}
    # A layer that chooses for others may itself keep everything.
    ratios = {i: sum(config.retention[j] for j in group) / len(group) for i, group in _served(config).items()}
    with _plain(model):
        for batch in batches:
            vision = _vision(batch["input_ids"], config)  # (B, N)
            with _watch(layers, ratios, vision, moments):
                model.model(**_inputs(batch), use_cache=False)
    return {i: moments[i].fit(layers[i].router) for i in layers}


@torch.no_grad()
def fit_routers(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[int, float]:
    """Sets the routers of a p-MoD model, in place, as `pmod calibrate` fits them for a schedule that is given.

    Their logits have the spread that a start of training needs: a direction smaller than an optimizer's step is lost.

    Args:
        model: A p-MoD model whose other weights are trained.
        batches: Inputs of the model with images, `input_ids` and `attention_mask` `(B, N)` padded on the right.

    Returns:
        By layer, the correlation of the routers' logits with their target, on pictures left out of the fit.
    """
    config, layers = model.config, model.model.language_model.layers
    served = _served(config)
    moments = {i: Moments() for i in served}
    seen: dict[int, Tensor] = {}
    received: dict[int, Tensor] = {}
    text = vision = torch.empty(0)

    def watch(i: int) -> None:
        def attended(module, arguments, output):
            received[i] = (output[1] * text[:, None, :, None]).tril(-1).amax(dim=(1, 2)).float()

        handles.append(layers[i].self_attn.register_forward_hook(attended))

    handles = [
        layers[i].register_forward_pre_hook(lambda module, arguments, i=i: seen.update({i: arguments[0]}))
        for i in served
    ]
    try:
        for i in {i for group in served.values() for i in group}:
            watch(i)
        with _plain(model):
            for batch in batches:
                vision = _vision(batch["input_ids"], config)  # (B, N)
                text = batch["attention_mask"].bool() & ~vision
                model.model(**_inputs(batch), use_cache=False)
                for i, group in served.items():
                    wanted = torch.stack([received[layer] for layer in group]).sum(dim=0)
                    for row, places in enumerate(vision):
                        if places.any():
                            moments[i].add(seen[i][row, places], wanted[row, places], moments[i].pictures % FOLDS)
    finally:
        for handle in handles:
            handle.remove()
    found = {i: moments[i].fit(layers[i].router)[0] for i in served}
    for i in served:
        for parameter in layers[i].router.parameters():
            parameter *= SPREAD / CALIBRATED_SPREAD
    return found


STARTS = {"attention": calibrate_routers, "calibrated": fit_routers}
"""By the name that `model.router_start` has for it."""


def _served(config: RoutedConfig) -> dict[int, list[int]]:
    """By layer with a router, the layers that keep some tokens by its choice."""
    schedule = Schedule(tuple(config.retention), tuple(config.settings.select_at or ()))
    return {i: schedule.served(i) if schedule.select_at else [i] for i in config.routed_layers}


def _vision(ids: Tensor, config: RoutedConfig) -> Tensor:
    """Which of the tokens `(B, N)` stand for images or videos, bool on their device."""
    return torch.isin(ids, torch.tensor(vision_token_ids(config), device=ids.device))


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model is run with: rows are padded on the right, where a causal decoder does not look."""
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Every layer is plain, in eval mode, and with eager attention: others have no attention weights."""
    before, was_training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation("eager")
    model.model.routes = False
    try:
        yield
    finally:
        model.model.routes = True
        model.set_attn_implementation(before)
        model.train(was_training)


@contextmanager
def _watch(
    layers: dict[int, nn.Module], ratios: dict[int, float], vision: Tensor, moments: dict[int, "_Moments"]
) -> Iterator[None]:
    """While this lasts, each layer hands over its residual stream and which of its vision tokens are looked at most."""
    streams: dict[int, Tensor] = {}
    handles = []
    for i, layer in layers.items():

        def enter(module, arguments, i=i):
            streams[i] = arguments[0]

        def attended(module, arguments, output, i=i):
            wanted = _most_attended(output[1], vision, ratios[i])
            moments[i].add(streams.pop(i)[vision], wanted[vision])

        handles += [layer.register_forward_pre_hook(enter), layer.self_attn.register_forward_hook(attended)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _most_attended(attention: Tensor, vision: Tensor, ratio: float) -> Tensor:
    """`(B, N)` bool: the K vision tokens of each row that some later token reads most, in its most attentive head.

    Args:
        attention: `(B, heads, N, N)` probabilities, queries before keys.
        vision: `(B, N)` bool.
        ratio: K is this share of them.
    """
    received = attention.tril(-1).amax(dim=(1, 2))  # (B, N), a token's look at itself left out
    rank = received.masked_fill(~vision, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = [kept_tokens(num_vision, ratio) for num_vision in vision.sum(dim=1).tolist()]
    return rank < torch.tensor(kept, device=rank.device).unsqueeze(-1)


class _Moments:
    """Sums over tokens that a ridge regression needs, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.outer = torch.zeros((), dtype=torch.float64)

    def add(self, stream: Tensor, target: Tensor) -> None:
        """`(T, D)` and `(T,)`."""
        joint = torch.cat([stream, target.unsqueeze(-1).to(stream)], dim=1).double()
        self.count += len(joint)
        self.sum = self.sum + joint.sum(dim=0)
        self.outer = self.outer + joint.T @ joint

    def fit(self, router: Router) -> float:
        """Fills the router; returns the correlation of its logits with the target.

        Where all tokens are wanted, or none, nothing is to be learned: the router stays at zero.
        """
        mean = self.sum / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        features, towards, variance = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
        damping = RIDGE * features.diagonal().mean() * torch.eye(len(features)).to(features)
        direction = torch.linalg.solve(features + damping, towards)
        spread = (direction @ features @ direction).sqrt().clamp(min=1e-12)
        correlation = float(direction @ towards / (spread * variance.sqrt()).clamp(min=1e-12))
        direction = direction * SPREAD / spread
        router.weight.copy_(direction.unsqueeze(0))
        router.bias.fill_(-(direction @ mean[:-1]))
        return correlation
