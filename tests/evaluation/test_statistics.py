"""Intervals: the resampled score is lmms-eval's own, its spread the textbook's, and equal seeds pair the questions."""

import numpy as np
import pytest
from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

from pmod_cli.evaluation.statistics import DRAWS, UNKNOWN, interval, sample_of


def yes_or_no(predictions: str, truths: str) -> list[dict]:
    words = {"y": "yes", "n": "no", "?": "perhaps"}
    return [{"prediction": words[p], "ground_truth": words[t]} for p, t in zip(predictions, truths, strict=True)]


@pytest.mark.parametrize(
    ("predictions", "truths", "f1"),
    [
        ("yynn", "ynyn", 0.5),  # one hit, one false alarm, one miss: 2 / (2 + 1 + 1)
        ("yyyy", "yynn", 2 / 3),
        ("??nn", "yynn", 0.0),  # unparseable answers are misses
        ("nnnn", "nnnn", 0.0),
    ],
)
def test_f1_is_that_of_lmms_eval(predictions, truths, f1):
    items = yes_or_no(predictions, truths)
    assert sample_of("pope_f1_score", items).value() == pytest.approx(f1)
    assert pope_aggregate_f1_score(items) == pytest.approx(f1)


def test_interval_of_a_mean_is_the_normal_one():
    items = [1.0] * 300 + [0.0] * 100
    low, high = interval(sample_of("exact_match", items).resampled(seed=0))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.008)
    assert high == pytest.approx(0.75 + half, abs=0.008)


def test_draws_are_as_many_as_promised_and_repeat():
    sample = sample_of("anls", [0.0, 0.5, 1.0])
    assert sample.resampled(seed=3).shape == (DRAWS,)
    assert np.array_equal(sample.resampled(seed=3), sample.resampled(seed=3))
    assert not np.array_equal(sample.resampled(seed=3), sample.resampled(seed=4))


def test_paired_difference_is_narrower_than_its_parts():
    random = np.random.default_rng(0)
    first = (random.random(500) < 0.6).astype(float)
    second = first.copy()
    second[:10] = 0.0
    a, b = (sample_of("exact_match", list(items)).resampled(seed=0) for items in (first, second))
    low, high = interval(a - b)
    alone = np.subtract(*interval(a)[::-1])
    assert high - low < 0.5 * alone
    assert low <= first.mean() - second.mean() <= high


def test_nothing_is_claimed_where_nothing_varies():
    assert interval(sample_of("anls", [0.0] * 9).resampled(seed=0)) == UNKNOWN
    assert sample_of("mme_perception_score", [{"score": 1}]) is None
    assert sample_of("anls", []) is None
