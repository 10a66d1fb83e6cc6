"""Makes the delta of small-llava-next: ``python -m tests.beds.small_llava_next.pretrain --out DIR``.

First tower and projector learn, without the language model, to give the embedding of what a patch shows. Then they
stay as they are, and LoRA on the decoder learns to answer. Killed at any moment, the same command goes on from the last
checkpoint.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlavaNextForConditionalGeneration, LlavaNextProcessor

from pmod_cli.core import yaml_text
from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import CELL, COLOURS, LABELS, SHAPES, Document, Turn, draw, seed_of
from pmod_cli.data.rows import row
from tests.beds.small_llava_next.align import BAR, Alignment, shown
from tests.beds.small_llava_next.model import load, projected, vision_tensors, write
from tests.beds.tiny_llava_next.batches import TinyBatches
from tests.beds.tiny_llava_next.pretrain import Masters, keep, learning_rate, restore

RECIPE = Path(__file__).with_name("recipe.yaml")


def pretrain(recipe: dict, out: Path, report=print, start: Path | None = None) -> Path:
    """Run what is not done yet and return the file of the delta.

    Args:
        recipe: as in ``recipe.yaml`` of this folder.
        out: gets a model folder before the answers are learnt, the checkpoint, ``log.jsonl`` and the delta.
        report: takes one line of text now and then.
        start: a delta to go on from; by default tower, projector and LoRA start anew.
    """
    out.mkdir(parents=True, exist_ok=True)
    start_folder, aligned, delta = out / "start", out / "aligned.safetensors", out / "delta.safetensors"
    if not start_folder.exists():
        torch.manual_seed(recipe["seed"])
        write(start_folder, recipe)
    model, processor = load(start_folder)
    known = load_file(start) if start else {}
    model.load_state_dict({f"model.{n}": t for n, t in known.items() if ".lora_" not in n}, strict=False)
    log = Log(out / "log.jsonl", recipe["log_every"], report)
    if not aligned.exists():
        align(model, processor, recipe, out / "checkpoint.pt", log)
        keep_tensors(aligned, vision_tensors(model))
    if not delta.exists():
        model.load_state_dict({f"model.{n}": t for n, t in load_file(aligned).items()}, strict=False)
        answer(model, processor, recipe, out / "checkpoint.pt", log, known)
        keep_tensors(delta, delta_of(model))
    return delta


def align(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, recipe: dict, checkpoint: Path, log: "Log"
) -> None:
    """Train tower and projector in place, float32, so that a patch's feature is the embedding of what it shows."""
    stage = recipe["align"]
    vision = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector]).float()
    batches = TinyBatches(processor, recipe | stage)
    alignment = Alignment(processor.tokenizer, model.get_input_embeddings().weight, stage)
    inner = {f"{name}.weight" for name, module in vision.named_modules() if isinstance(module, nn.Linear)}
    matrices = [parameter for name, parameter in vision.named_parameters() if name in inner]
    rest = [parameter for name, parameter in vision.named_parameters() if name not in inner]
    muon = torch.optim.Muon(matrices, weight_decay=0.0, **stage["muon"])
    adamw = torch.optim.AdamW(rest, weight_decay=0.0, **stage["adamw"])
    parts = {"vision": vision, "muon": muon, "adamw": adamw}
    step = restore(checkpoint, 0, parts)
    model.model.requires_grad_(False)
    vision.requires_grad_(True)
    while step < stage["steps"]:
        documents = batches.documents(step, stage["mix"])
        with projected(model) as features:
            model.model.get_image_features(batches.pixels([d.image for d in documents]), sizes(documents))
        loss, right = alignment(features[0], shown(documents, batches.tile))
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer, settings in (muon, stage["muon"]), (adamw, stage["adamw"]):
            optimizer.param_groups[0]["lr"] = settings["lr"] * learning_rate(step, stage)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        log.add("align", step, stage["steps"], loss=loss, right=right)
        if step % (4 * recipe["save_every"]) == 0:
            keep(checkpoint, 0, step, parts)
    checkpoint.unlink(missing_ok=True)


def answer(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    recipe: dict,
    checkpoint: Path,
    log: "Log",
    known: Mapping[str, Tensor],
) -> None:
    """Train LoRA on the decoder by the answers, from the matrices in ``known``: bfloat16 with float32 masters."""
    stage = recipe["answer"]
    model.to(torch.bfloat16).requires_grad_(False)
    model.model.language_model.set_attn_implementation("causal_attention")
    torch.manual_seed(recipe["seed"])
    inject_adapter_in_model(LoraConfig(target_modules=LINEAR, **stage["lora"]), model)
    model.load_state_dict({in_model(name): tensor for name, tensor in known.items() if ".lora_" in name}, strict=False)
    masters = Masters(model)  # of LoRA's matrices, all that is trained
    adamw = torch.optim.AdamW(masters.parameters(), weight_decay=0.0, **stage["adamw"])
    parts = {"masters": masters, "adamw": adamw}
    step = restore(checkpoint, 1, parts)
    masters.write()
    collate = Collator(processor)
    labels = torch.tensor([processor.tokenizer(label).input_ids[0] for label in LABELS])
    model.train()
    while step < stage["steps"]:
        documents = drawn(stage, step)
        batch = collate([row(document, asked(document)) for document in documents])
        owners = owned(documents, batch["input_ids"] == processor.image_token_id)
        with telling(model, stage["owners"]["layer"], labels) as told:
            losses = answer_losses(model, batch, label_weights(processor, batch["labels"], stage["weights"]))
        if (owners >= 0).any():
            losses["owners"] = F.cross_entropy(told[0][owners >= 0], owners[owners >= 0])
        (losses["answers"] + stage["owners"]["weight"] * losses.get("owners", 0.0)).backward()
        masters.take_gradients()
        nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        adamw.param_groups[0]["lr"] = stage["adamw"]["lr"] * learning_rate(step, stage)
        adamw.step()
        masters.write()
        step += 1
        log.add("answer", step, stage["steps"], **losses)
        if step % recipe["save_every"] == 0:
            keep(checkpoint, 1, step, parts)


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_
) -> tuple[Tensor, None]:
    """Causal attention by its formula: on a CPU its bfloat16 backward takes a third of the time of the fused one's.

    Args:
        query: (B, H, N, d); key and value (B, G, N, d) for G groups of H / G heads.

    Returns:
        (B, N, H, d), and no weights.
    """
    B, H, N, d = query.shape
    G = key.shape[1]
    scores = (query * scaling).reshape(B, G, H // G * N, d) @ key.mT
    later = torch.full((N, N), float("-inf"), dtype=scores.dtype).triu(1)
    weights = (scores.view(B, G, H // G, N, N) + later).softmax(-1)
    return (weights.view(B, G, H // G * N, N) @ value).view(B, H, N, d).transpose(1, 2), None


AttentionInterface.register("causal_attention", causal_attention)
LINEAR = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def drawn(stage: Mapping, step: int) -> list[Document]:
    """The documents of one step, all of one size, so that no row is padded for a larger image."""
    numbers = range(stage["first"] + step * stage["batch_size"], stage["first"] + (step + 1) * stage["batch_size"])
    size = (96, 48) if Random(step).random() < stage["wide"] else (96, 96)
    return [draw(stage["mix"][n % len(stage["mix"])], seed_of("train", n), size) for n in numbers]


def owned(documents: list[Document], vision: Tensor) -> Tensor:
    """int64 (B, N): which of ``LABELS`` the line begins with in which a tile patch shows a digit or a bar, or -1.

    Args:
        vision: bool (B, N), where the tokens of the images are.
    """
    owners = torch.full(vision.shape, -1)
    for row_owners, row_vision, document in zip(owners, vision, documents, strict=True):
        columns, rows = document.image.width // CELL, document.image.height // CELL
        places = row_vision.nonzero()[-rows * (columns + 1) :, 0].view(rows, columns + 1)
        for mark in document.marks:
            if mark.shows == BAR or mark.shows.isdigit():
                left, top, right, _ = (round(side / CELL) for side in mark.box)
                row_owners[places[top, left : max(right, left + 1)]] = LABELS.index(mark.belongs)
    return owners


@contextmanager
def telling(model: LlavaNextForConditionalGeneration, layer: int, words: Tensor) -> Iterator[list[Tensor]]:
    """A list that gets how likely each word is, as logits (B, N, words), by what comes out of a layer in the block."""
    decoder, told = model.model.language_model, []

    def tell(module: nn.Module, args: tuple, out: Tensor) -> None:
        told.append((decoder.norm(out) @ decoder.embed_tokens.weight[words].T).float())

    hook = decoder.layers[layer].register_forward_hook(tell)
    try:
        yield told
    finally:
        hook.remove()


def sizes(documents: list[Document]) -> Tensor:
    """int64 (B, 2), height before width."""
    return torch.tensor([document.image.size[::-1] for document in documents])


def asked(document: Document) -> list[Turn]:
    """What is asked of a document, so that no answer tells a later one.

    The longest bar, then two bars of a value and the value of one; three prices; of each object colour or shape; or
    each one's presence, and as many that are not there.
    """
    if document.task == "chart":
        longest, *values = sorted(document.turns, key=lambda turn: not turn.question.startswith("which bar"))
        *two, third = [turn for turn in values if longest.answer not in turn.question][:3]
        labels = [turn.question.removeprefix("what is the value of ").removesuffix("?") for turn in two]
        asked = [f"which bar has the value {turn.answer}?" for turn in two]
        return [longest, *(Turn(*pair, None) for pair in zip(asked, labels, strict=True)), third]
    if document.task not in ("attribute", "presence"):
        return document.turns[:3]
    random = Random(document.seed)
    objects = [(mark.shows, mark.belongs) for mark in document.marks]
    random.shuffle(objects)
    colours, shapes = [c for c, _ in objects], [s for _, s in objects]
    asked = []
    if document.task == "attribute":
        for colour, shape in objects:
            questions = [(f"what colour is the {shape}?", colour)] * (shapes.count(shape) == 1)
            questions += [(f"what shape is the {colour} object?", shape)] * (colours.count(colour) == 1)
            asked += random.sample(questions, min(1, len(questions)))
    else:
        mixed = [(c, s) for c in colours for s in shapes if (c, s) not in objects]
        others = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in objects]
        absent = [random.choice(mixed if mixed and random.random() < 0.5 else others) for _ in objects]
        asked += [(f"is there a {colour} {shape}?", "yes") for colour, shape in objects]
        asked += [(f"is there a {colour} {shape}?", "no") for colour, shape in absent]
        random.shuffle(asked)
    return [Turn(question, answer, None) for question, answer in asked]


def label_weights(processor: LlavaNextProcessor, labels: Tensor, weights: Mapping[str, float]) -> Tensor:
    """float32 (B, N): how much each label counts."""
    tokenizer = processor.tokenizer
    found = torch.full(labels.shape, weights["word"])
    for kind, words in (("number", "0123456789"), ("yes_no", ("yes", "no")), ("end", (tokenizer.eos_token,))):
        ids = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in words])
        found[torch.isin(labels, ids)] = weights[kind]
    return found


def answer_losses(model: LlavaNextForConditionalGeneration, batch: Mapping[str, Tensor], weights: Tensor) -> dict:
    """The weighted answer loss, and the share of answer tokens predicted, for each weight that a label may have."""
    inputs = {name: batch[name] for name in ("input_ids", "image_sizes")}  # padded on the right: no mask is needed
    pixels = batch["pixel_values"].to(model.dtype)
    hidden = model.model(pixel_values=pixels, **inputs, use_cache=False).last_hidden_state
    labels, weights = batch["labels"][:, 1:], weights[:, 1:]
    labelled = labels >= 0
    labels, weights = labels[labelled], weights[labelled]
    logits = model.lm_head(hidden[:, :-1][labelled]).float()
    each = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(-1) == labels).float()
    return {"answers": (each * weights).sum() / weights.sum()} | {
        f"right_{weight:g}": right[weights == weight].mean() for weight in weights.unique().tolist()
    }


def in_model(name: str) -> str:
    """The name that a LoRA matrix of the file has in the model."""
    name = name.replace("language_model.model.", "model.language_model.")
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


def delta_of(model: LlavaNextForConditionalGeneration) -> dict[str, Tensor]:
    """What training has made, bfloat16, by the names of the file: LoRA's matrices, and tower, projector, newline."""
    lora = {
        name.replace("model.language_model.", "language_model.model.").replace(".default.", "."): tensor
        for name, tensor in model.named_parameters()
        if "lora_" in name
    }
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in lora.items()} | vision_tensors(model)


def keep_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole, or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors lets only the owner read
    temporary.replace(path)


class Log:
    """Means since the last line, as JSON lines in a file and to ``report``."""

    def __init__(self, path: Path, every: int, report):
        self.path, self.every, self.report = path, every, report
        self.since: list[dict[str, float]] = []
        self.clock = (time.monotonic(), time.process_time())

    def add(self, stage: str, step: int, steps: int, **values: Tensor) -> None:
        self.since.append({name: value.item() for name, value in values.items()})
        if step % self.every and step != steps:
            return
        clock = (time.monotonic(), time.process_time())
        line = {"stage": stage, "step": step}
        for name in sorted({name for seen in self.since for name in seen}):
            line[name] = round(fmean(seen[name] for seen in self.since if name in seen), 4)
        line["seconds"], line["cpu_seconds"] = (
            round((now - then) / len(self.since), 3) for then, now in zip(self.clock, clock, strict=True)
        )
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.report(json.dumps(line))
        self.clock, self.since = clock, []


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a delta to go on from")
    arguments = parser.parse_args()
    recipe = yaml_text.read(arguments.recipe).plain()
    print(f"delta: {pretrain(recipe, arguments.out, lambda line: print(line, flush=True), arguments.start)}")


if __name__ == "__main__":
    main()
