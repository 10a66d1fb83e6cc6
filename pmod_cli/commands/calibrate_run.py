"""What `pmod calibrate` and `pmod convert --calibrate` do: check, load, calibrate, write, print."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli.commands.common import CURRENT, pick_device, record_current
from pmod_cli.core import output
from pmod_cli.core.errors import PmodError


def shares(flag: str, text: str) -> tuple[float, ...]:
    """`0.54,0.35` as numbers, each once.

    Raises:
        PmodError: something else than numbers above 0 and up to 1, or two that would be written to one folder.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PmodError(f"{flag} {text!r:.60}: expected shares separated by commas, such as 0.54,0.35") from None
    if not all(0 < share <= 1 for share in found):  # NaN too, which no folder can be named by
        raise PmodError(f"{flag} {text}: expected shares above 0 and at most 1, such as 0.54,0.35")
    names = [_percent(share) for share in found]
    if len(set(names)) < len(names):
        raise PmodError(f"{flag} {text}: two shares that are the same in whole percent, and would be one folder")
    return found


def calibration_budget(wanted: Mapping[str, Any], target_flops: float | None) -> dict[str, Any]:
    """What `pmod convert --calibrate` was told, as fields of `CalibrationSettings`.

    Args:
        wanted: Fields of `PmodSettings` that were typed.
        target_flops: Share of the stock decoder's prefill FLOPs.

    Raises:
        PmodError: settings that calibration chooses itself, or two budgets.
    """
    if others := sorted({*wanted} - {"mean", "schedule"}):
        raise PmodError(f"--calibrate chooses ratios and routers itself: leave {', '.join(others)} out")
    if wanted.get("schedule", "cosine") != "cosine":
        raise PmodError(f"--calibrate finds a schedule, or takes the cosine, and not {wanted['schedule']}")
    if target_flops is not None and "mean" in wanted:
        raise PmodError("--target-flops and --target-retention are two budgets: give one of them")
    return {
        "budgets": (wanted.get("mean", 0.54 if target_flops is None else target_flops),),
        "of": "retention" if "mean" in wanted else "flops",
        "schedule": "cosine" if "schedule" in wanted else "search",
    }


def calibrate_to(
    name: str,
    out: Path | None,
    asked_for: dict[str, Any],
    *,
    recalibrate: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None,
    offline: bool,
    cache_dir: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """One checkpoint for each budget; the first is the current model afterwards.

    Args:
        name: As typed.
        out: Folder, or the beginning of the folders' names; None is `checkpoints/MODEL-calibrated`.
        asked_for: Fields of `CalibrationSettings`.
        recalibrate: Whether a trained p-MoD model may lose its routers.
        overwrite: Whether what is there may be replaced.
        device: As torch names it; None is the accelerator that is there, else the CPU.
        dtype: Of the weights while they run; `auto` is as stored.
        revision: Branch, tag or commit on the hub.
        offline: Do not use the network.
        cache_dir: Of the hub.
        as_json: Print one JSON object.
        quiet: Print the folders alone.

    Raises:
        PmodError: what is wrong, before anything is written.
    """
    from pmod_cli import checkpoints
    from pmod_cli.calibration.calibration import CalibrationSettings, calibrate, router_values
    from pmod_cli.calibration.measured import Measured, digest
    from pmod_cli.calibration.results import card, chosen, notes, tables, to_json
    from pmod_cli.checkpoints.processor_limits import with_limits
    from pmod_cli.data.several import ALL_TASKS
    from pmod_cli.families.sizes import Sizes

    if asked_for["data"] in ALL_TASKS and Path(asked_for["data"]).is_dir():  # and not the synthetic task of its name
        asked_for = asked_for | {"data": f"./{asked_for['data']}"}
    settings = CalibrationSettings(**asked_for)
    found = checkpoints.resolve(name, revision=revision, offline=offline, cache_dir=cache_dir)
    state = checkpoints.router_state(found.path)
    if state == "trained" and not recalibrate:
        raise PmodError(
            f"{name} is a trained p-MoD model: its weights were trained with the routers that it has",
            hint="calibrate the stock model, or add `recalibrate=True`",
        )
    origin = f"{found.repo}@{found.commit}" if found.repo else found.alias or str(found.path)
    short = found.alias or (found.repo or str(found.path.resolve())).split("/")[-1]
    out = out or Path("checkpoints", f"{short}-calibrated")
    several = len(settings.budgets) > 1
    if several and out.name in ("", ".."):
        raise PmodError(
            f"`out={out}` has no name, and of several budgets each gets a folder that is named after it",
            hint="`out=calibrated`",
        )
    targets = [out.with_name(f"{out.name}-{_percent(share)}") if several else out for share in settings.budgets]
    options = checkpoints.Options(offline=offline)
    for target in targets:
        checkpoints.check_target(target, checkpoints.sources_of(found.path, options), overwrite=overwrite)
    source = checkpoints.read_source(found.path, options).without_routers()
    sizes = with_limits(Sizes.of(source.config), found.path)
    model, processor = checkpoints.load_model(found.path, dtype=dtype, device=device or pick_device("auto"))
    measured = Measured(CURRENT.parent / f"calibrate-{digest(str(out.absolute()))[:12]}.sqlite")
    results = calibrate(model, processor, sizes, settings, output.note, measured)
    if measured.found:
        output.note(f"{measured.found} measurements of a run that was stopped were used")
    for target, result in zip(targets, results, strict=True):
        checkpoints.convert(
            source,
            target,
            result.found.schedule.settings(),
            options,
            overwrite=overwrite,
            origin=origin,
            calibrated=checkpoints.Calibrated(
                router_values(result.found),
                card(result, settings),
                partial(_write_more, result=result, results=results, settings=settings),
            ),
        )
    measured.forget()
    record_current(targets[0])
    if as_json:
        said = to_json(results, settings)
        output.print_json(said | {"model": {"name": name}, "written": [str(target) for target in targets]})
    elif quiet:
        for target in targets:
            output.print_line(target)
    else:
        for table, result, target in zip(tables(results), results, targets, strict=True):
            output.stdout.print(table, "")
            output.stdout.print(f"{chosen(result)}\n{target}\n", soft_wrap=True, markup=False)
        for line in notes(results, settings):
            output.stdout.print(line, style="dim", soft_wrap=True, markup=False)


def _write_more(folder: Path, result: Any, results: list, settings: Any) -> None:
    """`calibration.json` and the figures, into the folder of a result that is being made."""
    from pmod_cli.calibration.results import depth_figure, pareto_figure, to_json
    from pmod_cli.core.atomic import write_json
    from pmod_cli.profiling import plots

    write_json(folder / "calibration.json", to_json([result], settings))
    plots.save(depth_figure(result), folder / "calibration.png")
    if len(results) > 1:
        plots.save(pareto_figure(results), folder / "pareto.png")


def _percent(share: float) -> int:
    return round(100 * share)
