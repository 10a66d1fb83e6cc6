"""Summands: their score is lmms-eval's own, worked out by hand; draws are of the right unit, and pair two models."""

import numpy as np
import pytest
from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator
from lmms_eval.tasks.mme.utils import mme_aggregate_results
from lmms_eval.tasks.mmmu.utils import mmmu_aggregate_results
from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score
from lmms_eval.tasks.seedbench.utils import seed_aggregation_result

from pmod_cli.evaluation import score_sums
from pmod_cli.evaluation.intervals import DRAWS, UNKNOWN, interval, summands


def summands_of(sums, rows):
    return summands(rows, sums)


def records(items, task="t"):
    return [{"task": task, "doc_id": place, "item": item} for place, item in enumerate(items)]


def yes_or_no(predictions: str, truths: str) -> list[dict]:
    words = {"y": "yes", "n": "no", "?": "perhaps"}
    return [{"prediction": words[p], "ground_truth": words[t]} for p, t in zip(predictions, truths, strict=True)]


@pytest.mark.parametrize(
    ("predictions", "truths", "f1"),
    [
        ("yynn", "ynyn", 0.5),  # one hit, one false alarm, one miss: 2 / (2 + 1 + 1)
        ("yyyy", "yynn", 2 / 3),
        ("y?nn", "yynn", 1.0),  # an answer that is neither is no miss for lmms-eval
        ("??nn", "yynn", 0.0),
        ("nnnn", "nnnn", 0.0),
    ],
)
def test_f1_is_that_of_lmms_eval(predictions, truths, f1):
    items = yes_or_no(predictions, truths)
    assert summands_of(score_sums.f1, records(items)).value() == pytest.approx(f1)
    assert pope_aggregate_f1_score(items) == pytest.approx(f1)


def test_pope_is_the_mean_of_its_splits():
    """2/3 on one split and 1 on the other; each split is drawn by itself, so no draw is without one of them."""
    rows = records(yes_or_no("yyyy", "yynn"), "pope_adv") + records(yes_or_no("yynn", "yynn"), "pope_pop")
    whole = summands_of(score_sums.f1, rows)
    assert whole.value() == pytest.approx((2 / 3 + 1) / 2)
    alone = summands_of(score_sums.f1, rows[4:]).resampled(seed=0)
    assert set(np.unique(alone)) == {0.0, 1.0}, "a draw without a yes has F1 0"
    assert whole.resampled(seed=0).max() == 1.0


def mme_items():
    """Existence: (200 + 50) / 2 = 125. Count: 0. So 125 in all; two categories, three pictures."""
    table = [("existence", "a", 1), ("existence", "a", 1), ("existence", "b", 1), ("existence", "b", 0)]
    table += [("count", "a", 0), ("count", "a", 0)]
    return [{"category": kind, "question_id": picture, "score": float(score)} for kind, picture, score in table]


def test_mme_draws_pictures_not_questions():
    whole = summands_of(score_sums.mme, records(mme_items()))
    assert whole.value() == mme_aggregate_results(mme_items()) == 125.0
    assert whole.units == [("existence", "a"), ("existence", "b"), ("count", "a")]
    # Two pictures of existence drawn twice: 200, 125 or 50; drawing questions would give other sums.
    assert set(np.unique(whole.resampled(seed=0))) == {50.0, 125.0, 200.0}
    assert summands_of(score_sums.mme, records(mme_items()[:3])) is None, "half a picture"
    assert summands_of(score_sums.mme, records([*mme_items(), None])).value() == 125.0, "cognition is apart"


def test_seed_counts_images_only():
    items = [{"pred": "a", "answer": "A"}, {"pred": "T", "answer": "A"}, {"pred": "", "answer": "B"}]
    whole = summands_of(score_sums.seed, records([*items, None]))
    assert whole.value() == pytest.approx(seed_aggregation_result(items)) == pytest.approx(1 / 3)
    assert len(whole.units) == 3


def test_mmmu_is_right_or_wrong_per_question():
    one = {"subdomain": "Art", "question_type": "multiple-choice", "answer": "B", "parsed_pred": ["B"]}
    items = [
        {"id": "validation_Art_1", **one},
        {"id": "validation_Art_2", **one, "parsed_pred": ["C"]},
        {"id": "validation_Art_3", **one, "question_type": "open", "answer": "12", "parsed_pred": [[12.0, "about 12"]]},
    ]
    assert mmmu_aggregate_results(items) == pytest.approx(2 / 3, abs=1e-5)
    assert summands_of(score_sums.mmmu, records(items)).value() == pytest.approx(2 / 3)


def mmbench_item(index, prediction, answer="B"):
    options = dict(zip("ABCD", ("cat", "dog", "fox", float("nan")), strict=True))
    about = {"question": "q", "hint": "nan", "source": "s", "split": "dev", "category": "c", "L2-category": "l"}
    return {"index": index, "prediction": prediction, "answer": answer, **options, **about}


def test_mmbench_units_are_questions_with_all_their_turns():
    items = [
        mmbench_item(1, "B"),
        mmbench_item(1_000_001, "A. cat", answer="A"),
        mmbench_item(2, "B"),
        mmbench_item(1_000_002, "no idea"),  # one turn of four unread: the question is wrong
        mmbench_item(3, "it is a dog"),
        mmbench_item(4, ""),
    ]
    overall, _, _ = mmbench_evaluator.eval_result([dict(item) for item in items], eval_method="static")
    whole = summands_of(score_sums.mmbench, records(items))
    assert overall == 0.5
    assert whole.value() == 50.0
    assert len(whole.units) == 4
    assert summands_of(score_sums.mmbench, records([{"score": 3}])) is None, "another benchmark's judge"


def test_interval_of_a_mean_is_the_normal_one():
    items = [1.0] * 300 + [0.0] * 100
    low, high = interval(summands_of(score_sums.means, records(items)).resampled(seed=0))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.008)
    assert high == pytest.approx(0.75 + half, abs=0.008)


def test_interval_covers_as_often_as_it_says():
    """200 benchmarks of 300 questions whose true score is 0.3: the interval holds it in about 95 % of them."""
    random = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = interval(summands_of(score_sums.means, records(list(random.random(300) < 0.3))).resampled(seed))
        held += low <= 0.3 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_draws_are_as_many_as_promised_and_repeat():
    sample = summands_of(score_sums.means, records([0.0, 0.5, 1.0]))
    assert sample.resampled(seed=3).shape == (DRAWS,)
    assert np.array_equal(sample.resampled(seed=3), sample.resampled(seed=3))
    assert not np.array_equal(sample.resampled(seed=3), sample.resampled(seed=4))


def test_paired_difference_is_narrower_than_its_parts():
    random = np.random.default_rng(0)
    first = (random.random(500) < 0.6).astype(float)
    second = first.copy()
    second[:10] = 0.0
    a, b = (summands_of(score_sums.means, records(list(items))).resampled(seed=0) for items in (first, second))
    low, high = interval(a - b)
    alone = np.subtract(*interval(a)[::-1])
    assert high - low < 0.5 * alone
    assert low <= first.mean() - second.mean() <= high


def test_nothing_is_claimed_where_nothing_varies_or_is_known():
    assert interval(summands_of(score_sums.means, records([0.0] * 9)).resampled(seed=0)) == UNKNOWN
    perfect = [{"prediction": said, "ground_truth": said} for said in ["yes", "no"] * 5]
    few = summands_of(score_sums.f1, records(perfect)).resampled(seed=[0, 1])
    assert set(few) == {0.0, 1.0}, "a draw without a yes"
    assert interval(few) == UNKNOWN
    rounded = np.array([30.000000000000004 - 10 - 20] * 500 + [10.0] * 500)
    assert 0 < rounded.min() < 1e-14
    assert interval(rounded) == (0.0, 10.0), "a rounding error is not above zero"
    assert summands_of(score_sums.means, records([{"a": 1}])) is None
    assert summands_of(score_sums.means, records([])) is None
    assert summands_of(score_sums.means, records([None])) is None
