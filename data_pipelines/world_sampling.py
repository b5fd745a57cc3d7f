"""Draws the scenes of the world from (split, seed, index).

An item's categories (objects, colours, shapes, motions, directions, background) depend on nothing but (split, seed,
index); its sizes, speeds and places come from a stream of their own and are chosen to fit the frame's aspect ratio
and the time that it is to be watched.
"""

from __future__ import annotations

import math

import numpy as np

from data_pipelines import world_physics as physics
from data_pipelines.world_physics import SHAPES, extents, reach
from data_pipelines.world_scene import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    HELD_COLOR_SHAPE,
    HELD_SHAPE_MOTION,
    MOTIONS,
    OOD_RADII,
    OOD_SPEEDS,
    RADII,
    SPEEDS,
    SPLITS,
    TONES,
    UNIT,
    Background,
    Bar,
    Body,
    Scene,
)

_TRIES = 12  # draws of size, speed and place for an object, until it fits the frame and meets no other


class Draws:
    """Scalars from one counter-based stream: the same for (seed, split, index, stream) on every machine."""

    def __init__(self, seed: int, split: str, index: int, stream: int):
        key = np.array([seed, index * len(SPLITS) + SPLITS.index(split)], np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))
        self._values: list[float] = []

    def unit(self) -> float:
        if not self._values:
            self._values = self._generator.random(64).tolist()
        return self._values.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def choice(self, options):
        return options[int(self.unit() * len(options))]


def lead_motions(motions, count: int) -> list[str]:
    """The motions that a scene of `count` objects can be about: a collision takes two, a bar serves one."""
    solo = any(motion not in ("collide", "occlude") for motion in motions)
    needs = {"collide": 2}
    return [m for m in motions if count == needs.get(m, 1) or (solo and count > needs.get(m, 1))]


def _cast(draws: Draws, split, num_objects, motions):
    """Categories of the objects, as (color, shape, motion) each, and which kind of combination is held out."""
    low, high = num_objects
    count = low + int(draws.unit() * (high - low + 1))
    leads = lead_motions(motions, count)
    held_motions = [pair for pair in HELD_SHAPE_MOTION if pair[1] in leads]
    held = None
    if split == "heldout":
        held = "shape-motion" if draws.unit() < 0.5 and held_motions else "color-shape"
    if held == "shape-motion":
        shape, lead = draws.choice(held_motions)
        color = draws.choice([c for c in COLORS if (c, shape) not in HELD_COLOR_SHAPE])
    elif held == "color-shape":
        pairs = [p for p in HELD_COLOR_SHAPE if any((p[1], m) not in HELD_SHAPE_MOTION for m in leads)]
        color, shape = draws.choice(pairs)
        lead = draws.choice([m for m in leads if (shape, m) not in HELD_SHAPE_MOTION])
    else:
        lead = draws.choice(leads)
        shape = draws.choice([s for s in SHAPES if (s, lead) not in HELD_SHAPE_MOTION])
        color = draws.choice([c for c in COLORS if (c, shape) not in HELD_COLOR_SHAPE])
    cast = [(color, shape, lead)]
    solo = [m for m in motions if m not in ("collide", "occlude")]
    while len(cast) < count:
        motion = "collide" if lead == "collide" and len(cast) == 1 else draws.choice(solo)
        shape = draws.choice([s for s in SHAPES if (s, motion) not in HELD_SHAPE_MOTION])
        used = [color for color, _, _ in cast]  # colours differ within a scene: each names its object
        color = draws.choice([c for c in COLORS if c not in used and (c, shape) not in HELD_COLOR_SHAPE])
        cast.append((color, shape, motion))
    return cast, held


def _heading(draws: Draws, motion: str) -> tuple[str | None, str | None]:
    """(direction, sense) of a motion; see Body."""
    u = draws.unit()
    pick = lambda options: options[int(u * len(options))]  # noqa: E731
    if motion == "straight":
        return pick(DIRECTIONS), None
    if motion == "occlude":
        return pick(DIRECTIONS[::2]), None
    senses = {"throw": ("right", "left"), "orbit": ("clockwise", "counterclockwise"),
              "resize": ("growing", "shrinking")}  # fmt: skip
    return None, pick(senses[motion]) if motion in senses else None


def sample_scene(
    split: str,
    seed: int,
    index: int,
    size: tuple[float, float],
    horizon: float,
    num_objects: tuple[int, int] = (1, 3),
    motions: tuple[str, ...] = MOTIONS,
    backgrounds: tuple[str, ...] = BACKGROUNDS,
) -> Scene:
    """The scene of item `index`, in a frame of `size` (width, height) world units watched for `horizon` seconds."""
    what, where = Draws(seed, split, index, 0), Draws(seed, split, index, 1)
    cast, held = _cast(what, split, num_objects, motions)
    headings = [_heading(what, motion) for _, _, motion in cast]
    first = int(what.unit() * len(TONES))
    second = (first + 1 + int(what.unit() * (len(TONES) - 1))) % len(TONES)
    tones = tuple(tuple(TONES)[k] for k in (first, second))
    axis, share = int(what.unit() * 2), what.uniform(0.35, 0.65)
    background = Background(tones if what.choice(backgrounds) == "two-tone" else tones[:1], axis, share * size[axis])
    # Any object may lie over any other, also the one that the scene is about.
    order = sorted(range(len(cast)), key=lambda _: what.unit())

    stage = _Stage(where, split, size, horizon)
    rest = list(range(len(cast)))
    if cast[0][2] == "collide":
        stage.place(rest[:2], cast, headings)
        rest = rest[2:]
    for k in rest:
        stage.place([k], cast, headings)
    rank = {old: new for new, old in enumerate(order)}
    collisions = tuple((time, *sorted((rank[0], rank[1]))) for time in stage.collisions)
    bodies = tuple(stage.bodies[old] for old in order)
    return Scene(*size, horizon, bodies, background, stage.bar, collisions, held)


class _Stage:
    """Places objects one after another (a colliding pair at once): the first of some draws that fits, else the best."""

    def __init__(self, draws: Draws, split: str, size, horizon: float):
        self.draws, self.size, self.horizon = draws, size, horizon
        ood = split == "ood"
        self.radii, self.speeds = (OOD_RADII, OOD_SPEEDS) if ood else (RADII, SPEEDS)
        self.bodies: dict[int, Body] = {}
        self.bar: Bar | None = None
        self.collisions: list[float] = []
        self._tracks: list[tuple[np.ndarray, float]] = []
        self._times = np.linspace(0.0, horizon, 5)

    def place(self, slots, cast, headings):
        best = None
        for _ in range(_TRIES):
            if len(slots) == 2:
                trial = self._collide(*(cast[k][:2] for k in slots))
            else:
                color, shape, motion = cast[slots[0]]
                trial = getattr(self, "_" + motion)(color, shape, *headings[slots[0]])
            bodies, misfit, bar, collisions = trial
            tracks = [(body.path.state(self._times)[0], reach(body.shape) * max(body.radius, body.end_radius))
                      for body in bodies]  # fmt: skip
            misfit += self._overlap(tracks)
            if best is None or misfit < best[0]:
                best = (misfit, bodies, bar, collisions, tracks)
            if misfit <= 0:
                break
        _, bodies, bar, collisions, tracks = best
        self.bodies.update(zip(slots, bodies))
        self.bar, self.collisions = self.bar or bar, self.collisions + collisions
        self._tracks += tracks

    def _overlap(self, tracks) -> float:
        """The deepest overlap of the new objects with what is there, by circumscribed circles at five times."""
        deepest = 0.0
        for track, radius in tracks:
            for other, other_radius in self._tracks:
                apart = track - other
                nearest = math.sqrt(float((apart * apart).sum(1).min()))
                deepest = max(deepest, radius + other_radius - nearest)
            if self.bar is not None:
                along = track[:, self.bar.axis]
                into = np.minimum(along + radius - self.bar.low, self.bar.high - (along - radius))
                deepest = max(deepest, float(into.max()))
        return deepest

    # Each motion below makes one trial: (bodies, misfit, bar, collision times). misfit > 0 says, in world units,
    # by how much the path does not fit the frame.

    def _radius(self) -> tuple[str, float]:
        size = self.draws.choice(tuple(self.radii))
        return size, self.draws.uniform(*self.radii[size])

    def _speed(self) -> tuple[str, float]:
        bin_ = self.draws.choice(tuple(self.speeds))
        return bin_, self.draws.uniform(*self.speeds[bin_])

    def _slowed(self, shape, radius, bin_, speed, unit) -> float:
        """The speed, or if that is too fast to stay in the frame: as fast as fits, within its bin."""
        for u, (low, high) in zip(unit, self._room(shape, radius)):
            if abs(u) * speed * self.horizon > high - low:
                speed = max((high - low) / (abs(u) * self.horizon), self.speeds[bin_][0])
        return speed

    def _room(self, shape, radius):
        """(low, high) of the centroid along x and y for an object that is wholly in the frame."""
        left, top, right, bottom = extents(shape)
        width, height = self.size
        return (left * radius, width - right * radius), (top * radius, height - bottom * radius)

    def _start(self, low, high, before, after):
        """(start, overflow) such that start - before .. start + after lies in low..high, if it can."""
        overflow = before + after - (high - low)
        if overflow > 0:  # begin inside and leave
            return (low + before if before <= after else high - after), overflow
        return self.draws.uniform(low + before, high - after), 0.0

    def _in_frame(self, shape, radius, reaches):
        spots = [self._start(*room, *far) for room, far in zip(self._room(shape, radius), reaches)]
        return tuple(spot for spot, _ in spots), max(overflow for _, overflow in spots)

    def _body(self, color, shape, motion, path, size, radius, speed_bin=None, direction=None, sense=None):
        return Body(color, shape, size, motion, direction, speed_bin, sense, path, radius, radius)

    def _still(self, color, shape, direction, sense):
        size, radius = self._radius()
        start, misfit = self._in_frame(shape, radius, ((0, 0), (0, 0)))
        path = physics.straight(start, (0.0, 0.0))
        return [self._body(color, shape, "still", path, size, radius)], misfit, None, []

    def _straight(self, color, shape, direction, sense):
        (size, radius), (bin_, speed) = self._radius(), self._speed()
        speed = self._slowed(shape, radius, bin_, speed, UNIT[direction])
        velocity = tuple(speed * u for u in UNIT[direction])
        reaches = [(max(0.0, -v * self.horizon), max(0.0, v * self.horizon)) for v in velocity]
        start, misfit = self._in_frame(shape, radius, reaches)
        path = physics.straight(start, velocity)
        return [self._body(color, shape, "straight", path, size, radius, bin_, direction)], misfit, None, []

    def _bounce(self, color, shape, direction, sense):
        (size, radius), (bin_, speed) = self._radius(), self._speed()
        angle = self.draws.uniform(0, 2 * math.pi)
        velocity = (speed * math.cos(angle), speed * math.sin(angle))
        room = self._room(shape, radius)
        start = [self.draws.uniform(*side) for side in room]
        axis = int(abs(velocity[1]) > abs(velocity[0]))  # towards a wall, met within the horizon
        away = abs(velocity[axis]) * self.draws.uniform(0.2, 0.7) * self.horizon
        low, high = room[axis]
        away = min(away, high - low)
        start[axis] = high - away if velocity[axis] > 0 else low + away
        path = physics.Reflection(tuple(start), velocity, *zip(*room))
        return [self._body(color, shape, "bounce", path, size, radius, bin_)], 0.0, None, []

    def _fall(self, color, shape, direction, sense):
        size, radius = self._radius()
        (left, right), (top, floor) = self._room(shape, radius)
        landing = self.draws.uniform(0.3, 0.85) * self.horizon
        drop = min(max(0.5 * physics.GRAVITY * landing**2, 0.5), floor - top)
        path = physics.fall((self.draws.uniform(left, right), floor - drop), floor)
        return [self._body(color, shape, "fall", path, size, radius)], 0.0, None, []

    def _throw(self, color, shape, direction, sense):
        (size, radius), (bin_, speed) = self._radius(), self._speed()  # the speed is the horizontal one
        toward = 1.0 if sense == "right" else -1.0
        across = toward * self._slowed(shape, radius, bin_, speed, (toward, 0.0))
        top, floor = self._room(shape, radius)[1]
        # A launch that comes back to about its own height at the end, if the frame is high enough for it.
        launch = physics.GRAVITY * self.horizon * self.draws.uniform(0.3, 0.55)
        launch = min(max(launch, 1.0), math.sqrt(2 * physics.GRAVITY * 0.95 * (floor - top)))
        rise = launch**2 / (2 * physics.GRAVITY)
        drop = max(0.0, (0.5 * physics.GRAVITY * self.horizon - launch) * self.horizon)
        travel = across * self.horizon
        # In a longer clip than the frame is high for, it lands before the end and bounces.
        reaches = ((max(0.0, -travel), max(0.0, travel)), (rise, min(drop, floor - top - rise)))
        start, misfit = self._in_frame(shape, radius, reaches)
        path = physics.fall(start, floor, (across, -launch))
        return [self._body(color, shape, "throw", path, size, radius, bin_, None, sense)], misfit, None, []

    def _orbit(self, color, shape, direction, sense):
        (size, radius), (bin_, speed) = self._radius(), self._speed()
        room = self._room(shape, radius)
        widest = min(high - low for low, high in room) / 2
        wanted = speed * self.horizon / self.draws.uniform(2.6, 5.0)  # a good part of a turn can be seen
        around = min(max(wanted, 0.8), widest)
        centre, _ = self._in_frame(shape, radius, ((around, around), (around, around)))
        rate = speed / around * (1 if sense == "clockwise" else -1)
        path = physics.Orbit(centre, around, self.draws.uniform(0, 2 * math.pi), rate)
        misfit = 0.8 - around
        return [self._body(color, shape, "orbit", path, size, radius, bin_, None, sense)], misfit, None, []

    def _resize(self, color, shape, direction, sense):
        ranges = tuple(self.radii.values())
        if len(ranges) == 3:
            names, ends = ("small", "large"), (self.draws.uniform(*ranges[0]), self.draws.uniform(*ranges[-1]))
        else:  # out of distribution: within one of the two ranges, to stay outside the training range
            name = self.draws.choice(tuple(self.radii))
            low, high = self.radii[name]
            names, ends = (name, name), (self.draws.uniform(low, 0.8 * low + 0.2 * high),
                                         self.draws.uniform(0.2 * low + 0.8 * high, high))  # fmt: skip
        if sense == "shrinking":
            names, ends = names[::-1], ends[::-1]
        start, misfit = self._in_frame(shape, max(ends), ((0, 0), (0, 0)))
        path = physics.straight(start, (0.0, 0.0))
        body = Body(color, shape, names[0], "resize", None, None, sense, path, *ends, self.horizon)
        return [body], misfit, None, []

    def _occlude(self, color, shape, direction, sense):
        (size, radius), (bin_, speed) = self._radius(), self._speed()
        velocity = tuple(speed * u for u in UNIT[direction])
        axis = int(velocity[0] == 0.0)
        sign = 1 if velocity[axis] > 0 else -1
        back, front = (extents(shape)[axis + 2 * side] * radius for side in ((0, 1) if sign > 0 else (1, 0)))
        gap = 0.05
        bar = back + front + max(0.16 * speed, 0.3)  # wholly hidden for 0.16 s: a frame or more from 7 fps on
        needed = 2 * gap + back + front + bar  # travel from just clear of the bar to just clear of it
        spare = max(0.0, speed * self.horizon - needed)
        lead_in = gap + spare * self.draws.unit()
        # Along the motion: start, lead_in, bar, then what is left of the way; all of it should fit in the frame.
        total = back + front + lead_in + bar + max(speed * self.horizon - lead_in - bar, 0.0)
        length = self.size[axis]
        behind = self.draws.unit() * max(length - total, 0.0)
        start, near = behind + back, behind + back + front + lead_in
        if sign < 0:
            start, low, high = length - start, length - near - bar, length - near
        else:
            low, high = near, near + bar
        left, right = self._room(shape, radius)[1 - axis]
        other = self.draws.uniform(left, right)
        path = physics.straight((start, other) if axis == 0 else (other, start), velocity)
        misfit = max(needed - speed * self.horizon, 0.0) + max(total - length, 0.0)
        body = self._body(color, shape, "occlude", path, size, radius, bin_, direction)
        return [body], misfit, Bar(axis, low, high), []

    def _collide(self, first, second):
        shape_a, shape_b = first[1], second[1]
        (size_a, radius_a), (bin_a, speed_a) = self._radius(), self._speed()
        (size_b, radius_b), (bin_b, speed_b) = self._radius(), self._speed()
        angle = self.draws.uniform(0, 2 * math.pi)
        other = angle + math.pi + self.draws.uniform(-0.6, 0.6)
        va = np.array([speed_a * math.cos(angle), speed_a * math.sin(angle)])
        vb = np.array([speed_b * math.cos(other), speed_b * math.sin(other)])
        relative = va - vb
        toward = relative / np.hypot(*relative)
        # From far apart and a little off centre to their first touch; then back in time from there.
        far = reach(shape_a) * radius_a + reach(shape_b) * radius_b
        offset = -2.0 * far * toward + self.draws.uniform(-0.5, 0.5) * (radius_a + radius_b) * toward[::-1] * (-1, 1)
        wait, _ = physics.first_contact(shape_a, radius_a, shape_b, radius_b, offset, relative)
        time = self.draws.uniform(0.3, 0.6) * self.horizon
        apart = offset + relative * (wait - time)
        middle = np.array([side * self.draws.uniform(0.4, 0.6) for side in self.size])
        start_b = middle - vb * time - (apart + relative * time) / 2
        start_a = start_b + apart
        flights = physics.collide(shape_a, radius_a, start_a, va, shape_b, radius_b, start_b, vb)
        misfit = 0.0
        bodies = []
        for (color, shape), size, radius, bin_, path in (
            (first, size_a, radius_a, bin_a, flights[0]), (second, size_b, radius_b, bin_b, flights[1])
        ):  # fmt: skip
            bodies.append(self._body(color, shape, "collide", path, size, radius, bin_))
            low, high = np.array(self._room(shape, radius)).T
            at = path.state(self._times[[0, -1]])[0]
            out = np.maximum(low - at, at - high).max(1)
            misfit += max(float(out[0]), 0.0) + 0.5 * max(float(out[1]) - radius, 0.0)
        return bodies, misfit, None, flights[2]
