"""Ridge regression of what a token matters on its hidden state: a router's direction, from sums over tokens.

Routers rank the tokens of one picture, so features and targets are taken from the picture's mean. Features are scaled
to a standard deviation of one: a few dimensions of a residual stream are a hundred times larger than the others. How
much to shrink is chosen by how well a part of the pictures predicts the rest.

What is chosen with a router in place must not be judged on the pictures that it was fitted on: there it ranks better
than on others. So the pictures have folds, and each fold has a router that was fitted on the other folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pmod_cli.model.layer import Router

SHRINKAGE = tuple(10.0**exponent for exponent in range(-4, 4))  # of the variance of a scaled feature
FOLDS = 4
SPREAD = 2e-3  # standard deviation of the logits: under tanh and alpha = 0.2, weights are 1 to 1e-3


@dataclass
class Moments:
    """Sums over the vision tokens of pictures, float64, for each fold; on the host where the device has no float64."""

    count: list[int] = field(default_factory=lambda: [0] * FOLDS)
    outer: list[Tensor | float] = field(default_factory=lambda: [0.0] * FOLDS)
    mean: list[Tensor | float] = field(default_factory=lambda: [0.0] * FOLDS)
    pictures: int = 0

    def add(self, hidden: Tensor, target: Tensor, fold: int) -> None:
        """The tokens of one picture.

        Args:
            hidden: `(V, D)`, their residual stream.
            target: `(V,)`, larger is more important; only the order and distances within a picture count.
            fold: Of the picture, below `FOLDS`.
        """
        joint = torch.cat([hidden.float(), target.float()[:, None]], dim=1)
        centre = joint.mean(dim=0)
        joint = joint - centre
        self.pictures += 1
        self.count[fold] += len(joint)
        device = joint.device if joint.is_cuda else "cpu"  # other accelerators have no float64
        self.outer[fold] = self.outer[fold] + (joint.T @ joint).to(device, torch.float64)
        self.mean[fold] = self.mean[fold] + centre.to(device, torch.float64)

    def fit(self, router: Router, crossed: Sequence[Router] = ()) -> tuple[float, float]:
        """Fills the router; returns its correlation with the target on pictures left out, and the shrinkage.

        The bias centres the logits, so that weights lie about 1.

        Args:
            router: Is fitted on all pictures.
            crossed: One for each fold, fitted on the others with the same shrinkage.
        """
        folds = [fold for fold in range(FOLDS) if self.count[fold]]
        whole: Tensor = sum(self.outer[fold] for fold in folds)  # of one picture at least
        scale = (whole.diagonal() / sum(self.count)).sqrt().clamp(min=1e-12)
        found = torch.zeros(len(SHRINKAGE)).to(whole)
        if len(folds) > 1:
            for fold in folds:
                found += self._left_out(whole - self.outer[fold], self.outer[fold], scale) / len(folds)
        best = int(found.argmax()) if len(folds) > 1 else len(SHRINKAGE) // 2
        summed: Tensor = sum(self.mean[fold] for fold in folds)
        mean = summed[:-1] / self.pictures
        others = [whole - self.outer[fold] if folds != [fold] else whole for fold in range(len(crossed))]
        for filled, outer in zip((router, *crossed), (whole, *others), strict=True):
            direction = _solutions(outer, scale, (SHRINKAGE[best],))[0]
            spread = (direction @ whole[:-1, :-1] @ direction / sum(self.count)).sqrt().clamp(min=1e-12)
            filled.weight.copy_((direction * SPREAD / spread).unsqueeze(0))
            filled.bias.fill_(-float(filled.weight[0].to(mean) @ mean))
        return float(found[best]), SHRINKAGE[best]

    def _left_out(self, fitted: Tensor, unseen: Tensor, scale: Tensor) -> Tensor:
        """Correlation with the target on a fold that was not fitted, for each shrinkage."""
        directions = _solutions(fitted, scale, SHRINKAGE)
        hits = directions @ unseen[:-1, -1]
        norms = ((directions @ unseen[:-1, :-1]) * directions).sum(dim=1) * unseen[-1, -1]
        return hits / norms.sqrt().clamp(min=1e-30)


def _solutions(outer: Tensor, scale: Tensor, shrinkage: tuple[float, ...]) -> Tensor:
    """`(len(shrinkage), D)`: directions in the unscaled features."""
    scaled = outer / scale[:, None] / scale[None]
    scaled = scaled / max(float(scaled[:-1, :-1].diagonal().mean()), 1e-30)
    features, towards = scaled[:-1, :-1], scaled[:-1, -1:]
    identity = torch.eye(len(features)).to(features)
    # A Cholesky factor for each is a tenth of the work of one eigendecomposition.
    found = [torch.cholesky_solve(towards, torch.linalg.cholesky(features + each * identity)) for each in shrinkage]
    return torch.cat(found, dim=1).T / scale[:-1]
