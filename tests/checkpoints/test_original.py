"""The original layout: the logits of the Hugging Face twin, from every kind of file; tokenizer, processor, template."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from tests.checkpoints.originals import EXTRA, twins

STOCK = Options(to="stock")
PICTURE = Image.effect_mandelbrot((50, 60), (-2, -1.5, 1, 1.5), 30).convert("RGB")


def logits_of(model, inputs, vocabulary):
    with torch.no_grad():
        return model(**inputs).logits[..., :vocabulary]


def nearly(ours, theirs):
    return torch.allclose(ours, theirs, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("kind", "decoder", "options"),
    [
        ("llava", "llama", {}),
        ("llava", "llama", {"tower": "beside", "weights": "pickle", "dtype": torch.float16}),
        ("llava_next", "llama", {"weights": "sharded", "dtype": torch.bfloat16}),
        ("llava_next", "mistral", {"family": "mistral"}),
        ("llava_next", "llama", {"family": "llama3", "tower": "beside"}),
        ("llava_next", "qwen2", {"family": "chatml"}),
    ],
)
def test_logits_are_those_of_the_twin(kind, decoder, options, tmp_path):
    stock, vocabulary = twins(tmp_path / "original", kind, decoder, **options)
    report = convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    assert (report.layout, report.model_type, report.decoder) == ("original", kind, decoder)
    model, processor = load_model(tmp_path / "stock")
    assert model.config.image_token_id == vocabulary
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == vocabulary
    inputs = processor(images=PICTURE, text="USER: <image>\nwhat is this ASSISTANT:", return_tensors="pt")
    same = torch.equal if stock.dtype == torch.float32 else nearly  # lm_head of other rows: another half kernel
    assert same(logits_of(model, inputs, vocabulary), logits_of(stock, inputs, vocabulary))
    every = PmodSettings(schedule="list", values=(1.0, 1.0), max_ratio=1.5)
    convert(tmp_path / "original", tmp_path / "pmod", every)
    routed, _ = load_model(tmp_path / "pmod")
    assert same(logits_of(routed, inputs, vocabulary), logits_of(stock, inputs, vocabulary))


def test_a_new_token_is_never_the_likeliest(tmp_path):
    _, vocabulary = twins(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    head = load_file(tmp_path / "stock" / "model.safetensors")["language_model.lm_head.weight"]
    assert len(head) % 64 == 0
    torch.testing.assert_close(head[vocabulary:], head[:vocabulary].mean(0).expand(len(head) - vocabulary, -1))


@pytest.mark.parametrize("family", EXTRA)
def test_chat_template(family, tmp_path):
    decoder = "mistral" if family == "mistral" else "llama"
    twins(tmp_path / "original", "llava", decoder, family=family)
    convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    _, processor = load_model(tmp_path / "stock")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    said = processor.apply_chat_template(turn, add_generation_prompt=True)
    answered = processor.apply_chat_template([*turn, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}])
    ends = {
        "vicuna": (" USER: <image>\nwhat? ASSISTANT:", " USER: <image>\nwhat? ASSISTANT: x</s>"),
        "mistral": ("[INST] <image>\nwhat? [/INST]", "[INST] <image>\nwhat? [/INST] x</s>"),
        "llama3": (
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\nx<|eot_id|>",
        ),
        "chatml": ("<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n", "assistant\nx<|im_end|>\n"),
    }[family]
    assert said.endswith(ends[0])
    assert answered.endswith(ends[1])


def test_llava_15_images_are_padded_to_a_square(tmp_path):
    twins(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    processor = json.loads((tmp_path / "stock" / "processor_config.json").read_text())
    assert processor["image_processor"]["do_pad"] is True
    _, processor = load_model(tmp_path / "stock")
    wide = processor(images=Image.new("RGB", (64, 16), "white"), text="<image>", return_tensors="pt").pixel_values
    assert wide[0, 0, 0].mean() == pytest.approx(0, abs=0.02)  # the mean colour above the picture
    assert wide[0, 0, 16].mean() > 1


def test_grids_are_width_by_height(tmp_path):
    twins(tmp_path / "original", "llava_next")
    path = tmp_path / "original" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_grid_pinpoints": "[(96, 32), (32, 64)]"}))
    convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[32, 96], [64, 32]]  # (height, width)


def test_a_folder_without_the_tokenizer_that_was_asked_for(tmp_path):
    twins(tmp_path / "original")
    with pytest.raises(PmodError, match="there is no tokenizer in nowhere"):
        convert(tmp_path / "original", tmp_path / "stock", options=Options(to="stock", tokenizer=Path("nowhere")))


def test_it_is_not_loaded_as_it_is(tmp_path):
    twins(tmp_path / "original", weights="pickle")
    with pytest.raises(PmodError, match="has to be converted first"):
        load_model(tmp_path / "original")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    twins(tmp_path / "original", weights="pickle")
    torch.save({"model.norm.weight": Runs()}, tmp_path / "original" / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(PmodError, match="loading such a pickle can run any code"):
        convert(tmp_path / "original", tmp_path / "stock", options=STOCK)


def test_strided_and_old_pickles_are_read_whole(tmp_path):
    stock, _ = twins(tmp_path / "original", weights="pickle")
    for file in (tmp_path / "original").glob("*.bin"):
        weights = torch.load(file, weights_only=True)
        weights = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in weights.items()}
        torch.save(weights, file, _use_new_zipfile_serialization="00001" in file.name)
    convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    converted = load_file(tmp_path / "stock" / "model.safetensors")
    for name, tensor in stock.model.language_model.layers.state_dict().items():
        assert torch.equal(converted[f"language_model.model.layers.{name}"], tensor)


REFUSED = {
    "no projector of two layers": ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
    "image start tokens": ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
    "another merge": ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9'"),
    "tiles that are scaled down": ({"max_num_patches": 9}, "max_num_patches is 9"),
    "the tower's class token in tiles": (
        {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_select_feature": "cls_patch",
        },
        "a tile with a class token",
    ),
    "no tower": ({"mm_vision_tower": "nobody/nowhere"}, "the vision tower nobody/nowhere"),
    "tower is a number": ({"mm_vision_tower": 3}, "mm_vision_tower is 3"),
    "wrong width": ({"hidden_size": 64}, "has shape"),
    "no width": ({"hidden_size": "x"}, "hidden_size is 'x', expected a whole number above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_brought_over_is_refused(name, tmp_path):
    values, told = REFUSED[name]
    twins(tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(PmodError) as caught:
        convert(tmp_path / "original", tmp_path / "stock", options=STOCK)
    assert told in caught.value.what
    assert not (tmp_path / "stock").exists()
