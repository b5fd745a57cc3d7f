"""What a caption promises is asked where the clip can show it, found where it is there, and missed where it is not."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.world import MOTIONS, World, WorldConfig
from data_pipelines.world_scene import RADII, SPEEDS
from experiments.bench.defects import inject
from sorax.judging import ATTRIBUTES, DETAILED, SHORT, judge
from sorax.motion_kinds import checks, seen_truth
from sorax.parser import parse_clip

FRAME = np.array([1.0, 1.0])


def world_of(motion, count=12, **changes):
    config = dict(shapes=((17, 64, 64),), motions=(motion,), num_samples=count, split="test", seed=3)
    return World(WorldConfig(**config | dict(num_objects=(2, 2) if motion == "collide" else (1, 1)) | changes))


@pytest.mark.parametrize("motion", MOTIONS)
def test_true_clips_show_all_that_their_captions_say(motion):
    world = world_of(motion)
    found = [judge(world[i]["video"], world.truth(i), asked=DETAILED) for i in range(len(world))]
    assert all(j["joint"] for j in found)
    assert sum(j["motion"] is not None for j in found) >= 0.75 * len(found)
    asked = sum(j["speed"] is not None for j in found)
    assert asked == 0 if motion in ("still", "fall", "resize") else asked >= 0.5 * len(found)


def test_each_motion_is_told_from_the_others():
    rates = {}
    for other in MOTIONS:
        world = world_of(other, 40)
        truths = [world.truth(i) for i in range(len(world))]
        for motion in MOTIONS:
            shown = []
            for truth in truths:
                sense = truth.objects[0].sense if other == motion else None
                senses = dict(throw=("right", "left"), orbit=("clockwise", "counterclockwise"),
                              resize=("growing", "shrinking"))  # fmt: skip
                ideals = [seen_truth(truth, k, FRAME) for k in range(truth.num_objects)]
                found = [checks(motion, way, ideals[0], ideals[-1] if len(ideals) > 1 else None)
                         for way in ([sense] if sense else senses.get(motion, (None,)))]  # fmt: skip
                shown.append(any(each and all(value >= 1 for value in each.values()) for each in found))
            rates[motion, other] = np.mean(shown)
    alike = {("straight", "occlude"), ("straight", "collide"), ("throw", "orbit"), ("bounce", "fall")}
    for (motion, other), rate in rates.items():
        if motion == other:
            assert rate >= 0.95, (motion, rate)
        elif not {(motion, other), (other, motion)} & alike:
            assert rate <= 0.35, (motion, other, rate)


@pytest.mark.parametrize("attribute, bins", [("size", RADII), ("speed", SPEEDS)])
def test_another_size_or_speed_is_caught(attribute, bins):
    world = world_of("straight", 20)
    for i in range(len(world)):
        video, truth = world[i]["video"], world.truth(i)
        field = dict(size="size", speed="speed_bin")[attribute]
        own = getattr(truth.objects[0], field)
        for name in bins:
            changed = dataclasses.replace(truth.objects[0], **{field: name})
            scale = np.mean(bins[name]) / np.mean(bins[own])  # the true clip of the other caption
            larger, faster = (scale, 1) if field == "size" else (1, scale)
            start = truth.position[:, :1]
            other = dataclasses.replace(truth, objects=(changed,), radius=truth.radius * larger,
                                        position=start + (truth.position - start) * faster)  # fmt: skip
            found = judge(video, other, asked=(attribute,))[attribute]
            assert found == (name == own) or found is None


def test_relations_are_those_at_the_start():
    world = world_of("still", 20, num_objects=(2, 3))
    for i in range(len(world)):
        video, truth = world[i]["video"], world.truth(i)
        assert judge(video, truth, asked=DETAILED)["relation"]
        order = [1, 0, *range(2, truth.num_objects)]
        swapped = {name: getattr(truth, name)[order] for name in ("position", "velocity", "radius", "visible")}
        there = dataclasses.replace(truth, **swapped)  # the other one is left of, above ... it
        assert not judge(video, there, asked=("relation",))["relation"]
    single = world_of("still", 1)
    assert judge(single[0]["video"], single.truth(0), asked=DETAILED)["relation"] is None


def test_what_the_caption_does_not_say_is_none():
    world = world_of("straight", 2, num_objects=(1, 1))
    video, truth = world[0]["video"], world.truth(0)
    found = judge(video, truth)
    assert tuple(found) == ATTRIBUTES
    assert [name for name in DETAILED if found[name] is not None] == list(SHORT)
    assert judge(video, truth, tracks=parse_clip(video)) == found
    one = judge(video, truth, asked=["color"])
    assert one["color"] is True and one["joint"] is True and one["shape"] is None
    with pytest.raises(ValueError, match="colour"):
        judge(video, truth, asked=("colour",))
    image = World(dataclasses.replace(world.config, shapes=((1, 64, 64),)))
    found = judge(image[0]["video"], image.truth(0), asked=DETAILED)
    assert found["size"] and found["joint"] and {found[n] for n in ("motion", "speed", "direction")} == {None}


def test_a_clip_too_short_to_show_a_motion_is_not_asked_for_it():
    world = world_of("bounce", 12, shapes=((17, 64, 64),), horizon=2.0)
    short = World(dataclasses.replace(world.config, shapes=((3, 64, 64),)))  # it has not met a wall yet
    found = [judge(short[i]["video"], short.truth(i)) for i in range(len(short))]
    assert all(j["motion"] is None and j["joint"] for j in found)


@pytest.mark.parametrize(
    "motion, attribute", [("straight", "direction"), ("orbit", "motion"), ("throw", "motion")]
)  # fmt: skip
def test_the_other_way_round_is_caught(motion, attribute):
    world = world_of(motion, 8)
    made = {i: inject("wrong direction", world, i, np.random.default_rng(i)) for i in range(len(world))}
    made = {i: clip[0] for i, clip in made.items() if clip is not None}
    assert len(made) >= 3
    for i, video in made.items():
        found = judge(video, world.truth(i))
        assert found[attribute] is False and not found["joint"] and found["color"] and found["shape"]


def test_a_clip_that_changes_its_mind_fails():
    world = world_of("straight", 10)
    for i in range(len(world)):
        made = inject("swap colour", world, i, np.random.default_rng(i))
        assert made is None or not judge(made[0], world.truth(i))["joint"]
