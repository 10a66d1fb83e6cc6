"""`pmod visualize`: which image patches each layer keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.commands import common
from pmod_cli.core import output
from pmod_cli.core.errors import BAD_INPUT, PARTIAL, PmodError
from pmod_cli.core.text import one_of
from pmod_cli.model.registry import SELECTIONS

if TYPE_CHECKING:
    from pmod_cli.visualization import Drawn, LoadedModel

EXAMPLES = """\
pmod visualize img.png --layers 2,14,26
pmod visualize img.png --layers 8-31 --question "What does the sign say?" --html
pmod visualize img.png --mode weights --layers 14,20,26 -o weights.svg
pmod visualize img.png --against tiny-llava-next --layers 14,20,26
pmod visualize photos/ --mode depth -o drawn/
pmod visualize img.png --model tiny-llava-next --method divprune@0.4
pmod visualize rows.json --image-folder images/ --max-new-tokens 0
pmod visualize before.png after.png --together --question "What has changed?" -o drawn/
pmod visualize clip.mp4 --video --layers 14,26
"""
SCHEMA_VERSION = 2
_look = common.option_under("What to draw")
_compare = common.option_under("Comparing")
_write = common.option_under("What is written")


def visualize(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="Pictures, folders of them, LLaVA JSON or JSONL files, or .npz selections saved before.",
            show_default=False,
        ),
    ],
    layers: Annotated[str, _look("--layers", metavar="LIST", help="Layers from 0: all, 2,14,26 or 2-8.")] = "all",
    mode: Annotated[
        str | None,
        _look(
            metavar="MODE",
            help="kept: patches; weights: the router's; depth: how many layers keep a patch; schedule: planned and "
            "real retention; compare: two selections; grid: kept, small. (default: kept; compare with --against)",
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        str,
        _look(
            metavar="PARTS",
            help="Of LLaVA-NeXT's whole image and tiles: separate panels, merged in one, only base, or only tiles.",
        ),
    ] = "separate",
    question: Annotated[
        str | None,
        _look(
            metavar="TEXT",
            help="What to ask; <image> in it moves the image there. (default: the row's own, else: What is shown in "
            "this image?)",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, _look(min=0, metavar="N", help="Length of the answer; 0 for no answer.")] = 32,
    answer_only: Annotated[
        bool, _look("--answer-only/--no-answer-only", help="Caption without question, legend and model.")
    ] = False,
    together: Annotated[
        bool, _look("--together", help="All pictures in one prompt, as a model of several images takes them.")
    ] = False,
    video: Annotated[
        bool,
        _look("--video", help="IMAGE... are videos: files, or folders of frames. Frames stand side by side."),
    ] = False,
    image_folder: Annotated[
        Path | None,
        _look(metavar="DIR", help="Where the images of JSON rows are. (default: beside the file)", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        _look(
            metavar="NAME@SHARE",
            help="Another method on these weights, of a stock LLaVA too, at a share of the stock model's FLOPs on this "
            "prompt: fastv@0.4.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        _compare(
            metavar="NAME",
            help="Another p-MoD checkpoint, a stock LLaVA (its attention is drawn), stock (what the model was made "
            f"from), an .npz file, or a selection for the same weights: {one_of(SELECTIONS)}.",
        ),
    ] = None,
    against_question: Annotated[
        str | None,
        _compare(
            metavar="TEXT",
            help="The same model on another question, with <image> in both: a question behind the image changes "
            "nothing, all is in common.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        _write(
            "--out",
            "-o",
            metavar="PATH",
            help="Picture to write, .png or .svg; of several, a folder. (default: IMAGE-pmod.png)",
            show_default=False,
        ),
    ] = None,
    svg: Annotated[bool, _write("--svg", help="SVG where --out names no file.")] = False,
    html: Annotated[bool, _write("--html", help="Also a page with a layer slider, beside the picture.")] = False,
    npz: Annotated[bool, _write("--npz", help="Also the raw selection as NumPy arrays.")] = False,
    model: common.ModelOpt = None,
    device: common.DeviceOpt = "auto",
    dtype: common.DtypeOpt = "auto",
    as_json: common.JsonOpt = False,
    revision: common.RevisionOpt = None,
    offline: common.OfflineOpt = False,
    cache_dir: common.CacheDirOpt = None,
    progress: common.ProgressOpt = True,
    quiet: common.QuietOpt = False,
) -> None:
    """Draw which image patches each layer keeps: kept ones clear, skipped ones grey, one panel a layer."""
    from pmod_cli import checkpoints, visualization
    from pmod_cli.evaluation import eval_models

    compares = against is not None or against_question is not None
    settings = visualization.DrawSettings(
        layers=layers,
        mode=mode or ("compare" if compares else "kept"),
        parts=parts,
        question=question,
        against_question=against_question,
        max_new_tokens=max_new_tokens,
        answer_only=answer_only,
    )
    _check_comparison(settings.mode, against, against_question)
    asked = None if method is None else _method(method, settings.mode)

    # Everything that can be wrong is looked at before the weights are.
    items = visualization.find_items(images, image_folder, together=together, film=video)
    saved_other = Path(against) if against and Path(against).suffix == ".npz" else None
    ending = "svg" if svg else "png"
    beside = [suffix for suffix, wanted in ((".html", html), (".npz", npz)) if wanted]
    read = [*images, *([saved_other] if saved_other else [])]
    is_batch = len(items) > 1 or items[0].path != images[0]  # a folder or a list of one picture is a batch too
    if is_batch:
        called = visualization.short_name(images[0].resolve().stem) if len(images) == 1 else "pictures"
        folder = out or Path(f"{called}-pmod")
        targets = visualization.folder_targets(items, folder, ending, beside, read)
    else:
        targets = visualization.one_target(items[0], out, ending, beside, read)
    faults = visualization.check_pictures(items)
    readable = [(item, target) for item, target in zip(items, targets, strict=True) if item.can_be_asked(faults)]
    items, targets = [item for item, _ in readable], [target for _, target in readable]
    depths = visualization.check_saved(items, saved_other, settings)
    subject: LoadedModel | None = None
    other: LoadedModel | Path | None = saved_other
    if not all(item.is_saved for item in items):
        name = common.model_or_default(model)
        found = checkpoints.resolve(name, revision=revision, offline=offline, cache_dir=cache_dir)
        visualization.check_checkpoint(found, name, layers=layers, parts=parts, method=asked is not None, saved=depths)
        loading: dict[str, Any] = {"dtype": dtype, "device": common.pick_device(device)}
        if against and not saved_other and against not in SELECTIONS:
            against = eval_models.stock_against(found.path, against) if against == "stock" else against
            found_other = checkpoints.resolve(against, offline=offline, cache_dir=cache_dir)
            visualization.check_pair(found, found_other)
            other = visualization.load_checkpoint(found_other, against, **loading)
        subject = visualization.load_checkpoint(found, name, method=asked, **loading)
        for line in subject.notes:
            output.note(f"{subject.name}: {line}")
        if against in SELECTIONS:
            other = replace(subject, name=f"{subject.name}, {against}", selection=against)
        drawn = [each for each in (subject, other) if isinstance(each, visualization.LoadedModel)]
        common.warn_of_ties((each.router_state, each.chosen_by) for each in drawn)
    elif asked:
        raise PmodError("--method asks a model, and these selections are saved", hint="name a picture")
    elif against and not saved_other:
        raise PmodError(f"saved selections are compared with saved ones, not with {against}", hint="--against B.npz")

    run = visualization.run(
        items, settings, targets, subject=subject, against=other, beside=beside, faults=faults if is_batch else None
    )
    drew = _report(
        run, len(items), folder / visualization.STATISTICS if is_batch else None, as_json=as_json, quiet=quiet
    )
    if not drew:
        raise visualization.summed_up(faults, BAD_INPUT)
    if faults:
        raise visualization.summed_up(faults, PARTIAL)


def _method(text: str, mode: str) -> tuple[str, float]:
    """The method and the share of `fastv@0.4`."""
    from pmod_cli.model import droppers

    known = droppers()
    name, _, share = text.partition("@")
    if name not in known or not re.fullmatch(r"0?\.\d+|1|1\.0*", share) or not float(share):
        raise PmodError(
            f"--method {text}: expected a method and a share of the FLOPs: {one_of(known)}", hint="--method fastv@0.4"
        )
    if mode == "weights":
        raise PmodError(f"--mode weights: {name} has no routers, whose weights could be drawn", hint="--mode kept")
    return name, float(share)


def _check_comparison(mode: str, against: str | None, against_question: str | None) -> None:
    if against is not None and against_question is not None:
        raise PmodError("--against and --against-question were both given", hint="compare with one of them at a time")
    given = "--against" if against is not None else "--against-question" if against_question is not None else None
    if given and mode != "compare":
        raise PmodError(f"--mode {mode} compares nothing, yet {given} was given", hint="--mode compare")
    if mode == "compare" and not given:
        raise PmodError("--mode compare: with what?", hint="--against MODEL or --against-question TEXT")


def _report(run: Iterator[Drawn], total: int, statistics: Path | None, *, as_json: bool, quiet: bool) -> bool:
    """Draw, and print what was drawn: paths, JSON, or tables.

    Args:
        statistics: where the numbers of a batch are written; None for a single picture.

    Returns:
        Whether any was drawn; else nothing is printed or written.
    """
    from pmod_cli import visualization
    from pmod_cli.core.atomic import write_json

    described: list[dict[str, Any]] = []
    numbers, models, warned = [], set(), set()
    with output.progress() as bar:
        task = bar.add_task("drawing", total=total, visible=statistics is not None)
        for drawn in run:
            numbers.append(visualization.image_statistics(drawn.record))
            models.add(drawn.record.model)
            for warning in _warnings(drawn):
                if warning not in warned:
                    output.warn(warning)
                    warned.add(warning)
            layers = drawn.layers
            if as_json:
                described.append(visualization.describe(drawn))
            elif quiet:
                for file in drawn.files:
                    output.print_line(file)
            elif statistics:
                output.note(f"wrote {', '.join(map(str, drawn.files))}")
            else:
                _render(drawn)
            bar.advance(task)
    if not numbers:
        return False
    summary = visualization.summarise(numbers, layers)
    if statistics:
        write_json(statistics, {"schema_version": SCHEMA_VERSION, "models": sorted(models), **summary})
    if as_json:
        output.print_json({"schema_version": SCHEMA_VERSION, "images": described, "statistics": summary})
    elif quiet and statistics:
        output.print_line(statistics)
    elif statistics:
        for line in visualization.summary_lines(summary):
            output.stdout.print(line, markup=False, soft_wrap=True)
        drawn_of = f"{len(numbers)} picture{'s' * (len(numbers) > 1)}"
        output.stdout.print(f"wrote {drawn_of} and {statistics}", markup=False, soft_wrap=True)
    return True


def _warnings(drawn: Drawn) -> Iterator[str]:
    """What a reader of the picture should know before it is believed; each is said once."""
    from pmod_cli import visualization
    from pmod_cli.checkpoints import toy

    record = drawn.record
    if drawn.against and visualization.asked_blindly(record, drawn.against):
        yield f"{visualization.BLIND} Put <image> behind the text: --question 'What is red in <image>?'"
    if toy.NOTE in record.all_notes and not toy.is_document(record.image):
        yield toy.FOREIGN
    if any(visualization.OFF_BUDGET in note for note in record.model_notes):
        yield f"{record.model}: the method misses its share of the FLOPs: caption and --json say how near it comes"
    if boxes := visualization.undrawable(record.question, record.answer, record.model):
        yield (
            f"no installed font has {boxes[:20]}: pictures show boxes in their place. Install a font that has them, "
            "such as Noto Sans CJK; pages of --html take the fonts of the browser"
        )


def _render(drawn: Drawn) -> None:
    from pmod_cli.visualization import layer_table

    output.stdout.print(layer_table(drawn))
    if drawn.record.answer is not None:
        output.stdout.print(f"answer: {drawn.record.answer}", markup=False, soft_wrap=True)
    for file in drawn.files:
        output.stdout.print(f"wrote {file}", markup=False, soft_wrap=True)
