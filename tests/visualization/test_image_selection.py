"""The layers that are asked for, and the record as JSON."""

import json

import numpy as np
import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.image_selection import parse_layers
from tests.visualization.records import anyres_record


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2,14,26", [2, 14, 26]),
        ("2-5", [2, 3, 4, 5]),
        (" 9 , 0-1,1", [0, 1, 9]),
        ("31", [31]),
        ("ALL", list(range(32))),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text, 32) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("99", r"there is no layer 99; the model's layers are 0\.\.31"),
        ("2-99", "there is no layer 99"),
        ("5-2", "the range 5-2 runs backwards"),
        ("two", "'two' is neither a layer nor a range"),
        ("", "'' is neither a layer nor a range"),
        ("-3", "'-3' is neither a layer nor a range"),
    ],
)
def test_wrong_layers(text, message):
    with pytest.raises(PmodError, match=message) as caught:
        parse_layers(text, 32)
    assert caught.value.code == 2
    assert caught.value.hint


def test_json_holds_every_token_and_the_asked_layers():
    record = anyres_record(height=84, width=168)
    written = json.loads(json.dumps(record.to_dict([0, 3])))
    tokens = written["tokens"]
    assert [token["token"] for token in tokens] == list(range(record.layout.size))
    assert tokens[0] == {"token": 0, "part": "base", "row": 0, "column": 0, "box_px": [0, 0, 14, 7]}
    last = tokens[-1]
    assert (last["part"], last["row"], last["column"], last["box_px"]) == ("tiles", 11, None, None)
    assert tokens[-2]["box_px"] == [161, 77, 168, 84]
    plain, routed = written["layers"]
    assert (plain["layer"], plain["routed"], plain["kept_tokens"]) == (0, False, record.layout.size)
    assert routed["kept"] == np.flatnonzero(record.kept[3]).tolist()
    assert len(routed["weights"]) == record.layout.size
