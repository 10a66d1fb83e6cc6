"""Pre-trains the bundled tiny LLaVA-NeXT: ``python -m tests.beds.tiny_llava_next.pretrain --out DIR``.

It starts from random weights, on a GPU where there is one, and stages follow one another as the recipe says. Killed at
any moment, the same command goes on from the last checkpoint; steps, not clocks, decide, so a recipe and its seed give
the same model on the same machine.
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
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedModel, ProcessorMixin

from pmod_cli.core import yaml_text
from tests.beds.tiny_llava_next.batches import NEWLINE, TEXT, Batch, TinyBatches
from tests.beds.tiny_llava_next.grounding import LOSSES, Grounding
from tests.beds.tiny_llava_next.muon import StackedMuon
from tests.beds.tiny_llava_next.processor import build_processor
from tests.beds.tiny_llava_next.start import build_model

RECIPE = Path(__file__).with_name("recipe.yaml")


def pretrain(recipe: dict, out: Path, report=print) -> Path:
    """Run every stage of a recipe that is not done yet and return the folder of the last stage's model.

    Args:
        recipe: as in ``recipe.yaml`` of this folder.
        out: gets one model folder a stage, the running stage's checkpoint, and ``log.jsonl``.
        report: takes one line of text now and then.
    """
    return run_stages(recipe, out, report, build_processor(recipe["image"]), build_model, load, run_stage)


def run_stages(recipe: dict, out: Path, report, processor: ProcessorMixin, build, load, run_stage) -> Path:
    """The stages of any bed, those that are done left out: `build` makes its model, `load` reads that of a stage."""
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    previous, first_step = None, 0
    for number, stage in enumerate(recipe["stages"]):
        folder = out / f"stage-{number}"
        if not folder.exists():
            torch.manual_seed(recipe["seed"] + number)
            model = (build(recipe, processor) if previous is None else load(previous)).to(device)
            run_stage(model, processor, recipe, number, first_step, out, report)
            save(model.cpu(), processor, folder)
            (out / "checkpoint.pt").unlink(missing_ok=True)
        previous, first_step = folder, first_step + stage["steps"]
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
    device = model.device.type
    if device == "cpu":
        model.set_attn_implementation({"text_config": "eager"})  # the backward pass of SDPA is slow in bfloat16
    batches = TinyBatches(processor, recipe)
    grounding = Grounding(model, stage["grounding"]).to(device) if "grounding" in stage else None
    if device == "cuda":  # a CPU gains nothing by it
        for index, layer in enumerate(model.model.language_model.layers):
            if not grounding or index not in grounding.layers:  # hooks would be compiled along
                layer.compile()
    masters = Masters(model)
    optimizers = make_optimizers(masters, grounding, recipe)
    parts = {"model": masters, "muon": optimizers[0], "adamw": optimizers[1]} | (
        {"grounding": grounding} if grounding else {}
    )
    checkpoint = out / "checkpoint.pt"
    step = restore(checkpoint, number, parts)
    masters.write()
    model.train()
    started, since = time.monotonic(), step
    ahead = batches.steps(range(first_step + step, first_step + stage["steps"]), stage["mix"], recipe["workers"])
    for batch in ahead:
        rate = learning_rate(step, stage)
        losses = compute_losses(model, grounding, batch.to(device), stage, step)
        sum(losses[name] * weight for name, weight in loss_weights(stage, step).items()).backward()
        update(masters, optimizers, rate)
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
    model.float()
    masters.write()
    if grounding:
        grounding.detach()


class Masters(nn.Module):
    """The trained weights of a model in float32, while the model itself computes in bfloat16.

    The optimizer steps these: bfloat16 alone would lose small steps.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.of = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        inner = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        self.inner = [name for name in self.of if name in inner]  # the matrices inside the network
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): p.detach().float().clone() for name, p in self.of.items()}
        )
        model.to(torch.bfloat16)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.weights[name.replace(".", "/")]

    def take_gradients(self) -> None:
        """Move the gradients of the model to the weights here."""
        for name, parameter in self.of.items():
            if parameter.grad is not None:  # the tower's last layer is not used
                self[name].grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Copy the weights into the model, in its type."""
        torch._foreach_copy_(list(self.of.values()), [self[name] for name in self.of])


def compute_losses(
    model: LlavaNextForConditionalGeneration, grounding: Grounding | None, batch: Batch, stage: dict, step: int
) -> dict[str, Tensor]:
    """The weighted answer loss, ``right`` (share of answer tokens predicted, no gradient) and the grounding losses."""
    hidden = model.model.language_model(inputs_embeds=embeddings(model, batch), use_cache=False).last_hidden_state
    labels, weights = batch.labels[:, 1:], batch.weights[:, 1:]
    labelled = labels >= 0
    logits = model.lm_head(hidden[:, :-1][labelled]).float()
    each = F.cross_entropy(logits, labels[labelled], reduction="none")
    weights = weights[labelled]
    losses = {"answers": (each * weights).sum() / weights.sum()}
    if grounding and loss_weights(stage, step).get("looks"):
        losses |= grounding(batch)
    words = labels[labelled] != model.config.text_config.eos_token_id
    losses["right"] = (logits.argmax(-1) == labels[labelled])[words].float().mean()
    return losses


def embeddings(model: LlavaNextForConditionalGeneration, batch: Batch) -> Tensor:
    """What the decoder is given, (B, N, D). The stock model does the same image by image (tested)."""
    pixels = batch.inputs["pixel_values"].to(model.dtype)
    rows, views = pixels.shape[:2]
    seen = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
    patches = model.model.multi_modal_projector(seen[model.config.vision_feature_layer][:, 1:])
    newline = model.model.image_newline.expand(rows, 1, -1).to(patches)
    table = torch.cat([patches.unflatten(0, (rows, views)).flatten(1, 2), newline], dim=1)
    index = torch.where(batch.patches == NEWLINE, table.shape[1] - 1, batch.patches).clamp(min=0)
    vision = table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))
    text = model.get_input_embeddings()(batch.inputs["input_ids"])
    return torch.where((batch.patches == TEXT)[..., None], text, vision)


def loss_weights(stage: dict, step: int) -> dict[str, float]:
    """The weight of each loss at a step: grounding fades to nothing over the last ``fade`` share of its stage."""
    weights = {"answers": 1.0}
    if "grounding" in stage:
        left = (1 - step / stage["steps"]) / stage["grounding"]["fade"]
        weights |= {name: stage["grounding"][name] * min(1.0, left) for name in LOSSES if name in stage["grounding"]}
    return weights


def learning_rate(step: int, stage: dict) -> float:
    """Warm-up, then constant, then linear decay to ``end``, all relative to the stage's ``rate``."""
    warm = min(1.0, (step + 1) / stage["warmup"])
    left = (1 - step / stage["steps"]) / stage["decay"]
    return stage["rate"] * warm * (stage["end"] + (1 - stage["end"]) * min(1.0, left))


def make_optimizers(masters: Masters, grounding: nn.Module | None, recipe: dict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for embeddings, the output layer, norms and biases."""
    matrices = [masters[name] for name in masters.inner]
    rest = [masters[name] for name in masters.of if name not in masters.inner]
    muon = StackedMuon(
        [{"params": matrices, "base_lr": recipe["muon"]["lr"]}], momentum=recipe["muon"]["momentum"], weight_decay=0.0
    )
    groups = [{"params": rest, "base_lr": recipe["adamw"]["lr"]}]
    if grounding:
        groups.append({"params": list(grounding.parameters()), "base_lr": grounding.settings["rate"]})
    adamw = torch.optim.AdamW(groups, betas=recipe["adamw"]["betas"], weight_decay=0.0)
    return [muon, adamw]


def update(masters: Masters, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step on the gradients of the model, at a factor on each optimizer's rate."""
    masters.take_gradients()
    nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    masters.write()


def keep(path: Path, stage: int, step: int, parts: dict) -> None:
    """Write everything a restart needs: weights, optimizers, stage and step (which is also the place in the data)."""
    temporary = path.with_suffix(".tmp")
    torch.save({"stage": stage, "step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    os.replace(temporary, path)


def restore(path: Path, stage: int, parts: dict) -> int:
    """Load a checkpoint of this stage into ``parts`` and return its step; 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["stage"] != stage:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def load(folder: Path) -> LlavaNextForConditionalGeneration:
    """A stage's model, in float32."""
    return LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Write model (bfloat16) and processor as a stock checkpoint folder, under another name until it is whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    light = copy.deepcopy(model).to(torch.bfloat16)
    for config in (light.config.text_config, light.config.vision_config):
        config.dtype = torch.bfloat16
    light.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    os.replace(temporary, folder)


def main(pretrain=pretrain, recipe: Path = RECIPE, description: str = __doc__) -> None:
    """The command line of this module, and of another bed's."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=recipe)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    read = yaml_text.read(arguments.recipe).plain()
    print(f"trained model: {pretrain(read, arguments.out, lambda line: print(line, flush=True))}")


if __name__ == "__main__":
    main()
