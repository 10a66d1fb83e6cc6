"""What is timed: stock, p-MoD and its controls on the very same weights, one callable for each phase of their work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedConfig, PreTrainedModel

import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes with the Auto classes
from pmod_cli.checkpoints import load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.families import ImageTokens
from pmod_cli.families.configs import known_family
from pmod_cli.model.cache import CACHE_NAME
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
    named = donor.named_parameters(remove_duplicate=False)  # a tied lm_head is the embedding table
    for tensors, table in ((named, "_parameters"), (donor.named_buffers(), "_buffers")):
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
            drawn = torch.randn(module.weight.shape, generator=generator) / module.weight.shape[1] ** 0.5
            module.weight.copy_(drawn)


@dataclass(frozen=True)
class PromptBatch:
    """Inputs of one batch, as a processor would make them, padded on the left as `generate` wants it.

    Args:
        input_ids: `(B, N)` int64.
        attention_mask: `(B, N)` int64, or None where nothing is padded.
        pixels: `pixel_values`, random, those of videos, and what the family takes besides.
        vision_mask: `(B, N)` bool.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    pixels: dict[str, Tensor]
    vision_mask: Tensor


def prompt(config: PreTrainedConfig, rows: list[Row], *, device: str, dtype: torch.dtype) -> PromptBatch:
    """A batch of random prompts: half of the text, the images and videos, the other half.

    Raises:
        PmodError: Pictures that need text between them, and too little of it.
    """
    generator, family = torch.Generator().manual_seed(0), known_family(config)
    longest, image_token = max(row.tokens for row in rows), config.image_token_id
    video_token = config.video_token_id if family.video_tokens else image_token
    ids = torch.randint(3, min(image_token, video_token, 1000), (len(rows), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        mask[index, longest - row.tokens :] = 1
        runs = [run for image in row.images for run in _runs(image, family.frames_apart)]
        # A token of text between two frames, and between two images whose positions are of rows and columns.
        gaps = [
            int(n > 0 and (family.frames_apart if video else not family.tiled)) for n, (video, _) in enumerate(runs)
        ]
        if sum(gaps) > row.text_tokens:
            raise PmodError(
                f"{row.text_tokens} text tokens, and {sum(gaps)} stand between the pictures of a {family.title} prompt",
                hint=f"`text_tokens={sum(gaps)}`, or more",
            )
        start = longest - row.tokens + (row.text_tokens - sum(gaps)) // 2
        for apart, (is_video, length) in zip(gaps, runs, strict=True):
            ids[index, start + apart : start + apart + length] = video_token if is_video else image_token
            start += apart + length
    pixels: dict[str, Tensor] = {}
    images = [image for row in rows for image in row.images]
    for name, is_video in (("pixel_values", False), ("pixel_values_videos", True)):
        if not (given := [image for image in images if image.video == is_video]):
            continue
        if is_video:
            assert family.video_inputs is not None  # a workload with videos is refused before for others
            groups = getattr(config.vision_config, "temporal_patch_size", 1)
            shape, others = family.video_inputs(
                config, [(groups * image.frames, image.height, image.width) for image in given]
            )
        else:
            of_rows = [count for row in rows if (count := sum(not image.video for image in row.images))]
            shape, others = family.pixel_inputs(config, [(image.height, image.width) for image in given], of_rows)
        pixels[name] = torch.randn(*shape, generator=generator).to(device, dtype)
        pixels |= {other: torch.tensor(value, device=device) for other, value in others.items()}
    padded = any(row.tokens < longest for row in rows)
    ids = ids.to(device)
    is_image, is_video = ids == image_token, (ids == video_token) & (video_token != image_token)
    if not family.tiled:  # whose positions are of rows and columns
        pixels["mm_token_type_ids"] = is_image.int() + 2 * is_video.int()
    return PromptBatch(ids, mask.to(device) if padded else None, pixels, is_image | is_video)


def _runs(image: ImageTokens, frames_apart: bool) -> list[tuple[bool, int]]:
    """Whether it is a video, and how many vision tokens stand together."""
    if not (image.video and frames_apart):
        return [(image.video, image.tokens)]
    return [(True, image.tokens // image.frames)] * image.frames


PREFILL, FIRST_TOKEN, DECODE, TRAIN, CHECKPOINTED = "prefill", "first-token", "decode", "train", "train-checkpointed"
PHASES = {
    PREFILL: "language model over merged embeddings, cache filled, logits of the last position",
    FIRST_TOKEN: "pixels and ids to the first token: vision tower, projector and prefill",
    DECODE: "one token of every row after the prefill",
    TRAIN: "forward and backward of one batch, vision tower frozen, no optimizer",
    CHECKPOINTED: "the same with gradient checkpointing",
}


@dataclass
class PhaseBench:
    """One batch and the models that run it.

    Args:
        pair: The models.
        prompt: The batch.
        steps: Tokens decoded in one call of the phase `decode`.
    """

    pair: ModelPair
    prompt: PromptBatch
    steps: int

    def __post_init__(self) -> None:
        self._embeds: Tensor | None = None

    @property
    def embeds(self) -> Tensor:
        """`(B, N, D)`, text and image features merged, as the stock model hands them to its decoder."""
        if self._embeds is None:
            model, seen = self.pair[STOCK], {}
            hook = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
            )
            try:
                self._first_token(model)
            finally:
                hook.remove()
            self._embeds = seen["inputs_embeds"]
        return self._embeds

    def call(self, phase: str, name: str) -> Callable[[], object]:
        """A function without arguments that runs one phase on one model."""
        if phase == DECODE:
            return self._decoder_loop(name)
        run = {PREFILL: self._prefill, FIRST_TOKEN: self._first_token}.get(phase)
        if run is None:
            return lambda: self._train(self.pair[name], phase == CHECKPOINTED)
        return lambda: run(self.pair[name])

    def filled_cache(self, name: str) -> DynamicCache:
        """The cache that a prefill leaves."""
        return self._prefill(self.pair[name])

    @torch.inference_mode()
    def _prefill(self, model: PreTrainedModel) -> DynamicCache:
        cache = DynamicCache()
        vision = {} if model is self.pair.stock else {"vision_mask": self.prompt.vision_mask}
        model(
            inputs_embeds=self.embeds,
            attention_mask=self.prompt.attention_mask,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_NAME: cache},
            **vision,
        )
        return cache

    @torch.inference_mode()
    def _first_token(self, model: PreTrainedModel) -> Tensor:
        prompt = self.prompt
        inputs = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask, **prompt.pixels}
        return model(**inputs, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def _decoder_loop(self, name: str) -> Callable[[], object]:
        """Decodes `steps` tokens and takes them out of the cache again, so that each call does the same."""
        cache, mask = self.filled_cache(name), self.prompt.attention_mask
        ids = torch.full_like(self.prompt.input_ids[:, :1], 5)  # any text

        @torch.inference_mode()
        def loop() -> None:
            model, seen = self.pair[name], mask
            for _ in range(self.steps):
                seen, positions = None if seen is None else torch.cat([seen, seen[:, -1:]], dim=1), {}
                if seen is not None and not known_family(model.config).tiled:
                    # By a mask alone, models whose positions have rows and columns place the whole row.
                    positions["position_ids"] = (seen.sum(dim=1, keepdim=True) - 1).expand(3, -1, -1)
                model(input_ids=ids, attention_mask=seen, use_cache=True, **{CACHE_NAME: cache}, **positions)
            cache.crop(-self.steps)

        return loop

    def _train(self, model: PreTrainedModel, checkpointed: bool) -> None:
        """With the vision tower frozen."""
        model.requires_grad_(True)
        tower = model.model.vision_tower if known_family(model.config).tiled else model.model.visual
        tower.requires_grad_(False)
        forward_and_backward(model, model.model.language_model, self.prompt, checkpointed)


def forward_and_backward(
    model: PreTrainedModel, decoder: PreTrainedModel, prompt: PromptBatch, checkpointed: bool
) -> None:
    """One training step without an optimizer; its gradients are dropped.

    Args:
        model: With or without an adapter around it.
        decoder: Its language model, which alone is checkpointed: else gradients would go through the frozen tower.
        prompt: The batch. Its padding has no mask, as in `PmodTrainer`; every position has a label.
        checkpointed: Whether the decoder's layers compute their activations again in the backward pass.
    """
    model.train()
    if checkpointed:
        decoder.activation_checkpointing_enable()
    try:
        model(input_ids=prompt.input_ids, labels=prompt.input_ids, use_cache=False, **prompt.pixels).loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
        decoder.activation_checkpointing_disable()
        model.eval()
