"""What is timed: one callable for each phase of a model's work, the same code for stock, p-MoD and controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pmod_cli.model.cache import CACHE_NAME
from pmod_cli.profiling.measure.models import STOCK, ModelPair, Prompt

PREFILL, FIRST_TOKEN, DECODE, TRAIN, CHECKPOINTED = "prefill", "first-token", "decode", "train", "train-checkpointed"
PHASES = {
    PREFILL: "language model over merged embeddings, cache filled, logits of the last position",
    FIRST_TOKEN: "pixels and ids to the first token: vision tower, projector and prefill",
    DECODE: "one token of every row after the prefill",
    TRAIN: "forward and backward of one batch, vision tower frozen, no optimizer",
    CHECKPOINTED: "the same with gradient checkpointing",
}


@dataclass
class Bench:
    """One batch and the models that run it.

    Args:
        pair: The models.
        prompt: The batch.
        steps: Tokens decoded in one call of the phase `decode`.
    """

    pair: ModelPair
    prompt: Prompt
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
                seen = None if seen is None else torch.cat([seen, seen[:, -1:]], dim=1)
                model(input_ids=ids, attention_mask=seen, use_cache=True, **{CACHE_NAME: cache})
            cache.crop(-self.steps)

        return loop

    def _train(self, model: PreTrainedModel, checkpointed: bool) -> None:
        """With the vision tower frozen."""
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        forward_and_backward(model, model.model.language_model, self.prompt, checkpointed)


def forward_and_backward(model: PreTrainedModel, decoder: PreTrainedModel, prompt: Prompt, checkpointed: bool) -> None:
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
