"""The Markdown table of a run, and what changed between two."""

from __future__ import annotations

from collections.abc import Iterator

HEAD = "| | value | goal | FLOP or byte limit | stock | p-MoD | |\n|---|---|---|---|---|---|---|"
WORSE = 0.02  # a ratio that moved by more is named


def markdown(run: dict) -> str:
    """One table a step, from the JSON alone."""
    device, versions = run["machine"]["device"], run["machine"]["versions"]
    lines = [f"{device}, torch {versions['torch']}, transformers {versions['transformers']}; {run['date']}."]
    if run["toy"]:
        lines.append("A toy run on a CPU: it shows that every step works, and no number says anything about a GPU.")
    for name, step in run["steps"].items():
        state = step["status"] + (f": {step['error']}" if step.get("error") else "")
        lines += ["", f"**{name}** ({state}, {step['seconds']:.0f} s)", ""]
        if step["rows"]:
            lines += [HEAD, *map(_line, step["rows"])]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    unit = {"ratio": "", "x": " ×", "tests": "", "": ""}.get(row["unit"], f" {row['unit']}")
    value = "–" if row["value"] is None else f"{row['value']:.4g}{unit}"
    goal = "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {row['goal']:.4g}"
    if row["met"] is False:
        value = f"**{value}**"
    limit = "" if row["limit"] is None else f"{row['limit']:.4g}"
    times = [_time(row, name) for name in ("stock", "p-mod")]
    return f"| {row['name']} | {value} | {goal} | {limit} | {times[0]} | {times[1]} | {row['note'].replace('|', '/')} |"


def _time(row: dict, name: str) -> str:
    if name not in row["seconds"]:
        return ""
    return f"{1000 * row['seconds'][name]:.2f} ms ± {100 * row['spread'].get(name, 0):.1f} %"


def compare(old: dict, new: dict) -> Iterator[str]:
    """A line for each row that is in one run alone, or whose number or verdict changed."""
    before, after = _rows(old), _rows(new)
    if old["machine"]["device"] != new["machine"]["device"]:
        yield f"the machines differ: {old['machine']['device']} and {new['machine']['device']}"
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after or key not in before:
            yield f"{key}: only in the {'old' if key in before else 'new'} run"
            continue
        one, two = before[key], after[key]
        if one["value"] is None or two["value"] is None:
            if one["value"] != two["value"]:
                yield f"{key}: {one['value']} to {two['value']}"
            continue
        moved = (two["value"] - one["value"]) / abs(one["value"]) if one["value"] else two["value"]
        if abs(moved) > WORSE or one["met"] != two["met"]:
            verdict = "" if one["met"] == two["met"] else f"; goal {'met' if two['met'] else 'missed'} now"
            yield f"{key}: {one['value']:.4g} to {two['value']:.4g} ({100 * moved:+.1f} %){verdict}"


def _rows(run: dict) -> dict[str, dict]:
    return {f"{name}: {row['name']}": row for name, step in run["steps"].items() for row in step["rows"]}
