"""Pre-trains the bundled tiny Qwen3-VL: ``python -m tests.beds.tiny_qwen3_vl.pretrain --out DIR``.

It starts from random weights and needs no GPU. Killed at any moment, the same command goes on from the last checkpoint;
steps, not clocks, decide, so a recipe and its seed give the same model on the same machine.
"""

import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from tests.beds.tiny_llava_next.batches import Batch
from tests.beds.tiny_llava_next.grounding import Grounding
from tests.beds.tiny_llava_next.pretrain import (
    Masters,
    keep,
    learning_rate,
    loss_weights,
    main,
    make_optimizers,
    restore,
    run_stages,
    update,
)
from tests.beds.tiny_qwen3_vl.batches import TinyBatches
from tests.beds.tiny_qwen3_vl.processor import build_processor
from tests.beds.tiny_qwen3_vl.start import build_model

RECIPE = Path(__file__).with_name("recipe.yaml")


def pretrain(recipe: dict, out: Path, report=print) -> Path:
    """Run every stage of a recipe that is not done yet and return the folder of the last stage's model.

    Args:
        recipe: as in ``recipe.yaml`` of this folder.
        out: gets one model folder a stage, the running stage's checkpoint, and ``log.jsonl``.
        report: takes one line of text now and then.
    """
    return run_stages(recipe, out, report, build_processor(recipe["image"]), build_model, load, run_stage)


def run_stage(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    recipe: dict,
    number: int,
    first_step: int,
    out: Path,
    report,
) -> None:
    """Train ``model`` in place through stage ``number``; documents are numbered on from ``first_step``."""
    stage = recipe["stages"][number]
    model.model.language_model.set_attn_implementation("causal_formula")
    batches = TinyBatches(processor, recipe)
    grounding = Grounding(model, stage["grounding"]).to(model.device) if "grounding" in stage else None
    masters = Masters(model)
    optimizers = make_optimizers(masters, grounding, recipe)
    parts = {"model": masters, "muon": optimizers[0], "adamw": optimizers[1]}
    parts |= {"grounding": grounding} if grounding else {}
    step = restore(out / "checkpoint.pt", number, parts)
    masters.write()
    model.train()
    seen, clock = defaultdict(list), (time.monotonic(), step)
    while step < stage["steps"]:
        rate = learning_rate(step, stage)
        rows = sum(group["rows"] for group in stage["groups"])
        for group in stage["groups"]:
            documents = batches.group(first_step + step, group)
            losses, right = compute_losses(model, grounding, batches(documents).to(model.device.type), stage, step)
            weights = loss_weights(stage, step)
            loss = sum(losses[name] * weights[name] for name in losses)
            (loss * group.get("weight", group["rows"] / rows)).backward()
            for name, value in losses.items():
                seen[f"loss of {name}"].append(value.item())
            for b, document in enumerate(documents):
                seen[document.task] += right[b]
        update(masters, optimizers, rate)
        step += 1
        if step % recipe["log_every"] == 0 or step == stage["steps"]:
            now = time.monotonic()
            line = {"stage": number, "step": step, "rate": round(rate, 4)}
            line |= {name: round(sum(values) / max(1, len(values)), 3) for name, values in seen.items()}
            line["seconds_per_step"] = round((now - clock[0]) / (step - clock[1]), 3)
            seen, clock = defaultdict(list), (now, step)
            report(json.dumps(line))
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % recipe["save_every"] == 0:
            keep(out / "checkpoint.pt", number, step, parts)
    model.float()
    masters.write()
    if grounding:
        grounding.detach()


def compute_losses(
    model: Qwen3VLForConditionalGeneration, grounding: Grounding | None, batch: Batch, stage: dict, step: int
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The weighted answer loss with the grounding losses; and for each row, whether each answer token was right."""
    hidden = decoded(model, batch)
    labels, weights = batch.labels[:, 1:], batch.weights[:, 1:]
    labelled = labels >= 0
    logits = model.lm_head(hidden[:, :-1][labelled]).float()
    each = F.cross_entropy(logits, labels[labelled], reduction="none")
    weights = weights[labelled]
    losses = {"answers": (each * weights).sum() / weights.sum()}
    if grounding and loss_weights(stage, step).get("looks"):
        losses |= grounding(batch)
    right = torch.zeros_like(labels, dtype=torch.float)
    right[labelled] = (logits.argmax(-1) == labels[labelled]).float()
    words = labelled & (labels != model.config.text_config.eos_token_id)
    return losses, [right[b][words[b]].tolist() for b in range(len(labels))]


def decoded(model: Qwen3VLForConditionalGeneration, batch: Batch) -> Tensor:
    """The last hidden states (B, N, D). The stock model does the same, picture by picture in the tower (tested)."""
    inputs = batch.inputs
    kind, films = ("video", "_videos") if "video_grid_thw" in inputs else ("image", "")
    features, deep = tower_features(model, inputs[f"pixel_values{films}"], inputs[f"{kind}_grid_thw"])
    seen = batch.patches >= 0
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings = embeddings.masked_scatter(seen[..., None], features)
    return model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=inputs["position_ids"],
        visual_pos_masks=seen,
        deepstack_visual_embeds=deep,
        use_cache=False,
    ).last_hidden_state


def tower_features(model: Qwen3VLForConditionalGeneration, pixels: Tensor, grids: Tensor) -> tuple[Tensor, list]:
    """Merged features (V, D) and DeepStack's, of pictures or frames of one size: all of them at once."""
    tower = model.model.visual
    hidden = tower.patch_embed(pixels)
    one = torch.tensor([[1, *grids[0, 1:].tolist()]], device=pixels.device)
    index, weight = get_vision_interpolation_indices_and_weights(
        one,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.spatial_merge_size,
    )
    places = (tower.pos_embed(index) * weight[:, :, None]).sum(1).to(hidden.dtype)
    cos, sin = tower.rotary_pos_emb(hidden, get_vision_position_ids(one, tower.spatial_merge_size))
    hidden = hidden.view(-1, len(places), hidden.shape[-1]) + places
    deep = []
    for number, block in enumerate(tower.blocks):
        attention = block.attn
        heads = (*hidden.shape[:2], 3, attention.num_heads, attention.head_dim)
        query, key, value = attention.qkv(block.norm1(hidden)).view(heads).unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = formula((query * attention.scaling).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None)
        hidden = hidden + attention.proj(mixed.flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if number in tower.deepstack_visual_indexes:
            merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)]
            deep.append(merger(hidden.flatten(0, 1)))
    return tower.merger(hidden.flatten(0, 1)), deep


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by its formula: on a CPU its bfloat16 backward takes a third of the time of the fused one's.

    Args:
        query: (B, H, N, d), scaled; key and value alike.
        mask: (N, N), added to the scores.

    Returns:
        (B, N, H, d).
    """
    B, H, N, d = query.shape
    query, key, value = (tensor.reshape(B * H, N, d) for tensor in (query, key, value))
    scores = query @ key.mT if mask is None else torch.baddbmm(mask, query, key.mT)
    return (scores.softmax(-1) @ value).view(B, H, N, d).transpose(1, 2)


def causal_formula(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_
) -> tuple[Tensor, None]:
    """The same for a decoder without padding on the left."""
    N = query.shape[2]
    later = torch.full((N, N), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    return formula(query * scaling, key, value, later), None


AttentionInterface.register("causal_formula", causal_formula)


def load(folder: Path) -> Qwen3VLForConditionalGeneration:
    """A stage's model, in float32."""
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main(pretrain, RECIPE, __doc__)
