"""Grounding: three losses, in pre-training only, that make reading emerge in minutes on a tiny model.

Plain cross-entropy on answers stays at its priors for a long time. So a projected patch is told what it shows; the
first grounded layer is probed for what a patch belongs to; and two heads of each grounded layer are told to look at
the patches an answer is read from. The probe is thrown away after training, so the saved model is a stock LLaVA-NeXT.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from tests.beds.tiny_llava_next.batches import Batch


class Grounding(nn.Module):
    """Collects what the model computes on its way, by forward hooks, and turns it into the three losses."""

    def __init__(self, model: LlavaNextForConditionalGeneration, settings: Mapping):
        """``settings``: ``layers`` (indices), ``heads`` (how many a layer), and a weight for each loss."""
        super().__init__()
        text = model.config.text_config
        self.settings = settings
        self.probe = nn.Sequential(
            nn.RMSNorm(text.hidden_size, eps=1e-6), nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        )
        self._embedding = [model.get_input_embeddings()]  # in a list: not a part of this module
        self._seen: dict = {}
        decoder = model.model.language_model
        self._hooks = [decoder.register_forward_pre_hook(self._see("embeddings"), with_kwargs=True)]
        for index in settings["layers"]:
            attention = decoder.layers[index].self_attn
            self._hooks.append(attention.register_forward_pre_hook(self._see(index), with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, key: str | int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._seen[key] = (module, kwargs)

        return hook

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the forward pass just done: ``shows``, ``belongs``, ``looks``; scalars, unweighted."""
        embeddings = self._seen["embeddings"][1]["inputs_embeds"]
        shown = batch.shows >= 0
        told = batch.belongs >= 0
        layers = [self._seen[index] for index in self.settings["layers"]]
        context = layers[0][1]["hidden_states"]
        vocabulary = self._embedding[0].weight
        return {
            "shows": F.cross_entropy(embeddings[shown] @ vocabulary.T, batch.shows[shown]),
            "belongs": F.cross_entropy(self.probe(context[told]), batch.belongs[told]),
            "looks": torch.stack([self._looks(batch, attention, seen) for attention, seen in layers]).mean(),
        }

    def _looks(self, batch: Batch, attention: LlamaAttention, seen: dict) -> Tensor:
        """Minus the log of the attention that falls where the answer is, mean over answer tokens and heads."""
        hidden = seen["hidden_states"]
        cos, sin = seen["position_embeddings"]
        heads, width = self.settings["heads"], attention.head_dim
        B, N, _ = hidden.shape

        def project(linear: nn.Linear) -> Tensor:
            return F.linear(hidden, linear.weight[: heads * width]).view(B, N, heads, width).transpose(1, 2)

        queries, keys = apply_rotary_pos_emb(project(attention.q_proj), project(attention.k_proj), cos, sin)
        row, position = batch.answers.unbind(1)
        # index_select, not keys[row]: with several threads the latter's gradient is summed in any order.
        scores = torch.einsum("qhd,qhnd->qhn", queries[row, :, position], keys.index_select(0, row)) * attention.scaling
        later = torch.arange(N) > position[:, None]
        scores = scores.masked_fill(later[:, None], float("-inf"))
        there = scores.masked_fill(~batch.looked_at[:, None], float("-inf"))
        return (scores.logsumexp(-1) - there.logsumexp(-1)).mean()
