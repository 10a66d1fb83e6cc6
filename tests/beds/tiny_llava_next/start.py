"""What training starts from: the trained layers of the bundled model's predecessor, split into parts.

The predecessor had 32 layers too, but was grown from 16 by blocks that stayed idle. Here its idle layers go, and each
useful one is split into several in a row: a part keeps some of the heads and some of the units of the MLP, and its
other heads and units start anew with outputs of zero. So the parts in a row do what the layer did, but for what each
now sees of the ones before it, and no part is idle. Measured: only the very first layer cannot be split like this.
"""

import copy
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

ROOT = Path(__file__).parents[3]


def fetch(start: Mapping, folder: Path) -> Path:
    """Take the predecessor from the history of this repository; ``start`` names commit, folder and files.

    Raises:
        RuntimeError: the commit is not there, as in a shallow clone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in start["files"]:
        command = ["git", "-C", str(ROOT), "show", f"{start['commit']}:{start['folder']}/{name}"]
        shown = subprocess.run(command, capture_output=True)
        if shown.returncode:
            raise RuntimeError(
                f"cannot take {name} of the start weights from git: {shown.stderr.decode().strip()}\n"
                "in a shallow clone, `git fetch --unshallow` brings the history"
            )
        (folder / name).write_bytes(shown.stdout)
    return folder


def start_model(recipe: Mapping, processor: LlavaNextProcessor, out: Path) -> LlavaNextForConditionalGeneration:
    """The predecessor, split, with room for the words it did not know, float32; the caller seeds torch."""
    start = recipe["start"]
    folder = fetch(start, out / "start")
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=True)
    split(model, start["split"])
    shrink(model, start["shrink"])
    return model


def split(model: LlavaNextForConditionalGeneration, parts: Sequence[tuple[int, int]]) -> None:
    """Replace layers in place, each of ``parts`` (layer and number of parts); a layer that is not named goes."""
    decoder = model.model.language_model
    layers = [_part(decoder.layers[index], part, count) for index, count in parts for part in range(count)]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    decoder.layers = nn.ModuleList(layers)
    for config in (model.config.text_config, decoder.config):
        config.num_hidden_layers = len(layers)


def _part(layer: nn.Module, part: int, count: int) -> nn.Module:
    """Part number ``part`` of ``count``. The last heads go to the first part, so the first heads look the latest."""
    if count == 1:
        return layer
    new = copy.deepcopy(layer)
    attention, mlp = new.self_attn, new.mlp
    attention.config = layer.self_attn.config  # not a copy: one setting holds for all layers
    width = attention.head_dim
    heads = attention.o_proj.in_features // width
    units = mlp.down_proj.in_features
    head = (heads - 1 - torch.arange(heads)) * count // heads != part
    unit = torch.arange(units) * count // units != part
    _start_anew(head.repeat_interleave(width), (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj)
    _start_anew(unit, (mlp.gate_proj, mlp.up_proj), mlp.down_proj)
    return new


def _start_anew(where: torch.Tensor, inputs: tuple[nn.Linear, ...], output: nn.Linear) -> None:
    """Give the hidden features of ``where`` random inputs and no output."""
    for linear in inputs:
        linear.weight.data[where] = torch.randn(int(where.sum()), linear.in_features) * linear.in_features**-0.5
    output.weight.data[:, where] = 0.0


def shrink(model: LlavaNextForConditionalGeneration, factor: float) -> None:
    """Multiply all that is added to the residual stream by ``factor``, in place.

    Each layer normalises what it reads, so nothing changes but the size of a step relative to what is there: the
    predecessor's stream had grown to an rms of 200, where a layer's new contribution is lost. The token that ends a row
    of patches keeps its size.
    """
    decoder = model.model.language_model
    outputs = [linear for layer in decoder.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    projector = model.model.multi_modal_projector.linear_2
    for weight in [model.get_input_embeddings().weight, projector.weight, projector.bias, *(o.weight for o in outputs)]:
        weight.data.mul_(factor)


def strengthen(model: LlavaNextForConditionalGeneration, heads: Sequence[tuple[int, int]], factor: float) -> None:
    """Multiply what some heads carry by ``factor`` and divide what they add by it, in place, so that nothing changes.

    A step of Muon has a fixed size, and a head that started anew adds little to a large residual stream for long.
    Afterwards a step of its output weighs ``factor`` times as much.
    """
    for layer, head in heads:
        attention = model.model.language_model.layers[layer].self_attn
        features = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.v_proj.weight.data[features] *= factor
        attention.o_proj.weight.data[:, features] /= factor
