"""Rows that are scored together are drawn together."""

import pytest

from pmod_cli.evaluation.questions import drawn_rows


@pytest.mark.parametrize("task", ["mmbench_en_dev", "mmbench_en_dev_static"])
def test_all_orders_of_the_options_of_a_question(task):
    """20 questions of MMBench at four rows each, as the data has them: first all as they are, then all turned."""
    index = [turn * 1_000_000 + question for turn in range(4) for question in range(20)]
    rows = drawn_rows(task, Rows(index=index), 12, seed=1)
    questions = [index[row] % 1_000_000 for row in rows]
    assert len(rows) == 12
    assert sorted(questions) == sorted([*set(questions)] * 4)
    assert rows != drawn_rows(task, Rows(index=index), 12, seed=2)


def test_both_questions_about_a_picture():
    """Pictures of MME have two rows each; of an odd number the last picture is drawn whole."""
    names = [f"{place % 10}.png" for place in range(20)]
    rows = drawn_rows("mme", Rows(category=["count"] * 20, question_id=names), 5, seed=0)
    drawn = [names[row] for row in rows]
    assert len(rows) == 6
    assert sorted(drawn) == sorted([*set(drawn)] * 2)


class Rows(dict):
    """A data set's columns, with the length of its rows."""

    def __len__(self) -> int:
        return len(next(iter(self.values())))
