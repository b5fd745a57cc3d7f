"""What curation measures on frames, and which clips it takes for the same."""

import itertools

import numpy as np
import pytest
from curate_videos import fade_in, panning, texture
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import curate_checks as checks
from data_pipelines.curate_duplicates import band_keys, best_first, components, links

FEW = settings(max_examples=50, deadline=None)


def levels(video):
    """Brightness and contrast of each frame, as the scan measures them."""
    grey = video.mean(-1)
    return grey.mean((1, 2)), grey.std((1, 2))


# --- Shots


@FEW
@given(st.integers(1, 60), st.lists(st.integers(0, 70), max_size=6), st.data())
def test_shots_are_all_frames_in_order(num_frames, cuts, data):
    blank = data.draw(st.lists(st.booleans(), min_size=num_frames, max_size=num_frames))
    ranges = checks.shots(num_frames, cuts, blank)
    assert [k for first, end in ranges for k in range(first, end)] == list(range(num_frames))
    assert {first for first, _ in ranges} >= {c for c in cuts if 0 < c < num_frames}


def test_a_dip_to_black_divides_a_shot_and_black_ends_do_not():
    blank = np.zeros(40, bool)
    blank[18:22] = blank[:3] = blank[-3:] = True
    assert checks.shots(40, [], blank) == [(0, 20), (20, 40)]


def trimmed(video, fps=10, **options):
    cuts = dict(cut_before=False, cut_after=False, margin=0.0) | options
    return checks.trim(np.arange(len(video)) / fps, *levels(video), **cuts)


def test_black_and_white_ends_are_trimmed():
    video = panning(0, 40)
    video[:5], video[-4:] = 0, 255
    assert trimmed(video) == (5, 36, dict(margin=0, blank=9, fade=0))


def test_a_fade_is_trimmed_at_either_end():
    video = fade_in(panning(0, 40), 8)
    first, end, counts = trimmed(video)
    assert 7 <= first <= 8 and end == 40 and counts["blank"] + counts["fade"] == first
    first, end, _ = trimmed(video[::-1])
    assert first == 0 and 32 <= end <= 33


def test_a_dark_scene_and_a_plain_one_are_not_trimmed():
    dark = (panning(0, 30) * 0.15).astype(np.uint8)
    assert trimmed(dark)[:2] == (0, 30)
    grey = np.full((30, 8, 8, 3), 120, np.uint8)
    assert trimmed(grey)[:2] == (0, 30)


def test_a_margin_is_taken_at_cuts_only():
    video = panning(0, 30)
    assert trimmed(video, cut_before=True, margin=0.15) == (2, 30, dict(margin=2, blank=0, fade=0))
    assert trimmed(video, cut_before=True, cut_after=True, margin=0.15)[:2] == (2, 28)


@FEW
@given(st.lists(st.tuples(st.floats(0, 255), st.floats(0, 80)), min_size=1, max_size=40), st.booleans(), st.booleans())
def test_trimmed_frames_and_kept_frames_are_all_frames(frames, before, after):
    brightness, contrast = np.array(frames).T
    times = np.arange(len(frames)) / 10
    first, end, counts = checks.trim(times, brightness, contrast, cut_before=before, cut_after=after, margin=0.25)
    assert 0 <= first <= end <= len(frames)
    assert end - first + sum(counts.values()) == len(frames) and min(counts.values()) >= 0


@FEW
@given(st.integers(1, 200), st.floats(0.3, 30), st.integers(0, 5))
def test_parts_of_a_shot_are_equal_and_short_enough(num_frames, max_seconds, before):
    times = np.arange(before + num_frames) / 10
    parts = checks.split(before, before + num_frames, times, 0.1, max_seconds)
    assert [k for a, b in parts for k in range(a, b)] == list(range(before, before + num_frames))
    sizes = [b - a for a, b in parts]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= max_seconds * 10 + 1
    assert len(parts) == np.ceil(num_frames / 10 / max_seconds - 1e-6)  # as few as will do


# --- Bars


def profiles(picture):
    """What find_bars reads, of one grey picture."""
    height, width = picture.shape
    tall = picture.reshape(height, 32, -1).mean(2).max(1)
    wide = picture.reshape(32, -1, width).mean(1).max(0)
    return [tall], [wide]


def test_bars_come_in_pairs():
    picture = texture(0, 96, 128)[..., 0].astype(float) + 40
    assert checks.find_bars(*profiles(picture)) == (0, 0, 0, 0)
    boxed = picture.copy()
    boxed[:12] = boxed[-12:] = 10
    assert checks.find_bars(*profiles(boxed)) == (14, 14, 0, 0)
    pillars = picture.copy()
    pillars[:, :16] = pillars[:, -20:] = 10
    assert checks.find_bars(*profiles(pillars)) == (0, 0, 18, 22)
    sky = picture.copy()
    sky[:30] = 0  # a night sky: dark on one side only
    assert checks.find_bars(*profiles(sky)) == (0, 0, 0, 0)
    assert checks.find_bars(*profiles(0 * picture)) == (0, 0, 0, 0)


def test_a_bar_is_dark_in_every_frame():
    dark, lit = np.full(96, 100), np.full(96, 100)
    dark[:12] = dark[-12:] = 0
    assert checks.find_bars([dark, dark], [np.full(128, 100)]) == (14, 14, 0, 0)
    assert checks.find_bars([dark, lit], [np.full(128, 100)]) == (0, 0, 0, 0)


@FEW
@given(st.integers(16, 300), st.integers(16, 300), st.tuples(*[st.integers(0, 6)] * 4))
def test_a_crop_is_even_and_within_the_bars(height, width, bars):
    y, x, h, w = checks.crop_box(height, width, bars)
    assert y % 2 == x % 2 == h % 2 == w % 2 == 0 and h > 0 and w > 0
    assert bars[0] <= y <= bars[0] + 1 and y + h <= height - bars[1] <= y + h + 1
    assert bars[2] <= x <= bars[2] + 1 and x + w <= width - bars[3] <= x + w + 1


# --- Motion and likeness


@pytest.mark.parametrize("size", [1, 2])
def test_motion_is_the_speed_of_the_picture_at_any_size(size):
    pytest.importorskip("cv2", reason="curation needs sorax[curate]")
    video = panning(3, 3, 96, 128, speed=4).mean(-1).astype(np.uint8)
    video = video.repeat(size, 1).repeat(size, 2)
    speed = checks.motion(video[0], video[1], 0.5)
    assert speed == pytest.approx(4 / 128 / 0.5, rel=0.25)  # flow falls short at the border that comes in
    assert checks.motion(video[0], video[0], 0.5) < 1e-3


def test_a_hash_survives_what_copying_does_and_tells_pictures_apart():
    pytest.importorskip("cv2", reason="curation needs sorax[curate]")
    pictures = [texture(seed, 96, 128).mean(-1) for seed in range(8)]
    hashes = [checks.perceptual_hash(p) for p in pictures]
    noise = np.random.default_rng(0).normal(0, 5, pictures[0].shape)
    for picture, value in zip(pictures, hashes):
        for copy in (picture * 0.8 + 10, picture + noise, picture[::2, ::2], picture.repeat(2, 0)):
            assert checks.distance([checks.perceptual_hash(copy)], [value]) <= 6
    assert min(checks.distance([a], [b]) for a, b in itertools.combinations(hashes, 2)) > 12


def near(clips, bits):
    """Pairs of near clips, by comparing everyone with everyone."""
    return [(a, b) for (a, x), (b, y) in itertools.combinations(sorted(clips), 2) if checks.distance(x, y) <= bits]


@st.composite
def families(draw):
    """Clips of three hashes: some at random, some a few bits away from another."""
    clips, bits = [], draw(st.integers(0, 8))
    for k in range(draw(st.integers(1, 12))):
        hashes = [draw(st.integers(0, 2**63 - 1)) for _ in range(3)]
        if clips and draw(st.booleans()):
            hashes = list(clips[draw(st.integers(0, len(clips) - 1))][1])
            for place, bit in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 62)), max_size=3 * bits + 1)):
                hashes[place] ^= 1 << bit
        clips.append((f"clip {k}", tuple(hashes)))
    return clips, bits


@FEW
@given(families())
def test_clips_that_are_near_share_a_band(family):
    clips, bits = family
    keys = {name: set(band_keys(hashes, bits)) for name, hashes in clips}
    assert all(keys[a] & keys[b] for a, b in near(clips, bits))


@FEW
@given(families(), st.randoms())
def test_sets_of_duplicates_are_those_of_comparing_everyone_in_any_order(family, random):
    clips, bits = family
    groups = {}
    for name, hashes in clips:
        for key in band_keys(hashes, bits):
            groups.setdefault(key, []).append((name, hashes))
    groups = list(groups.values())
    random.shuffle(groups)
    for group in groups:
        random.shuffle(group)
    found = [pair for group in groups for pair in links(group, bits, chunk=3)]
    assert components(found) == components(near(clips, bits))


def test_copies_of_one_video_are_joined_without_comparing_them():
    clips = [(f"{k:05d}", (1, 2, 3)) for k in range(20_000)]
    assert links(clips, 6) == [("00000", name) for name, _ in clips[1:]]


def test_the_best_of_a_set_has_a_caption_then_size_then_length_then_name():
    clip = dict(caption="c", height=48, width=64, start=0.0, stop=2.0, name="b")
    changes = dict(height=96), dict(stop=3.0), dict(name="a"), {}, dict(height=480, caption="")
    order = [clip | change for change in changes]
    assert best_first(order[::-1]) == order
