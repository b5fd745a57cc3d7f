"""PhyWorld's scenes: ranges, physics, the same item at any time, and a source like any other."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.phyworld import CAPTIONS, EXTENT, GRAVITY, MOTIONS, SPLITS, PhyWorld, PhyWorldConfig
from data_pipelines.sources import open_source
from sorax.errors import UserError
from sorax.held_out import open_splits
from sorax.vae import VAEConfig


def world(**settings):
    return PhyWorld(PhyWorldConfig(**dict(num_samples=150, size=32) | settings))


def speeds(scene):
    return [abs(float(body.path.state(np.zeros(1))[1][0, 0])) for body in scene.bodies]


def inside(value, low, high):
    return low - 1e-9 <= value <= high + 1e-9


def test_training_stays_in_the_published_ranges_and_ood_leaves_them_in_every_item():
    for split in SPLITS:
        source = world(split=split)
        for i in range(len(source)):
            scene = source.scene(i)
            radii = (0.5, 1.5) if len(scene.bodies) == 2 else (0.7, 1.4)
            usual = [inside(v, 1, 4) for v in speeds(scene)] + [inside(b.radius, *radii) for b in scene.bodies]
            assert all(usual) == (split != "ood")


def test_balls_start_whole_in_the_frame_and_collide_in_time():
    for split in SPLITS:
        source = world(split=split, motions=("collision",))
        for i in range(60):
            scene, truth = source.scene(i), source.truth(i)
            assert np.all(truth.visible[:, 0] == 1)
            if sum(speeds(scene)) > 0:
                assert all(time >= 0.8 - 1e-9 for time, *_ in scene.collisions)
            if split != "ood":
                assert len(scene.collisions) == 1 and scene.collisions[0][0] <= 2.4 + 1e-9


def test_collision_keeps_momentum_and_energy_with_mass_by_area():
    source = world(motions=("collision",))
    for i in range(20):
        scene, ends = source.scene(i), np.array([0.0, 5.0])
        mass = np.array([body.radius**2 for body in scene.bodies])
        v = np.stack([body.path.state(ends)[1] for body in scene.bodies])  # [K, 2, 2]
        momentum, energy = np.einsum("k,kta->ta", mass, v), np.einsum("k,kta->t", mass, v**2)
        assert not np.allclose(v[:, 0], v[:, 1])
        np.testing.assert_allclose(momentum[0], momentum[1], atol=1e-9)
        np.testing.assert_allclose(energy[0], energy[1], rtol=1e-9)


def test_uniform_motion_is_uniform_and_the_parabola_falls_without_a_floor():
    for motion, acceleration in (("uniform", 0.0), ("parabola", GRAVITY)):
        truth = world(motions=(motion,), num_frames=40).truth(3)
        change = np.diff(truth.position[0], n=2, axis=0) * EXTENT / 0.1**2
        np.testing.assert_allclose(change, [[0, acceleration]] * 38, atol=1e-6)


def test_items_do_not_depend_on_order_length_or_size():
    source = world()
    again = world(num_samples=500, num_frames=33, size=64)
    for i in (5, 0, 77):
        assert source.scene(i) == again.scene(i)
        assert source.caption(i) == again.caption(i) == CAPTIONS[source.motion(i)]
    assert {source.motion(i) for i in range(150)} == set(MOTIONS)
    assert source.scene(5) != world(split="test").scene(5) != world(seed=1, split="test").scene(5)


def test_it_is_a_source_and_is_scored_in_and_out_of_distribution():
    data = dict(path="phyworld", phyworld=dict(num_samples=8, num_frames=5, size=32))
    source = open_source(data, split="test", spatial_multiple=8, temporal_stride=2)
    sample, spec = source[2], source.spec(2)
    assert sample["video"].shape == (5, 32, 32, 3) and sample["video"].dtype == np.uint8 and sample["fps"] == 10.0
    assert dataclasses.astuple(spec) == (5, 32, 32, 10.0, sample["caption"], "phyworld/test/0/2")
    vae = VAEConfig(width_multipliers=(1, 2), temporal_downsample=(True,))
    splits = open_splits(data, vae, 4, 8, alike=True)
    assert {name: split.source.config.split for name, split in splits.items()} == {"test": "test", "ood": "ood"}
    with pytest.raises(UserError, match=r"data\.phyworld\.num_frames"):
        open_source(dict(data, phyworld=dict(frames=5)))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(motions=()), "motions"), (dict(motions=("bounce",)), "uniform, parabola"), (dict(split="heldout"), "ood"),
        (dict(size=8), "16 or more"), (dict(num_frames=1.5), "whole number"),
    ],
)  # fmt: skip
def test_unusable_settings_say_what_to_do(settings, said):
    with pytest.raises(UserError, match=said):
        PhyWorldConfig(**settings)
