"""One training step as the Trainer takes it: the published code's loss and gradients, and what it costs."""

import time
from dataclasses import replace
from statistics import median

import pytest
import torch

from pmod_cli.checkpoints import convert, load_model
from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.model import PmodSettings
from pmod_cli.training.parts import freeze
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run_data import COUNTS, Counting
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Watch
from tests.factories import save_stock
from tests.model.published import golden, our_model, our_name
from tests.model.test_golden import cases  # noqa: F401 - a fixture


def trainer_of(model, folder, *, frozen=(), processor=None):
    """The trainer of a run with default settings, at its first step."""
    settings = load_settings(None, ["train.max_steps=1", "train.report_to=none"])
    freeze(model, frozen)
    trainer = PmodTrainer(
        train=settings.train, watch=Watch(), model=model, args=training_arguments(settings, folder, "cpu")
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


@pytest.mark.parametrize(("case", "prefix"), [("llava15", "batch"), ("llava15", "mixed"), ("next", "batch")])
def test_loss_and_gradients_are_those_of_the_published_code(cases, tmp_path, case, prefix):  # noqa: F811
    expected, model = golden(case), our_model(case)
    trainer = trainer_of(model, tmp_path)
    batch = dict(cases[case, prefix])
    count = Counting(lambda rows: batch, None, [model.config.image_token_id])
    loss = trainer.training_step(model, count(None))
    # The published code computes the loss of a text-only row over a dummy image's position as well: not ours to copy.
    torch.testing.assert_close(loss, expected[f"{prefix}.loss"].squeeze(), atol=1e-4, rtol=0)
    ours = dict(model.named_parameters())
    start = f"{prefix}.grad."
    names = [name.removeprefix(start) for name in expected if name.startswith(start)]
    assert (len(names) > 48) == (prefix == "batch")  # of the mixed batch no gradients were recorded
    for name in names:
        theirs, gradient = expected[start + name], ours[our_name(name)].grad
        assert float((gradient - theirs).norm() / theirs.norm().clamp_min(1e-3)) < 1e-4, name


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A stock model of 32 layers and its p-MoD, whose trained-like routers keep tokens all over the image."""
    place = tmp_path_factory.mktemp("pair")
    width = {"hidden_size": 768, "intermediate_size": 2064, "num_attention_heads": 6, "num_key_value_heads": 6}
    save_stock(place / "stock", "llava_next", "llama", 32, **width)
    convert(place / "stock", place / "pmod", PmodSettings())
    stock, processor = load_model(place / "stock")
    pmod, _ = load_model(place / "pmod")
    generator = torch.Generator().manual_seed(0)
    for layer in pmod.model.language_model.layers:
        if layer.router is not None:
            torch.nn.init.normal_(layer.router.weight, generator=generator)
    return stock, pmod, processor


def batch_of(processor, images):
    """One row with a question about the last of several images."""
    documents = [draw("doc", seed_of("train", index)) for index in range(images)]
    turn = documents[-1].turns[0]
    question = [{"type": "image"}] * images + [{"type": "text", "text": turn.question}]
    said = [{"role": "user", "content": question}]
    said += [{"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}]
    return Collator(processor)([{"images": [document.image for document in documents], "messages": said}])


@pytest.mark.timing
@pytest.mark.soak  # a width at which matrix products outweigh the rest takes a minute and 4 GB
def test_a_step_costs_what_its_flops_say(pair, tmp_path):
    """CPU time of p-MoD against stock, in turn, against the ratio of the FLOPs that are counted for them."""
    from pmod_cli.families.sizes import Sizes
    from pmod_cli.profiling.count.training import TrainingSetup, training_flops
    from pmod_cli.profiling.count.workload import Routed, Row, Workload

    stock, pmod, processor = pair
    batch = batch_of(processor, images=8)
    vision = int((batch["input_ids"] == stock.config.image_token_id).sum())
    sizes = Sizes.of(stock.config)
    image = replace(Workload().rows(sizes)[0].images[0], base=16, high_resolution=vision // 8 - 16)
    rows = [Row((image,) * 8, batch["input_ids"].shape[1] - vision)]
    routed, whole = (
        training_flops(sizes, rows, TrainingSetup(), which).step for which in (Routed.of(pmod.config), None)
    )
    trainers = [trainer_of(model, tmp_path, frozen=["vision_tower"]) for model in (stock, pmod)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [[_step(trainer, batch, stock.config.image_token_id) for trainer in trainers] for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    ratio = median(mine / its for its, mine in seconds[1:])
    print(f"CPU time {ratio:.3f} of stock, FLOPs {routed / whole:.3f}, {median(s for s, _ in seconds):.2f} s a step")
    assert ratio <= 1.05 * routed / whole


def _step(trainer, batch, image_token) -> float:
    inputs = Counting(lambda rows: dict(batch), None, [image_token])(None)
    assert COUNTS in inputs
    started = time.process_time()
    trainer.training_step(trainer.model, inputs)
    taken = time.process_time() - started
    trainer.model.zero_grad()
    return taken
