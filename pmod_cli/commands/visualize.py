"""`pmod visualize`: which image patches each layer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli import output
from pmod_cli.commands.common import (
    CacheDirOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    OfflineOpt,
    QuietOpt,
    RevisionOpt,
    model_or_default,
    pick_device,
)
from pmod_cli.errors import PmodError

if TYPE_CHECKING:
    from pmod_cli.visualization import SelectionRecord

EXAMPLES = """\
pmod visualize img.png --layers 2,14,26
pmod visualize img.png --layers 8-31 --question "What does the sign say?"
pmod visualize img.png --model runs/tiny -o figure.svg
pmod visualize img.png --json > selection.json
"""


def visualize(
    image: Annotated[Path, typer.Argument(help="Picture to show the model.", show_default=False)],
    layers: Annotated[
        str, typer.Option("--layers", metavar="LIST", help="Layers from 0: all, 2,14,26 or 2-8.")
    ] = "all",
    question: Annotated[
        str | None,
        typer.Option(help="What to ask about the picture. (default: What is shown in this image?)", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Length of the answer in the caption; 0 for no answer.")
    ] = 32,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Picture to write, .png or .svg. (default: IMAGE-pmod.png)", show_default=False
        ),
    ] = None,
    model: ModelOpt = None,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "auto",
    as_json: JsonOpt = False,
    revision: RevisionOpt = None,
    offline: OfflineOpt = False,
    cache_dir: CacheDirOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Draw which image patches each layer keeps: kept ones clear, skipped ones grey, one panel a layer."""
    name = model_or_default(model)
    from pmod_cli import checkpoints, visualization

    # Everything that can be wrong is looked at before the weights are.
    picture = visualization.load_image(image)
    target = _target(image, out)
    found = checkpoints.resolve(name, revision=revision, offline=offline, cache_dir=cache_dir)
    wanted = visualization.parse_layers(layers, _num_layers(found.path, name))

    loaded, processor = checkpoints.load_model(found.path, dtype=dtype, device=pick_device(device))
    record = visualization.select(
        loaded,
        processor,
        picture.pixels,
        question or visualization.DEFAULT_QUESTION,
        max_new_tokens=max_new_tokens,
        name=found.path.resolve().name if found.origin == "folder" else name,
    )
    if record.router_state == "untrained":
        output.warn("the routers are untrained: all weights tie, and the patches that are kept mean nothing yet")
    visualization.save(visualization.draw(record, wanted, picture.notes), target)
    if as_json:
        output.print_json({"image": str(image), "picture": str(target), **record.to_dict(wanted)})
    elif quiet:
        output.print_line(target)
    else:
        _render(record, wanted, target)


def _target(image: Path, out: Path | None) -> Path:
    from pmod_cli.visualization import check_format

    target = out or Path(f"{image.stem}-pmod.png")
    check_format(target)
    if not target.parent.is_dir():
        raise PmodError(f"{target}: there is no folder {target.parent}", hint=f"mkdir -p {target.parent}")
    if target.is_dir():
        raise PmodError(f"{target} is a folder, expected a file to write", hint=f"-o {target / 'picture.png'}")
    if target.exists() and target.samefile(image):
        raise PmodError(f"{target} is the picture to look at, and would be replaced", hint="choose another with --out")
    return target


def _num_layers(path: Path, name: str) -> int:
    """L, from the configuration alone.

    Raises:
        PmodError: a stock LLaVA, of which there is nothing to draw.
    """
    from pmod_cli.checkpoints import router_state

    if router_state(path) == "stock":
        raise PmodError(
            f"{name} is a stock LLaVA: each of its layers processes every token, so there is no selection to draw",
            hint=f"pmod convert {name}",
        )
    from transformers import AutoConfig

    import pmod_cli.model.configuration  # noqa: F401 - registers the p-MoD configurations

    return AutoConfig.from_pretrained(path, local_files_only=True).text_config.num_hidden_layers


def _render(record: SelectionRecord, layers: list[int], target: Path) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("layer", f"kept of {record.layout.size}", "retention"):
        table.add_column(heading, justify="right")
    for layer in layers:
        kept = str(record.kept[layer].sum()) if record.routed[layer] else "all (plain)"
        table.add_row(str(layer), kept, f"{record.retention[layer]:.3f}")
    output.stdout.print(table)
    if record.answer is not None:
        output.stdout.print(f"answer: {record.answer}", markup=False, soft_wrap=True)
    output.stdout.print(f"wrote {target}", markup=False, soft_wrap=True)
