"""Pre-trains the bundled tiny LLaVA-NeXT from a random start: ``python -m tests.beds.tiny_llava_next.pretrain``.

Stages follow one another as the recipe says. The first trains a shallow model with grounding losses; a deeper stage
grows the model it is given by new blocks between the trained ones, whose outputs start at zero, so that nothing is
forgotten. Killed at any moment, the same command goes on from the last checkpoint; steps, not clocks, decide, so a
recipe and its seed give the same model on the same machine.
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from pmod_cli.core import yaml_text
from tests.beds.tiny_llava_next.batches import Batch, TinyBatches
from tests.beds.tiny_llava_next.grounding import Grounding
from tests.beds.tiny_llava_next.model import build_model, build_processor, start_layer

RECIPE = Path(__file__).with_name("recipe.yaml")


def pretrain(recipe: dict, out: Path, report=print) -> Path:
    """Run every stage of a recipe that is not done yet and return the folder of the last stage's model.

    Args:
        recipe: as in ``recipe.yaml`` of this folder.
        out: gets one model folder a stage, the running stage's checkpoint, and ``log.jsonl``.
        report: takes one line of text now and then.
    """
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor(recipe["image"])
    previous = None
    first_step = 0
    for number, stage in enumerate(recipe["stages"]):
        folder = out / f"stage-{number}"
        if not folder.exists():
            torch.manual_seed(recipe["seed"] + number)
            model = build_model(recipe, processor, stage["layers"]) if previous is None else load(previous)
            model = grow(model, stage["layers"])
            run_stage(model, processor, recipe, number, first_step, out, report)
            save(model, processor, folder)
            (out / "checkpoint.pt").unlink(missing_ok=True)
        previous = folder
        first_step += stage["steps"]
    return previous


def run_stage(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    recipe: dict,
    number: int,
    first_step: int,
    out: Path,
    report,
) -> None:
    """Train ``model`` in place through stage ``number``; batches are numbered on from ``first_step``."""
    stage = recipe["stages"][number]
    batches = TinyBatches(processor, recipe)
    grounding = Grounding(model, stage["grounding"]) if "grounding" in stage else None
    optimizers = make_optimizers(model, grounding, recipe)
    parts = {"model": model, "muon": optimizers[0], "adamw": optimizers[1]} | (
        {"grounding": grounding} if grounding else {}
    )
    checkpoint = out / "checkpoint.pt"
    step = restore(checkpoint, number, parts)
    model.train()
    started, since = time.monotonic(), step
    while step < stage["steps"]:
        rate = learning_rate(step, stage)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
        batch = batches(batches.documents(first_step + step, stage["mix"]))
        losses = compute_losses(model, grounding, batch, stage, step)
        sum(losses[name] * weight for name, weight in loss_weights(stage, step).items()).backward()
        nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % recipe["log_every"] == 0 or step == stage["steps"]:
            line = {"stage": number, "step": step, "rate": round(rate, 4)}
            line |= {name: round(value.item(), 4) for name, value in losses.items()}
            line["seconds_per_step"] = round((time.monotonic() - started) / (step - since), 3)
            report(json.dumps(line))
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % recipe["save_every"] == 0:
            keep(checkpoint, number, step, parts)
    if grounding:
        grounding.detach()


def compute_losses(
    model: LlavaNextForConditionalGeneration, grounding: Grounding | None, batch: Batch, stage: dict, step: int
) -> dict[str, Tensor]:
    """The weighted answer loss, ``right`` (share of answer tokens predicted, no gradient) and the grounding losses."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    labels, weights = batch.labels[:, 1:], batch.weights[:, 1:]
    labelled = labels >= 0
    logits = model.lm_head(hidden[:, :-1][labelled])
    each = F.cross_entropy(logits, labels[labelled], reduction="none")
    weights = weights[labelled]
    losses = {"answers": (each * weights).sum() / weights.sum()}
    if grounding and loss_weights(stage, step).get("looks"):
        losses |= grounding(batch)
    words = labels[labelled] != model.config.text_config.eos_token_id
    losses["right"] = (logits.argmax(-1) == labels[labelled])[words].float().mean()
    return losses


def loss_weights(stage: dict, step: int) -> dict[str, float]:
    """The weight of each loss at a step: grounding fades to nothing over the last ``fade`` share of its stage."""
    weights = {"answers": 1.0}
    if "grounding" in stage:
        left = (1 - step / stage["steps"]) / stage["grounding"]["fade"]
        weights |= {name: stage["grounding"][name] * min(1.0, left) for name in ("shows", "belongs", "looks")}
    return weights


def learning_rate(step: int, stage: dict) -> float:
    """Warm-up, then constant, then linear decay to ``end``, all relative to the stage's ``rate``."""
    warm = min(1.0, (step + 1) / stage["warmup"])
    left = (1 - step / stage["steps"]) / stage["decay"]
    return stage["rate"] * warm * (stage["end"] + (1 - stage["end"]) * min(1.0, left))


def make_optimizers(model: nn.Module, grounding: nn.Module | None, recipe: dict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for embeddings, the output layer, norms and biases."""
    inner = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    matrices = [p for name, p in model.named_parameters() if name in inner]
    rest = [p for name, p in model.named_parameters() if name not in inner]
    rest += list(grounding.parameters()) if grounding else []
    muon = torch.optim.Muon(
        [{"params": matrices, "base_lr": recipe["muon"]["lr"]}], momentum=recipe["muon"]["momentum"], weight_decay=0.0
    )
    adamw = torch.optim.AdamW(
        [{"params": rest, "base_lr": recipe["adamw"]["lr"]}], betas=recipe["adamw"]["betas"], weight_decay=0.0
    )
    return [muon, adamw]


def grow(model: LlavaNextForConditionalGeneration, num_layers: int) -> LlavaNextForConditionalGeneration:
    """Deepen the decoder to a multiple of its layers: after each trained block, new ones that add exactly nothing yet.

    Raises:
        ValueError: ``num_layers`` is no multiple of the layers there are.
    """
    decoder = model.model.language_model
    old = list(decoder.layers)
    if num_layers % len(old):
        raise ValueError(f"cannot grow {len(old)} layers evenly to {num_layers}: expected a multiple")
    layers = []
    for block in old:
        layers.append(block)
        for _ in range(num_layers // len(old) - 1):
            new = copy.deepcopy(block)
            start_layer(new, num_layers)
            nn.init.zeros_(new.self_attn.o_proj.weight)
            nn.init.zeros_(new.mlp.down_proj.weight)
            layers.append(new)
    for index, block in enumerate(layers):
        block.self_attn.layer_idx = index
    decoder.layers = nn.ModuleList(layers)
    for config in (model.config.text_config, decoder.config):
        config.num_hidden_layers = num_layers
    return model


def keep(path: Path, stage: int, step: int, parts: dict) -> None:
    """Write everything a restart needs: weights, optimizers, stage and step (which is also the place in the data)."""
    temporary = path.with_suffix(".tmp")
    torch.save({"stage": stage, "step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    os.replace(temporary, path)


def restore(path: Path, stage: int, parts: dict) -> int:
    """Load a checkpoint of this stage into ``parts`` and return its step; 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["stage"] != stage:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def load(folder: Path) -> LlavaNextForConditionalGeneration:
    """A stage's model, in float32."""
    return LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def save(model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, folder: Path) -> None:
    """Write model (bfloat16) and processor as a stock checkpoint folder, under another name until it is whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    light = copy.deepcopy(model).to(torch.bfloat16)
    for config in (light.config.text_config, light.config.vision_config):
        config.dtype = torch.bfloat16
    light.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    os.replace(temporary, folder)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = pretrain(yaml_text.read(arguments.recipe).plain(), arguments.out)
    print(f"trained model: {folder}")


if __name__ == "__main__":
    main()
