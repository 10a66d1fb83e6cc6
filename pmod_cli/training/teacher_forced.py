"""How many answers a model gets right when it is shown the question and, token by token, the right answer so far.

An answer counts if every token of it, its end included, is the likeliest one. That takes one forward pass for all
questions about an image, where generation takes one pass a token for each; it is a little easier than generation,
since a question may be answered with the earlier ones, and their right answers, in view.
"""

from collections.abc import Iterable
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import seed_of
from pmod_cli.data.rendered import IGNORED
from pmod_cli.data.rows import row
from pmod_cli.data.several import document_of
from pmod_cli.model.selection import looks_ahead
from pmod_cli.training.answers import AnswersHead, positions

TURNS = 3  # questions asked about each image


@torch.inference_mode()
def answered(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    tasks: Iterable[str],
    images: int,
    *,
    batch_size: int = 16,
) -> dict[str, tuple[int, int]]:
    """By task, answers that are right and questions asked, over the first ``images`` unseen documents of each.

    The documents and their questions are the same at every call.
    """
    collate, head, found, unmasked = Collator(processor), AnswersHead(model), {}, maskless(model)
    model.eval()
    for task in tasks:
        right = asked = 0
        for start in range(0, images, batch_size):
            indices = range(start, min(start + batch_size, images))
            batch = collate([_question_row(task, seed_of("test", index)) for index in indices])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            with head.at(positions(labels)):
                logits = model(**{**batch, "use_cache": False, **unmasked}).logits[0]
            hits = right_answers(logits.argmax(-1), labels)
            right, asked = right + int(hits.sum()), asked + len(hits)
        found[task] = (right, asked)
    return found


def maskless(model: PreTrainedModel) -> dict[str, None]:
    """What leaves the attention mask of a batch out, where it is not needed.

    The collator pads on the right, where a causal decoder never looks, and without a mask its attention kernel skips
    half of the work. A selection that reads the text behind an image would take padding for it.

    Args:
        model: Stock or p-MoD, without adapters around it.
    """
    return {} if looks_ahead(model) else {"attention_mask": None}


def right_answers(said: Tensor, labels: Tensor) -> Tensor:
    """For each stretch of labels, row after row, whether all of its tokens are predicted: bool (answers,).

    Args:
        said: int64 (A,), the likeliest tokens at the `positions` of the labels.
        labels: int64 (B, N), -100 outside the answers.
    """
    target = labels[:, 1:]
    labelled = target != IGNORED
    begins = labelled & ~torch.nn.functional.pad(labelled, (1, 0))[:, :-1]
    number = begins.flatten().cumsum(0)[labelled.flatten()] - 1
    missed = said != target[labelled]
    misses = torch.zeros(int(begins.sum()), dtype=torch.int64, device=labels.device)
    return misses.index_add_(0, number, missed.long()) == 0


def _question_row(task: str, seed: int) -> dict:
    document = document_of(task, seed)
    turns = document.turns
    return row(document, Random(seed).sample(turns, min(TURNS, len(turns))))
