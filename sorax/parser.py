"""From pixels to objects, with no network: segmentation, colour, shape, sub-pixel position, tracks.

Made for flat-coloured objects on a still background of one or two flat tones, rendered, reconstructed by a VAE or
generated: edges may be blurred, colours may drift, there may be noise. It says None ('cannot tell') rather than
guess. The steps: background tones -> background picture -> colours present -> soft coverage -> components per
frame -> tracks -> colour and shape per track.

Letters: T frames, H, W pixels, C colours, D detections. Colours are RGB in 0..255 as stored: a pixel that an
object covers by a part `alpha` is `alpha * object + (1 - alpha) * background` there.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.color import rgb2lab

from sorax.shape_match import canonical_patch, classify

MIN_PIXELS = 3  # an object's core is at least this large
REACH = 3  # pixels around the core (coverage above 1/2) that still belong to the object: its soft edge
MAX_OBJECTS = 12  # more in a frame than this is noise, not a scene
_PLANE = np.array([[[0, 0, 0]] * 3, [[1, 1, 1]] * 3, [[0, 0, 0]] * 3], bool)  # 8 neighbours in a frame, none in time


@dataclass
class Track:
    """One object followed through a clip; arrays are over its T frames, nan where it was not seen.

    color, shape: names, or None for 'cannot tell'; rgb: measured colour, 0..255; positions [T, 2]: (x, y), y down,
    in fractions of the frame's shorter side, the origin at the frame's top-left corner; area [T]: in shorter
    side squared; seen [T] bool; cut [T] bool: it touches the frame's edge or another object.
    """

    color: str | None
    shape: str | None
    rgb: np.ndarray
    positions: np.ndarray
    area: np.ndarray
    seen: np.ndarray
    cut: np.ndarray
    scores: dict

    @property
    def span(self):
        """Share of the clip from its first to its last sighting."""
        frames = np.flatnonzero(self.seen)
        return (frames[-1] - frames[0] + 1) / len(self.seen)

    @property
    def radius(self):
        """[T], of the circle of equal area, in fractions of the shorter side."""
        return np.sqrt(self.area / math.pi)


def parse_clip(video, colors=None, shapes=None):
    """Objects of a clip, those seen longest first.

    video: uint8 [T, H, W, 3]; colors: dict name -> RGB in 0..255, shapes: some of the embedded world's names; all
    of the world's by default. Returns a list of Track, empty if nothing stands out, or if there is no flat background
    to stand out of.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"a clip is uint8 [T, H, W, 3], not {video.dtype} {list(video.shape)}")
    if colors is None or shapes is None:
        from data_pipelines import world

        colors, shapes = colors or world.COLORS, shapes or world.SHAPES
    palette = tuple((name, tuple(int(v) for v in rgb)) for name, rgb in colors.items())
    nearest, distance = _nearest_named(video, palette)
    pixels = video.astype(np.float32)
    behind = _background(pixels, distance)
    if behind is None:
        return []
    background, tones = behind
    hues = _colors_present(pixels, background, tones, nearest, distance, len(palette))
    if not len(hues):
        return []
    found = _detect(pixels, background, hues)
    if found is None:
        return []
    detections, alpha, owner = found
    tracks = [_track(path, detections, alpha, owner, video.shape, palette, tuple(shapes))
              for path in _link(detections, len(video), min(video.shape[1:3]))]
    return sorted(tracks, key=lambda track: (-track.seen.sum(), -np.nanmax(track.area)))


def lasting(track, share=0.75):
    """Whether a track spans most of the clip and was seen in half of that: one object of the scene."""
    return track.span >= share and track.seen.mean() >= share / 2


# colour ----------------------------------------------------------------------------------------------------------


def _lab(rgb):
    return rgb2lab(np.asarray(rgb, np.float32) / 255)


@functools.lru_cache(maxsize=8)
def _color_table(palette):
    """For each of 32^3 colours: the number of the nearest name and the CIELAB distance to it (CIE 1976)."""
    level = np.arange(32, dtype=np.float32) * 8 + 4
    cube = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    gap = np.linalg.norm(_lab(cube)[:, None] - _lab([rgb for _, rgb in palette])[None], axis=-1)
    return gap.argmin(1).astype(np.int8), gap.min(1).astype(np.float32)


def _nearest_named(video, palette):
    names, gaps = _color_table(palette)
    coarse = (video >> 3).astype(np.int32)
    code = (coarse[..., 0] << 10) | (coarse[..., 1] << 5) | coarse[..., 2]
    return names[code], gaps[code]


def name_color(rgb, palette, reach=40.0, ratio=0.75):
    """Nearest named colour in CIELAB, or None: farther than `reach`, or not clearly nearer than the second."""
    gap = np.linalg.norm(_lab(rgb) - _lab([value for _, value in palette]), axis=-1)
    order = np.argsort(gap)
    clear = len(order) < 2 or gap[order[0]] <= ratio * gap[order[1]]
    return palette[order[0]][0] if gap[order[0]] <= reach and clear else None


# background ------------------------------------------------------------------------------------------------------


def _background(pixels, distance, named=28.0, near=24.0, at_border=0.06):
    """Still picture behind the objects [H, W, 3] and its tones [n, 3], or None if nothing flat is found but objects."""
    across = _length(np.diff(pixels, axis=2, append=pixels[:, :, -1:]))
    rough = np.maximum(across, _length(np.diff(pixels, axis=1, append=pixels[:, -1:])))
    flat = rough <= np.clip(2 * np.median(rough), 24, 60)
    plain = flat & (distance > named)
    sample, total = pixels[plain], flat.size
    if len(sample) > 20_000:
        step = len(sample) // 20_000 + 1
        sample, total = sample[::step], total / step
    ring = np.ones(flat.shape[1:], bool)
    ring[1:-1, 1:-1] = False
    border, ring_size = pixels[plain & ring], ring.sum() * len(flat)
    tones = []
    for _ in range(8):  # a few tones, and objects of a colour without a name
        if len(tones) == 4 or len(sample) < 0.03 * total:
            break
        coarse = (sample / 16).astype(int)
        code = coarse @ np.array([256, 16, 1])
        tone = sample[code == np.bincount(code).argmax()].mean(0)
        for _ in range(2):  # refined
            tone = sample[_length(sample - tone) < near].mean(0)
        far = _length(sample - tone) >= near
        reaches_border = np.count_nonzero(_length(border - tone) < near) >= at_border * ring_size
        if reaches_border and np.count_nonzero(~far) >= 0.03 * total:
            tones.append(tone)
        sample = sample[far]
    if not tones:
        return None
    tones = np.asarray(tones, np.float32)
    gap = np.stack([_length(pixels - tone) for tone in tones])  # [tones, T, H, W]
    tone = np.where(gap.min(0) < 1.5 * near, gap.argmin(0), -1)
    votes = np.stack([np.count_nonzero(tone == k, axis=0) for k in range(len(tones))])  # [tones, H, W]
    label, count = votes.argmax(0), votes.max(0)
    known = count > 0
    picture = np.einsum("thwc,thw->hwc", pixels, (tone == label).astype(np.float32)) / np.maximum(count, 1)[..., None]
    if not known.all():  # always covered: continue the nearest tone
        row, col = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        label = label[row, col]
        picture = np.where(known[..., None], picture, tones[label])
    # where two tones meet, a pixel is a mixture of them in every frame that does not hide it
    rows, cols = np.nonzero(ndimage.maximum_filter(label, 5) != ndimage.minimum_filter(label, 5))
    if len(rows):
        band = pixels[:, rows, cols]
        off = np.full(band.shape[:2], np.inf, np.float32)
        for one, two in itertools.combinations(tones, 2):
            off = np.minimum(off, _project(band, one, two)[1])
        mixed = off < 16
        usual = np.nanmedian(np.where(mixed[..., None], band, np.nan)[:, mixed.any(0)], axis=0)
        picture[rows[mixed.any(0)], cols[mixed.any(0)]] = usual
    return picture.astype(np.float32), tones


def _length(values):
    """Euclidean length over the last axis; several times faster than np.linalg.norm where that axis is short."""
    return np.sqrt(np.einsum("...c,...c->...", values, values))


def _project(values, start, end):
    """Where values lie along start -> end (0..1 if between), and their distance from that segment."""
    axis = end - start
    along = ((values - start) * axis).sum(-1) / np.maximum((axis * axis).sum(-1), 1e-6)
    on = start + np.clip(along, 0, 1)[..., None] * axis
    return along, _length(values - on)


# objects in a frame ----------------------------------------------------------------------------------------------


def _colors_present(pixels, background, tones, nearest, distance, num_colors, stand_out=48.0, tolerance=36.0):
    """Measured colours [C, 3] of the objects in the clip.

    A pixel on an object's edge may have the name of a third colour (orange over black is brown, near red), so names
    are taken greedily, the one with most pixels near it first, and pixels that the taken colours explain as their
    mixture with the background or with each other do not count for the next.
    """
    pixels_off = _length(pixels - background)
    open_ = pixels_off > stand_out
    behind = np.broadcast_to(background, pixels.shape)
    weight = np.clip(1 - distance / 60, 0.02, 1) ** 2
    hues, cores = [], []
    for _ in range(num_colors):
        power = np.bincount(nearest[open_], weight[open_], minlength=num_colors)
        name = int(power.argmax())
        mask = open_ & (nearest == name)
        if mask.sum() < max(4, len(pixels)):
            break
        strength = pixels_off[mask]
        hue = np.median(pixels[mask][strength >= np.quantile(strength, 0.6)], axis=0)
        open_ = open_ & ~mask
        if any(np.linalg.norm(hue - other) < 50 for other in hues):
            continue
        if any(_project(hue, one, two)[1] < 20 for one, two in itertools.combinations_with_replacement(tones, 2)):
            continue  # a place where the background was misjudged
        core = _length(pixels - hue) < 60
        grown = ndimage.binary_dilation(core, _PLANE, iterations=2)
        # its soft edge, as far as it reaches: a blurred tip is long
        where = np.nonzero(open_ | mask)
        fades = open_ | mask
        fades[where] = _project(pixels[where], behind[where], hue)[1] < tolerance
        explained = ndimage.binary_propagation(core, _PLANE, mask=core | fades)
        where = np.nonzero(open_ & grown & ~explained)
        for other, other_grown in zip(hues, cores):
            explained[where] |= other_grown[where] & (_project(pixels[where], hue, other)[1] < tolerance)
        open_ &= ~explained
        # what is left of a ring one or two pixels wide is no object either: an object has an inside
        open_ &= ~grown | ndimage.binary_opening(open_ & grown, np.ones((1, 3, 3), bool))
        hues.append(hue)
        cores.append(grown)
    return np.asarray(hues, np.float32)


def _detect(pixels, background, hues):
    """Connected objects of each frame.

    Returns (dict of arrays [D]: frame, x, y, area, core (pixels covered by more than half), cut, rgb [D, 3]; alpha
    [T, H, W], the coverage; owner [T, H, W], 1 + the number of the detection that a pixel belongs to), or None if
    there are none, or too many to be a scene.
    """
    frames, height, width, _ = pixels.shape
    # a pixel belongs to the colour whose mixture with the background it can be
    t, row, col = np.nonzero(_length(pixels - background) > 20)
    value, behind = pixels[t, row, col], background[row, col]
    along, off = np.stack([np.stack(_project(value, behind, hue)) for hue in hues], 1)
    chosen = off.argmin(0)
    along = np.take_along_axis(along, chosen[None], 0)[0]
    hue_of, strength = np.full(pixels.shape[:3], -1, np.int8), np.zeros(pixels.shape[:3], np.float32)
    hue_of[t, row, col], strength[t, row, col] = chosen, along

    core, count = np.zeros(pixels.shape[:3], np.int32), 0
    for c in range(len(hues)):
        labels, n = ndimage.label((hue_of == c) & (strength > 0.5), _PLANE)
        core = np.where(labels > 0, labels + count, core)
        count += n
    if not count:
        return None
    inside = np.nonzero(core)
    who, full = core[inside], strength[inside] > 0.8
    size = np.bincount(who, minlength=count + 1)
    pure = np.bincount(who[full], minlength=count + 1) > 0
    # a piece that is nowhere fully covered, beside one that is, is a blur of its edge
    near = ndimage.binary_dilation(pure[core], _PLANE, iterations=2)
    beside = np.bincount(who[near[inside]], minlength=count + 1) > 0
    keep = (size >= MIN_PIXELS) & (pure | ~beside)
    keep[0] = False
    if not keep.any() or keep.sum() > MAX_OBJECTS * frames:
        return None
    core = (np.cumsum(keep) * keep)[core].astype(np.int32)
    count, size = int(keep.sum()), size[keep]
    ids = np.arange(1, count + 1)

    owner, close, touch = core, np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    for step in range(REACH):
        grown = ndimage.grey_dilation(owner, footprint=_PLANE[1:2])
        lowest = np.where(owner == 0, np.iinfo(np.int32).max, owner)
        lowest = -ndimage.grey_dilation(-lowest, footprint=_PLANE[1:2])
        clash = (grown > 0) & (lowest < grown)
        if step == 0:  # cores up to 1 pixel apart
            touch[grown[clash]] = touch[lowest[clash]] = True
        if step <= 1:  # up to 3
            close[grown[clash]] = close[lowest[clash]] = True
        owner = np.where(owner == 0, grown, owner)

    t, row, col = np.nonzero(owner)
    who = owner[t, row, col]
    value, behind = pixels[t, row, col], background[row, col]
    sure = core[t, row, col] > 0
    # the object's own colour: mean of its best covered pixels, less those mixed with another object
    hue = hues[hue_of[t, row, col].clip(0)]
    cover = np.where(sure, strength[t, row, col] * np.where(_length(value - hue) < 60, 1, 0.5), 0)
    inner = sure & (cover >= 0.92 * ndimage.maximum(cover, who, ids)[who - 1])
    inside = np.bincount(who[inner], minlength=count + 1)[1:]
    rgb = np.stack([np.bincount(who[inner], value[inner, k], count + 1)[1:] for k in range(3)], -1) / inside[:, None]

    axis = rgb[who - 1] - behind
    coverage = ((value - behind) * axis).sum(-1) / np.maximum((axis * axis).sum(-1), 1)
    if close.any():  # between two objects a pixel is a mixture of both, without background
        own_hue = np.zeros(count + 1, int)
        own_hue[core[core > 0]] = hue_of[core > 0]
        for c, hue in enumerate(hues):
            other = close[who] & (own_hue[who] != c) & (cover < 0.9)
            if other.any():
                away, off_pair = _project(value[other], hue, rgb[who[other] - 1])
                _, off_own = _project(value[other], behind[other], rgb[who[other] - 1])
                coverage[other] = np.where(off_pair + 12 < off_own, away, coverage[other])
    coverage = np.clip(coverage, np.where(sure, 0.3, -0.2), 1.2)  # below 0 outside the core: noise must cancel
    area = np.maximum(np.bincount(who, coverage, count + 1)[1:], 0.3 * size)
    x = np.bincount(who, coverage * (col + 0.5), count + 1)[1:] / area
    y = np.bincount(who, coverage * (row + 0.5), count + 1)[1:] / area
    alpha = np.zeros(core.shape, np.float32)
    alpha[t, row, col] = coverage
    edge = sure & ((row == 0) | (col == 0) | (row == height - 1) | (col == width - 1))
    at_edge = np.bincount(who[edge], minlength=count + 1)[1:] > 0
    frame = ndimage.maximum(t, who, ids).astype(int)
    return dict(frame=frame, x=x, y=y, area=area, core=size, cut=at_edge | touch[1:], rgb=rgb), alpha, owner


# tracks ----------------------------------------------------------------------------------------------------------


def _link(found, num_frames, short, reach=0.25, color_reach=35.0):
    """Lists of detections that are one object: nearest to where it was heading, and of the same colour."""
    lab = _lab(found["rgb"])
    place = np.stack([found["x"], found["y"]], -1) / short
    tracks = []
    for frame in range(num_frames):
        new = np.flatnonzero(found["frame"] == frame)
        if len(new) > MAX_OBJECTS:
            new = new[np.argsort(-found["core"][new])[:MAX_OBJECTS]]
        cost = np.full((len(tracks), len(new)), 1e3)
        for i, path in enumerate(tracks):
            last, gap = path[-1], frame - found["frame"][path[-1]]
            heading = place[last]
            if len(path) > 1:
                speed = (place[last] - place[path[-2]]) / (found["frame"][last] - found["frame"][path[-2]])
                heading = heading + gap * speed
            apart = np.minimum(np.linalg.norm(place[new] - heading, axis=-1),
                               np.linalg.norm(place[new] - place[last], axis=-1) + 0.02)
            # a sliver's colour is mixed with what hides it, so the track's largest view counts too
            best = path[np.argmax(found["area"][path])]
            tint = np.minimum(*(np.linalg.norm(lab[new] - lab[known], axis=-1) for known in (last, best)))
            allowed = (apart < min(reach * gap, 0.7)) & (tint < color_reach)
            cost[i] = np.where(allowed, apart + 0.005 * tint, 1e3)
        used = set()
        for i, j in zip(*linear_sum_assignment(cost)):
            if cost[i, j] < 1e3:
                tracks[i].append(new[j])
                used.add(j)
        tracks.extend([new[j]] for j in range(len(new)) if j not in used)
    return _join_split(tracks, found, place, lab)


def _join_split(tracks, found, place, lab, apart=0.4, tint=20.0):
    """Joins tracks of which one ends as the other begins: an object seen for a moment on both sides of another."""
    tracks = sorted(tracks, key=lambda path: found["frame"][path[0]])
    joined = []
    for path in tracks:
        for earlier in joined:
            shared = found["frame"][earlier[-1]] - found["frame"][path[0]] + 1
            near = np.linalg.norm(place[earlier[-1]] - place[path[0]]) < apart
            alike = np.linalg.norm(lab[earlier[-1]] - lab[path[0]]) < tint
            if 1 <= shared <= 2 and len(earlier) > shared and len(path) > shared and near and alike:
                best = {}  # the larger piece where there are two
                for d in [*earlier, *path]:
                    frame = found["frame"][d]
                    if frame not in best or found["area"][d] > found["area"][best[frame]]:
                        best[frame] = d
                earlier[:] = [best[frame] for frame in sorted(best)]
                break
        else:
            joined.append(list(path))
    return joined


def _track(path, found, alpha, owner, size, palette, shapes):
    path = np.asarray(path)
    num_frames, short = size[0], min(size[1:3])
    frames, area = found["frame"][path], found["area"][path]
    positions, areas = np.full((num_frames, 2), np.nan), np.full(num_frames, np.nan)
    positions[frames] = np.stack([found["x"][path], found["y"][path]], -1) / short
    areas[frames] = area / short**2
    seen, cut = np.zeros(num_frames, bool), np.zeros(num_frames, bool)
    seen[frames], cut[frames] = True, found["cut"][path]
    rgb = np.average(found["rgb"][path], axis=0, weights=np.maximum(area, 1e-3))
    whole = ~found["cut"][path]
    if not whole.any():  # always at the edge: its largest views are still the best there are
        whole[:] = True
    whole &= area >= 0.85 * np.max(area[whole], initial=0)  # a smaller one may be partly hidden
    use = path[whole]
    centers = np.stack([found["x"][use], found["y"][use]], -1)
    radii = np.sqrt(found["area"][use] / math.pi)
    patch = canonical_patch(alpha, owner, found["frame"][use], use + 1, centers, radii)
    shape, scores = classify(patch, shapes)
    return Track(name_color(rgb, palette), shape, rgb, positions, areas, seen, cut, scores)
