"""Captions of the world read back: what a sentence says of every object, so that it can be held against the truth.

The grammar is that of `data_pipelines.world_captions`. A text that is not of it, or says anything besides, is None.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

from data_pipelines.world_physics import SHAPES
from data_pipelines.world_scene import COLORS, DIRECTIONS, RADII, TONES

_COUNTS = {"One object": 1, "Two objects": 2, "Three objects": 3}
_SPEEDS = {"slowly": "slow", "at medium speed": "medium", "fast": "fast"}


def _any(words) -> str:
    """A pattern of any of some words, the longest first: "up" is how "up-left" begins."""
    return "(?:" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")"


_COLOR, _SHAPE, _DIRECTION, _SPEED = _any(COLORS), _any(SHAPES), _any(DIRECTIONS), _any(_SPEEDS)
_NAME = rf"(?P<color>{_COLOR}) (?P<shape>{_SHAPE})"
_PLACE = r"(?P<place>at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the middle)"
_GROUND = re.compile(
    rf"(?P<count>{_any(_COUNTS)}) on a (?:plain (?P<plain>{_any(TONES)}) background|background with a "
    rf"(?P<one>{_any(TONES)}) (?P<side>left|top) and a (?P<two>{_any(TONES)}) (?:right|bottom))"
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object in words; None is what is not said.

    direction: of motion along a line; of other motions their sense. hits: of walls, by one that bounces. end: of one
    that falls "bounce" or "fall", of one behind a bar "clear" or "hidden".
    """

    color: str
    shape: str
    size: str | None = None
    place: str | None = None
    motion: str | None = None
    direction: str | None = None
    speed: str | None = None
    hits: int | None = None
    end: str | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Said:
    """What a caption says.

    relation: (name, "left of" | "right of" | "above" | "below", name). ground: tones and the axis along which they
    differ (0: side by side; None where there is one). events: (wall | floor | object, names), in order.
    """

    things: tuple[Thing, ...]
    detailed: bool
    ground: tuple | None = None
    relation: tuple[str, str, str] | None = None
    events: tuple[tuple[str, frozenset[str]], ...] = ()


def read_caption(text: str) -> Said | None:
    """What a caption says, short or detailed; None where it is not of the grammar to its last word."""
    text = " ".join(text.split())
    return _detailed(text) or _short(text[:1].lower() + text[1:].removesuffix("."))


# --- Short

_DOING = (
    ("still", "standing still"), ("occlude", rf"moving (?P<d>{_DIRECTION}) behind a grey bar"),
    ("straight", rf"moving (?P<d>{_DIRECTION})"), ("bounce", "bouncing off the walls"),
    ("fall", "falling(?P<end> and bouncing)?"), ("throw", r"thrown to the (?P<d>right|left)"),
    ("orbit", r"circling (?P<d>clockwise|counterclockwise)"), ("resize", r"(?P<d>growing|shrinking)"),
    ("collide", "colliding"),
)  # fmt: skip
_DOING_PATTERNS = tuple((motion, re.compile(rf"{pattern}\b")) for motion, pattern in _DOING)
_NAMED = re.compile(rf"an? {_NAME}\b")
_JOIN = re.compile(", (?:and |both |all )?| and | ")


def _short(text: str) -> Said | None:
    things, waiting = [], []
    while text:
        join = ""
        if things or waiting:
            if not (found := _JOIN.match(text)):
                return None
            join, text = found[0], text[found.end() :]
        if join != " " and (found := _NAMED.match(text)):
            waiting.append(Thing(found["color"], found["shape"]))
        else:
            motion, found = next(((m, f) for m, p in _DOING_PATTERNS if (f := p.match(text))), (None, None))
            if not waiting or not found:
                return None
            said = found.groupdict()
            end = ("bounce" if said.get("end") else "fall") if motion == "fall" else None
            things += [dataclasses.replace(t, motion=motion, direction=said.get("d"), end=end) for t in waiting]
            waiting = []
        text = text[found.end() :]
    if bool(things) == bool(waiting):  # some of them do nothing, or there is nothing
        return None
    return Said(tuple(things or waiting), detailed=False)


# --- Detailed


def _parts(pattern):
    return re.compile(pattern.replace("PLACE", _PLACE).replace("SPEED", f"(?P<speed>{_SPEED})"))


_SENTENCES = [(motion, _parts(pattern)) for motion, pattern in (
    (None, "is PLACE"), ("still", "stands still PLACE"),
    ("straight", rf"starts PLACE and moves (?P<d>{_DIRECTION}) SPEED"),
    ("bounce", r"starts PLACE and bounces off (?P<hits>a wall|the walls twice|the walls \d+ times) SPEED"),
    ("fall", r"starts PLACE(?P<end>, falls, hits the floor and bounces| and falls)"),
    ("throw", r"is thrown up and to the (?P<d>right|left) SPEED"),
    ("orbit", r"circles (?P<d>clockwise|counterclockwise) SPEED"), ("resize", r"(?P<d>grows|shrinks) PLACE"),
    ("occlude", rf"moves (?P<d>{_DIRECTION}) SPEED(?P<end>, disappears behind a grey bar and comes out again"
     "| and passes behind a grey bar)"),
    ("move", "starts PLACE and moves SPEED"),
)]  # fmt: skip
_ENDS = {
    ", falls, hits the floor and bounces": "bounce", " and falls": "fall",
    ", disappears behind a grey bar and comes out again": "clear", " and passes behind a grey bar": "hidden",
}  # fmt: skip
_SUBJECT = re.compile(rf"An? (?P<size>{_any(RADII)}) {_NAME} (?P<rest>.*)")
_RELATION = re.compile(rf"(?:At the start the|The) ({_COLOR} {_SHAPE}) is (left of|right of|above|below) the "
                       rf"({_COLOR} {_SHAPE})")  # fmt: skip
_MEET = re.compile(rf"(?:the |The )({_COLOR} {_SHAPE}) and the ({_COLOR} {_SHAPE}) collide")
_HIT = re.compile(rf"the ({_COLOR} {_SHAPE})(?: hits (a wall|the floor))?")


def _detailed(text: str) -> Said | None:
    if not text.endswith("."):
        return None
    first, *sentences = text[:-1].split(". ")
    ground = _GROUND.fullmatch(first)
    count = _COUNTS[ground["count"]] if ground else 0
    if not count or len(sentences) < count:
        return None
    things = [_thing(sentence) for sentence in sentences[:count]]
    rest, relation, events = sentences[count:], None, ()
    if rest and (found := _RELATION.fullmatch(rest[0])):
        relation, rest = found.groups(), rest[1:]
    if rest:
        events, rest = _events(rest[0]), rest[1:]
    if rest or events is None or None in things or (count > 1) != (relation is not None):
        return None
    side = ground["side"]
    tones = ((ground["plain"],), None) if ground["plain"] else ((ground["one"], ground["two"]), int(side == "top"))
    return Said(tuple(things), True, tones, relation, events)


def _thing(sentence: str) -> Thing | None:
    subject = _SUBJECT.fullmatch(sentence)
    if not subject:
        return None
    for motion, pattern in _SENTENCES:
        if found := pattern.fullmatch(subject["rest"]):
            said = found.groupdict()
            direction = {"grows": "growing", "shrinks": "shrinking"}.get(said.get("d"), said.get("d"))
            return Thing(
                subject["color"], subject["shape"], subject["size"], said.get("place"), motion, direction,
                _SPEEDS.get(said.get("speed")), _hits(said.get("hits")), _ENDS.get(said.get("end")),
            )  # fmt: skip
    return None


def _hits(text):
    if text is None:
        return None
    return {"a wall": 1, "the walls twice": 2}.get(text) or int(re.search(r"\d+", text)[0])


def _events(sentence: str):
    """Events in order, or None where the sentence tells none."""
    if found := _MEET.fullmatch(sentence):
        return (("object", frozenset(found.groups())),)
    if not sentence.startswith("First "):
        return None
    events, last = [], None
    for part in sentence.removeprefix("First ").split(", then "):
        if found := _MEET.fullmatch(part):
            events.append(("object", frozenset(found.groups())))
            last = "object"
        elif found := _HIT.fullmatch(part):
            last = {"a wall": "wall", "the floor": "floor", None: last}[found[2]]
            if last not in ("wall", "floor"):
                return None
            events.append((last, frozenset(found.groups()[:1])))
        else:
            return None
    return tuple(events)


# --- Comparing

ATTRIBUTES = ("color", "shape", "size", "place", "motion", "direction", "speed", "hits", "end")


def match(said: tuple[Thing, ...], true: tuple[Thing, ...]) -> list[tuple[Thing, Thing]]:
    """Pairs (said, true) of things that are one, as many as there can be: those that agree in most, kinds first."""
    few, many = sorted((said, true), key=len)

    def agreement(order):
        pairs = list(zip(few, order))
        same = [[getattr(a, name) == getattr(b, name) for name in ATTRIBUTES] for a, b in pairs]
        return sum(all(s[:2]) for s in same), sum(map(sum, same))

    best = max(itertools.permutations(many, len(few)), key=agreement)
    return [(a, b) if few is said else (b, a) for a, b in zip(few, best)]


def keeps(short: Said, long: Said) -> list[str]:
    """What a longer caption leaves out or changes of a shorter one, in words; nothing where it keeps all."""
    if len(short.things) != len(long.things):
        return [f"{len(short.things)} objects"]
    lost = []
    for wanted, found in match(short.things, long.things):
        if wanted.name != found.name:
            lost.append(wanted.name)
            continue
        collides = any(kind == "object" and wanted.name in names for kind, names in long.events)
        motion = found.motion if found.motion != "move" else "collide" if collides else None
        if wanted.motion is not None and wanted.motion != motion and not (wanted.motion == "collide" and collides):
            lost.append(f"{wanted.name} {wanted.motion}")
        for name in ("size", "place", "direction", "speed", "hits", "end"):
            if getattr(wanted, name) not in (None, getattr(found, name)):
                lost.append(f"{wanted.name} {getattr(wanted, name)}")
    for name in ("ground", "relation"):
        if getattr(short, name) not in (None, getattr(long, name)):
            lost.append(name)
    return lost
