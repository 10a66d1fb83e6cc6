"""Small p-MoD models and batches for the model tests, made from the stock ones of tests/factories.py."""

import torch
from PIL import Image
from torch import Tensor

from pmod_cli import model as package
from pmod_cli.families import FAMILIES
from tests import factories

ROUTED_FROM_START = {"schedule": "list", "values": [0.6, 1.0, 0.35, 0.15]}
"""Four layers, layer 0 among the routed ones."""


def pmod_twin(stock, pmod: dict, *, router_std: float = 0.0, seed: int = 0):
    """A p-MoD model with the weights of a stock one; routers are zero or random with a standard deviation."""
    family = FAMILIES[stock.config.model_type]
    given = stock.config.to_dict()
    settings = {key: value for key, value in given.items() if key not in ("model_type", "architectures", "dtype")}
    config = getattr(package, f"Pmod{family.classes}Config")(**settings, pmod=pmod)
    config._attn_implementation = stock.config._attn_implementation
    model = getattr(package, family.routed_class)(config).eval()
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(".router." in name for name in missing)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            assert not parameter.any(), "a router must start at zero"
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * router_std)
    return model.to(stock.dtype)


def pmod_model(
    kind="llava_next", decoder="llama", pmod=None, *, layers=4, router_std=1.0, attention="sdpa", seed=0, **text
):
    stock = factories.model(kind, decoder, layers=layers, seed=seed, **text)
    stock.config._attn_implementation = attention
    return pmod_twin(stock, ROUTED_FROM_START if pmod is None else pmod, router_std=router_std, seed=seed)


def image(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def batch(kind: str, rows: list[tuple[str, list[tuple[int, int]]]], side: str = "left") -> dict[str, Tensor]:
    """A padded batch: per row a text and the (width, height) of its images, whose tokens stand before the text."""
    processor = factories.processor(kind)
    processor.tokenizer.padding_side = side
    texts = ["USER: " + "<image>\n" * len(sizes) + text + " ASSISTANT:" for text, sizes in rows]
    images = [image(*size, seed=10 * row + i) for row, (_, sizes) in enumerate(rows) for i, size in enumerate(sizes)]
    inputs = processor(images=images or None, text=texts, padding=True, return_tensors="pt")
    return {key: value for key, value in inputs.items() if key != "image_num_patches"}


def single(inputs: dict[str, Tensor], row: int, images: list[int]) -> dict[str, Tensor]:
    """One row of a batch, without padding and with its own images."""
    real = inputs["attention_mask"][row].bool()
    alone = {key: inputs[key][row, real][None] for key in ("input_ids", "attention_mask")}
    for key in ("pixel_values", "image_sizes"):
        if key in inputs and images:
            alone[key] = inputs[key][images]
    return alone


ROWS = [
    ("what colour is the circle?", [(64, 64)]),
    ("is there a red square?", [(64, 32), (20, 50)]),
    ("yes", []),
    ("what is the value of a? it is large and it has more words.", [(30, 64)]),
]
"""Rows with one, two, no and one image, whose sizes give different numbers of vision tokens."""
IMAGES = [[0], [1, 2], [], [3]]
