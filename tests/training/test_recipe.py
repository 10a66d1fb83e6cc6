"""Settings from recipe, --set and flags: who wins, what is refused and how it is said."""

from pathlib import Path

import pytest

from pmod_cli import recipe_files
from pmod_cli.core.errors import PmodError
from pmod_cli.training.plan import model_of
from pmod_cli.training.recipe import differences, dump, load_settings
from pmod_cli.training.resume import source_digests
from pmod_cli.training.run_settings import Settings
from pmod_cli.training.start import source_of


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_flag_beats_set_beats_recipe_beats_default(tmp_path):
    recipe = write(tmp_path, "train: {max_steps: 1, batch_size: 2, seed: 3}\n")
    settings = load_settings(
        recipe,
        ["train.batch_size=20", "train.seed=30"],
        {"train.seed": ("--seed", 300), "model.name": ("--model", None)},
    )
    assert (settings.train.max_steps, settings.train.batch_size, settings.train.seed) == (1, 20, 300)
    assert settings.train.max_grad_norm == Settings().train.max_grad_norm
    assert settings.model.name is None  # a flag that was not given says nothing
    assert settings.name == "mine"


def test_a_flag_wins_even_when_it_equals_the_default(tmp_path):
    recipe = write(tmp_path, "train: {seed: 7}\n")
    assert load_settings(recipe, flags={"train.seed": ("--seed", Settings().train.seed)}).train.seed == 0


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002"])
def test_rates_may_be_written_as_people_write_them(tmp_path, text):
    assert load_settings(write(tmp_path, f"train: {{learning_rate: {text}}}")).train.learning_rate == 2e-5
    assert load_settings(None, [f"train.learning_rate={text}"]).train.learning_rate == 2e-5


def test_set_splits_at_the_first_equals_sign():
    assert load_settings(None, ["model.name=a=b"]).model.name == "a=b"


def test_every_fault_is_reported_with_its_place_and_the_nearest_name(tmp_path):
    recipe = write(tmp_path, "train:\n  max_step: 5\n  batch_size: many\ndata:\n  tasks: [doc, maps]\n")
    with pytest.raises(PmodError) as caught:
        load_settings(recipe, ["train.seed=-1"])
    message = caught.value.what
    assert f"{recipe}, line 2: unknown key train.max_step; did you mean train.max_steps?" in message
    assert f"{recipe}, line 3: train.batch_size: expected a whole number, got 'many'" in message
    assert "--set train.seed=-1: train.seed: expected 0 or more, got -1" in message
    assert "data.tasks: unknown maps" in message
    assert caught.value.code == 2
    with pytest.raises(PmodError, match=r"--set train\.epochs=0: train\.epochs: expected more than 0, got 0"):
        load_settings(None, ["train.epochs=0"])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.max_steps=true", "expected a whole number"),
        ("train.max_steps=2.5", "expected a whole number"),
        ("train.max_steps", "expected key.path=value"),
        ("train=5", "is a group of settings"),
        ("train.learning_rate=fast", "expected a number"),
        ("train.learning_rate=.nan", "expected a number of at most 1,000,000,000, got nan"),
        ("train.learning_rate=.inf", "expected a number of at most"),
        ("train.learning_rate=1e400", "expected a number of at most"),
        ("train.max_steps=100000000000000000000", "a whole number of at most 2,147,483,647"),
        ("train.epochs=1e20", "expected a number of at most"),
        ("pmod.shift=.inf", "expected a number of at most"),
        ("name=../../x", "expected a file name"),
        ("name=..", "expected a file name"),
        ('name="a\\nb"', "expected a file name"),
        ("model.precision=fp8", "expected one of auto, float32, bfloat16"),
        ("model.freeze=router", "expected a list"),
        ("model.freeze=[tower]", "unknown tower"),
        ("model.quantize=nf4", "expected lora.enabled"),
        ("model.llm=base", "expected model.vision_tower"),
        ("model.projector=x", "expected model.llm"),
        ("data.kind=llava", "data.path: expected the file"),
        ("data.path=rows.json", "data.path: synthetic documents are drawn; expected data.kind llava or hub"),
        ("data.group_by_modality=true", "data.group_by_modality: synthetic documents"),
        ("pmod.schedule=sine", "expected one of cosine, linear"),
        ("pmod.norm=cosh", "norm must be one of"),
        ("pmod.values=[1, half]", "expected a number"),
        ("pmod={schedule: linear}", "is a group of settings"),
        ("model.freeze=[language_model, projector, vision_tower, router]", "nothing is left to train"),
        ("nonsense.at.all=1", "unknown key nonsense.at.all"),
        ("train.max_steps.x=1", "unknown key train.max_steps.x"),
        ("train.seed=[", "not YAML"),
        ("lora.dropout=1.5", "lora.dropout: expected less than 1, got 1.5"),
        ("train.adam_beta2=1.0", "train.adam_beta2: expected less than 1, got 1.0"),
        ("data.tasks=[]", "data.tasks: expected at least one kind of document"),
    ],
)
def test_bad_values_are_refused(override, part):
    with pytest.raises(PmodError, match=part.replace("[", r"\[")):
        load_settings(None, [override])


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [", "train: {batch_size: null}"])
def test_bad_files_are_refused(tmp_path, text):
    with pytest.raises(PmodError, match=r"mine\.yaml"):
        load_settings(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &a [*a]", "an alias names the very value"),
        ("train: &t {seed: *t}", "an alias names the very value"),
        ("train: !!python/object/apply:os.system [x]", "the tag tag:yaml.org,2002:python/object/apply:os.system is"),
        ("train: {seed: !secret 3}", "the tag !secret is unknown"),
        ("train: {seed: !!int x}", "'x' is not of the type int"),
        ("train:\n  seed: 1\n  lr_schedule: linear\n  seed: 2", "line 4: the key 'seed' stands twice; first on line 2"),
        ("train: {seed: 1}\ntrain: {seed: 2}", "line 2: the key 'train' stands twice"),
        ("train: {? [a, b] : 1}", "expected a word as key"),
        ("[" * 5000, "20 levels"),
        ("train: " + "[" * 30 + "]" * 30, "20 levels"),
        ("# " + "x" * 70_000, "65,536 bytes"),
        ("name: ../../x", "expected a file name"),
        ("base: /etc/passwd", "outside the recipe's folder"),
        ("base: ../other.yaml", "outside the recipe's folder"),
        ("base: other.yaml", "no such recipe beside it"),
        ("train: {max_steps: 1e20}", "expected a whole number, got '1e20'"),
    ],
)
def test_hostile_files_are_refused(tmp_path, text, part):
    with pytest.raises(PmodError, match=r"mine\.yaml|^name") as caught:
        load_settings(write(tmp_path, text))
    assert part in caught.value.what
    assert len(caught.value.what) < 600


def test_aliases_that_stand_for_billions_of_values_end_at_a_limit(tmp_path):
    """Ten levels of six."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 6)}]" for level in range(1, 11)]
    with pytest.raises(PmodError, match="more than 10,000 values"):
        load_settings(write(tmp_path, "\n".join(lines)))


def test_an_alias_and_a_date_are_read(tmp_path):
    text = "data: {tasks: &two [doc, chart]}\nmodel: {freeze: [router], name: 2026-01-02}\neval: *two\n"
    settings = load_settings(write(tmp_path, text))
    assert settings.data.tasks == settings.eval == ["doc", "chart"]
    assert settings.model.name == "2026-01-02"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PmodError, match="cannot read the recipe"):
        load_settings(tmp_path / "none.yaml")


def test_what_is_saved_is_a_recipe_for_the_same_settings(tmp_path):
    settings = load_settings(recipe_files.find("tiny"), ["model.name=x", "train.learning_rate=1e-7", "data.turns=null"])
    again = load_settings(write(tmp_path, dump(settings)))
    assert again == settings
    assert differences(settings, again) == []


def test_differences_name_the_keys():
    one, other = load_settings(None, ["train.seed=1"]), load_settings(None, ["train.seed=2"])
    assert differences(one, other) == ["train.seed: 1 -> 2"]


def test_a_recipe_changes_its_base(tmp_path):
    (tmp_path / "stock.yaml").write_text("base: tiny\nname: stock\npmod: {enabled: false}\ntrain: {seed: 4}\n")
    recipe = write(tmp_path, "base: stock.yaml\ntrain:\n  seed: 5\n")
    settings, tiny = load_settings(recipe), load_settings(recipe_files.find("tiny"))
    assert (settings.name, settings.pmod.enabled, settings.train.seed) == ("mine", False, 5)
    settings.name, settings.pmod.enabled, settings.train.seed = tiny.name, None, tiny.train.seed
    assert settings == tiny


@pytest.mark.parametrize(
    ("text", "part"),
    [("base: mine.yaml", "its own base"), ("base: tinny", "tiny"), ("base: 3", "name of a recipe")],
)
def test_a_base_that_is_none(tmp_path, text, part):
    with pytest.raises(PmodError, match=part):
        load_settings(write(tmp_path, text))


def test_a_global_batch_is_the_same_on_any_number_of_devices():
    settings = load_settings(None, ["train.batch_size=4", "train.global_batch_size=32", "train.epochs=2"])
    assert [settings.accumulation(processes) for processes in (1, 2, 8)] == [8, 4, 1]
    assert [settings.rows_per_step(processes) for processes in (1, 2, 8)] == [32] * 3
    assert [settings.steps(330, processes) for processes in (1, 2, 8)] == [22] * 3
    with pytest.raises(ValueError, match="no multiple of 4 rows x 3 processes"):
        settings.accumulation(3)


def test_adapters_of_no_map_are_refused():
    with pytest.raises(PmodError, match=r"lora\.targets: expected at least one linear map, got none"):
        load_settings(None, ["lora.enabled=true", "lora.targets=[]"])


def test_a_run_without_a_model_is_a_sentence():
    """The command fills in the current model; a call of the library has to name one."""
    for call in (source_of, source_digests, model_of):
        with pytest.raises(PmodError, match=r"`model\.name` is not given"):
            call(Settings())
