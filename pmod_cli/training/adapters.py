"""LoRA through peft: low-rank adapters on the decoder; routers, and other parts that are not frozen, trained whole."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from pmod_cli.checkpoints import load_model
from pmod_cli.checkpoints.tokenizer_files import carry_model_file
from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import held
from pmod_cli.data.pictures import padding_processor
from pmod_cli.training.folder import ADAPTER, SETTINGS, STATE, adapter_of, publishing
from pmod_cli.training.parts import freeze, modules_of
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.resume import SOURCE, check_adapter, newest_whole
from pmod_cli.training.run_settings import Settings
from pmod_cli.training.start import hold_routing, starting_checkpoint


def add_adapters(model: PreTrainedModel, settings: Settings, checkpoint: Path | None = None) -> PeftModel:
    """The model with adapters to be trained, its own weights frozen.

    Args:
        settings: ``lora`` and ``model.freeze``.
        checkpoint: a folder with adapters to go on with; otherwise they are new and change nothing yet.

    Raises:
        PmodError: no linear map of the decoder has one of the names of ``lora.targets``.
    """
    if checkpoint is not None:
        config = LoraConfig.from_pretrained(str(checkpoint))
        config.inference_mode = False  # as it is saved, nothing is trained
    else:
        lora = settings.lora
        names = {name.rsplit(".", 1)[-1] for name, _ in model.model.language_model.layers[0].named_modules()}
        if unknown := [target for target in lora.targets if target not in names]:
            raise PmodError(f"lora.targets: the decoder has no {', '.join(unknown)}", hint="q_proj, v_proj, …")
        # Routers also where they are frozen: `model.router_start` may have fitted them, and the source has not.
        whole = {"router"} | ({"projector", "vision_tower"} - {*settings.model.freeze})
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared int, only ever divided
            lora_dropout=lora.dropout,
            target_modules=rf".*\.language_model\.layers\.\d+\.\w+\.({'|'.join(lora.targets)})",
            modules_to_save=modules_of(model, whole),
        )
    with _quiet():
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # what is trained is float32, whatever the frozen weights are
    if checkpoint is not None:  # only now: before, what is trained whole would be rounded to the frozen weights' dtype
        adapted.load_adapter(checkpoint, "default", is_trainable=True)
    freeze(adapted, settings.model.freeze)  # of what is saved whole
    return adapted


def merge(out: Path, *, name: str | None = None) -> str:
    """Fold the adapters of a LoRA run into the weights they were trained on; the run folder becomes a checkpoint.

    The weights are read in the dtype they are stored in, whatever the run trained with: the result is the same right
    after the run and any time later.

    Args:
        out: the run folder: finished, or with a training checkpoint, whose newest adapters are taken.
        name: where the model that the run started from is now, if not where it was.

    Returns:
        What was merged: the adapter folder's name.

    Raises:
        PmodError: ``out`` is no LoRA run, has no adapter yet, or its adapter was trained on other weights.
    """
    if not (out / SETTINGS).is_file():
        raise PmodError(f"{out} is not a run of pmod finetune", hint="name the run folder: pmod finetune --merge DIR")
    with held(out):
        return fold(out, name=name)


def fold(out: Path, *, name: str | None = None) -> str:
    """``merge``, by who holds the run folder already."""
    settings = load_settings(out / SETTINGS)
    if not settings.lora.enabled:
        raise PmodError(f"{out} is no LoRA run: its weights were trained themselves, there is nothing to merge")
    settings.model.name = name or settings.model.name
    adapter = adapter_of(out) or _newest(out)
    check_adapter(settings, adapter, out)
    scratch = out / STATE / "merge"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        start = starting_checkpoint(settings, scratch / "start")
        model, processor = load_model(start, dtype="auto")
        with _quiet():
            adapted = PeftModel.from_pretrained(model, adapter)
        merged = adapted.merge_and_unload().to(model.dtype)
        hold_routing(merged.config, settings)
        with publishing(out) as staging:
            merged.save_pretrained(staging)
            padding_processor(processor).save_pretrained(staging)  # as it was trained
            carry_model_file(start, staging)
            if adapter != out / ADAPTER:
                copy_adapter(adapter, staging / ADAPTER)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            scratch.parent.rmdir()  # unless there is training state in it
    return adapter.name


def copy_adapter(source: Path, target: Path) -> None:
    """Copy the adapter alone out of a training checkpoint, and the digests of the weights it was trained on."""
    target.mkdir()
    record = source / SOURCE if (source / SOURCE).is_file() else source.parent / SOURCE
    for path in [*source.glob("adapter_*"), *([record] if record.is_file() else [])]:
        shutil.copyfile(path, target / path.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that peft causes: it asks by a name that transformers calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _newest(out: Path) -> Path:
    found, _ = newest_whole(out / STATE)
    if found is None or not (found / "adapter_config.json").is_file():
        raise PmodError(
            f"{out} has no adapter yet: the run has not saved one",
            hint=f"go on with it: pmod finetune --recipe {quote(str(out / SETTINGS))} --out {quote(str(out))}",
        )
    return found
