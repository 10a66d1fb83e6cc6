"""Grounding: losses, in pre-training only, that make reading emerge in minutes on a tiny model.

Plain cross-entropy on answers stays at its priors for a long time. So an early layer is probed for what a patch shows;
the first layer that looks, for what a patch belongs to and what stands above it; a head of each grounded layer is told
where to look, early ones from the words of a question and late ones from the answer; and between the two, the words of
a question are probed for what they have found. The probes are thrown away after training, so the saved model is a stock
one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from tests.beds.tiny_llava_next.batches import LOOKS, PROBED, Batch, LookUps

LOSSES = (*PROBED, "looks")


class Grounding(nn.Module):
    """Collects what the model computes on its way, by forward hooks, and turns it into the losses."""

    def __init__(self, model: PreTrainedModel, settings: Mapping):
        """``settings``: the heads that look, a list of layer and head for each of ``LOOKS``; ``shown``, ``probed`` and
        ``sought``, the layers before which patches, words and answers are probed; and a weight for each of ``LOSSES``.
        What has no heads or no weight is left out."""
        super().__init__()
        text = model.config.text_config
        self.settings = settings
        shown, early, late = settings["shown"], min(layer for layer, _ in settings["first"]), settings["probed"]
        before = {"shows": shown, "tells": late, "more": late, "seeks": settings.get("sought", late)}
        self.probed = {name: before.get(name, early) for name in PROBED if name in settings}  # before which layer
        self.heads = [(name, layer, head) for name in LOOKS for layer, head in settings.get(name, ())]
        self.probes = nn.ModuleDict({name: _probe(text) for name in self.probed})
        self._seen: dict = {}
        self._hooks = []
        decoder = model.model.language_model
        self.layers = {*self.probed.values(), *(layer for _, layer, _ in self.heads)}
        for index in self.layers:
            attention = decoder.layers[index].self_attn
            self._hooks.append(attention.register_forward_pre_hook(self._see(index), with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._seen[layer] = (module, kwargs)

        return hook

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the forward pass just done: each of ``LOSSES`` that has a weight; scalars, unweighted."""
        losses = {
            name: self._probed(name, self._seen[layer][1]["hidden_states"], getattr(batch, name))
            for name, layer in self.probed.items()
        }
        looks = [self._looks(getattr(batch, name), *self._seen[layer], head) for name, layer, head in self.heads]
        return losses | {"looks": torch.stack(looks).mean()}

    def _probed(self, name: str, hidden: Tensor, words: Tensor) -> Tensor:
        """How badly the hidden states (B, N, D) tell ``words`` (B, N); 0 where a batch has none."""
        told = words >= 0
        if not told.any():
            return hidden.new_zeros(())
        return F.cross_entropy(self.probes[name](hidden[told].float()), words[told])

    def _looks(self, looks: LookUps, attention: LlamaAttention, seen: dict, head: int) -> Tensor:
        """Minus the log of the attention of one head that falls where it should, mean over the look-ups."""
        hidden = seen["hidden_states"]
        if not len(looks.tokens):
            return hidden.new_zeros(())
        cos, sin = seen["position_embeddings"]
        width = attention.head_dim
        N = hidden.shape[1]

        def project(which: str) -> Tensor:
            weight = getattr(attention, f"{which}_proj").weight[head * width : (head + 1) * width]
            norm = getattr(attention, f"{which}_norm", nn.Identity())  # Qwen3 has one for each head
            return norm(F.linear(hidden, weight))[:, None]

        queries, keys = apply_rotary_pos_emb(project("q"), project("k"), cos, sin)
        row, position = looks.tokens.unbind(1)
        # index_select, not keys[row]: with several threads the latter's gradient is summed in any order.
        scores = torch.einsum("qd,qnd->qn", queries[row, 0, position], keys[:, 0].index_select(0, row))
        scores = scores.float() * attention.scaling
        scores = scores.masked_fill(torch.arange(N, device=position.device) > position[:, None], float("-inf"))
        there = scores.masked_fill(~looks.looked_at, float("-inf"))
        return (scores.logsumexp(-1) - there.logsumexp(-1)).mean()


def _probe(text) -> nn.Module:
    return nn.Sequential(
        nn.RMSNorm(text.hidden_size, eps=1e-6), nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    )
