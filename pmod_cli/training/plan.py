"""What a run would do and need, p-MoD and stock: no weights are read, nothing is trained or written."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, ProcessorMixin

from pmod_cli.checkpoints import load_processor, resolve
from pmod_cli.core.errors import PmodError
from pmod_cli.core.paths import expanded
from pmod_cli.data.check import check_rows, refuse_bad
from pmod_cli.data.collator import Collator, ModalityBatches
from pmod_cli.data.dataset import Rows, build_dataset
from pmod_cli.data.sources import RowSource, open_source
from pmod_cli.data.vision import vision_ids
from pmod_cli.families.configs import context_of
from pmod_cli.families.llava import LLAVA
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.count.trace import meta_model
from pmod_cli.profiling.count.training import TrainingMemory, training_flops, training_memory
from pmod_cli.profiling.count.workload import Routed, Workload
from pmod_cli.profiling.measure.devices import Device, parse_memory
from pmod_cli.profiling.subject import Subject, load_subject
from pmod_cli.training.cost import Disk, Remedy, disk_of, remedies, row_of, setup_of, this_device
from pmod_cli.training.parts import PartCount, count, freeze
from pmod_cli.training.preflight import check_settings
from pmod_cli.training.run_data import SyntheticDocuments
from pmod_cli.training.run_settings import Settings, needed
from pmod_cli.training.start import is_here, is_routed, processor_of

SAMPLE = 16  # synthetic rows drawn to estimate the tokens of a row
TEXT_TOKENS = 200  # of a row that nobody has seen
USABLE = 0.92  # of a GPU's memory: the driver and the allocator's gaps take the rest


@dataclass(frozen=True)
class DataShape:
    """What a run reads, as far as its cost goes.

    Attributes:
        rows: of the data set.
        rows_per_epoch: of one pass over it, with those that fill up the batches of ``data.group_by_modality``.
        tokens: of a row, mean.
        vision_tokens: of these, those of images and videos; a row without any has 0.
        longest: tokens of the longest row.
        longest_vision: of these, those of images and videos.
        source: how that is known.
    """

    rows: int
    rows_per_epoch: int
    tokens: float
    vision_tokens: float
    longest: int
    longest_vision: int
    source: str


@dataclass(frozen=True)
class Cost:
    """One column of the table.

    Attributes:
        memory: of one device at the peak.
        fits: whether that fits the device; None where its memory is not known.
        flops: of the whole run: forward and backward passes, and what checkpointing repeats.
        hours: at the stated utilization; None where the device's peak is not known.
        mean_retention: share of the routed vision tokens a layer keeps, mean over the layers.
    """

    memory: TrainingMemory
    fits: bool | None
    flops: float
    hours: float | None
    mean_retention: float


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        model: what it starts from, and where its sizes are known from.
        runs_as: p-mod or stock: which of the columns this run would be.
        parameters: of each part, how many there are and how many are trained.
        learning_rates: of each trained part.
        data: what is read.
        context: tokens that the decoder was made for; None where its configuration does not say.
        steps: optimizer steps.
        rows_per_step: over all devices.
        rows: of the whole run.
        tokens: of the whole run.
        device: what it is planned for, and how many of them.
        devices: how many.
        utilization: share of the peak that is reckoned with.
        pmod: cost as a p-MoD model.
        stock: cost as a stock model.
        disk: what the run writes.
        remedies: where the run does not fit its devices: what would make it fit.
        lacking: what this machine lacks for the run, where it is planned for another one.
    """

    model: str
    runs_as: str
    parameters: dict[str, PartCount]
    learning_rates: dict[str, float]
    data: DataShape
    context: int | None
    steps: int
    rows_per_step: int
    rows: int
    tokens: int
    device: Device
    devices: int
    utilization: float
    pmod: Cost
    stock: Cost
    disk: Disk
    remedies: list[Remedy] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    @property
    def cost(self) -> Cost:
        """That of this run."""
        return self.pmod if self.runs_as == "p-mod" else self.stock


def plan(
    settings: Settings,
    *,
    processes: int = 1,
    device: str = "auto",
    gpu: str | None = None,
    utilization: float = 0.4,
    out: Path = Path("runs"),
    lacking: list[str] | None = None,
) -> Plan:
    """Work out a run. What it would be refused for without its weights, ``preflight`` tells first.

    Args:
        device: auto, cpu, cuda or cuda:N; what is there, where ``gpu`` does not say otherwise.
        gpu: a GPU by name, or its memory.
        utilization: share of the device's peak arithmetic that is reached.
        out: the run folder, or one above it.
        lacking: what ``preflight`` has found this machine to lack.

    Raises:
        PmodError: the model or the GPU is not known, the settings do not fit, or rows of the data cannot be used.
    """
    check_settings(settings, processes)
    per_step = settings.rows_per_step(processes)
    target = parse_memory(gpu) if gpu else this_device(device)
    on_gpu = gpu is not None or (device != "cpu" and torch.cuda.is_available())
    subject, routed, name = model_of(settings)
    sizes = subject.sizes
    data = data_shape(settings, sizes, per_step)
    steps = settings.steps(data.rows_per_epoch, processes)
    rows = settings.rows_read(steps, data.rows_per_epoch, processes)
    passes = rows / (settings.train.batch_size * processes)  # of one device
    room = USABLE * target.memory

    def memory(settings: Settings, processes: int, which: Routed) -> TrainingMemory:
        batch = [row_of(sizes, data.longest_vision, data.longest)] * settings.train.batch_size
        return training_memory(sizes, batch, setup_of(settings, processes, on_gpu), which)

    def cost(which: Routed) -> Cost:
        needed = memory(settings, processes, which)
        batch = [row_of(sizes, data.vision_tokens, data.tokens)] * settings.train.batch_size
        flops = training_flops(sizes, batch, setup_of(settings, processes, on_gpu), which).step * passes
        return Cost(
            memory=needed,
            fits=needed.total <= room if target.memory else None,
            flops=float(flops) * processes,
            hours=flops / (target.flops * utilization) / 3600 if target.flops else None,
            mean_retention=which.mean_retention,
        )

    config = subject.pmod if routed else subject.stock
    parameters = _parameters(settings, config)
    pmod, stock = Routed.of(subject.pmod), Routed.stock(sizes.decoder.layers)
    found = Plan(
        model=name,
        runs_as="p-mod" if routed else "stock",
        parameters=parameters,
        learning_rates={part: settings.train.rate(part) for part, numbers in parameters.items() if numbers.trained},
        data=data,
        context=context_of(config),
        steps=steps,
        rows_per_step=per_step,
        rows=rows,
        tokens=round(data.tokens * rows),
        device=target,
        devices=processes,
        utilization=utilization,
        pmod=cost(pmod),
        stock=cost(stock),
        disk=disk_of(settings, parameters, config, steps, None if gpu else out),
        lacking=lacking or [],
    )
    if found.cost.fits is not False:
        return found
    own = pmod if routed else stock

    def peak(changed: Settings, devices: int) -> int:
        return memory(changed, devices, own).total

    return replace(found, remedies=remedies(settings, processes, peak, room, on_gpu))


def model_of(settings: Settings) -> tuple[Subject, bool, str]:
    """The two configurations of the model, whether the run would route it, and what it is called."""
    model = settings.model
    if model.llm is None:
        name = shown = needed(model.name, "model.name")
    else:
        name = "llava-1.5-7b" if model.kind == LLAVA.name else "llava-next-7b"
        shown = f"{model.llm} and others, taken to have the sizes of {name}"
    subject = load_subject(name, settings.pmod.given)
    asked = is_routed(settings) or _holds_routers(name)
    return subject, settings.pmod.enabled is not False and asked, shown


def _holds_routers(name: str) -> bool:
    folder = expanded(name)
    return folder.is_dir() and '"pmod"' in (folder / "config.json").read_text(encoding="utf-8")


def _parameters(settings: Settings, config: PretrainedConfig) -> dict[str, PartCount]:
    """Of each part; with adapters, those of the language model are what is trained of it."""
    model = meta_model(config)
    freeze(model, settings.model.freeze)
    if not settings.lora.enabled:
        return count(model)
    from pmod_cli.training.adapters import add_adapters

    return count(add_adapters(model, settings))


def data_shape(settings: Settings, sizes: Sizes, per_step: int) -> DataShape:
    """What a run reads: from a sample of its data where they are here, else from what the settings say of them.

    Args:
        per_step: rows of an optimizer step.

    Raises:
        PmodError: rows cannot be used, or nothing says how many there are.
    """
    data = settings.data
    vision = Workload().rows(sizes)[0].vision_tokens
    here = data.kind != "llava" or (data.path is not None and expanded(data.path).exists())
    processor = _processor(settings) if here else None
    if processor is not None:
        return _sampled(settings, processor, per_step)
    rows = read = data.rows or (settings.train.max_steps or 0) * per_step
    if here and data.kind != "synthetic":
        source = open_source(data.kind, needed(data.path, "data.path"), None)
        rows, read = len(source), _rows_per_epoch(settings, source, per_step)
    if not rows:
        raise PmodError(
            f"{data.path} is not here, and neither data.rows nor train.max_steps says how much it is",
            hint="`data.rows=100000`",
        )
    tokens = min(vision + TEXT_TOKENS, data.max_length or vision + TEXT_TOKENS)
    vision = min(vision, tokens)
    lacking = "not every part of the model is here" if here else f"{data.path} is not here"
    said = f"{lacking}: {rows:,} rows of one large image and {TEXT_TOKENS} text tokens are assumed"
    return DataShape(rows, read, tokens, vision, max(tokens, data.max_length or 0), vision, said)


def _processor(settings: Settings) -> ProcessorMixin | None:
    """The processor of the run; None where it is made of parts that are not all on this machine."""
    if settings.model.name:
        return load_processor(resolve(settings.model.name, weights=False).path)
    try:
        return processor_of(settings) if is_here(settings) else None
    except PmodError:  # which the start would refuse, and ``preflight`` has named
        return None


def _sampled(settings: Settings, processor: ProcessorMixin, per_step: int) -> DataShape:
    """From a few rows."""
    data = settings.data
    if data.kind == "synthetic":
        rows = data.rows or (settings.train.max_steps or 0) * per_step
        documents = SyntheticDocuments(data, SAMPLE)
        batch = Collator(processor)([documents[index] for index in range(SAMPLE)])
        tokens = batch["attention_mask"].sum(dim=1)
        vision = torch.isin(batch["input_ids"], torch.tensor(vision_ids(processor))).sum(dim=1)
        longest = int(tokens.argmax())
        means = tokens.double().mean().item(), vision.double().mean().item()
        return DataShape(rows, rows, *means, int(tokens[longest]), int(vision[longest]), f"{SAMPLE} drawn documents")
    found = build_dataset(data, processor)
    report = check_rows(found)
    refuse_bad(report, skip=data.on_bad_row == "skip")
    rows = _rows_per_epoch(settings, found, per_step)
    means = report.tokens_per_row, report.vision_tokens_per_row
    longest = report.longest_after(data.max_length)
    said = f"{report.checked} rows of the data"
    return DataShape(len(found), rows, *means, longest, report.longest_vision, said)


def _rows_per_epoch(settings: Settings, rows: Rows | RowSource, per_step: int) -> int:
    """Of one pass over the data, with those that fill up batches of one kind."""
    if not settings.data.group_by_modality:
        return len(rows)
    batch_size = settings.train.batch_size
    return len(ModalityBatches(rows.lengths, batch_size, per_step // batch_size))
