"""Configurations of p-MoD models: the stock ones plus `pmod` (the settings) and `router_state`, one a family."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig

from pmod_cli.families import FAMILIES

from .settings import PmodSettings
from .stock import Stock

ROUTER_STATES = ("untrained", "trained", "calibrated")
CONFIGS: dict[str, type] = {}
"""Our configuration class, by the name of the family."""


class RoutedConfig(Stock):
    """Reads `pmod` as settings and refuses decoders whose attention the routing would change."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.pmod = self.settings.to_dict()
        if self.router_state not in ROUTER_STATES:
            raise ValueError(f"router_state must be one of {', '.join(ROUTER_STATES)}, found {self.router_state!r}")
        if self.settings.target_tokens == "vision_hr" and not self.has_high_resolution:
            raise ValueError("target_tokens 'vision_hr' needs anyres images, that is, a LLaVA-NeXT model")
        if self.settings.target_tokens == "vision_video" and not self.has_videos:
            raise ValueError(f"target_tokens 'vision_video' needs a model of videos, and {self.model_type} has none")
        text = self.text_config
        if self.settings.positions == "renumbered" and "mrope_section" in str(getattr(text, "rope_parameters", "")):
            raise ValueError("positions of this decoder have several axes: they cannot be renumbered")
        layer_types = set(getattr(text, "layer_types", None) or ())
        if layer_types - {"full_attention"} or (not layer_types and getattr(text, "sliding_window", None)):
            raise ValueError("sliding-window attention is not supported: windows count tokens that routing drops")

    @property
    def settings(self) -> PmodSettings:
        """`pmod` as settings; the paper's where there are none."""
        return PmodSettings.from_dict(self.pmod or {})

    @property
    def retention(self) -> list[float]:
        """Retention ratio of each decoder layer, length L; 1.0 where every token is kept."""
        return self.settings.retention(self.text_config.num_hidden_layers)

    @property
    def has_router(self) -> list[bool]:
        """Whether each decoder layer has a router, length L."""
        return self.settings.routed(self.text_config.num_hidden_layers)

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the decoder layers that have a router."""
        return [layer for layer, has_router in enumerate(self.has_router) if has_router]


def add_config(family: Any) -> None:
    """Make and register the p-MoD configuration of a family: `LlavaConfig` becomes `PmodLlavaConfig`.

    Args:
        family: Its `Family`.
    """
    stock = getattr(import_module(family.module), f"{family.classes}Config")
    config: Any = type(
        f"Pmod{stock.__name__}",
        (RoutedConfig, stock),
        {
            "__module__": __name__,
            "__doc__": f"`{stock.__name__}` with `pmod` (a dict of `PmodSettings`) and `router_state` "
            "(one of `ROUTER_STATES`).",
            "__annotations__": {"pmod": dict | None, "router_state": str},
            "model_type": family.routed_name,
            "pmod": None,
            "router_state": "untrained",
            "has_high_resolution": family.high_resolution,
            "has_videos": "video_token_id" in family.vision_tokens,
        },
    )
    globals()[config.__name__] = config  # where pickle looks for it
    CONFIGS[family.name] = config
    AutoConfig.register(config.model_type, config, exist_ok=True)


FAMILIES.follow(add_config)
