"""Videos of any length through the VAE in pieces, with memory that does not grow; frames of any size in tiles.

A stream gives the numbers of the whole clip (`sorax.vae.VAE.encode_chunk`). Tiles are an approximation: each sees its
own pixels only, and where tiles overlap their results are blended.

Legend: T frames, H height, W width, C channels; lower case t, h, w for latents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sorax import functional
from sorax.errors import UserError
from sorax.vae import VAE, VAEConfig

CHUNK = 16  # frames that go through at a time, in the first chunk one more


@functools.lru_cache(maxsize=8)
def _programs(config: VAEConfig):
    """Compiled functions of a chunk, shared by all streams of a VAE of this size."""
    graphdef, _ = functional.abstract(VAE, config)

    def encode(params, video, frames):
        vae = nnx.merge(graphdef, params)
        mean, _, frames = vae.encode_chunk(video.astype(jnp.float32) / 127.5 - 1.0, frames)
        return vae.normalize(mean), frames

    def decode(params, latents, frames):
        vae = nnx.merge(graphdef, params)
        video, frames = vae.decode_chunk(vae.denormalize(latents), frames)
        return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8), frames

    def posterior(params, video, frames):
        vae = nnx.merge(graphdef, params)
        mean, logvar, frames = vae.encode_chunk(video.astype(jnp.float32) / 127.5 - 1.0, frames)
        return jnp.concatenate([mean, jnp.exp(logvar)], axis=-1), frames

    return tuple(jax.jit(f, donate_argnums=2) for f in (encode, decode, posterior))


class _Stream:
    """Buffers items until a chunk is full, and runs it with what the chunk before left.

    One program for the first chunk (a frame longer) and one for all others: the last chunk is filled up with copies of
    the last frame, which nothing before them sees.
    """

    def __init__(self, program, params, first: int, later: int):
        self._program, self._params = program, params
        self._first, self._later = first, later
        self._frames, self._waiting = None, []

    def push(self, items):
        """Takes the next items `[n, ...]`, n >= 0; returns what is final now, a list of arrays `[k, ...]`."""
        self._waiting += list(items)
        out = []
        while len(self._waiting) >= self._size():
            size = self._size()
            out.append(self._run(self._waiting[:size]))
            del self._waiting[:size]
        return out

    def _size(self):
        return self._first if self._frames is None else self._later

    def _run(self, items):
        result, self._frames = self._program(self._params, np.stack(items)[None], self._frames)
        return np.asarray(result)[0]


class EncodeStream(_Stream):
    """uint8 frames of one video -> normalised latents, as they become final.

        stream = EncodeStream(config, params)
        for frames in pieces:                # uint8 [n, H, W, 3], any n
            latents += stream.push(frames)   # float32 [t, h, w, C] each
        latents += stream.finish()

    Args:
        chunk: frames that go through at a time, a multiple of the temporal stride: memory grows with it.
        posterior: give mean and variance float32 [t, h, w, 2C], not normalised, in place of latents.
    """

    def __init__(self, config: VAEConfig, params, chunk: int = CHUNK, *, posterior: bool = False):
        stride = config.temporal_stride
        if chunk < stride or chunk % stride:
            raise UserError(f"a stream's chunk of {chunk} frames: use a multiple of the temporal stride {stride}")
        super().__init__(_programs(config)[2 if posterior else 0], params, chunk + 1, chunk)
        self._stride = stride

    def finish(self):
        """The latents of the frames that still wait. Raises UserError unless the video had 4n + 1 frames."""
        count = len(self._waiting)
        latents = count // self._stride if self._frames is not None else 1 + (count - 1) // self._stride
        if (count - (self._frames is None)) % self._stride:
            raise UserError(f"a video of {self._stride}n + 1 frames was expected, {count % self._stride} are left: "
                            "cut or repeat frames at the end")  # fmt: skip
        if not count:
            return []
        full = self._waiting + [self._waiting[-1]] * (self._size() - count)
        self._waiting = []
        return [self._run(full)[:latents]]


class DecodeStream(_Stream):
    """Normalised latents of one video -> uint8 frames, as they become final; used like `EncodeStream`."""

    def __init__(self, config: VAEConfig, params, chunk: int = CHUNK):
        stride = config.temporal_stride
        if chunk < stride or chunk % stride:
            raise UserError(f"a stream's chunk of {chunk} frames: use a multiple of the temporal stride {stride}")
        super().__init__(_programs(config)[1], params, chunk // stride + 1, chunk // stride)
        self._stride = stride

    def finish(self):
        """The frames of the latents that still wait."""
        count = len(self._waiting)
        if not count:
            return []
        frames = count * self._stride - (self._stride - 1 if self._frames is None else 0)
        full = self._waiting + [self._waiting[-1]] * (self._size() - count)
        self._waiting = []
        return [self._run(full)[:frames]]


def tiles(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles that cover [0, length) with at least `overlap` in common; one tile if it is long enough.

    Raises:
        ValueError: the overlap is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}")
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tiled(function, x, *, tile: int, overlap: int, scale: float):
    """function(x) from overlapping spatial tiles, their results blended linearly.

    Args:
        function: `[T, H, W, C]` -> `[T', scale H, scale W, C']`, on tiles of one size.
        x: numpy `[T, H, W, C]`; tile, overlap: in its pixels; scale: of the result's sides (1/8 or 8 for Wan's VAE).
    """
    H, W = x.shape[1:3]
    height, width = min(tile, H), min(tile, W)
    out = weights = None
    for top in tiles(H, tile, overlap):
        for left in tiles(W, tile, overlap):
            part = np.asarray(function(x[:, top : top + height, left : left + width]), np.float32)
            if out is None:
                out = np.zeros((part.shape[0], round(H * scale), round(W * scale), part.shape[-1]), np.float32)
                weights = np.zeros((*out.shape[1:3], 1), np.float32)
            rows, columns = part.shape[1:3]
            y, z = round(top * scale), round(left * scale)
            ramp = _ramp(rows, round(overlap * scale), top > 0, top + height < H)[:, None, None]
            ramp = ramp * _ramp(columns, round(overlap * scale), left > 0, left + width < W)[None, :, None]
            out[:, y : y + rows, z : z + columns] += ramp * part
            weights[y : y + rows, z : z + columns] += ramp
    return out / weights


def _ramp(length: int, overlap: int, before: bool, after: bool):
    """Weights that rise over an overlap at a side where another tile lies."""
    ramp = np.ones(length, np.float32)
    slope = (np.arange(min(overlap, length)) + 0.5) / max(overlap, 1)
    if before:
        ramp[: len(slope)] *= slope
    if after:
        ramp[length - len(slope) :] *= slope[::-1]
    return ramp
