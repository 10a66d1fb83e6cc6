"""Questions to the families that take several images and videos: batches, films, lmms-eval's own models beside ours."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli import cli
from pmod_cli.checkpoints import convert, load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import prompts, suite
from pmod_cli.evaluation.adapter import PmodModel, Unanswered
from pmod_cli.evaluation.benchmarks import sums_of
from pmod_cli.evaluation.downsample import downsample
from pmod_cli.evaluation.intervals import makes_up, summands
from pmod_cli.evaluation.score_sums import options
from pmod_cli.model import PmodSettings
from tests.films import write_avi
from tests.visual_processors import KINDS, processor, save_stock

SETTINGS = {"max_new_tokens": 6, "until": ["\n\n"]}
QUESTIONS = {  # by the number of what is seen
    "none": ("say something", 0),
    "one": ("what is it?", 1),
    "two": ("which of them?", 2),
    "marked": ("is <image> like <image>?", 2),
    "film": ("what happens?", "film"),
}


def pictures(count, film=None):
    if count == "film":
        return [str(film)]
    random = np.random.default_rng(count)
    shapes = ((56, 84), (84, 56), (56, 56))
    return [Image.fromarray(random.integers(0, 255, (*shapes[i], 3), dtype=np.uint8)) for i in range(count)]


def requests(names, film=None):
    """As lmms-eval makes them, for a model of its own (`simple`)."""
    docs = [pictures(QUESTIONS[name][1], film) for name in names]
    task = {"asked": {"test": docs}}
    found = [
        SimpleNamespace(args=(QUESTIONS[name][0], dict(SETTINGS), list, place, "asked", "test"), metadata=[])
        for place, name in enumerate(names)
    ]
    return found, task


def ask(model, names, film=None):
    found, model.task_dict = requests(names, film)
    answers = {place: answer for batch in model.answers(found) for place, answer in batch}
    return [answers[place] for place in range(len(names))]


@pytest.fixture(scope="module", params=KINDS)
def routed(request, tmp_path_factory):
    """A p-MoD model of each family, and a film of 40 frames."""
    folder = tmp_path_factory.mktemp(request.param)
    convert(save_stock(folder / "stock", request.param), folder / "routed", PmodSettings())
    shades = [Image.new("RGB", (32, 24), (6 * number, 0, 0)) for number in range(40)]
    write_avi(folder / "film.avi", shades, per_second=10)
    model, made = load_model(folder / "routed", dtype="float32")
    return request.param, model, made, folder / "film.avi"


def test_answers_do_not_depend_on_the_batch(routed):
    kind, model, made, film = routed
    names = list(QUESTIONS)
    one, four = (
        ask(PmodModel("m", batch_size=size, model=model, processor=made), names, film) for size in (1, len(names))
    )
    assert [answer.text for answer in one] == [answer.text for answer in four]
    assert [answer.input_tokens for answer in one] == [answer.input_tokens for answer in four]
    assert len({answer.text for answer in one}) > 2
    vision = {"qwen2_5_vl": 16, "qwen3_vl": 16, "llava_onevision": 32, "llava_next_video": 32}[kind]
    frames = prompts.prepare(made, 0, "?", [str(film)], kind).inputs
    grid = frames["video_grid_thw"][0, 0] if kind.startswith("qwen") else frames["pixel_values_videos"].shape[1]
    assert grid == vision  # 32 frames of 40; two of them are one for Qwen-VL


def test_a_film_that_is_missing_or_not_wanted_leaves_the_question_unanswered(routed, stock_model, tmp_path):
    _, model, made, _ = routed
    (gone,) = ask(PmodModel("m", model=model, processor=made), ["film"], tmp_path / "gone.mp4")
    assert isinstance(gone, Unanswered)
    assert "no such video" in gone.reason
    plain = PmodModel("m", **dict(zip(("model", "processor"), load_model(stock_model(), dtype="float32"), strict=True)))
    (still,) = ask(plain, ["film"], tmp_path / "gone.mp4")
    assert "takes images alone" in still.reason


def test_the_command_runs_the_tasks(routed, workdir):
    kind, model, made, _ = routed
    words = ["--tasks", "tiny_doc,tiny_presence", "--limit", "1", "--device", "cpu", "--dtype", "float32"]
    assert cli.main(["eval", "-m", str(model.name_or_path), *words, "-o", "scores"]) == 0
    results = json.loads((workdir / "scores" / "results.json").read_text())
    found = {entry["model_type"]: entry for entry in results["models"].values()}
    assert set(found) == {kind, f"pmod_{kind}"}
    assert {entry["image_backend"] for entry in found.values()} == {"Pillow"}
    if kind != "llava_next_video":
        with pytest.raises(PmodError, match="knows CLIP vision towers"):
            downsample(model, made, 0.5)


def lmms_model(kind, folder):
    """lmms-eval's own model of the family, `simple`, on the CPU in float32."""
    pytest.importorskip("qwen_vl_utils", reason="lmms-eval's models of Qwen-VL need it")
    from transformers import AutoProcessor, AutoTokenizer

    if kind == "qwen2_5_vl":
        from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as Theirs
    else:
        from lmms_eval.models.simple.qwen3_vl import Qwen3_VL as Theirs
    model, _ = load_model(folder, dtype="float32")
    theirs = Theirs.__new__(Theirs)  # its constructor wants a GPU and bfloat16
    super(Theirs, theirs).__init__()
    theirs._model, theirs._tokenizer = model, AutoTokenizer.from_pretrained(folder)
    theirs.processor = AutoProcessor.from_pretrained(folder)
    theirs._config, theirs._device, theirs.device_map = model.config, torch.device("cpu"), "cpu"
    theirs.batch_size_per_gpu, theirs.use_cache, theirs._rank, theirs._world_size = 1, True, 0, 1
    theirs.min_pixels, theirs.max_pixels, theirs.max_num_frames, theirs.fps = 3136, 100_352, 32, None
    theirs.system_prompt, theirs.interleave_visuals = "You are a helpful assistant.", False
    theirs.reasoning_prompt = theirs.total_pixels = theirs.enable_thinking = None
    if kind == "qwen2_5_vl":  # JPEG of quality 85 is how it hands pictures over; the pixels are the question here
        theirs._encode_image_data_url = lambda image: image
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_prompt_tokens_and_answers_are_those_of_lmms_evals_own_model(kind, tmp_path, monkeypatch):
    """Images whose sides are whole cells of the published models too, which lmms-eval's resizing goes by."""
    made = processor(kind)
    monkeypatch.setattr(
        made.image_processor, "size", type(made.image_processor.size)(shortest_edge=3136, longest_edge=100_352)
    )
    folder = save_stock(tmp_path / "stock", kind)
    names = ["one", "two", "marked", "none"]
    sides = ((56, 84), (84, 56), (56, 56)) if kind == "qwen2_5_vl" else ((64, 96), (96, 64), (64, 64))
    random = np.random.default_rng(0)
    docs = [
        [Image.fromarray(random.integers(0, 255, (*sides[i], 3), dtype=np.uint8)) for i in range(QUESTIONS[name][1])]
        for name in names
    ]
    found, _ = requests(names)
    ours, theirs = PmodModel(str(folder), device="cpu", dtype="float32"), lmms_model(kind, folder)
    asked = {}

    def watched(name, model):
        generate = model.model.generate

        def generating(**inputs):
            result = generate(**inputs)
            asked.setdefault(name, []).append((inputs["input_ids"][0].tolist(), result[0].tolist()))
            return result

        monkeypatch.setattr(model.model, "generate", generating)
        model.task_dict = {"asked": {"test": docs}}

    watched("ours", ours)
    watched("theirs", theirs)
    mine = [answer.text for answer in (dict(pair for batch in ours.answers(found) for pair in batch)).values()]
    said = [str(answer).strip() for answer in theirs.generate_until(found)]
    assert sorted(asked["ours"]) == sorted(asked["theirs"])
    assert sorted(mine) == sorted(said)


def llava_hf(kind, folder):
    """lmms-eval's `llava_hf` on the CPU in float32; its template gets one text, which begins with the places."""
    pytest.importorskip("decord", reason="llava_hf imports it")
    from lmms_eval.models.simple.llava_hf import LlavaHf

    theirs = LlavaHf.__new__(LlavaHf)  # its constructor reads configurations that the hub has
    super(LlavaHf, theirs).__init__()
    theirs._model, theirs._image_processor = load_model(folder, dtype="float32")
    theirs._tokenizer, theirs._config = theirs._image_processor.tokenizer, theirs._model.config
    theirs._device, theirs.batch_size_per_gpu, theirs._rank, theirs._world_size = torch.device("cpu"), 1, 0, 1
    theirs.use_cache, theirs.max_frames_num = True, prompts.FRAMES
    theirs.accelerator = SimpleNamespace(is_main_process=False, unwrap_model=lambda model: model)
    ends = {"llava_onevision": ("<|im_start|>user ", "<|im_end|><|im_start|>assistant\n")}
    before, after = ends.get(kind, ("USER: ", " ASSISTANT:"))
    theirs.chat_template = f"{before}{{{{ messages[0]['content'] }}}}{{{{ {after!r} }}}}"
    return theirs


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next_video"])
def test_prompt_tokens_and_answers_are_those_of_llava_hf(kind, tmp_path, monkeypatch):
    """Of one image and of a film: the same frames, prompt and generated ids. Several images differ on purpose."""
    folder = save_stock(tmp_path / "stock", kind)
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)) for _ in range(45)]
    write_avi(tmp_path / "film.avi", frames, per_second=10)
    ours, theirs = PmodModel(str(folder), device="cpu", dtype="float32"), llava_hf(kind, folder)
    asked = {"ours": {}, "theirs": {}}
    for name, model in (("ours", ours), ("theirs", theirs)):
        generate = model.model.generate

        def generating(*, name=name, generate=generate, **inputs):
            result = generate(**inputs)
            pixels = {key: inputs[key] for key in inputs if key.startswith("pixel_values")}
            asked[name][question] = (inputs["input_ids"][0].tolist(), result[0].tolist(), pixels)
            return result

        monkeypatch.setattr(model.model, "generate", generating)
    for question in ("one", "film"):
        found, docs = requests([question], tmp_path / "film.avi")
        ours.task_dict = theirs.task_dict = docs
        (mine,) = (answer.text for batch in ours.answers(found) for _, answer in batch)
        found, _ = requests([question])
        found[0].args[1].pop("until")
        assert theirs.generate_until(found)[0].strip() == mine
        (ids, said, pixels), (their_ids, they_said, their_pixels) = (asked[name][question] for name in asked)
        assert ids == their_ids
        assert said == they_said
        assert pixels.keys() == their_pixels.keys()
        for key, value in pixels.items():
            assert torch.allclose(value, their_pixels[key], atol=1e-5), key
    assert len(asked["ours"]) == 2


def test_several_images_and_video_are_groups():
    assert [benchmark.name for benchmark in suite.resolve(["multi-image"])] == ["muirbench", "blink"]
    assert [benchmark.name for benchmark in suite.resolve(["video"])] == ["mvbench", "videomme", "egoschema"]
    from lmms_eval.tasks import TaskManager

    known = TaskManager()
    for benchmark in suite.resolve(["multi-image", "video"]):
        assert benchmark.task in known.all_tasks


def test_sums_of_options_read_what_each_task_notes():
    items = [
        {"pred": "A", "answer": "a"},
        {"pred": "B", "answer": "A", "is_correct": False},
        {"pred_answer": "A", "score": 1.0},
        {"pred": 2, "ground_truth": "2"},
    ]
    summed = options([{"task": "t", "doc_id": place, "item": item} for place, item in enumerate(items)])
    assert summed.score(summed.columns.sum(axis=0)) == 0.75


def test_sums_of_the_videos_make_up_the_scores_of_lmms_eval():
    """Both are in percent; MVBench leaves out what was answered with nothing."""
    from lmms_eval.tasks.mvbench.utils import mvbench_aggregate_results

    of_mvbench = [{"pred_answer": said, "gt_answer": "A", "score": int(said == "A")} for said in ("A", "B", "A", "")]
    of_videomme = [{"pred_answer": said, "answer": "A", "score": float(said == "A")} for said in ("A", "", "B")]
    scored = {"mvbench": mvbench_aggregate_results(of_mvbench), "videomme": 100 / 3}  # whose code needs OpenCV
    assert scored["mvbench"] == pytest.approx(200 / 3)
    for benchmark in suite.resolve(["mvbench", "videomme"]):
        items = {"mvbench": of_mvbench, "videomme": of_videomme}[benchmark.name]
        records = [{"task": "t", "doc_id": place, "item": item} for place, item in enumerate(items)]
        part = summands(records, sums_of(benchmark, benchmark.metric))
        assert makes_up(benchmark.scale * part.value(), scored[benchmark.name], benchmark.scale)
