"""Planted selections with known overlap and known regions; chance against a brute-force draw."""

from dataclasses import replace

import numpy as np
import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.statistics import image_statistics, in_common, summarise, tokens_on
from tests.visualization.records import anyres_record, cropped_record


def planted(kept: list[list[int]], regions=(), routed=None):
    record = cropped_record(84, 84)  # 12 x 12 patches of 7 x 7 pixels
    mask = np.zeros((len(kept), 144), dtype=bool)
    for layer, tokens in enumerate(kept):
        mask[layer, tokens] = True
    routed = np.ones(len(kept), dtype=bool) if routed is None else np.array(routed)
    return replace(
        record, kept=mask, weight=mask.astype(np.float32), routed=routed, retention=mask.mean(1), regions=regions
    )


def test_overlap_of_neighbours():
    record = planted([list(range(144)), [0, 1, 2, 3], [2, 3], [5, 6]], routed=[False, True, True, True])
    statistics = image_statistics(record)
    np.testing.assert_allclose(statistics.overlap, [np.nan, 1.0, 0.0])
    np.testing.assert_allclose(statistics.overlap_chance, [np.nan, 4 / 144, 2 / 144])
    assert np.isnan(statistics.on_regions).all()


def test_tokens_on_a_region():
    record = planted([[0]], regions=((7.0, 7.0, 21.0, 14.0),))
    assert np.flatnonzero(tokens_on(record)).tolist() == [13, 14]
    record = planted([[0]], regions=((5.0, 0.0, 7.5, 1.0),))  # four fifths in one patch, a fifth in the next
    assert np.flatnonzero(tokens_on(record)).tolist() == [0]
    record = planted([[0]], regions=((6.5, 0.0, 14.0, 7.0), (500.0, 500.0, 510.0, 510.0)))
    assert np.flatnonzero(tokens_on(record)).tolist() == [1]
    record = replace(anyres_record(84, 168), regions=((0.0, 0.0, 168.0, 84.0),))
    assert tokens_on(record).sum() == record.layout.size - 12  # all but the tokens that end rows


def test_share_on_regions_and_chance_as_drawn():
    record = planted([[13, 14, 15, 50], [13], []], regions=((7.0, 7.0, 21.0, 14.0),))
    statistics = image_statistics(record)
    np.testing.assert_allclose(statistics.on_regions, [0.5, 1.0, np.nan])
    on, random = tokens_on(record), np.random.default_rng(0)
    drawn = [on[random.permutation(144)[:4]].mean() for _ in range(20000)]
    assert statistics.on_regions_chance[0] == pytest.approx(np.mean(drawn), rel=0.1)


def test_chance_within_parts():
    """Only base patches kept, blind to the region: better than chance over all tokens, no better than within parts."""
    record = replace(anyres_record(84, 168), regions=((40.0, 20.0, 60.0, 30.0),))
    base, tiles = record.layout.parts
    kept = np.zeros((4, record.layout.size), dtype=bool)
    kept[:, base.tokens.ravel()] = True
    kept[3, tiles.newlines] = True
    statistics = image_statistics(replace(record, kept=kept, routed=np.array([False, True, True, True])))
    on = tokens_on(record)
    assert statistics.on_regions[1] == statistics.on_regions_in_parts[1] == on[base.tokens].mean()
    assert statistics.on_regions_chance[1] == on.mean()
    assert statistics.on_regions[3] == pytest.approx(statistics.on_regions_in_parts[3])
    assert np.isnan(statistics.on_regions_in_parts[0])
    one_part = image_statistics(planted([[13, 14]], regions=((7.0, 7.0, 21.0, 14.0),)))
    assert np.isnan(one_part.on_regions_in_parts).all()
    summary = summarise([statistics, statistics], range(4))
    assert summary["kept_on_regions_in_parts"]["lift"] == pytest.approx(1)
    assert summary["layers"][0]["kept_on_regions_in_parts"] is None


def test_random_selections_have_a_lift_of_one():
    """The interval of the lift holds 1 for selections that are drawn at random."""
    random, images = np.random.default_rng(1), []
    for _ in range(200):
        kept = [random.permutation(144)[:40].tolist() for _ in range(3)]
        images.append(image_statistics(planted(kept, regions=((7.0, 7.0, 42.0, 42.0),))))
    summary = summarise(images, range(3))
    for numbers in (summary["neighbour_overlap"], summary["kept_on_regions"], summary["layers"][1]["kept_on_regions"]):
        low, high = numbers["lift_95"]
        assert low < 1 < high
        assert high - low < 0.2
    assert summary["images"] == summary["images_with_regions"] == 200
    assert summary["layers"][2]["overlap_with_next"] is None


def test_a_selection_on_its_region_has_a_lift():
    summary = summarise([image_statistics(planted([[13, 14]], regions=((7.0, 7.0, 21.0, 14.0),)))] * 3, [0])
    assert summary["kept_on_regions"] == {"mean": 1.0, "by_chance": 0.0139, "lift": 72.0, "lift_95": [72.0, 72.0]}
    assert summary["neighbour_overlap"] is None


def test_in_common():
    common, chance = in_common(planted([[0, 1, 2, 3], [5]]), planted([[2, 3], [6]]))
    np.testing.assert_allclose(common, [1.0, 0.0])
    np.testing.assert_allclose(chance, [4 / 144, 1 / 144])
    with pytest.raises(PmodError, match="cannot be compared: 2 layers of 144"):
        in_common(planted([[0], [1]]), planted([[0]]))
    with pytest.raises(PmodError, match="other places in the image"):
        in_common(cropped_record(84, 84), cropped_record(84, 168))
    with pytest.raises(PmodError, match="different numbers of layers"):
        summarise([image_statistics(planted([[0]])), image_statistics(planted([[0], [1]]))], [0])


def test_with_a_layer_that_keeps_nothing_nothing_is_in_common():
    common, chance = in_common(planted([[0, 1], [2]]), planted([[], [2, 3]]))
    np.testing.assert_allclose(common, [np.nan, 1.0])
    np.testing.assert_allclose(chance, [np.nan, 2 / 144])


def test_tokens_that_are_not_routed_are_kept_by_chance_too():
    """Of 144 tokens every layer keeps the first 100; of the others each draws 20."""
    random, images, halves = np.random.default_rng(1), [], []
    routed_tokens = np.arange(144) >= 100
    for _ in range(200):
        kept = [[*range(100), *(100 + random.permutation(44)[:20])] for _ in range(4)]
        record = replace(planted(kept, regions=((0.0, 0.0, 84.0, 60.0),)), routed_tokens=routed_tokens)
        images.append(image_statistics(record))
        first, second = (replace(record, kept=record.kept[half]) for half in (slice(0, 2), slice(2, 4)))
        halves.append([*in_common(first, second)])
    summary = summarise(images, range(4))
    for numbers in (summary["neighbour_overlap"], summary["kept_on_regions"]):
        low, high = numbers["lift_95"]
        assert low < 1 < high
    common, chance = np.mean(halves, axis=0)
    np.testing.assert_allclose(common, chance, rtol=0.01)
    np.testing.assert_allclose(chance, (100 + 20 * 20 / 44) / 120)


def test_a_layer_that_keeps_nothing_of_the_parts_with_a_box_tells_nothing():
    """It keeps an end of a row alone, which no box touches: chance is 0, and 0 of 0 is no lift."""
    record = replace(anyres_record(84, 168), regions=((40.0, 20.0, 60.0, 30.0),))
    kept = np.zeros((4, record.layout.size), dtype=bool)
    kept[:, record.layout.parts[1].newlines[0]] = True
    ends = image_statistics(replace(record, kept=kept, routed=np.ones(4, dtype=bool)))
    assert summarise([ends], range(4))["kept_on_regions_in_parts"] is None
    kept = np.ones_like(kept)
    whole = image_statistics(replace(record, kept=kept, routed=np.ones(4, dtype=bool)))
    found = summarise([ends, whole, whole], range(4))["kept_on_regions_in_parts"]
    assert (found["lift"], found["lift_95"]) == (1.0, [1.0, 1.0])
