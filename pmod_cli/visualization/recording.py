"""Check and load a model, ask it about pictures, and record what each layer kept or what a stock model attends to."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from pmod_cli.checkpoints.loading import read_config
from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import LoadedImage
from pmod_cli.core.text import printable
from pmod_cli.core.videos import Video
from pmod_cli.data.pictures import pads_to_square, reduced
from pmod_cli.families.configs import known_family, vision_token_ids
from pmod_cli.visualization.image_selection import ImageSelection, parse_layers
from pmod_cli.visualization.prompt import prepare
from pmod_cli.visualization.statistics import check_depths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from PIL import Image
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from pmod_cli.checkpoints import Resolved
    from pmod_cli.profiling.budgets import PromptBudget

DEFAULT_QUESTION = "What is shown in this image?"
MAX_NEW_TOKENS = 32
OFF_BUDGET = "comes as near as"  # in the note of a method that cannot cost its share of a prompt
OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be asked.

    Attributes:
        name: what pictures call it.
        router_state: "stock" for a model whose attention is read, instead of a router's choice; "none" under a method.
        selection: what chooses its tokens; None is the checkpoint's own.
        notes: what a caption says of the model.
        budget: a method in the place of the checkpoint's settings, and what it may cost on each prompt.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    router_state: str
    selection: str | None = None
    notes: tuple[str, ...] = ()
    budget: PromptBudget | None = None

    @property
    def chosen_by(self) -> str | None:
        """What chooses its tokens; None in a stock model."""
        settings = getattr(self.model.config, "settings", None)
        return self.selection or (None if settings is None else settings.selection)


def check_checkpoint(
    found: Resolved, name: str, *, layers: str, parts: str, method: bool = False, saved: Set[int] = frozenset()
) -> None:
    """Can this checkpoint be drawn? Read from its configuration alone.

    Args:
        method: whether it runs under a method, as a stock one can.
        saved: numbers of layers of the saved selections that are drawn with it.

    Raises:
        PmodError: a stock LLaVA, of which there is nothing to draw; layers or parts that the model does not have.
    """
    from pmod_cli.checkpoints import router_state

    if router_state(found.path) == "stock" and not method:
        raise PmodError(
            f"{name} is a stock LLaVA: each of its layers processes every token, so there is no selection to draw",
            hint=f"pmod convert {quote(name)}",
        )
    config = read_config(found.path)
    parse_layers(layers, config.text_config.num_hidden_layers)
    check_depths(saved | {config.text_config.num_hidden_layers})
    if parts in ("base", "tiles") and not (family := known_family(config)).high_resolution:
        raise PmodError(f"`parts={parts}`: {name} is a {family.title}, which sees one picture", hint="`parts=separate`")


def check_pair(first: Resolved, second: Resolved) -> None:
    """Raises PmodError where two checkpoints have different numbers of layers."""
    depths = [read_config(found.path).text_config.num_hidden_layers for found in (first, second)]
    if depths[0] != depths[1]:
        raise PmodError(
            f"{first.path} has {depths[0]} layers and {second.path} {depths[1]}: nothing can be compared",
            hint="compare checkpoints of the same stock model",
        )


def load_checkpoint(
    found: Resolved, name: str, *, dtype: str, device: str, method: tuple[str, float] | None = None
) -> LoadedModel:
    """Load a checkpoint; a stock one with eager attention, the only kind that gives its maps away.

    Args:
        method: a method in the place of the checkpoint's settings, and its share of the stock model's FLOPs.

    Raises:
        PmodError: the model cannot have the method.
    """
    from pmod_cli.checkpoints import load_model, router_state, toy
    from pmod_cli.checkpoints.processor_limits import with_limits
    from pmod_cli.families.sizes import Sizes
    from pmod_cli.profiling.budgets import PromptBudget, nearest

    state = router_state(found.path)
    shown = found.path.resolve().name if found.origin == "folder" else name
    options: dict[str, Any] = {"attn_implementation": "eager" if state == "stock" and not method else "sdpa"}
    if method:
        settings, _ = nearest(*method, with_limits(Sizes.of(read_config(found.path)), found.path))
        options |= {"pmod": settings.to_dict()} if state == "stock" else {}
    model, processor = load_model(found.path, dtype=dtype, device=device, **options)
    notes: tuple[str, ...] = (toy.NOTE,) if toy.is_toy(model.config) else ()
    if method is None:
        own = getattr(model.config, "settings", None)
        if own is not None and own.before_decoder:
            selection, left = own.before_decoder
            notes += (f"{selection} leaves {100 * left:.3g} % in front of the decoder, and retention is of these",)
        return LoadedModel(printable(shown), model, processor, state, notes=notes)
    notes += (f"{method[0]} at {100 * method[1]:.3g} % of the stock FLOPs",)
    budget = PromptBudget(Sizes.of(model.config), *method)
    return LoadedModel(printable(shown), model, processor, "none", notes=notes, budget=budget)


def select(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: LoadedImage,
    question: str = DEFAULT_QUESTION,
    *,
    regions: tuple[Box, ...] = (),
    **more: Any,
) -> ImageSelection:
    """Run the prefill of one image and question, then answer greedily.

    Args:
        regions: pixel boxes to keep with the record.
        more: of `select_together`, which says what the rest is.

    Raises:
        PmodError: as `select_together`.
    """
    return select_together(model, processor, [picture], question, regions=[regions], **more)[0]


def select_together(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[LoadedImage] | Video,
    question: str = DEFAULT_QUESTION,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    name: str = "p-MoD",
    selection: str | None = None,
    regions: Sequence[tuple[Box, ...]] = (),
    notes: tuple[str, ...] = (),
    budget: PromptBudget | None = None,
) -> list[ImageSelection]:
    """Run the prefill of one prompt with several images, or a film, then answer greedily.

    Args:
        model: a p-MoD model in eval mode, on any device.
        processor: its processor, with a chat template.
        pictures: from `load_image`, in their order in the prompt; or a film from `load_video`.
        question: stands behind the images, or around them where it holds an `<image>` for each.
        max_new_tokens: length limit of the answer; 0 for no answer, which costs the prefill alone.
        selection: what chooses the tokens, a name in `SELECTIONS`; None is the checkpoint's own.
        regions: for each picture, pixel boxes to keep with its record.
        notes: what a caption says of the model.
        budget: a method that the model runs under instead, its settings solved for this prompt.

    Returns:
        A record a picture. K is of all pictures of the prompt together. Of a film one record, its frames side by side.

    Raises:
        PmodError: the processor has no chat template, or its image tokens do not match the image's layout.
    """
    stills: Sequence[LoadedImage] = [] if isinstance(pictures, Video) else pictures
    boxes = list(regions) or [()] * max(1, len(stills))
    told = [picture.notes for picture in stills] or [()]
    images: list[Image.Image] = []
    for number, picture in enumerate(stills):
        image = reduced(picture.pixels, padded=pads_to_square(processor))  # as training does
        if image is not picture.pixels:
            told[number] += (f"reduced to {image.width} × {image.height} before it is padded to a square",)
            across, down = picture.pixels.width / image.width, picture.pixels.height / image.height
            boxes[number] = tuple((x0 / across, y0 / down, x1 / across, y1 / down) for x0, y0, x1, y1 in boxes[number])
        images.append(image)
    inputs, shown = prepare(model, processor, pictures if isinstance(pictures, Video) else images, question)
    if budget is not None:
        ids = inputs["input_ids"][0].tolist()
        vision = sum(ids.count(getattr(model.config, key)) for key in known_family(model.config).vision_tokens)
        prompt = vision, len(ids) - vision
        model.set_method(budget.settings(*prompt).to_dict())
        if not budget.is_met(*prompt):
            notes += (f"on this prompt {budget.method} {OFF_BUDGET} {100 * budget.flops(*prompt):.3g} %",)
    chosen_by = selection or model.config.settings.selection
    model.set_selection(chosen_by)
    kept, weight, routed, routed_tokens, new_tokens = run(model, inputs, max_new_tokens=max_new_tokens)
    if isinstance(pictures, Video):
        read, drawn = len(pictures.pixels), shown[0].layout.frames
        told[0] += (
            f"{read} frames, {pictures.per_second:.3g} a second" + (f", {drawn} drawn" if drawn < read else ""),
        )
    several = f"picture {{}} of {len(shown)} in the prompt" if len(shown) > 1 else ""
    return [
        ImageSelection(
            image=each.image,
            layout=each.layout,
            kept=kept[:, each.tokens],
            weight=weight[:, each.tokens],
            routed=routed,
            retention=np.array(model.config.retention),
            question=question,
            answer=processor.decode(new_tokens, skip_special_tokens=True).strip() if max_new_tokens else None,
            router_state=model.config.router_state,
            model=name,
            chosen_by=chosen_by,
            notes=(*own, several.format(number)) if several else own,
            model_notes=notes,
            regions=own_boxes,
            routed_tokens=None if routed_tokens[each.tokens].all() else routed_tokens[each.tokens],
        )
        for number, (each, own, own_boxes) in enumerate(zip(shown, told, boxes, strict=True), start=1)
    ]


def run(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """The selection of one row's prefill, and the tokens generated after it.

    Args:
        inputs: of the model, B = 1, image tokens already expanded.

    Returns:
        kept bool (L, V), weight float32 (L, V), routed bool (L,), bool (V,) for the tokens that are routed, and the ids
        of at most `max_new_tokens` new tokens.
    """
    import torch

    from pmod_cli.model import capture_selection

    ids = inputs["input_ids"]  # (1, N)
    is_vision = _vision(model, ids)  # (N,)
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
    of_tokens: np.ndarray = np.ones(num_vision, dtype=bool)
    if captured.vision_mask is not None:
        of_tokens = captured.vision_mask[0].cpu()[is_vision].numpy()
    return kept, weight, np.isin(np.arange(num_layers), list(captured.layers)), of_tokens, new


def attend(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    beside: ImageSelection,
    *,
    name: str,
    notes: tuple[str, ...] = (),
) -> ImageSelection:
    """What a stock model's last prompt token attends to, mean of all heads, cut to as many tokens as `beside` keeps.

    The prefill runs without its last token; that one then attends to the cache, so that no N x N map is ever held
    for more than one layer.

    Args:
        model: a stock LLaVA in eval mode, loaded with eager attention.
        beside: the selection to compare with: its image, question, K of each layer.
        notes: what a caption says of the model.

    Raises:
        PmodError: the model has another number of layers or of vision tokens than `beside`.
    """
    import torch

    from pmod_cli.model.cache import CACHE_NAME

    inputs, (shown,) = prepare(model, processor, [beside.image], beside.question)
    layout = shown.layout
    num_layers = model.config.text_config.num_hidden_layers
    if (num_layers, layout.size) != beside.kept.shape:
        raise PmodError(
            f"{name} has {num_layers} layers and {layout.size} vision tokens for this image, {beside.model} has "
            f"{beside.num_layers} and {beside.layout.size}: nothing can be compared",
            hint="compare with the checkpoint that this one was converted from",
        )
    ids = inputs["input_ids"]
    is_vision = _vision(model, ids)
    with torch.inference_mode():
        head = {name: value[:, :-1] if name in OF_TEXT else value for name, value in inputs.items()}
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
        model_notes=notes,
        regions=beside.regions,
    )


def _vision(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Bool (N,) on the host, the vision tokens of the one row."""
    import torch

    return torch.isin(ids[0], torch.tensor(vision_token_ids(model.config), device=ids.device)).cpu()
