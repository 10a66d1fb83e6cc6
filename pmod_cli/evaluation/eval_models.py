"""Who is asked: the model, and beside it the stock model, another checkpoint or a selection that routers must beat."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from pmod_cli.checkpoints import resolve, router_state
from pmod_cli.checkpoints.conversion import PROVENANCE
from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.checkpoints.processor_limits import with_limits
from pmod_cli.core import yaml_text
from pmod_cli.core.errors import PmodError
from pmod_cli.families import model_types
from pmod_cli.families.sizes import Sizes
from pmod_cli.families.unsupported import why_not
from pmod_cli.model import METHODS, SELECTIONS, PmodSettings, droppers
from pmod_cli.profiling.budgets import HARDLY_TEXT, cost_of, nearest, solve

DOWNSAMPLE, ROUTER = "downsample", "router"
CONTROLS = ("random", "uniform")  # without a budget they are selections of the p-MoD model itself
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
        method: Settings of a method that the model runs under in the place of its own; None: as it is.
        control: Label of random dropping at the same budget, which a method has to beat.
        share: What the method costs on each prompt: a share of the stock model's FLOPs, or as much as these settings.
    """

    label: str
    path: Path
    routers: str
    selection: str = ROUTER
    commit: str | None = None
    tokens_left: float | None = None
    method: PmodSettings | None = None
    control: str | None = None
    share: float | PmodSettings | None = None


def choose(name: str, against: Iterable[str], *, revision: str | None = None, offline: bool = False) -> list[EvalModel]:
    """The model `name` and what it is compared with, in the order given.

    Args:
        against: `stock` (what the p-MoD model was made from), a selection such as `random` or `uniform` (the same
            weights, as many vision tokens kept, other ones), `downsample` (the stock model, its pictures so small that
            about as many vision tokens are left), a method such as `fastv` (on the stock weights, at the FLOPs of the
            model `name`) or `fastv@0.4` (at this share of the stock model's FLOPs), or any model name.

    Raises:
        PmodError: a model cannot be found or is no LLaVA, a control was asked of a model that selects nothing, or a
            method does not reach the budget.
    """
    main = _eval_model(name, revision, offline)
    eval_models = [main]
    for other in against:
        if (asked := methods_named(other)) is not None:
            eval_models.append(_of_method(main, *asked, offline=offline))
            continue
        if (other in SELECTIONS or other == DOWNSAMPLE) and main.routers == "stock":
            raise PmodError(
                f"`against={other}`: {name} is a stock model, which keeps every vision token",
                hint=f"pmod convert {quote(name)}",
            )
        if other in SELECTIONS:
            eval_models.append(EvalModel(other, main.path, main.routers, other, main.commit))
        elif other in ("stock", DOWNSAMPLE):
            stock = _eval_model(stock_against(main.path, other), None, offline, label=other)
            eval_models.append(stock if other == "stock" else replace(stock, tokens_left=_mean_retention(main.path)))
        else:
            eval_models.append(_eval_model(other, None, offline))
    earlier = [[other.label for other in eval_models[:place]] for place in range(len(eval_models))]
    return [
        replace(one, label=f"{one.label} ({1 + labels.count(one.label)})") if one.label in labels else one
        for one, labels in zip(eval_models, earlier, strict=True)
    ]


def methods_named(name: str) -> tuple[str, float | None] | None:
    """The method and the budget of `fastv` or `fastv@0.4`; None where it is a control, `stock` or a model.

    Raises:
        PmodError: The budget is no share.
    """
    method, at, share = name.partition("@")
    if method not in METHODS or (not at and (method in CONTROLS or METHODS[method].routers)):
        return None
    if METHODS[method].routers:
        raise PmodError(
            f"`against={name}`: {method} needs routers for its schedule", hint="pmod convert --target-flops makes them"
        )
    return method, _share(share, f"against={name}") if at else None


def _share(text: str, given: str) -> float:
    """A budget; `given` is the argument that it stands in."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        what = f"`{given}`: {text!r} is no share of the stock model's FLOPs"
        raise PmodError(f"{what}; expected a number above 0 and at most 1, such as 0.4")
    return share


def at_budgets(
    name: str, methods: Iterable[str], budgets: Iterable[str], *, offline: bool = False
) -> tuple[list[str], list[str]]:
    """What `choose` takes for every method at every budget, random dropping first; and why some are left out.

    Args:
        name: The model.
        methods: Names, or `all`. Left out is what meets a budget on no prompt, or what the model cannot have.
        budgets: Shares of the stock model's prefill FLOPs, as they were written.
        offline: Look nothing up on the hub.

    Raises:
        PmodError: An unknown method, or a budget that is no share.
    """
    known = droppers()
    listed = [method.strip() for method in methods]
    listed = known if listed == ["all"] else listed
    if unknown := [method for method in listed if method not in known]:
        raise PmodError(f"`methods={unknown[0]}`: expected all, or some of {', '.join(known)}")
    shares = {_share(budget.strip(), f"budgets={budget.strip()}"): budget.strip() for budget in budgets}
    folder = resolve(name, offline=offline).path
    sizes = with_limits(Sizes.of(read_json(folder / CONFIG)), folder)
    chosen, left_out = [], []
    for share, budget in shares.items():
        for method in dict.fromkeys(["random", *listed]):
            try:
                solve(method, share, sizes, HARDLY_TEXT.rows(sizes))
            except PmodError as error:
                left_out.append(error.what)
            else:
                chosen.append(f"{method}@{budget}")
    return chosen, left_out


def _of_method(main: EvalModel, method: str, budget: float | None, *, offline: bool) -> EvalModel:
    """The stock weights under a method, at a budget or at what `main` costs."""
    config = read_json(main.path / CONFIG)
    sizes = with_limits(Sizes.of(config), main.path)
    if budget is None and main.routers == "stock":
        raise PmodError(
            f"`against={method}`: {main.path} is a stock model, whose cost is no budget", hint=f"`against={method}@0.4`"
        )
    share = PmodSettings.from_dict(config.get("pmod") or {}) if budget is None else budget
    if isinstance(share, PmodSettings) and share.target_tokens != "vision_all":
        raise PmodError(
            f"`against={method}`: with target_tokens {share.target_tokens}, what {main.path} costs on a prompt depends "
            "on how pictures are cut",
            hint=f"name a budget: `against={method}@{cost_of(sizes, share).flops:.2f}`",
        )
    stock = main
    if main.routers != "stock":
        hint = "name the stock model with `model`, and this one with `against`"
        stock = _eval_model(stock_against(main.path, method, hint), None, offline)
    label = method if budget is None else f"{method}@{budget:g}"
    control = None if method == "random" else f"random@{budget:g}" if budget is not None else None
    rows = HARDLY_TEXT.rows(sizes)
    if isinstance(share, PmodSettings):
        settings, _ = nearest(method, cost_of(sizes, share, rows).flops, sizes, rows)
    else:
        settings = solve(method, share, sizes, rows)
    return replace(stock, label=label, selection=settings.selection, method=settings, control=control, share=share)


def _mean_retention(path: Path) -> float:
    """Mean over the decoder layers of the share of vision tokens that a p-MoD checkpoint keeps."""
    from transformers import AutoConfig

    import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD configurations

    config = AutoConfig.from_pretrained(path)
    return config.settings.mean_retention(config.get_text_config().num_hidden_layers)


def stock_against(path: Path, against: str, hint: str = "`against=FOLDER` names a stock model") -> str:
    """The name of the stock model that `against` needs beside a checkpoint.

    Raises:
        PmodError: the checkpoint's history does not say.
    """
    source = stock_source(path)
    if source is None:
        raise PmodError(f"`against={against}`: {path} does not say what it was made from", hint=hint)
    return source


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
