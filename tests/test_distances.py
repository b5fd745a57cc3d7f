"""Distances of sets of features: closed forms, invariances, bias, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from sorax.distances import (
    KERNEL_LEAST,
    KERNEL_SCALE,
    frechet_cell,
    frechet_distance,
    kernel_cell,
    kernel_distance,
    subsample_std,
)
from sorax.errors import UserError


def draw(seed, n, dim, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).standard_normal((n, dim))


def exactly(seed, n, mean, covariance):
    """Samples whose mean and covariance are these, not by chance."""
    z = draw(seed, n, len(mean))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z.T)))).T
    return mean + z @ np.linalg.cholesky(covariance).T


def covariance(seed, dim):
    a = draw(seed, dim, dim)
    return a @ a.T + 0.1 * np.eye(dim)


@given(seed=st.integers(0, 1000), dim=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_the_frechet_distance_of_gaussians_is_the_closed_form(seed, dim):
    means = draw(seed, 2, dim)
    a, b = covariance(seed + 1, dim), covariance(seed + 2, dim)
    x, y = exactly(seed, 40, means[0], a), exactly(seed + 3, 50, means[1], b)
    wanted = np.sum((means[0] - means[1]) ** 2) + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-6)


def test_commuting_covariances_give_the_distance_of_deviations():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    x, y = exactly(0, 20, np.zeros(3), np.diag(a)), exactly(1, 30, np.array([0, 3.0, 0]), np.diag(b))
    assert frechet_distance(x, y) == pytest.approx(9 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_distances_are_symmetric_and_do_not_depend_on_order_or_rotation(seed):
    x, y = draw(seed, 30, 6), draw(seed + 1, 40, 6, 0.3, 1.4)
    rotation = ortho_group.rvs(6, random_state=seed)
    order = np.random.default_rng(seed).permutation(len(x))
    for distance in (frechet_distance, kernel_distance):
        there = distance(x, y)
        assert distance(y, x) == pytest.approx(there, rel=1e-9)
        assert distance(x[order] @ rotation, y @ rotation) == pytest.approx(there, rel=1e-7, abs=1e-9)
    # Only the Fréchet distance is the same after a shift: the kernel's centre is the origin.
    assert frechet_distance(x + 5, y + 5) == pytest.approx(frechet_distance(x, y), rel=1e-7)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * frechet_distance(x, y), rel=1e-9)


def test_identical_sets_are_at_distance_zero():
    x = draw(0, 40, 8)
    assert frechet_distance(x, x) < 1e-9
    # An unbiased estimate of identical sets is below zero: a vector is not compared with itself but with its copy.
    k = (x @ x.T / 8) ** 2
    n = len(x)
    gap = 2 * KERNEL_SCALE * ((k.sum() - np.trace(k)) / (n * (n - 1)) - k.mean())
    assert kernel_distance(x, x) == pytest.approx(gap) and gap < 0


def test_the_frechet_distance_stays_finite_for_features_that_hardly_vary_or_repeat_each_other():
    """Where a root of the product of the covariances fails or turns complex."""
    x, y = draw(0, 60, 10), draw(1, 60, 10)
    for z in (x, y):
        z[:, 5] = z[:, 4]
        z[:, 6] = 3.0
        z[:, 7] *= 1e-9
    value = frechet_distance(x, y)
    kept = [0, 1, 2, 3, 8, 9]
    parts = frechet_distance(x[:, kept], y[:, kept])
    assert np.isfinite(value) and parts < value < 10


def test_the_kernel_distance_is_unbiased_where_that_of_all_pairs_is_not():
    """Over 400 draws of two sets of one distribution its mean is 0 to within 4 deviations of the mean."""
    n, dim, unbiased, biased = 10, 4, [], []
    for seed in range(400):
        x, y = draw(2 * seed, n, dim), draw(2 * seed + 1, n, dim)
        unbiased.append(kernel_distance(x, y))
        k = [(a @ b.T / dim) ** 2 for a, b in ((x, x), (y, y), (x, y))]
        biased.append(KERNEL_SCALE * (k[0].mean() + k[1].mean() - 2 * k[2].mean()))
    error = np.std(unbiased) / np.sqrt(len(unbiased))
    assert abs(np.mean(unbiased)) < 4 * error < np.mean(biased) / 4


def test_the_kernel_distance_of_gaussians_is_the_closed_form():
    """Under degree 2, E k(x, y) = |E x x^T|^2 / D^2: the distance is that of the second moments."""
    a, b = np.diag([1.0, 2.0, 3.0]), np.diag([2.0, 2.0, 1.0])
    x, y = exactly(0, 4000, np.zeros(3), a), exactly(1, 4000, np.zeros(3), b)
    assert kernel_distance(x, y) == pytest.approx(KERNEL_SCALE * np.sum((a - b) ** 2) / 9, rel=0.02)


def test_too_few_videos_are_refused_and_none_is_drawn_twice():
    x = draw(0, 9, 8)
    assert frechet_distance(x, x[:9] + 1) == pytest.approx(8)
    for a, b in ((x, x[:8]), (x[:8], x)):
        with pytest.raises(UserError, match="FVD over 8 features needs more than 8 videos on either side"):
            frechet_distance(a, b)
        with pytest.raises(UserError, match="leave it out"):
            frechet_cell(a, b)
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(x, x[:1])
    with pytest.raises(UserError, match=f"at least {KERNEL_LEAST}"):
        kernel_cell(x, x[: KERNEL_LEAST - 1])
    with pytest.raises(ValueError, match="NaN"):
        kernel_distance(x, np.full_like(x, np.nan))


@pytest.mark.parametrize("sizes", [(40, 40), (40, 120)])
def test_subsampling_gives_the_deviation_of_a_mean(sizes):
    """Of a difference of means it is known: the root of v / n + v / m. Within a fifth of it, on the mean of 20 data."""
    n, m = sizes
    found = []
    for seed in range(20):
        x, y = draw(2 * seed, n, 1), draw(2 * seed + 1, m, 1)
        found.append(subsample_std(lambda i, j, x=x, y=y: x[i].mean() - y[j].mean(), n, m, 100))
    assert np.mean(found) == pytest.approx(np.sqrt(1 / n + 1 / m), rel=0.2)


def test_intervals_hold_the_value_and_are_the_same_at_every_call():
    x, y = draw(0, 60, 5), draw(1, 80, 5, 1.5)
    for cell in (frechet_cell, kernel_cell):
        found = cell(x, y)
        assert found == cell(x, y) and found["lo"] < found["value"] < found["hi"] and found["n"] == 60
    assert kernel_cell(x, y)["lo"] > 0 > kernel_cell(x, draw(2, 80, 5))["lo"]


def test_the_interval_of_a_frechet_distance_has_covariances_of_full_rank():
    """Its parts are larger than halves where halves are too small."""
    x, y = draw(0, 12, 9), draw(1, 12, 9)
    found = frechet_cell(x, y)
    assert 0 <= found["lo"] < found["value"] < found["hi"] < 10 * found["value"]
