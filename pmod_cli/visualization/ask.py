"""Check and load a model, ask it about one image, and record what each layer kept or what a stock model attends to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import LoadedImage
from pmod_cli.core.text import printable
from pmod_cli.data.pictures import is_square, reduced
from pmod_cli.families.configs import known_family
from pmod_cli.families.geometry import Layout
from pmod_cli.visualization.image_selection import IMAGE_MARK, ImageSelection, parse_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image
    from torch import Tensor
    from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from pmod_cli.checkpoints import Resolved

DEFAULT_QUESTION = "What is shown in this image?"
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be asked.

    Attributes:
        name: what pictures call it.
        router_state: "stock" for a model whose attention is read, instead of a router's choice.
        selection: what chooses its tokens; None is the checkpoint's own.
        notes: what a caption says of the model.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    router_state: str
    selection: str | None = None
    notes: tuple[str, ...] = ()


def check_checkpoint(found: Resolved, name: str, *, layers: str, parts: str) -> None:
    """Can this checkpoint be drawn? Read from its configuration alone.

    Raises:
        PmodError: a stock LLaVA, of which there is nothing to draw; layers or parts that the model does not have.
    """
    from pmod_cli.checkpoints import router_state

    if router_state(found.path) == "stock":
        raise PmodError(
            f"{name} is a stock LLaVA: each of its layers processes every token, so there is no selection to draw",
            hint=f"pmod convert {name}",
        )
    config = _config(found.path)
    parse_layers(layers, config.text_config.num_hidden_layers)
    if parts in ("base", "tiles") and not (family := known_family(config)).high_resolution:
        raise PmodError(f"`parts={parts}`: {name} is a {family.title}, which sees one picture", hint="`parts=separate`")


def check_pair(first: Resolved, second: Resolved) -> None:
    """Raises PmodError where two checkpoints have different numbers of layers."""
    depths = [_config(found.path).text_config.num_hidden_layers for found in (first, second)]
    if depths[0] != depths[1]:
        raise PmodError(
            f"{first.path} has {depths[0]} layers and {second.path} {depths[1]}: nothing can be compared",
            hint="compare checkpoints of the same stock model",
        )


def load_checkpoint(found: Resolved, name: str, *, dtype: str, device: str) -> LoadedModel:
    """Load a checkpoint; a stock one with eager attention, the only kind that gives its maps away."""
    from pmod_cli.checkpoints import load_model, router_state, toy

    state = router_state(found.path)
    attention = "eager" if state == "stock" else "sdpa"
    model, processor = load_model(found.path, dtype=dtype, device=device, attn_implementation=attention)
    shown = found.path.resolve().name if found.origin == "folder" else name
    notes = (toy.NOTE,) if toy.is_toy(model.config) else ()
    return LoadedModel(printable(shown), model, processor, state, notes=notes)


def _config(path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    import pmod_cli.model.configuration  # noqa: F401 - registers the p-MoD configurations

    return AutoConfig.from_pretrained(path, local_files_only=True)


def select(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: LoadedImage,
    question: str = DEFAULT_QUESTION,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    name: str = "p-MoD",
    selection: str | None = None,
    regions: tuple[tuple[float, float, float, float], ...] = (),
) -> ImageSelection:
    """Run the prefill of one image and question, then answer greedily.

    Args:
        model: a p-MoD LLaVA in eval mode, on any device.
        processor: its processor, with a chat template.
        picture: from `load_image`.
        question: stands behind the image, or around it where it holds `<image>`.
        max_new_tokens: length limit of the answer; 0 for no answer, which costs the prefill alone.
        selection: what chooses the tokens, a name in `SELECTIONS`; None is the checkpoint's own.
        regions: pixel boxes to keep with the record.

    Raises:
        PmodError: the processor has no chat template, or its image tokens do not match the image's layout.
    """
    pads = bool(getattr(processor.image_processor, "do_pad", False)) and is_square(processor)
    image = reduced(picture.pixels, padded=pads)  # as training does
    notes = picture.notes
    if image is not picture.pixels:
        notes = (*notes, f"reduced to {image.width} × {image.height} before it is padded to a square")
        by = [picture.pixels.width / image.width, picture.pixels.height / image.height] * 2
        regions = tuple(tuple(edge / scale for edge, scale in zip(box, by, strict=True)) for box in regions)
    inputs, layout = _prepare(model, processor, image, question)
    chosen_by = selection or model.config.settings.selection
    model.set_selection(chosen_by)
    kept, weight, routed, new_tokens = run(model, inputs, max_new_tokens=max_new_tokens)
    return ImageSelection(
        image=image,
        layout=layout,
        kept=kept,
        weight=weight,
        routed=routed,
        retention=np.array(model.config.retention),
        question=question,
        answer=processor.decode(new_tokens, skip_special_tokens=True).strip() if max_new_tokens else None,
        router_state=model.config.router_state,
        model=name,
        chosen_by=chosen_by,
        notes=notes,
        regions=regions,
    )


def run(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """The selection of one row's prefill, and the tokens generated after it.

    Args:
        inputs: of the model, B = 1, image tokens already expanded.

    Returns:
        kept bool (L, V), weight float32 (L, V), routed bool (L,), and the ids of at most `max_new_tokens` new tokens.
    """
    import torch

    from pmod_cli.model import capture_selection

    ids = inputs["input_ids"]  # (1, N)
    is_vision = (ids[0] == model.config.image_token_id).cpu()  # (N,)
    with torch.inference_mode(), capture_selection(model) as captured:
        if max_new_tokens:
            written = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None
            )
            new = written[0, ids.shape[1] :]
        else:
            model(**inputs, use_cache=False, logits_to_keep=1)
            new = ids[0, :0]

    num_layers, num_vision = model.config.text_config.num_hidden_layers, int(is_vision.sum())
    kept = np.ones((num_layers, num_vision), dtype=bool)
    weight = np.ones((num_layers, num_vision), dtype=np.float32)
    for layer, selection in captured.layers.items():
        kept[layer] = selection.kept[0].cpu()[is_vision].numpy()
        weight[layer] = selection.weight[0].float().cpu()[is_vision].numpy()
    return kept, weight, np.isin(np.arange(num_layers), list(captured.layers)), new


def attend(model: PreTrainedModel, processor: ProcessorMixin, beside: ImageSelection, *, name: str) -> ImageSelection:
    """What a stock model's last prompt token attends to, mean of all heads, cut to as many tokens as `beside` keeps.

    The prefill runs without its last token; that one then attends to the cache, so that no N x N map is ever held
    for more than one layer.

    Args:
        model: a stock LLaVA in eval mode, loaded with eager attention.
        beside: the selection to compare with: its image, question, K of each layer.

    Raises:
        PmodError: the model has another number of layers or of vision tokens than `beside`.
    """
    import torch

    from pmod_cli.model.cache import CACHE_NAME

    inputs, layout = _prepare(model, processor, beside.image, beside.question)
    num_layers = model.config.text_config.num_hidden_layers
    if (num_layers, layout.size) != beside.kept.shape:
        raise PmodError(
            f"{name} has {num_layers} layers and {layout.size} vision tokens for this image, {beside.model} has "
            f"{beside.num_layers} and {beside.layout.size}: nothing can be compared",
            hint="compare with the checkpoint that this one was converted from",
        )
    ids = inputs["input_ids"]
    is_vision = (ids[0] == model.config.image_token_id).cpu()
    with torch.inference_mode():
        head = {**inputs, "input_ids": ids[:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
        cache = model(**head, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        last = model(input_ids=ids[:, -1:], output_attentions=True, **{CACHE_NAME: cache})
    weight = np.stack([layer[0, :, 0].float().mean(0).cpu()[is_vision].numpy() for layer in last.attentions])  # (L, V)
    order = np.argsort(-weight, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return ImageSelection(
        image=beside.image,
        layout=layout,
        kept=rank < beside.kept.sum(axis=1, keepdims=True),
        weight=weight,
        routed=beside.routed,
        retention=beside.retention,
        question=beside.question,
        answer=None,
        router_state="stock",
        model=name,
        chosen_by="attention",
        notes=beside.notes,
        regions=beside.regions,
    )


def _prepare(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, question: str
) -> tuple[BatchFeature, Layout]:
    """The model's inputs, and where their vision tokens lie."""
    place = known_family(model.config).place_tokens
    layout = place(processor.image_processor, processor.patch_size, image.height, image.width)
    inputs = _prompt(processor, image, question).to(model.device, model.dtype)
    num_vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if layout.size != num_vision:
        raise PmodError(
            f"the image has {num_vision} vision tokens in the prompt, and {layout.size} places in the image; "
            "patch size, vision_feature_select_strategy or grid of the processor are not those of a stock LLaVA",
            hint="compare processor_config.json with the checkpoint this one was converted from",
        )
    return inputs, layout


def _prompt(processor: ProcessorMixin, image: Image.Image, question: str) -> BatchFeature:
    if not processor.chat_template:
        raise PmodError(
            "the processor has no chat template, so the prompt's form is not known",
            hint="add chat_template.jinja of the stock checkpoint to the model's folder",
        )
    if question.count(IMAGE_MARK) > 1:
        raise PmodError(f"the question holds {IMAGE_MARK} more than once: {question!r}", hint="ask about one image")
    # Stock templates put images before all text, wherever they stand in the message; text stays where it is.
    content = [{"type": "text", "text": question.replace(IMAGE_MARK, processor.image_token)}]
    if IMAGE_MARK not in question:
        content.insert(0, {"type": "image"})
    messages = [{"role": "user", "content": content}]
    text = chat.rendered(lambda: processor.apply_chat_template(messages, add_generation_prompt=True))
    return processor(images=image, text=text, return_tensors="pt")
