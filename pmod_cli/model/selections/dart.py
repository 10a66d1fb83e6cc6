"""DART (Wen et al. 2025, arXiv 2502.11494): a few pivots, and the tokens that are least like them.

Pivots are the four vision tokens and the four text tokens behind the image whose keys have the largest L1 norm
(Section 4.2, K-norm). Each pivot in turn takes an equal share of the tokens that are left, those of least cosine
similarity to it: what resembles a pivot is a duplicate and goes (Section 4.1, Equations 5 and 6). Asked once, in layer
2 of 0 ... L - 1.

The published code takes the keys of the layer before and hidden states under the decoder's final norm; here both are of
the layer that drops: its keys, ahead of it, and its input norm. There the pivots' turns follow a Python set, here the
norm, vision tokens first; it keeps 4 + 8 * (K // 8) tokens, here K: the first pivots take one more where the shares are
not even. It takes one row and one image; here all images of a row are one set, and fewer than eight pivots will do.
"""

import torch
from torch import Tensor, nn

from ..attention_rows import heads
from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection, uncast

PIVOTS = 4  # of either kind


@SELECTIONS.register("dart")
class DartSelection(Selection):
    """Ranks by the pivot that takes a token, then by how unlike it is; the pivots come first."""

    finite = attends = True

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Above 16 for pivots, 0 ... 16 for what they take, the earlier pivot above the later, else -1, `(B, N)`."""
        normed = layer.input_layernorm(hidden_states)
        keys = heads(layer.self_attn, normed, "k", _from_first_token(routing))
        norms = keys.to(torch.promote_types(keys.dtype, torch.float32)).abs().sum(dim=(1, 3))  # (B, N)
        places = torch.arange(norms.shape[1], device=norms.device)
        free = routing.target & routing.alive
        behind = places > routing.last_vision
        kept = torch.tensor(routing.kept(layer.ratio), device=norms.device).unsqueeze(1)  # (B, 1)
        vision, is_vision = _largest(norms, free)
        is_vision &= torch.arange(PIVOTS, device=norms.device) < kept
        text, is_text = _largest(norms, behind & ~routing.target & routing.alive)
        pivots, real = torch.cat([vision, text], dim=1), torch.cat([is_vision, is_text], dim=1)  # (B, P)
        left, turn = kept - is_vision.sum(dim=1, keepdim=True), real.cumsum(dim=1) - 1
        among = real.sum(dim=1, keepdim=True).clamp(min=1)
        shares = torch.where(real, left // among + (turn < left % among), 0)
        first = torch.zeros_like(free).scatter(1, vision, is_vision)
        free = free & ~first
        scores = torch.where(first, norms.new_tensor(20.0), norms.new_tensor(-1.0))
        unit = torch.nn.functional.normalize(normed.to(norms.dtype), dim=-1)
        rows = pivots.unsqueeze(-1).expand(-1, -1, unit.shape[-1])
        with uncast(unit):
            unlike = 1 - unit.gather(1, rows) @ unit.transpose(1, 2)  # (B, P, N), 0 ... 2
        for pivot in range(pivots.shape[1]):
            order = unlike[:, pivot].masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
            takes = torch.zeros_like(free).scatter(1, order, places < shares[:, pivot : pivot + 1]) & free
            scores = torch.where(takes, 2 * (pivots.shape[1] - pivot) - 2 + unlike[:, pivot].clamp(0, 1.99), scores)
            free = free & ~takes
        return scores


def _from_first_token(routing: Routing) -> tuple[Tensor, Tensor]:
    """Rotary tables of the distances to the first real token of each row, `(B, N, d)` each.

    Norms of turned keys depend on where a row begins: padding in front of it would change its pivots.
    """
    tables = routing.position_embeddings
    assert tables is not None  # the layer that is about to choose has given them
    start = (routing.rank_base > -torch.inf).byte().argmax(dim=1)[:, None, None]  # the first of the largest
    cosines, sines = (table.expand(len(start), -1, -1) for table in tables)
    first, turned = (table.gather(1, start.expand(-1, -1, table.shape[-1])) for table in (cosines, sines))
    length = first.square() + turned.square()  # above 1 where a rotary embedding also scales
    return (cosines * first + sines * turned) / length, (sines * first - cosines * turned) / length


def _largest(norms: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the largest norms among some tokens, `(B, 4)`, and which of them are such tokens."""
    masked = torch.nn.functional.pad(norms.masked_fill(~among, -torch.inf), (0, PIVOTS), value=-torch.inf)
    order = masked.argsort(dim=1, descending=True, stable=True)[:, :PIVOTS]
    real = masked.gather(1, order) > -torch.inf
    return torch.where(real, order, 0), real
