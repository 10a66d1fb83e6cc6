"""Files to a model: stock LLaVA and p-MoD alike. Nothing that the checkpoint lacks is filled in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.checkpoints.files import CONFIG, missing_files, read_json, shard_names
from pmod_cli.checkpoints.layouts import layout_of
from pmod_cli.checkpoints.processor import check_processor
from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers.utils.quantization_config import QuantizationConfigMixin


def router_state(path: Path) -> str:
    """`stock`, or for a p-MoD checkpoint `untrained`, `trained` or `calibrated`.

    With untrained routers every token of a layer ties: what is kept then means nothing.
    """
    config = read_json(Path(path) / CONFIG)
    return config.get("router_state", "untrained") if "pmod" in config else "stock"


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    quantization: QuantizationConfigMixin | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in eval mode and its processor.

    Args:
        path: Folder of a stock LLaVA or a p-MoD checkpoint, as `resolve` finds it.
        dtype: `auto` (as stored), `bfloat16`, `float16` or `float32`.
        device: A torch device.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        quantization: How weights are held in fewer bits; transformers then places the model itself.

    Raises:
        PmodError: files or tensors are missing, or tensors have another shape than the config says.
    """
    path = Path(path)
    refuse_bytes(path)
    if missing := missing_files(path):
        raise PmodError(f"{path} lacks {', '.join(missing)}", hint="name another model with `model`")
    layout = layout_of(read_json(path / CONFIG))
    if (layout is not None and not layout.loads) or not shard_names(path)[0].endswith(".safetensors"):
        raise PmodError(f"{path} is in a layout that has to be converted first", hint=f"pmod convert {path}")

    from transformers import AutoModelForImageTextToText

    import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes

    processor = load_processor(path)  # before the weights, which take longer
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            quantization_config=quantization,
        )
    except (ValueError, ImportError) as error:
        raise PmodError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    _refuse_differences(path, info)
    return (model if quantization else model.to(device)).eval(), processor


def load_processor(path: Path) -> ProcessorMixin:
    """The processor of a checkpoint: its tokenizer, its image processor and its chat template.

    Raises:
        PmodError: one of its files is missing or damaged, or it makes other pictures than the vision tower takes.
    """
    refuse_bytes(path)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:  # on a damaged file tokenizers raises a plain Exception, transformers nearly anything
        first = (str(error).strip() or "no message").splitlines()[0]
        raise PmodError(
            f"the tokenizer or the image processor in {path} cannot be loaded: {type(error).__name__}: {first:.300}",
            hint="fetch or convert the checkpoint again",
        ) from error
    check_processor(processor, read_json(path / CONFIG), path)
    return processor


def refuse_bytes(path: Path) -> None:
    """Raises PmodError at a path that is no UTF-8: transformers and safetensors can neither read nor write there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PmodError(
            f"the path {path} is no UTF-8, and transformers cannot read or write there",
            hint="rename it, or name it by a symbolic link",
        ) from None


def _refuse_differences(path: Path, info: dict) -> None:
    """Transformers starts absent tensors at random and goes on; a router without a layer would be dropped silently."""
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    extra = [name for name in info["unexpected_keys"] if ".router." in name]
    for names, meaning in (
        (sorted(info["missing_keys"]), "lacks"),
        (sorted(mismatched), "has, in another shape than its config says,"),
        (sorted(extra), "has, on layers that its config calls plain,"),
    ):
        if names:
            raise PmodError(
                f"{path} {meaning} {len(names)} tensors: {', '.join(names[:10])}", hint="convert or fetch it again"
            )
