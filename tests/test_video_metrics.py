"""Numbers of single videos that need no network: each on videos of which it is known what it must be."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from sorax.video_metrics import (
    ROUNDING,
    SPATIAL_FREQUENCIES,
    TEMPORAL_FREQUENCIES,
    distances_to,
    flow_metrics,
    frame_difference,
    motion_distance,
    spatial_spectrum,
    spectrum_distance,
    temporal_flicker,
    temporal_spectrum,
)


def texture(height=64, width=80, seed=0, blur=2.0):
    """A picture with something to follow everywhere, float in 8-bit levels."""
    noise = gaussian_filter(
        np.random.default_rng(seed).standard_normal((height, width, 3)), (blur, blur, 0), mode="wrap"
    )
    return 128 + 40 * noise / noise.std()


def to_video(frames):
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)


def moving(dy, dx, frames=3):
    picture = texture(120, 140)
    return to_video(
        [shift(picture, (t * dy, t * dx, 0), order=3, mode="grid-wrap")[20:84, 20:100] for t in range(frames)]
    )


def levels(*values):
    """Even frames of these brightnesses."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 40, 48, 3)).copy()


def test_flicker_is_what_a_frame_differs_from_the_mean_of_its_neighbours():
    assert temporal_flicker(levels(10, 20, 30, 40)) == 0 and frame_difference(levels(10, 20, 30, 40)) == 10
    assert temporal_flicker(levels(10, 20, 10, 20)) == 10
    assert temporal_flicker(levels(0, 255, 0)) == 255 and frame_difference(levels(255, 0)) == 255
    assert temporal_flicker(levels(0, 0, 5, 0, 0)) == pytest.approx((2.5 + 5 + 2.5) / 3)
    assert temporal_flicker(levels(1, 2)) is None and frame_difference(levels(1)) is None


@pytest.mark.parametrize("way", [(0.0, 1.5), (-1.0, 0.0), (2.0, -2.0)])
def test_motion_is_the_speed_in_sides_of_the_frame_a_second(way):
    found = flow_metrics(moving(*way), fps=8)
    assert found["motion"] == pytest.approx(np.hypot(*way) * 8 / 64, rel=0.05)
    assert found["untracked"] < 0.1


def test_motion_is_the_same_at_every_size():
    """A frame of twice the pixels is scaled down before its flow is estimated."""
    small = moving(0, 1.5)
    large = small.repeat(2, 1).repeat(2, 2)
    assert flow_metrics(large, 8)["motion"] == pytest.approx(flow_metrics(small, 8)["motion"], rel=0.05)


def test_the_warping_error_forgives_motion_and_not_what_changes_besides():
    still, moved = flow_metrics(moving(0, 0), 8), flow_metrics(moving(0, 2), 8)
    assert still == dict(motion=0.0, warping_error=0.0, untracked=0.0)
    raw = 1000 * np.square(np.diff(moving(0, 2) / 255.0, axis=0)).mean()
    assert moved["warping_error"] < 0.05 * raw
    noise = np.random.default_rng(0).normal(0, 12, moving(0, 2).shape)
    noisy = flow_metrics(to_video(moving(0, 2) + noise), 8)
    # Two frames' noise, less what bilinear warping smooths of one of them.
    assert 0.6 < noisy["warping_error"] / (2000 * (12 / 255) ** 2) < 1.05


def test_what_is_hidden_or_leaves_the_frame_is_not_followed():
    """A square that moves over a still ground hides some of it at each step; a cut leaves nothing to follow."""
    ground, thing = texture(64, 80), texture(24, 24, seed=1)
    frames = []
    for t in range(4):
        frame = ground.copy()
        frame[20:44, 10 + 6 * t : 34 + 6 * t] = thing
        frames.append(frame)
    found = flow_metrics(to_video(frames), 8)
    assert 24 * 6 / (64 * 80) < found["untracked"] < 0.4
    cut = flow_metrics(to_video([texture(seed=s) for s in range(3)]), 8)
    assert cut["untracked"] > 0.6


def test_one_frame_has_no_motion():
    assert flow_metrics(levels(7), 8) == dict(motion=None, warping_error=None, untracked=None)


@pytest.mark.parametrize("shape", [(9, 64, 96), (20, 45, 33)])
def test_white_noise_has_its_variance_at_every_frequency(shape):
    noise = np.random.default_rng(0).normal(128, 25, shape).clip(0, 255).round().astype(np.uint8)
    video = np.broadcast_to(noise[..., None], (*shape, 3))
    wanted = 10 * np.log10(25**2 + ROUNDING)
    # A bin is a mean of at least 100 periodograms, each with a deviation of itself: 0.4 dB, and three of that.
    np.testing.assert_allclose(spatial_spectrum(video), wanted, atol=1.3)
    # The lowest two of few frames have less, for the mean is taken away.
    np.testing.assert_allclose(temporal_spectrum(video)[2:], wanted, atol=0.5)


def test_a_wave_stands_at_its_frequency():
    y, x = np.mgrid[:64, :96]
    for k in (2, 7):
        wave = 128 + 60 * np.sin(2 * np.pi * SPATIAL_FREQUENCIES[k] * (0.6 * y + 0.8 * x))
        assert np.argmax(spatial_spectrum(to_video([wave[..., None].repeat(3, -1)]))) == k
        time = 128 + 60 * np.sin(2 * np.pi * TEMPORAL_FREQUENCIES[k] * np.arange(32) + 0.5)
        assert np.argmax(temporal_spectrum(levels(*time.round()))) == k


def test_a_spectrum_has_no_brightness_and_no_value_for_what_is_too_small():
    dark, bright = levels(*[10] * 8), levels(*[240] * 8)
    for spectrum in (spatial_spectrum, temporal_spectrum):
        np.testing.assert_allclose(spectrum(dark), 10 * np.log10(ROUNDING), atol=1e-6)
        np.testing.assert_allclose(spectrum(bright), spectrum(dark), atol=1e-6)
    assert spatial_spectrum(dark[:, :31]) is None and temporal_spectrum(dark[:3]) is None


def test_blur_is_seen_in_the_spatial_spectrum_and_flicker_in_the_temporal():
    video = to_video([texture(seed=0, blur=0.5)] * 9)
    blurred = to_video([texture(seed=0, blur=1.0)] * 9)
    gain = np.where(np.arange(9) % 2, 1.1, 1.0)[:, None, None, None]
    assert (spatial_spectrum(video) - spatial_spectrum(blurred))[-1] > 10
    rise = temporal_spectrum((video * gain).clip(0, 255).round().astype(np.uint8)) - temporal_spectrum(video)
    assert rise[-1] > 20 and np.argmax(rise) == len(rise) - 1


def test_distances_to_a_reference_leave_a_clip_out_of_its_own_mean():
    spectra = [np.array([0.0, 0]), np.array([3.0, 3]), np.array([6.0, 6]), None]
    assert distances_to(spectra, spectra, same=True) == [4.5, 0, 4.5, None]
    assert distances_to([np.array([3.0, 5])], spectra) == [pytest.approx(np.sqrt(2))]
    assert distances_to(spectra[:1], spectra[:1], same=True) == [None] and distances_to([None], [None]) == [None]
    assert spectrum_distance([1, 2], [1, 2]) == 0


def test_the_distance_of_motion_is_the_mean_shift_of_its_distribution():
    x = np.random.default_rng(0).gamma(2.0, 0.1, 200)
    found = motion_distance(x, [*(x + 0.3), None])
    assert found["value"] == pytest.approx(0.3) and found["lo"] < 0.3 < found["hi"] and found["n"] == 200
    assert motion_distance(x, x)["value"] == 0
    assert motion_distance(x[:3], x)["value"] is None
