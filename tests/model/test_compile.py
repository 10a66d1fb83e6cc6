"""Compiled paths: whole graphs, no recompilation from image to image, the same tokens as eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from tests.factories import KINDS
from tests.model.models import ROUTED_FROM_START, ROWS, batch, pmod_model

pytestmark = pytest.mark.slow
CLOSE = {"atol": 1e-4, "rtol": 0}
TEXT = "what is the value of a?"
SIZES = [(64, 64), (64, 32), (20, 50), (48, 64)]
"""Images of different numbers of vision tokens."""
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True])
def test_the_decoder_is_one_graph_for_all_images(padded):
    """Prefill of one image after another, and of padded batches of them: every layer, routing included."""
    model = pmod_model()
    batches = [batch("llava_next", [(TEXT, [size])]) for size in SIZES]
    if padded:
        batches = [batch("llava_next", [(TEXT, [size]), ("yes", [])], "right") for size in SIZES]
    with torch.no_grad():
        expected = [model(**inputs, use_cache=False).logits for inputs in batches]
        counter = CompileCounter()
        decoder = model.model.language_model
        decoder.forward = torch.compile(decoder.forward, backend=counter, fullgraph=True, dynamic=True)
        compiled = [model(**inputs, use_cache=False).logits for inputs in batches[:2]]
        graphs = counter.frame_count
        compiled += [model(**inputs, use_cache=False).logits for inputs in batches[2:]]
    assert counter.frame_count == graphs <= 2
    for ours, eager in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, eager, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("padded", "select_at"), [(False, None), (True, None), (True, [0, 6])])
def test_a_whole_prefill_is_one_graph(kind, padded, select_at):
    """Everything from the embeddings (LLaVA: from the pixels) to the logits; each layer has a ratio of its own."""
    values = [0.9 - 0.07 * layer for layer in range(12)]  # more than the recompilations that are allowed
    model = pmod_model(kind, layers=12, pmod={"schedule": "list", "values": values, "select_at": select_at})
    rows = [
        [(TEXT * times, [size]), *([("yes", [])] if padded else [])]
        for times, size in zip((1, 2, 1, 3), SIZES, strict=True)
    ]
    batches = [batch(kind, row) for row in rows]
    if kind == "llava_next":  # the stock model itself cannot take pixels in a graph
        for inputs in batches:
            ids = inputs.pop("input_ids")
            inputs["vision_mask"] = ids == model.config.image_token_id
            inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
            del inputs["pixel_values"], inputs["image_sizes"]
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in batches]
        counter = CompileCounter()
        prefill = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=True)
        compiled = [prefill(**inputs).logits for inputs in batches]
    assert counter.frame_count == 1
    for ours, eager, inputs in zip(compiled, expected, batches, strict=True):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours[real], eager[real], **CLOSE)


def test_export_of_an_image_prefill():
    """Where the stock model exports: LLaVA-1.5. The program takes another prompt length's counts from its own input."""
    model = pmod_model("llava")
    inputs = batch("llava", [(TEXT, [(64, 64)])]) | {"use_cache": False}
    program = torch.export.export(model, (), kwargs=inputs, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits, **CLOSE)


def test_one_layer_compiled_by_inductor_agrees():
    model = pmod_model(pmod={"schedule": "list", "values": [1.0, 0.5, 1.0, 1.0]})
    inputs = batch("llava_next", ROWS[:2])
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        layer = model.model.language_model.layers[1]
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, **CLOSE)


def test_static_decode_is_one_graph_for_all_images():
    """`generate` with a static cache compiles decoding: here as one whole graph, image after image."""
    model = pmod_model(pmod=ROUTED_FROM_START)
    batches = [batch("llava_next", [(TEXT, [size])]) for size in SIZES]
    expected = [model.generate(**inputs, **GREEDY) for inputs in batches]
    graphs = []

    def backend(graph, example_inputs):  # a function: the configuration copies other objects
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=True, mode=None, backend=backend)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    generated = [model.generate(**inputs, **GREEDY, **options) for inputs in batches[:2]]
    compiled = len(graphs)
    assert compiled, "nothing was compiled"
    generated += [model.generate(**inputs, **GREEDY, **options) for inputs in batches[2:]]
    assert len(graphs) == compiled
    assert all(torch.equal(ours, eager) for ours, eager in zip(generated, expected, strict=True))
