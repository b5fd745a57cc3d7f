"""How samples are brought within the limits: budget, grid, rate, length, and what is said of it."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.fit import CHANGES, OVERSIZE, Fit, Unfit, fit_sample, fit_size, frames_at, tokens
from data_pipelines.sources import SampleSpec
from sorax.errors import UserError


def video(num_frames=33, height=96, width=160, fps=24.0, **more):
    span = (num_frames - 1) / fps
    return SimpleNamespace(**dict(height=height, width=width, fps=fps, span=span, duration=num_frames / fps,
                                  is_image=False) | more)  # fmt: skip


def image(height, width):
    return video(1, height, width, 1.0, is_image=True, duration=0.0)


videos = st.builds(
    video, num_frames=st.integers(1, 400), height=st.integers(1, 1200), width=st.integers(1, 1200),
    fps=st.sampled_from([1.0, 12.5, 24.0, 29.97002997002997, 60.0]),
)  # fmt: skip
fits = st.builds(
    Fit, max_tokens=st.integers(1, 5000), spatial_multiple=st.sampled_from([8, 16, 32]),
    temporal_stride=st.sampled_from([1, 2, 4]), fps=st.sampled_from([None, 8.0, 24.0]),
    max_frames=st.integers(9, 121), min_frames=st.integers(1, 9), oversize=st.sampled_from(OVERSIZE),
    any_length=st.booleans(),
)  # fmt: skip


def or_none(info, fit):
    try:
        return fit_sample(info, fit)
    except Unfit:
        return None


@given(info=st.one_of(videos, st.builds(image, st.integers(1, 1200), st.integers(1, 1200))), fit=fits)
@settings(deadline=None, max_examples=300)
def test_a_fitted_sample_keeps_every_limit(info, fit):
    fitted = or_none(info, fit)
    if fitted is None:
        return
    assert 1 <= tokens(fitted, fit.spatial_multiple, fit.temporal_stride) <= fit.max_tokens
    assert fitted.height % fit.spatial_multiple == fitted.width % fit.spatial_multiple == 0
    assert 0 < fitted.height <= info.height and 0 < fitted.width <= info.width
    assert fit.any_length or fitted.num_frames % fit.temporal_stride == 1 % fit.temporal_stride
    assert fit.min_frames <= fitted.num_frames <= fit.max_frames
    assert fitted.fps == (fit.fps or info.fps)
    # The last frame that is asked for is there, to within a tenth of a frame.
    assert fitted.start + (fitted.num_frames - 1) / fitted.fps <= info.span + 0.11 / fitted.fps


@given(info=videos, fit=fits)
@settings(deadline=None, max_examples=300)
def test_what_is_done_to_a_sample_is_named_and_nothing_else(info, fit):
    fitted = or_none(info, fit)
    if fitted is None:
        return
    changes, multiple = set(fitted.changes), fit.spatial_multiple
    assert changes <= set(CHANGES) and len(fitted.changes) == len(changes)
    native = (info.height // multiple * multiple, info.width // multiple * multiple)
    assert ("rescaled" in changes) == ((fitted.height, fitted.width) != native)
    assert ("retimed" in changes) == (abs(fitted.fps / info.fps - 1) > 1e-3)
    there = frames_at(info.span, fitted.fps)
    assert ("trimmed" in changes) == (fitted.num_frames < fit.legal_frames(there))
    if not changes:
        assert fitted[:3] == (there, info.height, info.width)


@given(info=videos, fit=fits)
@settings(deadline=None, max_examples=300)
def test_the_three_ways_with_an_oversize_sample_differ_only_where_it_is_oversize(info, fit):
    scaled, trimmed, refused = (or_none(info, dataclasses.replace(fit, oversize=way)) for way in OVERSIZE)
    if refused is not None:
        assert scaled == trimmed == refused
    elif scaled is not None and trimmed is not None:
        assert "rescaled" in scaled.changes and "rescaled" not in trimmed.changes
        assert scaled.num_frames > trimmed.num_frames and "trimmed" in trimmed.changes
        assert scaled.height * scaled.width < trimmed.height * trimmed.width


def test_trimming_keeps_the_size_and_uses_the_budget():
    fit = Fit(6 * 10 * 5, oversize="trim")
    assert fit_sample(video(81), fit) == (17, 96, 160, 24.0, 0.0, ("trimmed",))
    with pytest.raises(Unfit, match="over budget: one frame of 160x96 is 60 tokens"):
        fit_sample(video(81), Fit(59, oversize="trim"))
    with pytest.raises(Unfit, match="too short: 17 frames"):
        fit_sample(video(81), dataclasses.replace(fit, min_frames=21))


def test_any_length_keeps_all_frames_and_counts_a_part_of_a_patch_as_one():
    fit = Fit(10, spatial_multiple=96, temporal_stride=9, any_length=True, oversize="refuse", max_frames=200)
    whole = fit_sample(video(80, width=96), fit)
    assert whole.num_frames == 80 and not whole.changes and tokens(whole, 96, 9) == 9
    assert fit_sample(video(100, width=96), dataclasses.replace(fit, oversize="trim")).num_frames == 90
    with pytest.raises(Unfit, match="in 91 frames is 11 tokens"):
        fit_sample(video(91, width=96), fit)


def test_refusing_says_what_the_sample_would_cost():
    with pytest.raises(Unfit, match=r"over budget: 160x96 in 33 frames is 540 tokens, over data\.max_tokens 539"):
        fit_sample(video(), Fit(539, oversize="refuse"))
    assert fit_sample(video(), Fit(540, oversize="refuse")).changes == ()


def test_each_change_is_named():
    assert fit_sample(video(), Fit(1000)).changes == ()
    assert fit_sample(video(height=100), Fit(1000)).changes == ("cropped to grid",)
    assert fit_sample(video(35), Fit(1000)).changes == ("cropped to grid",)
    assert fit_sample(video(37), Fit(1000, max_frames=33)).changes == ("trimmed",)
    assert fit_sample(video(), Fit(1000, fps=12)).changes == ("retimed",)
    assert fit_sample(video(), Fit(200)).changes == ("rescaled",)
    # Only two seconds were looked at, of a film.
    assert fit_sample(video(49, duration=3600.0), Fit(10_000)).changes == ("trimmed",)
    assert fit_sample(image(96, 160), Fit(1000, fps=8)).changes == ()


def test_too_short_and_too_small_are_told_apart():
    with pytest.raises(Unfit, match=r"^too short: 5 frames at 24 fps, fewer than data\.min_frames 9"):
        fit_sample(video(8), Fit(1000, min_frames=9))
    with pytest.raises(Unfit, match=r"^too small: 160x15 is smaller than one patch of 16 pixels"):
        fit_sample(video(height=15), Fit(1000))


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    budget=st.integers(1, 2000),
    multiple=st.sampled_from([8, 16, 32]),
)
@settings(deadline=None)
def test_fitted_size_keeps_budget_grid_and_aspect(height, width, budget, multiple):
    size = fit_size(height, width, budget, multiple)
    if size is None:
        # Only for a picture below one patch, or one so elongated that its longer side alone breaks the budget.
        assert min(height, width) < multiple or max(height, width) / min(height, width) > budget - 0.5
        return
    h, w = size
    assert h % multiple == w % multiple == 0
    assert 0 < h <= height and 0 < w <= width
    assert (h // multiple) * (w // multiple) <= budget
    # One side is the nearest multiple to the aspect ratio given the other, or both are native rounded down.
    near = min(abs(w - h * width / height), abs(h - w * height / width)) <= multiple / 2
    assert near or (height - h < multiple and width - w < multiple)


def test_fitted_size_uses_the_budget():
    assert fit_size(480, 720, 10_000, 16) == (480, 720)
    h, w = fit_size(480, 720, 240, 16)
    assert 240 * 0.85 <= h * w / 256 <= 240


def test_tokens_count_latent_patches():
    spec = SampleSpec(17, 64, 96, 8.0, "", "")
    assert tokens(spec, 16, 4) == 5 * 4 * 6
    assert tokens(SampleSpec(1, 16, 16, 8.0, "", ""), 16, 4) == 1


@pytest.mark.parametrize(
    "setting", [dict(max_tokens=0), dict(fps=-1.0), dict(max_frames=0), dict(min_frames=99), dict(oversize="crop")]
)
def test_impossible_settings_are_user_errors(setting):
    with pytest.raises(UserError, match=rf"data\.{next(iter(setting))} is"):
        Fit(**(dict(max_tokens=100) | setting))
