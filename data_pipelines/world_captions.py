"""Captions of world scenes: what can be seen in the clip, in one grammar.

short:    "a red circle moving right"; "a blue star and a green square, both standing still".
detailed: count, size, colour, shape, place, motion, speed, direction, background, relation and order of events.
An image is described without motion.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.world_physics import extents
from data_pipelines.world_scene import Body, Scene

# Bytes: of 512 text slots one is the end mark and one a leading space. The order of events is left out over that.
_LONGEST = 510
_COUNTS = {1: "One object", 2: "Two objects", 3: "Three objects"}
_SPEED = {"slow": "slowly", "medium": "at medium speed", "fast": "fast"}


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _name(body: Body) -> str:
    return f"{body.color} {body.shape}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _has(scene: Scene, i: int, kind: str, duration: float) -> bool:
    return any(k == kind and i in (a, b) for _, k, a, b in scene.contacts(duration))


def _doing(scene: Scene, i: int, duration: float) -> str:
    """The motion of object i as a participle phrase: what it does within `duration` seconds."""
    body = scene.bodies[i]
    if body.motion == "still":
        return "standing still"
    if body.motion == "straight":
        return f"moving {body.direction}"
    if body.motion == "occlude":
        return f"moving {body.direction} behind a grey bar"
    if body.motion == "bounce":
        return "bouncing off the walls"
    if body.motion == "fall":
        return "falling and bouncing" if _has(scene, i, "floor", duration) else "falling"
    if body.motion == "throw":
        return f"thrown to the {body.sense}"
    if body.motion == "orbit":
        return f"circling {body.sense}"
    if body.motion == "resize":
        return body.sense
    return "colliding"


def short_caption(scene: Scene, duration: float) -> str:
    """Colour, shape and motion of every object within `duration` seconds (0: an image, no motion)."""
    names = [_article(_name(body)) for body in scene.bodies]
    if duration <= 0:
        return _join(names)
    groups: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        groups.setdefault(_doing(scene, i, duration), []).append(name)
    if len(groups) == 1 and len(names) > 1:
        doing = next(iter(groups))
        if doing == "colliding":
            return f"{_join(names)} colliding"
        return f"{_join(names)}, {'both' if len(names) == 2 else 'all'} {doing}"
    # Phrases of one motion stay together; "and" joins inside a group, ", and" between groups.
    phrases = [f"{_join(members)} {doing}" for doing, members in groups.items()]
    if any(len(members) > 1 for members in groups.values()):
        return ", and ".join(phrases)
    return _join(phrases)


def _speed(body: Body) -> str:
    return _SPEED[body.speed_bin]


def _sentence(scene: Scene, i: int, duration: float) -> str:
    """What object i is and does, as a sentence without its full stop."""
    body = scene.bodies[i]
    subject = _article(f"{body.size} {_name(body)}").capitalize()
    place = _place(scene, body)
    if duration <= 0:
        return f"{subject} is {place}"
    if body.motion == "still":
        return f"{subject} stands still {place}"
    if body.motion == "straight":
        return f"{subject} starts {place} and moves {body.direction} {_speed(body)}"
    if body.motion == "bounce":
        hits = sum(k == "wall" and a == i for _, k, a, _ in scene.contacts(duration))
        if hits == 0:
            return f"{subject} starts {place} and moves {_speed(body)}"
        walls = {1: "a wall", 2: "the walls twice"}.get(hits, f"the walls {hits} times")
        return f"{subject} starts {place} and bounces off {walls} {_speed(body)}"
    if body.motion == "fall":
        falls = ", falls, hits the floor and bounces" if _has(scene, i, "floor", duration) else " and falls"
        return f"{subject} starts {place}{falls}"
    if body.motion == "throw":
        return f"{subject} is thrown up and to the {body.sense} {_speed(body)}"
    if body.motion == "orbit":
        return f"{subject} circles {body.sense} {_speed(body)}"
    if body.motion == "resize":
        return f"{subject} {'grows' if body.sense == 'growing' else 'shrinks'} {place}"
    if body.motion == "occlude":
        seen = ["moves", body.direction, _speed(body)]
        if _clears(scene, i, duration):
            return f"{subject} {' '.join(seen)}, disappears behind a grey bar and comes out again"
        return f"{subject} {' '.join(seen)} and passes behind a grey bar"
    return f"{subject} starts {place} and moves {_speed(body)}"


def _clears(scene: Scene, i: int, duration: float) -> bool:
    """Whether object i is clear of the bar again after `duration` seconds."""
    body, axis = scene.bodies[i], scene.bar.axis
    at = float(body.path.state(np.array([duration]))[0][0, axis])
    low, high = extents(body.shape)[axis] * body.radius, extents(body.shape)[axis + 2] * body.radius
    return at - low >= scene.bar.high if body.direction in ("right", "down") else at + high <= scene.bar.low


def _place(scene: Scene, body: Body) -> str:
    """Where the object is at time 0."""
    return place_word(*body.path.state(np.zeros(1))[0][0] / (scene.width, scene.height))


def place_word(x: float, y: float) -> str:
    """A place by thirds of the frame; x to the right and y down, in fractions of the frame."""
    down = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    if down:
        return f"at the {down} {across}".rstrip()
    return f"on the {across}" if across else "in the middle"


def _relation(scene: Scene) -> str:
    first, second = scene.bodies[:2]
    word = relation_word(*(second.path.state(np.zeros(1))[0] - first.path.state(np.zeros(1))[0])[0])
    return f"the {_name(first)} is {word} the {_name(second)}"


def relation_word(dx: float, dy: float) -> str:
    """Where a first object is, seen from a second, which is dx further right and dy further down."""
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _events(scene: Scene, duration: float) -> str:
    """The first contact of each object or pair in order, if there are two or more; a lone collision is told too."""
    told, seen, last = [], set(), None
    for _, kind, i, j in scene.contacts(duration):
        if (kind, i, j) in seen or len(told) == 3:
            continue
        seen.add((kind, i, j))
        who = f"the {_name(scene.bodies[i])}"
        if kind == "object":
            told.append(f"{who} and the {_name(scene.bodies[j])} collide")
        elif kind == last:
            told.append(who)
        else:
            told.append(f"{who} hits {'a wall' if kind == 'wall' else 'the floor'}")
        last = kind
    if len(told) == 1:
        return f"{told[0][0].upper()}{told[0][1:]}." if last == "object" else ""
    return f"First {', then '.join(told)}." if told else ""


def detailed_caption(scene: Scene, duration: float) -> str:
    """Everything the ground truth says in words, within `duration` seconds (0: an image, no motion)."""
    tones = scene.background.tones
    if len(tones) == 1:
        ground = f"a plain {tones[0]} background"
    elif scene.background.axis == 0:
        ground = f"a background with a {tones[0]} left and a {tones[1]} right"
    else:
        ground = f"a background with a {tones[0]} top and a {tones[1]} bottom"
    sentences = [f"{_COUNTS[len(scene.bodies)]} on {ground}"]
    sentences += [_sentence(scene, i, duration) for i in range(len(scene.bodies))]
    if len(scene.bodies) > 1:
        relation = _relation(scene)
        sentences.append(relation[0].upper() + relation[1:] if duration <= 0 else f"At the start {relation}")
    text = ". ".join(sentences) + "."
    events = _events(scene, duration) if duration > 0 else ""
    return f"{text} {events}" if events and len(text) + len(events) < _LONGEST else text
