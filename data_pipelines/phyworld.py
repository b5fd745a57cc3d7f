"""The scenes of PhyWorld ("How Far is Video Generation from World Model", arXiv 2411.02385), drawn as the world is.

A world of 10 x 10 units, 10 frames a second, balls; a model is shown the first 3 of 32 frames and continues. Three
motions, with the ranges and the placement of the generators that were released with the paper
(github.com/phyworld/phyworld, id_ood_data):

    uniform    one ball moves to the right at a constant speed
    parabola   one ball is thrown to the right from near the top and falls at 2.5 units / s^2, without a floor
    collision  two balls of one height meet head on, elastically; mass is area

What differs from theirs: radii and speeds are drawn from the whole range, not from a grid; pixels are exact area
coverage (theirs: a soft edge that widens with the radius); red and blue balls on black (theirs: on white), since these
are the colours that `sorax.parser` knows; frame t is at t / 10 s (theirs: 0.01 s later), and the fall is exact.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from data_pipelines import world_physics as physics
from data_pipelines.world import World, check_choice, check_setting
from data_pipelines.world_sampling import Draws
from data_pipelines.world_scene import Background, Body, Scene
from sorax.errors import UserError

MOTIONS = ("uniform", "parabola", "collision")
SPLITS = ("train", "test", "ood")
EXTENT, FPS, NUM_FRAMES, GIVEN_FRAMES = 10.0, 10.0, 32, 3
GRAVITY = 2.5  # of the parabola, in units / s^2
CAPTIONS = {
    "uniform": "a ball moving at constant speed",
    "parabola": "a ball thrown and falling",
    "collision": "two balls colliding",
}

SPEEDS, OOD_SPEEDS = (1.0, 4.0), ((0.0, 0.8), (4.5, 6.0))  # units / s
RADII, OOD_RADII = (0.7, 1.4), ((0.3, 0.6), (1.5, 2.0))  # units
PAIR_RADII, OOD_PAIR_RADII = (0.5, 1.5), ((0.3, 0.4), (1.7, 2.0))  # of the two that collide
_MARGIN = 0.5  # units to the upper and the lower edge
_IN_VIEW = 2.4  # seconds for which a single ball stays in the frame, if it can
_APART = 0.8  # seconds before a collision, and again after it
_DURATION = 3.2  # seconds that theirs last
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class PhyWorldConfig:
    """What to draw. An unusable value raises UserError.

    split: train | test (same distribution, other items) | ood (one or more of an item's radii and speeds are outside
      the training ranges, below or above).
    motions: one that is named twice is drawn twice as often. size: pixels along a side of the square frame.
    """

    split: str = "train"
    seed: int = 0
    num_samples: int = 10_000
    num_frames: int = NUM_FRAMES
    size: int = 128
    motions: tuple[str, ...] = MOTIONS
    fps: ClassVar[float] = FPS
    extent: ClassVar[float] = EXTENT

    def __post_init__(self):
        for name in ("seed", "num_samples", "num_frames", "size"):
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise UserError(f"phyworld: {name} = {getattr(self, name)!r} is no whole number: use one.") from None
        object.__setattr__(self, "motions", tuple(self.motions))
        check_choice("split", (self.split,), SPLITS, "phyworld")
        check_choice("motions", self.motions, MOTIONS, "phyworld")
        for name, least in (("seed", 0), ("num_samples", 1), ("num_frames", 1), ("size", 16)):
            value = getattr(self, name)
            check_setting(value >= least, name, value, f"use {least} or more", "phyworld")

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(frames, height, width) of every item, in the form of a world's."""
        return ((self.num_frames, self.size, self.size),)


class PhyWorld(World):
    """Random-access source of PhyWorld's scenes, with all that `World` offers: captions, truth, any size and rate."""

    name = "phyworld"
    scored_splits = ("test", "ood")

    def __init__(self, config: PhyWorldConfig | None = None):
        super().__init__(config or PhyWorldConfig())

    def motion(self, index: int) -> str:
        """Of MOTIONS."""
        return self._draws(self._index(index), 0).choice(self.config.motions)

    def scene(self, index: int) -> Scene:
        """What happens in an item, in units and continuous time."""
        draws = self._draws(self._index(index), 1)
        motion = self.motion(index)
        make = dict(uniform=_uniform, parabola=_parabola, collision=_collision)[motion]
        bodies, times = make(draws, self.config.split)
        collisions = tuple((time, 0, 1) for time in times)
        return Scene(EXTENT, EXTENT, _DURATION, bodies, Background(("black",), 0, EXTENT), None, collisions)

    def caption(self, index: int, scene: Scene | None = None) -> str:
        """One for each motion: what happens is known from the frames that are given."""
        return CAPTIONS[self.motion(index)]


def _quantities(draws: Draws, split, *ranges):
    """A number from each (range, ranges out of distribution); of split "ood" one of them or more is outside."""
    outside = 1 + int(draws.unit() * (2 ** len(ranges) - 1)) if split == "ood" else 0
    return [draws.uniform(*(draws.choice(others) if outside >> k & 1 else usual))
            for k, (usual, others) in enumerate(ranges)]  # fmt: skip


def _across(draws: Draws, radius, speed):
    """x of a ball that starts wholly in the frame and moves to the right, long in view if its speed allows that."""
    farthest = EXTENT - (_IN_VIEW * speed + radius)
    if farthest < radius:
        farthest = radius + draws.uniform(0, 0.5)
    return draws.uniform(radius, farthest)


def _uniform(draws, split):
    radius, speed = _quantities(draws, split, (RADII, OOD_RADII), (SPEEDS, OOD_SPEEDS))
    x = _across(draws, radius, speed)
    y = draws.uniform(radius + _MARGIN, EXTENT - _MARGIN - radius)
    path = physics.straight((x, y), (speed, 0.0))
    return (_ball("red", "straight", path, radius, speed, direction="right"),), []


def _parabola(draws, split):
    radius, speed = _quantities(draws, split, (RADII, OOD_RADII), (SPEEDS, OOD_SPEEDS))
    x = _across(draws, radius, speed)
    y = _MARGIN + radius + draws.uniform(0, 1)
    path = physics.Flight(((0.0, x, y, speed, 0.0, GRAVITY),))
    return (_ball("red", "throw", path, radius, speed, sense="right"),), []


def _collision(draws, split):
    while True:
        pair, speed = (PAIR_RADII, OOD_PAIR_RADII), (SPEEDS, OOD_SPEEDS)
        r1, r2, v1, v2 = _quantities(draws, split, pair, pair, speed, speed)
        placed = _place_pair(draws, r1, r2, v1, v2)
        if placed:  # not every pair fits into the frame long enough before and after
            break
    y = draws.uniform(max(r1, r2) + _MARGIN, EXTENT - _MARGIN - max(r1, r2))
    starts = [(x, y) for x in placed]
    first, second, times = physics.collide("circle", r1, starts[0], (v1, 0.0), "circle", r2, starts[1], (-v2, 0.0))
    return (_ball("red", "collide", first, r1, v1), _ball("blue", "collide", second, r2, v2)), times


def _place_pair(draws, r1, r2, v1, v2):
    """x of two balls, both wholly in the frame, that do not meet too early or too late; None if none was found."""
    closing, both = v1 + v2, r1 + r2
    least, most = _APART * closing + both, (_DURATION - _APART) * closing + both
    if max(r1, r2) > 2 * min(r1, r2):  # the lighter one is thrown back far
        most = 1.25 * least
    most = min(most, EXTENT - both)
    for _ in range(_TRIES):
        apart = draws.uniform(least, most)
        last = EXTENT - r2 - apart
        first = last - 0.05 * EXTENT if r2 > 2 * r1 else r1
        x1 = max(draws.uniform(first, last), r1)
        x2 = min(x1 + apart, EXTENT - r2)
        if closing == 0 or (x2 - x1 - both) / closing >= _APART:
            return x1, x2
    return None


def _ball(color, motion, path, radius, speed, direction=None, sense=None):
    size = "small" if radius < 0.9 else "medium" if radius < 1.2 else "large"
    bin_ = "slow" if speed < 2 else "medium" if speed < 3 else "fast"
    return Body(color, "circle", size, motion, direction, bin_, sense, path, radius, radius)
