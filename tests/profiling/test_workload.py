"""What a profile is asked for and cannot be: one sentence each, before a model is built. And K of images apart."""

import json

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.families import ImageTokens
from pmod_cli.profiling.count.workload import Row, Workload
from pmod_cli.profiling.subject import load_subject, scaled


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"videos": ((0, 480, 360),)}, "frames, width and height are 1"),
        ({"image_sizes": ((0, 20),)}, "is empty"),
        ({"image_sizes": ((20, 10**7),)}, "on a side"),
        ({"images": -1}, "is negative"),
        ({"images": 0}, "is no prompt"),
        ({"batch_size": 10**9}, "costs of equal rows are a multiple"),
        ({"images": 10**9}, "images in a batch"),
        ({"text_tokens": 10**12}, "text tokens are more than"),
        ({"new_tokens": 10**12}, "new tokens are more than"),
        ({"batch_size": 1, "image_sizes": ((20, 20), (30, 30))}, "has no room for 2 image sizes"),
    ],
)
def test_what_is_no_prompt_is_refused(asked, said):
    with pytest.raises(PmodError) as refused:
        Workload(**asked)
    assert said in f"{refused.value.what} {refused.value.hint}"


def test_k_of_each_image_and_frame():
    """Ten tokens of an image, and three frames of a film with ten tokens in all: 3, 3 and 4."""
    row = Row((ImageTokens(8, 8, 2, 4, 6, 4), ImageTokens(8, 8, 3, 10, 0, 4, frames=3, video=True)), 5)
    assert [row.routable(which) for which in ("vision_all", "vision_image", "vision_video")] == [20, 10, 10]
    assert row.kept("vision_all", 0.5) == 10
    assert row.kept("vision_all", 0.5, per_image=True) == 5 + 1 + 1 + 2
    assert row.kept("vision_image", 0.5, per_image=True) == 10 + 5


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 32}, "is too small: expected 64 or more"),
        ({"layers": 1}, "is too small: expected 2 or more"),
        ({"layers": 10**7}, "which no model has"),
        ({"hidden_size": 100}, "is no multiple of 64"),
    ],
)
def test_a_size_that_no_model_has_is_refused(sizes, said):
    with pytest.raises(PmodError, match=said):
        scaled(load_subject("llava-next-7b"), **sizes)


def test_a_file_has_no_revision_and_another_model_no_profile(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(PmodError, match="has no revision 'main'"):
        load_subject(str(path), revision="main")
    with pytest.raises(PmodError, match="model_type is 'bert'"):
        load_subject(str(path))
