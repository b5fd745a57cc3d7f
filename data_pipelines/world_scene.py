"""The words of the world and what a scene is: objects in world units and continuous time.

The frame's shorter side is `extent` world units (10, as in PhyWorld, arXiv 2411.02385, whose speed and radius ranges
these are); x to the right, y DOWN, origin at the top-left corner.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from data_pipelines import world_physics as physics

COLORS = {
    "red": (220, 25, 45),
    "green": (40, 190, 60),
    "blue": (30, 90, 255),
    "yellow": (250, 240, 50),
    "orange": (250, 135, 20),
    "purple": (165, 40, 225),
    "cyan": (60, 220, 235),
    "white": (245, 245, 245),
}
TONES = {
    "black": (12, 12, 14),
    "dark grey": (58, 58, 60),
    "navy": (16, 26, 58),
    "dark brown": (56, 36, 22),
    "dark green": (14, 48, 34),
}
BAR_COLOR = (120, 120, 120)
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
UNIT = {name: (round(math.cos(k * math.pi / 4), 15), round(math.sin(k * math.pi / 4), 15))
        for k, name in enumerate(DIRECTIONS)}  # fmt: skip
MOTIONS = ("still", "straight", "bounce", "fall", "throw", "collide", "orbit", "occlude", "resize")
SPLITS = ("train", "test", "heldout", "ood")
BACKGROUNDS = ("plain", "two-tone")

# Combinations that train, test and ood never contain; every item of heldout has at least one of them. Each colour
# is held out with one shape and each shape with two colours and one motion, so that no word is rarer than another.
HELD_COLOR_SHAPE = (
    ("blue", "circle"), ("orange", "circle"), ("yellow", "square"), ("white", "square"),
    ("red", "triangle"), ("cyan", "triangle"), ("green", "star"), ("purple", "star"),
)  # fmt: skip
HELD_SHAPE_MOTION = (("circle", "throw"), ("square", "orbit"), ("triangle", "bounce"), ("star", "resize"))

# Radii in units and speeds in units / s: PhyWorld's training ranges in three bins with gaps between them, and its
# ranges outside training, named by the nearest bin.
RADII = {"small": (0.7, 0.85), "medium": (0.975, 1.125), "large": (1.25, 1.4)}
SPEEDS = {"slow": (1.0, 1.8), "medium": (2.1, 2.9), "fast": (3.2, 4.0)}
OOD_RADII = {"small": (0.3, 0.6), "large": (1.5, 2.0)}
OOD_SPEEDS = {"slow": (0.0, 0.8), "fast": (4.5, 6.0)}


@dataclasses.dataclass(frozen=True)
class Body:
    """One object. `radius` (world units) is that of the circle of equal area, whatever the shape.

    direction: of DIRECTIONS for motion along a line (straight, occlude), else None. sense: right | left (throw),
    clockwise | counterclockwise (orbit), growing | shrinking (resize), else None. size: at time 0.
    """

    color: str
    shape: str
    size: str
    motion: str
    direction: str | None
    speed_bin: str | None
    sense: str | None
    path: physics.Flight | physics.Reflection | physics.Orbit
    radius: float
    end_radius: float
    resize_time: float = 1.0

    def radii(self, times: np.ndarray) -> np.ndarray:
        """Radius [T] at `times`: linear from radius to end_radius over resize_time, then constant."""
        share = np.minimum(times / self.resize_time, 1.0)
        return self.radius + (self.end_radius - self.radius) * share

    @property
    def is_still(self) -> bool:
        return self.motion == "still"


@dataclasses.dataclass(frozen=True)
class Bar:
    """The grey occluder, in front of everything: low..high along `axis` (0 = x), across the whole frame."""

    axis: int
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Background:
    """One tone, or two that meet at `at` (world units) along `axis` (0 = x: side by side)."""

    tones: tuple[str, ...]
    axis: int
    at: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A world `width` x `height` units and what moves in it, for any time >= 0; later bodies lie over earlier ones.

    horizon: the seconds for which objects were placed to stay in the frame. collisions: (time, i, j).
    held_out: color-shape | shape-motion | None.
    """

    width: float
    height: float
    horizon: float
    bodies: tuple[Body, ...]
    background: Background
    bar: Bar | None = None
    collisions: tuple[tuple[float, int, int], ...] = ()
    held_out: str | None = None

    def contacts(self, until: float) -> list[tuple[float, str, int, int]]:
        """Contacts up to `until` seconds, in order: (time, wall | floor | object, i, j), j = -1 for wall, floor."""
        found = [(time, "object", i, j) for time, i, j in self.collisions if time <= until]
        for i, body in enumerate(self.bodies):
            found += [(time, kind, i, -1) for time, kind in body.path.contacts(until)]
        return sorted(found)
