"""Configurations of p-MoD models: the stock ones plus `pmod` (the settings) and `router_state`."""

from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

from .settings import PmodSettings

ROUTER_STATES = ("untrained", "trained", "calibrated")


class _RoutedConfig:
    """Reads `pmod` as settings and refuses decoders whose attention the routing would change."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.pmod = self.settings.to_dict()
        if self.router_state not in ROUTER_STATES:
            raise ValueError(f"router_state must be one of {', '.join(ROUTER_STATES)}, found {self.router_state!r}")
        if self.settings.target_tokens == "vision_hr" and self.model_type != PmodLlavaNextConfig.model_type:
            raise ValueError("target_tokens 'vision_hr' needs anyres images, that is, a LLaVA-NeXT model")
        text = self.text_config
        layer_types = set(getattr(text, "layer_types", None) or ())
        if layer_types - {"full_attention"} or (not layer_types and getattr(text, "sliding_window", None)):
            raise ValueError("sliding-window attention is not supported: windows count tokens that routing drops")

    @property
    def settings(self) -> PmodSettings:
        return PmodSettings.from_dict(self.pmod or {})

    @property
    def retention(self) -> list[float]:
        """Retention ratio of each decoder layer, length L; 1.0 where every token is kept."""
        return self.settings.retention(self.text_config.num_hidden_layers)

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the decoder layers that have a router."""
        return [
            layer for layer, routed in enumerate(self.settings.routed(self.text_config.num_hidden_layers)) if routed
        ]


class PmodLlavaConfig(_RoutedConfig, LlavaConfig):
    """`LlavaConfig` with `pmod` (a dict of `PmodSettings`) and `router_state` (one of `ROUTER_STATES`)."""

    model_type = "pmod_llava"
    pmod: dict | None = None
    router_state: str = "untrained"


class PmodLlavaNextConfig(_RoutedConfig, LlavaNextConfig):
    """`LlavaNextConfig` with `pmod` (a dict of `PmodSettings`) and `router_state` (one of `ROUTER_STATES`)."""

    model_type = "pmod_llava_next"
    pmod: dict | None = None
    router_state: str = "untrained"


for _config in (PmodLlavaConfig, PmodLlavaNextConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
