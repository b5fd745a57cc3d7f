"""Pixels of a world scene by exact area coverage, in numpy.

The value of a pixel is the mean over its square: an object covers exactly the fraction of the pixel that its outline
cuts out, so its intensity-weighted centroid is its position at any size. Coverage is the mixed second difference of a
function on the pixel corners (the area of the object up and to the left of a corner, less terms that cancel):
closed forms for the disc, and for polygons Green's theorem summed over edges. All frames of a clip are computed at
once, in a window around the object.

Shape letters: T frames, R rows, C columns, E edges.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from data_pipelines.world_physics import extents, outline
from data_pipelines.world_scene import BAR_COLOR, COLORS, TONES, Scene

_CHUNK = 400_000  # numbers per temporary array: bounds memory for large frames and keeps small ones in cache


@functools.cache
def _edges(shape: str):
    """Edges of a polygon of radius 1 that are not horizontal: top, bottom, x at the top, dx/dy, sign, each [E].

    Sign +1 is a right boundary (an edge going down, as the outline is clockwise on the screen), -1 a left one.
    Right boundaries come first.
    """
    a = outline(shape)
    b = np.roll(a, -1, axis=0)
    rise = b[:, 1] - a[:, 1]
    keep = np.abs(rise) > 1e-9
    a, b, rise = a[keep], b[keep], rise[keep]
    order = np.argsort(rise < 0, kind="stable")
    a, b, rise = a[order], b[order], rise[order]
    upper = np.where((rise > 0)[:, None], a, b)
    slope = (b[:, 0] - a[:, 0]) / rise
    return upper[:, 1], np.maximum(a[:, 1], b[:, 1]), upper[:, 0], slope, np.sign(rise)


def segment_cover(low, high, start, count: int) -> np.ndarray:
    """Overlap of the interval low..high with each of `count` unit cells from `start`; broadcasts: [..., count]."""
    left = np.asarray(start)[..., None] + np.arange(count)
    low, high = np.asarray(low)[..., None], np.asarray(high)[..., None]
    return np.clip(np.minimum(high, left + 1) - np.maximum(low, left), 0.0, 1.0)


def coverage(shape: str, centre, radius, origin, rows: int, cols: int) -> np.ndarray:
    """Fraction of each pixel that an object covers, exactly.

    Args: centre [T, 2] (x, y) and radius [T] (of the circle of equal area) in pixels; origin [T, 2]: the (column,
    row) of the window's first pixel. Returns [T, rows, cols] float64 in [0, 1].
    """
    if shape == "square":
        half = radius * extents("square")[0]
        across = segment_cover(centre[:, 0] - half, centre[:, 0] + half, origin[:, 0], cols)
        down = segment_cover(centre[:, 1] - half, centre[:, 1] + half, origin[:, 1], rows)
        return down[:, :, None] * across[:, None, :]
    # Pixel corners about the centre, in radii.
    x = ((origin[:, :1] - centre[:, :1]) + np.arange(cols + 1)) / radius[:, None]  # [T, C+1]
    y = ((origin[:, 1:] - centre[:, 1:]) + np.arange(rows + 1)) / radius[:, None]  # [T, R+1]
    corner = _disc_corners(x, y) if shape == "circle" else _polygon_corners(shape, x, y)
    across = corner[:, :, 1:] - corner[:, :, :-1]
    cover = (across[:, 1:] - across[:, :-1]) * (radius * radius)[:, None, None]
    return np.clip(cover, 0.0, 1.0, out=cover)


def _disc_corners(x, y):
    # Area of the unit disc in the quadrant u < x, v < y is (A(x) + A(y)) / 2 + h(x, y) + const: A cancels in the
    # second difference. h = x y where the corner is inside the disc; else its size is (a(x) + a(y)) / 2 - pi / 4.
    x, y = np.clip(x, -1.0, 1.0), np.clip(y, -1.0, 1.0)
    ax = 0.5 * (np.abs(x) * np.sqrt(1 - x * x) + np.arcsin(np.abs(x))) - math.pi / 4
    ay = 0.5 * (np.abs(y) * np.sqrt(1 - y * y) + np.arcsin(np.abs(y)))
    outside = (ax[:, None, :] + ay[:, :, None]) * (np.sign(x)[:, None, :] * np.sign(y)[:, :, None])
    inside = x[:, None, :] * y[:, :, None]
    return np.where((x * x)[:, None, :] < (1 - y * y)[:, :, None], inside, outside)


def _polygon_corners(shape, x, y):
    # At height v the polygon left of x measures sum_e sign_e min(x, X_e(v)); as the signs cancel, this is
    # -sum_e sign_e relu(x - X_e(v)), whose integral over v has the closed form sum_e sign_e relu^2 / (2 slope_e).
    top, bottom, x_top, slope, sign = _edges(shape)
    scale = np.sqrt(0.5 / np.abs(slope))
    at = np.clip(y[:, None, :], top[:, None], bottom[:, None])  # [T, E, R+1]
    at = x_top[:, None] + slope[:, None] * (at - top[:, None])
    total = 0.0
    weights = sign * np.sign(slope)
    for weight in (1, -1):
        chosen = weights == weight
        beyond = (x[:, None, :] * scale[chosen, None])[:, :, None, :] - (at * scale[:, None])[:, chosen, :, None]
        np.maximum(beyond, 0.0, out=beyond)  # [T, E, R+1, C+1]
        np.multiply(beyond, beyond, out=beyond)
        total = total + weight * beyond.sum(axis=1)
    return total


def view(scene: Scene, height: int, width: int) -> tuple[float, float, float]:
    """Pixels per world unit, and the pixel (x, y) of the world's top-left corner.

    The scene is centred and fits in the frame; at its own aspect ratio it fills the frame.
    """
    scale = min(width / scene.width, height / scene.height)
    return scale, (width - scale * scene.width) / 2, (height - scale * scene.height) / 2


def render(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """The scene at `times` [T] (seconds), as uint8 [T, height, width, 3]; later objects lie over earlier ones."""
    scale, left, top = view(scene, height, width)
    video = np.empty((len(times), height, width, 3), np.uint8)
    video[:] = _background(scene, height, width, scale, (left, top))
    for body in scene.bodies:
        still = body.is_still
        position, _ = body.path.state(times[:1] if still else times)
        centre = position * scale + (left, top)
        radius = body.radii(times[: len(centre)]) * scale
        color = np.asarray(COLORS[body.color], np.float32)
        _draw(video, body.shape, centre, radius, color)
    if scene.bar is not None:
        low, high = (scene.bar.low * scale, scene.bar.high * scale)
        vertical = scene.bar.axis == 0
        offset, size = (left, width) if vertical else (top, height)
        cover = segment_cover(low + offset, high + offset, 0, size).astype(np.float32)
        span = np.flatnonzero(cover)
        if len(span):
            span = slice(span[0], span[-1] + 1)
            where = (slice(None), slice(None), span) if vertical else (slice(None), span)
            alpha = cover[span, None] if vertical else cover[span, None, None]
            _blend(video, where, alpha, np.asarray(BAR_COLOR, np.float32))
    return video


def _background(scene, height, width, scale, offset):
    back = scene.background
    first, second = (np.asarray(TONES[tone], np.float64) for tone in (back.tones[0], back.tones[-1]))
    if len(back.tones) == 1:
        return first.astype(np.uint8)
    size = (width, height)[back.axis]
    share = segment_cover(-1.0, back.at * scale + offset[back.axis], 0, size)[:, None]
    line = np.rint(second + share * (first - second)).astype(np.uint8)
    return line[None] if back.axis == 0 else line[:, None]


def _blend(video, where, alpha, color):
    under = video[where].astype(np.float32)
    under += alpha * (color - under)
    under += 0.5  # rounds to nearest, as the cast truncates
    video[where] = under.astype(np.uint8)


def _draw(video, shape, centre, radius, color):
    """Blends an object into the frames; one centre and radius stand for all frames of an object at rest."""
    num_frames, height, width, _ = video.shape
    l, t, r, b = extents(shape)
    largest = float(radius.max())
    cols = min(width, math.ceil((l + r) * largest) + 1)
    rows = min(height, math.ceil((t + b) * largest) + 1)
    # A window pushed back into the frame still holds all of the object that the frame shows.
    origin = np.floor(centre - radius[:, None] * (l, t))
    origin = np.clip(origin, 0, (width - cols, height - rows))
    step = max(1, _CHUNK // ((rows + 1) * (cols + 1) * (10 if shape == "star" else 2)))
    for begin in range(0, len(centre), step):
        part = slice(begin, begin + step)
        alpha = coverage(shape, centre[part], radius[part], origin[part], rows, cols).astype(np.float32)[..., None]
        if len(centre) == 1:
            column, row = origin[0].astype(int)
            _blend(video, (slice(None), slice(row, row + rows), slice(column, column + cols)), alpha, color)
            continue
        index = origin[part].astype(int)
        frame, row, column, channel = video.strides
        windows = as_strided(
            video,
            (num_frames, height - rows + 1, width - cols + 1, rows, cols, 3),
            (frame, row, column, row, column, channel),
        )
        _blend(windows, (np.arange(begin, begin + len(alpha)), index[:, 1], index[:, 0]), alpha, color)


def visible_fractions(scene: Scene, positions: np.ndarray, radii: np.ndarray, frame, cells: int = 48) -> np.ndarray:
    """Share of each object's area that can be seen: inside the frame, not under later objects or the bar.

    Args: positions [K, T, 2] and radii [K, T] in world units; frame: (left, top, right, bottom) seen, in the same.
    Returns [K, T]. Measured on a grid of `cells` across each object, whatever the size of the video; error < 1e-3.
    """
    result = np.ones(radii.shape)
    for k, body in enumerate(scene.bodies):
        unit = np.array(extents(body.shape))
        spread = max(unit[0] + unit[2], unit[1] + unit[3]) / cells  # side of a cell, in radii
        cell = radii[k] * spread
        corner = positions[k] - radii[k][:, None] * unit[:2]  # [T, 2]
        far = positions[k] + radii[k][:, None] * unit[2:]
        crossed = (corner < frame[:2]).any(1) | (far > frame[2:]).any(1)
        above = []
        for j in range(k + 1, len(scene.bodies)):
            other = np.array(extents(scene.bodies[j].shape))
            near = ((positions[j] - radii[j][:, None] * other[:2]) < far) & (
                (positions[j] + radii[j][:, None] * other[2:]) > corner
            )
            near = near.all(1)
            if near.any():
                above.append(j)
                crossed |= near
        if scene.bar is not None:
            axis = scene.bar.axis
            crossed |= (corner[:, axis] < scene.bar.high) & (far[:, axis] > scene.bar.low)
        at = np.flatnonzero(crossed)
        if not len(at):
            continue
        cell, corner = cell[at], corner[at]
        zero = np.zeros((len(at), 2))

        def to_cells(points, corner=corner, cell=cell):
            return (points - corner) / cell[:, None]

        cover = coverage(body.shape, to_cells(positions[k, at]), radii[k, at] / cell, zero, cells + 1, cells + 1)
        seen = cover.copy()
        for j in above:
            seen *= 1 - coverage(
                scene.bodies[j].shape, to_cells(positions[j, at]), radii[j, at] / cell, zero, cells + 1, cells + 1
            )
        low, high = to_cells(np.asarray(frame[:2])), to_cells(np.asarray(frame[2:]))
        seen *= segment_cover(low[:, 0], high[:, 0], zero[:, 0], cells + 1)[:, None, :]
        seen *= segment_cover(low[:, 1], high[:, 1], zero[:, 1], cells + 1)[:, :, None]
        if scene.bar is not None:
            axis = scene.bar.axis
            edges = [(value - corner[:, axis]) / cell for value in (scene.bar.low, scene.bar.high)]
            shown = 1 - segment_cover(*edges, zero[:, 0], cells + 1)
            seen *= shown[:, None, :] if axis == 0 else shown[:, :, None]
        result[k, at] = seen.sum((1, 2)) / cover.sum((1, 2))
    return result
