"""Which of a few shapes is this soft mask? Analysis by synthesis, with an honest 'cannot tell'.

A mask is resampled around its centroid on a grid whose unit is the radius of the circle of equal area, so that
position and size drop out; frames are averaged there, which also averages over sub-pixel phases. The result is
compared with exact renders of every shape at every blur, because a pixel grid, a VAE and a sampler all blur.

Letters: G = grid points a side, S = shapes, V = variants (blur, scale) of a shape.
"""

import functools
import math

import numpy as np
from scipy import ndimage

GRID = 24  # points a side of the canonical patch
SPAN = 2.1  # half the patch, in radii of equal area: holds the tips of a five-pointed star (1.7) and their blur
_OVERSAMPLE = 8
_BLURS = np.geomspace(0.05, 0.6, 11)  # standard deviations, in radii of equal area
_SCALES = (0.92, 0.96, 1.0, 1.04, 1.08)  # the area of a blurred, tinted object is known to about 10 %


@functools.lru_cache(maxsize=8)
def template_bank(shapes):
    """Canonical patches of every shape: float32 [S, V, G * G], V = blur levels times scales."""
    from data_pipelines.world_render import coverage  # the shapes are the embedded world's

    n, bank = GRID * _OVERSAMPLE, []
    points_per_radius = n / (2 * SPAN)
    centre = (np.arange(GRID) + 0.5) * _OVERSAMPLE - 0.5  # where the coarse grid's points lie on the fine one
    grid = np.stack(np.meshgrid(centre, centre, indexing="ij"))
    for shape in shapes:
        variants = []
        for scale in _SCALES:
            radius = np.array([points_per_radius * scale])
            mask = coverage(shape, np.full((1, 2), n / 2), radius, np.zeros((1, 2)), n, n)[0].astype(np.float32)
            for blur in _BLURS:
                soft = ndimage.gaussian_filter(mask, blur * points_per_radius, truncate=3.0)
                variants.append(ndimage.map_coordinates(soft, grid, order=1).ravel())
        bank.append(variants)
    return np.asarray(bank, np.float32)


def canonical_patches(alpha, owner, frames, labels, centers, radii):
    """Soft masks of one object in some frames, on the canonical grid.

    alpha: float [T, H, W] coverage; owner: int [T, H, W] which object a pixel belongs to (others count as 0);
    frames, labels [n]: the frames to use and the object's number in each; centers [n, 2]: (x, y) in pixels, where
    the centre of pixel (r, c) is (c + 0.5, r + 0.5); radii [n]: of the circle of equal area, in pixels.
    Returns [n, G * G] float32. Bilinear.
    """
    _, height, width = alpha.shape
    axis = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * SPAN
    x = centers[:, 0, None] + radii[:, None] * axis - 0.5  # [n, G]
    y = centers[:, 1, None] + radii[:, None] * axis - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None, :], (y - y0)[:, :, None]
    total = np.zeros((len(frames), GRID, GRID), np.float32)
    t, label = frames[:, None, None], labels[:, None, None]
    for dy in (0, 1):
        for dx in (0, 1):
            row, col = (y0 + dy)[:, :, None], (x0 + dx)[:, None, :]
            inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
            row, col = np.clip(row, 0, height - 1), np.clip(col, 0, width - 1)
            weight = (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
            total += weight * np.where(inside & (owner[t, row, col] == label), alpha[t, row, col], 0)
    return total.reshape(len(frames), GRID * GRID)


def classify(patch, shapes, margin=0.12, misfit=1.0):
    """Name of the shape of a canonical patch [G * G], or None when it cannot be told, and the scores.

    Best and second-best shape are compared on the line between their renders: 1 = exactly the best,
    0.5 = half way to the second. None if the position is below 0.5 + margin, or if the patch is farther from the
    best render than `misfit` times the distance between the two renders (then it is neither).
    Returns (shape or None, dict(position, misfit, error of every shape)).
    """
    bank = template_bank(tuple(shapes))
    power = (bank * bank).sum(-1)
    dot = bank @ patch  # [S, V]
    gain = np.clip(dot / power, 0.85, 1.2)  # the object's colour, hence its coverage, is itself an estimate
    errors = (patch @ patch) - 2 * gain * dot + gain**2 * power
    variant = errors.argmin(1)
    error = errors[np.arange(len(shapes)), variant]
    best, second = np.argsort(error)[:2]
    renders = [bank[s, variant[s]] * gain[s, variant[s]] for s in (best, second)]
    gap = float(((renders[0] - renders[1]) ** 2).sum()) + 1e-9
    position = 0.5 + float(error[second] - error[best]) / (2 * gap)
    off = math.sqrt(max(float(error[best]), 0) / gap)
    scores = dict(position=position, misfit=off, errors=dict(zip(shapes, error.tolist())))
    return (shapes[best] if position >= 0.5 + margin and off <= misfit else None), scores
