"""LoRA adapters: merged as peft merges them, under peft's names and the original code's; kept apart; refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pmod_cli.checkpoints import Options, convert, load_model, router_state
from pmod_cli.core.errors import PmodError
from tests.checkpoints.originals import twins

STOCK = Options(to="stock")


@pytest.fixture(scope="module")
def adapter(stock_model, tmp_path_factory):
    """An adapter with random updates and a trained projector, and the model that peft merges it into."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForImageTextToText.from_pretrained(stock_model())
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r".*language_model.*\.(q_proj|down_proj)",
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 3},
        modules_to_save=["linear_1"],
    )
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    tuned.save_pretrained(folder)
    return folder, tuned.merge_and_unload().state_dict()


def test_merged_as_peft_merges(adapter, stock_model, tmp_path):
    folder, expected = adapter
    report = convert(stock_model(), tmp_path / "merged", options=Options(adapter=folder, verify=True))
    assert report.streamed
    model, _ = load_model(tmp_path / "merged")
    found = model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    plain = load_file(stock_model() / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[f"model.{name.replace('.model.', '.', 1)}"], plain[name])


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {
            "target_modules": r".*language_model.*\.q_proj",
            "alpha_pattern": {"^model.language_model.layers.1.self_attn.q_proj": 12, "layers.2.*|layers.3.*": 3},
        },
    ],
    ids=["head", "patterns"],
)
def test_what_an_update_may_be_called(values, stock_model, tmp_path):
    tuned = get_peft_model(AutoModelForImageTextToText.from_pretrained(stock_model()), LoraConfig(r=2, **values))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = tuned.merge_and_unload().state_dict()
    convert(stock_model(), tmp_path / "merged", options=Options(adapter=tmp_path / "adapter"))
    found = load_model(tmp_path / "merged")[0].state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in expected.items())


def test_merged_on_top_of_a_p_mod_checkpoint(adapter, stock_model, tmp_path):
    folder, expected = adapter
    convert(stock_model(), tmp_path / "pmod")
    convert(tmp_path / "pmod", tmp_path / "merged", options=Options(adapter=folder))
    found = load_model(tmp_path / "merged")[0].state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_routers_that_an_adapter_has_trained_are_called_trained(adapter, stock_model, tmp_path):
    """Else `finetune` would fit new ones in their place, and every command would warn."""
    convert(stock_model(), tmp_path / "pmod")
    model, _ = load_model(tmp_path / "pmod")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"]))
    tuned.save_pretrained(tmp_path / "routers")
    convert(tmp_path / "pmod", tmp_path / "merged", options=Options(adapter=tmp_path / "routers"))
    assert router_state(tmp_path / "merged") == "trained"
    convert(tmp_path / "pmod", tmp_path / "others", options=Options(adapter=adapter[0]))
    assert router_state(tmp_path / "others") == "untrained"


def test_kept_apart(adapter, stock_model, tmp_path):
    folder, expected = adapter
    report = convert(stock_model(), tmp_path / "pmod", options=Options(adapter=folder, merge=False))
    assert report.linked
    assert any("no command of pmod applies it" in note for note in report.notes)
    exported = convert(tmp_path / "pmod", tmp_path / "exported", options=STOCK)
    assert any(f"--adapter {tmp_path / 'pmod' / 'adapter'}" in note for note in exported.notes)
    model, _ = load_model(tmp_path / "pmod")
    merged = PeftModel.from_pretrained(model, tmp_path / "pmod" / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_an_adapter_of_the_original_code(tmp_path):
    stock, vocabulary = twins(tmp_path / "original")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    up, down, trained = torch.randn(64, 2), torch.randn(2, 32), torch.randn(32)
    module = "base_model.model.model.layers.1.mlp.up_proj"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    tokens = torch.randn(vocabulary, 32)
    full = {"model.mm_projector.2.bias": trained, "model.embed_tokens.weight": tokens}
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in full.items()}, adapter / "non_lora_trainables.bin"
    )
    convert(tmp_path / "original", tmp_path / "stock", options=Options(to="stock", adapter=adapter))
    found = load_file(tmp_path / "stock" / "model.safetensors")
    weight = stock.model.language_model.layers[1].mlp.up_proj.weight + 2 * up @ down
    torch.testing.assert_close(found["language_model.model.layers.1.mlp.up_proj.weight"], weight.detach())
    assert torch.equal(found["multi_modal_projector.linear_2.bias"], trained)
    embedding = found["language_model.model.embed_tokens.weight"]
    assert torch.equal(embedding[:vocabulary], tokens)
    assert len(embedding) == json.loads((tmp_path / "stock" / "config.json").read_text())["text_config"]["vocab_size"]
    with pytest.raises(PmodError, match="it can only be merged"):
        convert(tmp_path / "original", tmp_path / "apart", options=Options(adapter=adapter, merge=False))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is true"),
        ({"r": 8}, "r is 8, and"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is set"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(values, told, adapter, stock_model, tmp_path):
    damaged = tmp_path / "adapter"
    damaged.mkdir()
    for path in adapter[0].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    config = json.loads((damaged / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps(config | values))
    with pytest.raises(PmodError) as caught:
        convert(stock_model(), tmp_path / "merged", options=Options(adapter=damaged))
    assert told in caught.value.what
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(adapter, stock_model, tmp_path):
    with pytest.raises(PmodError, match=r"has no counterpart|its weight"):
        convert(stock_model(layers=2), tmp_path / "merged", options=Options(adapter=adapter[0]))
