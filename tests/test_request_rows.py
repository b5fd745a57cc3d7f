"""Rows of requests hold every token of every branch once; both branches of guidance are what they are by themselves."""

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from tiny_generator import tiny_generator

from sorax.generate import Request
from sorax.patchify import positions
from sorax.request_rows import Item, Rows, best_fit, groups_of

shapes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
lengths = st.tuples(st.integers(1, 90), st.integers(1, 90))
items = st.lists(st.tuples(shapes, lengths), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@for_all(items, st.integers(100, 2000), st.sampled_from([(0,), (0, 1)]))
def test_rows_hold_every_token_of_every_branch_once(drawn, most, branches):
    made = [Item(shape, tuple(np.arange(2, 2 + n, dtype=np.int32) for n in texts)) for shape, texts in drawn]
    groups = groups_of([item.tokens for item in made], most)
    assert sorted(i for group in groups for i in group) == list(range(len(made)))
    rows = Rows(made, groups, branches)
    arrays = rows.arrays(range(len(groups)))
    R, N = rows.R, rows.N
    assert arrays["segment_ids"].shape == (len(groups) * R, N) and arrays["segment_ids"].max() == rows.segments
    for g, group in enumerate(groups):
        ids, where = arrays["segment_ids"].reshape(-1, R * N)[g], arrays["positions"].reshape(-1, R * N, 3)[g]
        texts = [arrays[name].reshape(len(groups), R, -1)[g] for name in ("text_segment_ids", "text_tokens")]
        assert np.count_nonzero(ids) == len(branches) * sum(made[i].tokens for i in group)
        for i, start in rows.starts(g).items():
            item = made[i]
            for k, b in enumerate(branches):
                places = arrays["places"][g, k, start : start + item.tokens]
                np.testing.assert_array_equal(arrays["source"][g, places], np.arange(start, start + item.tokens))
                np.testing.assert_array_equal(where[places], positions(*item.shape, (1, 1, 1)))
                assert np.all(np.diff(places) == 1) and len(set(ids[places])) == 1 and places[0] // N == places[-1] // N
                text_ids, tokens = (text[places[0] // N] for text in texts)
                caption = tokens[text_ids == ids[places[0]]]  # and one empty slot
                np.testing.assert_array_equal(caption, np.append(item.captions[b], 0))


def test_short_requests_fill_what_others_leave():
    """Five of 300 tokens and five of 90: alone their rows are not full, and both branches are no more rows than two."""
    made, total = [Item((1, 1, n), (np.ones(9, int), np.ones(2, int))) for n in [300] * 5 + [90] * 5], 2 * 5 * 390
    one, two = (Rows(made, groups_of([item.tokens for item in made]), branches) for branches in ((0,), (0, 1)))
    assert two.R * two.N <= 2 * one.R * one.N and two.R * two.N - total <= 0.06 * total
    alone = Rows(made[:1], [[0]], (0, 1))
    assert alone.R * alone.N <= 608  # both branches of one request in one row


def test_best_fit_keeps_within_the_room_for_tokens_and_text():
    rows = best_fit([6, 5, 4, 3, 2], [1, 1, 9, 1, 1], 10, 10)
    assert sorted(rows[0] + rows[1]) == [0, 1, 2, 3, 4] and len(rows) == 2
    assert len(best_fit([1, 1], [6, 6], 10, 10)) == 2


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_is_that_of_both_branches_run_by_themselves(scale):
    """One Euler step from the same noise is linear in the velocity: the guided sample is that mix of the two."""
    generator, how = tiny_generator(), dict(num_steps=1)
    asked = [("a red circle", "blue", (5, 16, 24)), ("b", "a long negative prompt", (1, 16, 16)), ("", "c", (3, 8, 40))]
    prompts, negatives = ([Request(pair[k], *pair[2], seed=i) for i, pair in enumerate(asked)] for k in (0, 1))
    conditional, unconditional = (generator.latents(requests, **how) for requests in (prompts, negatives))
    both = [Request(prompt, *shape, seed=i, negative_prompt=negative) for i, (prompt, negative, shape) in
            enumerate(asked)]  # fmt: skip
    for c, u, made in zip(conditional, unconditional, generator.latents(both, guidance_scale=scale, **how)):
        assert np.abs(c - u).max() > 1e-3
        np.testing.assert_allclose(made, u + scale * (c - u), atol=1e-4 * np.abs(made).max(), rtol=0)
