"""Every shipped recipe: parsed, resolved, and run for two steps on a tiny model and tiny data."""

import json
import os

import pytest
from safetensors import safe_open

from pmod_cli import recipe_files
from pmod_cli.checkpoints import router_state
from pmod_cli.core.errors import PmodError
from pmod_cli.data.documents import TASKS, draw, seed_of
from pmod_cli.training import folder
from pmod_cli.training.recipe import dump, load_settings
from pmod_cli.training.run import finetune
from tests.checkpoints.test_from_parts import parts  # noqa: F401 - a fixture

HELD = "llava-next-7b-held"
PAPER = ("llava-1.5-7b", "llava-next-7b", "projector-pretrain", "llava-1.5-7b-baseline", "llava-next-7b-baseline")
SHIPPED = [name for name in recipe_files.names() if not name.startswith(("ablations/", "choice/"))]
# What a recipe of the real size is given instead: the model, its rows, and numbers that fit them.
TINY = [
    *("model.llm=null", "model.vision_tower=null", "model.projector=null", "model.precision=float32"),
    *("train.max_steps=2", "train.batch_size=2", "train.global_batch_size=null", "train.log_steps=1"),
    *("model.calibration_images=4", "data.workers=0", "train.report_to=none", "data.template=auto", "data.turns=1"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    written = []
    for index in range(6):
        document = draw(TASKS[index % 4], seed_of("train", index))
        document.image.save(place / f"{index}.png")
        turn = document.turns[0]
        said = [{"from": "human", "value": f"<image>\n{turn.question}"}, {"from": "gpt", "value": turn.answer}]
        written.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    (place / "rows.json").write_text(json.dumps(written))
    return place


def test_the_recipes_that_the_documents_name_are_shipped():
    assert {*PAPER, HELD, "lora", "qlora-24gb", "recover", "tiny"} == set(SHIPPED)


def test_every_recipe_in_the_list_is_one_that_finetune_reads():
    for name in recipe_files.names():
        assert load_settings(recipe_files.find(name)).name, name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_runs(stock_model, rows, tmp_path, name):
    kind = load_settings(recipe_files.find(name)).model.kind
    tiny = stock_model(kind if name in PAPER else "llava_next", "llama")
    overrides = [*TINY, f"model.name={tiny}"]
    if load_settings(recipe_files.find(name)).data.kind == "llava":
        overrides += [f"data.path={rows}/rows.json", f"data.images={rows}"]
    overrides += ["pmod.select_at=[1]"] if name == HELD else []  # of four layers
    settings = load_settings(recipe_files.find(name), [*overrides, "model.quantize=none"])
    report = finetune(settings, tmp_path / "run")
    assert (report.status, report.step) == ("finished", 2)
    expected = "stock" if settings.pmod.enabled is None or settings.pmod.enabled is False else "trained"
    assert router_state(tmp_path / "run") == expected
    assert (tmp_path / "run" / folder.CURVES).stat().st_size > 5000
    assert load_settings(tmp_path / "run" / folder.SETTINGS) == settings
    assert load_settings(tmp_path / "run" / folder.SETTINGS).name == settings.name
    assert finetune(load_settings(tmp_path / "run" / folder.SETTINGS), tmp_path / "run").status == "already finished"
    trained = {part for part, numbers in report.parameters.items() if numbers.trained}
    assert ("language_model" in trained) == ("language_model" not in settings.model.freeze)
    assert "projector" in trained
    with safe_open(next((tmp_path / "run").glob("*.safetensors")), "pt") as file:
        assert any(".router." in key for key in file.keys()) == (expected == "trained")  # noqa: SIM118


def test_the_settings_of_the_paper():
    for name, batch, length, engine in (("llava-1.5-7b", 4, 2048, "zero1"), ("llava-next-7b", 8, 4096, "zero3")):
        settings = load_settings(recipe_files.find(name))
        assert (settings.train.batch_size, settings.data.max_length, settings.train.engine) == (batch, length, engine)
        assert settings.rows_per_step(8) == 128
        assert settings.accumulation(8) == 16 // batch
        assert {settings.train.rate(part) for part in ("language_model", "projector", "router")} == {2e-5}
        assert (settings.train.epochs, settings.train.warmup_steps, settings.train.weight_decay) == (1, 0.03, 0)
        assert settings.model.freeze == ["vision_tower"]
    assert -(-665_000 // 128) <= load_settings(recipe_files.find("llava-1.5-7b")).steps(665_298, 8) <= 5198


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b"])
def test_a_baseline_differs_by_routing_alone(name):
    routed, stock = load_settings(recipe_files.find(name)), load_settings(recipe_files.find(f"{name}-baseline"))
    assert (routed.pmod.enabled, stock.pmod.enabled) == (True, False)
    stock.pmod.enabled, stock.name = True, routed.name
    assert dump(stock) == dump(routed)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-7b-baseline", "projector-pretrain"])
def test_the_papers_start_from_parts(parts, rows, tmp_path, name):  # noqa: F811
    """Language model, tower and projector, put together by the run; where no projector is named, a new one."""
    place, _, _ = parts
    tiny = [entry for entry in TINY if "model." not in entry]
    overrides = [*tiny, f"model.llm={place}/llm", f"model.vision_tower={place}/clip", "model.precision=float32"]
    if name != "projector-pretrain":
        overrides.append(f"model.projector={place}/mm_projector.bin")
    overrides += [f"data.path={rows}/rows.json", f"data.images={rows}", "data.template=plain"]
    report = finetune(load_settings(recipe_files.find(name), overrides), tmp_path / "run")
    assert report.status == "finished"
    assert router_state(tmp_path / "run") == ("trained" if name == "llava-1.5-7b" else "stock")
    assert not (tmp_path / "run" / folder.STATE).exists()


def test_a_baseline_of_a_routed_model_is_refused(stock_model, tmp_path):
    from pmod_cli.checkpoints import convert
    from pmod_cli.model import PmodSettings

    convert(stock_model(), tmp_path / "routed", PmodSettings())
    common = [f"model.name={tmp_path / 'routed'}", "train.max_steps=1"]
    with pytest.raises(PmodError, match="a baseline is a stock model"):
        finetune(load_settings(None, [*common, "pmod.enabled=false"]), tmp_path / "run")
    with pytest.raises(PmodError, match=r"another routing:\n  pmod\.schedule: 'cosine' -> 'linear'"):
        finetune(load_settings(None, [*common, "pmod.schedule=linear"]), tmp_path / "run")
    assert not os.path.exists(tmp_path / "run")
