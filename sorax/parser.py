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

import numpy as np
from scipy import ndimage
from skimage.color import rgb2lab

from sorax.background import background, find_bar, length, project
from sorax.tracks import MAX_OBJECTS, link, make_track

MIN_PIXELS = 3  # an object's core is at least this large
REACH = 3  # pixels around the core (coverage above 1/2) that still belong to the object: its soft edge
_PLANE = np.array([[[0, 0, 0]] * 3, [[1, 1, 1]] * 3, [[0, 0, 0]] * 3], bool)  # 8 neighbours in a frame, none in time


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
    palette = _palette(colors)
    nearest, distance = _nearest_named(video, palette)
    pixels = video.astype(np.float32)
    bar = find_bar(video)
    behind = background(pixels, distance, bar)
    if behind is None:
        return []
    picture, tones = behind
    hues = _colors_present(pixels, picture, tones, nearest, distance, len(palette), bar)
    if not len(hues):
        return []
    found = _detect(pixels, picture, hues, bar)
    if found is None:
        return []
    detections, alpha, owner = found
    tracks = [
        make_track(path, detections, alpha, owner, video.shape, lambda rgb: name_color(rgb, palette), tuple(shapes))
        for path in link(detections, _lab(detections["rgb"]), len(video), min(video.shape[1:3]))
    ]
    return sorted(tracks, key=lambda track: (-track.seen.sum(), -np.nanmax(track.area)))


def lasting(track, share=0.75):
    """Whether a track spans most of the clip and was seen in half of that: one object of the scene."""
    return track.span >= share and track.seen.mean() >= share / 2


def name_distance(video, colors):
    """CIELAB distance (CIE 1976) of each pixel of a clip uint8 [T, H, W, 3] to the nearest of some named colours."""
    return _nearest_named(video, _palette(colors))[1]


# colour ----------------------------------------------------------------------------------------------------------


def _palette(colors):
    return tuple((name, tuple(int(v) for v in rgb)) for name, rgb in colors.items())


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


def _grow(mask, pixels, outside=0):
    """A mask or labels [T, H, W], grown in each frame by some pixels to all 8 sides; larger labels win."""
    return ndimage.maximum_filter(mask, (1, 2 * pixels + 1, 2 * pixels + 1), mode="constant", cval=outside)


# objects in a frame ----------------------------------------------------------------------------------------------


def _colors_present(
    pixels, background, tones, nearest, distance, num_colors, bar=None, stand_out=48.0, tolerance=36.0
):  # fmt: skip
    """Measured colours [C, 3] of the objects in the clip.

    A pixel on an object's edge may have the name of a third colour (orange over black is brown, near red), so names
    are taken greedily, the one with most pixels near it first, and pixels that the taken colours explain as their
    mixture with the background or with each other do not count for the next.
    """
    pixels_off = length(pixels - background)
    open_ = pixels_off > stand_out
    behind = np.broadcast_to(background, pixels.shape)
    weight = np.clip(1 - distance / 60, 0.02, 1) ** 2
    bar_edge = None if bar is None else bar.pixels(background.shape, 1.5) & ~bar.pixels(background.shape, -1.5)
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
        if any(project(hue, one, two)[1] < 20 for one, two in itertools.combinations_with_replacement(tones, 2)):
            continue  # a place where the background was misjudged
        if bar_edge is not None and bar_edge[np.nonzero(mask)[1:]].all():
            continue  # there an object mixes with the bar, and not with what is behind both
        core = length(pixels - hue) < 60
        grown = _grow(core, 2)
        # its soft edge, as far as it reaches: a blurred tip is long
        where = np.nonzero(open_ | mask)
        fades = open_ | mask
        fades[where] = project(pixels[where], behind[where], hue)[1] < tolerance
        regions, count = ndimage.label(core | fades, _PLANE)
        explained = (np.bincount(regions[core], minlength=count + 1) > 0)[regions]
        where = np.nonzero(open_ & grown & ~explained)
        for other, other_grown in zip(hues, cores):
            explained[where] |= other_grown[where] & (project(pixels[where], hue, other)[1] < tolerance)
        open_ &= ~explained
        # what is left of a ring one or two pixels wide is no object either: an object has an inside
        open_ &= ~grown | _grow(~_grow(~(open_ & grown), 1, outside=True), 1)
        hues.append(hue)
        cores.append(grown)
    return np.asarray(hues, np.float32)


def _detect(pixels, background, hues, bar):
    """Connected objects of each frame.

    Returns (dict of arrays [D]: frame, x, y, area, core (pixels covered by more than half), rgb [D, 3], hue (number of
    its colour in `hues`), and whether it touches: edge (of the frame), touch (an object of another colour), bar, cut
    (any of these, or another piece of its colour), near (as cut, up to 3 pixels away); alpha [T, H, W], the coverage;
    owner [T, H, W], 1 + the number of the detection that a pixel belongs to), or None if there are none, or too many
    to be a scene.
    """
    frames, height, width, _ = pixels.shape
    # a pixel belongs to the colour whose mixture with the background it can be
    t, row, col = np.nonzero(length(pixels - background) > 20)
    value, behind = pixels[t, row, col], background[row, col]
    along, off = np.stack([np.stack(project(value, behind, hue)) for hue in hues], 1)
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
    near = _grow(pure[core], 2)
    beside = np.bincount(who[near[inside]], minlength=count + 1) > 0
    keep = (size >= MIN_PIXELS) & (pure | ~beside)
    keep[0] = False
    if not keep.any() or keep.sum() > MAX_OBJECTS * frames:
        return None
    core = (np.cumsum(keep) * keep)[core].astype(np.int32)
    count, size = int(keep.sum()), size[keep]
    ids = np.arange(1, count + 1)

    own_hue = np.zeros(count + 1, int)
    own_hue[core[core > 0]] = hue_of[core > 0]
    owner, close, touch = core, np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    cut, near = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    for step in range(REACH):
        grown = _grow(owner, 1)
        lowest = np.where(owner == 0, np.iinfo(np.int32).max, owner)
        lowest = ndimage.minimum_filter(lowest, (1, 3, 3))
        clash = (grown > 0) & (lowest < grown)
        one, two = grown[clash], lowest[clash]
        other = own_hue[one] != own_hue[two]
        if step == 0:  # cores up to 1 pixel apart
            cut[one] = cut[two] = True
            touch[one[other]] = touch[two[other]] = True
        if step <= 1:  # up to 3
            close[one] = close[two] = True
            near[one[other]] = near[two[other]] = True
        owner = np.where(owner == 0, grown, owner)

    t, row, col = np.nonzero(owner)
    who = owner[t, row, col]
    value, behind = pixels[t, row, col], background[row, col]
    sure = core[t, row, col] > 0
    # the object's own colour: mean of its best covered pixels, less those mixed with another object
    hue = hues[hue_of[t, row, col].clip(0)]
    cover = np.where(sure, strength[t, row, col] * np.where(length(value - hue) < 60, 1, 0.5), 0)
    inner = sure & (cover >= 0.92 * ndimage.maximum(cover, who, ids)[who - 1])
    inside = np.bincount(who[inner], minlength=count + 1)[1:]
    rgb = np.stack([np.bincount(who[inner], value[inner, k], count + 1)[1:] for k in range(3)], -1) / inside[:, None]

    axis = rgb[who - 1] - behind
    coverage = np.einsum("nc,nc->n", value - behind, axis) / np.maximum(np.einsum("nc,nc->n", axis, axis), 1)
    if close.any():  # between two objects a pixel is a mixture of both, without background
        for c, hue in enumerate(hues):
            other = close[who] & (own_hue[who] != c) & (cover < 0.9)
            if other.any():
                away, off_pair = project(value[other], hue, rgb[who[other] - 1])
                _, off_own = project(value[other], behind[other], rgb[who[other] - 1])
                coverage[other] = np.where(off_pair + 12 < off_own, away, coverage[other])
    coverage = np.clip(coverage, np.where(sure, 0.3, -0.2), 1.2)  # below 0 outside the core: noise must cancel
    area = np.maximum(np.bincount(who, coverage, count + 1)[1:], 0.3 * size)
    x = np.bincount(who, coverage * (col + 0.5), count + 1)[1:] / area
    y = np.bincount(who, coverage * (row + 0.5), count + 1)[1:] / area
    alpha = np.zeros(core.shape, np.float32)
    alpha[t, row, col] = coverage
    edge = sure & ((row == 0) | (col == 0) | (row == height - 1) | (col == width - 1))
    edge = np.bincount(who[edge], minlength=count + 1) > 0
    at_bar, near_bar = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    if bar is not None:
        for flags, reach in ((at_bar, 1.5), (near_bar, 3.5)):
            flags[who[sure & bar.pixels((height, width), reach)[row, col]]] = True
    frame = ndimage.maximum(t, who, ids).astype(int)
    flags = dict(edge=edge, touch=touch, bar=at_bar, cut=cut | edge | at_bar, near=near | edge | near_bar)
    flags = {name: flag[1:] for name, flag in flags.items()}
    return dict(frame=frame, x=x, y=y, area=area, core=size, rgb=rgb, hue=own_hue[1:], **flags), alpha, owner
