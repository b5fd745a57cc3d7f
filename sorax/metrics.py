"""Numbers about videos: fidelity to a reference, and what the embedded world's captions promise.

`judge` compares a clip with the ground truth of its caption, attribute by attribute; 'cannot tell' is a failure, and
an attribute that the caption says nothing about is None. `summarise` turns many judgements into rates with intervals.
"""

import itertools
import math

import numpy as np
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity

from sorax.parser import lasting, parse_clip

ATTRIBUTES = ("color", "shape", "count", "direction", "joint")
STILL = 0.025  # of the frame's shorter side: an object that moves less over a whole clip is still


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape, over all values; inf if they are equal."""
    a, b = _paired(a, b)
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64)
    return math.inf if error == 0 else float(10 * math.log10(255**2 / error))


def ssim(a, b):
    """Mean structural similarity of two uint8 videos [T, H, W, 3], frame by frame (Wang et al. 2004).

    Gaussian window of 1.5 pixels, as the paper; frames of at least 11 pixels a side.
    """
    a, b = _paired(a, b)
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, not {a.shape[1]} x {a.shape[2]}")
    options = dict(channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(np.mean([structural_similarity(x, y, **options) for x, y in zip(a, b)]))


def flicker(a, b):
    """Mean absolute error of the frame differences of uint8 videos [T, H, W, 3], in 8-bit levels; None for one frame.

    mean |(a[t+1] - a[t]) - (b[t+1] - b[t])| over frames, pixels and channels: what a copy adds to or takes from motion.
    An error that stands still, such as a shift of colour, costs nothing here.
    """
    a, b = _paired(a, b)
    if len(a) < 2:
        return None
    error = a.astype(np.int16) - b  # its differences are within +-510
    return float(np.mean(np.abs(np.diff(error, axis=0)), dtype=np.float64))


def _paired(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"two uint8 videos of one shape are compared, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    return a, b


def wilson_interval(k, n, z=1.959964):
    """95 % interval (lo, hi) of a rate of which k of n were seen (Wilson 1927); (0, 1) if nothing was seen."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = k / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def direction_of(positions, still=STILL):
    """Number 0..7 of the direction (right, then clockwise on the screen in steps of 45 degrees) or 'still'.

    positions: [T, 2] (x, y), y down, in fractions of the frame's shorter side, nan where unseen. The direction is that
    of the straight line that fits them best; None if they were seen less than twice.
    """
    frames = np.flatnonzero(np.isfinite(positions).all(-1))
    if len(frames) < 2:
        return None
    slope = np.polyfit(frames, positions[frames], 1)[0]
    moved = slope * (frames[-1] - frames[0])
    if np.hypot(*moved) < still:
        return "still"
    return round(math.atan2(moved[1], moved[0]) / (math.pi / 4)) % 8


def judge(video, truth):
    """Whether a clip shows what the caption of an item of the embedded world says.

    video: uint8 [T, H, W, 3], of any size; truth: data_pipelines.world.Truth. Objects are matched by what they are,
    not by where: a generated clip may begin anywhere. Returns dict(color, shape, count, direction, joint) of bool:
    color, shape, direction: right for every object that lasts; count: as many objects as the truth shows, all clip
    long, no more and no less; joint: all of them. What could not be told is False. direction is None, and no part of
    joint, if the caption asks for none: for an image, and where no object is at rest or on a straight line.
    """
    found = parse_clip(video)
    tracks = [track for track in found if lasting(track)]
    passing = sum(track.span >= 1 / 3 for track in found) - len(tracks)
    asked = [_asked_direction(thing, len(video)) for thing in truth.objects]
    visible = np.asarray(truth.visible) > 0.5
    # an object that spends the clip outside the frame may be missing, and one that leaves need not last
    needed = int(sum(_span(row) >= 0.85 for row in visible))
    count = max(needed, 1) <= len(tracks) and len(tracks) + passing <= len(truth.objects)

    cost = np.zeros((len(truth.objects), len(tracks)))
    right = {}
    for i, thing in enumerate(truth.objects):
        for j, track in enumerate(tracks):
            right[i, j] = (
                track.color == thing.color,
                track.shape == thing.shape,
                asked[i] is None or direction_of(track.positions) == asked[i],
            )
            cost[i, j] = -np.dot(right[i, j], (4, 2, 1))
    pairs = list(zip(*linear_sum_assignment(cost)))
    matched = [right[pair] for pair in pairs] if len(pairs) >= max(needed, 1) else [(False, False, False)]
    color, shape, direction = (all(part) for part in zip(*matched))
    result = dict(color=color, shape=shape, count=count)
    result["direction"] = direction if any(way is not None for way in asked) else None
    result["joint"] = all(value for value in result.values() if value is not None)
    return result


def _asked_direction(thing, num_frames):
    """What `direction_of` must say of an object; None if nothing is asked."""
    from data_pipelines.world import DIRECTIONS

    if num_frames == 1:
        return None
    if thing.motion == "still":
        return "still"
    return None if thing.direction is None else DIRECTIONS.index(thing.direction)


def _span(visible):
    frames = np.flatnonzero(visible)
    return (frames[-1] - frames[0] + 1) / len(visible) if len(frames) else 0.0


def summarise(judgements):
    """Rates of a list of judgements: dict attribute -> dict(rate, k, n, lo, hi), the interval being of 95 %.

    n counts the clips whose caption says something about the attribute; rate is nan if none does. Any key of the
    judgements is an attribute.
    """
    names = list(dict.fromkeys(itertools.chain(ATTRIBUTES, *judgements)))
    table = {}
    for name in names:
        values = [bool(j[name]) for j in judgements if j.get(name) is not None]
        k, n = sum(values), len(values)
        lo, hi = wilson_interval(k, n)
        table[name] = dict(rate=k / n if n else math.nan, k=k, n=n, lo=lo, hi=hi)
    return table
