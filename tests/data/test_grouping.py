"""Batches of one modality: no row is lost, lengths are even, the order is the seed's."""

import numpy as np
import pytest

from pmod_cli.data.collator import ModalityBatches


def lengths(count=1000, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(1, 400, count) * random.choice([1, 1, -1], count)


@pytest.mark.parametrize(("batch", "batches"), [(4, 1), (4, 6), (1, 3), (7, 2)])
def test_batches_are_all_image_or_all_text_and_no_row_is_lost(batch, batches):
    sizes = lengths()
    order = list(ModalityBatches(sizes, batch, batches, seed=3))
    assert len(order) == len(ModalityBatches(sizes, batch, batches))
    assert set(order) == set(range(1000))
    assert len(order) - 1000 < 2 * batch * batches
    groups = np.array(order).reshape(-1, batch * batches)  # one a step: the same kind on every process
    assert all(len(set(np.sign(sizes[group]))) == 1 for group in groups)


def test_batches_are_evenly_long_and_the_order_is_seed_and_epoch():
    sizes = lengths()
    sampler = ModalityBatches(sizes, 8, 4, seed=1)
    first = list(sampler)
    assert first == list(sampler) == list(ModalityBatches(sizes, 8, 4, seed=1))
    assert first != list(ModalityBatches(sizes, 8, 4, seed=2))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    resumed = ModalityBatches(sizes, 8, 4, seed=1)
    resumed.set_epoch(1)
    assert list(resumed) == second
    totals = np.abs(sizes[np.array(first)]).reshape(-1, 4, 8).sum(axis=2)
    plain = np.abs(sizes[np.random.default_rng(0).permutation(960)]).reshape(-1, 4, 8).sum(axis=2)
    assert np.ptp(totals, axis=1).mean() < 0.3 * np.ptp(plain, axis=1).mean()


def test_one_kind_alone_is_grouped_too():
    assert sorted(ModalityBatches(np.array([5, 3, 9, 1]), 2)) == [0, 1, 2, 3]
    assert sorted(ModalityBatches(np.array([-5, -3, -9]), 2, 2)) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])
