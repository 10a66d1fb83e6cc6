"""The settings that make a stock LLaVA a p-MoD one, as they stand in a checkpoint's config.json under `pmod`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from .methods import METHODS
from .registry import SELECTIONS
from .schedule import retention_schedule

NORMS = ("tanh", "softmax", "shifted_softmax", "sigmoid", "none")
POSITIONS = ("true", "renumbered")
QUOTAS = ("row", "per_image")
TARGET_TOKENS = ("vision_all", "vision_hr", "vision_image", "vision_video")
LARGEST = 1e6  # of a setting: no model needs more, and 16-bit weights end soon behind it


@dataclass(frozen=True)
class PmodSettings:
    """What each decoder layer keeps, and how router weights act.

    Attributes:
        schedule: Retention schedule, a name in `schedule.SCHEDULES`.
        shift: beta of a decaying schedule (default: 0.5 for `cosine`).
        mean: Wanted mean retention ratio, instead of a shift.
        max_ratio: Ratios above it become plain layers; above 1, every layer takes the router path.
        min_ratio: Floor of the decaying schedules.
        values: For schedule `list`, one ratio per layer.
        norm: Weight normalisation (Table 4): one of `NORMS`, or `{activation}_{scale}_{bias}`, e.g. `tanh_0.5_1`.
        alpha: Range of `tanh` (w = 1 + alpha * tanh) and `shifted_softmax` (w = 1 - alpha + 2 * alpha * softmax).
        string: Whether a skipped vision token is scaled by its weight (STRing) or passes unchanged.
        target_tokens: Vision tokens that are routed: `vision_all`, `vision_hr` (anyres: all but the base images),
            `vision_image` or `vision_video` (only those of images, or of videos).
        selection: What ranks the vision tokens, a name in `registry.SELECTIONS`.
        select_at: Layers that choose, ascending; each layer that keeps less than all holds the ranking of the last of
            them, with a K of its own. Only these layers have a router. None: every routed layer chooses (the paper);
            where dropped tokens do not return, every layer that keeps less than the one before.
        method: A name in `methods.METHODS`. All but `pmod` fix `selection`, `returns` and `keep_keys`, and have a
            schedule of their own in the place of `cosine`.
        returns: Whether a token that a layer dropped may be chosen again by a later one.
        keep_keys: Whether a skipped token still gives its keys and values to the others.
        quota: What K is taken of: `row`, all vision tokens of a row (the paper), or `per_image`, each image and each
            frame of a video apart, so that one cannot starve another.
        before: Selection that drops tokens for good in front of the decoder, and the share that it keeps, as
            `divprune:0.33`; the schedule is then a share of what is left. None: nothing is dropped there.
        positions: `true`, or `renumbered`: in each layer 0 ... M-1 without gaps, as some published code has it.

    Raises:
        ValueError: A value out of range.
        BadPlugin: What another package brings cannot be used.
    """

    schedule: str = "cosine"
    shift: float | None = None
    mean: float | None = None
    max_ratio: float = 0.85
    min_ratio: float = 0.15
    values: tuple[float, ...] | None = None
    norm: str = "tanh"
    alpha: float = 0.2
    string: bool = True
    target_tokens: str = "vision_all"
    selection: str = "router"
    select_at: tuple[int, ...] | None = None
    method: str = "pmod"
    returns: bool = True
    keep_keys: bool = False
    positions: str = "true"
    quota: str = "row"
    before: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, found {self.method!r:.80}")
        if self.method != DEFAULTS["method"]:
            self._take_from_method()
        if self.values is not None:
            object.__setattr__(self, "values", tuple(self.values))
        for name in ("shift", "mean", "max_ratio", "min_ratio", "alpha"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and abs(value) <= LARGEST):
                raise ValueError(f"{name} must be a number in -1e6 ... 1e6, found {value!r:.80}")
        if self.target_tokens not in TARGET_TOKENS:
            raise ValueError(f"target_tokens must be one of {', '.join(TARGET_TOKENS)}, found {self.target_tokens!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, found {self.alpha}")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, found {self.selection!r:.80}")
        if self.select_at is not None:
            object.__setattr__(self, "select_at", _layers(self.select_at))
        if self.quota not in QUOTAS:
            raise ValueError(f"quota must be one of {', '.join(QUOTAS)}, found {self.quota!r:.80}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, found {self.positions!r:.80}")
        for name in (self.selection, *(self.before_decoder or ())[:1]):
            if name not in SELECTIONS.built_in():  # one that its package cannot bring fails here, not in a model
                _ = SELECTIONS[name]
        if self.before_decoder and (self.positions == "renumbered" or self.quota != "row"):
            raise ValueError("before goes with true positions and quota row alone")
        if self.keep_keys and not self.returns:
            raise ValueError("keep_keys needs returns: a token whose keys are seen has not been dropped")
        _ = self.weight_norm
        self.retention(len(self.values) if self.values is not None else 32)

    def _take_from_method(self) -> None:
        """What the method fixes, and its schedule where none is named.

        Raises:
            ValueError: A setting says something else.
        """
        method = METHODS[self.method]
        for name in ("selection", "returns", "keep_keys"):
            found, expected = getattr(self, name), getattr(method, name)
            if found not in (expected, DEFAULTS[name]):
                raise ValueError(f"method {self.method!r} has {name} {expected!r}, found {found!r:.80}")
            object.__setattr__(self, name, expected)
        if self.schedule == DEFAULTS["schedule"]:
            object.__setattr__(self, "schedule", "list" if self.values is not None else method.schedule)

    @classmethod
    def from_dict(cls, values: Mapping) -> "PmodSettings":
        """Reads `config.json["pmod"]`; unknown keys are an error, since they would change the model silently."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown p-MoD settings {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict:
        """A JSON-ready dict that `from_dict` reads back."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        # The paper's choice is not written down: files of before and after these settings are alike.
        return {key: value for key, value in values.items() if key not in LATER or value != DEFAULTS[key]}

    def retention(self, num_layers: int) -> list[float]:
        """Retention ratio of each of `num_layers` decoder layers."""
        return retention_schedule(
            self.schedule,
            num_layers,
            shift=self.shift,
            mean=self.mean,
            max_ratio=self.max_ratio,
            min_ratio=self.min_ratio,
            values=self.values,
        )

    def mean_retention(self, num_layers: int) -> float:
        """Share of the routed vision tokens that a layer processes, mean over the layers; `before` counted."""
        _, left = self.before_decoder or ("", 1.0)
        return left * sum(self.retention(num_layers)) / num_layers

    def routed(self, num_layers: int) -> list[bool]:
        """Which layers have a router.

        Those of `select_at`; without it those that keep less than all, and all of them if `max_ratio` is above 1.
        None of them where the method is not p-MoD's.

        Raises:
            ValueError: As `chosen_at`.
        """
        if not METHODS[self.method].routers:
            return [False] * len(self.chosen_at(num_layers))
        if self.select_at is None:
            return [ratio < 1 or self.max_ratio > 1 for ratio in self.retention(num_layers)]
        self.chosen_at(num_layers)
        return [layer in self.select_at for layer in range(num_layers)]

    def chosen_at(self, num_layers: int) -> list[int | None]:
        """For each layer, the layer whose choice it keeps tokens by: itself where it chooses, None where it keeps all.

        Raises:
            ValueError: `select_at` names a layer that is not there, a layer thins before the first of them, or a layer
                keeps more than the one before where dropped tokens do not return.
        """
        ratios = self.retention(num_layers)
        select_at = self.select_at
        if not self.returns:
            dropping = self._dropping(ratios)
            select_at = dropping if select_at is None else select_at
        elif select_at is None:
            return [layer if ratio < 1 else None for layer, ratio in enumerate(ratios)]
        if select_at and select_at[-1] >= num_layers:
            raise ValueError(f"select_at names layer {select_at[-1]}, and the model has {num_layers} layers")
        chosen: list[int | None] = []
        for layer, ratio in enumerate(ratios):
            last = max((at for at in select_at if at <= layer), default=None)
            if ratio < 1 and last is None:
                raise ValueError(
                    f"layer {layer} keeps {ratio:.3g} of the vision tokens, and the first layer of select_at is "
                    f"{select_at[0]}: no layer has chosen before it"
                )
            chosen.append(last if ratio < 1 or layer in select_at else None)
        return chosen

    def _dropping(self, ratios: Sequence[float]) -> tuple[int, ...]:
        """The layers that choose what is dropped for good.

        Those that keep less than the layer before, or, with a method that ranks earlier, the layers in front of them.

        Raises:
            ValueError: A layer keeps more than the one before, or there is no layer to rank in.
        """
        lead, before, layers = METHODS[self.method].lead, 1.0, []
        for layer, ratio in enumerate(ratios):
            if ratio > before:
                raise ValueError(
                    f"layer {layer} keeps {ratio:.3g} of the vision tokens, the layer before it {before:.3g}, and a "
                    "dropped token does not return"
                )
            if ratio < before:
                layers.append(layer - lead)
            before = ratio
        if layers and layers[0] < 0:
            raise ValueError(f"method {self.method!r} ranks the tokens {lead} layer earlier: layer 0 keeps all of them")
        return tuple(layers)

    @property
    def before_decoder(self) -> tuple[str, float] | None:
        """Selection and share of `before`.

        Raises:
            ValueError: It is not of this form, or there is no such selection.
        """
        if self.before is None:
            return None
        name, _, share = str(self.before).partition(":")
        if not re.fullmatch(r"0?\.\d+|1|1\.0+", share) or not float(share):
            raise ValueError(f"before must be a selection and a share, as divprune:0.33, found {self.before!r:.80}")
        if name not in (known := [selection for selection in SELECTIONS if selection != "router"]):
            raise ValueError(f"before must name one of {', '.join(known)}, found {name!r:.80}")
        return name, float(share)

    @property
    def weight_norm(self) -> tuple[str, float, float]:
        """(activation, scale, bias) of w = scale * activation(logit) + bias; without numbers scale = bias = 1."""
        presets = {
            "tanh": ("tanh", self.alpha, 1.0),
            "softmax": ("softmax", 1.0, 1.0),
            "shifted_softmax": ("softmax", 2 * self.alpha, 1 - self.alpha),
            "sigmoid": ("sigmoid", 1.0, 1.0),
            "none": ("none", 1.0, 1.0),
        }
        if self.norm in presets:
            return presets[self.norm]
        number = r"-?(?:\d+\.?\d*|\.\d+)"
        match = re.fullmatch(rf"(tanh|softmax|sigmoid|none)_({number})_({number})", self.norm)
        if not match or not all(abs(float(value)) <= LARGEST for value in match.groups()[1:]):
            raise ValueError(
                f"norm must be one of {', '.join(NORMS)} or activation_scale_bias, found {self.norm[:60]!r}"
            )
        return match[1], float(match[2]), float(match[3])


DEFAULTS = {field.name: field.default for field in fields(PmodSettings)}
LATER = ("selection", "select_at", "method", "returns", "keep_keys", "positions", "quota", "before")


def _layers(select_at: Sequence[int]) -> tuple[int, ...]:
    """Layer indices, ascending."""
    listed = tuple(select_at) if isinstance(select_at, list | tuple) else ()
    if not listed or not all(type(layer) is int and layer >= 0 for layer in listed):
        raise ValueError(f"select_at must be a list of layers, such as [8, 14], found {select_at!r:.80}")
    if list(listed) != sorted(set(listed)):
        raise ValueError(f"select_at must name layers in ascending order, each once, found {list(listed)}")
    return listed
