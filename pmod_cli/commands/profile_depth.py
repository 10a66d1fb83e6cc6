"""`pmod profile --report depth`: loads the model, asks it, and measures what each layer is for."""

from __future__ import annotations

from pathlib import Path

from pmod_cli.commands.profile_show import ShownReport
from pmod_cli.core import output


def read_depth(
    name: str,
    data: str,
    images_root: Path | None,
    samples: int,
    *,
    device: str,
    dtype: str,
    revision: str | None,
    seed: int = 0,
) -> ShownReport:
    """The report, ready to be shown.

    Raises:
        PmodError: no such model or data, or pictures that cannot be read.
    """
    from pmod_cli.calibration import depth_report
    from pmod_cli.calibration.asked import Asked
    from pmod_cli.calibration.depth import measure_depth, over_tasks
    from pmod_cli.calibration.replay import Replay
    from pmod_cli.calibration.samples import read_samples
    from pmod_cli.checkpoints import load_model, resolve

    asked_about = read_samples(data, samples, images=images_root, seed=seed)
    model, processor = load_model(resolve(name, revision=revision).path, dtype=dtype, device=device)
    asked = Asked(model, processor)
    unanswered = sum(not sample.answers for sample in asked_about)
    if unanswered:
        output.note(f"{unanswered} of {samples} pictures have no answers: the model's own take their place")
    replay = Replay(model)
    batches = asked.batches(asked.answered(asked_about))
    with output.progress() as bar:
        shown = bar.add_task("layers", total=len(replay) * len(batches))
        found = over_tasks(measure_depth(replay, batches, lambda: bar.advance(shown)))
    answers = "the model's own answers" if unanswered == samples else "the given answers"
    return ShownReport(
        title=name,
        headline=f"{name}: {len(replay)} layers, {samples} pictures of {data}, loss of {answers}",
        tables=depth_report.depth_tables(found),
        notes=list(depth_report.NOTES),
        json={
            "schema_version": 1,
            "model": {"name": name},
            "data": {"name": data, "samples": samples, "seed": seed},
            "depth": depth_report.depth_json(found),
        },
        rows=depth_report.depth_rows(found),
        figure=lambda: depth_report.depth_figure(found),
        caption="Rise of the answers' loss by layer: skipped by all tokens, by vision tokens, or hidden from it on",
    )
