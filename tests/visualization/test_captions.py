"""What pictures and pages say of weights, questions and letters is true of the selection that they show."""

from dataclasses import replace
from xml.dom import minidom

import numpy as np
import pytest

from pmod_cli import visualization
from pmod_cli.visualization import asked_blindly, draw
from tests.visualization.records import anyres_record
from tests.visualization.test_selection_page import data_of

LAST = 3


def holding(record):
    """The record with weights in layer 2, and a last layer that has no router and holds what layer 2 chose."""
    weight = np.ones_like(record.weight)
    weight[2] = 0.2 + np.arange(record.layout.size) / 1000
    return replace(record, weight=weight)


def test_a_layer_that_holds_a_choice_has_no_weights_to_show():
    record = holding(anyres_record(84, 168))
    assert record.weighted.tolist() == [False, False, True, False]
    assert data_of(visualization.html_page(record))["weighted"] == [False, False, True, False]
    words = [text.get_text() for text in draw(record, range(4), "weights").texts]
    assert f"{0.2 + (record.layout.size - 1) / 1000:.3f}" in words  # the scale ends at the router's own, not at 1
    assert "1.000" not in words


def test_new_routers_tie_and_the_first_tokens_are_the_first_in_rank():
    record = anyres_record(84, 168, router_state="untrained")
    record = replace(record, weight=np.ones_like(record.weight))
    assert record.weighted.tolist() == record.routed.tolist()
    assert not replace(record, chosen_by="fastv").weighted.any()  # on new weights, and it has no routers


@pytest.mark.parametrize(("chosen_by", "blind"), [("router", True), ("divprune", True), ("fastv", False)])
def test_what_reads_the_question_is_not_called_blind(chosen_by, blind):
    record = anyres_record(84, 168, chosen_by=chosen_by)
    assert asked_blindly(record, replace(record, question="Where?")) == blind
    other = replace(record, question="Where?", kept=np.roll(record.kept, 1, axis=1))  # of another budget, such as K
    assert not asked_blindly(record, other)


@pytest.mark.parametrize("mode", ["kept", "schedule"])
def test_control_characters_leave_an_svg_that_can_be_read(tmp_path, mode):
    record = anyres_record(84, 168, question="a\x01b\x1b[31m", answer="\x08 -- ]]>")
    visualization.save(draw(record, [2], mode), tmp_path / "a.svg")
    assert minidom.parse(str(tmp_path / "a.svg"))
