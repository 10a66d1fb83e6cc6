"""What `pmod ask` does once its options are checked: loads who answers, asks, prints pieces as they come."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints import toy
from pmod_cli.commands import common
from pmod_cli.core import output
from pmod_cli.core.errors import BAD_INPUT, PARTIAL, PmodError
from pmod_cli.core.images import load_image
from pmod_cli.core.paths import expanded
from pmod_cli.core.text import memory_size, printable
from pmod_cli.evaluation.eval_models import EvalModel, choose
from pmod_cli.evaluation.loaded import Loaded, load
from pmod_cli.evaluation.prompts import Prompt
from pmod_cli.families.configs import vision_token_ids
from pmod_cli.serving.chat import AnswerStats, Chat
from pmod_cli.serving.generation import Answerer, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA_VERSION = 1
PROMPT = "> "


class Speaker:
    """Who answers: a column of `pmod eval`, and its conversation so far.

    Args:
        column: Of `pmod eval`.
        loaded: Its model, which several columns may share.
        keep_cache: As `Chat` takes it.
        seed: Of a selection that draws.
    """

    def __init__(self, column: EvalModel, loaded: Loaded, *, keep_cache: bool, seed: int) -> None:
        self.column, self.loaded, self._seed = column, loaded, seed
        self.conversation = Chat(
            Answerer(loaded.model, loaded.processor), keep_cache=keep_cache, on_prefill=self._meet_budget
        )
        self._budget, self._settings = loaded.budget(column), column.method

    def get_ready(self) -> None:
        """Gives a model that several columns share the method and the selection of this one."""
        if self._settings is not None:
            self.loaded.model.set_method(self._settings.to_dict())
        if hasattr(self.loaded.model, "set_selection"):
            self.loaded.model.set_selection(self.column.selection, seed=self._seed)

    def _meet_budget(self, prompt: Prompt) -> None:
        """A method's budget is met on the prompt that is computed, as `pmod eval` does it."""
        if self._budget is not None:
            vision = prompt.count(vision_token_ids(self.loaded.model.config))
            self._settings = self._budget.settings(vision, prompt.length - vision)
            self.get_ready()


def open_picture(path: Path) -> Image:
    """The picture, with what was done to it noted on stderr."""
    loaded = load_image(path)
    for note in loaded.notes:
        output.note(f"{path}: {note}")
    return loaded.pixels


def speakers(
    name: str,
    against: Sequence[str],
    *,
    device: str,
    dtype: str,
    revision: str | None,
    offline: bool,
    keep_cache: bool,
    seed: int,
) -> list[Speaker]:
    """The model and what is compared with it, loaded; columns of one model share it."""
    found: list[Speaker] = []
    for column in choose(name, against, revision=revision, offline=offline):
        loaded = next((each.loaded for each in found if each.loaded.serves(column)), None)
        loaded = loaded or load(column, dtype=dtype, device=device, attention="sdpa")
        found.append(Speaker(column, loaded, keep_cache=keep_cache, seed=seed))
    common.warn_of_ties((each.column.routers, each.column.selection) for each in found)
    return found


class Asking:
    """One run of `pmod ask`.

    Args:
        speakers: Who answers, the model first.
        picture: Shown with the first question.
        shows_stats: Whether numbers follow each answer.
        limits: Of the sampling.
    """

    def __init__(
        self, speakers: Sequence[Speaker], picture: Image, *, shows_stats: bool, limits: dict[str, Any]
    ) -> None:
        self._speakers, self._sampling, self._shows_stats = speakers, Sampling(**limits), shows_stats
        self._shown: list[Image] = [picture]  # with the next question
        self._warned = False

    def answer(self, question: str) -> None:
        """Ask everybody, and print each answer as it comes; with a name in front where there are several."""
        self._warn_once()
        said: list[Speaker] = []
        try:
            for speaker in self._speakers:
                self._answer(speaker, question)
                said.append(speaker)
        except BaseException:  # Ctrl-C too
            for speaker in said:  # the question is forgotten, and so by all
                speaker.conversation.forget()
            raise
        self._shown = []

    def _answer(self, speaker: Speaker, question: str) -> None:
        speaker.get_ready()
        out, front = output.stdout.file, f"{printable(speaker.column.label)}: " if len(self._speakers) > 1 else ""
        pieces, escape = speaker.conversation.ask(question, self._shown, self._sampling), output.stdout.is_terminal
        piece = next(pieces, "")  # what cannot be asked leaves stdout empty
        try:
            while piece or front:
                out.write(front + (printable(piece) if escape else piece))
                out.flush()
                front, piece = "", next(pieces, "")
        finally:
            out.write("\n")
            out.flush()
        stats = speaker.conversation.stats
        if speaker.conversation.finished == "length" and stats:
            allowed = stats.new_tokens >= self._sampling.max_new_tokens
            why = "--max-new-tokens allows a longer one" if allowed else "the context of the model is full"
            output.note(f"the answer is cut off: {why}")
        if self._shows_stats and stats:
            output.note(stats_line(stats))

    def answer_as_json(self, question: str, image: Path) -> None:
        """Ask everybody, and print one object."""
        self._warn_once()
        answers = []
        for speaker in self._speakers:
            speaker.get_ready()
            text = "".join(speaker.conversation.ask(question, self._shown, self._sampling))
            answers.append(
                {
                    "model": speaker.column.label,
                    "answer": text,
                    "finish_reason": speaker.conversation.finished,
                    **(asdict(stats) if (stats := speaker.conversation.stats) else {}),
                }
            )
        written = {"schema_version": SCHEMA_VERSION, "image": str(image), "question": question, "answers": answers}
        output.print_json(written)

    def converse(self) -> int:
        """Read questions from stdin, one a line, until it ends; returns the exit code."""
        if sys.stdin is None:  # closed by whoever started this
            raise PmodError("there is no stdin to read questions from", hint="leave -i out, or open it")
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is the fault of one line
        asks, failed = sys.stdin.isatty(), False
        if asks:
            output.note("one line a question; /image FILE shows another picture; end with Ctrl-D")
        while True:
            if asks:
                output.stderr.file.write(PROMPT)
                output.stderr.file.flush()
            line = sys.stdin.readline()
            if not line:
                break
            try:
                self._take(line.strip())
            except PmodError as error:
                output.error(error.what, error.hint)
                failed = True
            except KeyboardInterrupt:
                if not asks:
                    raise
                output.note("stopped; this question is forgotten")
        if asks:
            output.note("")
        return PARTIAL if failed and not asks else 0

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            if not rest.strip():
                raise PmodError("which picture? /image FILE shows one", code=BAD_INPUT)
            picture = open_picture(expanded(rest.strip()))
            for speaker in self._speakers:  # what one of them refuses would end every question from here on
                speaker.conversation.check(picture)
            self._shown.append(picture)
            if self._speakers[0].conversation.stats:
                output.note("with the next question the whole conversation is computed anew: its pictures share one K")
        elif command.startswith("/"):
            raise PmodError(f"{command} is no command: /image FILE is the only one", code=BAD_INPUT)
        elif line:
            self.answer(line)

    def _warn_once(self) -> None:
        config = self._speakers[0].loaded.model.config
        if not self._warned and toy.is_toy(config) and not all(map(toy.is_document, self._shown)):
            self._warned = True
            output.warn(toy.FOREIGN)


def stats_line(stats: AnswerStats) -> str:
    """The numbers of one answer."""
    speed = "" if stats.tokens_per_s is None else f", then {stats.tokens_per_s:.1f} tokens/s"
    reused = f", {stats.reused_tokens:,} of them from the cache" if stats.reused_tokens else ""
    share = f" ({stats.kept_tokens / stats.vision_tokens:.0%})" if stats.vision_tokens else ""
    return (
        f"first token after {stats.first_token_s:.3f} s{speed}; {stats.new_tokens:,} new tokens; "
        f"prompt of {stats.prompt_tokens:,} tokens{reused}; a layer keeps {stats.kept_tokens:,.1f} of "
        f"{stats.vision_tokens:,} vision tokens{share}; KV cache {memory_size(stats.kv_bytes)}"
    )
