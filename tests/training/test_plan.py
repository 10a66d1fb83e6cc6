"""What `--dry-run` says of a run is what the run then does: its steps, tokens, and the FLOPs that come of them."""

import json

import pytest
from PIL import Image
from transformers import AutoConfig

from pmod_cli.checkpoints import load_model, load_processor, resolve
from pmod_cli.data.collator import Collator
from pmod_cli.data.rendered import IGNORED
from pmod_cli.families.configs import vision_token_ids
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.count.formulas import lm_head, prefill
from pmod_cli.profiling.count.training import training_memory
from pmod_cli.profiling.count.workload import Routed
from pmod_cli.profiling.measure.clock import peak_bytes
from pmod_cli.training.adapters import add_adapters
from pmod_cli.training.cost import row_of, setup_of
from pmod_cli.training.folder import LOG
from pmod_cli.training.plan import SAMPLE, plan
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune
from pmod_cli.training.run_data import Counting, SyntheticDocuments
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Watch
from tests.checkpoints.test_from_parts import parts  # noqa: F401


def settings_of(model, *more):
    own = [f"model.name={model}", "train.batch_size=2", "train.log_steps=1", "train.report_to=none"]
    return load_settings(None, [*own, *more])


@pytest.fixture
def rows(tmp_path):
    """Nine rows with an image and nine of text alone, which are longer."""
    made = []
    for number in range(18):
        words = "what colour? " * (1 if number < 9 else 40)
        said = [{"from": "human", "value": words + "<image>" * (number < 9)}, {"from": "gpt", "value": "red"}]
        made.append({"conversations": said, **({"image": "a.png"} if number < 9 else {})})
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps(made))
    return tmp_path / "rows.json"


def test_vision_tokens_are_those_of_the_rows_that_have_images(routed, rows, tmp_path):
    # Passes of 4, 4, 4, 4 and 2 rows: the third step of each epoch has two.
    uneven = ("train.batch_size=4", "train.gradient_accumulation=2", "train.epochs=2")
    settings = settings_of(routed, "data.kind=llava", f"data.path={rows}", *uneven)
    planned, report = plan(settings, device="cpu"), finetune(settings, tmp_path / "run")
    lines = map(json.loads, (report.path / LOG).read_text().splitlines())
    assert (planned.steps, planned.tokens) == (report.step, report.tokens)
    assert (planned.rows, planned.steps) == (36, 6)
    assert planned.data.vision_tokens * 36 == pytest.approx(sum(line.get("vision_tokens", 0) for line in lines))
    assert 0 < planned.data.vision_tokens < planned.data.tokens
    assert planned.data.longest_vision == 0  # a row of text alone is the longest
    flops = report.summary.tflops_per_second * report.seconds * 1e12
    assert planned.pmod.flops == pytest.approx(flops, rel=0.05)  # the run's is of its mean row, the plan's of a batch
    cut = plan(settings_of(routed, "data.kind=llava", f"data.path={rows}", "data.max_length=90"), device="cpu")
    assert cut.data.longest == 90


def test_batches_of_one_kind_are_filled_up_in_the_plan_too(routed, rows, tmp_path):
    more = ("data.kind=llava", f"data.path={rows}", "data.group_by_modality=true", "train.batch_size=4")
    settings = settings_of(routed, *more)
    planned = plan(settings, device="cpu")
    assert (planned.data.rows, planned.steps) == (18, 6)  # three of each kind
    assert finetune(settings, tmp_path / "run").step == 6


def test_rows_are_those_of_the_data_where_the_model_comes_in_parts(parts, rows):  # noqa: F811
    """Whatever `data.rows` says; their tokens are counted where the parts are here."""
    folder, *_ = parts
    own = ["model.kind=llava", f"model.projector={folder / 'mm_projector.bin'}", "data.kind=llava", f"data.path={rows}"]
    own += ["data.template=vicuna_v1", "data.rows=999", "train.batch_size=2"]
    here, away = (
        plan(load_settings(None, [*own, f"model.llm={llm}", f"model.vision_tower={folder / 'clip'}"]), device="cpu")
        for llm in (folder / "llm", "org/llm")
    )
    assert (here.data.rows, here.steps, here.data.source) == (18, 9, "18 rows of the data")
    assert 0 < here.data.vision_tokens < here.data.tokens < 200
    assert (away.data.rows, away.steps) == (18, 9)
    assert "not every part of the model is here" in away.data.source


def test_the_vision_tokens_of_a_film_are_counted():
    source = resolve("tiny-qwen3-vl").path
    settings = settings_of(source, "data.tasks=[moving]", "pmod.enabled=true", "train.max_steps=2")
    planned, processor = plan(settings, device="cpu"), load_processor(source)
    counting = Counting(Collator(processor), processor, vision_token_ids(AutoConfig.from_pretrained(source)))
    documents = SyntheticDocuments(settings.data, SAMPLE)
    counts = counting([documents[index] for index in range(SAMPLE)])["counts"]
    assert planned.data.vision_tokens == sum(counts.vision) / SAMPLE > 0
    assert planned.pmod.flops < planned.stock.flops


def test_the_teacher_of_a_distillation_is_planned(routed):
    """Its pass is the stock model's forward pass, logits of the text alone."""
    lora = ("lora.enabled=true", "lora.rank=4", "train.max_steps=3")
    answers, distill = (plan(settings_of(routed, *lora, f"train.loss={loss}")) for loss in ("answers", "distill"))
    sizes = Sizes.of(AutoConfig.from_pretrained(routed))
    batch = [row_of(sizes, answers.data.vision_tokens, answers.data.tokens)] * 2
    for column in ("pmod", "stock"):
        more = getattr(distill, column).flops - getattr(answers, column).flops
        text = sum(row.text_tokens for row in batch)
        assert more == 3 * (prefill(sizes, batch).full - prefill(sizes, batch).lm_head + lm_head(sizes.decoder, text))


def test_a_distilled_step_holds_what_is_planned(routed, tmp_path):
    """Peak memory of real steps with and without the divergence: they differ as the plan says they do."""
    peaks, planned = [], []
    for loss in ("answers", "distill"):
        more = ("lora.enabled=true", "lora.rank=4", "lora.dropout=0", "train.max_steps=1", f"train.loss={loss}")
        settings = settings_of(routed, *more)
        model, processor = load_model(routed)
        adapted = add_adapters(model, settings).train()
        arguments = training_arguments(settings, tmp_path, "cpu")
        trainer = PmodTrainer(train=settings.train, watch=Watch(), model=adapted, args=arguments)
        documents = SyntheticDocuments(settings.data, 2)
        inputs = Collator(processor)([documents[index] for index in range(2)])
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, IGNORED)

        def step(trainer=trainer, adapted=adapted, inputs=inputs):
            trainer.compute_loss(adapted, dict(inputs)).backward()
            adapted.zero_grad(set_to_none=True)

        step()
        peaks.append(peak_bytes(step, "cpu"))
        sizes, vision = Sizes.of(model.config), (inputs["input_ids"] == processor.image_token_id).sum().item() / 2
        rows = [row_of(sizes, vision, inputs["input_ids"].shape[1])] * 2
        planned.append(training_memory(sizes, rows, setup_of(settings, 1, False), Routed.of(model.config)).total)
    assert planned[1] > planned[0]
    assert peaks[1] - peaks[0] == pytest.approx(planned[1] - planned[0], rel=0.15)
