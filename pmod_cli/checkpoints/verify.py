"""What was written is read again and held to its source, to the model's shapes, and to a forward pass."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.changes import transformed
from pmod_cli.checkpoints.conversion_plan import ConversionPlan
from pmod_cli.checkpoints.layout import TensorSource
from pmod_cli.checkpoints.layouts import LAYOUTS
from pmod_cli.checkpoints.layouts.huggingface import OURS
from pmod_cli.checkpoints.layouts.shapes import OBSOLETE, canonical, tied
from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.core.text import memory_size
from pmod_cli.families import FAMILIES
from pmod_cli.families.configs import known_family, small_side
from pmod_cli.model import PmodSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_PIECE = 32 * 2**20  # bytes


def verify(plan: ConversionPlan, folder: Path) -> list[str]:
    """Compare a written checkpoint with what it was made of.

    Returns:
        What was compared, one sentence each.

    Raises:
        PmodError: a difference, with exit code 1.
    """
    done = []
    for name, path in plan.weights.unchanged.items():
        if not (folder / name).samefile(path):
            if not filecmp.cmp(folder / name, path, shallow=False):
                raise _differs(folder / name, f"it differs from {path}")
        elif files.header_digest(folder / name) != files.header_digest(path):
            raise _differs(folder / name, f"its header is not that of {path}")
    if plan.weights.unchanged:
        done.append(f"{len(plan.weights.unchanged)} unchanged files: same file or same bytes")
    count = 0
    for name, parts in plan.weights.streamed.items():
        written = files.read_file(folder / name)
        if written.keys() != parts.keys():
            raise _differs(
                folder / name, f"its tensors are not those planned: {sorted(written.keys() ^ parts.keys())[:5]}"
            )
        for tensor, part in parts.items():
            _same_tensor(written[tensor], part, tensor)
            count += 1
    if count:
        done.append(f"{count} rewritten tensors: bit for bit what becomes of their sources")
    if not LAYOUTS[plan.options.to].loads:
        return done
    done.append(_keys_and_shapes(plan, folder))
    done.append(_forward(plan, folder))
    return done


def check_selection(plan: ConversionPlan) -> None:
    """Refuse a selection that the model cannot have, such as one by a class token that its tower lacks.

    It takes a model without weights to know that, and torch, so the paper's own selection is not looked at.

    Raises:
        PmodError: the result could not be loaded.
    """
    settings = plan.draft.settings
    papers = settings is None or (settings.selection, settings.before) == ("router", None)
    if papers or not LAYOUTS[plan.options.to].loads:
        return
    try:
        _built(plan)
    except ValueError as error:
        raise PmodError(f"{plan.source.folder} cannot have these settings: {error}") from error


def _built(plan: ConversionPlan) -> PreTrainedModel:
    """The model of the result, on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(_config(plan.draft.config))


def _same_tensor(written: files.Tensor, part: TensorSource, name: str) -> None:
    expected = part.result
    if (written.dtype, written.shape) != (expected.dtype, expected.shape):
        found = f"{written.dtype} {list(written.shape)}"
        raise _differs(written.path, f"{name} is {found}, expected {expected.dtype} {list(expected.shape)}")
    with open(written.path, "rb") as file:
        file.seek(written.offset)
        changes = part.changed or part.source.loaded is not None
        for piece in transformed(name, part) if changes else _raw(part.source):
            if file.read(len(piece)) != bytes(piece):
                raise _differs(written.path, f"{name} differs from {part.source.path}")


def _raw(tensor: files.Tensor) -> Iterator[bytes]:
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise _differs(tensor.path, "it ended early")
            left -= len(piece)
            yield piece


def _keys_and_shapes(plan: ConversionPlan, folder: Path) -> str:
    """Names and shapes on disk against the model itself."""
    model = _built(plan)
    expected = {canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    written = files.read_tensors(folder)
    found = {canonical(name): tensor.shape for name, tensor in written.items() if not OBSOLETE.fullmatch(name)}
    shared = {"language_model.lm_head.weight"} if tied(plan.draft.config) else set()
    for names, meaning in (
        (expected.keys() - found.keys() - shared, "lacks"),
        ({name for name in found.keys() - expected.keys() if ".router." in name}, "has beyond the model"),
        ({name for name in found.keys() & expected.keys() if found[name] != expected[name]}, "has in another shape"),
    ):
        if names:
            raise _differs(folder, f"it {meaning} {len(names)} tensors: {', '.join(sorted(names)[:5])}")
    return f"{len(expected)} names and shapes: those of {type(model).__name__}"


def _forward(plan: ConversionPlan, folder: Path) -> str:
    """Logits with every layer routed at ratio 1 by zero routers, against the stock model with the same weights."""
    import torch

    size = sum((folder / name).stat().st_size for name in plan.weights.names)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 1.2 * size > free:
        return f"no forward pass: it takes {memory_size(1.2 * size)} of memory, and {memory_size(free)} are free"
    config = {key: value for key, value in plan.draft.config.items() if key not in OURS}
    family = FAMILIES[plan.source.kind]
    every = PmodSettings(schedule="list", values=(1.0,) * plan.source.num_layers, max_ratio=2.0)
    stock = _logits(folder, _config(config | {"model_type": family.name}))
    routed = _logits(folder, _config(config | {"model_type": family.routed_name, "pmod": every.to_dict()}))
    if not torch.equal(stock, routed):
        raise _differs(folder, f"at ratio 1 its logits differ from stock by up to {(stock - routed).abs().max():.3g}")
    return f"one forward pass of {stock.shape[1]} tokens: with all layers routed at ratio 1, bit for bit stock"


def _logits(folder: Path, config: PreTrainedConfig) -> torch.Tensor:
    """Logits of one synthetic image and two words, by a model of this config with zero routers."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # routers without a counterpart are meant here
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype="auto", local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
    for name, parameter in model.eval().named_parameters():
        if ".router." in name:
            parameter.data.zero_()
    side = small_side(config)
    shape, others = known_family(config).pixel_inputs(config, [(side, side)])
    inputs = {"pixel_values": torch.linspace(-1, 1, prod(shape), dtype=model.dtype).view(shape)}
    inputs |= {name: torch.tensor(value) for name, value in others.items()}
    with torch.no_grad():
        tokens = len(model.get_image_features(**inputs, return_dict=True).pooler_output[0])
        ids = torch.tensor([[1, *[config.image_token_id] * tokens, 2, 3]])
        if not known_family(config).tiled:  # positions of rows and columns
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        return model(input_ids=ids, **inputs).logits


def _config(values: dict) -> PreTrainedConfig:
    from transformers import AutoConfig

    import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes

    return AutoConfig.for_model(**values)


def _differs(path: Path, how: str) -> PmodError:
    return PmodError(f"{path} is not what it should be: {how}", hint="convert again: `overwrite=True`", code=RUN_FAILED)
