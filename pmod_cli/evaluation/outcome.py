"""What a finished benchmark leaves: a record per question and an entry of the report, whoever reads them later.

`answers/<model>/<benchmark>.jsonl` of a run holds one `Record` a line, in the order of the data set; `results.json`
holds `Outcome.entry()` under `tasks[i]["scores"][<model>]`. Both are equal for a run that was killed and run again and
for one that was not, but for what is named in `TIMES`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypedDict

OF_LMMS_EVAL = "lmms-eval"  # folder of a run: what lmms-eval's tasks write by themselves

# Keys of an entry, and of a record, that two runs with equal answers may differ in.
TIMES = (
    "seconds",
    "generate_seconds",
    "tokens_per_second",
    "peak_memory_mib",
    "answers_found",
    "batch_sizes",
    "processes",
    "batch",
)


class Record(TypedDict):
    """One answered question.

    Attributes:
        task: lmms-eval's task; a benchmark may have several (POPE).
        doc_id: Row of the question in the whole data set, whatever part of it was asked.
        question: Its text, as lmms-eval words it.
        target: The right answer, as the task has it.
        answer: What the model said, cut at the task's first stop string.
        filtered: What lmms-eval's filter made of it, and scored.
        item: lmms-eval's score of this answer under the headline metric; None where the row is no part of it.
        prompt: What the model read, image places not expanded.
        input_tokens: Tokens of the prompt, vision tokens included.
        vision_tokens: Of the prompt.
        output_tokens: Generated tokens, without the end token.
        cut: The answer reached the task's length limit.
        too_long: The prompt did not fit the model's context: the question was not put, and the answer is empty.
        seconds: Its share of the time that its batch spent in `generate`.
        batch: Rows of its batch.
    """

    task: str
    doc_id: int
    question: str
    target: Any
    answer: str
    filtered: Any
    item: Any
    prompt: str
    input_tokens: int
    vision_tokens: int
    output_tokens: int
    cut: bool
    too_long: bool
    seconds: float
    batch: int


@dataclass
class Guesses:
    """How many answers could not be read while lmms-eval scored.

    Attributes:
        drawn: Answers for which an option was drawn at random: MMMU, and MMBench with a judge that failed.
        unread: Multiple-choice answers in which no option was found; they count as wrong: static MMBench, RealWorldQA.
    """

    drawn: int = 0
    unread: int = 0


@dataclass
class Outcome:
    """One benchmark by one model.

    Attributes:
        score: Headline number, as the paper prints it; None where the run failed.
        error: Why it failed, one line.
        metric: lmms-eval's name of the headline number.
        lower_is_better: Whether lmms-eval says so of the headline number.
        metrics: Every number of lmms-eval, `{task: {"metric,filter": value}}`.
        versions: Version of each lmms-eval task.
        samples: The records, in the order of the data set.
        available: Rows of the whole data set.
        questions_sha256: Digest of all questions as they were asked: rows, words, generation settings.
        seconds: Wall time from opening the data to the score.
        peak_mib: Peak memory meanwhile, in MiB, of the process that took most; None where it cannot be measured.
        found: Answers that an earlier run had written down.
        processes: Processes that answered.
        guesses: Answers that could not be read.
        batching: What `changed_answers` measured, where it was asked to.
        data: Where the questions came from, as `provenance.data` tells.
    """

    score: float | None = None
    error: str | None = None
    metric: str | None = None
    lower_is_better: bool = False
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    available: int = 0
    questions_sha256: str | None = None
    seconds: float = 0.0
    peak_mib: float | None = None
    found: int = 0
    processes: int = 1
    guesses: Guesses = field(default_factory=Guesses)
    batching: dict[str, Any] | None = None
    data: list[dict[str, Any]] = field(default_factory=list)

    @property
    def limited(self) -> bool:
        """Fewer questions were asked than the benchmark has."""
        return len(self.samples) < self.available

    def entry(self) -> dict[str, Any]:
        """Everything but the single answers. `tokens_per_second` is of one process, inside `generate`."""
        if self.error is not None:
            return {"score": None, "error": self.error, "seconds": round(self.seconds, 2)}
        tokens = sum(record["output_tokens"] for record in self.samples)
        seconds = sum(record["seconds"] for record in self.samples)
        return {
            "score": self.score,
            "questions": len(self.samples),
            "questions_available": self.available,
            "limited": self.limited,
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "empty_answers": sum(not any(letter.isalnum() for letter in record["answer"]) for record in self.samples),
            "cut_answers": sum(record["cut"] for record in self.samples),
            "too_long_prompts": sum(record["too_long"] for record in self.samples),
            "random_answers": self.guesses.drawn,
            "unread_answers": self.guesses.unread,
            "seconds": round(self.seconds, 2),
            "generate_seconds": round(seconds, 2),
            "generated_tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
            "peak_memory_mib": self.peak_mib and round(self.peak_mib, 1),
            "answers_found": self.found,
            "processes": self.processes,
            "batch_sizes": dict(sorted(Counter(record["batch"] for record in self.samples).items())),
            "prompt": self.samples[0]["prompt"],
            "metrics": self.metrics,
            "task_versions": self.versions,
            "questions_sha256": self.questions_sha256,
            "data": self.data,
            "batching": self.batching,
        }


def digest(parts: Any) -> str:
    """SHA-256 of a list of strings, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
