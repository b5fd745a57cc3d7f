"""Whether a clip shows what the caption of an item of the embedded world says, from its pixels alone.

`judge` compares a clip with the ground truth of its caption, attribute by attribute. 'Cannot tell' is a failure; an
attribute is None if the caption says nothing about it, or if the true clip itself is too short to show it.
"""

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from sorax.motion_kinds import SIZE, STILL, checks, fit_line, seen_track, seen_truth, speed
from sorax.parser import lasting, parse_clip

SHORT = ("color", "shape", "count", "direction", "motion")  # what a short caption speaks of
DETAILED = (*SHORT, "size", "speed", "relation")
ATTRIBUTES = (*DETAILED, "joint")
MARGIN = 1.5  # the truth has to show a motion this clearly for a clip to be asked for it


def direction_of(positions, still=STILL):
    """Number 0..7 of the direction (right, then clockwise on the screen in steps of 45 degrees) or 'still'.

    positions: [T, 2] (x, y), y down, in fractions of the frame's shorter side, nan where unseen. The direction is that
    of the straight line that fits them best; None if they were seen less than twice.
    """
    frames = np.flatnonzero(np.isfinite(positions).all(-1))
    if len(frames) < 2:
        return None
    moved = fit_line(frames, positions[frames])[0] * (frames[-1] - frames[0])
    if np.hypot(*moved) < still:
        return "still"
    return round(math.atan2(moved[1], moved[0]) / (math.pi / 4)) % 8


def judge(video, truth, *, tracks=None, asked=None):
    """Whether a clip shows what the caption of an item of the embedded world says.

    Objects are matched by what they are, not by where: a generated clip may begin anywhere.

    Args:
        video: uint8 [T, H, W, 3], of any size.
        truth: data_pipelines.world.Truth.
        tracks: parse_clip(video), if it is known already.
        asked: names of DETAILED that the caption speaks of; None: SHORT.

    Returns:
        dict of ATTRIBUTES -> bool, or None if it is not asked.
        color, shape, direction, size, speed, motion: right for every object that lasts. direction is asked of objects
          at rest or on a straight line, size and speed as a bin of the world, motion as far as the true clip shows it;
          shape need not be told where the true clip never shows all of the object by itself.
        count: as many objects as the truth shows, all clip long, no more and no less.
        relation: the first two objects, at the start, are left of, right of, above or below each other as they should.
        joint: all that is asked. What could not be told is False.
    """
    asked = SHORT if asked is None else tuple(asked)
    if not set(asked) <= set(DETAILED):
        raise ValueError(f"captions speak of {', '.join(DETAILED)}, not of {', '.join(set(asked) - set(DETAILED))}")
    video = np.asarray(video)
    found = parse_clip(video) if tracks is None else tracks
    frame = np.array([video.shape[2], video.shape[1]]) / min(video.shape[1:3])
    directions = [_asked_direction(truth, k) for k in range(truth.num_objects)]
    ideals = [seen_truth(truth, k, frame) for k in range(truth.num_objects)]
    # an object that spends the clip outside the frame may be missing, and one that leaves need not last
    spans = [_span(row) for row in np.asarray(truth.visible) > 0.5]
    needed = max(sum(span >= 0.85 for span in spans), 1)
    share = 0.75 * min(1.0, max(spans) / 0.85)
    tracks = [track for track in found if lasting(track, share)]
    passing = sum(track.span >= 1 / 3 for track in found) - len(tracks)

    cost = np.zeros((len(truth.objects), len(tracks)))
    right = {}
    for i, thing in enumerate(truth.objects):
        for j, track in enumerate(tracks):
            right[i, j] = (
                track.color == thing.color,
                track.shape == thing.shape or (track.shape is None and not ideals[i].free.any()),
                directions[i] is None or direction_of(track.positions) == directions[i],
            )
            cost[i, j] = -np.dot(right[i, j], (4, 2, 1))
    pairs = list(zip(*linear_sum_assignment(cost)))
    enough = len(pairs) >= needed
    color, shape, direction = (all(part) for part in zip(*(right[pair] for pair in pairs))) if enough else [False] * 3
    count = needed <= len(tracks) and len(tracks) + passing <= len(truth.objects)
    result = dict.fromkeys(ATTRIBUTES) | dict(color=color, shape=shape, count=count)
    if any(way is not None for way in directions):
        result["direction"] = direction
    own = {int(i): tracks[j] for i, j in pairs} if enough else {}
    if len(video) > 1:
        result["motion"] = _motion(truth, ideals, own, frame, enough)
        result["speed"] = _speed(truth, ideals, own, frame, enough)
    result["size"] = _size(truth, ideals, own, frame, enough)
    result["relation"] = _relation(truth, own, must=min(spans[:2]) >= 0.85 or not enough)
    result = {name: value if name in asked else None for name, value in result.items()}
    result["joint"] = all(value for value in result.values() if value is not None)
    return result


def _asked_direction(truth, k):
    """What `direction_of` must say of an object; None if nothing is asked, or the clip is too short to show it."""
    from data_pipelines.world import DIRECTIONS

    thing = truth.objects[k]
    if len(truth.times) == 1:
        return None
    if thing.motion == "still":
        return "still"
    if thing.direction is None:
        return None
    seen = np.where(truth.visible[k][:, None] > 0.5, truth.position[k], np.nan)
    asked = DIRECTIONS.index(thing.direction)
    return asked if direction_of(seen, 1.2 * STILL) == asked else None


def _span(visible):
    frames = np.flatnonzero(visible)
    return (frames[-1] - frames[0] + 1) / len(visible) if len(frames) else 0.0


def _all_right(verdicts, enough):
    """Of verdicts for each object (None: not asked, or missing though it need not be there)."""
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return (enough and all(verdicts)) if verdicts else None


def _motion(truth, ideals, own, frame, enough):
    verdicts = []
    for k, thing in enumerate(truth.objects):
        other = next((j for j, o in enumerate(truth.objects) if j != k and o.motion == thing.motion == "collide"), None)
        ideal = checks(thing.motion, thing.sense, ideals[k], None if other is None else ideals[other])
        wanted = [name for name, value in ideal.items() if value >= MARGIN]
        if set(wanted) <= {SIZE} or (enough and k not in own):
            continue
        partner = own.get(other) if other is not None else None
        shown = {}
        if k in own and (other is None or partner is not None):
            shown = checks(thing.motion, thing.sense, seen_track(own[k], frame),
                           None if partner is None else seen_track(partner, frame))  # fmt: skip
        verdicts.append(all(shown.get(name, 0.0) >= 1 for name in wanted))
    return _all_right(verdicts, enough)


def _bin(value, bins):
    """Name of the bin nearest to a value, bins: name -> (low, high)."""
    return min(bins, key=lambda name: max(bins[name][0] - value, value - bins[name][1]))


def _speed(truth, ideals, own, frame, enough):
    from data_pipelines.world_scene import SPEEDS

    def read(thing, seen):
        value = speed(thing.motion, seen)
        return None if value is None else _bin(value / (truth.times[1] - truth.times[0]) / truth.unit, SPEEDS)

    verdicts = []
    for k, thing in enumerate(truth.objects):
        if thing.speed_bin is None or read(thing, ideals[k]) != thing.speed_bin:
            continue
        if k in own or not enough:
            verdicts.append(k in own and read(thing, seen_track(own[k], frame)) == thing.speed_bin)
    return _all_right(verdicts, enough)


def _start_radius(seen):
    """Radius at the beginning of a clip, or None if it is never wholly seen."""
    at = np.flatnonzero(seen.free)
    if not len(at):
        return None
    radius = seen.radius[at]
    if len(at) < 3:
        return float(radius[0])
    slope, start = fit_line(at, radius)
    return float(start) if abs(slope) * (at[-1] - at[0]) > 0.1 * start else float(np.median(radius))


def _size(truth, ideals, own, frame, enough):
    from data_pipelines.world_scene import RADII

    def read(seen):
        radius = _start_radius(seen)
        return None if radius is None else _bin(radius / truth.unit, RADII)

    verdicts = []
    for k, thing in enumerate(truth.objects):
        if np.count_nonzero(ideals[k].free) < min(2, len(truth.times)) or read(ideals[k]) != thing.size:
            continue
        if k in own or not enough:
            verdicts.append(k in own and read(seen_track(own[k], frame)) == thing.size)
    return _all_right(verdicts, enough)


def _relation(truth, own, must, apart=0.01):
    if truth.num_objects < 2 or (truth.visible[:2, 0] < 0.5).any():
        return None
    gap = truth.position[1, 0] - truth.position[0, 0]
    axis = int(abs(gap[1]) > abs(gap[0]))
    if not {0, 1} <= set(own):
        return False if must else None
    one, two = own[0], own[1]
    both = np.flatnonzero(one.seen & two.seen)
    if not len(both) or both[0] > 0.25 * (len(one.seen) - 1):
        return False
    measured = (two.positions - one.positions)[both[0], axis]
    return bool(measured * np.sign(gap[axis]) > apart)
