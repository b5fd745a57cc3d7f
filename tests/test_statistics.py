"""Cells: rates and means with intervals that cover, and pass@k without bias."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sorax.metrics import wilson_interval
from sorax.statistics import mean_cell, pass_at, rate_cell, reliability


def test_rates_leave_out_what_is_not_asked():
    cell = rate_cell([True, None, False, True, None])
    assert (cell["k"], cell["n"], cell["value"]) == (2, 3, 2 / 3)
    assert (cell["lo"], cell["hi"]) == wilson_interval(2, 3)
    assert rate_cell([None])["value"] is None and rate_cell([])["n"] == 0


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k(good, data):
    k = data.draw(st.integers(1, len(good)))
    share = np.mean([any(some) for some in itertools.combinations(good, k)])
    assert pass_at(sum(good), len(good), k) == pytest.approx(share)


def test_intervals_of_means_cover_at_their_rate():
    rng = np.random.default_rng(0)
    cells = [mean_cell(rng.exponential(2.0, 60).tolist()) for _ in range(200)]
    assert 0.88 <= np.mean([c["lo"] <= 2.0 <= c["hi"] for c in cells]) <= 0.99
    assert mean_cell([None])["value"] is None and mean_cell([1.0, None, 3.0])["value"] == 2


def test_values_that_stand_together_make_intervals_wider():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=30), 16)
    alone, together = mean_cell(values), mean_cell(values, groups=np.repeat(np.arange(30), 16).tolist())
    width = [c["hi"] - c["lo"] for c in (alone, together)]
    assert width[1] == pytest.approx(4 * width[0], rel=0.2)  # 16 copies are one value: sqrt(16) wider


def test_reliability_counts_failures_and_knows_its_bounds():
    good = np.zeros((4, 16), bool)
    good[0], good[1, 0] = True, True
    cells = reliability(good)
    assert cells["usable"]["value"] == 17 / 64 and cells["usable"]["n"] == 64
    assert cells["pass@16"]["k"] == 2 and cells["worst of 16"]["k"] == 1
    assert cells["pass@1"]["value"] == pytest.approx(17 / 64) and cells["pass@4"]["value"] == pytest.approx(1.25 / 4)
    assert cells["worst of 16"]["hi"] < 1 and "pass@16" not in reliability(good[:, :8])
