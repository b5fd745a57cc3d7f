"""The world: determinism, pixels against ground truth, splits, captions, bad configurations."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.world import COLORS, DIRECTIONS, MOTIONS, SHAPES, World, WorldConfig
from data_pipelines.world_physics import extents, outline, straight
from data_pipelines.world_render import coverage
from data_pipelines.world_scene import (
    HELD_COLOR_SHAPE,
    HELD_SHAPE_MOTION,
    OOD_RADII,
    OOD_SPEEDS,
    RADII,
    SPEEDS,
    TONES,
)
from sorax.errors import UserError

MIXED = ((1, 24, 40), (9, 32, 32), (5, 48, 16))


def digest(world, indices):
    out = {}
    for i in indices:
        item = world[i]
        out[i] = hashlib.sha256(item["video"].tobytes() + item["caption"].encode()).hexdigest()
    return out


def test_items_do_not_depend_on_order_process_or_pickling():
    world = World(WorldConfig(seed=3, shapes=MIXED, captions="mixed"))
    here = digest(world, range(12))
    code = (
        "import sys, pickle; from tests.test_world import digest;"
        "world = pickle.loads(bytes.fromhex(sys.argv[1])); sys.stdout.write(repr(digest(world, range(11, -1, -1))))"
    )
    command = [sys.executable, "-c", code, pickle.dumps(world).hex()]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert eval(there.stdout) == here
    assert len(set(here.values())) == 12
    assert digest(World(dataclasses.replace(world.config, seed=4)), [0]) != digest(world, [0])


def test_item_agrees_with_its_spec():
    world = World(WorldConfig(shapes=MIXED, captions="mixed"))
    kinds = set()
    for i in range(30):
        item, spec = world[i], world.spec(i)
        assert item["video"].shape == (spec.num_frames, spec.height, spec.width, 3)
        assert item["video"].dtype == np.uint8
        assert (item["caption"], item["fps"], item["key"]) == (spec.caption, spec.fps, spec.key)
        kinds.add(spec.num_frames)
    assert kinds == {1, 5, 9}
    with pytest.raises(IndexError):
        world[len(world)]


def test_an_item_is_the_same_at_any_size_and_frame_rate():
    base = World(WorldConfig(shapes=((9, 32, 32),), fps=8.0))
    other = World(WorldConfig(shapes=((17, 64, 64),), fps=16.0))
    for i in range(40):
        a, b = base.truth(i), other.truth(i)
        assert a.objects == b.objects and a.contacts == b.contacts
        for name in ("position", "velocity", "radius", "visible"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name)[:, ::2], atol=1e-9)
        # Every pixel is the mean of its square, so the mean of 2 x 2 smaller ones (up to rounding, and to the edges
        # where two objects share a pixel).
        fine = other[i]["video"][::2].reshape(9, 32, 2, 32, 2, 3).mean((2, 4))
        assert np.mean(np.abs(fine - base[i]["video"]) <= 1.51) > 0.995


def test_with_a_horizon_a_shorter_item_is_the_beginning_of_a_longer_one():
    short, long = (World(WorldConfig(shapes=((t, 32, 32),), horizon=1.5)) for t in (5, 17))
    for i in range(10):
        np.testing.assert_array_equal(short[i]["video"], long[i]["video"][:5])


def test_categories_do_not_depend_on_the_frame():
    names = lambda world, i: sorted((o.color, o.shape, o.motion, o.direction or "") for o in world.truth(i).objects)  # noqa: E731
    square, wide = World(), World(WorldConfig(shapes=((33, 32, 80),), extent=6.0))
    assert all(names(square, i) == names(wide, i) for i in range(30))


@pytest.mark.parametrize("shape", SHAPES)
def test_centroid_of_the_pixels_recovers_the_position(shape):
    config = WorldConfig(motions=("straight",), num_objects=(1, 1), backgrounds=("plain",), num_samples=10_000)
    world, checked = World(config), 0
    for i in range(60):
        scene = world.scene(i)
        if scene.bodies[0].shape != shape:
            continue
        checked += 1
        for size in (32, 64):
            video = world.scene_video(scene, num_frames=9, height=size, width=size, fps=8.0).astype(float)
            weight = np.abs(video - TONES[scene.background.tones[0]]).sum(-1)
            grid = np.arange(size) + 0.5
            total = weight.sum((1, 2))
            x, y = (weight.sum(1) @ grid / total, weight.sum(2) @ grid / total)
            truth = world.scene_truth(scene, num_frames=9, height=size, width=size, fps=8.0)
            np.testing.assert_allclose(np.stack([x, y], 1) / size, truth.position[0], atol=1e-3)
    assert checked >= 5


def chords(shape, centre, radius, rows, cols, lines=400):
    """Coverage by another road: exact chords of the outline at `lines` heights in every pixel row."""
    v = (np.arange(rows * lines) + 0.5) / lines
    if (vertices := outline(shape)) is None:
        half = np.sqrt(np.maximum(radius**2 - (v - centre[1]) ** 2, 0))
        crossings = np.stack([centre[0] - half, centre[0] + half])
    else:
        a = vertices * radius + centre
        b = np.roll(a, -1, axis=0)
        inside = (np.minimum(a, b)[:, 1:] <= v) & (v < np.maximum(a, b)[:, 1:])
        with np.errstate(divide="ignore", invalid="ignore"):
            x = a[:, :1] + (v - a[:, 1:]) * ((b - a)[:, :1] / (b - a)[:, 1:])
        crossings = np.sort(np.where(inside, x, np.inf), axis=0)
        crossings = np.where(np.isfinite(crossings), crossings, 1e6)
    left = np.arange(cols)[:, None]
    out = np.zeros((cols, len(v)))
    for low, high in zip(crossings[::2], crossings[1::2]):
        out += np.clip(np.minimum(high, left + 1) - np.maximum(low, left), 0, 1)
    return out.reshape(cols, rows, lines).mean(-1).T


def test_a_pixel_is_the_nearest_level_to_its_mean_colour():
    world = World(WorldConfig(motions=("orbit",), num_objects=(1, 1), backgrounds=("plain",)))
    for i in range(10):
        scene = world.scene(i)
        (body,), times = scene.bodies, np.arange(9) / 8.0
        cover = coverage(
            body.shape, body.path.state(times)[0] * 3.2, np.full(9, body.radius * 3.2), np.zeros((9, 2)), 32, 32
        )
        tone, color = (np.array(rgb, float) for rgb in (TONES[scene.background.tones[0]], COLORS[body.color]))
        exact = tone + cover[..., None] * (color - tone)
        assert np.abs(world[i]["video"] - exact).max() < 0.5 + 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_exact_area_in_every_pixel(shape):
    rng = np.random.default_rng(0)
    for radius in (0.3, 0.9, 2.7, 6.1):
        centre = np.array([14.0, 15.0]) + rng.random(2)
        cover = coverage(shape, centre[None], np.array([radius]), np.zeros((1, 2)), 30, 30)[0]
        assert cover.sum() == pytest.approx(np.pi * radius**2, rel=1e-9)
        # The reference's own error: 400 lines a pixel.
        np.testing.assert_allclose(cover, chords(shape, centre, radius, 30, 30), atol=2e-3)
        window = coverage(shape, centre[None], np.array([radius]), np.array([[9.0, 12.0]]), 6, 11)[0]
        np.testing.assert_allclose(window, cover[12:18, 9:20], atol=1e-9)


def test_later_objects_lie_over_earlier_ones_and_off_frame_parts_are_cut():
    world = World(WorldConfig(motions=("still",), num_objects=(2, 2), backgrounds=("plain",)))
    frame = dict(num_frames=1, height=50, width=50, fps=8.0)
    scene = world.scene(0)

    def placed(body, shape, x, y):
        return dataclasses.replace(body, shape=shape, path=straight((x, y), (0.0, 0.0)))

    back, front = scene.bodies
    bodies = (placed(back, "star", 4, 4), placed(front, "circle", 4, 4))
    video = world.scene_video(dataclasses.replace(scene, bodies=bodies), **frame)
    assert tuple(video[0, 20, 20]) == COLORS[front.color]

    bodies = (placed(back, "star", 0, 5), placed(front, "square", 10, 10))
    scene = dataclasses.replace(scene, bodies=bodies)
    np.testing.assert_allclose(world.scene_truth(scene, **frame).visible[:, 0], [0.5, 0.25], atol=1e-3)
    video = world.scene_video(scene, **frame)[0, :, :25].astype(float)
    tone, color = np.array(TONES[scene.background.tones[0]]), np.array(COLORS[back.color])
    area = (video - tone).sum() / (color - tone).sum()
    assert area == pytest.approx(0.5 * np.pi * (back.radius * 5) ** 2, rel=0.01)  # 8-bit rounding


def test_occluded_object_vanishes_and_comes_back():
    world = World(WorldConfig(motions=("occlude",), num_objects=(1, 1), shapes=((33, 32, 32),), fps=16.0))
    whole = 0
    for i in range(30):
        truth, scene = world.truth(i), world.scene(i)
        visible = truth.visible[0]
        assert visible[0] == pytest.approx(1.0) and visible.min() < 1e-6
        whole += visible[-1] > 0.999
        hidden = int(np.argmin(visible))
        video = world[i]["video"][hidden].astype(int)
        color = np.array(COLORS[scene.bodies[0].color])
        assert (np.abs(video - color).sum(-1) > 60).all()  # nowhere its colour
    assert whole >= 27  # a wide object that is slow needs more than these two seconds


def test_visible_fraction_matches_counted_pixels():
    world = World(WorldConfig(num_objects=(3, 3), extent=5.0))
    checked = 0
    for i in range(25):
        scene, truth = world.scene(i), world.truth(i)
        size = 500
        times = np.array([0.0, 0.5, 1.0])
        k, t = np.unravel_index(np.argmin(truth.visible[:, [0, 4, 8]]), (3, 3))
        scale = size / 5.0
        zero = np.zeros((1, 2))
        masks = [
            coverage(b.shape, b.path.state(times[[t]])[0] * scale, b.radii(times[[t]]) * scale, zero, size, size)[0]
            for b in scene.bodies
        ]
        seen = masks[k] * np.prod([1 - m for m in masks[k + 1 :]] + [np.ones((size, size))], axis=0)
        if scene.bar is not None:
            centres = (np.arange(size) + 0.5) / scale
            clear = ((centres < scene.bar.low) | (centres > scene.bar.high)).astype(float)
            seen = seen * (clear[None] if scene.bar.axis == 0 else clear[:, None])
        full = np.pi * (scene.bodies[k].radii(times[[t]])[0] * scale) ** 2
        value = truth.visible[k, [0, 4, 8][t]]
        assert value == pytest.approx(seen.sum() / full, abs=5e-3)
        checked += value < 0.9
    assert checked >= 5


def test_straight_objects_stay_in_the_frame_and_go_where_the_caption_says():
    world = World(WorldConfig(motions=("straight", "still"), num_objects=(1, 1), extent=6.0))
    counts = dict.fromkeys(DIRECTIONS, 0)
    pairs, still = {}, 0
    for i in range(1200):
        scene = world.scene(i)
        body = scene.bodies[0]
        pairs[body.color, body.shape] = pairs.get((body.color, body.shape), 0) + 1
        if body.direction is None:
            still += 1
            continue
        counts[body.direction] += 1
        if i < 300:
            truth = world.truth(i)
            assert truth.visible.min() > 0.9
            dx, dy = truth.position[0, -1] - truth.position[0, 0]
            assert DIRECTIONS[round(np.arctan2(dy, dx) / (np.pi / 4)) % 8] == body.direction
            assert world.spec(i).caption.endswith("moving " + body.direction)
    # Uniform: 75 a direction and 50 for each of the 24 pairs, +- 4 standard deviations.
    assert 500 < still < 700 and min(counts.values()) > 41 and max(counts.values()) < 110
    assert len(pairs) == 24 and min(pairs.values()) > 22 and max(pairs.values()) < 78


def allowed(color, shape, motion):
    return (color, shape) not in HELD_COLOR_SHAPE and (shape, motion) not in HELD_SHAPE_MOTION


def combos(world, count):
    for i in range(count):
        scene = world.scene(i)
        yield scene, [(b.color, b.shape, b.motion) for b in scene.bodies]


def test_held_out_combinations_are_in_every_heldout_item_and_nowhere_else():
    for split in ("train", "test", "ood"):
        for _, cast in combos(World(WorldConfig(split=split)), 400):
            assert all(allowed(*one) for one in cast)
    seen = set()
    for _, cast in combos(World(WorldConfig(split="heldout")), 400):
        held = [one for one in cast if not allowed(*one)]
        assert len(held) == 1
        seen |= {(c, s) for c, s, _ in held} & set(HELD_COLOR_SHAPE)
        seen |= {(s, m) for _, s, m in held} & set(HELD_SHAPE_MOTION)
    assert seen == {*HELD_COLOR_SHAPE, *HELD_SHAPE_MOTION}


def test_splits_share_no_item():
    keys = set()
    for split in ("train", "test", "heldout", "ood"):
        world = World(WorldConfig(split=split, motions=("straight",)))
        for i in range(100):
            keys.add((world.scene(i).bodies[0].path.knots, world.scene(i).bodies[0].radius))
    assert len(keys) == 400


@pytest.mark.parametrize("split, radii, speeds", [("train", RADII, SPEEDS), ("ood", OOD_RADII, OOD_SPEEDS)])
def test_sizes_and_speeds_are_in_the_ranges_of_their_split(split, radii, speeds):
    sizes, bins = set(), set()
    for scene, _ in combos(World(WorldConfig(split=split)), 300):
        for body in scene.bodies:
            low, high = radii[body.size]
            assert low <= body.radius <= high
            sizes.add(body.size)
            if body.speed_bin is None:
                continue
            velocity = body.path.state(np.zeros(1))[1][0]
            speed = abs(velocity[0]) if body.motion == "throw" else np.hypot(*velocity)
            low, high = speeds[body.speed_bin]
            assert low - 1e-9 <= speed <= high + 1e-9
            bins.add(body.speed_bin)
    assert (sizes, bins) == (set(radii), set(speeds))


def test_captions_name_what_is_there():
    for style in ("short", "detailed"):
        world = World(WorldConfig(captions=style, shapes=((9, 32, 32), (33, 32, 32))))
        for i in range(300):
            caption, truth = world.spec(i).caption, world.truth(i)
            assert len(caption.encode()) <= 510  # fits 512 slots even if every byte is a token
            assert "  " not in caption and "a orange" not in caption.lower()
            for one in truth.objects:
                size = f"{one.size} " if style == "detailed" else ""
                assert f"{size}{one.color} {one.shape}" in caption
                assert one.direction is None or one.direction in caption
                assert style == "short" or one.speed_bin != "medium" or "medium speed" in caption
            if style == "short" and len(truth.objects) == 1:
                assert len(caption) <= 60
            if style == "detailed":
                assert all(tone in caption for tone in world.scene(i).background.tones)


def test_images_are_clips_of_one_frame_described_without_motion():
    world = World(WorldConfig(shapes=((1, 32, 32),), num_objects=(2, 2)))
    clips = World(WorldConfig(shapes=((9, 32, 32),), num_objects=(2, 2)))
    for i in range(20):
        item, truth = world[i], world.truth(i)
        assert item["video"].shape == (1, 32, 32, 3)
        np.testing.assert_array_equal(item["video"][0], clips[i]["video"][0])
        a, b = truth.objects
        names = [f"{'an' if o.color == 'orange' else 'a'} {o.color} {o.shape}" for o in (a, b)]
        assert item["caption"] == " and ".join(names)
        assert {o.motion for o in truth.objects} == {"still"}


def test_motions_happen_within_the_clip():
    for motion, kind in (("bounce", "wall"), ("fall", "floor"), ("collide", "object")):
        objects = (2, 2) if motion == "collide" else (1, 1)
        for frames in (9, 33):
            world = World(WorldConfig(motions=(motion,), num_objects=objects, shapes=((frames, 32, 32),)))
            found = [any(c[1] == kind for c in world.truth(i).contacts) for i in range(30)]
            assert np.mean(found) > 0.9, (motion, frames)


@pytest.mark.parametrize("motion", MOTIONS)
def test_odd_frames_render(motion):
    objects = (2, 2) if motion == "collide" else (1, 1)
    for split in ("train", "ood"):
        shapes = ((5, 8, 8), (2, 8, 50), (3, 70, 9))
        world = World(WorldConfig(split=split, motions=(motion,), num_objects=objects, shapes=shapes, fps=1.5))
        for i in range(12):
            assert np.isfinite(world.truth(i).visible).all() and world[i]["video"].any()


@pytest.mark.parametrize(
    "bad",
    [
        {"split": "validation"}, {"motions": ("straight", "jump")}, {"motions": ()}, {"shapes": ((9, 7, 32),)},
        {"shapes": ((0, 32, 32),)}, {"shapes": ()}, {"shapes": (9, 32, 32)}, {"shapes": ((9, 32.5, 32),)},
        {"num_objects": (0, 1)}, {"num_objects": (2, 4)}, {"num_objects": (3, 2)}, {"fps": 0}, {"extent": 3.0},
        {"split": "ood", "extent": 6.0}, {"captions": "long"}, {"backgrounds": ("striped",)}, {"seed": -1},
        {"num_samples": 0}, {"motions": ("collide",)}, {"motions": ("occlude",), "num_objects": (1, 2)},
        {"horizon": 0.0}, {"fps": "fast"},
    ],
)  # fmt: skip
def test_unusable_configurations_are_one_line_errors(bad):
    with pytest.raises(UserError) as caught:
        WorldConfig(**bad)
    assert "\n" not in str(caught.value) and next(reversed(bad)) in str(caught.value)


def test_extents_bound_the_outlines():
    for shape in SHAPES:
        left, top, right, bottom = extents(shape)
        cover = coverage(shape, np.array([[20.0, 20.0]]), np.array([5.0]), np.zeros((1, 2)), 40, 40)[0] > 1e-9
        rows, cols = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
        assert cols[0] == int(20 - 5 * left) and cols[-1] == int(np.ceil(20 + 5 * right)) - 1
        assert rows[0] == int(20 - 5 * top) and rows[-1] == int(np.ceil(20 + 5 * bottom)) - 1
