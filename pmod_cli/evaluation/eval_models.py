"""Who is asked: the model, and beside it the stock model, another checkpoint or a selection that routers must beat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints import load_model, resolve, router_state
from pmod_cli.checkpoints.conversion import PROVENANCE
from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.core import yaml_text
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import provenance
from pmod_cli.families import model_types
from pmod_cli.families.unsupported import why_not
from pmod_cli.model import SELECTIONS

if TYPE_CHECKING:
    from torch import nn


DOWNSAMPLE, ROUTER = "downsample", "router"
RUN_SETTINGS = "config.yaml"  # what finetune leaves beside a checkpoint, with the model that it started from


@dataclass(frozen=True)
class EvalModel:
    """A model as the report has it: one column.

    Attributes:
        label: Head of the column, unique in a run.
        path: Folder of the checkpoint.
        routers: `stock`, `untrained`, `trained` or `calibrated`.
        selection: How a p-MoD layer picks its vision tokens, a name in `SELECTIONS`; `router` for a stock model too.
        commit: Commit of the checkpoint on the hub, where it came from there.
        tokens_left: Share of the vision tokens that the model's pictures are downsampled to; None: as they are.
    """

    label: str
    path: Path
    routers: str
    selection: str = ROUTER
    commit: str | None = None
    tokens_left: float | None = None


def choose(name: str, against: Iterable[str], *, revision: str | None = None, offline: bool = False) -> list[EvalModel]:
    """The model `name` and what it is compared with, in the order given.

    Args:
        against: `stock` (what the p-MoD model was made from), a selection such as `random` or `uniform` (the same
            weights, as many vision tokens kept, other ones), `downsample` (the stock model, its pictures so small that
            about as many vision tokens are left), or any model name.

    Raises:
        PmodError: a model cannot be found or is no LLaVA, or a control was asked of a model that selects nothing.
    """
    main = _eval_model(name, revision, offline)
    eval_models = [main]
    for other in against:
        if (other in SELECTIONS or other == DOWNSAMPLE) and main.routers == "stock":
            raise PmodError(
                f"`against={other}`: {name} is a plain LLaVA, which keeps every vision token",
                hint=f"pmod convert {name}",
            )
        if other in SELECTIONS:
            eval_models.append(EvalModel(other, main.path, main.routers, other, main.commit))
        elif other in ("stock", DOWNSAMPLE):
            source = stock_source(main.path)
            if source is None:
                raise PmodError(
                    f"`against={other}`: {main.path} does not say what it was made from",
                    hint="`against=FOLDER` names a stock model",
                )
            stock = _eval_model(source, None, offline, label=other)
            eval_models.append(stock if other == "stock" else replace(stock, tokens_left=_mean_retention(main.path)))
        else:
            eval_models.append(_eval_model(other, None, offline))
    earlier = [[other.label for other in eval_models[:place]] for place in range(len(eval_models))]
    return [
        replace(one, label=f"{one.label} ({1 + labels.count(one.label)})") if one.label in labels else one
        for one, labels in zip(eval_models, earlier, strict=True)
    ]


def _mean_retention(path: Path) -> float:
    """Mean over the decoder layers of the share of vision tokens that a p-MoD checkpoint keeps."""
    from transformers import AutoConfig

    import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD configurations

    retention = AutoConfig.from_pretrained(path).retention
    return sum(retention) / len(retention)


def stock_source(path: Path) -> str | None:
    """The name of the stock model at the start of a checkpoint's history, or None where the history does not say."""
    name: str | None = None
    folder: Path | None = path
    for _ in range(20):  # a history that names itself ends too
        if folder is None or not folder.is_dir():
            return name
        if router_state(folder) == "stock":
            return name or str(folder)
        name = _made_from(folder)
        folder = None if name is None else Path(name)
    return None


def _made_from(folder: Path) -> str | None:
    """What a checkpoint names as its source, or None."""
    if (folder / PROVENANCE).is_file():
        name = read_json(folder / PROVENANCE).get("source")
    elif (folder / RUN_SETTINGS).is_file():
        settings = yaml_text.read(folder / RUN_SETTINGS).plain()
        model = settings.get("model") if isinstance(settings, dict) else None
        name = model.get("name") if isinstance(model, dict) else None
    else:
        return None
    return name if isinstance(name, str) and name and "\0" not in name else None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its processor, and what a score depends on as far as it lies in them."""

    eval_model: EvalModel
    model: Any
    processor: Any
    downsampled: dict[str, Any] | None = None

    def serves(self, other: EvalModel) -> bool:
        """Whether another column is of the same model."""
        return (self.eval_model.path, self.eval_model.tokens_left) == (other.path, other.tokens_left)

    def describe(self, eval_model: EvalModel) -> dict[str, Any]:
        """For the result file."""
        described = {
            **provenance.checkpoint(eval_model.path, eval_model.commit),
            **provenance.loaded(self.model, self.processor),
            "routers": eval_model.routers,
            "selection": eval_model.selection if eval_model.routers != "stock" else None,
            "downsampled": self.downsampled,
        }
        if self.downsampled is not None:
            described["mean_retention"] = self.downsampled["tokens_left"]
        return described


def load(eval_model: EvalModel, *, dtype: str, device: str, attention: str) -> Loaded:
    """A model of the report, its pictures downsampled where that is asked."""
    model, processor = load_model(eval_model.path, dtype=dtype, device=device, attn_implementation=attention)
    done = downsample(model, processor, eval_model.tokens_left) if eval_model.tokens_left is not None else None
    return Loaded(eval_model, model, processor, done)


def _eval_model(name: str, revision: str | None, offline: bool, label: str | None = None) -> EvalModel:
    """The model of a name. Another architecture is refused from the config, before anything is loaded or written."""
    found = resolve(name, revision=revision, offline=offline)
    config, known = read_json(found.path / CONFIG), model_types()
    model_type = config.get("model_type")
    if reason := why_not(model_type):
        raise PmodError(f"{found.path}: {reason}")
    if model_type not in known:
        raise PmodError(
            f"{found.path} is a checkpoint of another architecture: its model_type is {model_type!r}, expected one of "
            f"{', '.join(known)}",
            hint="pmod convert takes LLaVA checkpoints in the layout of the original code",
        )
    title = label or found.alias or Path(name).resolve().name
    selection = (config.get("pmod") or {}).get("selection", ROUTER)
    return EvalModel(title, found.path, router_state(found.path), selection, found.commit)


def patches_per_side(retention: float, whole: int) -> int:
    """The g in 1 … `whole` whose square is nearest to `retention` of the square of `whole`; of two, the larger.

    Args:
        retention: Share of vision tokens to keep, 0 to 1.
        whole: G, patches along the side of a tile: 24 for CLIP-L/14 at 336 pixels.
    """
    return min(range(whole, 0, -1), key=lambda side: abs(side**2 - retention * whole**2))


def downsample(model: Any, processor: Any, retention: float) -> dict[str, Any]:
    """Make a loaded plain LLaVA, and its processor, read smaller pictures. Both are changed in place.

    Args:
        model: A stock LLaVA-1.5 or LLaVA-NeXT.
        retention: Share of vision tokens to come near to.

    Returns:
        What was done: patches along a tile's side before and after, the share of tokens that is left.

    Raises:
        PmodError: the vision tower is not CLIP.
    """
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    modules = model.model.vision_tower.modules()
    embeddings = next((module for module in modules if isinstance(module, CLIPVisionEmbeddings)), None)
    if embeddings is None:
        tower = type(model.model.vision_tower).__name__
        raise PmodError(f"`against=downsample` knows CLIP vision towers; this model has a {tower}")
    patch, whole = embeddings.patch_size, embeddings.image_size // embeddings.patch_size
    side = patches_per_side(retention, whole)
    _resize_positions(embeddings, side)
    model.config.vision_config.image_size = embeddings.image_size
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = _scaled(model.config.image_grid_pinpoints, side, whole)
    _shrink(processor.image_processor, side, whole, side * patch)
    return {"patches_per_side": side, "of": whole, "tokens_left": side**2 / whole**2}


def _resize_positions(embeddings: nn.Module, side: int) -> None:
    """Position embeddings of the class token and of side × side patches, instead of those of a whole tile."""
    import torch

    pixels = side * embeddings.patch_size
    table = embeddings.position_embedding.weight.data  # (1 + G², D)
    # In float32, since not every device resizes in half precision.
    embeddings.position_embedding.weight.data = table.float()
    of_patches = table.new_empty(1, 1 + side**2, table.shape[1], dtype=torch.float32)  # only their shape is read
    with torch.no_grad():
        resized = embeddings.interpolate_pos_encoding(of_patches, pixels, pixels)[0].to(table.dtype)  # (1 + g², D)
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(resized, freeze=True)
    embeddings.position_ids = torch.arange(len(resized), device=table.device).expand(1, -1)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = pixels, side**2, len(resized)


def _shrink(image_processor: Any, side: int, whole: int, pixels: int) -> None:
    """Resize each picture first, then cut it into tiles of `pixels`. A subclass, so that nothing else changes."""

    class Shrinking(type(image_processor)):
        def preprocess(self, images: Any, *args: Any, **named: Any) -> Any:
            return super().preprocess(_each(images, side, whole), *args, **named)

    Shrinking.__name__ = type(image_processor).__name__  # what results call it
    image_processor.__class__ = Shrinking
    for name in ("size", "crop_size"):
        setattr(image_processor, name, _tile(getattr(image_processor, name), pixels))
    if getattr(image_processor, "image_grid_pinpoints", None):
        image_processor.image_grid_pinpoints = _scaled(image_processor.image_grid_pinpoints, side, whole)


def _each(images: Any, side: int, whole: int) -> Any:
    from PIL import Image

    if isinstance(images, list | tuple):
        return [_each(image, side, whole) for image in images]
    width, height = (max(1, round(length * side / whole)) for length in images.size)
    return images.resize((width, height), Image.Resampling.BICUBIC)


def _tile(size: Any, pixels: int) -> Any:
    """A processor's `size` or `crop_size` with each length that it sets replaced."""
    return type(size)(**{name: pixels for name, length in dict(size).items() if length is not None})


def _scaled(pinpoints: Any, side: int, whole: int) -> list[list[int]]:
    return [[length // whole * side for length in pinpoint] for pinpoint in pinpoints]
