"""Scores are what their definitions say."""

import math

import numpy as np
import pytest

from sorax.metrics import psnr, ssim, summarise, wilson_interval


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


def test_psnr_is_that_of_a_known_error(video):
    base = np.full_like(video, 100)
    assert psnr(base, base + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(base, base - 5) == psnr(base - 5, base) == pytest.approx(20 * math.log10(51))
    assert psnr(base * 0, base * 0 + 255) == pytest.approx(0)


def test_equal_videos_have_infinite_psnr_and_ssim_of_one(video):
    assert psnr(video, video) == math.inf
    assert ssim(video, video) == pytest.approx(1)


def test_ssim_falls_with_noise_and_is_symmetric(video):
    smooth = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None] * 8, video.shape)
    rng = np.random.default_rng(1)
    scores = [
        ssim(smooth, np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8))
        for noise in (2, 10, 40)
    ]
    assert 1 > scores[0] > scores[1] > scores[2] > 0
    assert ssim(smooth, video) == pytest.approx(ssim(video, smooth)) and ssim(smooth, video) < 0.2


def test_unlike_videos_are_refused(video):
    for score in (psnr, ssim):
        with pytest.raises(ValueError, match="one shape"):
            score(video, video[:2])
        with pytest.raises(ValueError, match="uint8"):
            score(video, video.astype(np.float32))
    with pytest.raises(ValueError, match="11"):
        ssim(video[:, :8], video[:, :8])


@pytest.mark.parametrize(
    "k, n, low, high",
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson_interval_has_its_known_values(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers_at_its_rate():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.5, 0.9):
        hits = rng.binomial(60, rate, 4000)
        bounds = {k: wilson_interval(int(k), 60) for k in np.unique(hits)}
        assert 0.92 <= np.mean([bounds[k][0] <= rate <= bounds[k][1] for k in hits]) <= 0.98


def test_summary_counts_what_was_asked():
    right = dict(color=True, shape=True, count=True, direction=None, joint=True)
    wrong = dict(color=True, shape=False, count=True, direction=True, joint=False)
    table = summarise([right, wrong, wrong, wrong])
    assert set(table) == set(right)
    assert (table["shape"]["k"], table["shape"]["n"], table["shape"]["rate"]) == (1, 4, 0.25)
    assert (table["direction"]["k"], table["direction"]["n"]) == (3, 3)
    assert (table["joint"]["lo"], table["joint"]["hi"]) == wilson_interval(1, 4)
    unasked = summarise([dict(size=None)])["size"]
    assert math.isnan(unasked["rate"]) and unasked["n"] == 0 and summarise([]) == {}
