"""The model that lmms-eval talks to: any LLaVA, stock or p-MoD, answering in length-sorted, left-padded batches."""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from pmod_cli.errors import PmodError
from pmod_cli.evaluation import prompts

WINDOW = 8  # batches that are prepared and sorted by length together, while the window before them is answered
MAX_NEW_TOKENS = 1024  # where a task sets none; as lmms-eval's own LLaVA


@dataclass
class Tally:
    """What was answered since the last `PmodModel.take_tally`.

    Attributes:
        answers: Number of answers.
        empty: Answers without a letter.
        cut: Answers that reached the task's `max_new_tokens` without an end token.
        tokens: Generated tokens, end tokens left out.
        generate_seconds: Time inside `generate`, in seconds.
        prompt: The first prompt, as the model read it.
    """

    answers: int = 0
    empty: int = 0
    cut: int = 0
    tokens: int = 0
    generate_seconds: float = 0.0
    prompt: str = ""


class PmodModel(lmms):
    """A *simple* lmms-eval model over a stock or p-MoD LLaVA checkpoint; `--model pmod` in lmms-eval's own program.

    Args:
        pretrained: Folder, alias or hub id, loaded here unless `model` and `processor` are given.
        batch_size: Rows per `generate` call. The answers do not depend on it (in float32).
        device: `cpu`, `cuda`, `cuda:N`; with several processes `cuda` becomes the one of the local rank.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        selection: Which vision tokens a p-MoD layer keeps: `router`, or the controls `random` and `uniform`.
        seed: Seed of the random selection.
        model: A loaded model in evaluation mode, with its `processor`.
        progress: Called after each batch with the number of answers and of questions of the running task.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        selection: str = "router",
        seed: int = 0,
        *,
        model: Any = None,
        processor: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if model is None:
            from pmod_cli.checkpoints import load_model, resolve

            if pretrained is None:
                raise PmodError("the model has no name", hint="--model_args pretrained=FOLDER")
            device = _device_of_rank(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            model, processor = load_model(
                resolve(str(pretrained)).path, dtype=dtype, device=device, attn_implementation=attn_implementation
            )
        self.model, self.processor = model, processor
        self.name = str(pretrained or model.name_or_path)
        self.batch_size = int(batch_size)
        self.selection, self.seed = selection, int(seed)
        if hasattr(model, "set_selection"):
            model.set_selection(selection, seed=self.seed)
        elif selection != "router":
            raise PmodError(f"{self.name} is a plain LLaVA: it keeps every vision token, there is nothing to select")
        self.progress = progress or (lambda answered, questions: None)
        self._tally = Tally()

    @property
    def device(self) -> torch.device:
        """Where the weights are; lmms-eval gathers counts there."""
        return self.model.device

    def __repr__(self) -> str:
        """Equal for equal answers: lmms-eval keys its response cache on this."""
        return f"PmodModel({self.name!r}, dtype={self.model.dtype}, selection={self.selection!r}, seed={self.seed})"

    def clean(self) -> None:
        """Free what can be spared. The inherited method deletes the model, which the next task still needs."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take_tally(self) -> Tally:
        """What was answered since the last call."""
        tally, self._tally = self._tally, Tally()
        return tally

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in the order of the requests."""
        answers: list[GenerationResult | None] = [None] * len(requests)
        answered = 0
        for settings, batch in self._batches(requests):
            for row, answer in zip(batch, self._answer(batch, settings), strict=True):
                answers[row.index] = answer
            answered += len(batch)
            self.progress(answered, len(requests))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: every benchmark of the suite is generated."""
        raise PmodError("this task ranks given answers by likelihood; pmod scores generated answers only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: every benchmark of the suite has one round."""
        raise PmodError("this task asks in several rounds; pmod answers one question at a time")

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[dict, list[prompts.Row]]]:
        """Batches of equal generation settings and similar length.

        The length of a prompt is known once its image is decoded and cut into tiles, so that is done for a window of
        questions at a time, in a thread, while the model answers the window before.
        """
        by_settings: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(index)
        step = WINDOW * self.batch_size
        windows = [group[at : at + step] for group in by_settings.values() for at in range(0, len(group), step)]
        with ThreadPoolExecutor(max_workers=1) as worker:
            prepared = worker.submit(self._prepare, requests, windows[0]) if windows else None
            for place, window in enumerate(windows):
                rows = sorted(prepared.result(), key=lambda row: -row.length)
                if place + 1 < len(windows):
                    prepared = worker.submit(self._prepare, requests, windows[place + 1])
                for at in range(0, len(rows), self.batch_size):
                    yield requests[window[0]].args[1], rows[at : at + self.batch_size]

    def _prepare(self, requests: list[Instance], window: list[int]) -> list[prompts.Row]:
        rows = []
        for index in window:
            question, _, doc_to_visual, doc_id, task, split = requests[index].args
            images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            rows.append(prompts.prepare(self.processor, index, question, images))
        return rows

    @torch.inference_mode()
    def _answer(self, rows: list[prompts.Row], settings: dict) -> list[GenerationResult]:
        """Answers of one batch, cut at the first of the task's `until` strings."""
        pad_id = self._pad_id()
        batch = {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in prompts.collate(rows, pad_id).items()
        }
        limit = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        started = time.perf_counter()
        ids = self.model.generate(**batch, max_new_tokens=limit, pad_token_id=pad_id, **_sampling(settings))
        generated = ids[:, batch["input_ids"].shape[1] :].cpu()  # (B, generated tokens); waits for the device
        self._tally.generate_seconds += time.perf_counter() - started
        self._tally.prompt = self._tally.prompt or rows[0].prompt

        answers = []
        for row, tokens in zip(rows, generated, strict=True):
            length = self._length(tokens)
            text = self.processor.tokenizer.decode(tokens[:length], skip_special_tokens=True)
            for stop in settings.get("until") or ():
                text = text.split(stop)[0] if stop else text
            text = text.strip()
            self._tally.answers += 1
            self._tally.tokens += length
            self._tally.cut += length == limit
            self._tally.empty += not any(letter.isalnum() for letter in text)
            answers.append(GenerationResult(text, TokenCounts(input_tokens=row.length, output_tokens=length)))
        return answers

    def _length(self, tokens: torch.Tensor) -> int:
        """Generated tokens before the first end token."""
        ends = torch.isin(tokens, torch.tensor(self._end_ids())).nonzero()
        return int(ends[0]) if len(ends) else len(tokens)

    def _end_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        return list(ends) if isinstance(ends, list | tuple) else [ends]

    def _pad_id(self) -> int:
        """Which token pads does not matter, since it is masked; some tokenizers have none."""
        pad = self.processor.tokenizer.pad_token_id
        return pad if pad is not None else self._end_ids()[0]


def _sampling(settings: dict) -> dict[str, Any]:
    """A task's generation settings as `generate` takes them: greedy unless the task sets a temperature and samples."""
    temperature = float(settings.get("temperature") or 0.0)
    beams = int(settings.get("num_beams") or 1)
    if not temperature or settings.get("do_sample") is False:
        return {"do_sample": False, "num_beams": beams}
    sampling = {"do_sample": True, "temperature": temperature, "num_beams": beams}
    return sampling | ({"top_p": float(settings["top_p"])} if settings.get("top_p") else {})


def _device_of_rank(device: str) -> str:
    """`cuda` in one of several processes is the device of its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
