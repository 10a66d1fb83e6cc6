"""`pmod demo`: from a stock LLaVA to a p-MoD model that works and its pictures, with the other verbs."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.commands.common import refuse_ignored
from pmod_cli.core import output
from pmod_cli.core.atomic import write_bytes, write_json
from pmod_cli.core.errors import INTERRUPTED, RUN_FAILED, PmodError, require

EXAMPLES = """\
pmod demo
pmod demo --train --out /tmp/demo --limit 50
"""
STOCK = "tiny-llava-next"
PAPER_MODEL = "llava-next-7b"
DONE = "done.json"


@dataclass(frozen=True)
class DemoCommand:
    """One command of the demo; what it prints on stdout is kept in `<name>.txt`."""

    name: str
    why: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user types it."""
        return f"pmod {shlex.join(self.arguments)}"


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of everything.")] = Path("demo"),
    samples: Annotated[int, typer.Option(min=8, metavar="N", help="Pictures that the model is calibrated on.")] = 24,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Questions of each task.")] = 10,
    train: Annotated[bool, typer.Option("--train", help="Train a second model as the paper does, too.")] = False,
    max_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --train: optimizer steps; recipe tiny has 125.")
    ] = 100,
) -> None:
    """Calibrate, evaluate, profile and draw the bundled model, into one folder; with --train, train it too.

    Run again, it goes on after the last command that ended.
    """
    from pmod_cli.checkpoints.files import read_json

    if train:
        require("train", "accelerate")
    else:
        refuse_ignored(context, ("max_steps",), "--train", "demo")
    require("eval", "lmms_eval", "datasets")
    out.mkdir(parents=True, exist_ok=True)
    steps = list(_steps(out, samples, limit, max_steps if train else None, _draw_image(out / "image.png")))
    done = read_json(out / DONE) if (out / DONE).exists() else {}  # seconds by command, of those that ended well
    for number, step in enumerate(steps, 1):
        if step.command in done and (out / f"{step.name}.txt").is_file():
            output.note(f"[{number}/{len(steps)}] done before: {step.command}")
            continue
        for later in steps[number:]:  # what they have left is of what this step is about to replace
            done.pop(later.command, None)
        output.note(f"\n[{number}/{len(steps)}] {step.why}\n$ {step.command}", style="bold")
        done[step.command] = _run(step, out)
        write_json(out / DONE, done)
    for name in ("eval", "profile"):
        output.print_line(f"\n$ {next(step.command for step in steps if step.name == name)}")
        output.print_line((out / f"{name}.txt").read_text(encoding="utf-8").rstrip())
    output.print_line(f"\nthe kept patches: {out / 'kept.png'}")
    image, model = (shlex.quote(str(out / name)) for name in ("image.png", "p-mod"))
    output.note(f"next: pmod visualize {image} --model {model} --mode schedule")


def _steps(out: Path, samples: int, limit: int, max_steps: int | None, question: str) -> Iterator[DemoCommand]:
    calibrated, converted, trained = (str(out / name) for name in ("p-mod", "converted", "trained"))
    yield DemoCommand(
        "calibrate",
        "A stock LLaVA-NeXT becomes a p-MoD model: a few pictures choose what each layer keeps. No weight is trained.",
        ("calibrate", STOCK, "-o", calibrated, "--samples", str(samples), "--overwrite"),
    )
    columns = [STOCK, "random", "uniform"]
    if max_steps is not None:
        columns[1:1] = [converted, trained]
        yield DemoCommand(
            "convert", "The paper's own way: every layer chooses.", ("convert", STOCK, "-o", converted, "--overwrite")
        )
        yield DemoCommand(
            "finetune",
            "It is trained: its routers learn what to keep, the rest to live with it.",
            ("finetune", "--recipe", "tiny", "--max-steps", str(max_steps), "-m", converted, "-o", trained),
        )
    yield DemoCommand(
        "eval",
        "The calibrated model is scored beside the stock one and as many random and evenly spaced tokens.",
        (
            *("eval", "-t", "tiny", "-m", calibrated, "--against", ",".join(columns)),
            *("--limit", str(limit), "-o", str(out / "eval"), "--overwrite"),
        ),
    )
    yield DemoCommand("profile", "What it saves, at the size of the paper's model.", ("profile", "-m", PAPER_MODEL))
    yield DemoCommand(
        "visualize",
        "Which patches the calibrated router keeps.",
        (
            *("visualize", str(out / "image.png"), "-m", calibrated, "--layers", "2,14,26"),
            *("--question", question, "-o", str(out / "kept.png")),
        ),
    )


def _draw_image(path: Path) -> str:
    """Write one test document, unseen in training, and return a question about it.

    Raises:
        PmodError: there is another picture.
    """
    from pmod_cli.core.images import load_image
    from pmod_cli.data.documents import draw, seed_of

    document = draw("doc", seed_of("test", 0))
    if not path.exists():
        encoded = io.BytesIO()
        document.image.save(encoded, "PNG")
        write_bytes(path, encoded.getvalue())  # whole, or a demo that was killed would not go on
    elif load_image(path).pixels != document.image:
        raise PmodError(f"{path} is there already, and is not the demo's picture", hint="choose another folder: --out")
    return document.turns[0].question


def _run(step: DemoCommand, out: Path) -> float:
    """Run a verb as its own program, its stderr shown as it comes. Returns the seconds it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pmod_cli", *step.arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if result.returncode:
        interrupted = result.returncode == INTERRUPTED
        raise PmodError(
            f"{'interrupted in' if interrupted else 'this command failed:'} {step.command}",
            hint=f"the demo goes on from there: pmod demo --out {shlex.quote(str(out))}",
            code=INTERRUPTED if interrupted else RUN_FAILED,
        )
    (out / f"{step.name}.txt").write_text(result.stdout, encoding="utf-8")
    return round(time.monotonic() - started, 1)
