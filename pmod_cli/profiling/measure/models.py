"""The models that a measurement runs: stock, p-MoD and its controls, all on the very same weights in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes with the Auto classes
from pmod_cli.checkpoints import load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.families.configs import known_family
from pmod_cli.model.layer import Router
from pmod_cli.profiling.count.workload import Row
from pmod_cli.profiling.subject import Subject

STOCK, PMOD = "stock", "p-mod"
NAMES = (STOCK, PMOD, "random", "uniform")  # what is measured unless told


@dataclass(frozen=True)
class ModelPair:
    """A stock model and its p-MoD that share every parameter but the routers: in memory they are one.

    Args:
        stock: The stock model.
        pmod: The p-MoD model; the controls are this one with another selection of the same K.
    """

    stock: PreTrainedModel
    pmod: PreTrainedModel

    def __getitem__(self, name: str) -> PreTrainedModel:
        """The model of a name, its selection set: stock, p-MoD with its own selection, or p-MoD with another one."""
        if name == STOCK:
            return self.stock
        self.pmod.set_selection(self.pmod.config.settings.selection if name == PMOD else name)
        return self.pmod


def random_pair(subject: Subject, *, device: str, dtype: str, attention: str) -> ModelPair:
    """Both models at the subject's real shape, with random weights.

    Args:
        subject: The two configurations.
        device: A torch device.
        dtype: `bfloat16`, `float16` or `float32`.
        attention: `sdpa`, `eager` or `flash_attention_2`.
    """
    with torch.device(device):
        pmod = AutoModelForImageTextToText.from_config(
            subject.pmod, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
    spread_routers(pmod)
    return ModelPair(twin(subject.stock, pmod, attention), pmod)


def loaded_pair(subject: Subject, path: Path, *, device: str, dtype: str, attention: str) -> ModelPair:
    """Both models on the weights of a checkpoint, stock or p-MoD.

    Args:
        subject: The two configurations; the p-MoD's may differ from the checkpoint's.
        path: Folder of the checkpoint.
        device: A torch device.
        dtype: As in `random_pair`.
        attention: As in `random_pair`.
    """
    model, _ = load_model(path, dtype=dtype, device=device, attn_implementation=attention)
    stock = model if not hasattr(model.config, "pmod") else twin(subject.stock, model, attention)
    pmod = twin(subject.pmod, model, attention)
    if not any(module.weight.any() for module in pmod.modules() if isinstance(module, Router)):
        spread_routers(pmod)  # untrained: every token ties, and the first K would be gathered as one cheap block
    return ModelPair(stock, pmod)


def twin(config: PreTrainedConfig, donor: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model of `config` whose parameters and buffers are those of `donor`; routers that it lacks are new and zero."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=donor.dtype, attn_implementation=attention).eval()
    known = model.state_dict(keep_vars=True).keys() | {name for name, _ in model.named_buffers()}
    for tensors, table in ((donor.named_parameters(), "_parameters"), (donor.named_buffers(), "_buffers")):
        for name, tensor in tensors:
            module, _, leaf = name.rpartition(".")
            if name in known:
                getattr(model.get_submodule(module), table)[leaf] = tensor
    for name, module in model.named_modules():
        if isinstance(module, Router) and module.weight.is_meta:
            module.to_empty(device=donor.device)
            module.reset_parameters()
        missing = [leaf for leaf, tensor in _own_tensors(module).items() if tensor.is_meta]
        if missing:
            raise PmodError(f"the checkpoint lacks {name}.{missing[0]}", hint="convert or fetch it again")
    return model


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {leaf: tensor for leaf, tensor in tensors.items() if tensor is not None}


@torch.no_grad()
def spread_routers(model: PreTrainedModel) -> None:
    """Random router weights, so that the kept tokens lie scattered over the prompt as those of trained routers do."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, Router):
            drawn = torch.randn(module.weight.shape, generator=generator) / module.in_features**0.5
            module.weight.copy_(drawn)


@dataclass(frozen=True)
class Prompt:
    """Inputs of one batch, as a processor would make them, padded on the left as `generate` wants it.

    Args:
        input_ids: `(B, N)` int64.
        attention_mask: `(B, N)` int64, or None where nothing is padded.
        pixels: `pixel_values`, random, and for LLaVA-NeXT `image_sizes`.
        vision_mask: `(B, N)` bool.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    pixels: dict[str, Tensor]
    vision_mask: Tensor


def prompt(config: PreTrainedConfig, rows: list[Row], *, device: str, dtype: torch.dtype) -> Prompt:
    """A batch of random prompts: half of the text, the images, the other half."""
    generator = torch.Generator().manual_seed(0)
    longest, image_token = max(row.tokens for row in rows), config.image_token_id
    ids = torch.randint(3, min(image_token, 1000), (len(rows), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = longest - row.tokens + row.text_tokens // 2
        ids[index, start : start + row.vision_tokens] = image_token
        mask[index, longest - row.tokens :] = 1
    images = [image for row in rows for image in row.images]
    shape, others = known_family(config).pixel_inputs(config, [(image.height, image.width) for image in images])
    pixels = {"pixel_values": torch.randn(*shape, generator=generator).to(device, dtype)}
    pixels |= {name: torch.tensor(value, device=device) for name, value in others.items()}
    padded = any(row.tokens < longest for row in rows)
    ids = ids.to(device)
    return Prompt(ids, mask.to(device) if padded else None, pixels, ids == image_token)
