"""The still picture behind the objects of a clip: one or two flat tones, and the grey bar in front if there is one.

Letters: T frames, H, W pixels. Colours are RGB in 0..255 as stored.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

BAR_GREY = 120
HALO = 7  # pixels a side around what is no background, within which soft edges may tint a pixel


@dataclass(frozen=True)
class Bar:
    """A grey bar across the whole frame: low..high along `axis` (0 = x), in fractions of the frame's shorter side."""

    axis: int
    low: float
    high: float

    def pixels(self, size, margin=0):
        """Which pixels it covers, made wider by `margin` pixels on either side: bool [H, W] of a frame (H, W, ...)."""
        short, count = min(size[:2]), size[1 - self.axis]
        middle = np.arange(count) + 0.5
        line = (middle > self.low * short - margin) & (middle < self.high * short + margin)
        return np.broadcast_to(line[None] if self.axis == 0 else line[:, None], size[:2])


def find_bar(video, tolerance=30, chroma=24, share=0.8):
    """The embedded world's occluder in a clip uint8 [T, H, W, 3], or None. Objects pass behind it, never before it."""
    height, width = video.shape[1:3]
    values = video.astype(np.int16)
    red, green, blue = np.moveaxis(values, -1, 0)
    low, high = (pick(pick(red, green), blue) for pick in (np.minimum, np.maximum))
    is_grey = (low >= BAR_GREY - tolerance) & (high <= BAR_GREY + tolerance) & (high - low <= chroma)
    best = None
    for axis in (0, 1):
        line = is_grey.mean((0, 1) if axis == 0 else (0, 2)) >= share
        runs, count = ndimage.label(line)
        for k in range(1, count + 1):
            at = np.flatnonzero(runs == k)
            if 2 <= len(at) <= 0.7 * len(line) and (best is None or len(at) > best[0]):
                best = len(at), axis, int(at[0]), int(at[-1]) + 1
    if best is None:
        return None
    _, axis, low, high = best
    lines = np.median(values, axis=0).astype(np.float32)  # [H, W, 3], mostly without objects
    lines = lines if axis == 1 else lines.swapaxes(0, 1)
    grey = lines[(low + high) // 2]

    def covers(inner, step):  # how much of the outermost line that looks grey, and of the one beside it
        beyond = inner + 2 * step
        if not 0 <= beyond < len(lines):
            return 0.5 if 0 <= inner + step < len(lines) else 0.0
        parts = [np.median(project(lines[at], lines[beyond], grey)[0]) for at in (inner, inner + step)]
        return float(np.clip(parts, 0, 1).sum()) - 1

    short = min(height, width)
    return Bar(axis, (low - covers(low, -1)) / short, (high + covers(high - 1, 1)) / short)


def background(pixels, distance, bar=None, named=28.0, near=24.0):
    """Still picture behind the objects [H, W, 3] and its tones [n, 3], or None if nothing flat is found but objects.

    pixels: float32 [T, H, W, 3]; distance [T, H, W]: of each to the nearest colour that an object may have; bar: as
    found by `find_bar`, part of the picture.
    """
    across = length(np.diff(pixels, axis=2, append=pixels[:, :, -1:]))
    rough = np.maximum(across, length(np.diff(pixels, axis=1, append=pixels[:, -1:])))
    flat = rough <= np.clip(2 * np.median(rough), 24, 60)
    tones = _tones(pixels, flat & (distance > named), near)
    if not len(tones):
        return None
    gap = np.stack([length(pixels - tone) for tone in tones])  # [tones, T, H, W]
    barred = np.zeros(gap.shape[2:], bool)
    if bar is not None and len(tones) > 1:  # elsewhere grey is the soft edge of a white object
        grey, barred = int(length(tones - BAR_GREY).argmin()), bar.pixels(gap.shape[2:])
        gap[grey][:, ~bar.pixels(gap.shape[2:], 1)] = np.inf
    tone = np.where(gap.min(0) < 1.5 * near, gap.argmin(0), -1)
    votes = np.stack([np.count_nonzero(tone == k, axis=0) for k in range(len(tones))])  # [tones, H, W]
    label = _halves(np.where(barred, 0, votes))
    if label is None:
        known = votes.max(0) > 0
        row, col = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        label = votes.argmax(0)[row, col]  # always covered: continue the nearest tone
    if barred.any():
        label = np.where(barred, grey, label)
    # an object's soft edge tints the background: only frames count in which none is near
    sees = (tone == label) & ~ndimage.maximum_filter(tone < 0, (1, HALO, HALO))
    count = sees.sum(0)
    picture = np.einsum("thwc,thw->hwc", pixels, sees.astype(np.float32)) / np.maximum(count, 1)[..., None]
    meet = ndimage.maximum_filter(label, 5) != ndimage.minimum_filter(label, 5)
    for k in range(len(tones)):
        region = label == k
        hidden, clear = region & (count == 0), region & (count > 0) & ~meet
        if not clear.any():
            picture[hidden] = tones[k]
        elif hidden.any():
            row, col = ndimage.distance_transform_edt(~clear, return_distances=False, return_indices=True)
            picture[hidden] = picture[row[hidden], col[hidden]]
    # where two tones meet, a pixel is a mixture of them in every frame that does not hide it
    rows, cols = np.nonzero(meet)
    if len(rows):
        band = pixels[:, rows, cols]
        off = np.full(band.shape[:2], np.inf, np.float32)
        for one, two in itertools.combinations(tones, 2):
            off = np.minimum(off, project(band, one, two)[1])
        mixed = off < 16
        usual = np.nanmedian(np.where(mixed[..., None], band, np.nan)[:, mixed.any(0)], axis=0)
        picture[rows[mixed.any(0)], cols[mixed.any(0)]] = usual
    return picture.astype(np.float32), tones


def _halves(votes, purity=0.9):
    """Which tone is where [H, W] if whole rows or whole columns are of one tone, as votes [tones, H, W] say; else None.

    An object's soft edge may look like the other tone: a whole line outvotes it.
    """
    best = None
    for axis in (1, 2):
        lines = votes.sum(axis)  # [tones, W] or [tones, H]
        pure = lines.max(0).sum() / max(lines.sum(), 1)
        if best is None or pure > best[0]:
            best = pure, axis, lines
    pure, axis, lines = best
    known = lines.max(0) > 0
    if pure < purity or not known.any():
        return None
    at = np.arange(len(known))
    nearest = at[known][np.abs(at[:, None] - at[known]).argmin(1)]
    return np.broadcast_to(np.expand_dims(lines.argmax(0)[nearest], axis - 1), votes.shape[1:])


def _tones(pixels, plain, near, at_border=0.06, least=0.03):
    """The flat colours [n, 3] that reach the frame's border, along much of it or on two opposite sides (a bar)."""
    sample, total = pixels[plain], plain.size
    if len(sample) > 20_000:
        step = len(sample) // 20_000 + 1
        sample, total = sample[::step], total / step
    sides = [(pixels[:, at][plain[:, at]], plain[:, at].size) for at in (0, -1)]  # top, bottom
    sides += [(pixels[:, :, at][plain[:, :, at]], plain[:, :, at].size) for at in (0, -1)]
    ring_size = sum(size for _, size in sides)
    tones = []
    for _ in range(8):  # a few tones, and objects of a colour without a name
        if len(tones) == 4 or len(sample) < least * total:
            break
        coarse = (sample / 16).astype(int)
        code = coarse @ np.array([256, 16, 1])
        tone = sample[code == np.bincount(code).argmax()].mean(0)
        for _ in range(2):  # refined
            tone = sample[length(sample - tone) < near].mean(0)
        far = length(sample - tone) >= near
        reach = [np.count_nonzero(length(values - tone) < near) for values, _ in sides]
        across = max(min(reach[i] / sides[i][1], reach[i + 1] / sides[i + 1][1]) for i in (0, 2)) >= 0.5 * at_border
        if (sum(reach) >= at_border * ring_size or across) and np.count_nonzero(~far) >= least * total:
            tones.append(tone)
        sample = sample[far]
    return np.asarray(tones, np.float32)


def length(values):
    """Euclidean length over the last axis; several times faster than np.linalg.norm where that axis is short."""
    return np.sqrt(np.einsum("...c,...c->...", values, values))


def project(values, start, end):
    """Where values lie along start -> end (0..1 if between), and their distance from that segment."""
    axis = end - start
    along = np.einsum("...c,...c->...", values - start, axis) / np.maximum(
        np.einsum("...c,...c->...", axis, axis), 1e-6
    )
    on = start + np.clip(along, 0, 1)[..., None] * axis
    return along, length(values - on)
