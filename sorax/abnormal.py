"""What cannot happen in the embedded world, found in a clip without its ground truth.

Objects there keep their colour and shape, move without jumps, and are gone only behind something or outside the frame.
`abnormal_events` lists what breaks this; `persistence` looks at what comes out from behind something; `speed_drift`
compares a path with the true one.

Letters: T frames. Places and radii are fractions of the frame's shorter side; x right, y down.
"""

from dataclasses import dataclass

import numpy as np
from skimage.color import rgb2lab

from sorax.background import find_bar
from sorax.motion_kinds import seen_track
from sorax.parser import parse_clip

KINDS = ("vanish", "appear", "split", "deform", "teleport", "recolor")
TINT = 25.0  # CIELAB distance between frames of one object that is another colour
SAME_SIZE = 0.05  # of the radius, after an occlusion


@dataclass(frozen=True)
class Event:
    """Something that cannot happen: one of KINDS, its frame, and where, in fractions of the frame's shorter side."""

    kind: str
    frame: int
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What can hide an object in a clip: frame (width, height), bar (Bar or None), and the other tracks."""

    frame: np.ndarray
    bar: object
    tracks: list
    shapes: tuple


def abnormal_events(video, tracks=None):
    """Events of a clip, in order: [] if nothing in it is impossible.

    video: uint8 [T, H, W, 3]; tracks: parse_clip(video), if it is known already. What nobody could tell (an object that
    may have left the frame, or is still hidden) is not abnormal.
    """
    video = np.asarray(video)
    tracks = parse_clip(video) if tracks is None else tracks
    scene = _scene(video, tracks)
    events, ends, starts = [], [], []
    for track in tracks:
        free = seen_track(track, scene.frame).free
        events += _jumps(track, free, scene) + _changes(track, free, scene)
        if (gone := _missing(track, free, scene)) is not None:
            ends.append((gone, track))
        back = _reversed(track)
        if (come := _missing(back, free[::-1], _backwards(scene, track, back))) is not None:
            starts.append((len(video) - 1 - come, track))
        elif (parted := _parted(track, tracks)) is not None:
            events.append(parted)
        events += _blinks(track, free, scene)
    return sorted(events + _pair(ends, starts, tracks, scene), key=lambda event: (event.frame, event.kind))


def _scene(video, tracks):
    from data_pipelines.world_physics import SHAPES

    height, width = video.shape[1:3]
    return Scene(np.array([width, height]) / min(height, width), find_bar(video), list(tracks), SHAPES)


def _reversed(track):
    fields = {name: value[::-1] if isinstance(value, np.ndarray) and name != "rgb" else value
              for name, value in vars(track).items()}  # fmt: skip
    return type(track)(**fields)


def _backwards(scene, track, back):
    others = [back if other is track else _reversed(other) for other in scene.tracks]
    return Scene(scene.frame, scene.bar, others, scene.shapes)


# gone, or come from nowhere --------------------------------------------------------------------------------------


def _typical_radius(track, free):
    values = track.radius[free] if free.any() else track.radius[track.seen]
    return float(np.median(values))


def _filled(track):
    """Positions [T, 2], between sightings on straight lines, and beyond them as at the nearest."""
    at = np.flatnonzero(track.seen)
    times = np.arange(len(track.seen))
    return np.stack([np.interp(times, at, track.positions[at, k]) for k in (0, 1)], -1)


def _course(track, free):
    """How a track goes on: a function of a frame after its last free one -> (place, how far that may be wrong)."""
    at = np.flatnonzero(free)
    last = at[-1]
    recent = at[at > last - 4]
    place = track.positions[last]
    if len(recent) < 2:
        return lambda frame: (place, 0.03 + 0.12 * (frame - last))
    steps = np.diff(track.positions[recent], axis=0) / np.diff(recent)[:, None]
    velocity = steps[-1]
    bend = np.linalg.norm(np.diff(steps, axis=0), axis=-1).max() if len(steps) > 1 else 0.06 * np.linalg.norm(velocity)

    def ahead(frame):
        wait = frame - last
        return place + velocity * wait, 0.02 + 0.1 * np.linalg.norm(velocity) * wait + bend * wait * (wait + 1) / 2

    return ahead


def _hides(scene, track, radius, last, frame, place, doubt):
    """Whether an object last seen in frame `last` may be out of sight at about `place`."""
    if min((place + radius).min(), (scene.frame - place + radius).min()) <= 1.3 * radius + doubt:
        return True
    if scene.bar is not None:
        along, margin = place[scene.bar.axis], 0.3 * radius + doubt
        if scene.bar.low - margin <= along <= scene.bar.high + margin:
            return True
    for other in scene.tracks:
        # what has come just as this one went may be the same thing changed
        if other is track or not other.seen[: last + 1].any():
            continue
        front = _typical_radius(other, other.whole)
        cover = max(1.15 * front - 0.6 * radius, 0.25 * front)
        if np.linalg.norm(_filled(other)[frame] - place) <= cover + doubt:
            return True
    return False


def _missing(track, free, scene, patience=1):
    """First frame after a track's last in which nothing can hide its object, or None.

    After an occlusion it may be late by `patience` frames.
    """
    last, count = int(np.flatnonzero(track.seen)[-1]), len(track.seen)
    if last == count - 1 or not free.any():
        return None
    radius, course = _typical_radius(track, free), _course(track, free)
    hidden_before = track.cut[last]
    for frame in range(last + 1, count):
        if _hides(scene, track, radius, last, frame, *course(frame)):
            hidden_before = True
            late = 0
            continue
        if not hidden_before:
            return frame
        late = late + 1 if frame > last + 1 else 1
        if late > patience:
            return frame
    return None


def _parted(track, tracks):
    """The event that a track began as a piece of another, which is smaller from then on though nothing hides it."""
    first = int(np.flatnonzero(track.seen)[0])
    for other in tracks:
        if other is track or first == 0 or not (other.seen[first - 1] and other.seen[first]):
            continue
        hidden = other.touch | other.bar
        if hidden[first - 1] or hidden[first] or track.touch[first] or track.bar[first]:
            continue
        before, now = other.area[first - 1], other.area[first]
        alike = np.linalg.norm(_lab(track.rgb) - _lab(other.rgb)) < TINT
        near = np.linalg.norm(track.positions[first] - other.positions[first]) < 3 * other.radius[first - 1]
        if alike and near and now < 0.85 * before and now + track.area[first] < 1.3 * before:
            return Event("split", first, *map(float, track.positions[first]))
    return None


def _blinks(track, free, scene):
    """Gaps within a track in which nothing can hide it."""
    at = np.flatnonzero(track.seen)
    radius, filled = _typical_radius(track, free), _filled(track)
    for last, first in zip(at[:-1], at[1:]):
        if first - last == 1 or track.cut[last] or track.cut[first]:
            continue
        step = np.linalg.norm(filled[first] - filled[last])
        middle = (last + first) // 2
        if not _hides(scene, track, radius, last, middle, filled[middle], 0.02 + 0.5 * step):
            return [Event("vanish", int(last + 1), *map(float, filled[last + 1]))]
    return []


def _pair(ends, starts, tracks, scene):
    """Events of what is gone and what has come: the same thing twice is one event."""
    events, taken = [], set()
    for frame, track in ends:
        at = int(np.flatnonzero(track.seen)[-1])
        place = track.positions[at]
        best = None
        for k, (_, other) in enumerate(starts):
            first = int(np.flatnonzero(other.seen)[0])
            apart = float(np.linalg.norm(other.positions[first] - place))
            if k not in taken and abs(first - frame) <= 1 and (best is None or apart < best[0]):
                best = apart, k, other, first
        if best is None:
            events.append(Event("vanish", int(frame), *map(float, place)))
            continue
        apart, k, other, first = best
        taken.add(k)
        alike = track.color == other.color or np.linalg.norm(_lab(track.rgb) - _lab(other.rgb)) < TINT
        kind = "teleport" if alike else "recolor"
        if not alike and apart > 3 * track.radius[at] + 0.05:
            events.append(Event("vanish", int(frame), *map(float, place)))
            kind = "appear"
        events.append(Event(kind, first, *map(float, other.positions[first])))
    for k, (_, track) in enumerate(starts):
        if k in taken:
            continue
        first = int(np.flatnonzero(track.seen)[0])
        place, kind = track.positions[first], "appear"
        for other in tracks:
            near = other is not track and np.linalg.norm(_filled(other)[first] - place) < 0.25
            if near and other.color == track.color and other.seen[: first + 1].any() and other.seen[first:].any():
                kind = "split"
        events.append(Event(kind, first, *map(float, place)))
    return events


# jumps and changes -----------------------------------------------------------------------------------------------


def _jumps(track, free, scene):
    """Steps that are not between those before and after them, as a bounce or a collision would leave them."""
    at = np.flatnonzero(free)
    if len(at) < 3:
        return []
    place, gaps = track.positions[at], np.diff(at)
    steps = np.diff(place, axis=0) / gaps[:, None]
    bends = np.linalg.norm(np.diff(steps, axis=0), axis=-1)[(gaps[1:] == 1) & (gaps[:-1] == 1)]
    for i in range(len(steps)):
        around = [steps[k] for k in (i - 1, i + 1) if 0 <= k < len(steps) and gaps[k] == 1]
        if not around or (len(around) == 1 and gaps[i] > 1):
            continue
        pace = max(np.linalg.norm(v) for v in around)
        if len(around) == 2:
            low, high, slack = np.minimum(*around), np.maximum(*around), 0.02 + 0.3 * pace
        else:  # at either end of what is seen it may have bounced off a wall or the floor, or another object
            near = [k for k in (i - 2, i - 1, i + 1, i + 2) if 0 <= k < len(steps) and gaps[k] == 1]
            high = 1.6 * np.abs(steps[near]).max(0)
            low, slack = -high, 0.05 + 0.3 * pace
            if _someone_near(track, scene, at[i], place[i], 2 * (pace + np.linalg.norm(steps[i])) * gaps[i]):
                continue
        if gaps[i] > 1:  # unseen, it may have gone on along its curve
            slack += (bends.max() if len(bends) else 0.3 * pace) * gaps[i] ** 2 / 2 + 0.1 * pace * gaps[i]
        off = np.linalg.norm(np.maximum(np.maximum(low - steps[i], steps[i] - high), 0)) * gaps[i]
        if off > slack:
            return [Event("teleport", int(at[i + 1]), *map(float, place[i + 1]))]
    return []


def _someone_near(track, scene, frame, place, reach):
    radius = _typical_radius(track, track.whole)
    for other in scene.tracks:
        if other is not track and np.linalg.norm(_filled(other)[frame] - place) < (
            1.5 * (radius + _typical_radius(other, other.whole)) + reach
        ):
            return True
    return False


def _lab(rgb):
    return rgb2lab(np.asarray(rgb, np.float32) / 255)


def _changes(track, free, scene):
    """Another colour, size or shape from some frame on."""
    at = np.flatnonzero(free)
    if len(at) < 3:
        return []
    place = track.positions

    def event(kind, frame):
        return Event(kind, int(frame), *map(float, place[frame]))

    tints = _lab(track.frame_rgb[at])
    off = np.linalg.norm(tints - np.median(tints, axis=0), axis=-1) > TINT
    found = [event("recolor", at[np.argmax(off)])] if off.any() else []
    frame = _other_size(track, at)
    if frame is None:
        frame = _other_shape(track, np.flatnonzero(free & track.whole), scene.shapes)
    return found + ([] if frame is None else [event("deform", frame)])


def _other_size(track, at, moving=0.12, jump=0.1, back=0.12):
    """First frame with a size that the object cannot have: none changes while it moves, and none of a sudden."""
    sizes = np.log(track.radius[at])
    spread = np.linalg.norm(track.positions[at] - np.median(track.positions[at], axis=0), axis=-1).max()
    off = np.abs(sizes - np.median(sizes))
    if spread > 0.015 + 0.1 * np.exp(np.median(sizes)):
        if not (off > moving).any():
            return None
        jumps = np.abs(np.diff(sizes))
        return at[jumps.argmax() + 1] if jumps.max() > jump else at[np.argmax(np.abs(sizes - sizes[0]) > moving)]
    steps = np.diff(sizes) / np.diff(at)
    for i, step in enumerate(steps):
        around = [steps[k] for k in (i - 1, i + 1) if 0 <= k < len(steps)]
        if max(min(around) - step, step - max(around)) > jump:
            return at[i + 1]
    way = 1 if sizes[-1] >= sizes[0] else -1
    against = np.maximum.accumulate(way * sizes) - way * sizes
    return at[np.argmax(against > back)] if (against > back).any() else None


def _other_shape(track, at, shapes, surely=4.5, named=1.2):
    """First frame of another shape: of all cuts in two, the one whose sides differ most."""
    patches = track.patches[at].astype(np.float64)
    if len(at) < 4:
        return None
    sums = np.cumsum(patches, axis=0)
    counts = np.arange(2, len(at) - 1)
    before = sums[counts - 1] / counts[:, None]
    after = (sums[-1] - sums[counts - 1]) / (len(at) - counts)[:, None]
    apart = ((before - after) ** 2).sum(-1)
    best = int(apart.argmax())
    cut = counts[best]
    if apart[best] > named:
        names = track.shape_in(at[:cut], shapes), track.shape_in(at[cut:], shapes)
        if apart[best] > surely or (None not in names and names[0] != names[1]):
            return at[cut]
    return None


# out of sight and back -------------------------------------------------------------------------------------------


def persistence(video, tracks=None, hidden=0.25):
    """Whether what went behind something came out as the same object.

    An occlusion counts where a whole object could be seen before, less than `hidden` of it for a frame or more, and
    then either the whole of what came out, or nothing although it was due.

    Returns dict(occlusions: how many; same_object: at the right place, with the color, the size (radius within 5 %)
    and the shape it had; color, size, shape: each alone), bool over all of them, None if there are none. What cannot
    be told is False.
    """
    video = np.asarray(video)
    tracks = parse_clip(video) if tracks is None else tracks
    scene = _scene(video, tracks)
    frees = [seen_track(track, scene.frame).free for track in tracks]
    found = []
    for i, (track, free) in enumerate(zip(tracks, frees)):
        if not free.any():
            continue
        usual = _typical_radius(track, free)
        out = ~track.seen | (np.nan_to_num(track.radius) < np.sqrt(hidden) * usual)
        at = np.flatnonzero(free)
        for last, first in zip(at[:-1], at[1:]):
            between = slice(last + 1, first)
            if out[between].any() and not track.edge[between].any():
                before, after = free & (np.arange(len(free)) <= last), free & (np.arange(len(free)) >= first)
                jumped = any(event.frame == first for event in _jumps(track, free, scene))
                found.append((not jumped, *_same(track, before, track, after, scene)))
        end = int(np.flatnonzero(track.seen)[-1])
        if end == len(video) - 1 or not (track.bar[end] or track.touch[end]) or track.edge[end]:
            continue
        successor = _successor(i, tracks, frees, scene, end)
        if successor is not None:
            other, after = tracks[successor], frees[successor]
            found.append((False, *_same(track, free, other, after, scene)))
        elif _missing(track, free, scene) is not None:
            found.append((False, False, False, False))
    if not found:
        return dict(occlusions=0, same_object=None, color=None, size=None, shape=None)
    place, color, size, shape = (all(column) for column in zip(*found))
    return dict(occlusions=len(found), same_object=place and color and size and shape, color=color, size=size,
                shape=shape)  # fmt: skip


def _same(one, before, two, after, scene):
    """(color, size, shape) of a track in some frames [T] bool are those of a track in others."""
    color = np.linalg.norm(_lab(_middle(one.frame_rgb[before])) - _lab(_middle(two.frame_rgb[after]))) < TINT
    sizes = _middle(one.radius[np.flatnonzero(before)[-3:]]), _middle(two.radius[np.flatnonzero(after)[:3]])
    size = abs(np.log(sizes[1] / sizes[0])) <= np.log1p(SAME_SIZE)
    shape = one.shape_in(before, scene.shapes)
    return bool(color), bool(size), shape is not None and shape == two.shape_in(after, scene.shapes)


def _middle(values):
    return np.median(values, axis=0)


def _successor(i, tracks, frees, scene, end):
    """Number of the track that came out where track i, last seen in frame `end`, should have; None if none did."""
    course = _course(tracks[i], frees[i])
    best = None
    for k, (other, free) in enumerate(zip(tracks, frees)):
        begin = int(np.flatnonzero(other.seen)[0])
        if k == i or begin <= end or not other.cut[begin] or other.edge[begin] or not free.any():
            continue
        first = int(np.flatnonzero(free)[0])
        place, doubt = course(first)
        apart = np.linalg.norm(other.positions[first] - place)
        if apart < 0.1 + doubt and (best is None or apart < best[0]):
            best = apart, k
    return None if best is None else best[1]


# against the truth -----------------------------------------------------------------------------------------------


def speed_drift(track, positions, frame=(1.0, 1.0), least=0.05, most=0.25):
    """By what part an object runs faster (+) or slower (-) than it should: 0.05 is 5 %; None if that cannot be told.

    track: of a clip that began as the truth did; positions [T, 2]: the true ones, in fractions of the frame's shorter
    side; frame: (width, height) in the same. Of the speeds up to `most` off, the one at which the true path passes
    through the measured places best (least sum of distances, between frames on straight lines): whatever the path, and
    through bounces. None if it goes less than `least` altogether.
    """
    at = np.flatnonzero(seen_track(track, np.asarray(frame)).free)
    steps = np.diff(positions, axis=0)
    if len(at) < 3 or np.linalg.norm(steps[at[0] : at[-1]], axis=-1).sum() < least:
        return None
    beyond = int(most * len(positions)) + 1  # it goes on as it went last
    path = np.concatenate([positions, positions[-1] + steps[-1] * np.arange(1, beyond + 1)[:, None]])

    def best(scales):
        where = scales[:, None] * at  # [scales, n]
        there = np.stack([np.interp(where, np.arange(len(path)), path[:, k]) for k in (0, 1)], -1)
        return scales[np.linalg.norm(there - track.positions[at], axis=-1).sum(-1).argmin()]

    rough = best(np.arange(1 - most, 1 + most, 0.005))
    return float(best(rough + np.arange(-10, 11) * 0.0005) - 1)
