"""How right the motion of a clip is: velocity against the truth, and what should be conserved, from parsed tracks.

Two formulas of velocity error are in use. PhyWorld (Kang et al. 2024, arXiv 2411.02385) prints

    e = 1 / (N |T|) * sum_i sum_t |v_it - v^_it|                                              `printed`

over N balls and the frames T in which they can be seen; its released code (id_ood_data/evaluate.py) takes

    e = mean over balls of |mean_t v_it - mean_t v^_it|                                       `code`

of the horizontal velocity, for a collision once before and once after it. The second forgives noise that averages out
and needs the ends of a path only. Both take velocities by differences of neighbouring frames, here of centroids by
sub-pixel; frames that were given do not count.

What cannot be tracked has no error but is `tracked=False`: a failure, to be reported beside the mean, never dropped.

Legend: K objects, T frames. Positions in fractions of the frame's shorter side, y down; results in world units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

SEEN = 0.8  # of the frames that count, in which an object must be found
NEAR = 0.05  # of the shorter side: an object starts at least so near to where it should, or within its radius
KINK = 0.005  # of the shorter side: a path that leaves a straight line or parabola by more has a kink there
SLOW = 0.5  # units / s: what drift is measured against, of slower objects


@dataclass(frozen=True)
class VelocityError:
    """Velocity error of a clip in units / s; None where it is not `tracked`, `why` says what is missing.

    printed, code: the two formulas; nothing to compare (the objects leave before a second frame) has why "not in view",
    tracked None. before, after: of `code`, up to the first contact of objects and after it; None without a contact.
    """

    printed: float | None = None
    code: float | None = None
    before: float | None = None
    after: float | None = None
    tracked: bool | None = False
    why: str = ""


@dataclass(frozen=True)
class Drift:
    """Relative change of energy and momentum over a clip; None where it is not `tracked`."""

    energy: float | None = None
    momentum: float | None = None
    tracked: bool = False


def match_by_start(tracks, truth, first_frame: int) -> list:
    """The track of each object of the truth, by where it is in the frames before `first_frame`; None if none is near.

    Tracks and objects are paired with the least summed distance; one that is farther than NEAR and than the object's
    radius, or that is not seen in those frames, is no match.
    """
    start = slice(0, max(first_frame, 1))
    cost = np.full((truth.num_objects, len(tracks)), 1e3)
    for i in range(truth.num_objects):
        limit = max(NEAR, float(truth.radius[i, start].max()))
        for j, track in enumerate(tracks):
            apart = np.linalg.norm(track.positions[start] - truth.position[i, start], axis=-1)[track.seen[start]]
            if len(apart) and apart.mean() <= limit:
                cost[i, j] = apart.mean()
    pairs = {i: j for i, j in zip(*linear_sum_assignment(cost)) if cost[i, j] < 1e3}
    return [tracks[pairs[i]] if i in pairs else None for i in range(truth.num_objects)]


def velocity_error(tracks, truth, first_frame: int = 3, *, extent: float = 10.0, axes=(0, 1)) -> VelocityError:
    """Velocity error of a clip that goes on from given frames, by both formulas.

    A step from one frame to the next counts if it starts at `first_frame` or later and all objects are wholly in view
    in both frames, in the truth. As in PhyWorld's code, the step in which objects collide is in neither part of `code`;
    `printed` has it.

    Args:
        tracks: of `sorax.parser.parse_clip`, of as many frames as the truth has. truth: `data_pipelines.world.Truth`.
        first_frame: the first that was not given. extent: world units along the frame's shorter side.
        axes: that `code` looks at: (0,) is horizontal, as PhyWorld's. `printed` is of the whole velocity.
    """
    steps = len(truth.times) - 1
    in_view = (np.asarray(truth.visible) > 0.999).all(0)
    in_view[:first_frame] = False
    wanted = in_view[:-1] & in_view[1:]
    if not wanted.any():
        return VelocityError(tracked=None, why="not in view")
    matched = match_by_start(tracks, truth, first_frame)
    if any(track is None for track in matched):
        return VelocityError(why="not there at the start")
    if any(len(track.seen) != steps + 1 for track in matched):
        raise ValueError(f"tracks of {len(matched[0].seen)} frames against a truth of {steps + 1}")
    seen = np.array([track.seen for track in matched])  # [K, T]
    counted = in_view.nonzero()[0]
    if (seen[:, counted].mean(1) < SEEN).any():
        return VelocityError(why="lost")
    wanted = wanted & (seen[:, :-1] & seen[:, 1:]).all(0)
    if not wanted.any():
        return VelocityError(why="lost")

    scale = extent / (truth.times[1] - truth.times[0])
    found = np.diff([track.positions for track in matched], axis=1) * scale  # [K, T - 1, 2]
    error = found - np.diff(truth.position, axis=1) * scale
    meetings = sorted(time for time, kind, _, _ in truth.contacts if kind == "object")
    contact = np.zeros(steps, bool)
    for time, *_ in truth.contacts:
        contact[(truth.times[:-1] <= time) & (time < truth.times[1:])] = True
    middle = (truth.times[:-1] + truth.times[1:]) / 2
    parts = [(middle < meetings[0]), (middle > meetings[0])] if meetings else [np.ones(steps, bool)]
    of_parts = []
    for part in parts:
        use = wanted & part & ~contact
        mean = error[:, use][..., list(axes)].mean(1) if use.any() else None
        of_parts.append(None if mean is None else float(np.linalg.norm(mean, axis=-1).mean()))
    some = [e for e in of_parts if e is not None]
    return VelocityError(
        printed=float(np.linalg.norm(error[:, wanted], axis=-1).mean()),
        code=float(np.mean(some)) if some else None,
        before=of_parts[0] if meetings else None,
        after=of_parts[1] if meetings else None,
        tracked=True,
    )


def drift(tracks, fps: float, *, gravity: float = 0.0, extent: float = 10.0, start: int = 3, until: int | None = None,
          window: int = 5) -> Drift:  # fmt: skip
    """Change of energy and momentum of a clip from its beginning to its end, with nothing to compare it with.

    The objects are the tracks seen in the first `start` frames; frames count where all of them are seen and none is cut
    by the frame's edge or touches another. At both ends of those, a path y = a + b s + g s^2 / 2 is fitted to each
    object in a window of frames, s being the time from its middle. With masses m = pi r^2 from the first window,

        E = sum m (|b|^2 / 2 - g a_y),       P = sum m (b - g s0 e_y)      (s0: the middle of the window)

    and the results are |E_end - E_begin| over the larger kinetic energy and |P_end - P_begin| over sum m |b| at the
    beginning; objects slower than SLOW count there as if they had that speed.

    Args:
        gravity: units / s^2, downward. until: frames up to here only, such as before a bounce that keeps no energy.
        window: frames of it, where there are so many: at most a third of those that count, fewer where a path has a
            kink (objects have just collided), and at least 2.
    """
    objects = [track for track in tracks if track.seen[:start].any()]
    if not objects:
        return Drift()
    whole = np.array([track.seen & ~track.cut for track in objects]).all(0)
    frames = np.flatnonzero(whole[:until])
    if len(frames) < 4:
        return Drift()
    sizes = range(max(2, min(window, len(frames) // 3)), 1, -1)
    begin, end = (_end_state(objects, [choose(n) for n in sizes], fps, gravity, extent)
                  for choose in (lambda n: frames[:n], lambda n: frames[-n:]))  # fmt: skip
    masses = np.array([np.nanmedian(track.area[frames[: sizes[0]]]) for track in objects])

    def energy(state):
        place, speed, _ = state
        kinetic = 0.5 * masses * np.maximum(np.sum(speed**2, axis=1), SLOW**2)
        return float(np.sum(masses * (0.5 * np.sum(speed**2, axis=1) - gravity * place[:, 1]))), float(kinetic.sum())

    def momentum(state):
        _, speed, middle = state
        return np.sum(masses[:, None] * (speed - [0.0, gravity * middle]), axis=0)

    (first, low), (last, high) = energy(begin), energy(end)
    size = np.sum(masses * np.maximum(np.linalg.norm(begin[1], axis=1), SLOW))
    change = float(np.linalg.norm(momentum(end) - momentum(begin)) / size)
    return Drift(abs(last - first) / max(low, high), change, True)


def _end_state(objects, windows, fps, gravity, extent):
    """Places and velocities `[K, 2]` in the middle of a window of frames, in units, and the time of that middle.

    Of the windows, largest first, the first in which no path has a kink, as it has where objects collide.
    """
    for frames in windows:
        middle = frames.mean() / fps
        since = frames / fps - middle
        positions = np.stack([track.positions[frames] for track in objects], axis=1) * extent  # [n, K, 2]
        positions[..., 1] -= 0.5 * gravity * since[:, None] ** 2
        positions = positions.reshape(len(frames), -1)
        design = np.stack([np.ones_like(since), since], axis=1)
        fit = np.linalg.lstsq(design, positions, rcond=None)[0]
        if np.abs(design @ fit - positions).max() <= KINK * extent:
            break
    place, speed = fit
    return place.reshape(-1, 2), speed.reshape(-1, 2), middle
