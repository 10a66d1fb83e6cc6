"""lm_head sees the answers alone: loss and gradients stay what they were, and the rest is not made."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pmod_cli.checkpoints import convert, load_model
from pmod_cli.data.collator import Collator
from pmod_cli.data.rendered import IGNORED
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.count.formulas import lm_head
from pmod_cli.training.answers import AnswersHead, positions
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run_data import SyntheticDocuments
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Watch
from tests.factories import save_stock


@pytest.fixture
def trained(tmp_path):
    """A model of four layers, a batch of two documents, and the trainer of its run."""
    save_stock(tmp_path / "stock", "llava_next", "llama", 4)
    convert(tmp_path / "stock", tmp_path / "pmod", PmodSettings())
    model, processor = load_model(tmp_path / "pmod", dtype="float32")
    settings = load_settings(None, ["train.max_steps=1", "train.report_to=none", "data.kind=synthetic"])
    arguments = training_arguments(settings, tmp_path, "cpu")
    trainer = PmodTrainer(train=settings.train, watch=Watch(), model=model.train(), args=arguments)
    documents = SyntheticDocuments(settings.data, 2)
    return model, trainer, Collator(processor)([documents[index] for index in range(2)])


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call().backward()
    return counter.get_total_flops()


def test_logits_that_nothing_is_learnt_from_are_not_made(trained):
    """Forward and two backward products fewer, of each position that is no answer's; the same loss and gradients."""
    model, trainer, batch = trained
    answers = int((batch["labels"][:, 1:] != IGNORED).sum())
    whole = flops(lambda: model(**batch, use_cache=False).loss)
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    loss = model(**batch).loss
    model.zero_grad()
    ours = flops(lambda: trainer.compute_loss(model, dict(batch)))
    left_out = batch["labels"].numel() - answers
    assert whole - ours == 3 * lm_head(Sizes.of(model.config).decoder, left_out)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), loss)
    for name, parameter in model.named_parameters():
        if name in expected or parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_batch_without_answers_has_no_gradients(trained):
    model, trainer, batch = trained
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_outside_its_block_the_head_sees_everything(trained):
    model, _, batch = trained
    head, asked = AnswersHead(model), {**batch, "labels": None}
    before = model(**asked).logits
    with head.at(positions(batch["labels"])):
        seen = model(**asked).logits
    assert torch.equal(seen[0], before.flatten(0, 1)[positions(batch["labels"])])
    assert torch.equal(model(**asked).logits, before)
