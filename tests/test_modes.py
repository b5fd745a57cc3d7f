"""Canvases hold what they are made of, where they should; masks are whole patches; untrained masks are named."""

import numpy as np
import pytest
from tiny_generator import DIT_CONFIG, VAE_CONFIG, tiny_generator

from sorax import modes
from sorax.errors import UserError

STRIDE = 2  # latent frames: 0 | 1 2 | 3 4 | ...
PATCH = DIT_CONFIG.patch_size


def clip(count, first=0, height=16, width=24):
    """Frame k is grey of level first + k + 1."""
    levels = np.arange(first + 1, first + count + 1, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def levels(canvas, lo=0, hi=None):
    """Level of each frame of a canvas, 0 where there is none."""
    frames, there, known = canvas.read(lo, canvas.num_frames if hi is None else hi)
    assert np.array_equal(there, frames[:, 0, 0, 0] > 0) and np.array_equal(known.all((1, 2)), there)
    return frames[:, 0, 0, 0].tolist()


def groups(canvas):
    return "".join("01"[int(k)] for k in canvas.known_groups(STRIDE))


def test_canvases_hold_clips_at_whole_latent_frames():
    forward = modes.extend(clip(6), 4, STRIDE)
    assert levels(forward) == [2, 3, 4, 5, 6, 0, 0, 0, 0] and groups(forward) == "11100"
    assert forward.notes == ("the first frame is left out: a clip fills whole latent frames",)
    backward = modes.extend(clip(5), 4, STRIDE, backward=True)
    assert levels(backward) == [0] * 5 + [1, 2, 3, 4] and groups(backward) == "00011"
    assert "the last frame is left out" in backward.notes[0]
    between = modes.connect(clip(3), clip(4, 10), 3, STRIDE)
    assert levels(between) == [1, 2, 3, 0, 0, 0, 0, 11, 12, 13, 14] and groups(between) == "110011"
    loop = modes.loop(clip(5), 4, STRIDE)
    assert levels(loop) == [1, 2, 3, 4, 5] and loop.back == 4 and loop.shape == (9, 16, 24)
    new = modes.loop_of_text(9, 16, 24, STRIDE, longest=2)
    assert (new.num_frames, new.back, new.shape[0]) == (7, 2, 9) and groups(new) == "0000"
    keys = modes.keyframes({0: clip(1), 4: clip(1, 6)}, 7, STRIDE)
    assert levels(keys) == [1, 0, 0, 7, 7, 0, 0] and groups(keys) == "1010"
    assert "frame 4 is shown in frames 3 to 4" in keys.notes[0]
    assert levels(keys, 3, 6) == [7, 7, 0]
    still = modes.extend(clip(1), 4, STRIDE, backward=True)
    assert levels(still) == [0] * 5 + [1, 1] and "one latent frame" in still.notes[0]


def test_edits_know_nothing_but_what_lies_around_holes():
    whole = modes.edit(clip(5), STRIDE, strength=0.4)
    frames, there, known = whole.read(0, 5)
    assert whole.is_edit and there.all() and not known.any() and groups(whole) == "000" and frames.any()
    holes = np.zeros((5, 16, 24), bool)
    holes[3, 9, 3] = True  # one pixel of the frames 3 and 4
    canvas = modes.edit(clip(5), STRIDE, holes=holes)
    assert groups(canvas) == "110" and not canvas.is_edit
    mask, latents = modes.given_of(tiny_generator().codec, PATCH, *canvas.read(0, 5))
    assert mask.shape == latents.shape[:3] == (3, 4, 6)
    np.testing.assert_array_equal(np.argwhere(~mask), [(2, h, w) for h in (2, 3) for w in (0, 1)])  # one patch
    masked, made = modes.hole_shares(canvas, VAE_CONFIG, PATCH)
    assert masked == pytest.approx(1 / (5 * 16 * 24)) and made == pytest.approx(2 / 5 * 1 / 6)


def test_latents_of_a_canvas_are_those_of_the_whole_clip_with_stills_where_nothing_is():
    codec = tiny_generator().codec
    video = np.random.default_rng(0).integers(0, 256, (7, 16, 24, 3), dtype=np.uint8)
    canvas = modes.connect(video[:3], video[5:], 2, STRIDE)
    mask, latents = modes.given_of(codec, PATCH, *canvas.read(0, 7))
    assert mask.all((1, 2)).tolist() == mask.any((1, 2)).tolist() == [True, True, False, True]
    still = video[[0, 1, 2, 2, 5, 5, 6]]
    np.testing.assert_array_equal(latents, codec.encode([still])[0])
    np.testing.assert_array_equal(modes.still_where_unknown(video, np.arange(7) >= 4)[:4], video[[4] * 4])


def test_masks_are_known_by_the_modes_that_draw_them():
    def drawn(frames, hole=False):
        mask = np.repeat(np.array([c == "1" for c in frames])[:, None, None], 4, 1).repeat(4, 2)
        mask[:, :2] &= not hole
        return modes.drawn_by(mask)

    assert drawn("000") == set() and drawn("1000") == {"first", "first_k", "keyframes", "box"}
    assert drawn("0001") == {"last", "last_k", "keyframes", "box"} and "both" in drawn("1001")
    assert drawn("1101") == {"both_k", "keyframes", "box"} and drawn("0100") == {"keyframes"}
    assert drawn("1100") == {"first_k", "keyframes", "box"} and drawn("1111", hole=True) == {"box"}


def test_what_a_run_was_not_trained_for_is_named():
    first = np.zeros((3, 4, 4), bool)
    first[0] = True
    assert modes.untrained(first, (0.6, 0.4)) is None and modes.untrained(~first & first, (1.0,)) is None
    assert "needs first or first_k of config.flow.given" in modes.untrained(first, (1.0, 0, 0, 0, 0, 0, 0, 0.5, 0.5))
    assert "trained with first;" in modes.untrained(first[::-1], (0.6, 0.4, 0, 0, 0))
    assert "trained with nothing given" in modes.untrained(first[::-1], (1.0,))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: modes.keyframes({0: clip(1), 9: clip(1)}, 7, STRIDE), "frame 9 is outside of"),
        (lambda: modes.keyframes({3: clip(1), 4: clip(1)}, 7, STRIDE), "two keyframes fall into frames 3 to 4"),
        (lambda: modes.connect(clip(3), clip(3, 0, 16, 16), 2, STRIDE), "16x16 pixels, the video 24x16"),
        (lambda: modes.edit(clip(5), STRIDE), "would leave nothing"),
        (lambda: modes.edit(clip(5), STRIDE, strength=2.0), "strength is 2: give 0.01"),
        (lambda: modes.edit(clip(5), STRIDE, holes=np.ones((4, 16, 24), bool)), "the mask has 4 frames of 24x16"),
        (lambda: modes.edit(clip(5), STRIDE, holes=np.ones((5, 8, 24), bool)), "the mask has 5 frames of 24x8"),
        (lambda: modes.loop_of_text(3, 16, 16, STRIDE, 9), "too short: ask for 5"),
        (lambda: modes.extend(clip(5), 0, STRIDE), "0 new frames"),
        (lambda: modes.frames_of_seconds(-1, 8), "--seconds is -1: give a number above 0"),
        (lambda: modes.frames_of_seconds(float("nan"), 8), "above 0"),
    ],
)  # fmt: skip
def test_what_no_canvas_can_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
