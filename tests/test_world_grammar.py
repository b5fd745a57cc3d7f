"""The captions of the world are read back as what was said, and nothing else is read as one of them."""

import dataclasses

import pytest

from data_pipelines.world import World, WorldConfig
from data_pipelines.world_captions import detailed_caption
from data_pipelines.world_grammar import Thing, keeps, match, read_caption

SHAPES = ((9, 32, 32), (33, 32, 32), (1, 32, 32))
WORLD = World(WorldConfig(num_samples=400, shapes=SHAPES, kinds=("short", "detailed")))


@pytest.mark.parametrize("kind", ["short", "detailed"])
def test_every_caption_is_read_back_as_its_scene(kind):
    seen = set()
    for i in range(len(WORLD)):
        scene, caption = WORLD.scene(i), WORLD.captions(i)[kind]
        said = read_caption(caption)
        assert said is not None and said.detailed == (kind == "detailed"), caption
        still = WORLD.frame_shape(i)[0] == 1
        names = sorted((b.color, b.shape) for b in scene.bodies)
        assert sorted((t.color, t.shape) for t in said.things) == names
        for thing, body in match(said.things, tuple(_thing(b, still) for b in scene.bodies)):
            seen.add(thing.motion)
            if thing.motion == "move":  # what bounces or collides, and has not yet
                assert body.motion in ("bounce", "collide")
            else:
                assert (thing.motion, thing.direction) == (body.motion, body.direction), caption
            if kind == "detailed":
                assert thing.size == body.size and thing.speed in (None, body.speed)
        if kind == "detailed":
            assert said.ground[0] == scene.background.tones
            assert (said.relation is not None) == (len(said.things) > 1)
    assert {"still", "straight", "bounce", "fall", "throw", "orbit", "occlude", "resize", None} <= seen


def _thing(body, still):
    direction = None if still else body.direction or body.sense
    return Thing(body.color, body.shape, body.size, None, None if still else body.motion, direction, body.speed_bin)


def test_events_are_read_in_order():
    told = 0
    for i in range(len(WORLD)):
        scene = WORLD.scene(i)
        said = read_caption(detailed_caption(scene, 4.0))
        contacts, first = scene.contacts(4.0), []
        for _, kind, a, b in contacts:
            event = (kind, frozenset(f"{scene.bodies[k].color} {scene.bodies[k].shape}" for k in (a, b) if k >= 0))
            if event not in first:
                first.append(event)
        if said.events and len({body.color + body.shape for body in scene.bodies}) == len(scene.bodies):
            assert said.events == tuple(first[:3])
            told += 1
    assert told > 50


@pytest.mark.parametrize("text", [
    "", "One object.", "a red circle moving", "a red circle moving right and a blue star", "a red dog moving right",
    "red circle", "a red circle a blue star", "a red circle moving right on the sea", "moving right",
    "a red circle, , a blue star", "One object on a plain black background.",
    "Two objects on a plain black background. A small red circle is in the "
    "middle.", "One object on a plain black background. A small red circle stands still in the middle. It is nice.",
])  # fmt: skip
def test_what_is_not_of_the_grammar_is_not_read(text):
    assert read_caption(text) is None


def test_a_detailed_caption_keeps_its_short_one_unless_it_says_too_little():
    """An object that has not bounced yet is told as one that moves: that is less than the short caption says."""
    kept = 0
    for i in range(len(WORLD)):
        short, long = (read_caption(WORLD.captions(i)[kind]) for kind in ("short", "detailed"))
        lost = keeps(short, long)
        vague = {t.name for t in long.things if t.motion == "move"}
        assert all(any(words.startswith(name) for name in vague) for words in lost), (lost, WORLD.captions(i))
        kept += not lost
    assert kept > 0.8 * len(WORLD)


@pytest.mark.parametrize("change", [dict(color="green"), dict(shape="star"), dict(motion="fall"), dict(direction="up")])
def test_a_changed_attribute_is_a_lost_one(change):
    short = read_caption("a red circle moving right")
    long = read_caption("One object on a plain navy background. A small red circle starts on the left and moves right "
                        "fast.")  # fmt: skip
    assert keeps(short, long) == []
    changed = dataclasses.replace(long, things=(dataclasses.replace(long.things[0], **change),))
    assert keeps(short, changed)
    assert keeps(short, dataclasses.replace(long, things=long.things * 2)) == ["1 objects"]


def test_short_captions_of_groups_are_read():
    said = read_caption("A red circle and a blue star moving up-left, and a cyan square falling and bouncing.")
    assert [(t.name, t.motion, t.direction, t.end) for t in said.things] == [
        ("red circle", "straight", "up-left", None), ("blue star", "straight", "up-left", None),
        ("cyan square", "fall", None, "bounce"),
    ]  # fmt: skip
