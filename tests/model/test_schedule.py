"""Retention schedules against the numbers of the paper and of the published code."""

import itertools
import subprocess
import sys

import pytest

from pmod_cli.model import SCHEDULES, PmodSettings, kept_tokens, retention_schedule, solve_shift, takes_shift


def mean(ratios):
    return sum(ratios) / len(ratios)


def test_paper_schedule():
    ratios = retention_schedule("cosine", 32)
    assert ratios[:8] == [1.0] * 8
    assert ratios[24:] == [0.15] * 8
    assert ratios[8] == pytest.approx(0.8444834595)
    assert ratios[15] == pytest.approx(0.5253245844)
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    assert mean(ratios) == pytest.approx(0.5375, abs=1e-12)


@pytest.mark.parametrize(("beta", "expected"), [(0.3, 0.394), (0.4, 0.475), (0.5, 0.5375), (0.6, 0.600)])
def test_beta_sweep(beta, expected):
    assert mean(retention_schedule("cosine", 32, shift=beta)) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind not in ("cosine", "list")])
@pytest.mark.parametrize("layers", [4, 28, 32, 40, 60])
def test_alternatives_have_the_mean_of_the_paper(kind, layers):
    ratios = retention_schedule(kind, layers)
    # A decaying schedule jumps where a layer passes max_ratio: the nearest mean may be half a jump away.
    tolerance = 0.15 / layers if kind == "linear" else 1e-9
    assert len(ratios) == layers
    assert mean(ratios) == pytest.approx(0.5375, abs=tolerance)
    assert all(0 <= ratio <= 1 for ratio in ratios)


def test_shapes_of_the_alternatives():
    stepped = retention_schedule("stepped", 32)
    assert [stepped[i] for i in (0, 8, 16, 24)] == pytest.approx([1, 0.69167, 0.38333, 0.075], abs=1e-4)
    interleaved = retention_schedule("interleaved", 32)
    assert interleaved[::2] == [1.0] * 16
    assert interleaved[1::2] == pytest.approx([0.075] * 16)


def test_40_layers_do_not_turn_up_again():
    ratios = retention_schedule("cosine", 40)
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    assert ratios[-1] == 0.15


def test_shift_is_solved_for_a_mean():
    assert solve_shift("cosine", 32, 0.5375) == pytest.approx(0.5, abs=1e-6)
    for kind in (kind for kind in SCHEDULES if takes_shift(kind)):
        for wanted in (0.3, 0.45, 0.8):
            assert mean(retention_schedule(kind, 32, mean=wanted)) == pytest.approx(wanted, abs=0.0025)


def test_list():
    group = [0.7] * 8 + [0.15] * 8 + [0.7] * 16
    assert retention_schedule("list", 32, values=group) == group
    assert PmodSettings(schedule="list", values=group).routed(32) == [True] * 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cos"}, "unknown schedule 'cos'"),
        ({"kind": "cosine", "shift": 0.5, "mean": 0.5}, "not beside a mean"),
        ({"kind": "constant", "shift": 0.5}, "belongs to the schedules cosine and linear"),
        ({"kind": "constant", "mean": 0.0}, "above 0"),
        ({"kind": "interleaved", "mean": 0.4}, "cannot have a mean retention as low as 0.4"),
        ({"kind": "linear", "mean": 0.1}, "outside 0.150"),
        ({"kind": "list"}, "one ratio per layer"),
        ({"kind": "list", "values": [0.5] * 31}, "expected 32, found 31"),
        ({"kind": "list", "values": [0.5] * 31 + [1.5]}, "layer 31 must be within 0 ... 1, found 1.5"),
        ({"kind": "cosine", "min_ratio": 0.9}, "min_ratio <= max_ratio"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("...", r"\.\.\.")):
        retention_schedule(num_layers=32, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "relu"}, "norm must be one of"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"target_tokens": "all"}, "target_tokens must be one of"),
        ({"shfit": 0.4}, "unknown p-MoD settings shfit"),
    ],
)
def test_bad_pmod_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PmodSettings.from_dict(settings)


def test_settings_survive_json():
    settings = PmodSettings(schedule="list", values=(0.5, 1.0), norm="tanh_0.5_1", string=False)
    assert PmodSettings.from_dict(settings.to_dict()) == settings


def test_k_is_taken_in_float32():
    assert kept_tokens(576, 0.15) == 86
    assert kept_tokens(2880, 0.15) == 432
    assert kept_tokens(0, 0.5) == 0
    ratio = retention_schedule("cosine", 32)[10]
    assert kept_tokens(2365, ratio) != int(2365 * ratio), "the case in which float32 and float64 differ"


def test_schedules_need_no_torch():
    code = "import sys, pmod_cli.model; pmod_cli.model.retention_schedule('cosine', 32); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300, 10**400])
@pytest.mark.parametrize("name", ["shift", "mean", "max_ratio", "min_ratio", "alpha"])
def test_settings_that_are_no_numbers_of_this_world_are_refused(name, number):
    with pytest.raises(ValueError, match=r"found|must be"):
        PmodSettings(**{name: number})


@pytest.mark.parametrize("norm", ["tanh_1..2_1", "tanh_._1", f"tanh_{'9' * 400}_1"])
def test_norms_whose_numbers_are_none_are_refused(norm):
    with pytest.raises(ValueError, match="norm must be one of"):
        PmodSettings(norm=norm)
