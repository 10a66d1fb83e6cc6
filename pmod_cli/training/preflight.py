"""What a run would be refused for, as far as it is known without its weights.

``pmod finetune`` asks this before it imports torch or starts a process, with ``--dry-run`` and without: so a plan is
approved only where the run starts. The library's ``finetune`` asks ``check_settings`` again for itself.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pmod_cli.checkpoints.loading import refuse_bytes
from pmod_cli.core.errors import PmodError, require
from pmod_cli.core.hardware import require_attention, require_device
from pmod_cli.core.paths import expanded
from pmod_cli.profiling.count.training import LORA_TARGETS
from pmod_cli.training import folder
from pmod_cli.training.launch import Distributed
from pmod_cli.training.run_settings import Settings, needed
from pmod_cli.training.start import check_start


@dataclass(frozen=True)
class Intent:
    """A run that is about to start.

    Args:
        settings: the whole run.
        distributed: its processes.
        device: what they run on: cpu, cuda, cuda:N or mps.
        out: the run folder; None is a new one.
        resume: as ``run.finetune`` takes it.
        overwrite: as ``run.finetune`` takes it.
        launched: whether another program, such as torchrun, has started this process as one of several.
    """

    settings: Settings
    distributed: Distributed = field(default_factory=Distributed)
    device: str = "cpu"
    out: Path | None = None
    resume: bool = True
    overwrite: bool = False
    launched: bool = False

    @property
    def processes(self) -> int | None:
        """How many share the run; None where only another launcher knows."""
        return None if self.launched or self.distributed.accelerate_config is not None else self.distributed.processes


def preflight(run: Intent, *, elsewhere: bool = False) -> list[str]:
    """Refuse a run that could not start.

    Args:
        elsewhere: the run is planned for another machine: what this one lacks is told, not refused.

    Returns:
        What this machine lacks, one sentence each; empty where the run may start here.

    Raises:
        PmodError: the first thing that would end the run.
    """
    for check in ANYWHERE:
        check(run)
    lacking = []
    for check in HERE:
        try:
            check(run)
        except PmodError as fault:
            if not elsewhere:
                raise
            lacking.append(fault.what)
    return lacking


def check_settings(settings: Settings, processes: int) -> None:
    """What is wrong with the settings alone, on any machine.

    Raises:
        PmodError: the global batch does not come out even, the data have no end, or adapters are to go where no decoder
            has a linear map.
    """
    try:
        settings.accumulation(processes)
    except ValueError as fault:
        raise PmodError(str(fault), hint="change train.batch_size or train.global_batch_size") from None
    if settings.data.kind == "synthetic" and settings.data.rows is None and settings.train.max_steps is None:
        raise PmodError(
            "synthetic documents have no end: expected train.max_steps or data.rows", hint="`train.max_steps=99`"
        )
    if settings.lora.enabled and (unknown := [name for name in settings.lora.targets if name not in LORA_TARGETS]):
        raise PmodError(f"lora.targets: the decoder has no {', '.join(unknown)}", hint=", ".join(LORA_TARGETS))


def _settings(run: Intent) -> None:
    if run.processes is not None:
        check_settings(run.settings, run.processes)


def _folder(run: Intent) -> None:
    if run.distributed.machines > 1 and run.out is None:
        raise PmodError("`num_machines` needs `out`, a folder that all machines share")
    if run.out is not None:
        refuse_bytes(run.out)
    if run.out is not None and run.processes is not None and run.distributed.machine_rank == 0:
        folder.check_free(run.out, run.settings, run.processes, resume=run.resume, overwrite=run.overwrite)
        state = run.out / folder.STATE
        if state.is_dir() and not run.overwrite:
            from pmod_cli.training.resume import newest_whole  # imports torch, and only where a run goes on

            newest_whole(state)


def _report(run: Intent) -> None:
    """Weights & Biases and TensorBoard run on any machine, so a plan for another one is held to them too."""
    check_report(run.settings)


def _tasks(run: Intent) -> None:
    if run.settings.eval:
        from pmod_cli.evaluation.suite import resolve

        require("eval", "lmms_eval")
        resolve(run.settings.eval)


def _questions(run: Intent) -> None:
    """A run that cannot be scored after the training says so before it."""
    if run.settings.eval:
        from pmod_cli.evaluation.data import require_data
        from pmod_cli.evaluation.suite import resolve

        require_data(resolve(run.settings.eval))


def _devices(run: Intent) -> None:
    require_device(run.device, 1 if run.processes is None else run.distributed.here)


def _packages(run: Intent) -> None:
    check_requirements(run.settings, run.device, run.launched or run.distributed.is_launch)


def _data(run: Intent) -> None:
    data = run.settings.data
    if data.kind != "llava":
        return
    path = expanded(needed(data.path, "data.path"))
    if not path.is_file():
        raise PmodError(f"data.path: there is no file {path}", hint="`data.path=FILE`")
    if data.images is not None and not expanded(data.images).is_dir():
        raise PmodError(f"data.images: there is no folder {data.images}", hint="`data.images=DIR`")


def _model(run: Intent) -> None:
    check_start(run.settings, (run.out or Path("runs", run.settings.name)) / folder.STATE / folder.START)


ANYWHERE = (_settings, _folder, _report, _tasks)
HERE = (_devices, _packages, _data, _questions, _model)


PACKAGES = {"peft": "peft", "bitsandbytes": "bitsandbytes", "deepspeed": "deepspeed", "liger_kernel": "liger-kernel"}
PACKAGES |= {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_requirements(settings: Settings, device: str, distributed: bool) -> None:
    """Refuse settings that this machine or installation cannot follow.

    Args:
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
