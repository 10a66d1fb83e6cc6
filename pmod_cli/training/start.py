"""What a run starts from: a checkpoint as it is, converted to p-MoD, or put together from a base language model.

Imports no torch.
"""

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pmod_cli.checkpoints import Options, convert, load_processor, read_source, resolve, router_state
from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.checkpoints.loading import read_config
from pmod_cli.checkpoints.resolve import find_here
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError
from pmod_cli.core.paths import expanded
from pmod_cli.families.llava_next import LLAVA_NEXT
from pmod_cli.model import PmodSettings
from pmod_cli.training.run_settings import Settings, needed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

PROJECTOR = "mm_projector.bin"  # of a repository of the original authors


def source_of(settings: Settings) -> tuple[Path, bool]:
    """The folder that the run starts from, and whether it is to be converted first. Nothing is written.

    Raises:
        PmodError: there is no such checkpoint, or it is not routed as the settings say.
    """
    model, routed = settings.model, is_routed(settings)
    if model.llm is not None:
        return resolve(model.llm).path, True
    source = resolve(needed(model.name, "model.name")).path
    stock = router_state(source) == "stock"
    if settings.pmod.enabled is False and not stock:
        raise PmodError(
            f"{model.name} is a p-MoD checkpoint, and pmod.enabled is false: a baseline is a stock model",
            hint="name the stock model with `model`",
        )
    if not stock:
        _check_routing(source, settings)
    return source, stock and routed


def is_routed(settings: Settings) -> bool:
    """Whether the settings ask for a p-MoD model; where they do not, the checkpoint decides."""
    return bool(settings.pmod.stated) if settings.pmod.enabled is None else settings.pmod.enabled


def is_here(settings: Settings) -> bool:
    """Whether all that a run starts from is on this machine. Nothing is fetched.

    Raises:
        PmodError: there is no such checkpoint, which offline includes one that is not in the cache.
    """
    model = settings.model
    names = (name for name in (model.name, model.llm, model.vision_tower) if name is not None)
    if any(find_here(name) is None for name in names):
        return False
    return model.projector is None or _local_projector(model.projector) is not None


def check_start(settings: Settings, converted: Path) -> None:
    """Refuse what ``starting_checkpoint`` would refuse, as far as the files are on this machine. Nothing is written.

    Raises:
        PmodError: as ``starting_checkpoint``.
    """
    model = settings.model
    if not is_here(settings):
        return
    source, to_convert = source_of(settings)
    if not to_convert or (converted / CONFIG).is_file() or (model.llm is not None and model.projector is None):
        return
    pmod = PmodSettings.from_dict(settings.pmod.given)
    convert(source, converted, pmod, _options(settings, source, converted), dry_run=True)


def starting_checkpoint(settings: Settings, converted: Path) -> Path:
    """The folder of the checkpoint that the run starts from.

    Args:
        settings: ``model`` names the source, ``pmod`` says whether and how it is routed.
        converted: where a conversion is written, unless it is there already. It shares its weights with the source.

    Raises:
        PmodError: as ``source_of``; the source cannot be converted.
    """
    source, to_convert = source_of(settings)
    if not to_convert:
        return source
    if (converted / CONFIG).is_file():
        return converted
    origin = settings.model.llm or settings.model.name
    options = _options(settings, source, converted)
    convert(source, converted, PmodSettings.from_dict(settings.pmod.given), options, origin=origin)
    return converted


def hold_routing(config: "PretrainedConfig", settings: Settings) -> None:
    """Write into a p-MoD model's own settings what its result keeps: the selection, and that its routers are trained.

    Routers that are frozen at zero stay untrained: every token ties, and commands say so.
    """
    if not hasattr(config, "settings"):
        return
    if settings.pmod.selection is not None:
        config.pmod = replace(config.settings, selection=settings.pmod.selection).to_dict()
    frozen = settings.model.router_start == "zero" and "router" in settings.model.freeze
    if not (frozen and config.router_state == "untrained"):
        config.router_state = "trained"


def processor_of(settings: Settings) -> "ProcessorMixin":
    """The processor that the run will have, without writing its starting checkpoint.

    Raises:
        PmodError: as ``starting_checkpoint``; there is no tokenizer.
    """
    source, _ = source_of(settings)
    if settings.model.llm is None:
        return load_processor(source)
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = read_source(source, _options(settings, source, folder / "converted"))
        if whole.write_processor is not None:
            whole.write_processor(folder)
        write_json(folder / CONFIG, whole.config)
        return load_processor(folder)


def _options(settings: Settings, source: Path, converted: Path) -> Options:
    """How the source is converted."""
    model, options = settings.model, Options(to="pmod" if is_routed(settings) else "stock")
    if model.llm is None:
        return options
    tower = resolve(needed(model.vision_tower, "model.vision_tower")).path
    projector = _projector(settings, source, tower, converted.with_name("projector.safetensors"))
    return replace(options, vision_tower=str(tower), projector=projector, anyres=model.kind == LLAVA_NEXT.name)


def _projector(settings: Settings, llm: Path, tower: Path, new: Path) -> Path:
    """The file of the projector: given, on the hub, or written to ``new`` with random weights, as torch starts them."""
    if (name := settings.model.projector) is not None:
        if (path := _local_projector(name)) is not None:
            return path
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, PROJECTOR))
    import torch
    from safetensors.torch import save_file

    widths = read_json(tower / CONFIG), read_json(llm / CONFIG)
    inner, outer = (config.get("vision_config", config)["hidden_size"] for config in widths)
    torch.manual_seed(settings.train.seed)
    layers = {0: torch.nn.Linear(inner, outer), 2: torch.nn.Linear(outer, outer)}
    save_file(
        {
            f"model.mm_projector.{place}.{part}": tensor
            for place, layer in layers.items()
            for part, tensor in layer.state_dict().items()
        },
        new,
    )
    return new


def _local_projector(name: str) -> Path | None:
    """The file of a projector; None where ``name`` is a repository on the hub."""
    path = expanded(name)
    on_hub = not path.is_file() and not name.startswith((".", "/", "~")) and name.count("/") == 1
    return None if on_hub else path


def _check_routing(source: Path, settings: Settings) -> None:
    """A p-MoD checkpoint keeps its routing: another one would be another model."""
    own = read_config(source).settings
    held = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(own).items()}
    other = [
        f"pmod.{key}: {held[key]!r} -> {value!r}" for key, value in settings.pmod.given.items() if held[key] != value
    ]
    if other:
        raise PmodError(
            f"{settings.model.name} is a p-MoD checkpoint with another routing:\n  " + "\n  ".join(other),
            hint="start from the stock model, which the run then converts",
        )
