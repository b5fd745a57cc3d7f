"""Nothing in a true clip is impossible, and what is impossible is found, named and placed."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.world import MOTIONS, World, WorldConfig
from experiments.bench.defects import KINDS, inject
from sorax.abnormal import KINDS as EVENTS
from sorax.abnormal import abnormal_events, persistence, speed_drift
from sorax.parser import parse_clip

# Which events name a defect: those that any viewer would call it.
NAMES = {
    "swap colour": {"recolor"}, "swap shape": {"deform"}, "delete": {"vanish"}, "delete while hidden": {"vanish"},
    "appear": {"appear"}, "split in two": {"split", "deform"}, "teleport": {"teleport"}, "stretch 1.5x": {"deform"},
}  # fmt: skip


def world_of(motions=MOTIONS, count=40, **changes):
    config = dict(shapes=((17, 64, 64),), motions=motions, num_samples=count, split="test", seed=5)
    return World(WorldConfig(**config | changes))


def behind_a_bar(count=40):
    return world_of(("occlude",), count, num_objects=(1, 1), shapes=((25, 64, 96),))


def test_nothing_in_true_clips_is_abnormal():
    world = world_of(count=40)
    assert not any(abnormal_events(world[i]["video"]) for i in range(len(world)))


@pytest.mark.parametrize("kind", NAMES)
def test_defects_are_found_named_and_placed(kind):
    world, done = world_of(("still", "straight", "bounce", "throw", "orbit"), num_objects=(1, 2)), 0
    if kind == "delete while hidden":
        world = behind_a_bar()
    for i in range(len(world)):
        made = inject(kind, world, i, np.random.default_rng(i)) if done < 6 else None
        if made is None:
            continue
        video, k, first = made
        done += 1
        events = abnormal_events(video)
        assert {event.kind for event in events} <= set(EVENTS)
        named = [event for event in events if event.kind in NAMES[kind]]
        assert named, (i, first, events)
        event, late = named[0], 8 if kind == "delete while hidden" else 2
        assert first - 2 <= event.frame <= first + late
        if kind not in ("teleport", "delete while hidden"):
            there = world.truth(i).position[k, event.frame]
            assert np.hypot(event.x - there[0], event.y - there[1]) < 0.25
    assert done >= (3 if kind == "delete while hidden" else 6) and kind in KINDS


def test_objects_that_grow_are_abnormal_unless_they_rest():
    moving, resting = world_of(("straight",), 10, num_objects=(1, 1)), world_of(("resize",), 10, num_objects=(1, 1))
    made = [inject("grow 1.5x", moving, i, np.random.default_rng(i)) for i in range(10)]
    made = [clip[0] for clip in made if clip is not None]
    assert len(made) >= 3 and all("deform" in {e.kind for e in abnormal_events(video)} for video in made)
    assert not any(abnormal_events(resting[i]["video"]) for i in range(10))


def test_what_the_edge_or_a_longer_clip_explains_is_normal():
    world = world_of(("straight", "throw", "collide"), 12, num_objects=(1, 2), horizon=1.0, shapes=((33, 64, 64),))
    videos = [world[i]["video"] for i in range(len(world))]  # four times as long as they were placed for: most leave
    left = [any(not track.seen[-1] for track in parse_clip(video)) for video in videos]
    assert sum(left) >= 5 and not any(abnormal_events(video) for video in videos)
    assert not any(abnormal_events(video[::-1]) for video in videos)  # and come in


def test_what_comes_out_from_behind_a_bar_is_the_same_object():
    world = behind_a_bar(12)
    kept = [persistence(world[i]["video"]) for i in range(len(world))]
    seen = [found for found in kept if found["occlusions"]]
    assert len(seen) >= 5 and all(found["same_object"] and found["size"] for found in seen)
    still = world_of(("still",), 1)
    assert persistence(still[0]["video"]) == dict(occlusions=0, same_object=None, color=None, size=None, shape=None)


@pytest.mark.parametrize("change", [dict(color="cyan"), dict(shape="star"), dict(radius=1.15), None])
def test_what_comes_out_changed_is_not(change):
    world = behind_a_bar(14)
    size = dict(num_frames=25, height=64, width=96, fps=8.0)
    done = 0
    for i in range(len(world)):
        scene, visible = world.scene(i), world.truth(i).visible[0]
        body = scene.bodies[0]
        hidden = np.flatnonzero(visible < 0.01)
        if not len(hidden) or (visible[hidden[-1] :] > 0.99).sum() < 6 or (visible[: hidden[0]] > 0.99).sum() < 4:
            continue
        if change and change.get("color", change.get("shape")) in (body.color, body.shape):
            continue
        values = dict(change or {})
        if "radius" in values:
            values = dict(radius=body.radius * 1.15, end_radius=body.radius * 1.15)
        bodies = (dataclasses.replace(body, **values),) if change else ()
        other = world.scene_video(dataclasses.replace(scene, bodies=bodies), **size)
        found = persistence(np.concatenate([world[i]["video"][: hidden[0] + 1], other[hidden[0] + 1 :]]))
        assert found["occlusions"] == 1 and found["same_object"] is False
        key = {"color": "color", "shape": "shape", "radius": "size"}.get(next(iter(change))) if change else None
        assert key is None or found[key] is False
        done += 1
    assert done >= 2


def test_a_drift_of_5_percent_in_speed_is_measured():
    world = world_of(("straight", "bounce", "throw", "orbit"), 16, num_objects=(1, 1))
    true, fast = [], []
    for i in range(len(world)):
        truth = world.truth(i)
        made = inject("5 % too fast", world, i, np.random.default_rng(i))
        for videos, video in ((true, world[i]["video"]), (fast, None if made is None else made[0])):
            if video is not None:
                videos.append(speed_drift(parse_clip(video)[0], truth.position[0]))
    assert max(abs(drift) for drift in true if drift is not None) < 0.01
    assert len(fast) >= 8 and all(0.035 < drift < 0.065 for drift in fast)
    still = world_of(("still",), 1, num_objects=(1, 1))
    assert speed_drift(parse_clip(still[0]["video"])[0], still.truth(0).position[0]) is None
