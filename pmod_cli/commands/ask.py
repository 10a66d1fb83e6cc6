"""`pmod ask`: a question about a picture, answered as it is written; or a conversation about it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from pmod_cli.commands import common
from pmod_cli.core.errors import PmodError

EXAMPLES = """\
pmod ask img.png "what is the total?"
pmod ask img.png "what is the total?" --stats --against stock
pmod ask img.png -i
pmod ask img.png "what is the total?" --model tiny-llava-next --json
"""
_answer = common.option_under("The answer")


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.", show_default=False)],
    question: Annotated[
        str | None, typer.Argument(metavar="[QUESTION]", help="What to ask about it.", show_default=False)
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            "-i",
            help="Go on asking, one line a question, on the cache that the picture left; /image FILE shows another.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, _answer(min=1, metavar="N", help="Length of an answer.")] = 512,
    temperature: Annotated[float, _answer(min=0, max=10, help="0 takes the likeliest token; above it, draws.")] = 0.0,
    seed: common.SeedOpt = 0,
    stats: Annotated[
        bool, _answer("--stats", help="Time to the first token, tokens a second, tokens kept and KV cache.")
    ] = False,
    against: Annotated[
        str | None,
        _answer(
            metavar="NAME",
            help="Answers beside it, as of `pmod eval`: stock, another model, a selection or a method such as fastv.",
        ),
    ] = None,
    keep_cache: Annotated[
        bool,
        _answer(
            "--keep-cache",
            help="With -i: go on from the cache also where the tokens that are kept would change with the question.",
        ),
    ] = False,
    model: common.ModelOpt = None,
    device: common.DeviceOpt = "auto",
    dtype: common.DtypeOpt = "auto",
    as_json: common.JsonOpt = False,
    revision: common.RevisionOpt = None,
    offline: common.OfflineOpt = False,
    quiet: common.QuietOpt = False,
) -> None:
    """Ask a model about a picture. The answer goes to stdout as it is written, all else to stderr."""
    if question is None and not interactive:
        raise PmodError(
            "what is the question?", hint=f'pmod ask {quote(str(image))} "what is shown here?", or -i to ask several'
        )
    if keep_cache and not interactive:
        raise PmodError("--keep-cache is for later questions, and without -i there is one", hint="leave it out")
    if interactive and as_json:
        raise PmodError("--json is one object, and -i asks many questions", hint="leave one of them out")
    if question is not None and not question.strip():
        raise PmodError("the question is empty")
    from pmod_cli.commands import ask_run

    picture = ask_run.open_picture(image)  # before the weights
    name = common.model_or_default(model)
    speakers = ask_run.speakers(
        name,
        [part.strip() for part in (against or "").split(",") if part.strip()],
        device=common.pick_device(device),
        dtype=dtype,
        revision=revision,
        offline=offline,
        keep_cache=keep_cache,
        seed=seed,
    )
    asking = ask_run.Asking(
        speakers,
        picture,
        shows_stats=stats,
        limits={"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
    )
    if as_json:
        asking.answer_as_json(question or "", image)
        return
    if question is not None:
        asking.answer(question)
    if interactive:
        raise typer.Exit(asking.converse())
