"""What a run needs beside the base installation: checked before anything is loaded or written."""

from importlib.util import find_spec

from pmod_cli.core.errors import PmodError
from pmod_cli.core.hardware import require_attention
from pmod_cli.training.settings import Settings

PACKAGES = {"peft": "peft", "bitsandbytes": "bitsandbytes", "deepspeed": "deepspeed", "liger_kernel": "liger-kernel"}
PACKAGES |= {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_requirements(settings: Settings, device: str, distributed: bool) -> None:
    """Refuse settings that this machine or installation cannot follow.

    Args:
        settings: the whole run.
        device: cpu, cuda, cuda:N or mps.
        distributed: whether several processes share the run; one alone shares nothing and needs no engine.

    Raises:
        PmodError: names the setting, what it needs, and what to do instead.
    """
    model, train, cuda = settings.model, settings.train, device.startswith("cuda")
    if settings.lora.enabled:
        _need("peft", "lora.enabled", "train all weights with `lora.enabled=false`")
    if model.quantize != "none":
        if not cuda:
            raise PmodError(
                f"model.quantize: {model.quantize} needs a CUDA GPU, and the device is {device}",
                hint="LoRA without it: `model.quantize=none`",
            )
        _need("bitsandbytes", "model.quantize", "LoRA without it: `model.quantize=none`")
    if model.liger_kernel:
        if not cuda:
            raise PmodError(
                f"model.liger_kernel needs a GPU, and the device is {device}", hint="`model.liger_kernel=false`"
            )
        _need("liger_kernel", "model.liger_kernel", "`model.liger_kernel=false`")
    require_attention(model.attention, device)
    if train.engine.startswith("zero") and distributed:
        if not cuda:
            raise PmodError(
                f"train.engine: DeepSpeed ({train.engine}) needs CUDA GPUs, and the device is {device}",
                hint="`train.engine=ddp` or `train.engine=fsdp2`",
            )
        _need("deepspeed", f"train.engine: {train.engine}", "`train.engine=fsdp2`")
    check_report(settings)


def check_report(settings: Settings) -> None:
    """Refuse a log that needs a package which is not installed.

    Raises:
        PmodError: names the setting, and what to do instead.
    """
    where = settings.train.report_to
    if where != "none":
        _need(where, f"train.report_to: {where}", "`train.report_to=none`")


def _need(module: str, setting: str, instead: str) -> None:
    if find_spec(module) is None:
        package = PACKAGES[module]
        raise PmodError(
            f"{setting} needs {package}, which is not installed", hint=f"pip install {package}; or {instead}"
        )
