"""What each motion that a caption of the embedded world names must look like, in the positions of one object.

Every motion is a few named checks, each a number that must reach a bound. The same checks judge the ground truth and
what was measured: the truth has to pass with room to spare, else the clip is too short to show it, or something
hides it, and the check is not asked.

Letters: T frames. Positions and radii are fractions of the frame's shorter side; x right, y down.
"""

from dataclasses import dataclass

import numpy as np

SIZE = "keeps its size"  # the check that goes with every motion but one
STILL = 0.025  # an object that moves less over a whole clip is still


@dataclass(frozen=True)
class Seen:
    """What is known of an object in the frames of a clip.

    positions [T, 2], radius [T]: nan where unknown; free [T] bool: all of it is seen, and nothing touches it but
    perhaps the frame's edge; barred [T]: a part or all of it is behind the bar; frame: (width, height).
    """

    positions: np.ndarray
    radius: np.ndarray
    free: np.ndarray
    barred: np.ndarray
    frame: tuple


def seen_track(track, frame):
    """Seen, of a measured track."""
    alone = track.seen & ~track.touch & ~track.bar & np.isfinite(track.patches[:, 0])
    usual = np.median(track.area[track.whole]) if track.whole.any() else 0.0
    clear = ~track.edge | (np.nan_to_num(track.area) >= 0.95 * usual)
    found = np.flatnonzero(track.seen)
    barred = track.bar & (np.nan_to_num(track.area) < 0.8 * np.nanmax(track.area))
    for last, first in zip(found[:-1], found[1:]):
        barred[last + 1 : first] = track.bar[last] or track.bar[first]
    return Seen(track.positions, track.radius, alone & clear, barred, frame)


def seen_truth(truth, k, frame, apart=0.03):
    """Seen, of object k of a data_pipelines.world.Truth: no more than what the parser can know of it."""
    from data_pipelines.world_physics import reach

    reaches = [truth.radius[j] * reach(thing.shape) for j, thing in enumerate(truth.objects)]
    free = truth.visible[k] > 0.995
    for j in range(truth.num_objects):
        if j != k:
            distance = np.linalg.norm(truth.position[k] - truth.position[j], axis=-1)
            free &= distance > reaches[k] + reaches[j] + apart
    if truth.bar is not None:
        axis, low, high = truth.bar
        along = truth.position[k][:, axis]
        free &= (along + reaches[k] + apart < low) | (along - reaches[k] - apart > high)
    hidden = (truth.visible[k] < 0.5) & (truth.objects[k].motion == "occlude")
    return Seen(truth.position[k], truth.radius[k], free, hidden, frame)


def fit_line(frames, values):
    """(slope a frame, value at frame 0) of the line that fits values [n, ...] at some frames best."""
    middle = frames.mean()
    slope = np.tensordot(frames - middle, values, 1) / ((frames - middle) ** 2).sum()
    return slope, values.mean(0) - slope * middle


def checks(kind, sense, seen, partner=None):
    """What a motion must show: dict name -> how far it shows it; 1 is enough. Nothing where too little is seen.

    kind, sense: of data_pipelines.world.ObjectTruth; partner: Seen of what it collides with.
    """
    found = _CHECKS[kind](seen, sense, partner) if kind == "occlude" or np.count_nonzero(seen.free) >= 2 else {}
    growth = _growth(seen)
    if found and kind != "resize" and growth is not None:
        found[SIZE] = 0.2 / max(abs(np.log(max(growth, 1e-3))), 1e-6)
    return found


def speed(kind, seen):
    """Speed a frame of an object in fractions of the shorter side, as its caption means it; None if it is not seen.

    Of a throw the horizontal one, of a collision that before it, of an orbit along the arc.
    """
    frames, steps = _steps(seen.free, seen.positions)
    if kind == "collide":
        early = frames < max(2, 0.3 * (len(seen.free) - 1))
        frames, steps = frames[early], steps[early]
    if len(steps) < 1:
        return None
    if kind == "throw":
        return float(abs(np.median(steps[:, 0])))
    if kind in ("straight", "occlude"):
        at = np.flatnonzero(seen.free)
        return float(np.linalg.norm(fit_line(at, seen.positions[at])[0]))
    if kind == "bounce":  # a step with a wall in it is short
        return float(np.quantile(np.linalg.norm(steps, axis=-1), 0.75, method="lower"))
    chord = float(np.median(np.linalg.norm(steps, axis=-1)))
    turns = _turns(frames, steps) if kind == "orbit" else np.zeros(0)
    half = abs(np.median(turns)) / 2 if len(turns) else 0.0
    return chord * half / np.sin(half) if half > 1e-3 else chord


def _steps(mask, positions):
    """(frame, step) of every two frames that follow each other and are both of use."""
    frames = np.flatnonzero(mask[:-1] & mask[1:])
    return frames, positions[frames + 1] - positions[frames]


def _turns(frames, steps):
    """Angles between steps that follow each other, clockwise on the screen positive."""
    next_ = np.flatnonzero(np.diff(frames) == 1)
    a, b = steps[next_], steps[next_ + 1]
    angles = np.arctan2(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], (a * b).sum(-1))
    return angles[np.minimum(np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)) > 0.004]


def _rest(seen):
    place = seen.positions[seen.free]
    return np.linalg.norm(place - np.median(place, axis=0), axis=-1).max() if len(place) else np.inf


def _growth(seen):
    """Radius at the end over that at the beginning, of the best line; None where less than half the clip is seen."""
    at = np.flatnonzero(seen.free)
    if len(at) < 2 or at[-1] - at[0] < 0.5 * (len(seen.free) - 1):
        return None
    slope, start = fit_line(at, seen.radius[at])
    return float((start + slope * (len(seen.free) - 1)) / max(start, 1e-6))


def _still(seen, sense, partner):
    return {"rests": 0.06 / max(_rest(seen), 1e-6)}


def _straight(seen, sense, partner):
    at = np.flatnonzero(seen.free)
    if len(at) < 2:
        return {}
    slope, start = fit_line(at, seen.positions[at])
    moved = np.linalg.norm(slope) * (at[-1] - at[0])
    off = np.linalg.norm(seen.positions[at] - start - slope * at[:, None], axis=-1).max()
    return {"moves": moved / STILL, "on a line": (0.02 + 0.2 * moved) / max(off, 1e-6)}


def _turns_back(along):
    """Reversals of a coordinate along [n]: (number, how far it goes there and back, 1 or -1)."""
    for way in (1, -1):
        values = way * along
        for i in range(1, len(along) - 1):
            if values[i] >= max(values[i - 1], values[i + 1]):
                yield i, min(values[i] - values[:i].min(), values[i] - values[i + 1 :].min()), way


def _bounce(seen, sense, partner):
    at = np.flatnonzero(seen.free)
    best = 0.0
    for axis in (0, 1):
        along = seen.positions[at, axis]
        steps = np.abs(np.diff(along)) / np.diff(at)
        for i, back, way in _turns_back(along):
            wall = seen.frame[axis] if way > 0 else 0.0
            near = abs(wall - along[i]) <= 1.5 * seen.radius[at[i]] + steps.max() + 0.01
            # sharply, not as a throw turns at its top: two steps away it is as fast as ever
            beside = [steps[k] for k in (i - 2, i + 1) if 0 <= k < len(steps)]
            if near and (not beside or max(beside) > 0.4 * steps.max()):
                best = max(best, back / 0.015)
    return {"comes back from a wall": best}


def _pull(at, y):
    """Whether its steps turn downward, one after another, but where it bounces; {} if too few are seen."""
    three = np.flatnonzero((np.diff(at)[:-1] == 1) & (np.diff(at)[1:] == 1))
    first, second = y[three + 1] - y[three], y[three + 2] - y[three + 1]
    flies = ~((first > 0) & (second < 0)) & (np.maximum(abs(first), abs(second)) > 0.003)
    if np.count_nonzero(flies) < 2:
        return {}
    return {"is pulled down": 0.3 / max(np.mean((second - first)[flies] <= 0.0003), 0.01)}


def _fall(seen, sense, partner):
    at = np.flatnonzero(seen.free)
    x, y = seen.positions[at].T
    up = max(y[i] - y[i:].min() for i in range(len(at)))
    return {
        "goes down": (y.max() - y.min()) / 0.03,
        "not aside": (0.03 + 0.2 * np.ptp(y)) / max(np.ptp(x), 1e-6),
        "comes up again": up / 0.01,
        **_pull(at, y),
    }


def _throw(seen, sense, partner):
    at = np.flatnonzero(seen.free)
    x, y = seen.positions[at].T
    top = int(y.argmin())
    way = 1 if sense == "right" else -1
    return {
        f"goes {sense}": way * (x[-1] - x[0]) / 0.025,
        "goes up": (y[0] - y[top]) / 0.015,
        "comes down": (y[top:].max() - y[top]) / 0.015,
        **_pull(at, y),
    }


def _collide(seen, sense, partner):
    if partner is None:
        return {}
    apart = np.linalg.norm(seen.positions - partner.positions, axis=-1)
    touching = seen.radius + partner.radius
    at = np.flatnonzero(np.isfinite(apart))
    if not len(at):
        return {}
    nearest = at[np.argmin(apart[at])]
    steps = [np.linalg.norm(_steps(np.isfinite(s.radius), s.positions)[1], axis=-1) for s in (seen, partner)]
    step = sum(s.max() if len(s) else 0.0 for s in steps)
    usual = sum(np.nanmedian(s.radius[s.free]) if s.free.any() else np.nanmax(s.radius) for s in (seen, partner))
    found = {"meet": (1.4 * max(usual, touching[nearest]) + step) / max(apart[nearest], 1e-6)}
    changes = []
    for each in (seen, partner):
        frames, moves = _steps(each.free, each.positions)
        before, after = moves[frames + 1 <= nearest], moves[frames >= nearest]
        if len(before) and len(after):
            before, after = np.median(before, axis=0), np.median(after, axis=0)
            changes.append(np.linalg.norm(after - before) / (0.004 + 0.2 * np.linalg.norm(before)))
    if changes:
        found["are thrown off"] = max(changes)
    return found


def _orbit(seen, sense, partner):
    frames, steps = _steps(seen.free, seen.positions)
    turns = _turns(frames, steps)
    if not len(turns):
        return {}
    turns = turns if sense == "clockwise" else -turns
    pace = np.linalg.norm(steps, axis=-1)
    return {
        "turns": turns.sum() / 0.2,
        "always so": 0.3 / max(np.mean(turns <= 0), 0.01),
        "at a steady pace": 0.3 / max(pace.std() / pace.mean(), 0.01),
    }


def _occlude(seen, sense, partner):
    return {"is hidden by a bar": np.count_nonzero(seen.barred) / 1.0}


def _resize(seen, sense, partner):
    growth = _growth(seen)
    if growth is None:
        return {}
    way = 1 if sense == "growing" else -1
    return {sense: way * np.log(max(growth, 1e-3)) / 0.1, "stays": 0.08 / max(_rest(seen), 1e-6)}


_CHECKS = dict(still=_still, straight=_straight, bounce=_bounce, fall=_fall, throw=_throw, collide=_collide,
               orbit=_orbit, occlude=_occlude, resize=_resize)  # fmt: skip
