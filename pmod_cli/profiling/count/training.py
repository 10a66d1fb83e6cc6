"""What one training step costs: FLOPs and peak memory, from sizes alone, before anything is loaded. Needs no torch.

    sizes = Sizes.of(config)
    rows = Workload(((672, 672),), text_tokens=200, batch_size=4).rows(sizes)
    setup = TrainingSetup(precision="bfloat16", checkpointing=True)
    training_memory(sizes, rows, setup, Routed(retention)).total  # bytes on one device
    training_flops(sizes, rows, setup, Routed(retention)).step    # FLOPs of forward and backward on one device

The counts of saved tensors were read off the autograd graph of transformers' layers and are held to what a real step
allocates (`tests/profiling/test_training.py`); what several devices share is arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.count.formulas import Parameters, Prefill, parameters, prefill
from pmod_cli.profiling.count.workload import Routed, Row, layer_tokens

PARTS = ("language_model", "projector", "vision_tower", "router")  # that are frozen, or trained at a rate of their own
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.5 + 4 / 64}  # nf4: a float32 scale for 64 weights
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as its cost depends on it. The optimizer is AdamW.

    Args:
        precision: Of forward and backward: `float32`, or `bfloat16` by autocast. What is trained is held in float32.
        checkpointing: Whether decoder layers are computed again in the backward pass (those of a frozen tower are not).
        frozen: Parts without gradients, of `PARTS`.
        frozen_dtype: How frozen weights are held: one of `WEIGHT_BYTES`; nf4 applies to the decoder's layers.
        lora_rank: Rank of adapters on the decoder, whose own weights are frozen then; None trains it whole.
        lora_targets: Linear maps of a layer that have an adapter.
        distilled: Whether the stock model's logits are learned too: one more forward pass of that model, and five more
            tensors of the logits' size.
        answers_only: Whether lm_head sees no more than the text, as in `pmod finetune`, which shows it the answers;
            else it sees every position, as in a model's own loss.
        accumulation: Forward passes to one optimizer step; above 1 the gradients of the pass before are held.
        engine: What devices share: `ddp` nothing; `zero1` optimizer states, `zero2` gradients too, `zero3` and `fsdp2`
            weights too.
        devices: How many there are.

    Raises:
        PmodError: a value that is not among those.
    """

    precision: str = "float32"
    checkpointing: bool = False
    frozen: frozenset[str] = frozenset({"vision_tower"})
    frozen_dtype: str = "float32"
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    distilled: bool = False
    answers_only: bool = False
    accumulation: int = 1
    engine: str = "ddp"
    devices: int = 1

    def __post_init__(self) -> None:
        for what, values, known in (
            ("precision", [self.precision], ("float32", "bfloat16")),
            ("frozen_dtype", [self.frozen_dtype], WEIGHT_BYTES),
            ("engine", [self.engine], ENGINES),
            ("frozen", self.frozen, PARTS),
            ("lora_targets", self.lora_targets, LORA_TARGETS),
        ):
            if unknown := sorted(set(values) - set(known)):
                raise PmodError(f"{what} {unknown[0]!r} is unknown: expected {', '.join(known)}")

    def trains(self, part: str) -> bool:
        """Whether all weights of a part are trained."""
        return part not in self.frozen and not (part == "language_model" and self.lora_rank)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the peak of a training step.

    Args:
        weights: Trained weights in float32, frozen ones as they are held, and bfloat16 copies that autocast makes.
        optimizer: AdamW's two moments in float32.
        gradients: Those that exist at the peak.
        activations: What the backward pass needs and is held at the peak, with the work space around it.
        logits: Where lm_head makes them: log-softmax, its gradient and that of the logits; with distillation, its share
            too.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.logits


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one forward and backward pass of one batch.

    Args:
        forward: All parts, lm_head where the setup has it; with distillation, of the teacher too.
        backward: Gradients of what is trained, and of the inputs on the way to it.
        recomputed: What gradient checkpointing computes a second time: the decoder layers, up to the last product whose
            result the backward pass needs; in a plain layer that leaves out the MLP's last one. 0 without it.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def step(self) -> int:
        """Of the whole step."""
        return self.forward + self.backward + self.recomputed


def _adapter(sizes: Sizes, setup: TrainingSetup) -> int:
    """Weights of the adapters on one layer: rank times input and output width of each target; 0 without adapters."""
    return (setup.lora_rank or 0) * sum(sum(_shape(sizes, name)) for name in setup.lora_targets)


def _shape(sizes: Sizes, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a linear map of a decoder layer."""
    decoder = sizes.decoder
    queries, keys = decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size
    return {
        "q_proj": (decoder.hidden, queries),
        "k_proj": (decoder.hidden, keys),
        "v_proj": (decoder.hidden, keys),
        "o_proj": (queries, decoder.hidden),
        "gate_proj": (decoder.hidden, decoder.inner),
        "up_proj": (decoder.hidden, decoder.inner),
        "down_proj": (decoder.inner, decoder.hidden),
    }[name]


def training_flops(
    sizes: Sizes,
    rows: Sequence[Row],
    setup: TrainingSetup,
    routed: Routed | None = None,
) -> TrainingFlops:
    """FLOPs of a forward and a backward pass of one batch.

    A matrix product costs twice itself in the backward pass: the gradients of its input and of its weight. A frozen
    weight has no gradient of its own, and behind the lowest trained part no input has one.

    Args:
        rows: The batch of one device.
        routed: What p-MoD changes; None is the stock model.
    """
    counted = _forward(sizes, rows, setup, routed)
    tower, projector = setup.trains("vision_tower"), setup.trains("projector")
    weights = counted.matrix + counted.lm_head if setup.trains("language_model") else 0
    backward = counted.matrix + counted.lm_head + 2 * counted.attention_products + weights  # inputs, then weights
    routed = routed or Routed.stock(sizes.decoder.layers)
    gathered = [len(rows) * tokens for _, tokens in layer_tokens(rows, routed)]
    adapters = 2 * sum(gathered) * _adapter(sizes, setup)
    if routed.keep_keys:  # skipped tokens, too, pass these two
        keys = replace(setup, lora_targets=tuple(name for name in setup.lora_targets if name in ("k_proj", "v_proj")))
        positions = len(rows) * max(row.tokens for row in rows)
        adapters += 2 * sum(positions - tokens for tokens in gathered) * _adapter(sizes, keys)
    whole = sum(tokens for tokens, ratio in zip(gathered, routed.retention, strict=True) if ratio == 1)
    last = 2 * whole * sizes.decoder.hidden * sizes.decoder.inner
    tower_sizes, patches = sizes.tower, sum(row.patches for row in rows)
    if sizes.family.tiled:
        first = patches * 2 * tower_sizes.features * tower_sizes.hidden * sizes.decoder.hidden
    else:
        first = patches * 2 * tower_sizes.mergers * tower_sizes.cell_width**2
    if projector:
        backward += 2 * counted.projector - (0 if tower else first)
    elif tower:
        backward += counted.projector
    backward += 2 * counted.tower if tower else 0
    teacher = _forward(sizes, rows, setup, None).full if setup.distilled else 0
    return TrainingFlops(
        forward=counted.full + adapters + teacher,
        backward=backward + 2 * adapters,
        recomputed=counted.matrix + counted.attention_products + adapters - last if setup.checkpointing else 0,
    )


def _forward(sizes: Sizes, rows: Sequence[Row], setup: TrainingSetup, routed: Routed | None) -> Prefill:
    return prefill(sizes, rows, routed, logits=_logits(rows, setup))


def _logits(rows: Sequence[Row], setup: TrainingSetup) -> int:
    """Positions that lm_head sees, at most."""
    return sum(row.text_tokens for row in rows) if setup.answers_only else len(rows) * max(row.tokens for row in rows)


def training_memory(
    sizes: Sizes,
    rows: Sequence[Row],
    setup: TrainingSetup,
    routed: Routed | None = None,
) -> TrainingMemory:
    """Peak bytes of a training step on one device, once the optimizer has its states.

    The peak is looked for at the loss, and at the backward pass of every layer, where the activations of the layers
    below and the gradients of those above are there. The kernel of attention is a fused one: it keeps no scores.

    Args:
        rows: The batch of one device, padded to its longest row.
        routed: What p-MoD changes; None is the stock model.
    """
    decoder, routed = sizes.decoder, routed or Routed.stock(sizes.decoder.layers)
    numbers = parameters(sizes, sum(routed.has_router), _adapter(sizes, setup))
    positions = len(rows) * max(row.tokens for row in rows)
    gathered = [len(rows) * tokens for _, tokens in layer_tokens(rows, routed)]

    low = setup.precision == "bfloat16"
    layers = zip(gathered, routed.retention, strict=True)
    held = [_saved(sizes, setup, positions, tokens, ratio < 1, routed.keep_keys) for tokens, ratio in layers]
    # Gradients on their way through one layer: two of the MLP's inner ones, and three of the stream.
    work = [tokens * 2 * (2 if low else 4) * decoder.inner + 3 * 4 * positions * decoder.hidden for tokens in gathered]
    inputs = 4 * positions * decoder.hidden  # of a layer: the residual stream is float32
    if sizes.family.tiled:
        seen = sum(row.tiles for row in rows) * sizes.tower.tokens
    else:
        seen = sum(sizes.tower.patches(image) for row in rows for image in row.images)
    tower = 4 * seen * sizes.tower.hidden  # its stream, float32
    around = 6 * inputs + 5 * tower  # embeddings and image features merged, the last norm, and the projector
    copy = 2 * numbers.layer if low and setup.trains("language_model") else 0  # bfloat16 copy of a layer's weights
    head_copy = 2 * decoder.vocabulary * decoder.hidden if low and setup.trains("language_model") else 0

    layer_gradient = 4 * (numbers.layer if setup.trains("language_model") else numbers.adapter)
    head_gradient = 4 * decoder.vocabulary * decoder.hidden if setup.trains("language_model") else 0
    own = 4 * decoder.hidden * decoder.inner if setup.trains("language_model") else 0  # of the MLP's last matrix
    gradients = [head_gradient + own + (decoder.layers - 1 - i) * layer_gradient for i in range(decoder.layers)]
    all_gradients = 4 * _trained(numbers, setup)
    # Log-softmax and two gradients, in float32. The divergence adds the teacher's logits, log-softmax of both, and its
    # terms and gradient.
    logits = (3 + 5 * setup.distilled) * 4 * _logits(rows, setup) * decoder.vocabulary

    # What the layers below hold, and what the layer itself needs beside it: with checkpointing, its inputs, and all.
    stored, again = ([inputs] * decoder.layers, held) if setup.checkpointing else (held, [0] * decoder.layers)
    copies = [copy * (1 if setup.checkpointing else index + 1) for index in range(decoder.layers)]
    # (weight copies, gradients, activations, logits) at each moment
    moments = [((0 if setup.checkpointing else copies[-1]) + head_copy, 0, sum(stored) + around, logits)]
    for index in range(decoder.layers):
        activations = sum(stored[: index + 1]) + again[index] + work[index] + 5 * tower
        moments.append((copies[index], gradients[index], activations, 0))
    if setup.accumulation > 1:
        moments = [(copies, all_gradients, *rest) for copies, _, *rest in moments]
    moments.append((0, all_gradients, 0, 0))  # the optimizer's step
    return _shared(numbers, setup, *max(moments, key=sum))


def _saved(
    sizes: Sizes, setup: TrainingSetup, positions: int, tokens: int, routed: bool, keep_keys: bool = False
) -> int:
    """Bytes that one decoder layer keeps for its backward pass.

    In float32 and for each token: the residual stream twice, each norm's value before and after its weight, queries,
    keys, values, the attention's result; and gate, its activation, up and their product. Under autocast the residual
    stream and the norms stay float32, and each linear map keeps a bfloat16 copy of its input of its own.

    A routed layer keeps, of the tokens that it gathers, the branch that the weight scales, and of all tokens the
    stream that STRing scales. Where skipped tokens give keys and values, these are kept, and the norm in front of them.
    """
    decoder = sizes.decoder
    keys = decoder.kv_heads * decoder.head_size
    queries = decoder.heads * decoder.head_size
    if setup.precision == "bfloat16":
        vectors = (16 + 10) * decoder.hidden + 2 * (2 * queries + 2 * keys) + 8 * decoder.inner
    else:
        vectors = 6 * 4 * decoder.hidden + 4 * (2 * queries + 2 * keys) + 16 * decoder.inner
    scores = 4 * decoder.heads  # the fused kernel's log-sum-exp
    if setup.lora_rank:  # each adapter keeps its input after dropout, the mask of dropout, and its narrow result
        vectors += sum(5 * _shape(sizes, name)[0] + 4 * setup.lora_rank for name in setup.lora_targets)
    if not routed:
        return tokens * (vectors + scores)
    branch = 8 if setup.precision == "bfloat16" else 4
    tables = 2 * 4 * decoder.head_size  # rotary tables, gathered
    skipped = 0
    if keep_keys:
        low = setup.precision == "bfloat16"
        skipped = (positions - tokens) * ((12 if low else 8) * decoder.hidden + 2 * (2 if low else 4) * keys)
    return tokens * (vectors + scores + branch * decoder.hidden + tables) + 4 * positions * decoder.hidden + skipped


def _trained(numbers: Parameters, setup: TrainingSetup) -> int:
    trained = {
        "language_model": numbers.decoder,
        "projector": numbers.projector,
        "vision_tower": numbers.tower,
        "router": numbers.routers,
    }
    return numbers.layers * numbers.adapter + sum(number for part, number in trained.items() if setup.trains(part))


def _shared(
    numbers: Parameters, setup: TrainingSetup, copies: int, gradients: int, activations: int, logits: int
) -> TrainingMemory:
    """The same on one of several devices."""
    trained = _trained(numbers, setup)
    adapters = numbers.layers * numbers.adapter
    frozen = numbers.total + adapters - trained
    size = WEIGHT_BYTES[setup.frozen_dtype]
    if setup.frozen_dtype == "nf4":  # bitsandbytes replaces the linear maps of the layers; the rest is bfloat16
        layers = 0 if setup.trains("language_model") else numbers.layer * numbers.layers
        frozen_bytes = size * layers + WEIGHT_BYTES["bfloat16"] * (frozen - layers)
    else:
        frozen_bytes = size * frozen
    weights = 4 * trained + frozen_bytes
    optimizer = 8 * trained
    share = {
        "ddp": (1, 1, 1),
        "zero1": (1, 1, setup.devices),
        "zero2": (1, setup.devices, setup.devices),
        "zero3": (setup.devices,) * 3,
        "fsdp2": (setup.devices,) * 3,
    }[setup.engine]
    if setup.engine == "ddp" and setup.devices > 1:
        gradients += 4 * trained  # the buckets that are reduced
    if share[0] > 1:
        weights = weights / share[0] + 2 * 4 * numbers.layer  # a layer is gathered while the one before is computed
    return TrainingMemory(
        weights=round(weights) + copies,
        optimizer=optimizer // share[2],
        gradients=gradients // share[1],
        activations=activations,
        logits=logits,
    )
