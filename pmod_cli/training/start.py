"""What a run starts from: a checkpoint as it is, converted to p-MoD, or put together from a base language model."""

from pathlib import Path

from pmod_cli.checkpoints import convert, resolve, router_state
from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.errors import PmodError
from pmod_cli.model import PmodSettings
from pmod_cli.training.settings import Settings


def source_of(settings: Settings) -> tuple[Path, bool]:
    """The folder that the run starts from, and whether it is to be converted first. Nothing is written.

    Raises:
        PmodError: there is no such checkpoint, or it is not routed as the settings say.
    """
    source = resolve(settings.model.name).path
    stock = router_state(source) == "stock"
    if settings.pmod.enabled is False and not stock:
        raise PmodError(
            f"{settings.model.name} is a p-MoD checkpoint, and pmod.enabled is false: a baseline is a stock model",
            hint="name the stock model with --model",
        )
    if not stock:
        _check_routing(source, settings)
    return source, stock and bool(settings.pmod.enabled or settings.pmod.given)


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
    if not (converted / CONFIG).is_file():
        convert(source, converted, PmodSettings.from_dict(settings.pmod.given), origin=settings.model.name)
    return converted


def _check_routing(source: Path, settings: Settings) -> None:
    """A p-MoD checkpoint keeps its routing: another one would be another model."""
    own = PmodSettings.from_dict(read_json(source / CONFIG)["pmod"]).to_dict()
    other = [
        f"pmod.{key}: {own[key]!r} -> {value!r}" for key, value in settings.pmod.given.items() if own[key] != value
    ]
    if other:
        raise PmodError(
            f"{settings.model.name} is a p-MoD checkpoint with another routing:\n  " + "\n  ".join(other),
            hint="start from the stock model, which the run then converts",
        )
