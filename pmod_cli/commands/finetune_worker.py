"""One process of `pmod finetune --num-processes`: `python -m pmod_cli.commands.finetune_worker FOLDER`, by a launcher.

FOLDER has `job.json`. The first process of a machine writes `report.json` there, one that fails `error-RANK.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pmod_cli.core import output
from pmod_cli.core.errors import explain


def main(folder: Path) -> int:
    """Do the job; 0 also where the run was interrupted, which the report says."""
    job = json.loads((folder / "job.json").read_text())
    rank, first_here = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"
    output.set_quiet(job["quiet"] or rank > 0)
    output.set_progress(job["progress"])
    output.hush_libraries()
    try:
        from pmod_cli.commands.finetune_show import Watching, silence_transformers
        from pmod_cli.training.launch import write_report
        from pmod_cli.training.recipe import settings_of
        from pmod_cli.training.run import finetune

        silence_transformers()
        settings = settings_of(job["settings"])
        with Watching(settings) as watching:
            report = finetune(
                settings,
                Path(job["out"]),
                device=job["device"],
                resume=job["resume"],
                overwrite=job["overwrite"],
                on_open=lambda: output.note(f"run folder: {job['named']}"),
                on_note=output.warn,
                on_step=watching.update,
            )
    except BaseException as error:
        known = explain(error)
        if known is None or os.environ.get("PMOD_DEBUG") == "1":
            raise
        said = {"what": known.what, "hint": known.hint, "code": known.code}
        (folder / f"error-{rank}.json").write_text(json.dumps(said))
        return known.code
    if first_here:
        write_report(report, folder / "report.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
