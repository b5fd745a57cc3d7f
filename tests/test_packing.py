"""The pack plan: every sample once an epoch, rows never overfull and nearly full, ranks equally loaded."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.packing import PackPlan, plan_epoch, token_costs
from data_pipelines.shuffle import epoch_counts
from sorax.errors import UserError

ROW_TOKENS, ROW_TEXT = 40, 24
PINNED = [[12, 11, 8], [12, 11, 8], [10, 9, 7, 15], [6, 19, 18, 5], [14, 1, 13, 0], [4, 17, 16, 3, 2]]
samples = st.lists(st.tuples(st.integers(1, ROW_TOKENS), st.integers(1, ROW_TEXT)), min_size=1, max_size=80)
SETTINGS = dict(row_tokens=ROW_TOKENS, row_text=ROW_TEXT, max_segments=5, seed=0)


def plan_of(pairs, epoch=0, **settings_):
    video, text = np.array(pairs).T
    return plan_epoch(video, text, epoch=epoch, **SETTINGS | settings_)


def realistic_mix(n=6000, row_tokens=16384):
    """Lengths of 30 % images and 70 % clips of 17-121 frames, 256p to 720p, four shapes, that fit in a row."""
    rng = np.random.default_rng(0)
    frames = np.where(rng.random(n) < 0.3, 1, 4 * rng.integers(4, 31, n) + 1)
    side = rng.choice([256, 360, 480, 720], n, p=[0.4, 0.3, 0.2, 0.1])
    aspect = rng.choice([1, 4 / 3, 16 / 9], n)
    video = ((frames - 1) // 4 + 1) * (side // 16) * (side * aspect // 16).astype(int)
    fits = video <= row_tokens
    return video[fits], rng.integers(20, 200, fits.sum())


def rows_of(plan):
    return [plan.row(r).tolist() for r in range(len(plan))]


def new_rows(plan):
    return np.setdiff1d(np.arange(len(plan)), plan.repeated_rows)


# Chunks of 7 samples: the small epochs of these tests have a dozen.
@settings(deadline=None, max_examples=150)
@given(samples, st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(0, 3), st.sampled_from([7, 999]))
def test_every_sample_exactly_once_but_for_the_named_repeats(pairs, ranks, rows_per_rank, window, epoch, chunk):
    step = ranks * rows_per_rank
    plan = plan_of(pairs, ranks=ranks, rows_per_rank_step=rows_per_rank, window=window, epoch=epoch, chunk=chunk)
    once = np.concatenate([plan.row(r) for r in new_rows(plan)])
    np.testing.assert_array_equal(np.sort(once), np.arange(len(pairs)))
    assert len(plan) % step == 0 and plan.repeated == len(plan) - len(new_rows(plan))
    if len(new_rows(plan)) > step:
        assert plan.repeated < step  # only the last step is filled up
    there = {tuple(plan.row(r)) for r in new_rows(plan)}
    assert all(tuple(plan.row(r)) in there for r in plan.repeated_rows)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 3), min_size=1, max_size=40), st.integers(0, 5), st.integers(1, 3))
def test_weighted_samples_come_as_often_as_they_count(weights, epoch, ranks):
    weights = np.array([1.0, *weights])
    lengths = np.arange(len(weights)) % 13 + 1
    settings_ = dict(row_tokens=40, row_text=24, seed=2, ranks=ranks, chunk=10, window=5)
    plan = plan_epoch(lengths, lengths, weights=weights, epoch=epoch, **settings_)
    drawn = [plan.row(r) for r in new_rows(plan)]
    counts = np.bincount(np.concatenate(drawn), minlength=len(weights))
    np.testing.assert_array_equal(counts, epoch_counts(weights, 2, epoch))


@settings(deadline=None, max_examples=150)
@given(samples, st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.sampled_from([7, 999]))
def test_no_row_exceeds_any_capacity(pairs, max_segments, ranks, window, chunk):
    plan = plan_of(pairs, max_segments=max_segments, ranks=ranks, window=window, chunk=chunk)
    video, text = np.array(pairs).T
    for members in rows_of(plan):
        assert 1 <= len(members) <= max_segments
        assert video[members].sum() <= ROW_TOKENS and text[members].sum() <= ROW_TEXT


@pytest.mark.parametrize("row_tokens", [4095, 5000, 16384, 40_000])
def test_no_row_exceeds_a_room_that_is_counted_in_units(row_tokens):
    rng = np.random.default_rng(0)
    video = rng.integers(1, row_tokens + 1, 3000)
    video[:50] = row_tokens - np.arange(50)
    plan = plan_epoch(video, np.ones(3000, int), row_tokens=row_tokens, row_text=99, seed=0, epoch=0)
    sums = np.add.reduceat(video[plan.samples], plan.row_starts[:-1])
    assert sums.max() <= row_tokens and len(plan.samples) == 3000


@settings(deadline=None, max_examples=40)
@given(samples, st.integers(0, 2**40), st.integers(0, 2**40), st.data())
def test_rows_do_not_depend_on_the_order_in_which_they_are_asked_for(pairs, seed, epoch, data):
    """Nor on the process that asks: a plan that has been pickled knows the beginnings of its chunks."""
    settings_ = dict(seed=seed, ranks=2, chunk=9, window=4)
    whole = rows_of(plan_of(pairs, epoch=epoch, **settings_))
    video, text = np.array(pairs).T
    plans = PackPlan(video, text, **SETTINGS | settings_)
    for _ in range(4):
        row = data.draw(st.integers(0, len(whole) - 1))
        assert plans.epoch(epoch).row(row).tolist() == whole[row]
        plans = pickle.loads(pickle.dumps(plans))
    assert not plans.epoch(epoch).holds(len(whole))
    with pytest.raises(IndexError):
        plans.epoch(epoch).row(len(whole))


@settings(deadline=None, max_examples=40)
@given(samples, st.integers(1, 3), st.booleans())
def test_epochs_follow_each_other(pairs, ranks, weighted):
    video, text = np.array(pairs).T
    weights = np.linspace(1, 2, len(pairs)) if weighted else None
    plans = PackPlan(video, text, weights=weights, **SETTINGS, ranks=ranks, chunk=8)
    index = 0
    for epoch in range(5):
        rows = rows_of(plans.epoch(epoch))
        assert plans.locate(index) == (epoch, 0) and plans.locate(index + len(rows) - 1) == (epoch, len(rows) - 1)
        fresh = PackPlan(video, text, weights=weights, **SETTINGS, ranks=ranks, chunk=8)
        assert fresh.row(index + len(rows) // 2).tolist() == rows[len(rows) // 2]
        index += len(rows)
    assert plans.row(0).tolist() == plans.epoch(0).row(0).tolist()  # and back


def test_only_what_is_needed_is_planned():
    video, text = realistic_mix()
    plans = PackPlan(video, text, row_tokens=16384, row_text=2048, seed=0, chunk=500)
    asked = []
    order = plans.order
    plans.order = lambda epoch: asked.append(epoch) or order(epoch)
    plans.row(3)
    assert asked == [0] and not plans.epoch(0).complete
    plan = plans.epoch(0)
    made, make = [], plan._make
    plan._make = lambda chunk: made.append(chunk) or make(chunk)
    rows = len(plan)
    assert made == list(range(made[0], len(plan._edges) - 1)) and len(made) > 5  # the first ones are there
    made.clear()
    plan.row(rows // 2)
    assert len(made) == 1  # any row costs one chunk once the epoch has been planned


def test_settings_lengths_weights_and_seed_are_the_identity_and_change_the_rows():
    video, text = realistic_mix(300)
    base = dict(row_tokens=16384, row_text=2048, max_segments=None, seed=0)
    longer = np.where(np.arange(len(text)) == 7, text + 1, text)
    ones = np.ones(len(text))
    plans = [
        PackPlan(video, text, **base),
        PackPlan(video, longer, **base),
        PackPlan(video, text, weights=ones, **base),
        PackPlan(video, text, weights=1.5 * ones, **base),
        *(
            PackPlan(video, text, **base | other)
            for other in (dict(seed=1), dict(row_text=2049), dict(ranks=2), dict(window=9), dict(cost_b=1.0),
                          dict(max_segments=7), dict(chunk=99), dict(rows_per_rank_step=2), dict(row_tokens=16385))
        ),
    ]  # fmt: skip
    assert len({plan.identity for plan in plans}) == len(plans)
    assert PackPlan(video, text, **base).identity == plans[0].identity
    orders = [plan_epoch(video, text, epoch=epoch, **base | dict(seed=seed)).samples for seed, epoch in
              ((0, 0), (1, 0), (0, 1), (1, 1))]  # fmt: skip
    assert len({order.tobytes() for order in orders}) == 4


def test_weight_one_is_no_weight():
    video, text = realistic_mix(300)
    base = dict(row_tokens=16384, row_text=2048, seed=0, epoch=3)
    plain, weighted = (plan_epoch(video, text, weights=w, **base) for w in (None, np.ones(len(video))))
    np.testing.assert_array_equal(plain.samples, weighted.samples)
    np.testing.assert_array_equal(plain.row_starts, weighted.row_starts)


def test_plan_is_pinned():
    """A change of numpy or of the algorithm that gives other rows to a resumed run must not go unseen."""
    plan = plan_of([(i % 13 + 3, i % 7 + 1) for i in range(20)], ranks=2, chunk=12)
    assert rows_of(plan) == PINNED


def test_rows_are_full_on_a_realistic_mix():
    video, text = realistic_mix()
    plan = plan_epoch(video, text, row_tokens=16384, row_text=2048, seed=0, epoch=0)
    assert plan.fill >= 0.994
    lengths = video[plan.samples].sum() / (len(plan) * 16384)
    assert plan.fill == pytest.approx(lengths)  # one rank: no row is repeated
    assert plan.text_fill == pytest.approx(text.sum() / (len(plan) * 2048))


def test_chunks_cost_no_fill():
    video, text = realistic_mix()
    base = dict(row_tokens=16384, row_text=2048, seed=0, epoch=0, ranks=4)
    whole, chunked = (plan_epoch(video, text, chunk=chunk, **base) for chunk in (1 << 20, 700))
    assert len(chunked._edges) > 6
    assert chunked.fill >= whole.fill - 0.001 and chunked.repeated < 4 and len(chunked) <= len(whole) + 4


def test_gaps_are_filled_by_pairs():
    """60 + 22 + 18 and 35 + 35 + 30: to take the largest that fits, 35 with 60 and 60 with 35, would leave 5."""
    video = np.repeat([60, 22, 18, 35, 30], [300, 300, 300, 300, 150])
    plan = plan_epoch(video, np.ones(len(video), int), row_tokens=100, row_text=99, seed=0, epoch=0)
    assert plan.fill > 0.99


def test_text_may_be_what_a_row_runs_out_of():
    rng = np.random.default_rng(0)
    video, text = rng.integers(1, 10, 2000), rng.integers(50, 200, 2000)
    plan = plan_epoch(video, text, row_tokens=1000, row_text=1000, seed=0, epoch=0)
    assert np.add.reduceat(text[plan.samples], plan.row_starts[:-1]).max() <= 1000
    assert plan.text_fill > 0.93


def test_no_sample_waits_longer_than_the_window():
    """With one giant among many small samples that fit better, the giant still leaves in its turn."""
    video = np.full(4000, 10)
    video[0] = 95  # fits in a row only alone
    where = []
    for epoch in range(5):
        plan = plan_epoch(video, np.ones(4000, int), row_tokens=100, row_text=99, seed=0, epoch=epoch, window=8)
        where.append(int(np.flatnonzero(plan.samples == 0)[0] // 10))
    assert len(set(where)) > 1 and min(where) < 390  # not collected at the end of the epoch


@pytest.mark.parametrize("ranks, rows_per_rank, limit", [(8, 1, 1.01), (8, 4, 1.005), (64, 1, 1.025)])
@pytest.mark.parametrize("chunk", [1500, 1 << 20])
def test_ranks_carry_equal_cost(ranks, rows_per_rank, limit, chunk):
    video, text = realistic_mix()
    cost_a, cost_b = token_costs(1536, 8960)
    costs = dict(cost_a=cost_a, cost_b=cost_b, ranks=ranks, rows_per_rank_step=rows_per_rank, chunk=chunk)
    plan = plan_epoch(video, text, row_tokens=16384, row_text=2048, seed=0, epoch=0, **costs)
    cost = np.array([(cost_a * video[s] + cost_b * video[s] ** 2).sum() for s in map(plan.row, range(len(plan)))])
    load = cost.reshape(-1, ranks, rows_per_rank).sum(axis=2)
    imbalance = load.max(axis=1).sum() / load.mean(axis=1).sum()
    assert plan.imbalance == pytest.approx(imbalance)
    assert imbalance <= limit
    # In the order of arrival, the same rows are far from balanced: the order is what does it.
    shuffled = np.random.default_rng(0).permutation(cost).reshape(load.shape + (rows_per_rank,)).sum(axis=2)
    assert shuffled.max(axis=1).sum() / shuffled.mean(axis=1).sum() > 1.5 * (limit - 1) + 1
    # Steps come in no order of cost.
    steps = load.sum(axis=1)
    assert abs(np.corrcoef(np.arange(len(steps)), steps)[0, 1]) < 4 / np.sqrt(len(steps))


def test_memory_is_that_of_a_chunk():
    """However long the epoch: what is kept of a chunk is the few samples that wait at its beginning."""
    video = np.random.default_rng(0).integers(1, 100, 30_000).astype(np.int32)
    settings_ = dict(row_tokens=1000, row_text=1000, seed=0, epoch=0)
    peaks = []
    for chunk in (1000, 1 << 20):
        tracemalloc.start()
        plan = plan_epoch(video, video, chunk=chunk, window=64, **settings_)
        assert plan.num_steps > 1450
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        if chunk == 1000:
            assert len(pickle.dumps(plan)) < 2 * video.nbytes + 30 * (64 * 8 + 1000)
    assert peaks[0] < 0.4 * peaks[1]


def test_fewer_rows_than_a_step_repeat_and_say_so():
    plan = plan_of([(30, 2), (30, 2), (30, 2)], ranks=4, rows_per_rank_step=2)
    assert len(plan) == 8 and plan.num_steps == 1 and plan.repeated == 5
    counts = np.bincount(plan.samples)
    assert counts.min() >= 2 and counts.max() <= 3


def test_steps_larger_than_a_chunk_repeat_no_more_than_they_must():
    plan = plan_of([(30, 2)] * 500, ranks=100, chunk=7)
    assert len(plan) == 500 and plan.repeated == 0
    assert plan_of([(30, 2)] * 501, ranks=100, chunk=7).repeated == 99


def test_a_sample_larger_than_a_row_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"sample 1 has 41 video tokens, but a row holds 40: .*at least 41"):
        plan_of([(3, 3), (41, 3)])
    with pytest.raises(UserError, match=r"b\.mp4 has 30 text tokens, .* \(1 more do not fit either\).*at least 30"):
        plan_of([(3, 26), (4, 30)], names=["a.mp4", "b.mp4"].__getitem__)
    with pytest.raises(UserError, match=r"sample 0 has no video tokens"):
        plan_of([(0, 3)])
    with pytest.raises(UserError, match="empty"):
        plan_epoch([], [], row_tokens=4, row_text=4, seed=0, epoch=0)


def test_impossible_weights_are_refused():
    for weights, message in (([1, -1], "b has weight -1"), ([np.nan, 1], "a has weight nan"), ([0.2, 0.3], "add up")):
        with pytest.raises(UserError, match=message):
            plan_of([(3, 3), (4, 3)], weights=weights, names="ab".__getitem__)
