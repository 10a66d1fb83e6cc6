"""Samples as batches, and what the stock model itself answers: the reference where there are no labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pmod_cli.calibration.samples import Sample
from pmod_cli.core.errors import PmodError
from pmod_cli.data.collator import Collator
from pmod_cli.data.conversation import BadRow
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.data.rendered import IGNORED
from pmod_cli.families.configs import vision_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

BATCH_TOKENS = 4096  # of one batch: what bounds memory
NEW_TOKENS = 48  # of one answer of the model


@dataclass(frozen=True)
class AskedBatch:
    """Rows that are measured together.

    Attributes:
        inputs: `input_ids`, `attention_mask` and `labels` `(B, N)` int64, padded on the right, and the pixels; on the
            host.
        tasks: Of each row.
        rows: Place of each row among the samples.
    """

    inputs: dict[str, Tensor]
    tasks: list[str]
    rows: list[int]


class Asked:
    """Puts samples to a model.

    Args:
        model: A LLaVA in eval mode. It answers as it is.
        processor: Its processor; images are made what it makes of them, as in use.
        template: Conversation template, as `data.template` of a recipe.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, template: str = "auto") -> None:
        self.model, self.encode = model, RowEncoder(processor, template, as_is=True)
        self.collate, self.tokenizer = Collator(processor), processor.tokenizer

    def mean_prompt(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """Vision and text tokens of the prompts, each the mean in whole tokens; of a conversation, its first question.

        Raises:
            PmodError: the template does not tell where an answer begins.
        """
        ids = [self._prompt(sample, [])["input_ids"] for sample in samples]
        marks = torch.tensor(vision_token_ids(self.model.config))
        vision = sum(int(torch.isin(each, marks).sum()) for each in ids)
        return round(vision / len(ids)), round((sum(map(len, ids)) - vision) / len(ids))

    @torch.no_grad()
    def answered(self, samples: Sequence[Sample], *, own: bool = False) -> list[Sample]:
        """The samples with an answer to each question.

        Args:
            samples: With or without answers.
            own: Whether the model's answers replace those that are given.

        Raises:
            PmodError: the template does not tell where an answer begins.
        """
        said: list[list[str]] = [[] if own or not each.answers else list(each.answers) for each in samples]
        while open_ := [i for i, each in enumerate(samples) if len(said[i]) < len(each.questions)]:
            prompts = [self._prompt(samples[i], said[i]) for i in open_]
            for batch in _by_length([len(prompt["input_ids"]) for prompt in prompts]):
                for place, text in zip(batch, self._generate([prompts[i] for i in batch]), strict=True):
                    said[open_[place]].append(text or " ")
        return [replace(each, answers=tuple(answers)) for each, answers in zip(samples, said, strict=True)]

    def batches(self, samples: Sequence[Sample]) -> list[AskedBatch]:
        """Batches of answered samples, rows of similar length together. Tensors are on the host.

        Raises:
            PmodError: a sample whose answers have no token.
        """
        rows = [self._row(sample) for sample in samples]
        return [
            AskedBatch(self.collate([rows[i] for i in indices]), [samples[i].task for i in indices], indices)
            for indices in _by_length([len(row["input_ids"]) for row in rows])
        ]

    def _row(self, sample: Sample) -> dict[str, Tensor]:
        row = self._encoded(sample, list(sample.answers))
        if not (row["labels"][1:] != IGNORED).any():
            raise PmodError(
                f"the answer {sample.answers[0]!r:.60} to {sample.questions[0]!r:.60} has no token to measure",
                hint="choose `data.template`",
            )
        return row

    def _encoded(self, sample: Sample, answers: list[str]) -> dict[str, Tensor]:
        try:
            return self.encode(sample.conversation(answers), sample.folder)
        except BadRow as fault:
            names = [image for image in sample.images if isinstance(image, str)]
            where = ", ".join([sample.task, *names])
            raise PmodError(f"{where}: {fault.what}", hint="remove the picture, or name other data") from None

    def _prompt(self, sample: Sample, said: list[str]) -> dict[str, Tensor]:
        """The tokens up to the next answer: those that two unlike answers have in common."""
        one, other = (self._encoded(sample, [*said, answer]) for answer in ("1", "no"))
        length = min(len(one["input_ids"]), len(other["input_ids"]))
        same = one["input_ids"][:length] == other["input_ids"][:length]
        common = int(same.long().cumprod(0).sum())
        return {**one, "input_ids": one["input_ids"][:common], "labels": one["labels"][:common]}

    def _generate(self, prompts: list[dict[str, Tensor]]) -> list[str]:
        longest = max(len(prompt["input_ids"]) for prompt in prompts)
        inputs = {name: tensor.to(self.model.device) for name, tensor in self.collate(prompts).items()}
        # Generation continues at the right: padding goes to the left.
        for name in {"input_ids", "attention_mask", "mm_token_type_ids"} & set(inputs):
            rows = [row.roll(longest - len(p["input_ids"])) for row, p in zip(inputs[name], prompts, strict=True)]
            inputs[name] = torch.stack(rows)
        del inputs["labels"]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        new = self.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad
        )
        return [text.strip() for text in self.tokenizer.batch_decode(new[:, longest:], skip_special_tokens=True)]


def _by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Places in groups of similar length, each of at most `BATCH_TOKENS` tokens with its padding, or one row."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if group and (len(group) + 1) * lengths[place] > BATCH_TOKENS:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
