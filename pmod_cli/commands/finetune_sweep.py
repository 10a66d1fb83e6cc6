"""`pmod finetune --sweep GROUP`: all recipes of a group with several seeds, and one table."""

from __future__ import annotations

from pathlib import Path

from pmod_cli.commands.finetune_show import silence_transformers
from pmod_cli.core import output
from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.errors import PARTIAL, PmodError


def run_sweep(
    group: str,
    out: Path,
    *,
    seeds: int,
    overrides: list[str],
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run what is missing of a sweep, then write `table.json` and `table.md` in its folder, and print one of them.

    With `dry_run`, only plan it.
    """
    from pmod_cli.training import ablation_sweep as sweep

    cells = sweep.cells_of(group, range(seeds))
    if dry_run:
        plan = sweep.plan_sweep(cells, out, overrides=overrides, device=device)
        if quiet and not as_json:
            output.print_line(out)
        else:
            _show_plan(plan, as_json)
        return
    silence_transformers()
    output.note(f"{len(cells)} cells in {out}; run the same command again to go on, or beside this one to share them")
    number = {cell: place for place, cell in enumerate(cells, 1)}

    def tell(cell: sweep.Cell, what: str) -> None:
        output.note(f"cell {number[cell]}/{len(cells)}  {cell.name}  {what}")

    found = sweep.sweep(cells, out, overrides=overrides, device=device, on_cell=tell)
    write_json(out / "table.json", found)
    write_text(out / "table.md", sweep.markdown(found))
    if quiet and not as_json:
        output.print_line(out)
    else:
        _show(found, as_json)
    missing = [row["recipe"] for row in found["rows"] if row["status"] != "run"]
    if missing:
        raise PmodError(
            f"not finished here: {', '.join(missing)}", hint="another process may be at them; repeat", code=PARTIAL
        )


def _show(found: dict, as_json: bool) -> None:
    from pmod_cli.training.ablation_sweep import markdown

    if as_json:
        output.print_json(found)
    else:
        output.print_line(markdown(found).rstrip())


def _show_plan(plan: dict, as_json: bool) -> None:
    if as_json:
        output.print_json(plan)
        return
    from rich.table import Table

    table = Table("recipe", "vision tokens kept", "steps", "rows", "FLOPs a cell", "seeds done", "left")
    for row in plan["rows"]:
        done, left = (", ".join(map(str, row[name])) or "-" for name in ("done", "left"))
        counts = (
            f"{row['mean_retention']:.2%}",
            f"{row['steps']:,}",
            f"{row['rows']:,}",
            f"{row['flops_per_cell']:.3g}",
        )
        table.add_row(row["recipe"], *counts, done, left)
    output.stdout.print(table)
    seconds = plan["cpu_seconds_left"]
    took = "" if seconds is None else f", {seconds / 3600:.1f} CPU hours by the cells that are done"
    output.print_line(
        f"{plan['cells']} cells in {plan['folder']}: {plan['done']} done, {plan['left']} left, "
        f"{plan['flops_left']:.3g} FLOPs{took}"
    )
