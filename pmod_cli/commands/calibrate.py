"""`pmod calibrate`: a stock LLaVA to a p-MoD model that works, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.commands.common import (
    CacheDirOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    OfflineOpt,
    OverwriteOpt,
    ProgressOpt,
    QuietOpt,
    RevisionOpt,
    SeedOpt,
    one_of_these,
    option_under,
    pick_device,
)
from pmod_cli.core.errors import PmodError

EXAMPLES = """\
pmod calibrate tiny-llava-next
pmod calibrate llava-1.5-7b --data pictures --budget 0.54
pmod calibrate ./my-llava --data rows.json --images-root images --budget 0.54,0.45,0.35 -o calibrated
pmod calibrate ./my-llava --schedule cosine --samples 128
"""
_asked = option_under("What to ask")
_wanted = option_under("What to keep")


def calibrate(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, alias or hub id; stock or converted.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder to write; of several budgets, each gets its own, as OUT-54. (default: "
            "checkpoints/MODEL-calibrated)",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        _wanted(
            metavar="SHARE,...",
            help="Share of the stock decoder's prefill FLOPs, as profile counts them; several make several results. "
            "(default: 0.54)",
        ),
    ] = None,
    target_retention: Annotated[
        str | None, _wanted(metavar="SHARE,...", help="Instead: mean retention ratio over all layers.")
    ] = None,
    prompt: Annotated[
        str,
        _wanted(
            callback=one_of_these(("profile", "data"), "prompt"),
            metavar="KIND",
            help="FLOPs are counted on profile's prompt (672x672, 58 text tokens), or data's mean one.",
        ),
    ] = "profile",
    logits: Annotated[
        str,
        _wanted(
            callback=one_of_these(("every", "last"), "count of lm_head"),
            metavar="KIND",
            help="lm_head counts on every position, as profile has it, or on the last, as generate computes it.",
        ),
    ] = "every",
    schedule: Annotated[
        str,
        _wanted(
            callback=one_of_these(("search", "cosine"), "schedule of calibrate"),
            metavar="KIND",
            help="search: the ratio of each layer is found. cosine: the paper's.",
        ),
    ] = "search",
    data: Annotated[
        str, _asked(metavar="NAME", help="LLaVA JSON file, folder of pictures, data set of the hub, or tiny.")
    ] = "tiny",
    images_root: Annotated[
        Path | None, _asked(metavar="DIR", help="Folder of a file's images. (default: the file's)")
    ] = None,
    question: Annotated[
        list[str] | None, _asked(help="Ask this about each picture, not the data's questions; can be given again.")
    ] = None,
    samples: Annotated[int, _asked(help="Pictures; half of them choose, the other half judge.")] = 64,
    template: Annotated[
        str, _asked(metavar="NAME", help="Conversation template, as data.template of a recipe.")
    ] = "auto",
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Also of a trained p-MoD model; its routers are replaced.")
    ] = False,
    overwrite: OverwriteOpt = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "auto",
    as_json: JsonOpt = False,
    revision: RevisionOpt = None,
    offline: OfflineOpt = False,
    cache_dir: CacheDirOpt = None,
    quiet: QuietOpt = False,
    progress: ProgressOpt = True,
) -> None:
    """Choose ratios, layers that choose, and routers by a few dozen pictures, without training and without labels."""
    from pmod_cli.commands.calibrate_run import calibrate_to, shares

    if budget is not None and target_retention is not None:
        raise PmodError("--budget and --target-retention are two ways to say one thing: give one of them")
    calibrate_to(
        name,
        out,
        {
            "data": data,
            "images": images_root,
            "questions": tuple(question or ()),
            "samples": samples,
            "budgets": shares("--budget", "0.54" if budget is None else budget)
            if target_retention is None
            else shares("--target-retention", target_retention),
            "of": "flops" if target_retention is None else "retention",
            "prompt": prompt,
            "logits": logits,
            "schedule": schedule,
            "template": template,
            "seed": seed,
        },
        recalibrate=recalibrate,
        overwrite=overwrite,
        device=pick_device(device),
        dtype=dtype,
        revision=revision,
        offline=offline,
        cache_dir=cache_dir,
        as_json=as_json,
        quiet=quiet,
    )
