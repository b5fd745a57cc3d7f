"""Outlines and exact motion of the world's objects: closed forms and events, no time stepping.

Units: world units, seconds; x to the right, y DOWN, as on the screen. Objects translate and never turn; contacts are
frictionless, so an impulse acts along the contact normal. Mass is area: pi * radius**2 for every shape, because the
radius of an object is that of the circle of equal area.

Shape letters: T times, V vertices.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
GRAVITY = 9.8  # units / s^2, downward
RESTITUTION = 0.7  # vertical speed kept at a bounce off the floor; walls and collisions keep all
REST_SPEED = 0.05  # a bounce slower than this (1.3e-4 units high) is the last: the object then lies on the floor
_STAR_INNER = 0.4  # inner over outer radius of the star


@functools.cache
def outline(shape: str) -> np.ndarray | None:
    """Vertices [V, 2] about the centroid, clockwise on the screen, with the area of the unit circle; None: a circle."""
    if shape == "circle":
        return None
    if shape == "square":
        angles, radii = np.deg2rad([-135, -45, 45, 135]), np.ones(4)
    elif shape == "triangle":
        angles, radii = np.deg2rad([-90, 30, 150]), np.ones(3)
    else:
        angles, radii = np.deg2rad(-90 + 36 * np.arange(10)), np.where(np.arange(10) % 2, _STAR_INNER, 1.0)
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    area = 0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))
    vertices = np.stack([x, y], axis=1) * math.sqrt(math.pi / area)
    vertices.setflags(write=False)
    return vertices


@functools.cache
def extents(shape: str) -> tuple[float, float, float, float]:
    """How far an object of radius 1 reaches from its centroid: (left, top, right, bottom), all positive."""
    vertices = outline(shape)
    if vertices is None:
        return (1.0, 1.0, 1.0, 1.0)
    (left, top), (right, bottom) = vertices.min(0).tolist(), vertices.max(0).tolist()
    return (-left, -top, right, bottom)


@functools.cache
def reach(shape: str) -> float:
    """Radius of the circumscribed circle of an object of radius 1."""
    vertices = outline(shape)
    return 1.0 if vertices is None else float(np.hypot(*vertices.T).max())


@dataclasses.dataclass(frozen=True)
class Flight:
    """Pieces of free flight: knots (time, x, y, vx, vy, ay), each valid until the next, the last for ever.

    `hits` are the (time, kind) of its contacts with the surroundings.
    """

    knots: tuple[tuple[float, ...], ...]
    hits: tuple[tuple[float, str], ...] = ()

    def state(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities [T, 2] at `times` [T]; at a contact, the velocity after it."""
        knots = np.asarray(self.knots)
        if len(knots) > 1:
            knots = knots[np.maximum(np.searchsorted(knots[:, 0], times, side="right") - 1, 0)]
        after = (times - knots[:, 0])[:, None]
        acceleration = knots[:, 5:] * (0.0, 1.0)
        velocity = knots[:, 3:5] + acceleration * after
        return knots[:, 1:3] + (knots[:, 3:5] + 0.5 * acceleration * after) * after, velocity

    def contacts(self, until: float) -> list[tuple[float, str]]:
        return [hit for hit in self.hits if hit[0] <= until]


@dataclasses.dataclass(frozen=True)
class Reflection:
    """Uniform motion reflected without loss at the sides of the box low..high: straight flight, folded."""

    start: tuple[float, float]
    velocity: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]

    def state(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities [T, 2] at `times` [T]."""
        low, length = np.asarray(self.low), np.subtract(self.high, self.low)
        unfolded = np.subtract(self.start, low) + np.asarray(self.velocity) * times[:, None]
        phase = np.mod(unfolded, 2 * length)
        sign = np.where(phase < length, 1.0, -1.0)
        return low + length - np.abs(phase - length), sign * self.velocity

    def contacts(self, until: float) -> list[tuple[float, str]]:
        hits = []
        for start, speed, low, high in zip(self.start, self.velocity, self.low, self.high):
            length, travelled = high - low, (start - low) + speed * until
            if speed > 0:  # walls of the unfolded line stand at every multiple of the length
                walls = range(math.floor((start - low) / length) + 1, math.floor(travelled / length) + 1)
            elif speed < 0:
                walls = range(math.ceil(travelled / length), math.ceil((start - low) / length))
            else:
                walls = range(0)
            hits += [((low + k * length - start) / speed, "wall") for k in walls]
        return sorted(hits)


@dataclasses.dataclass(frozen=True)
class Orbit:
    """Uniform circular motion; a positive `rate` (radians / s) turns clockwise on the screen."""

    centre: tuple[float, float]
    radius: float
    phase: float
    rate: float

    def state(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities [T, 2] at `times` [T]."""
        angle = self.phase + self.rate * times
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        turned = np.stack([-unit[:, 1], unit[:, 0]], axis=1)
        return np.asarray(self.centre) + self.radius * unit, self.rate * self.radius * turned

    def contacts(self, until: float) -> list[tuple[float, str]]:
        return []


def straight(start, velocity) -> Flight:
    """Uniform motion (or rest) from `start`."""
    return Flight(((0.0, *start, *velocity, 0.0),))


def fall(start, floor: float, velocity=(0.0, 0.0)) -> Flight:
    """A fall or a throw under gravity until the centroid is at y = `floor`, then bounces with RESTITUTION.

    The floor is without friction: the speed along it never changes, also once the object no longer bounces.
    """
    (x, y), (vx, vy) = start, velocity
    speed = math.sqrt(vy**2 + 2 * GRAVITY * (floor - y))  # downward, when it lands
    time = (speed - vy) / GRAVITY
    knots, hits = [(0.0, x, y, vx, vy, GRAVITY)], []
    while True:
        hits.append((time, "floor"))
        speed *= RESTITUTION
        at = (time, x + vx * time, floor, vx)
        if speed < REST_SPEED:
            return Flight((*knots, (*at, 0.0, 0.0)), tuple(hits))
        knots.append((*at, -speed, GRAVITY))
        time += 2 * speed / GRAVITY


def first_contact(shape_a, radius_a, shape_b, radius_b, offset, velocity):
    """When and how body a, at `offset` from body b and moving at `velocity` relative to it, first touches it.

    Returns (time, normal), the unit normal pointing from b to a, or None if they never touch. Exact for discs and
    polygons, convex or not: earliest of vertex on edge, edge on vertex, disc on edge, disc on vertex. Features that
    move apart do not count, so bodies that have just bounced are not found again.
    """
    a, b = outline(shape_a), outline(shape_b)
    offset, velocity = np.asarray(offset, float), np.asarray(velocity, float)
    if a is None and b is None:
        found = _point_meets_circles(offset, velocity, np.zeros((1, 2)), radius_a + radius_b)
    elif a is None:
        corners = b * radius_b
        found = _point_meets_circles(offset, velocity, corners, radius_a)
        found += _points_meet_edges(offset[None], velocity, corners, radius_a)
    elif b is None:
        corners = a * radius_a
        found = _point_meets_circles(-offset, -velocity, corners, radius_b)
        found += _points_meet_edges(-offset[None], -velocity, corners, radius_b)
        found = [(time, -normal) for time, normal in found]
    else:
        a, b = a * radius_a, b * radius_b
        found = _points_meet_edges(a + offset, velocity, b, 0.0)
        found += [(time, -normal) for time, normal in _points_meet_edges(b - offset, -velocity, a, 0.0)]
    return min(found, key=lambda item: item[0], default=None)


def _point_meets_circles(point, velocity, centres, radius):
    apart = point - centres  # [V, 2]
    speed2, approach = velocity @ velocity, apart @ velocity
    square = approach**2 - speed2 * (np.sum(apart**2, axis=1) - radius**2)
    hit = (square > 0) & (approach < 0)
    if not hit.any():
        return []
    times = (-approach[hit] - np.sqrt(square[hit])) / speed2
    k = int(np.argmin(np.where(times >= -1e-12, times, np.inf)))
    if times[k] < -1e-12:
        return []
    return [(max(0.0, float(times[k])), (apart[hit][k] + velocity * times[k]) / radius)]


def _points_meet_edges(points, velocity, corners, distance):
    """Earliest approach of `points` [P, 2] to within `distance` of the outer side of an edge of a polygon."""
    edges = np.roll(corners, -1, axis=0) - corners
    lengths = np.hypot(edges[:, 0], edges[:, 1])
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / lengths[:, None]  # outward, as the outline is clockwise
    closing = normals @ velocity  # [V], negative when approaching
    apart = points[:, None] - corners  # [P, V, 2]
    gap = np.einsum("pvi,vi->pv", apart, normals) - distance
    with np.errstate(divide="ignore", invalid="ignore"):
        times = gap / -closing
    along = np.einsum("pvi,vi->pv", apart, edges / lengths[:, None])
    along = along + np.where(np.isfinite(times), times, 0.0) * (edges @ velocity / lengths)
    times = np.where((closing < 0) & (times >= -1e-12) & (along >= 0) & (along <= lengths), times, np.inf)
    k = int(np.argmin(times))
    time = float(times.flat[k])
    return [(max(0.0, time), normals[k % len(corners)])] if math.isfinite(time) else []


def elastic(mass_a, velocity_a, mass_b, velocity_b, normal):
    """Velocities after a frictionless elastic collision with the given unit normal: an impulse along it."""
    approach = float(np.dot(np.subtract(velocity_a, velocity_b), normal))
    impulse = -2.0 * approach * mass_a * mass_b / (mass_a + mass_b) * np.asarray(normal)
    return velocity_a + impulse / mass_a, velocity_b - impulse / mass_b


def collide(shape_a, radius_a, start_a, velocity_a, shape_b, radius_b, start_b, velocity_b):
    """Two bodies in free straight flight and their elastic collisions with each other.

    Returns (flight_a, flight_b, times of contact). A star can be struck twice, on both sides of a notch.
    """
    mass_a, mass_b = radius_a**2, radius_b**2
    time, a, b = 0.0, np.asarray(start_a, float), np.asarray(start_b, float)
    va, vb = np.asarray(velocity_a, float), np.asarray(velocity_b, float)
    knots_a, knots_b, times = [(0.0, *a, *va, 0.0)], [(0.0, *b, *vb, 0.0)], []
    while len(times) < 8:
        contact = first_contact(shape_a, radius_a, shape_b, radius_b, a - b, va - vb)
        if contact is None:
            break
        wait, normal = contact
        time, a, b = time + wait, a + va * wait, b + vb * wait
        va, vb = elastic(mass_a, va, mass_b, vb, normal)
        knots_a.append((time, *a, *va, 0.0))
        knots_b.append((time, *b, *vb, 0.0))
        times.append(time)
    to_floats = lambda knots: tuple(tuple(map(float, knot)) for knot in knots)  # noqa: E731
    return Flight(to_floats(knots_a)), Flight(to_floats(knots_b)), times
