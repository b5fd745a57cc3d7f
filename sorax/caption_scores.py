"""Captions of the world scored against its ground truth, attribute by attribute, by reading them back.

An attribute is right where it is right of every object that it is told of; objects are paired by what they are, not by
the order in which they are told, and a relation or an event is right where it is of the paired ones, whatever they are
called: a wrong name is counted as what it is, a wrong colour or shape. A caption that is not of the grammar is wrong in
everything that it was asked for. Places and relations change their words at lines that nobody sees: a word is right
where it is within half a pixel. Two events within half a frame of each other may be told in either order.
"""

import dataclasses
import itertools

import numpy as np

from data_pipelines.world_captions import place_word, relation_word
from data_pipelines.world_grammar import Said, Thing, match, read_caption
from sorax.statistics import rate_cell

# Attribute -> title, in order; of short captions the first five.
COLUMNS = {
    "joint": "joint", "grammar": "grammar", "count": "count", "color": "colour", "shape": "shape", "motion": "motion",
    "direction": "direction", "size": "size", "speed": "speed", "place": "place", "background": "background",
    "relation": "relation", "events": "events in order", "real": "objects that are there",
}  # fmt: skip
SHORT = ("count", "color", "shape", "motion", "direction")
DETAILED = (*SHORT, "size", "speed", "place", "background", "relation", "events")


def judge_caption(world, index: int, text: str, kind: str) -> dict[str, bool | None]:
    """Whether a caption of a clip of the world says what is true; None is not asked of this clip.

    Args:
        kind: "short" or "detailed": what it is asked for.

    Returns:
        dict of the attributes, `joint`, `grammar`: it can be read; and `real`: of each object that it tells of, whether
        one of that colour and shape is there (a list, one a told object).
    """
    true = read_caption(world.caption(index, style=kind))
    said = read_caption(text)
    asked = [name for name in (SHORT if kind == "short" else DETAILED) if _is_told(true, name)]
    found = dict.fromkeys(COLUMNS)
    if said is None or said.detailed != (kind == "detailed"):
        return found | dict.fromkeys((*asked, "grammar", "joint"), False) | dict(real=[])
    pairs = match(said.things, true.things)
    named = _by_true_names(said, pairs)
    rest = [thing for thing in said.things if all(thing is not a for a, _ in pairs)]
    count = len(said.things) == len(true.things)
    for name in asked:
        if name == "count":
            found[name] = count
        elif name == "background":
            found[name] = said.ground == true.ground
        elif name == "relation":
            found[name] = count and _relation_holds(named, world, index)
        elif name == "place":
            found[name] = count and all(a.place in _places(b, true, world, index) for a, b in pairs)
        elif name == "events":
            found[name] = count and named.events in _orders(true, world, index) and _same(pairs, "hits", "end")
        else:
            found[name] = count and _same(pairs, name)
    found["joint"] = all(found[name] for name in asked)
    found["grammar"], found["real"] = True, [a.name == b.name for a, b in pairs] + [False] * len(rest)
    return found


def _is_told(true: Said, name: str) -> bool:
    """Whether a true caption says anything of an attribute."""
    if name in ("count", "color", "shape", "background"):
        return True
    if name == "relation":
        return true.relation is not None
    if name == "events":
        return bool(true.events) or any(t.hits is not None or t.end is not None for t in true.things)
    return any(getattr(thing, name) is not None for thing in true.things)


def _by_true_names(said: Said, pairs) -> Said:
    """Relation and events with the true names of their objects: what is of another shape than it is called is wrong in
    its shape alone. "": a name that no object has, or two that are not the same.
    """

    def true_name(name):
        names = {true.name for thing, true in pairs if thing.name == name}
        return names.pop() if len(names) == 1 else ""

    relation = said.relation and (true_name(said.relation[0]), said.relation[1], true_name(said.relation[2]))
    events = tuple((kind, frozenset(map(true_name, which))) for kind, which in said.events)
    return dataclasses.replace(said, relation=relation, events=events)


def _same(pairs: list[tuple[Thing, Thing]], *names) -> bool:
    return all(getattr(a, name) == getattr(b, name) for a, b in pairs for name in names)


def _near(x: float, y: float):
    """Points half a pixel away and less."""
    return [(x + dx, y + dy) for dx, dy in itertools.product((-0.5, 0.0, 0.5), repeat=2)]


def _orders(true: Said, world, index) -> set[tuple]:
    """The events of a true caption in all orders in which they may be told."""
    fps, first = world.config.fps, {}
    for time, *what in world.scene(index).contacts((world.frame_shape(index)[0] - 1) / fps):
        first.setdefault(tuple(what), time)
    times, numbers = sorted(first.values()), range(len(true.events))
    return {
        tuple(true.events[k] for k in order) for order in itertools.permutations(numbers)
        if all(times[a] - times[b] <= 0.5 / fps for a, b in itertools.combinations(order, 2))
    }  # fmt: skip


def _starts(world, index):
    """Where the objects of an item are at time 0, in pixels, in the order of its detailed caption; (width, height)."""
    scene, (_, height, width) = world.scene(index), world.frame_shape(index)
    return [body.path.state(np.zeros(1))[0][0] / (scene.width, scene.height) * (width, height)
            for body in scene.bodies], (width, height)  # fmt: skip


def _places(thing: Thing, true: Said, world, index) -> set[str | None]:
    """What may be said of the place of a thing of a true caption; None where that says nothing of it."""
    if thing.place is None:
        return {None}
    starts, (width, height) = _starts(world, index)
    start = next(start for start, other in zip(starts, true.things) if other is thing)
    return {place_word(x / width, y / height) for x, y in _near(*start)}


def _relation_holds(said: Said, world, index) -> bool:
    """Whether what is said of two objects holds at the beginning, whichever two of the clip's they are."""
    if said.relation is None:
        return False
    first, word, second = said.relation
    starts, bodies = _starts(world, index)[0], world.scene(index).bodies
    named = [(f"{body.color} {body.shape}", start) for body, start in zip(bodies, starts)]
    return any(
        (a, b) == (first, second) and word in {relation_word(*point) for point in _near(*(there - here))}
        for (a, here), (b, there) in itertools.permutations(named, 2)
    )


def score_captions(world, indices, texts, kind: str) -> dict[str, dict]:
    """Cells of each attribute (`statistics.rate_cell`) of captions of clips of the world; `real` counts objects."""
    return cells([judge_caption(world, i, text, kind) for i, text in zip(indices, texts)])


def cells(judgements) -> dict[str, dict]:
    """Cells of judgements of `judge_caption`."""
    table = {name: rate_cell([j[name] for j in judgements]) for name in COLUMNS if name != "real"}
    return table | dict(real=rate_cell([there for j in judgements for there in j["real"]]))
