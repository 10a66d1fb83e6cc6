"""`pmod eval`: score a model on benchmarks with lmms-eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.commands import common
from pmod_cli.commands.eval_show import Bars, show_plan, show_results, show_suite
from pmod_cli.core import output
from pmod_cli.core.errors import PARTIAL, RUN_FAILED, PmodError, require
from pmod_cli.core.folders import staging_of
from pmod_cli.core.hardware import require_attention, require_device
from pmod_cli.model.registry import SELECTIONS

if TYPE_CHECKING:
    from pmod_cli.evaluation.benchmarks import Benchmark
    from pmod_cli.evaluation.eval_models import EvalModel
    from pmod_cli.evaluation.eval_plan import EvalSettings
    from pmod_cli.evaluation.processes import Processes

EXAMPLES = """\
pmod eval --tasks tiny
pmod eval --tasks docvqa,chartqa --model ./checkpoints/llava-next-7b-pmod
pmod eval --tasks tiny --against stock,random,uniform --limit 200
pmod eval --tasks tiny --against fastv,pyramiddrop@0.4 --limit 200
pmod eval --tasks tiny --methods all --budgets 0.4,0.54 --limit 200
pmod eval --tasks text-rich --batch-size 16 --dtype bf16 --json > scores.json
pmod eval --compare runs/eval-a runs/eval-b --format markdown
pmod eval --compare runs/eval-a runs/eval-b -o compared
pmod eval --list
"""
AUTO_ROWS = {"cpu": 8, "gpu": 64}  # what --batch-size auto begins with
FORMATS = ("table", "json", "markdown", "csv")
SHOWING = ("as_json", "shown_as", "quiet", "progress", "offline")
USED_BY = {  # what the calls that ask no model take besides
    "--list": ("list_tasks", "data_root"),
    "--compare": ("compare", "runs", "seed", "out", "overwrite"),
    "--fetch-data": ("fetch_data", "data_root"),
}
_running = common.option_under("How to run")
_report = common.option_under("What to report")
_data = common.option_under("Data sets")


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise typer.BadParameter(f"{text!r} is neither a number of questions nor a fraction between 0 and 1")
    return limit if limit < 1 else int(limit)


def _batch_size(text: str) -> tuple[int, bool]:
    """(rows, whether to halve them out of memory)."""
    first, _, start = text.partition(":")
    number = (start or "0") if first == "auto" else text
    if not number.isdigit() or (number == "0") != (text == "auto"):
        raise typer.BadParameter(f"{text!r} is neither a number of rows, nor auto, nor auto:N")
    return int(number), first == "auto"


def eval(
    context: typer.Context,
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Finished runs, after --compare.")] = None,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", "-t", metavar="NAMES", help="Benchmarks, groups or task files, comma-separated; see --list."
        ),
    ] = "paper",
    model: common.ModelOpt = None,
    against: Annotated[
        str | None,
        _report(
            metavar="NAMES",
            help=f"Compare with: stock, {', '.join(SELECTIONS)}, downsample, "
            "a method (fastv, or fastv@0.4 at that share of the FLOPs), any model, or none; comma-separated. "
            "(default: stock for a p-MoD model on tiny tasks, else none)",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        _report(
            metavar="NAMES", help="Compare with methods on the stock weights at each of --budgets, or all of them."
        ),
    ] = None,
    budgets: Annotated[
        str, _report(metavar="SHARES", help="Shares of the stock model's prefill FLOPs for --methods.")
    ] = "0.25,0.4,0.54",
    limit: Annotated[
        float | None,
        _data(
            parser=_limit,
            metavar="N",
            help="N questions of each task, or a fraction of them, drawn by the seed: the same for every model.",
        ),
    ] = None,
    batch_size: Annotated[
        Any,
        _running(
            "--batch-size",
            "-b",
            parser=_batch_size,
            metavar="N",
            help="Rows per forward pass. auto or auto:N begins with many, and halves them out of memory.",
        ),
    ] = "8",
    num_processes: Annotated[
        int,
        _running(
            metavar="N",
            min=1,
            help="Processes of this machine that share the questions; each has the model, on a GPU its own.",
        ),
    ] = 1,
    device: common.DeviceOpt = "auto",
    dtype: common.DtypeOpt = "auto",
    attention: Annotated[str, _running(help="sdpa, eager or flash_attention_2.")] = "sdpa",
    seed: common.SeedOpt = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output-path",
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the run, or of the tables and figure of --compare, which else are only shown. "
            "(default: ./runs/eval-<model>-<digest of models, tasks and settings>)",
            show_default=False,
        ),
    ] = None,
    check_batching: Annotated[
        bool,
        _report(
            "--check-batching",
            help="Ask 64 questions of each task again, one at a time, and count the answers that change.",
        ),
    ] = False,
    compare: Annotated[bool, _report("--compare", help="Set finished runs side by side; nothing is asked.")] = False,
    list_tasks: Annotated[bool, _data("--list", help="List the benchmarks and stop.")] = False,
    data_root: Annotated[
        Path | None,
        _data(
            metavar="DIR",
            help="Mirror with the data sets in lmms-lab-encoder/<name>/. (default: the Hugging Face cache or the hub)",
            show_default=False,
        ),
    ] = None,
    fetch_data: Annotated[
        str | None, _data(metavar="NAMES", help="Copy the data of these benchmarks to --data-root, and stop.")
    ] = None,
    overwrite: common.OverwriteOpt = False,
    dry_run: common.DryRunOpt = False,
    as_json: common.JsonOpt = False,
    shown_as: Annotated[
        str,
        _report(
            "--format", callback=common.one_of_these(FORMATS, "format"), metavar="FORMAT", help=f"{', '.join(FORMATS)}."
        ),
    ] = "table",
    revision: common.RevisionOpt = None,
    offline: common.OfflineOpt = False,
    quiet: common.QuietOpt = False,
    progress: common.ProgressOpt = True,
) -> None:
    """Score a model on benchmarks with lmms-eval, beside the stock model or a selection that routers must beat."""
    from pmod_cli.evaluation import benchmarks as known
    from pmod_cli.evaluation import suite

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1  # by torchrun or accelerate
    if launched and os.environ.get("RANK", "0") != "0":
        output.set_quiet(True)
    if as_json and shown_as not in ("table", "json"):
        raise PmodError(f"two formats: --json and --format {shown_as}; give one")
    shown_as = "json" if as_json else shown_as
    for mode, given in (("--list", list_tasks), ("--compare", compare), ("--fetch-data", fetch_data is not None)):
        if given:
            ignored = (one.name for one in context.command.params if one.name not in (*SHOWING, *USED_BY[mode]))
            common.refuse_ignored(context, filter(None, ignored), f"a call without {mode}", "eval")
    if list_tasks:
        show_suite(known.groups(), data_root, shown_as)
        return
    if runs and not compare:
        raise PmodError(f"unexpected: {runs[0]}", hint="pmod eval --compare RUN RUN sets finished runs side by side")
    require("eval", "lmms_eval", "datasets", "accelerate")
    if compare:
        _compare(runs or [], seed, shown_as, out, overwrite, quiet)
        return
    if fetch_data is not None:
        _fetch(suite.resolve(fetch_data.split(",")), data_root, as_json)
        return
    benchmarks = suite.resolve(tasks.split(","))
    name = common.model_or_default(model)

    from pmod_cli.evaluation import data, eval_models

    others = _against(against, name, benchmarks, offline)
    if methods is None:
        common.refuse_ignored(context, ("budgets",), "--methods", "eval")
    else:
        reached, notes = eval_models.at_budgets(name, methods.split(","), budgets.split(","), offline=offline)
        others += reached
        for sentence in notes:
            output.note(sentence)
    chosen = eval_models.choose(name, others, revision=revision, offline=offline)
    data.require_data(benchmarks, data_root)

    from pmod_cli.evaluation.eval_plan import EvalSettings, default_folder

    device = common.pick_device(device)
    rows, halve = batch_size
    settings = EvalSettings(
        limit=limit,
        batch_size=rows or AUTO_ROWS["cpu" if device == "cpu" else "gpu"],
        device=device,
        dtype=_pick_dtype(dtype, device),
        attention=attention,
        seed=seed,
        data_root=data_root,
        halve=halve,
        check_batching=check_batching,
    )
    out = out or default_folder(chosen, benchmarks, settings)
    output.note(f"models: {', '.join(f'{eval_model.label} ({eval_model.path})' for eval_model in chosen)}")
    output.note(f"tasks: {', '.join(benchmark.task for benchmark in benchmarks)}")
    output.note(f"folder: {out}")
    _check_processes(num_processes, device, launched)
    require_attention(attention, device)
    if dry_run:
        from pmod_cli.evaluation.eval_plan import plan

        found = plan(benchmarks, chosen, settings, out, processes=num_processes, overwrite=overwrite)
        show_plan(found, as_json=shown_as == "json", quiet=quiet)
        return

    from pmod_cli.evaluation import processes

    run = (benchmarks, chosen, settings, out, overwrite, quiet, progress)
    if num_processes > 1:
        results = processes.launch(num_processes, _answer, *run)
    else:
        here = processes.join()
        results = _answer(here, *run)
        if not here.first:
            return
    if quiet and shown_as != "json":
        output.print_line(out)
    else:
        show_results({"folder": str(out), **results}, shown_as)
    if results["failed"]:
        scored = any(score["score"] is not None for task in results["tasks"] for score in task["scores"].values())
        failed, where = results["failed"], staging_of(out) if overwrite else out
        kept = f"; {out} was not replaced, and what was answered is in {where}" if overwrite else ""
        raise PmodError(
            f"{len(failed)} of {len(benchmarks) * len(chosen)} benchmark runs failed: {failed[0]}{kept}",
            hint=f"the whole log: {where / 'lmms-eval.log'}",
            code=PARTIAL if scored else RUN_FAILED,
        )


def _answer(
    processes: Processes,
    benchmarks: tuple[Benchmark, ...],
    chosen: list[EvalModel],
    settings: EvalSettings,
    out: Path,
    overwrite: bool,
    quiet: bool,
    progress: bool,
) -> dict[str, Any]:
    """The part of the command that several processes do together."""
    from pmod_cli.evaluation import tiny_data
    from pmod_cli.evaluation.runner import evaluate

    output.set_quiet(quiet or not processes.first)
    output.set_progress(progress)
    if processes.first:
        tiny_data.draw(
            benchmarks,
            lambda folder: output.warn(f"waiting for another process, which draws the questions in {folder}"),
        )
    with Bars() as bars:
        return evaluate(
            benchmarks, chosen, settings, out, overwrite=overwrite, processes=processes, on_progress=bars.show
        )


def _check_processes(count: int, device: str, launched: bool) -> None:
    if count > 1 and launched:
        raise PmodError("--num-processes: torchrun or accelerate has started several processes already")
    require_device(device, count)


def _against(against: str | None, name: str, benchmarks: tuple[Benchmark, ...], offline: bool) -> list[str]:
    """What to compare with. The tiny tasks take seconds, so there the stock model stands beside p-MoD unasked."""
    from pmod_cli.checkpoints import resolve, router_state
    from pmod_cli.evaluation import eval_models

    if against is not None:
        named = [part.strip() for part in against.split(",") if part.strip()]
        if "none" in named and len(named) > 1:
            raise PmodError(f"--against {against}: none, and others beside it", hint="leave none out")
        return [] if named == ["none"] else named
    path = resolve(name, offline=offline).path
    if router_state(path) == "stock" or any(not benchmark.drawn for benchmark in benchmarks):
        return []
    if eval_models.stock_source(path) is None:
        output.note("no stock model beside it: the checkpoint does not say what it was made from; --against names one")
        return []
    return ["stock"]


def _pick_dtype(dtype: str, device: str) -> str:
    """`auto` is the dtype as stored, but float32 on a CPU: most have no bfloat16 arithmetic and emulate it slowly."""
    if dtype != "auto" or device != "cpu":
        return dtype
    output.note("dtype: float32 (the fastest on a CPU, and answers do not depend on the batch size)")
    return "float32"


def _compare(runs: list[Path], seed: int, shown_as: str, out: Path | None, overwrite: bool, quiet: bool) -> None:
    from pmod_cli.evaluation.results.comparison import compare

    results = compare(runs, seed=seed)
    for sentence in results["unequal"]:
        output.warn(sentence)
    if out is not None:
        from pmod_cli.evaluation.results.folder import write_comparison

        write_comparison(results, out, runs, overwrite=overwrite)
        results = {"folder": str(out), **results}
        if quiet and shown_as != "json":
            output.print_line(out)
            return
    show_results(results, shown_as)


def _fetch(benchmarks: tuple[Benchmark, ...], data_root: Path | None, as_json: bool) -> None:
    from pmod_cli.evaluation import data

    if data_root is None:
        raise PmodError("--fetch-data needs a folder to copy to", hint="add --data-root DIR")
    files = data.fetch(benchmarks, data_root, output.note)
    if as_json:
        output.print_json({"schema_version": 1, "data_root": str(data_root), "files": files})
    else:
        output.note(f"{len(files)} files; on the other machine: sha256sum --check {data.CHECKSUMS}")
        output.print_line(data_root)
