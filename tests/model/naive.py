"""The method written as plainly as possible: one row, one token at a time, float64, no cache, no batch, no gather.

Follows the definitions of docs/method.md, not the code under test; only weights are shared.
"""

import torch
from torch import Tensor

from pmod_cli.model import kept_tokens


def naive_logits(model, embeds: Tensor, vision: Tensor) -> Tensor:
    """Logits of one unpadded row.

    Args:
        model: A p-MoD model in float64.
        embeds: `(N, D)` merged embeddings.
        vision: `(N,)` bool, routed tokens; later text may follow them.
    """
    decoder, config = model.model.language_model, model.config
    x, select_at, ranked = [row for row in embeds], config.settings.select_at, []
    for index, layer in enumerate(decoder.layers):
        weight = _weights(layer, x, vision, config.settings) if getattr(layer, "router", None) is not None else None
        if select_at is None or index in select_at:  # else the last ranking is held
            ranked = _ranked(weight, vision)
        kept = _kept(ranked, vision, config.retention[index])
        keys, values, out = {}, {}, list(x)
        for t in kept:
            normed = _norm(layer.input_layernorm, x[t])
            attention = layer.self_attn
            query = _rotated(_heads(attention.q_proj(normed), attention), t, decoder.config)
            keys[t] = _rotated(_heads(attention.k_proj(normed), attention), t, decoder.config)
            values[t] = _heads(attention.v_proj(normed), attention)
            past = [s for s in kept if s <= t]
            mixed = []
            for head in range(len(query)):
                group = head // attention.num_key_value_groups
                scores = torch.stack([query[head] @ keys[s][group] for s in past]) / attention.head_dim**0.5
                share = scores.softmax(0)
                mixed.append(sum(share[i] * values[s][group] for i, s in enumerate(past)))
            h = x[t] + attention.o_proj(torch.cat(mixed))
            scale = weight[t] if weight is not None and vision[t] else 1.0
            out[t] = h + scale * layer.mlp(_norm(layer.post_attention_layernorm, h))
        for t in set(range(len(x))) - set(kept):
            out[t] = weight[t] * x[t] if config.settings.string and weight is not None else x[t]
        x = out
    return torch.stack([model.lm_head(_norm(decoder.norm, row)) for row in x])


def _weights(layer, x, vision, settings):
    activation, scale, bias = settings.weight_norm
    logits = torch.stack([layer.router(row)[0] for row in x])
    if activation == "softmax":
        active = logits.masked_fill(~vision, float("-inf")).softmax(0)
    else:
        active = {"tanh": logits.tanh(), "sigmoid": logits.sigmoid(), "none": logits}[activation]
    return scale * active + bias


def _ranked(weight, vision) -> list[int]:
    candidates = vision.nonzero().flatten().tolist()
    return candidates if weight is None else sorted(candidates, key=lambda t: (-float(weight[t]), t))


def _kept(ranked, vision, ratio) -> list[int]:
    chosen = set(ranked[: kept_tokens(len(ranked), ratio)])
    return [t for t in range(len(vision)) if not vision[t] or t in chosen]


def _norm(norm, row):
    return norm.weight * row * torch.rsqrt(row.pow(2).mean() + norm.variance_epsilon)


def _heads(flat, attention):
    return flat.view(-1, attention.head_dim)


def _rotated(heads, position, config):
    dim = heads.shape[-1]
    theta = config.rope_parameters["rope_theta"]
    # Stock tables are float32 even in a float64 model: the angle is taken alike, so that only the method is compared.
    inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angle = (inverse * position).repeat(2)
    first, second = heads[..., : dim // 2], heads[..., dim // 2 :]
    return heads * angle.cos().double() + torch.cat([-second, first], dim=-1) * angle.sin().double()


class Float64Norm(torch.nn.Module):
    """The stock RMSNorm casts to float32, which would hide real differences."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def in_float64(model):
    """The model in float64, its decoder norms included."""
    model = model.double()
    decoder = model.model.language_model
    for layer in decoder.layers:
        layer.input_layernorm = Float64Norm(layer.input_layernorm)
        layer.post_attention_layernorm = Float64Norm(layer.post_attention_layernorm)
    decoder.norm = Float64Norm(decoder.norm)
    return model
