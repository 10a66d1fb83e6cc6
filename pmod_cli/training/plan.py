"""What a run would do and need, from the configuration and a few rows: no weights are read, nothing is written."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

import pmod_cli.model.modeling  # noqa: F401 - makes the p-MoD classes known to the Auto classes
from pmod_cli.checkpoints import resolve
from pmod_cli.data.collator import Collator
from pmod_cli.training.dataset import SyntheticDocuments
from pmod_cli.training.parts import Part, count, freeze
from pmod_cli.training.settings import Settings

SAMPLE = 16  # rows drawn to estimate the tokens of a row


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        parameters: of each part, how many there are and how many are trained.
        learning_rates: of each trained part.
        steps: optimizer steps.
        images: images seen.
        tokens_per_image: text and vision tokens of one row, mean of a sample.
        tokens: of the whole run, from that mean.
        mean_retention: share of the vision tokens a layer keeps, mean over the layers; 1.0 for a stock model.
        memory_gib: estimate of the peak on the training device.
    """

    parameters: dict[str, Part]
    learning_rates: dict[str, float]
    steps: int
    images: int
    tokens_per_image: float
    tokens: int
    mean_retention: float
    memory_gib: float


def plan(settings: Settings, *, device: str = "cpu") -> Plan:
    """Work out a run.

    Raises:
        PmodError: the model cannot be found.
    """
    source = resolve(settings.model.name, weights=False).path
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    freeze(model, settings.model.freeze)
    parameters = count(model)
    documents = SyntheticDocuments(settings.data, SAMPLE)
    batch = Collator(AutoProcessor.from_pretrained(source))([documents[index] for index in range(SAMPLE)])
    tokens_per_image = batch["attention_mask"].sum().item() / SAMPLE
    steps = settings.steps(settings.data.rows or 0)
    images = steps * settings.rows_per_step()
    retention = getattr(config, "retention", None) or [1.0] * config.text_config.num_hidden_layers
    return Plan(
        parameters=parameters,
        learning_rates={part: settings.train.rate(part) for part, numbers in parameters.items() if numbers.trained},
        steps=steps,
        images=images,
        tokens_per_image=tokens_per_image,
        tokens=round(tokens_per_image * images),
        mean_retention=sum(retention) / len(retention),
        memory_gib=_memory(settings, config, parameters, retention, batch["input_ids"], device) / 2**30,
    )


def _memory(
    settings: Settings,
    config: PretrainedConfig,
    parameters: dict[str, Part],
    retention: list[float],
    input_ids: torch.Tensor,
    device: str,
) -> float:
    """Bytes: float32 weights, gradients and AdamW's two moments, and what the decoder keeps for its backward pass.

    A layer keeps about 10 hidden and 4 MLP vectors a token; with gradient checkpointing one hidden vector, and one
    layer at a time everything. Logits are there three times in float32: values, float32 copy, gradient.
    """
    precision = settings.model.precision
    size = 2 if precision == "bfloat16" or (precision == "auto" and device.startswith("cuda")) else 4
    every = sum(part.parameters for part in parameters.values())
    trained = sum(part.trained for part in parameters.values())
    weights = 4 * every + 12 * trained + (2 * every if size == 2 else 0)

    text = config.text_config
    positions = settings.train.batch_size * input_ids.shape[1]
    vision = settings.train.batch_size * (input_ids == config.image_token_id).sum(dim=1).float().mean().item()
    layers = [positions - vision * (1 - ratio) for ratio in retention]  # tokens each layer computes
    full = (10 * text.hidden_size + 4 * text.intermediate_size) * size
    if settings.model.gradient_checkpointing:
        activations = positions * text.hidden_size * size * len(layers) + max(layers) * full
    else:
        activations = sum(layers) * full
    return weights + activations + 3 * 4 * positions * text.vocab_size
