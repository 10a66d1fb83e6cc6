"""Tiny models of every family, stock and p-MoD, and prompts with images and videos, made of the families' records.

Pixels are random and token ids are drawn: no processor is needed. That stock models accept the prompts holds the
records to them: they refuse placeholders that are not as many as the features.
"""

from dataclasses import dataclass, field, replace
from inspect import signature

import torch
import transformers
from torch import Tensor

from pmod_cli import model as pmod_model
from pmod_cli.families import DECODERS, FAMILIES, ImageTokens
from pmod_cli.families.sizes import Sizes, image_tokens
from tests import factories
from tests.model.models import ROUTED_FROM_START, pmod_twin

IMAGE, VIDEO, WORDS = 9, 10, 20  # ids: of the placeholders, and from which on ids are words
KINDS = tuple(FAMILIES)
VIDEO_KINDS = tuple(name for name in FAMILIES if FAMILIES[name].video_tokens)


def stock_config(kind: str, layers: int = 4, **more):
    """A stock configuration, or with `pmod=` ours: decoder of width 32, tower of 8-pixel tiles of 2-pixel patches."""
    family = FAMILIES[kind]
    decoder = next(
        (each for each in DECODERS.values() if each.family == kind),
        DECODERS[family.defaults["text_config"]["model_type"]],
    )
    small, wide = dict(family.small_config), {"hidden_size": 32, "intermediate_size": 64}
    text = wide | {
        "model_type": decoder.name,
        "vocab_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 2}
    own = small.pop("vision_config", {"model_type": "clip_vision_model", "projection_dim": 16})
    if family.tiled:
        vision |= {"image_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
        small = {"image_token_index": IMAGE, "image_seq_length": 16, **small}
    else:
        own = own | {"out_hidden_size": 32}
    name = f"Pmod{family.classes}Config" if "pmod" in more else f"{family.classes}Config"
    home = pmod_model if "pmod" in more else transformers
    return getattr(home, name)(
        text_config=text | small.pop("text_config", {}),
        vision_config=vision | own,
        **{"tie_word_embeddings": False} | small | more,
    )


def stock(kind: str, *, seed: int = 0, attention: str = "sdpa", **more):
    """A stock model in eval mode, float32, whose weights are large enough that every layer changes the logits."""
    config = stock_config(kind, **more)
    config._attn_implementation = attention
    model = getattr(transformers, FAMILIES[kind].stock_class)(config).eval()
    factories.fill(model, seed)
    return model


def routed(plain, pmod: dict | None = None, *, router_std: float = 1.0, seed: int = 0):
    """A p-MoD model with the weights of a stock one; routers are random, or zero with `router_std=0`."""
    return pmod_twin(plain, pmod or ROUTED_FROM_START, router_std=router_std, seed=seed)


@dataclass
class Row:
    """One row: the sizes of its images, `(height, width)`, and videos, `(frames, height, width)`, between words."""

    images: list[tuple[int, int]] = field(default_factory=list)
    videos: list[tuple[int, int, int]] = field(default_factory=list)
    words: int = 5


def rows_of(kind: str) -> list[Row]:
    """One image, two of unlike sizes, text alone; where it has videos, one, and one beside an image."""
    side = 8 if FAMILIES[kind].tiled else 16
    rows = [Row([(side, side)]), Row([(side, 2 * side), (side, side)], words=9), Row(words=7)]
    if FAMILIES[kind].video_tokens:
        rows += [Row(videos=[(4, side, side)]), Row([(side, 2 * side)], [(4, side, side)], words=3)]
    return rows


def visuals(kind: str, config, row: Row) -> list[tuple[int, ImageTokens]]:
    """Placeholder id and tokens of each image, then of each video."""
    family, sizes = FAMILIES[kind], Sizes.of(config)
    if not family.tiled:  # the sizes of a test are whole cells already, far below what a processor would leave
        tower = replace(sizes.tower, pixels=(1, 10**9), clip=(1, 10**9))
        sizes = replace(sizes, tower=tower)
    found = [(IMAGE, image_tokens(sizes, (width, height))) for height, width in row.images]
    return found + [(VIDEO, family.video_tokens(sizes, (t, width, height))) for t, height, width in row.videos]


def prompt(kind: str, config, rows: list[Row], side: str = "left", dtype=torch.float32) -> dict[str, Tensor]:
    """Inputs of a padded batch, with the pixels of all its images and videos."""
    family, generator = FAMILIES[kind], torch.Generator().manual_seed(3)
    sequences = []
    for row in rows:
        ids = [1]
        for token, tokens in visuals(kind, config, row):
            parts = tokens.frames if family.frames_apart else 1
            for _ in range(parts):
                ids += [WORDS, *[token] * (tokens.tokens // parts), WORDS + 1]
        words = torch.randint(WORDS, 60, (row.words,), generator=generator).tolist()
        sequences.append(ids + words)
    longest = max(map(len, sequences))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[index, place], mask[index, place] = torch.tensor(sequence), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    takes = signature(getattr(transformers, family.stock_class).forward).parameters
    if "mm_token_type_ids" in takes:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for name, key, given in (
        ("pixel_values", "images", family.pixel_inputs),
        ("pixel_values_videos", "videos", family.video_inputs),
    ):
        pieces, others = [], {}
        for index, row in enumerate(rows):
            for number, size in enumerate(getattr(row, key)):
                shape, more = given(config, [size])
                noise = torch.Generator().manual_seed(100 * index + 10 * number + (key == "videos"))
                pieces.append(torch.randn(shape, generator=noise, dtype=torch.float64))
                for other, value in more.items():
                    others.setdefault(other, []).extend(value)
        if pieces:
            most = max(piece.shape[1] for piece in pieces)
            if pieces[0].ndim == 5:  # tiles, fewer of some images
                pieces = [torch.cat([p, p.new_zeros(1, most - p.shape[1], *p.shape[2:])], dim=1) for p in pieces]
            inputs[name] = torch.cat(pieces).to(dtype)
            inputs |= {other: torch.tensor(value) for other, value in others.items()}
    return inputs


def alone(kind: str, config, rows: list[Row], index: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row of a batch without padding, with its own pixels."""
    real = inputs["attention_mask"][index].bool()
    single = {
        key: inputs[key][index, real][None]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
        if key in inputs
    }
    family = FAMILIES[kind]
    for name, key, given in (
        ("pixel_values", "images", family.pixel_inputs),
        ("pixel_values_videos", "videos", family.video_inputs),
    ):
        before = sum(len(getattr(row, key)) for row in rows[:index])
        sizes = getattr(rows[index], key)
        if not sizes:
            continue
        others = {other for size in sizes for other in given(config, [size])[1]}
        single |= {other: inputs[other][before : before + len(sizes)] for other in others}
        pixels = inputs[name]
        if pixels.ndim == 2:  # patches of all pictures, one after another
            lengths = [given(config, [size])[0][0] for row in rows for size in getattr(row, key)]
            start = sum(lengths[:before])
            single[name] = pixels[start : start + sum(lengths[before : before + len(sizes)])]
        else:
            single[name] = pixels[before : before + len(sizes)]
    return single
