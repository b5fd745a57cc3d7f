"""The picture behind the objects is the one that the world drew, and the bar is where it is."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.world import COLORS, World, WorldConfig
from sorax.background import background, find_bar
from sorax.parser import name_distance


def scenes(count, **changes):
    world = World(WorldConfig(**dict(shapes=((17, 64, 64),), num_samples=count, split="test", seed=9) | changes))
    for index in range(count):
        scene = world.scene(index)
        empty = World.scene_video(dataclasses.replace(scene, bodies=()), num_frames=1, height=64, width=64, fps=8.0)
        yield world[index]["video"], empty[0], world.truth(index)


@pytest.mark.parametrize("motions", [("still", "resize"), ("occlude",), ("bounce", "throw", "orbit")])
def test_the_picture_behind_is_that_of_the_empty_scene(motions):
    objects = (1, 1) if motions == ("occlude",) else (2, 3)
    for video, empty, truth in scenes(8, motions=motions, num_objects=objects):
        picture, tones = background(video.astype(np.float32), name_distance(video, COLORS), find_bar(video))
        off = np.abs(picture - empty).max(-1)
        # what no frame shows is continued; where that meets another tone nobody can know it to the pixel
        assert np.mean(off > 2) <= 0.01 and len(tones) <= 3
        assert np.median(off) < 0.5 and truth.num_objects >= objects[0]


def test_the_bar_is_found_to_a_fraction_of_a_pixel_and_only_where_there_is_one():
    for video, _, truth in scenes(12, motions=("occlude",), num_objects=(1, 1)):
        bar, (axis, low, high) = find_bar(video), truth.bar
        assert bar.axis == axis
        assert max(abs(bar.low - np.clip(low, 0, 1)), abs(bar.high - np.clip(high, 0, 1))) < 0.25 / 64
        assert bar.pixels(video.shape[1:3]).mean() == pytest.approx(bar.high - bar.low, abs=1 / 64)
    assert not any(find_bar(video) for video, _, truth in scenes(12, motions=("straight", "collide", "still")))


def test_a_clip_without_anything_flat_has_no_background():
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert background(noise.astype(np.float32), name_distance(noise, COLORS)) is None
