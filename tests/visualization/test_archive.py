"""A saved selection comes back as it was, without a pickle; anything else is refused in a sentence."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.archive import load_npz, save_npz
from tests.visualization.records import anyres_record, film_record, padded_record, record_of


def test_a_film_keeps_its_frames(tmp_path):
    record = film_record(3)
    save_npz(record, tmp_path / "a.npz")
    assert load_npz(tmp_path / "a.npz").layout.frames == 3


@pytest.mark.parametrize("make", [anyres_record, padded_record])
def test_round_trip(tmp_path, make):
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    record = make(60, 90, image=picture, notes=("first of 3 frames",), regions=((1.0, 2.0, 30.0, 40.0),), answer=None)
    record = replace(record, model_notes=("a toy model",))
    save_npz(record, tmp_path / "a.npz")
    back = load_npz(tmp_path / "a.npz")
    for name in ("kept", "weight", "routed", "retention"):
        assert getattr(back, name).dtype == getattr(record, name).dtype
        np.testing.assert_array_equal(getattr(back, name), getattr(record, name))
    assert back.image.tobytes() == picture.tobytes()
    layers = range(record.num_layers)
    assert back.to_dict(layers) == record.to_dict(layers)
    assert (back.notes, back.model_notes) == (record.notes, record.model_notes)
    np.testing.assert_array_equal(back.layout.boxes(clip=False), record.layout.boxes(clip=False))
    with np.load(tmp_path / "a.npz") as arrays:  # for a reader who has NumPy alone
        np.testing.assert_array_equal(arrays["boxes_px"], record.layout.boxes())


def test_tokens_that_are_not_routed_are_told(tmp_path):
    record = anyres_record(60, 90)
    routed_tokens = np.arange(record.layout.size) >= record.layout.parts[0].size
    record = replace(record, kept=record.kept | ~routed_tokens, routed_tokens=routed_tokens)
    save_npz(record, tmp_path / "a.npz")
    np.testing.assert_array_equal(load_npz(tmp_path / "a.npz").routed_tokens, routed_tokens)
    save_npz(replace(record, kept=record.kept & routed_tokens | ~record.routed[:, None]), tmp_path / "b.npz")
    with pytest.raises(PmodError, match="tokens that are not routed are kept by every layer"):
        load_npz(tmp_path / "b.npz")


def test_a_file_from_before_notes_were_kept_apart_is_read(tmp_path):
    save_npz(anyres_record(60, 90, notes=("a toy model",)), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        changed = dict(arrays)
    about = json.loads(str(changed["about"]))
    del about["model_notes"]
    np.savez(tmp_path / "old.npz", **changed | {"about": np.array(json.dumps(about))})
    assert load_npz(tmp_path / "old.npz").all_notes == ("a toy model",)


def test_what_is_no_selection_is_refused(tmp_path):
    record = anyres_record(60, 90)
    save_npz(record, tmp_path / "good.npz")
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.npz").write_text("no arrays")
    np.savez(tmp_path / "other.npz", numbers=np.arange(3))
    np.savez(tmp_path / "pickle.npz", about=np.array([{"format": 1}], dtype=object))
    with np.load(tmp_path / "good.npz") as arrays:
        changed = dict(arrays)
    np.savez(tmp_path / "fewer.npz", **changed | {"kept": changed["kept"][:, :-1]})
    about = json.loads(str(changed["about"])) | {"format": 99}
    np.savez(tmp_path / "newer.npz", **changed | {"about": np.array(json.dumps(about))})
    for name in ("cut", "words", "other", "pickle", "fewer", "newer"):
        with pytest.raises(PmodError, match=rf"{name}\.npz is not a selection that pmod wrote") as caught:
            load_npz(tmp_path / f"{name}.npz")
        assert caught.value.code == 2
    with pytest.raises(PmodError, match="no such selection file"):
        load_npz(tmp_path / "none.npz")


DRAW = """
import resource, sys
import matplotlib.backends.backend_agg, matplotlib.figure, numpy, PIL.Image
from pathlib import Path
import pmod_cli.visualization as v
def seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before = seconds()
record = v.load_npz(Path(sys.argv[1]))
v.save(v.draw(record, range(record.num_layers), sys.argv[2]), Path(sys.argv[3]))
assert "torch" not in sys.modules
print(seconds() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.timing
@pytest.mark.parametrize("mode", ["kept", "weights"])
def test_a_7b_selection_is_drawn_in_three_seconds_and_a_gigabyte(tmp_path, mode):
    """32 layers of 2,928 tokens, from a saved file, in a process of its own: reading, drawing and writing."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from tests.visualization.records import image_layout

    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    layout = image_layout(processor, 14, 1000, 1000)
    assert layout.size == 2928
    random = np.random.default_rng(0)
    weight = random.normal(1, 0.05, (32, 2928)).astype(np.float32)
    retention = np.linspace(1.3, 0.15, 32)
    plain = retention > 0.85
    retention[plain], weight[plain] = 1, 1
    cut = [np.quantile(row, 1 - ratio) for row, ratio in zip(weight, retention, strict=True)]
    kept = weight >= np.array(cut)[:, None]
    picture = Image.fromarray(random.integers(0, 255, (1000, 1000, 3), dtype=np.uint8))
    planted = {"kept": kept, "weight": weight, "routed": retention < 1, "retention": retention, "image": picture}
    record = replace(record_of(layout, layers=32), **planted)
    save_npz(record, tmp_path / "large.npz")
    command = [sys.executable, "-c", DRAW, str(tmp_path / "large.npz"), mode, str(tmp_path / "large.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    seconds, gigabytes = map(float, run.stdout.split())
    assert seconds <= 3
    assert gigabytes <= 1
