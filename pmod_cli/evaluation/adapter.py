"""The model that lmms-eval talks to: any LLaVA, stock or p-MoD, answering in length-sorted, left-padded batches."""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import UnidentifiedImageError
from tqdm import tqdm

from pmod_cli.core.errors import PmodError, explain
from pmod_cli.evaluation import prompts
from pmod_cli.evaluation.journal import Answer
from pmod_cli.evaluation.prompts import windows
from pmod_cli.families.configs import context_of, vision_token_ids
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.budgets import PromptBudget

MAX_NEW_TOKENS = 1024  # where a task sets none; as lmms-eval's own LLaVA


@dataclass(frozen=True)
class Unanswered:
    """A question that could not be put to the model, such as one whose image cannot be read."""

    reason: str


class PmodModel(lmms):
    """A *simple* lmms-eval model over a stock or p-MoD LLaVA checkpoint; `--model pmod` in lmms-eval's own program.

    Args:
        pretrained: Folder, alias or hub id, loaded here unless `model` and `processor` are given.
        batch_size: Rows per `generate` call. The answers do not depend on it (in float32).
        device: `cpu`, `cuda`, `cuda:N`; with several processes `cuda` becomes the one of the local rank.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        selection: Which vision tokens a p-MoD layer keeps: `router`, or the controls `random` and `uniform`.
        seed: Of the random selection, and of tasks that sample their answers.
        halve: Out of memory, halve the batch size and go on.
        model: A loaded model in evaluation mode, with its `processor`.
        budget: A method whose settings are solved for each prompt; None: those of the model hold for all.
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
        halve: bool = False,
        model: Any = None,
        processor: Any = None,
        budget: PromptBudget | None = None,
    ) -> None:
        super().__init__()
        if model is None:
            from pmod_cli.checkpoints import load_model, resolve

            if pretrained is None:
                raise PmodError(
                    "the model has no name", hint="python -m lmms_eval --model pmod --model_args pretrained=FOLDER"
                )
            device = device_of_rank(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            model, processor = load_model(
                resolve(str(pretrained)).path, dtype=dtype, device=device, attn_implementation=attn_implementation
            )
        self.model, self.processor = model, prompts.as_asked(processor, model.config.model_type)
        self.name = str(pretrained or model.name_or_path)
        self.batch_size, self.halve = int(batch_size), halve
        self.selection, self.seed, self.budget = selection, int(seed), budget
        self._vision_ids = vision_token_ids(model.config)
        self._settings: PmodSettings | None = None  # of the method, those that the model has now
        if hasattr(model, "set_selection"):
            model.set_selection(selection, seed=self.seed)
        elif selection != "router":
            raise PmodError(f"{self.name} is a stock model: it keeps every vision token, there is nothing to select")
        self._of_thread = threading.local()
        self._end_ids, self._pad_id = prompts.special_ids(model, processor)

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

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in the order of the requests; how lmms-eval's own program asks."""
        results: list[GenerationResult | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="pmod") as bar:
            for batch in self.answers(requests):
                for place, answer in batch:
                    if isinstance(answer, Unanswered):
                        raise PmodError(answer.reason)
                    counts = TokenCounts(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
                    results[place] = GenerationResult(answer.text, counts)
                bar.update(len(batch))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: every benchmark of the suite is generated."""
        raise PmodError("this task ranks given answers by likelihood; pmod scores generated answers only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: every benchmark of the suite has one round."""
        raise PmodError("this task asks in several rounds; pmod answers one question at a time")

    def answers(self, requests: Sequence[Instance]) -> Iterator[list[tuple[int, Answer | Unanswered]]]:
        """Batches of answers as they are made, each with the place of its request.

        A question whose image cannot be read, or whose prompt is longer than the model's context, does not stop the
        others: the first is unanswered, the second answered with nothing and marked.
        """
        for settings, prepared in windows(
            requests, lambda place: self._prepare(place, requests[place]), self.batch_size
        ):
            apart = [(place, row) for place, row in prepared if not isinstance(row, prompts.Prompt)]
            if apart:
                yield apart
            rows = sorted((row for _, row in prepared if isinstance(row, prompts.Prompt)), key=lambda row: -row.length)
            while rows:
                size = 1 if _sampling(settings)["do_sample"] else min(self.batch_size, len(rows))
                size, rows = self._at_budget(size, rows)
                answered = self._answer_or_halve(rows[:size], settings)
                if answered is not None:
                    yield [(row.index, answer) for row, answer in zip(rows[:size], answered, strict=True)]
                    rows = rows[size:]

    def _at_budget(self, size: int, rows: list[prompts.Prompt]) -> tuple[int, list[prompts.Prompt]]:
        """Gives the model what the first prompt may cost, and moves up those of the next that are asked beside it.

        Returns:
            How many are asked together, `size` at most, and the prompts.
        """
        if self.budget is None:
            return size, rows
        vision = [row.count(self._vision_ids) for row in rows]
        found = [self.budget.settings(V, row.length - V) for V, row in zip(vision, rows, strict=True)]
        if found[0] != self._settings:
            self.model.set_method(found[0].to_dict())
            self.model.set_selection(self.selection, seed=self.seed)
            self._settings = found[0]
        alike = [place for place, settings in enumerate(found) if settings == found[0]][:size]
        return len(alike), [rows[place] for place in alike] + [row for i, row in enumerate(rows) if i not in alike]

    def _prepare(self, place: int, request: Instance) -> tuple[int, prompts.Prompt | Answer | Unanswered]:
        """Runs in a thread. A tokenizer is not safe to share between threads, so each has its own."""
        if not hasattr(self._of_thread, "processor"):
            self._of_thread.processor = copy.deepcopy(self.processor)
        question, _, doc_to_visual, doc_id, task, split = request.args
        try:
            images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            row = prompts.prepare(self._of_thread.processor, place, question, images, self.model.config.model_type)
        except SystemExit as gone:  # how lmms-eval's video tasks say that a file is missing
            return place, Unanswered(f"{gone}".splitlines()[0])
        except UnidentifiedImageError:
            return place, Unanswered("its image is damaged, or of an unknown format")
        except Exception as error:
            known = explain(error)
            return place, Unanswered(known.what if known else f"{type(error).__name__}: {error}".splitlines()[0])
        context = context_of(self.model.config)
        if context is not None and row.length >= context:
            vision = row.count(self._vision_ids)
            return place, Answer("", row.prompt, row.length, too_long=True, vision_tokens=vision)
        return place, row

    def _answer_or_halve(self, rows: list[prompts.Prompt], settings: dict) -> list[Answer] | None:
        """The answers of a batch; None where it was out of memory and the batch size has been halved."""
        try:
            return self._answer(rows, settings)
        except (RuntimeError, MemoryError) as error:
            if not (self.halve and len(rows) > 1 and _out_of_memory(error)):
                raise
        self.clean()  # only now, since the exception held the tensors
        self.batch_size = (len(rows) + 1) // 2
        return None

    @torch.inference_mode()
    def _answer(self, rows: list[prompts.Prompt], settings: dict) -> list[Answer]:
        """Answers of one batch, cut at the first of the task's `until` strings."""
        batch = {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in prompts.collate(rows, self._pad_id).items()
        }
        limit = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        sampling = _sampling(settings)
        if sampling["do_sample"]:  # the same answer in whichever process and order it is given
            torch.manual_seed(zlib.crc32(f"{self.seed}/{rows[0].prompt}".encode()))
        started = time.perf_counter()
        ids = self.model.generate(**batch, max_new_tokens=limit, pad_token_id=self._pad_id, **sampling)
        generated = ids[:, batch["input_ids"].shape[1] :].cpu()  # (B, generated tokens); waits for the device
        seconds = (time.perf_counter() - started) / len(rows)

        answers = []
        for row, tokens in zip(rows, generated, strict=True):
            ends = torch.isin(tokens, torch.tensor(self._end_ids)).nonzero()
            length = int(ends[0]) if len(ends) else len(tokens)  # before the first end token
            text = self.processor.tokenizer.decode(tokens[:length], skip_special_tokens=True)
            for stop in settings.get("until") or ():
                text = text.split(stop)[0] if stop else text
            cut = length == limit
            answers.append(
                Answer(
                    text.strip(),
                    row.prompt,
                    row.length,
                    length,
                    cut,
                    seconds=round(seconds, 6),
                    batch=len(rows),
                    vision_tokens=row.count(self._vision_ids),
                )
            )
        return answers


def _sampling(settings: dict) -> dict[str, Any]:
    """A task's generation settings as `generate` takes them: greedy unless the task sets a temperature and samples."""
    temperature = float(settings.get("temperature") or 0.0)
    beams = int(settings.get("num_beams") or 1)
    if not temperature or settings.get("do_sample") is False:
        return {"do_sample": False, "num_beams": beams}
    sampling = {"do_sample": True, "temperature": temperature, "num_beams": beams}
    return sampling | ({"top_p": float(settings["top_p"])} if settings.get("top_p") else {})


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def device_of_rank(device: str) -> str:
    """`cuda` in one of several processes is the device of its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
