"""Latents <-> rows of patches, and where each patch is. For numpy and jax arrays alike; imports neither.

Letters: t, h, w = latent frames, rows, columns; C = channels; N = patches (tokens);
P = C * pt * ph * pw = values a patch.

Two orders of the P values occur in Wan-shaped models. "in" is (c, pt, ph, pw): how a Conv3d patch embedding
of weight [D, C, pt, ph, pw] flattens, and what every row of tokens in sorax uses. "out" is (pt, ph, pw, c):
how the model's last linear layer emits them.
"""

from functools import lru_cache

import numpy as np
from einops import rearrange

PATCH_SIZE = (1, 2, 2)
_ORDERS = {"in": "(c pt ph pw)", "out": "(pt ph pw c)"}


def grid(shape, patch_size=PATCH_SIZE):
    """The number of patches along (t, h, w) of latents of `shape` (t, h, w).

    Raises ValueError where a dimension is not positive or not divisible by its patch size.
    """
    return _grid(tuple(shape), tuple(patch_size))


@lru_cache(maxsize=1024)  # asked for each sample of a data set, which has few shapes
def _grid(shape, patch_size):
    shape, patch_size = _triple("shape", shape), _triple("patch_size", patch_size)
    for axis, size, patch in zip("thw", shape, patch_size):
        if size % patch:
            raise ValueError(
                f"latents of shape (t, h, w) = {shape} do not divide into patches of {patch_size}: "
                f"{axis} = {size} is not a multiple of {patch}"
            )
    return tuple(size // patch for size, patch in zip(shape, patch_size))


def num_tokens(shape, patch_size=PATCH_SIZE):
    """How many patches latents of `shape` (t, h, w) make. Raises ValueError as `grid` does."""
    t, h, w = grid(shape, patch_size)
    return t * h * w


def patchify(latents, patch_size=PATCH_SIZE):
    """Cut latents [..., t, h, w, C] into patches [..., N, P] of order "in", w being the fastest axis of N.

    Raises ValueError where a dimension is not divisible by its patch size.
    """
    if latents.ndim < 4:
        raise ValueError(f"latents must be [..., t, h, w, C], got shape {tuple(latents.shape)}")
    grid(latents.shape[-4:-1], patch_size)
    pt, ph, pw = patch_size
    pattern = f"... (t pt) (h ph) (w pw) c -> ... (t h w) {_ORDERS['in']}"
    return rearrange(latents, pattern, pt=pt, ph=ph, pw=pw)


def patch_view(latents, patch_size=PATCH_SIZE, order="in"):
    """Latents [t, h, w, C] as patches [t/pt, h/ph, w/pw, C, pt, ph, pw], or [..., pt, ph, pw, C] for order "out".

    As `patchify`, but with no axes joined: of a numpy array, it is a view. Raises ValueError as `grid` does.
    """
    grid(latents.shape[:3], patch_size)
    pt, ph, pw = patch_size
    pattern = f"(t pt) (h ph) (w pw) c -> t h w {_order(order).strip('()')}"
    return rearrange(latents, pattern, pt=pt, ph=ph, pw=pw)


def unpatchify(patches, shape, patch_size=PATCH_SIZE, order="in"):
    """Put patches [..., N, P] together: latents [..., t, h, w, C]. With order "in" the inverse of `patchify`.

    Args:
      patches: [..., N, P] with N = num_tokens(shape, patch_size).
      shape: (t, h, w) of the latents, not of the patch grid.
      order: "in" = (c, pt, ph, pw), the order of tokens; "out" = (pt, ph, pw, c), the order the model emits.

    Raises ValueError where N, P, shape and patch_size do not agree.
    """
    t, h, w = grid(shape, patch_size)
    pt, ph, pw = patch_size
    n, p = patches.shape[-2:]
    if n != t * h * w:
        raise ValueError(f"{n} patches cannot form latents of shape {tuple(shape)}, which have {t * h * w}")
    _channels(p, patch_size)
    pattern = f"... (t h w) {_order(order)} -> ... (t pt) (h ph) (w pw) c"
    return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def reorder_output(patches, patch_size=PATCH_SIZE, channels=None):
    """Patches [..., P] as the model emits them (pt, ph, pw, c) -> the order of tokens (c, pt, ph, pw).

    Raises ValueError where P is not channels * pt * ph * pw.
    """
    found = _channels(patches.shape[-1], patch_size)
    if channels is not None and channels != found:
        raise ValueError(f"a patch of {patches.shape[-1]} values has {found} channels, not {channels}")
    pt, ph, pw = patch_size
    return rearrange(patches, f"... {_ORDERS['out']} -> ... {_ORDERS['in']}", pt=pt, ph=ph, pw=pw)


def positions(t, h, w, patch_size=PATCH_SIZE):
    """Grid coordinates of each patch of t x h x w latents: int32 [N, 3], in the order of `patchify`."""
    return np.indices(grid((t, h, w), patch_size), np.int32).reshape(3, -1).T.copy()


def _triple(name, values):
    values = tuple(int(v) for v in values)
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{name} must be three positive numbers (t, h, w), got {values}")
    return values


def _order(order):
    if order not in _ORDERS:
        raise ValueError(f'order must be "in" or "out", got {order!r}')
    return _ORDERS[order]


def _channels(p, patch_size):
    volume = int(np.prod(_triple("patch_size", patch_size)))
    if p % volume:
        raise ValueError(f"{p} values do not make a patch of {tuple(patch_size)}: not a multiple of {volume}")
    return p // volume
