"""A conversation about pictures: the picture is processed once, and later questions go on from the cache that it left.

That is exact where the tokens that a layer keeps cannot depend on what stands behind the picture: K follows from the
number of vision tokens, and a router sees nothing of later text (`Selection.looks_ahead`). Elsewhere, and where a later
turn brings a picture, the whole conversation is computed anew, since the pictures of a prompt share one K.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from PIL.Image import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import printable
from pmod_cli.data.pictures import pads_to_square, reduced
from pmod_cli.data.vision import marks_of
from pmod_cli.evaluation.prompts import Prompt, encode, render_chat
from pmod_cli.families.configs import vision_token_ids
from pmod_cli.model.selection import looks_ahead
from pmod_cli.serving.generation import Answerer, Batch, BatchRow, Sampling
from pmod_cli.serving.text_stream import TextStream


@dataclass(frozen=True)
class AnswerStats:
    """What one answer took.

    Attributes:
        prompt_tokens: of the whole conversation, vision tokens included.
        reused_tokens: of these, how many were in the cache already.
        new_tokens: of the answer, with the one that ends it.
        first_token_s: seconds from the question to the first token: picture, prompt and prefill.
        tokens_per_s: of the tokens behind the first; None where there is one alone.
        vision_tokens: of all pictures.
        kept_tokens: mean over the layers of the vision tokens that a layer holds in its cache.
        kv_bytes: keys and values, at the end of the answer.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    vision_tokens: int
    kept_tokens: float
    kv_bytes: int


class Chat:
    """Questions and answers about pictures.

    Args:
        answerer: The model.
        keep_cache: Go on from the cache also where a computation from the start would keep other vision tokens.
        on_prefill: Told each prompt that is computed from its start, before that.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        keep_cache: bool = False,
        on_prefill: Callable[[Prompt], None] = lambda prompt: None,
    ) -> None:
        self.stats: AnswerStats | None = None
        self.finished: str | None = None
        self._answerer, self._keep_cache, self._on_prefill = answerer, keep_cache, on_prefill
        self._messages: list[dict[str, Any]] = []
        self._images: list[Image] = []
        self._batch: Batch | None = None
        self._cached: list[int] = []  # ids of the tokens in the cache

    def ask(self, question: str, images: Sequence[Image] = (), sampling: Sampling | None = None) -> Iterator[str]:
        """The answer, piece by piece. A question whose answer is not read to its end is not part of the conversation.

        Args:
            question: Text behind the pictures of its turn.
            images: New pictures; RGB.
            sampling: How tokens are chosen.

        Raises:
            PmodError: the prompt is longer than the context of the model; or as `conversation_prompt`.
        """
        started, sampling = time.perf_counter(), sampling or Sampling()
        tokenizer = self._answerer.processor.tokenizer
        turn = {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]}
        prompt = conversation_prompt(self._answerer, [*self._messages, turn], [*self._images, *images])
        limit = check_length(self._answerer, prompt, sampling)
        row = BatchRow(prompt, Sampling(limit, sampling.temperature, sampling.top_p, sampling.seed))
        batch, reused = self._begin(row, new_images=bool(images))
        first, text, answer = time.perf_counter(), TextStream(tokenizer), ""
        while True:
            last = row.ids[-1] in self._answerer.end_ids
            piece = "" if last else text.add(row.ids[-1])
            if row.finished:
                piece += text.end()
            answer += piece
            if piece:
                yield piece
            if row.finished:
                break
            batch.step()
        seconds = time.perf_counter() - first
        self._cached = prompt.inputs["input_ids"].tolist() + row.ids[:-1]
        self._messages += [turn, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self._images += images
        self.finished, self.stats = row.finished, self._measure(batch, row, reused, first - started, seconds)

    def check(self, image: Image) -> None:
        """Refuse a picture before anything is asked about it.

        Raises:
            PmodError: as `conversation_prompt`.
        """
        conversation_prompt(self._answerer, [{"role": "user", "content": [{"type": "image"}]}], [image])

    def forget(self) -> None:
        """Takes the last question, its pictures and its answer out of the conversation."""
        *self._messages, question, _ = self._messages
        shown = sum(part["type"] == "image" for part in question["content"])
        if shown:
            self._images, self._cached = self._images[:-shown], []

    def _begin(self, row: BatchRow, *, new_images: bool) -> tuple[Batch, int]:
        """Processes the prompt up to the first token of the answer; also says how many tokens were in the cache."""
        ids, cached, self._cached = row.prompt.inputs["input_ids"].tolist(), self._cached, []
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], cached, strict=False)))
        if (
            self._batch is not None
            and cached
            and not new_images
            and (self._keep_cache or not looks_ahead(self._answerer.model))
        ):
            try:
                self._batch.extend(row, ids[same:], without=len(cached) - same)
            except ValueError:  # the template writes earlier turns in another way, from the picture on
                pass
            else:
                return self._batch, same
        self._batch = None  # its memory is free before the next prefill
        self._on_prefill(row.prompt)
        self._batch = self._answerer.prefill([row])
        return self._batch, 0

    def _measure(self, batch: Batch, row: BatchRow, reused: int, first: float, seconds: float) -> AnswerStats:
        ids, layers = row.prompt.inputs["input_ids"], batch.cache.layers
        vision = int(sum((ids == token).sum() for token in vision_token_ids(self._answerer.model.config)))
        words = len(ids) + len(row.ids) - 1 - vision
        more = len(row.ids) - 1
        return AnswerStats(
            prompt_tokens=len(ids),
            reused_tokens=reused,
            new_tokens=len(row.ids),
            first_token_s=first,
            tokens_per_s=more / seconds if more and seconds else None,
            vision_tokens=vision,
            kept_tokens=sum(layer.keys.shape[-2] - words for layer in layers) / len(layers),
            kv_bytes=sum(each.numel() * each.element_size() for layer in layers for each in (layer.keys, layer.values)),
        )


def conversation_prompt(
    answerer: Answerer,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Image],
    *,
    processor: Any = None,
    **rendering: Any,
) -> Prompt:
    """The prompt of a conversation, up to the place of the answer.

    Args:
        messages: As chat templates take them, contents as lists of parts.
        images: In the order of their places.
        processor: Another one than the answerer's, for threads of their own.
        rendering: As `render_chat`.

    Raises:
        PmodError: a text is no UTF-8 or holds the mark of an image or a video, the template fails, or the processor
            refuses a picture.
    """
    processor = processor or answerer.processor
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    for text in texts:
        if re.search("[\ud800-\udfff]", text):  # how Python holds other bytes of a terminal
            raise PmodError(f"the text is no UTF-8: {printable(text)[:60]}", hint="see `locale`")
    for mark in marks_of(processor):
        if any(mark in text for text in texts):
            raise PmodError(f"the text holds {mark}, the mark of a picture's place", hint="leave it out")
    pictures = [reduced(image, padded=pads_to_square(processor)) for image in images]  # as training does
    return encode(processor, 0, render_chat(processor, messages, **rendering), pictures)


def check_length(answerer: Answerer, prompt: Prompt, sampling: Sampling) -> int:
    """How many tokens the answer may have within the context of the model.

    Raises:
        PmodError: the prompt alone is longer.
    """
    if answerer.context is None:
        return sampling.max_new_tokens
    if prompt.length >= answerer.context:
        raise PmodError(
            f"the prompt has {prompt.length:,} tokens, those of its pictures included; the model takes "
            f"{answerer.context:,} with the answer",
            hint="ask less, or begin a new conversation",
        )
    return min(sampling.max_new_tokens, answerer.context - prompt.length)
