"""Who is asked: the model, and beside it the stock model, another checkpoint or a selection that routers must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pmod_cli.checkpoints import resolve, router_state
from pmod_cli.checkpoints.convert import PROVENANCE
from pmod_cli.checkpoints.files import read_json
from pmod_cli.errors import PmodError

CONTROLS = ("random", "uniform")
RUN_SETTINGS = "config.yaml"  # what finetune leaves beside a checkpoint, with the model that it started from


@dataclass(frozen=True)
class Subject:
    """One column of the report.

    Attributes:
        label: Head of the column, unique in a run.
        path: Folder of the checkpoint.
        routers: `stock`, `untrained`, `trained` or `calibrated`.
        selection: How a p-MoD layer picks its vision tokens: `router`, `random` or `uniform`.
        commit: Commit of the checkpoint on the hub, where it came from there.
    """

    label: str
    path: Path
    routers: str
    selection: str = "router"
    commit: str | None = None


def choose(name: str, against: Iterable[str], *, revision: str | None = None, offline: bool = False) -> list[Subject]:
    """The model `name` and what it is compared with, in the order given.

    Args:
        against: `stock` (what the p-MoD model was made from), `random` and `uniform` (the same weights, as many vision
            tokens kept, other ones), or any model name.

    Raises:
        PmodError: a model cannot be found, or a control was asked of a model that selects nothing.
    """
    main = _subject(name, revision, offline)
    subjects = [main]
    for other in against:
        if other in CONTROLS:
            if main.routers == "stock":
                raise PmodError(
                    f"--against {other}: {name} is a plain LLaVA, which keeps every vision token",
                    hint=f"pmod convert {name}",
                )
            subjects.append(Subject(other, main.path, main.routers, other, main.commit))
        elif other == "stock":
            source = stock_source(main.path)
            if source is None:
                raise PmodError(
                    f"--against stock: {main.path} does not say what it was made from", hint="--against FOLDER names it"
                )
            subjects.append(_subject(source, None, offline, label="stock"))
        else:
            subjects.append(_subject(other, None, offline))
    return [_unique(subject, subjects[:place]) for place, subject in enumerate(subjects)]


def stock_source(path: Path) -> str | None:
    """The name of the stock model at the start of a checkpoint's history, or None where the history does not say."""
    name: str | None = None
    folder: Path | None = path
    for _ in range(20):  # a history that names itself ends too
        if folder is None or not folder.is_dir():
            return name
        if router_state(folder) == "stock":
            return name or str(folder)
        if (folder / PROVENANCE).is_file():
            name = read_json(folder / PROVENANCE)["source"]
        elif (folder / RUN_SETTINGS).is_file():
            name = yaml.safe_load((folder / RUN_SETTINGS).read_text(encoding="utf-8"))["model"]["name"]
        else:
            return None
        folder = Path(name)
    return None


def describe(subject: Subject, model: Any, processor: Any) -> dict[str, Any]:
    """What a score depends on, as far as it lies in the loaded model."""
    retention = getattr(model.config, "retention", None)
    return {
        "path": str(subject.path),
        "commit": subject.commit,
        "weights_sha256": weights_sha256(subject.path),
        "routers": subject.routers,
        "selection": subject.selection if subject.routers != "stock" else None,
        "mean_retention": sum(retention) / len(retention) if retention else 1.0,
        "pmod": getattr(model.config, "pmod", None),
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": str(model.device),
        "image_processor": type(processor.image_processor).__name__,
    }


def weights_sha256(folder: Path) -> str:
    """One digest over the weight files of a checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _subject(name: str, revision: str | None, offline: bool, label: str | None = None) -> Subject:
    found = resolve(name, revision=revision, offline=offline)
    title = label or found.alias or Path(name).resolve().name
    return Subject(title, found.path, router_state(found.path), commit=found.commit)


def _unique(subject: Subject, before: list[Subject]) -> Subject:
    """`name`, or `name (2)` where an earlier column has that name."""
    count = 1 + sum(other.label == subject.label for other in before)
    return subject if count == 1 else Subject(**{**vars(subject), "label": f"{subject.label} ({count})"})
