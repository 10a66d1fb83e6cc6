"""p-MoD itself: schedule -> routing -> cache -> layer -> configuration -> modeling -> capture.

Names resolve on first use, so that counting layers or converting a checkpoint imports no torch. Importing
`pmod_cli.model.modeling`, or any model class from here, registers the Auto classes.
"""

from importlib import import_module

_HOMES = {
    "registry": ("Registry",),
    "schedule": ("SCHEDULES", "kept_tokens", "retention_schedule", "setting_of", "solve_shift", "takes_shift"),
    "settings": ("NORMS", "PmodSettings", "TARGET_TOKENS"),
    "routing": ("Routing", "SELECTIONS"),
    "configuration": ("PmodLlavaConfig", "PmodLlavaNextConfig"),
    "modeling": (
        "PmodLlavaForConditionalGeneration",
        "PmodLlavaModel",
        "PmodLlavaNextForConditionalGeneration",
        "PmodLlavaNextModel",
    ),
    "capture": ("Selection", "SelectionRecord", "capture_selection"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
