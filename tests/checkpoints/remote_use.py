"""What other programs do with a remote-code folder. Run as a process of its own, in which pmod cannot be imported.

    python -I tests/checkpoints/remote_use.py compile|compile-stock|bnb-int8|bnb-nf4|ao-int8|ao-int4 FOLDER

Prints one JSON object.
"""

import json
import sys
from typing import Any

REFUSED = "pmod is not installed on this machine"


class NoPmod:
    """Stands before all other finders."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pmod_cli":
            raise ImportError(REFUSED)


sys.meta_path.insert(0, NoPmod())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

MODEL = {"trust_remote_code": True}
QUESTIONS = ["what is this", "what is the price of ham and of tea?", "yes"]
SIZES = [(64, 64), (20, 50), (64, 32)]


def prompts(folder: str) -> list[dict[str, Any]]:
    """Prompts of unequal numbers of vision tokens and words."""
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    found = []
    for size, question in zip(SIZES, QUESTIONS, strict=True):
        text = f"USER: <image>\n{question} ASSISTANT:"
        inputs = processor(images=picture.resize(size), text=text, return_tensors="pt")
        found.append({name: value for name, value in inputs.items() if name != "image_num_patches"})
    return found


@torch.no_grad()
def compiled(folder: str, *, pixels: bool) -> dict[str, Any]:
    """The whole forward in one graph: with `pixels` from these, else from merged features."""
    model = AutoModelForImageTextToText.from_pretrained(folder, **MODEL).eval()
    counter, differences = CompileCounter(), []
    forward = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=True)
    for inputs in prompts(folder):
        expected = model(**inputs).logits
        if not pixels:
            inputs = merged(model, inputs)
        try:
            differences.append((forward(**inputs).logits - expected).abs().max().item())
        except torch._dynamo.exc.Unsupported as error:
            return {"broken": str(error)}
    layers = len(model.model.language_model.layers)
    return {"graphs": counter.frame_count, "differences": differences, "layers": layers}


def merged(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompt with the features of its pictures in their places."""
    ids = inputs["input_ids"]
    vision = ids == model.config.image_token_id
    features = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
    embeds = model.get_input_embeddings()(ids).masked_scatter(vision[..., None], torch.cat(list(features)))
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "vision_mask": vision}


def quantisation(name: str) -> Any:
    """What `from_pretrained` takes as `quantization_config`."""
    if name.startswith("bnb"):
        from transformers import BitsAndBytesConfig

        if name == "bnb-int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        wide = {
            "llm_int8_skip_modules": ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
        }  # not a multiple of 64
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        return BitsAndBytesConfig(**four, **wide)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if name == "ao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))


@torch.no_grad()
def quantised(folder: str, name: str) -> dict[str, Any]:
    """Logits beside those of the weights that the quantised ones stand for, in the unquantised model."""
    plain = AutoModelForImageTextToText.from_pretrained(folder, **MODEL).eval()
    options = {"quantization_config": quantisation(name), "device_map": "cpu", "dtype": torch.float32}
    model = AutoModelForImageTextToText.from_pretrained(folder, **MODEL, **options).eval()
    before, changed, same_routers = dict(plain.named_modules()), 0, []
    for path, module in model.named_modules():
        if path.endswith(".router"):
            own = [type(module.weight) is torch.nn.Parameter, torch.equal(module.weight, before[path].weight)]
            same_routers.append(all(own))
        elif (weight := stands_for(module)) is not None:
            changed += 1
            before[path].weight.copy_(weight)
    found, words = [], []
    for inputs in prompts(folder):
        ours, theirs = model(**inputs).logits.float(), plain(**inputs).logits
        found.append(((ours - theirs).norm() / theirs.norm()).item())
        words.append(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:].tolist())
    layers = model.model.language_model.layers
    kept = [bool(layer.router) for layer in layers]
    return {"errors": found, "words": words, "changed": changed, "routers": same_routers, "routed": sum(kept)}


def stands_for(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight `(out, in)` that a quantised linear layer multiplies by; None of any other module."""
    weight = getattr(module, "weight", None)
    if weight is None or not isinstance(module, torch.nn.Linear) or type(weight) is torch.nn.Parameter:
        return None
    if type(weight).__name__ == "Int8Params":
        return weight.data.float() * weight.SCB.unsqueeze(1) / 127
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


if __name__ == "__main__":
    task, of = sys.argv[1:]
    answer = compiled(of, pixels=task == "compile") if task.startswith("compile") else quantised(of, task)
    assert not any(name.startswith("pmod_cli") for name in sys.modules)
    print(json.dumps(answer))
