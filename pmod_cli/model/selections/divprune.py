"""DivPrune (Alvar et al. 2025, arXiv 2503.02175): the K tokens that are most unlike each other, before the LLM.

The max-min diversity problem (Section 3.2), greedily: distance is 1 - cosine of projected features; first the token
whose nearest other one is farthest, then always the token whose nearest chosen one is farthest. Text and attention play
no part. Asked in layer 0, where the residual stream still is what the projector gave; all layers hold the choice.

The published code numbers the positions anew (`positions: renumbered`), lets row 0 of a batch decide for all and sees
the first image alone; here positions stay true, rows decide for themselves and all images of a row are one set. It
rounds `ratio * N`, here it is cut; it takes distances in the model's dtype, here in float32 at least.
"""

import torch
from torch import Tensor, nn

from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection, uncast

SAME = 1e-6  # a distance below it is a rounding error


@SELECTIONS.register("divprune")
class DivPruneSelection(Selection):
    """Ranks by the order in which tokens are picked; what is never picked comes behind."""

    finite = True
    looks_ahead = False

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """K for the first pick, 1 for the last, -1 elsewhere, `(B, N)`."""
        candidates = routing.target & routing.alive
        kept, most = routing.kept(layer.ratio), max(row[0] for row in routing.known_counts)
        picks = max(kept)
        places = (~candidates).byte().argsort(dim=1, stable=True)[:, :most]  # (B, V), candidates first
        real = candidates.gather(1, places)
        features = hidden_states.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        features = torch.nn.functional.normalize(features, dim=-1)
        with uncast(features):
            distance = 1 - features @ features.transpose(1, 2)  # (B, V, V)
        # Two tokens that are nearest to each other tie, and so do equal ones (the newlines of anyres): no rounding
        # error may decide.
        distance = torch.minimum(distance, distance.transpose(1, 2))
        twin = (distance < SAME).byte().argmax(dim=2, keepdim=True).expand_as(distance)
        distance = distance.gather(1, twin).gather(2, twin.transpose(1, 2))
        distance.masked_fill_(~real.unsqueeze(1), torch.inf)  # to no token that is none
        itself = torch.eye(most, dtype=torch.bool, device=real.device)
        nearest = distance.masked_fill(itself, torch.inf).amin(dim=2)
        scores = nearest.new_full(nearest.shape, -1.0)
        chosen = ~real
        for pick in range(picks):
            best = nearest.masked_fill(chosen, -torch.inf).argmax(dim=1, keepdim=True)  # (B, 1)
            chosen = chosen.scatter(1, best, True)
            # A row that has no more tokens picks its first again, whose score stays.
            scores.scatter_reduce_(1, best, scores.new_full(best.shape, float(picks - pick)), "amax")
            row = distance.gather(1, best.unsqueeze(-1).expand(-1, -1, most))[:, 0]
            nearest = row if pick == 0 else torch.minimum(nearest, row)
        if min(kept) < picks:  # what a row picked behind its own K, it would not have picked alone
            in_vain = scores <= picks - torch.tensor(kept, device=scores.device).unsqueeze(1)
            scores = scores.masked_fill(in_vain, -1.0)
        return scores.new_full(candidates.shape, -1.0).scatter_(1, places, scores)
