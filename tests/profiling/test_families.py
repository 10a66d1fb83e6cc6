"""Counts of every family: formula and fvcore's trace against torch's own counter over a real forward."""

import json

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from pmod_cli import cli
from pmod_cli.checkpoints.aliases import ALIASES, builtin_config
from pmod_cli.core.errors import PmodError
from pmod_cli.families import FAMILIES
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling import Workload, prefill
from pmod_cli.profiling.count.formulas import parameters
from pmod_cli.profiling.count.trace import decoder_cost, meta_model, vision_cost
from pmod_cli.profiling.count.workload import Routed, Row, layer_tokens
from pmod_cli.profiling.measure.clock import shares_of_time
from pmod_cli.profiling.measure.phases import (
    DECODE,
    FIRST_TOKEN,
    PMOD,
    STOCK,
    ModelPair,
    PhaseBench,
    prompt,
    random_pair,
)
from pmod_cli.profiling.subject import load_subject, scaled
from tests import visual_processors
from tests.model import visual

NEW = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")


@pytest.mark.parametrize("kind", visual.KINDS)
def test_formula_trace_and_torch_count_the_same(kind):
    plain = visual.stock(kind)
    plain.set_attn_implementation("eager")  # torch counts no fused attention of a CPU
    for row in visual.rows_of(kind):
        inputs = visual.prompt(kind, plain.config, [row])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            plain(**inputs)
        pictures = tuple(tokens for _, tokens in visual.visuals(kind, plain.config, row))
        text = int((~torch.isin(inputs["input_ids"], torch.tensor([visual.IMAGE, visual.VIDEO]))).sum())
        rows, sizes = [Row(pictures, text)], Sizes.of(plain.config)
        formula = prefill(sizes, rows)
        assert formula.full == pytest.approx(counter.get_total_flops(), rel=1e-3)
        model = meta_model(plain.config)
        traced, seen = decoder_cost(model, rows, Routed.stock(4)), vision_cost(model, rows) if pictures else None
        assert traced.total == pytest.approx(formula.decoder, rel=1e-3)
        if seen is not None:
            assert (seen.tower, seen.projector) == pytest.approx((formula.tower, formula.projector), rel=1e-3)
            assert not seen.unknown_operators


@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if alias.kind in NEW])
def test_parameters_of_an_alias_are_those_of_the_model(name):
    config = builtin_config(name)
    assert sum(parameter.numel() for parameter in meta_model(config).parameters()) == ALIASES[name].parameters


@pytest.mark.parametrize(
    ("name", "workload", "vision", "text"),
    [
        # As the processors count them: (1288 / 28) * (952 / 28) cells, and for 1280 pixels at 32 a cell.
        ("qwen2.5-vl-7b", {"image_sizes": ((1280, 960),)}, 46 * 34, 58),
        ("qwen3-vl-8b", {"image_sizes": ((1280, 960),)}, 40 * 30, 58),
        ("qwen3-vl-8b", {"image_sizes": ((1280, 960),), "images": 4}, 4 * 40 * 30, 58),
        # 64 frames are 32 pairs, each behind `<0.5 seconds>` and between two marks.
        ("qwen2.5-vl-7b", {"videos": ((64, 480, 360),)}, 32 * 17 * 13, 58),
        ("qwen3-vl-8b", {"videos": ((64, 480, 360),)}, 32 * 15 * 11, 58 + 10 * 8 + 22 * 9),
        ("llava-next-video-7b", {"videos": ((8, 480, 360),)}, 8 * 144, 58),
        ("llava-onevision-7b", {"videos": ((8, 480, 360),)}, 8 * 196 + 1, 58),
        ("llava-onevision-7b", {"image_sizes": ((640, 480),), "images": 3}, 3 * 730, 58),
    ],
)
def test_tokens_of_a_prompt(name, workload, vision, text):
    (row,) = Workload(**workload).rows(Sizes.of(builtin_config(name)))
    assert (row.vision_tokens, row.text_tokens) == (vision, text)


def test_profile_of_a_video(capsys):
    words = ("profile", "--model", "qwen2.5-vl-3b", "--video", "64x480x360@2", "--image", "1280x960")
    assert cli.main(list(words)) == 0
    said = capsys.readouterr().out
    assert "a video of 64 frames of 480x360 pixels" in said
    assert "one image of 1288x952 pixels, " in said


def test_a_video_for_a_model_without_videos_is_refused():
    with pytest.raises(PmodError, match=r"LLaVA-1\.5 takes no videos"):
        Workload(videos=((4, 8, 8),)).rows(Sizes.of(builtin_config("llava-1.5-7b")))


def test_timestamps_of_a_video_count_as_text(capsys):
    words = ("profile", "--model", "qwen3-vl-2b", "--report", "kv", "--video", "8x480x360@2", "--json")
    assert cli.main(list(words)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["workload"]["text_tokens"] == 58 + 4 * 8
    assert report["workload"]["rows"][0]["vision_tokens"] == 4 * 15 * 11


@pytest.mark.parametrize(("frames", "per_second"), [(40, 0.5), (40, 1.9), (40, 2.0), (1, 2.0), (11, 1.05)])
def test_timestamps_have_as_many_digits_as_the_processor_writes(frames, per_second):
    """Of an odd number the last frame is both of its pair, and its time is its own."""
    times = visual_processors.processor("qwen3_vl")._calculate_timestamps([*range(frames)], per_second)
    around = 5  # "<", " seconds", ">" and the two marks around the frame
    workload = Workload(text_tokens=0, videos=((frames, 480, 360),), frames_per_second=per_second)
    (row,) = workload.rows(Sizes.of(builtin_config("qwen3-vl-2b")))
    assert row.text_tokens == sum(len(f"{time:.1f}") + around for time in times)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen3-vl-8b", "llava-onevision-0.5b", "llava-next-video-7b"])
def test_a_narrow_model_takes_the_prompt_that_is_counted(name):
    """`--hidden-size --layers --video` of each family: sizes that its model can have, and inputs that it accepts.

    Models refuse placeholders that are not as many as the features. Kept tokens fill the cache to what is counted.
    """
    width = {"qwen2.5-vl-3b": 512, "llava-onevision-0.5b": 448}.get(name, 256)
    subject = scaled(load_subject(name), hidden_size=width, layers=3)
    for config in (subject.stock, subject.pmod):  # as small where nothing depends on it
        config.image_token_id, config.video_token_id, config.text_config.vocab_size = 9, 10, 64
        for part, value in (
            ("depth", 2),
            ("num_hidden_layers", 2),
            ("fullatt_block_indexes", [1]),
            ("deepstack_visual_indexes", [0]),
        ):
            if hasattr(config.vision_config, part):
                setattr(config.vision_config, part, value)
    sizes = Sizes.of(subject.stock)
    rows = Workload(image_sizes=((64, 64),), videos=((4, 64, 64),)).rows(sizes)
    pair = random_pair(subject, device="cpu", dtype="float32", attention="sdpa")
    bench = PhaseBench(pair, prompt(subject.stock, rows, device="cpu", dtype=torch.float32), steps=1)
    assert int(bench.prompt.vision_mask.sum()) == rows[0].vision_tokens
    held = bench.filled_cache(PMOD).layers
    counted = [tokens for _, tokens in layer_tokens(rows, Routed.of(subject.pmod))]
    assert [layer.keys.shape[-2] for layer in held] == counted
    shares = shares_of_time(pair[STOCK], bench.call(FIRST_TOKEN, STOCK), "cpu")
    assert shares["vision tower"] > 0


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_rows_of_unlike_images_are_decoded(kind):
    """Of a padded batch, models whose positions have rows and columns are told those of the new token."""
    plain = visual.stock(kind)
    rows = Workload(image_sizes=((60, 60), (120, 60))).rows(Sizes.of(plain.config))
    assert rows[0].tokens != rows[1].tokens
    bench = PhaseBench(
        ModelPair(plain, visual.routed(plain)), prompt(plain.config, rows, device="cpu", dtype=torch.float32), steps=2
    )
    for name in (STOCK, PMOD):
        bench.call(FIRST_TOKEN, name)()
        for _ in range(2):
            bench.call(DECODE, name)()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qwen2_5_vl", {"fullatt_block_indexes": [1, 7, 15]}),
        ("qwen2_5_vl", {"fullatt_block_indexes": [7, 15]}),
        ("qwen2_5_vl", {"window_size": 10}),  # two cells of 4 pixels, and 2 pixels over
        ("qwen3_vl", {"deepstack_visual_indexes": [0, 8, 16]}),
        ("qwen3_vl", {"deepstack_visual_indexes": [8, 16]}),
    ],
)
def test_a_tower_is_counted_as_its_model_reads_it(kind, change):
    """A list that names more blocks than there are is what a shortened tower is left with: the model ignores them."""
    config = visual.stock_config(kind)
    vars(config.vision_config).update(change)
    config._attn_implementation = "eager"
    pixels = visual.prompt(kind, config, [visual.Row([(36, 28)])])
    (image,) = (tokens for _, tokens in visual.visuals(kind, config, visual.Row([(36, 28)])))
    model, sizes = getattr(transformers, FAMILIES[kind].stock_class)(config).eval(), Sizes.of(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    row = Row((image,), 5)
    seen, formula = vision_cost(meta_model(config), [row]), prefill(sizes, [row])
    assert seen.total == formula.tower + formula.projector == counter.get_total_flops()
    visual_weights = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert parameters(sizes).tower + parameters(sizes).projector == visual_weights  # unused mergers are there


def test_a_window_without_room_for_a_cell_is_refused():
    config = visual.stock_config("qwen2_5_vl")
    config.vision_config.window_size = 3
    with pytest.raises(PmodError, match="window_size is 3: expected 4 or more"):
        Sizes.of(config)
