"""The order of an epoch: a permutation that need not be made whole, and repeats that follow the weights."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.shuffle import EpochOrder, epoch_counts, fold, permute

PINNED = [10, 8, 5, 0, 6, 11, 4, 7, 9, 1, 3, 2]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 5000), st.integers(0, 2**70))
@example(1, 0)
@example(2, 0)
def test_every_number_stands_at_one_place(size, key):
    np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 10**12), st.integers(0, 2**40), st.data())
def test_any_part_is_a_part_of_the_whole(size, key, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(places, size, key)
    assert (together >= 0).all() and (together < size).all()
    np.testing.assert_array_equal(together, [permute(places[i : i + 1], size, key)[0] for i in range(len(places))])
    assert len(set(together.tolist())) == len(set(places.tolist()))


def test_the_order_is_pinned():
    """An order that changed would give other rows to a resumed run."""
    assert permute(np.arange(12), 12, fold(0, 0)).tolist() == PINNED


def test_orders_are_fair():
    """Each number stands at each place equally often over many keys, next to each other equally often."""
    size, keys = 7, 2100
    orders = np.array([permute(np.arange(size), size, fold(5, k)) for k in range(keys)])
    at = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    # Chi-squared of (size - 1)^2 = 36 degrees of freedom: 36 +- 8.5; five deviations.
    assert ((at - keys / size) ** 2 / (keys / size)).sum() < 36 + 5 * 8.5
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size**2)
    pairs = pairs[~np.eye(size, dtype=bool).ravel()]
    assert ((pairs - keys / 42) ** 2 / (keys / 42)).sum() < 41 + 5 * 9.1
    # A large one has no trend, and neighbours are strangers.
    large = permute(np.arange(100_000), 100_000, 3)
    for lag in (1, 2, 317):  # 317: the side of the rectangle
        assert abs(np.corrcoef(large[lag:], large[:-lag])[0, 1]) < 5 / np.sqrt(100_000)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 5 / np.sqrt(100_000)


def test_keys_differ_by_order_and_number():
    keys = {fold(), fold(0), fold(0, 0), fold(0, 1), fold(1, 0), fold(1), fold(1 << 64 - 1)}
    assert len(keys) == 7


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=40), st.integers(0, 2**40), st.integers(1, 30))
def test_weights_are_kept_to_within_one(weights, seed, epochs):
    weights = np.array(weights)
    total = sum(epoch_counts(weights, seed, epoch) for epoch in range(epochs))
    assert (np.abs(total - weights * epochs) < 1 + 1e-9).all()
    parts = [epoch_counts(weights[k : k + 1], seed, 3, k)[0] for k in range(len(weights))]
    np.testing.assert_array_equal(parts, epoch_counts(weights, seed, 3))


@pytest.mark.parametrize("epoch", [0, 1, 1000, 10**9])
def test_whole_weights_are_exact(epoch):
    for weight in (0, 1, 3):
        assert (epoch_counts(np.full(2000, weight, float), 7, epoch) == weight).all()


def test_epochs_of_half_weights_hold_half_the_samples_each():
    """Phases differ, so that not all samples of weight 0.5 come in the same epoch."""
    counts = epoch_counts(np.full(4000, 0.5), 0, 0)
    assert abs(counts.sum() - 2000) < 5 * np.sqrt(1000)
    assert (counts + epoch_counts(np.full(4000, 0.5), 0, 1) == 1).all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=50), st.integers(0, 9), st.integers(0, 2**30))
def test_an_order_holds_each_sample_as_often_as_it_counts(weights, epoch, seed):
    weights = np.array(weights)
    order = EpochOrder(len(weights), seed, epoch, weights)
    cut = len(order) // 3
    taken = np.concatenate([order.take(0, cut), order.take(cut, len(order))])
    np.testing.assert_array_equal(np.bincount(taken, minlength=len(weights)), epoch_counts(weights, seed, epoch))
