"""p-MoD itself: schedule -> routing -> cache -> layer -> configuration -> modeling -> capture.

Names resolve on first use, so that counting layers or converting a checkpoint imports no torch. Importing
`pmod_cli.model.modeling`, or any model class from here, registers the Auto classes.
"""

from importlib import import_module
from typing import Any

from pmod_cli.families import BUNDLED, FAMILIES, Family

_HOMES = {
    "registry": ("BadPlugin", "SELECTIONS", "Registry"),
    "schedule": ("SCHEDULES", "kept_tokens", "retention_schedule", "setting_of", "solve_shift", "takes_shift"),
    "settings": ("NORMS", "PmodSettings", "TARGET_TOKENS"),
    "methods": ("METHODS", "Method", "droppers"),
    "routing": ("Routing",),
    "selection": ("Selection",),
    "capture": ("LayerSelection", "SelectionRecord", "capture_selection"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def _classes_of(family: Family) -> dict[str, str]:
    """The public classes of a family, and the module of each."""
    ends = {"Config": "configuration", "Model": "modeling", "ForConditionalGeneration": "modeling"}
    return {f"Pmod{family.classes}{end}": home for end, home in ends.items()}


__all__ = sorted([*_HOME_OF, *(name for family in BUNDLED for name in _classes_of(family))])


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None and name.startswith("Pmod"):
        home = next((homes[name] for homes in map(_classes_of, FAMILIES.values()) if name in homes), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
