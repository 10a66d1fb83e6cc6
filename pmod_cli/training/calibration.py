"""A start for routers that is not a tie: what the stock model looks at, as far as a linear router can tell.

Zero routers tie all vision tokens. The first steps then choose by chance, and the choice swings from step to step
however small the learning rate is, since a ranking knows directions only: in a short run the model never gets a stable
set of tokens to learn from. Here each router starts as a linear regression: which vision tokens are among the K most
attended to in its layer, while the stock weights, with every token kept, read some training batches.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pmod_cli.families.configs import vision_token_ids
from pmod_cli.model import kept_tokens

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
    was_training = model.training
    model.eval()
    model.model.routes = False  # every layer is plain
    with _eager(model):
        for batch in batches:
            vision = torch.isin(batch["input_ids"], torch.tensor(vision_token_ids(config)))  # (B, N)
            with _watch(layers, config.retention, vision, moments):
                model.model(**batch, use_cache=False)
    model.model.routes = True
    model.train(was_training)
    return {i: moments[i].fit(layers[i].router) for i in layers}


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Attention weights exist only in eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _watch(
    layers: dict[int, nn.Module], retention: list[float], vision: Tensor, moments: dict[int, "_Moments"]
) -> Iterator[None]:
    """While this lasts, each layer hands over its residual stream and which of its vision tokens are looked at most."""
    streams: dict[int, Tensor] = {}
    handles = []
    for i, layer in layers.items():

        def enter(module, arguments, i=i):
            streams[i] = arguments[0]

        def attended(module, arguments, output, i=i):
            wanted = _most_attended(output[1], vision, retention[i])
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
        ratio: Retention ratio of the layer.
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

    def fit(self, router: nn.Linear) -> float:
        """Fills the router; returns the correlation of its logits with the target."""
        mean = self.sum / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        features, towards, variance = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
        damping = RIDGE * features.diagonal().mean() * torch.eye(len(features)).to(features)
        direction = torch.linalg.solve(features + damping, towards)
        spread = (direction @ features @ direction).sqrt()
        correlation = float(direction @ towards / (spread * variance.sqrt()))
        direction = direction * SPREAD / spread
        router.weight.copy_(direction.unsqueeze(0))
        router.bias.fill_(-(direction @ mean[:-1]))
        return correlation
