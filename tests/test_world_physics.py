"""The world's motions against the laws they claim, by energy, momentum, closed forms and pixels."""

import numpy as np
import pytest

from data_pipelines import world_physics as physics
from data_pipelines.world import SHAPES, World, WorldConfig
from data_pipelines.world_render import coverage
from data_pipelines.world_scene import HELD_SHAPE_MOTION


def bodies(motion, count=30, **config):
    objects = (2, 2) if motion == "collide" else (1, 1)
    world = World(WorldConfig(motions=(motion,), num_objects=objects, **config))
    scenes = [world.scene(i) for i in range(count)]
    return [(scene, body) for scene in scenes for body in scene.bodies]


def overlap(shapes, radii, centres):
    """Area that two bodies share, in units^2, from their exact coverage of a fine grid."""
    cells = 0.02
    middle = np.mean(centres, axis=0)
    origin = np.floor((middle - 1.5) / cells)[None]
    a, b = (
        coverage(shape, centre[None] / cells, np.array([radius / cells]), origin, 150, 150)
        for shape, radius, centre in zip(shapes, radii, centres)
    )
    return np.maximum(a + b - 1, 0).sum() * cells**2


@pytest.mark.parametrize("shape", SHAPES)
def test_outline_has_the_area_and_centroid_that_radius_and_position_mean(shape):
    if (vertices := physics.outline(shape)) is None:
        return
    x, y = vertices.T
    cross = x * np.roll(y, -1) - y * np.roll(x, -1)
    assert cross.sum() / 2 == pytest.approx(np.pi)
    centroid = [np.sum((v + np.roll(v, -1)) * cross) / (6 * np.pi) for v in (x, y)]
    np.testing.assert_allclose(centroid, 0, atol=1e-12)


@pytest.mark.parametrize("a", SHAPES)
@pytest.mark.parametrize("b", SHAPES)
def test_bodies_touch_exactly_at_the_time_of_first_contact(a, b):
    rng = np.random.default_rng(SHAPES.index(a) * 4 + SHAPES.index(b))
    for _ in range(3):
        radii = rng.uniform(0.3, 0.5, 2)
        angle = rng.uniform(0, 2 * np.pi)
        velocity = -np.array([np.cos(angle), np.sin(angle)])
        offset = -3 * velocity + rng.uniform(-0.3, 0.3, 2)
        time, normal = physics.first_contact(a, radii[0], b, radii[1], offset, velocity)
        assert np.hypot(*normal) == pytest.approx(1) and normal @ velocity < 0
        for later, touches in ((-0.02, False), (0.03, True)):
            centres = (offset + velocity * (time + later), np.zeros(2))
            # Anti-aliased edges that merely come close share up to ~1e-4 units^2 of pixels.
            assert (overlap((a, b), radii, centres) > 1e-9) == touches


def test_collisions_conserve_energy_and_momentum_and_exchange_some():
    times = np.linspace(0, 4, 41)
    exchanged = 0
    for scene in {id(s): s for s, _ in bodies("collide", count=40)}.values():
        mass = np.array([body.radius**2 for body in scene.bodies])  # by area
        velocity = np.stack([body.path.state(times)[1] for body in scene.bodies])
        momentum = np.einsum("k,kti->ti", mass, velocity)
        energy = np.einsum("k,kti,kti->t", mass, velocity, velocity)
        np.testing.assert_allclose(momentum - momentum[0], 0, atol=1e-9)
        np.testing.assert_allclose(energy, energy[0], rtol=1e-9)
        assert scene.collisions and 0 < scene.collisions[0][0] < scene.horizon
        exchanged += np.abs(velocity[0, -1] - velocity[0, 0]).max() > 0.1
    assert exchanged >= 38


def test_colliding_bodies_never_overlap():
    for scene in {id(s): s for s, _ in bodies("collide", count=12)}.values():
        for time in np.linspace(0, 2 * scene.horizon, 25):
            centres = [body.path.state(np.array([time]))[0][0] for body in scene.bodies]
            if np.hypot(*np.subtract(*centres)) < 4:
                shapes, radii = zip(*((body.shape, body.radius) for body in scene.bodies))
                assert overlap(shapes, radii, np.array(centres)) < 2e-3  # what edges in one grid cell add up to


def test_bounce_keeps_its_speed_and_turns_only_where_the_outline_meets_a_wall():
    times = np.linspace(0, 20, 4001)
    for scene, body in bodies("bounce"):
        position, velocity = body.path.state(times)
        np.testing.assert_allclose(np.hypot(*velocity.T), np.hypot(*velocity[0]), rtol=1e-12)
        left, top, right, bottom = np.array(physics.extents(body.shape)) * body.radius
        low, high = (left, top), (scene.width - right, scene.height - bottom)
        assert (position >= np.subtract(low, 1e-9)).all() and (position <= np.add(high, 1e-9)).all()
        # Free flight between contacts, and as many turns as contacts.
        hits = [time for time, _ in body.path.contacts(20.0)]
        turns = np.count_nonzero(np.diff(np.sign(velocity), axis=0))
        assert turns == len(hits)
        at = body.path.state(np.array(hits))[0]
        gap = np.minimum(np.abs(at - low), np.abs(at - high)).min(axis=1)
        np.testing.assert_allclose(gap, 0, atol=1e-9)
        steps = np.abs(np.diff(position, axis=0) - velocity[:-1] * 0.005).max(axis=1) > 1e-9
        assert np.count_nonzero(steps) <= len(hits)


def test_fall_is_gravity_between_bounces_that_keep_the_stated_share_of_speed():
    for scene, body in bodies("fall"):
        floor = scene.height - physics.extents(body.shape)[3] * body.radius
        (x, y), _ = (part[0] for part in body.path.state(np.zeros(1)))
        landing = np.sqrt(2 * (floor - y) / physics.GRAVITY)
        times = np.linspace(0, landing * 0.999, 20)
        np.testing.assert_allclose(body.path.state(times)[0][:, 1], y + physics.GRAVITY * times**2 / 2)
        hits = np.array([time for time, _ in body.path.contacts(np.inf)])
        assert hits[0] == pytest.approx(landing)
        np.testing.assert_allclose(body.path.state(hits)[0], np.tile([x, floor], (len(hits), 1)), rtol=1e-12)
        before, after = (body.path.state(hits[:-1] + step)[1][:, 1] for step in (-1e-9, 1e-9))
        np.testing.assert_allclose(after, -physics.RESTITUTION * before, atol=1e-6)
        # Each arc lasts 2 v / g; the last bounce that is left out would be lower than 2e-4 units.
        np.testing.assert_allclose(np.diff(hits), -2 * after / physics.GRAVITY, atol=1e-6)
        rest, velocity = body.path.state(hits[-1:] + 5)
        assert rest[0, 1] == floor and not velocity.any()
        assert (physics.RESTITUTION * abs(before[-1])) ** 2 * physics.RESTITUTION**2 / (2 * physics.GRAVITY) < 2e-4


def test_throw_is_a_parabola_up_and_sideways_until_it_lands():
    for scene, body in bodies("throw", shapes=((17, 32, 32),), extent=7.0):
        landing = body.path.contacts(np.inf)[0][0]
        times = np.linspace(0, landing, 50)
        position, velocity = body.path.state(times)
        start, launch = position[0], velocity[0]
        np.testing.assert_allclose(position[:, 0], start[0] + launch[0] * times, atol=1e-12)
        fall = launch[1] * times + physics.GRAVITY * times**2 / 2
        np.testing.assert_allclose(position[:, 1], start[1] + fall, atol=1e-9)
        floor = scene.height - physics.extents(body.shape)[3] * body.radius
        assert position[-1, 1] == pytest.approx(floor)
        assert launch[1] < 0 and (launch[0] > 0) == (body.sense == "right")
        later = body.path.state(np.linspace(landing, 3 * landing, 99))
        assert (later[0][:, 1] <= floor + 1e-9).all() and (later[1][:, 0] == launch[0]).all()


def test_orbit_is_uniform_circular_motion_in_the_stated_sense():
    times = np.linspace(0, 3, 301)
    for _, body in bodies("orbit"):
        position, velocity = body.path.state(times)
        arm = position - body.path.centre
        np.testing.assert_allclose(np.hypot(*arm.T), body.path.radius)
        np.testing.assert_allclose(np.einsum("ti,ti->t", arm, velocity), 0, atol=1e-9)
        moved = (position[2:] - position[:-2]) / 0.02
        np.testing.assert_allclose(moved, velocity[1:-1], atol=0.02)  # rate^3 r h^2 / 6
        turn = arm[0, 0] * arm[1, 1] - arm[0, 1] * arm[1, 0]
        assert (turn > 0) == (body.sense == "clockwise")  # y points down


def test_every_motion_but_the_held_out_is_drawn_with_every_shape():
    seen = {(body.shape, body.motion) for motion in ("throw", "orbit") for _, body in bodies(motion, count=60)}
    expected = {(shape, motion) for shape in SHAPES for motion in ("throw", "orbit")} - set(HELD_SHAPE_MOTION)
    assert seen == expected
