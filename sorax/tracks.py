"""Objects followed through a clip: detections of single frames joined in time, through occlusion and contact.

Letters: T frames, D detections. A detection is a connected region of one colour in one frame; an object that something
in front cuts in two is two detections there. `found` is a dict of arrays [D], see `sorax.parser`.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from sorax.shape_match import GRID, canonical_patches, classify

MAX_OBJECTS = 12  # more in a frame than this is noise, not a scene
FAR = 1e3


@dataclass
class Track:
    """One object followed through a clip; arrays are over its T frames, nan where it was not seen.

    color, shape: names, or None for 'cannot tell'; rgb: measured colour, 0..255; positions [T, 2]: (x, y), y down,
    in fractions of the frame's shorter side, the origin at the frame's top-left corner: the centroid of what can be
    seen; area [T]: in shorter side squared; seen [T] bool; cut [T] bool: it touches the frame's edge, another object
    or the bar, so that position and area may not be those of the whole object; edge, touch, bar [T] bool: which of
    them, touch being an object of another colour. frame_rgb [T, 3], patches [T, G * G] (see `shape_match`): measured
    in each frame.
    """

    color: str | None
    shape: str | None
    rgb: np.ndarray
    positions: np.ndarray
    area: np.ndarray
    seen: np.ndarray
    cut: np.ndarray
    scores: dict
    edge: np.ndarray
    touch: np.ndarray
    bar: np.ndarray
    frame_rgb: np.ndarray
    patches: np.ndarray

    @property
    def span(self):
        """Share of the clip from its first to its last sighting."""
        frames = np.flatnonzero(self.seen)
        return (frames[-1] - frames[0] + 1) / len(self.seen)

    @property
    def radius(self):
        """[T], of the circle of equal area, in fractions of the shorter side."""
        return np.sqrt(self.area / math.pi)

    @property
    def whole(self):
        """[T] bool: seen, and not cut."""
        return self.seen & ~self.cut

    def shape_in(self, frames, shapes):
        """Name of the shape in some of the frames (indices or bool [T]), or None."""
        return classify(self.patches[frames].mean(0), shapes)[0]


def link(found, lab, num_frames, short, reach=0.25, color_reach=35.0):
    """Lists of detections that are one object: nearest to where it was heading, and of the same colour.

    lab [D, 3]: their CIELAB colours; short: the frame's shorter side in pixels.
    """
    place = np.stack([found["x"], found["y"]], -1) / short
    tracks = []
    for frame in range(num_frames):
        new = np.flatnonzero(found["frame"] == frame)
        if len(new) > MAX_OBJECTS:
            new = new[np.argsort(-found["core"][new])[:MAX_OBJECTS]]
        cost = np.full((len(tracks), len(new)), FAR)
        for i, path in enumerate(tracks):
            last, gap = path[-1], frame - found["frame"][path[-1]]
            heading = place[last]
            if len(path) > 1:
                speed = (place[last] - place[path[-2]]) / (found["frame"][last] - found["frame"][path[-2]])
                heading = heading + gap * speed
            apart = np.minimum(
                np.linalg.norm(place[new] - heading, axis=-1), np.linalg.norm(place[new] - place[last], axis=-1) + 0.02
            )
            # a sliver's colour is mixed with what hides it, so the track's largest view counts too
            best = path[np.argmax(found["area"][path])]
            tint = np.minimum(*(np.linalg.norm(lab[new] - lab[known], axis=-1) for known in (last, best)))
            allowed = (apart < min(reach * gap, 0.7)) & (tint < color_reach)
            cost[i] = np.where(allowed, apart + 0.005 * tint, FAR)
        used = set()
        for i, j in zip(*linear_sum_assignment(cost)):
            if cost[i, j] < FAR:
                tracks[i].append(new[j])
                used.add(j)
        tracks.extend([new[j]] for j in range(len(new)) if j not in used)
    return _gather([np.asarray(path) for path in tracks], found, place, lab, short)


def _gather(paths, found, place, lab, short):
    """Joins tracks that are pieces of one object: cut in two by what is in front of it, or hidden for a while.

    The largest first, each taking the nearest of those that fit, until none does.
    """
    paths = sorted(paths, key=lambda path: -found["area"][path].max())
    i = 0
    while i < len(paths) <= 4 * MAX_OBJECTS:  # more are noise
        costs = [_apart(paths[i], other, found, place, lab, short) for other in paths[i + 1 :]]
        j = int(np.argmin(costs)) if costs else 0
        if not costs or costs[j] == FAR:
            i += 1
            continue
        both = np.concatenate([paths[i], paths.pop(i + 1 + j)])
        paths[i] = both[np.argsort(found["frame"][both], kind="stable")]
    largest = max(found["area"].max(), 1)
    return [path for path in paths if len(paths) == 1 or not _is_sliver(path, found, largest)]


def _apart(one, two, found, place, lab, short, tint=20.0, reach=2.7, step=0.12):
    """How far two tracks are from each other where they follow each other, or FAR if they are not one object.

    They are if both are of one colour, if wherever both are seen they are beside something that may cut the object in
    two, no farther apart and together no larger than it is, and if something hid it where the one takes over.
    """
    area, frame, near = found["area"], found["frame"], found["near"]
    best = [path[np.argmax(area[path])] for path in (one, two)]
    if found["hue"][best[0]] != found["hue"][best[1]] and np.linalg.norm(lab[best[0]] - lab[best[1]]) > tint:
        return FAR
    size = area[best].max()
    radius = math.sqrt(size / math.pi) / short
    shared = np.intersect1d(frame[one], frame[two])
    for f in shared:
        a, b = one[frame[one] == f], two[frame[two] == f]
        distance = np.linalg.norm(place[a][:, None] - place[b][None], axis=-1).max()
        if (
            distance > reach * radius
            or area[a].sum() + area[b].sum() > 1.25 * size
            or not near[b].all() & near[a].any()
        ):
            return FAR
    gaps = np.abs(frame[one][:, None] - frame[two][None])
    apart = np.linalg.norm(place[one][:, None] - place[two][None], axis=-1)
    if len(shared):
        return float(apart[gaps == 0].min())
    # where one takes over from the other
    joints = [(int(k), int(np.argmin(gaps[k]))) for k in np.flatnonzero(gaps.min(1) == gaps.min())]
    a, b = joints[0]
    wait = gaps[a, b]
    if not (near[one[a]] or near[two[b]]) or apart[a, b] > min(2 * radius + step * wait, 0.6):
        return FAR
    return float(apart[a, b])


def _is_sliver(path, found, largest):
    """A mixture of two colours that was taken for an object for a moment, beside a true one."""
    return (
        len(path) <= 2
        and bool((found["touch"] | found["bar"])[path].all())
        and found["area"][path].max() < 0.2 * largest
    )


def _shape_of_parts(patches, areas, single, shapes):
    """(name or None, scores) of an object that always touches something: of its largest views, or of a part of the
    clip, if all that can be told say the same."""
    if not single.any():
        return None, {}
    found = [classify(patches[single & (areas >= 0.85 * areas[single].max())].mean(0), shapes)]
    found += [
        classify(patches[part].mean(0), shapes) for part in np.array_split(np.flatnonzero(single), 3) if len(part)
    ]
    names = {name for name, _ in found if name is not None}
    return (names.pop() if len(names) == 1 else None), found[0][1]


def make_track(path, found, alpha, owner, size, name, shapes):
    """The Track of some detections. alpha, owner [T, H, W]: see `sorax.parser`; name: RGB -> name or None."""
    num_frames, short = size[0], min(size[1:3])
    frame, area = found["frame"][path], found["area"][path]
    weight = np.maximum(area, 1e-3)

    def per_frame(values):  # mean over the pieces of a frame
        total = np.full((num_frames, values.shape[-1]), np.nan)
        sums = np.stack([np.bincount(frame, weight * v, num_frames) for v in values.T], -1)
        parts = np.bincount(frame, weight, num_frames)
        total[parts > 0] = sums[parts > 0] / parts[parts > 0, None]
        return total

    def any_of(flags):
        return np.bincount(frame, flags[path], num_frames) > 0

    pieces = np.bincount(frame, minlength=num_frames)
    seen = pieces > 0
    positions = per_frame(np.stack([found["x"][path], found["y"][path]], -1)) / short
    areas = np.where(seen, np.bincount(frame, area, num_frames), np.nan)
    rgb = np.average(found["rgb"][path], axis=0, weights=weight)
    cut = any_of(found["cut"]) | (pieces > 1)
    patches = np.full((num_frames, GRID * GRID), np.nan, np.float32)
    alone = path[pieces[frame] == 1]
    centers = np.stack([found["x"][alone], found["y"][alone]], -1)
    patches[found["frame"][alone]] = canonical_patches(
        alpha, owner, found["frame"][alone], alone + 1, centers, np.sqrt(found["area"][alone] / math.pi)
    )
    whole, single = seen & ~cut, seen & (pieces == 1)
    if whole.any():
        shape, scores = classify(patches[whole & (areas >= 0.85 * areas[whole].max())].mean(0), shapes)
    else:
        shape, scores = _shape_of_parts(patches, areas, single, shapes)
    return Track(name(rgb), shape, rgb, positions, areas / short**2, seen, cut, scores, any_of(found["edge"]),
                 any_of(found["touch"]), any_of(found["bar"]), per_frame(found["rgb"][path]), patches)  # fmt: skip
