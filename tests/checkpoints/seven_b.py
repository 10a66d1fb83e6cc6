"""A checkpoint of the shape of a 7B LLaVA: 14 GB of random bfloat16, in the Hugging Face or the original layout.

python -m tests.checkpoints.seven_b FOLDER [--original]
"""

import json
import sys
from pathlib import Path

import numpy as np

from pmod_cli.checkpoints.aliases import ALIASES, builtin_config
from pmod_cli.checkpoints.files import encode_header
from pmod_cli.checkpoints.layouts.shapes import expected_shapes, to_original
from pmod_cli.families.towers import CLIP_L_336

SHARD = 5 * 10**9  # bytes
TEXT = ALIASES["llava-1.5-7b"].text | {"model_type": "llama"}


def write(folder: Path, *, original: bool) -> Path:
    """Write config, shards of at most 5 GB and index; returns the folder."""
    folder.mkdir(parents=True)
    text = TEXT | ({"vocab_size": 32000} if original else {})
    vision = {"model_type": "clip_vision_model", **CLIP_L_336}
    config = {"model_type": ALIASES["llava-1.5-7b"].kind, "text_config": text, "vision_config": vision}
    config |= {"image_token_index": 31999 if original else 32000, "dtype": "bfloat16"}
    shapes = expected_shapes(config, "7B")
    if original:
        shapes = {to_original(name, []): shape for name, shape in shapes.items()}
        config = text | {
            "model_type": "llava_llama",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_projector_type": "mlp2x_gelu",
            "image_aspect_ratio": "pad",
            "unfreeze_mm_vision_tower": True,
        }
    (folder / "config.json").write_text(json.dumps(config))
    shards = _shards(shapes)
    noise = np.random.default_rng(0).integers(0x3C00, 0x3D00, 16 * 2**20, dtype=np.uint16).tobytes()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(encode_header({name: ("BF16", shape) for name, shape in shard.items()}))
            for shape in shard.values():
                left = 2 * int(np.prod(shape))
                while left:
                    left -= out.write(noise[: min(left, len(noise))])
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_sparse(folder: Path, alias: str) -> Path:
    """The same of any alias in the Hugging Face layout, all weights zero: files with holes, which take no disk."""
    folder.mkdir(parents=True)
    config = builtin_config(alias).to_dict() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shards, weight_map = _shards(expected_shapes(config, "7B")), {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = encode_header({name: ("BF16", shape) for name, shape in shard.items()})
        with open(folder / file, "wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(2 * int(np.prod(shape)) for shape in shard.values()))
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) + 2 * int(np.prod(shape)) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    return shards


if __name__ == "__main__":
    write(Path(sys.argv[1]), original="--original" in sys.argv)
