"""Rows of the families that take several images and videos, held to each processor's own `apply_chat_template`."""

import copy
import json
from base64 import b64encode

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli.checkpoints.aliases import builtin_config
from pmod_cli.checkpoints.processor_limits import with_limits
from pmod_cli.core.errors import PmodError
from pmod_cli.core.videos import Frames, load_video
from pmod_cli.data.collator import Collator
from pmod_cli.data.conversation import BadRow, from_llava, from_messages, from_row
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.data.rendered import IGNORED
from pmod_cli.data.sources import LlavaFile, open_source
from pmod_cli.data.templates import renderer
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.average import read_rows
from tests.films import write_avi
from tests.visual_processors import KINDS, processor, save_stock

QWEN = ("qwen2_5_vl", "qwen3_vl")
FRAMES = 4


@pytest.fixture
def pictures(tmp_path):
    """Two images of unlike shape, and a folder of eight frames."""
    random = np.random.default_rng(0)

    def picture(width, height):
        return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))

    picture(20, 12).save(tmp_path / "wide.png")
    picture(8, 16).save(tmp_path / "high.png")
    (tmp_path / "clip").mkdir()
    for number in range(8):
        picture(16, 12).save(tmp_path / "clip" / f"{number}.png")
    return tmp_path


def said(question="<video>", **pictures):
    """A row of LLaVA's JSON."""
    return {**pictures, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "that"}]}


def told(question, **pictures):
    """The same in messages."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "that"}]
    return {**pictures, "messages": turns}


def parts(*content):
    return [{"type": "text", "text": each} if each not in ("image", "video") else {"type": each} for each in content]


def conversations(kind):
    """Messages of each form, with the pictures that they ask for: `(messages, images, videos)`."""
    answer = {"role": "assistant", "content": parts("a dog")}
    one = [{"role": "user", "content": parts("image", "what is it?")}, answer]
    several = [{"role": "user", "content": parts("image", "image", "which one?")}, answer]
    rounds = [*one, {"role": "user", "content": parts("and now?")}, {"role": "assistant", "content": parts("the same")}]
    found = [
        (one, ["wide.png"], []),
        (several, ["wide.png", "high.png"], []),
        (rounds, ["high.png"], []),
        ([{"role": "system", "content": parts("be brief")}, *rounds], ["high.png"], []),
        ([{"role": "user", "content": parts("hello")}, answer], [], []),
        ([{"role": "user", "content": parts("video", "what happens?")}, answer], [], ["clip"]),
        ([{"role": "user", "content": parts("image", "video", "is it there?")}, answer], ["wide.png"], ["clip"]),
    ]
    if kind in QWEN:
        inline = [{"role": "user", "content": parts("look:", "image", "and", "image", "!")}, answer]
        found.append((inline, ["wide.png", "high.png"], []))
    return found


def given(messages, images, videos, folder):
    """The same messages, each picture named in its place, as transformers reads them."""
    names = {"image": iter(images), "video": iter(videos)}

    def of(part):
        if part["type"] == "text":
            return part
        name = next(names[part["type"]])
        if part["type"] == "image":
            return {"type": "image", "image": Image.open(folder / name)}
        frames = [np.asarray(Image.open(folder / name / f"{number}.png")) for number in (0, 2, 5, 7)]
        return {"type": "video", "video": np.stack(frames)}

    return [{**message, "content": [of(part) for part in message["content"]]} for message in messages]


def stock(kind, messages, images, videos, folder, **options):
    """What the processor makes of the messages itself, its metadata of a clip those of frames at one a second."""
    metadata = {"total_num_frames": FRAMES, "fps": 1.0, "frames_indices": [0, 1, 2, 3]}
    return processor(kind).apply_chat_template(
        given(messages, images, videos, folder),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False} if videos else {},
        **options,
    )


def encoded(kind, messages, images, videos, folder):
    row = {"messages": messages, "images": images, "videos": videos}
    return RowEncoder(processor(kind), video_frames=FRAMES)(from_messages(row), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_pixels_are_those_of_the_processor(kind, pictures):
    for messages, images, videos in conversations(kind):
        ours, theirs = (make(kind, messages, images, videos, pictures) for make in (encoded, stock))
        assert ours["input_ids"].tolist() == theirs["input_ids"][0].tolist()
        names = set(theirs) - {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert set(ours) - {"input_ids", "labels"} == names
        for name in names:
            torch.testing.assert_close(ours[name], torch.as_tensor(theirs[name]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_assistant_mask_or_what_an_answer_adds(kind, pictures):
    """A template with marks: transformers' own mask. One without: the tokens that each answer adds."""
    for messages, images, videos in conversations(kind):
        labels = encoded(kind, messages, images, videos, pictures)["labels"]
        whole = stock(kind, messages, images, videos, pictures)["input_ids"][0]
        if kind in QWEN:
            learned = torch.zeros(len(whole), dtype=torch.bool)
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = stock(kind, messages[:number], images, videos, pictures, add_generation_prompt=True)
                    after = stock(kind, messages[: number + 1], images, videos, pictures)
                    learned[before["input_ids"].shape[1] : after["input_ids"].shape[1]] = True
        else:
            made = stock(kind, messages, images, videos, pictures, return_assistant_tokens_mask=True)
            learned = torch.as_tensor(made["assistant_masks"])[0].bool()
        assert learned.any()
        assert labels.tolist() == torch.where(learned, whole, IGNORED).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_the_processor_makes_of_all_rows(kind, pictures):
    rows = [row for row in conversations(kind) if row[0][0]["role"] == "user"]
    batch = Collator(processor(kind))([encoded(kind, *row, pictures) for row in rows])
    singles = [stock(kind, *row, pictures) for row in rows]
    for place, single in enumerate(singles):
        real = batch["attention_mask"][place].bool()
        for name in ("input_ids", "mm_token_type_ids"):
            assert (name in batch) == (name in single)
            if name in single:
                assert torch.equal(batch[name][place][real], single[name][0])
    for name in ("pixel_values_videos", "image_grid_thw", "video_grid_thw", "batch_num_images", "image_sizes"):
        found = [torch.as_tensor(single[name]) for single in singles if name in single]
        assert (name in batch) == bool(found)
        if found:
            assert torch.equal(batch[name], torch.cat(found))


def test_layouts_of_other_tools_are_the_same_conversation():
    """LLaVA's JSON, LLaMA-Factory's and ms-swift's text with marks, TRL's parts, pictures named in either place."""
    text = "<image>\n<video>\nwhich?"
    answer = {"role": "assistant", "content": "that"}
    named = {"images": ["a.png"], "videos": ["b"]}
    marked = {"messages": [{"role": "user", "content": text}, answer], **named}
    inside = [{"type": "image", "image": "a.png"}, {"type": "video", "video": "b"}, {"type": "text", "text": "which?"}]
    openai = [{"type": "image_url", "image_url": {"url": "a.png"}}, *inside[1:]]
    outside = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "which?"}]
    rows = [
        said(text, image="a.png", video="b"),
        said(text, **named),
        marked,
        {**marked, "images": [{"path": "a.png", "bytes": None}]},
        {"messages": [{"role": "user", "content": inside}, answer]},
        {"messages": [{"role": "user", "content": openai}, answer]},
        {**marked, "messages": [{"role": "user", "content": outside}, answer]},
        {**marked, "messages": [{"role": "user", "content": "which?"}, answer]},
        {"image": "a.png", "video": "b", "messages": [{"role": "user", "content": "which?"}, answer]},
        {**named, "prompt": [{"role": "user", "content": outside}], "completion": [answer]},
    ]
    assert len({repr(from_row(row)) for row in rows}) == 1
    assert from_llava(said("<image>\nwhat?", video="b.mp4")).turns[0].text == "<video>\nwhat?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "a"}],
          "videos": ["a", "b"]}, "2 videos, and 1 <video> place"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "completion": []}, "'prompt' holds an answer"),
        ({"prompt": "what?", "completion": "that"}, "expected two lists of messages"),
        ({"video": 3, "conversations": []}, "'video': expected a file name"),
        ({"messages": [{"role": "user", "content": ["what?"]}]}, "parts of type image, image_url, video or text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_say_why(row, reason, tmp_path):
    with pytest.raises(BadRow) as caught:
        from_row(row)
    assert reason in caught.value.what
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert len(LlavaFile(tmp_path / "rows.jsonl", None)) == 1, "it is told when it is read, and breaks no file"


@pytest.mark.parametrize("videos", [[3], [[3]], [{}]])
def test_a_video_without_a_name_is_a_bad_row(videos, pictures):
    with pytest.raises(BadRow, match=r"expected .*name.*, found (int|dict)"):
        RowEncoder(processor("qwen3_vl"))(from_messages(told("<video>?", videos=videos)), pictures)


def test_a_file_tells_rows_with_pictures_from_others(tmp_path):
    words = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    own = [
        {"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "a b"}]},
        words[1],
    ]
    rows = [{"messages": words}, {"messages": own}, {"messages": words, "videos": ["v"]}]
    rows.append({"prompt": own[:1], "completion": words[1:]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert np.sign(LlavaFile(tmp_path / "rows.jsonl", None).lengths).tolist() == [-1, 1, 1, 1]


def test_a_hub_data_set_gives_the_films_of_its_json(pictures, monkeypatch):
    """In `videos` beside messages, and in a column `video` beside LLaVA's turns; `datasets` decodes none."""
    from datasets import Dataset, List, Video

    monkeypatch.chdir(pictures)
    answer = {"role": "assistant", "content": "that"}
    asked = [{"role": "user", "content": text} for text in ("<video>which?", "<image>\nwhat?")]
    rows = [{"messages": [turn, answer]} for turn in asked]
    rows = [{**rows[0], "images": [], "videos": ["clip"]}, {**rows[1], "images": ["wide.png"], "videos": []}]
    for name, listed in (("a", rows), ("b", [said(video="clip"), said("why?", video=None)])):
        Dataset.from_list(listed).save_to_disk(f"{name}.hub")
        (pictures / f"{name}.json").write_text(json.dumps(listed))
        hub, own = open_source("hub", f"{name}.hub", None), open_source("llava", f"{name}.json", None)
        assert [hub[row] for row in range(2)] == [own[row] for row in range(2)]
        assert hub.lengths.tolist() == own.lengths.tolist()
        assert "pixel_values_videos" in RowEncoder(processor("qwen3_vl"))(hub[0])
    whole = [{**rows[0], "videos": [{"bytes": b"film", "path": None}]}]
    Dataset.from_list(whole).cast_column("videos", List(Video())).save_to_disk("c.hub")
    with pytest.raises(BadRow, match="expected the name of a video or of its frames, found bytes"):
        RowEncoder(processor("qwen3_vl"))(open_source("hub", "c.hub", None)[0])


def test_a_data_url_is_a_picture_and_a_web_address_is_none(pictures):
    encode, picture = RowEncoder(processor("qwen3_vl")), (pictures / "wide.png").read_bytes()

    def row(url):
        asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "that"}]}

    rows = [row("wide.png"), row(f"data:image/png;base64,{b64encode(picture).decode()}")]
    named, whole = (encode(from_row(each), pictures) for each in rows)
    assert all(torch.equal(named[name], whole[name]) for name in named)
    (pictures / "rows.json").write_text(json.dumps(rows))
    assert LlavaFile(pictures / "rows.json", None).lengths.tolist() == [4, 4]
    sizes = Sizes.of(json.loads((save_stock(pictures / "model", "qwen3_vl") / "config.json").read_text()))
    assert len(set(read_rows(pictures / "rows.json", None, sizes, len))) == 1
    for url, reason in (
        ("data:image/png,xx", "a data URL is expected as data:image/png;base64"),
        ("data:image/png;base64,x!", "the data URL is no base64"),
        ("https://x.org/a.png", "no such image: https://x.org/a.png"),
    ):
        with pytest.raises(BadRow, match=reason):
            encode(from_row(row(url)), pictures)


def test_a_data_url_in_llavas_own_form_is_a_picture_and_a_long_name_is_cut(pictures):
    encode, picture = RowEncoder(processor("qwen3_vl")), (pictures / "wide.png").read_bytes()
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "that"}]
    urls = "wide.png", f"data:image/png;base64,{b64encode(picture).decode()}"
    named, whole = (encode(from_row({"image": url, "conversations": turns}), pictures) for url in urls)
    assert all(torch.equal(named[name], whole[name]) for name in named)
    with pytest.raises(BadRow) as caught:
        encode(from_row({"image": "x" * 9999, "conversations": turns}), pictures)
    assert len(caught.value.what) < 300 + len(str(pictures))


def test_videos_that_cannot_be_used_are_bad_rows(pictures, monkeypatch):
    encode = RowEncoder(processor("qwen3_vl"))
    Image.new("RGB", (4, 4)).save(pictures / "clip" / "0.png")
    (pictures / "film.mp4").write_bytes(b"no film")

    def decords(*_, **__):
        raise RuntimeError("[21:26:30] /github/workspace/video_reader.cc:270: [a.mp4] Failed to measure\nits trace")

    monkeypatch.setattr("transformers.video_utils.load_video", decords)
    (pictures / "empty").mkdir()
    for name, reason in (
        ("none", "no such video"),
        ("../clip", "outside"),
        ("clip", "differ in size"),
        ("film.mp4", r"film.mp4 cannot be decoded: \[a.mp4\] Failed to measure$"),
        ("wide.png", "wide.png is a picture, expected a video or a folder of its frames"),
        ("empty", "no picture in this folder"),
    ):
        with pytest.raises(BadRow, match=reason):
            encode(from_llava(said(video=name)), pictures)


@pytest.mark.parametrize("kind", QWEN)
def test_what_the_processor_refuses_is_a_bad_row(kind, pictures):
    """Qwen-VL takes no picture whose sides are more than 200 : 1, and no such film."""
    (pictures / "strip").mkdir()
    for name in ("long.png", "strip/0.png", "strip/1.png"):
        Image.new("RGB", (3000, 10)).save(pictures / name)
    encode = RowEncoder(processor(kind))
    for row in (said(image="long.png", question="<image>"), said(video="strip")):
        for use in (encode, encode.check):
            with pytest.raises(BadRow, match=r"refuses this input: absolute aspect ratio .* 200"):
                use(from_llava(row), pictures)


@pytest.mark.parametrize("kind", QWEN)
def test_a_single_frame_is_its_own_pair(kind, pictures):
    """As the processors of still images have it: pixels are those of the frame twice, tokens those of a pair."""
    single = RowEncoder(processor(kind), video_frames=1)(from_llava(said(video="clip")), pictures)
    twice = RowEncoder(processor(kind))(from_llava(said(video=[["clip/0.png"] * 2])), pictures)
    assert single["video_grid_thw"][0, 0] == 1
    for tensor in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(single[tensor], twice[tensor])
    assert (single["input_ids"] == processor(kind).video_token_id).sum() == single["video_grid_thw"][0].prod() // 4
    text = processor(kind).tokenizer.decode(single["input_ids"])
    assert ("<0.0 seconds>" in text) == (kind == "qwen3_vl")


def test_a_frame_of_tiles_stays_alone(pictures):
    row = RowEncoder(processor("llava_next_video"), video_frames=1)(from_llava(said(video="clip")), pictures)
    assert row["pixel_values_videos"].shape[1] == 1


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(tmp_path):
    made = copy.copy(processor("qwen3_vl"))
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    made.chat_template = refusal + made.chat_template
    encode, row = RowEncoder(made), said(question="what?")
    assert len(encode(from_llava(row))["input_ids"])
    row["conversations"].insert(0, {"from": "system", "value": "be kind"})
    with pytest.raises(BadRow, match=r"the chat template fails: .*no system turns"):
        encode(from_llava(row))


def test_a_video_file_is_read_at_the_rate_that_is_asked_for(tmp_path):
    """Two seconds, five frames each."""
    shades = [Image.new("RGB", (64, 48), (25 * number, 0, 0)) for number in range(10)]
    write_avi(tmp_path / "clip.avi", shades, per_second=5)
    seen = load_video(tmp_path / "clip.avi", Frames(per_second=2.5))
    assert np.allclose(seen.pixels[:, 20, 20, 0], [0, 50, 100, 175, 225], atol=6)
    assert seen.per_second == 2.5
    for rate, groups in ((1.0, 1), (5.0, 5)):
        row = RowEncoder(processor("qwen3_vl"), video_fps=rate)(from_llava(said(video="clip.avi")), tmp_path)
        assert row["video_grid_thw"][0, 0].item() == groups
        assert processor("qwen3_vl").tokenizer.decode(row["input_ids"]).count(" seconds>") == groups


def test_published_templates_are_those_of_llava_models():
    with pytest.raises(PmodError, match=r"template qwen is one of LLaVA models.*<\|image_pad\|>"):
        renderer("qwen", processor("qwen3_vl"))
    assert renderer("qwen", processor("llava_onevision"))


@pytest.mark.parametrize("kind", KINDS)
def test_profile_counts_the_tokens_that_training_is_given(kind, pictures):
    """Several images are not tiled by all families, and a film has tokens too."""
    model = save_stock(pictures / "model", kind)
    sizes = with_limits(Sizes.of(json.loads((model / "config.json").read_text())), model)
    made = processor(kind)
    marks = torch.tensor([made.image_token_id, made.video_token_id])
    given, rows = conversations(kind), []
    for messages, images, videos in given:
        rows.append({"messages": messages, "images": images, "videos": videos})
    (pictures / "rows.json").write_text(json.dumps(rows))
    encode = RowEncoder(made)
    for row, counted in zip(rows, read_rows(pictures / "rows.json", None, sizes, len), strict=True):
        ids = encode(from_messages(row), pictures)["input_ids"]
        assert counted.vision_tokens == int(torch.isin(ids, marks).sum()), row


def test_profile_refuses_a_film_for_a_model_of_images(pictures):
    (pictures / "rows.json").write_text(json.dumps([said(image="wide.png", question="<image>"), said(video="clip")]))
    sizes = Sizes.of(builtin_config("llava-next-7b"))
    with pytest.raises(PmodError, match=r"row 1: it has a video, and LLaVA-NeXT takes images alone"):
        read_rows(pictures / "rows.json", None, sizes, len)


@pytest.mark.parametrize(
    ("image", "reason"),
    [("long.png", "an image of 900 x 2 pixels is too long"), (3, "found int"), ([], "found list"), ({}, "found dict")],
)
def test_profile_names_the_row_of_an_image_that_cannot_be_used(image, reason, pictures):
    Image.new("RGB", (900, 2)).save(pictures / "long.png")
    rows = [said(image="wide.png", question="<image>"), told("<image>?", images=[image])]
    (pictures / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(PmodError, match=f"row 1: .*{reason}"):
        read_rows(pictures / "rows.json", None, Sizes.of(builtin_config("qwen2.5-vl-3b")), len)
