"""Videos of any length through the VAE in chunks, with memory that does not grow; frames of any size in tiles.

A stream gives the numbers of the whole clip (`sorax.vae.VAE.encode_chunk`). Tiles are an approximation: each sees its
own pixels only, and where tiles overlap their results are blended.

Legend: B batch, T frames, H height, W width, C channels; lower case t, h, w for latents.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from sorax import functional
from sorax.errors import UserError
from sorax.sharding import replicated, video_sharding
from sorax.vae import VAE, VAEConfig

CHUNK = 16  # frames that go through at a time, in the first chunk one more
BLEND_FRAMES = 16  # that are blended at a time, in float32


@functools.lru_cache(maxsize=16)
def programs(config: VAEConfig, place: NamedSharding | None = None):
    """Compiled (encode, decode) of a chunk, shared by all that hold parameters of this size.

    encode(params, video, frames, last): video `[B, T, H, W, 3]`, uint8 or float in [-1, 1] -> posteriors
    `[B, t, h, w, 2 C]` (means, then log-variances, not normalised) and what the next chunk needs (`frames`, None before
    the first chunk). decode(params, latents, frames, last): normalised latents -> uint8 video, and the same.
    Nothing is kept for a next chunk after the `last`: a whole clip is a first chunk that is the last.
    It is computed in the dtype of the parameters.
    """
    graphdef, _ = functional.abstract(VAE, config)

    def dtype(params):
        return params["encoder"]["conv_in"]["kernel"].dtype

    def encode(params, video, frames, last):
        if video.dtype == jnp.uint8:
            video = video.astype(jnp.float32) / 127.5 - 1.0
        mean, logvar, frames = nnx.merge(graphdef, params).encode_chunk(video.astype(dtype(params)), frames)
        return jnp.concatenate([mean, logvar], axis=-1).astype(jnp.float32), None if last else frames

    def decode(params, latents, frames, last):
        vae = nnx.merge(graphdef, params)
        video, frames = vae.decode_chunk(vae.denormalize(latents).astype(dtype(params)), frames)
        video = video.astype(jnp.float32)
        return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8), None if last else frames

    options = dict(static_argnums=3, donate_argnums=2, out_shardings=place)
    return jax.jit(encode, **options), jax.jit(decode, **options)


def normalize(config: VAEConfig, params, moments):
    """Normalised latents `[..., C]` of posteriors `[..., 2 C]`, in numpy: their means."""
    mean, std = (np.asarray(params[name], np.float32) for name in ("latents_mean", "latents_std"))
    return (moments[..., : config.latent_channels] - mean) / std


def check_frames(config: VAEConfig, video):
    """Raises UserError unless video `[T, H, W, 3]` is uint8, or float in [-1, 1], and fits the VAE's grid in space."""
    shape, dtype = video.shape, video.dtype
    if len(shape) != 4 or shape[-1] != 3:
        raise UserError(f"a video is [T, H, W, 3], this one is {list(shape)}: {_shape_hint(shape)}")
    if dtype != np.uint8:
        if not jnp.issubdtype(dtype, jnp.floating):  # numpy does not count bfloat16
            raise UserError(f"a video holds uint8 (0 to 255) or floats in [-1, 1], this one {dtype}: "
                            "convert it with .astype('uint8')")  # fmt: skip
        _check_values(video, "a video")
        if shape[0] and (most := float(np.abs(video).max())) > 1.001:  # a resampling filter may overshoot
            hint = "pass uint8, or divide by 127.5 and subtract 1" if most > 2 else "clip them"
            raise UserError(f"a video of floats holds values in [-1, 1], this one up to {most:.4g}: {hint}")
    try:
        config.latent_shape(1, *shape[1:3])
    except ValueError as error:
        raise UserError(f"{error}: crop or scale it") from error


def _shape_hint(shape):
    """What to do with an array of this shape, which is not [T, H, W, 3], to make a video of it."""
    if len(shape) == 5:
        return "pass a list of videos"
    if len(shape) == 3 and shape[-1] == 3:
        return "pass a frame as video[None], and several videos as a list"
    if len(shape) == 4 and 3 in shape:
        return f"move axis {shape.index(3)} to the end"
    return "pass RGB frames, channels last" if len(shape) in (3, 4) else "pass a list of arrays"


def check_video(config: VAEConfig, video):
    """`check_frames` of a whole video: also raises UserError unless it has 4n + 1 frames."""
    check_frames(config, video)
    stride, frames = config.temporal_stride, len(video)
    if frames < 1 or (frames - 1) % stride:
        near = f"cut it to {frames - (frames - 1) % stride}" if frames else "there is nothing in it"
        raise UserError(f"the VAE takes {stride}n + 1 frames, got {frames}: {near}")


def check_latents(config: VAEConfig, latents):
    """Raises UserError unless latents are finite floats `[t, h, w, C]` with the VAE's C."""
    shape, dtype, channels = latents.shape, latents.dtype, config.latent_channels
    if len(shape) != 4 or shape[-1] != channels or 0 in shape[1:]:
        raise UserError(f"latents of this VAE are [t, h, w, {channels}] (channels last), these are {list(shape)}: "
                        "pass those of each video as its encoding returned them")  # fmt: skip
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"latents are floats, these are {dtype}: pass what encoding returned")
    _check_values(latents, "latents")


def _check_values(array, what):
    bad = ~np.isfinite(np.asarray(array))
    if count := np.count_nonzero(bad):
        first = np.unravel_index(np.argmax(bad), bad.shape)
        raise UserError(f"{what}: {count} of {array.size} values are NaN or infinite, the first at "
                        f"{[int(i) for i in first]}: look at where they were made")  # fmt: skip


class _Stream:
    """Buffers items until a chunk is full, and runs it with what the chunk before left.

    One program for the first chunk (a frame longer) and one for all others: the last chunk is filled up with copies of
    the last frame, which nothing before them sees.
    """

    def __init__(self, config, params, chunk, mesh):
        stride = config.temporal_stride
        if chunk < stride or chunk % stride:
            raise UserError(f"a stream's chunk of {chunk} frames: use a multiple of the temporal stride {stride}")
        self._config, self._mesh, self._stride = config, mesh, stride
        self._params = jax.device_put(params, None if mesh is None else replicated(mesh))
        self._frames, self._waiting, self._shape, self._done = None, [], None, False

    def push(self, items):
        """Takes the next items `[n, ...]`, n >= 0; returns what is final now, a list of arrays `[k, ...]`.

        Raises:
            UserError: they are not what the VAE takes, or of another shape or dtype than those before.
        """
        if self._done:
            raise UserError("this stream is finished: start another one for another video")
        items = np.asarray(items)
        self._check(items)
        shape = items.shape[1:], items.dtype
        self._shape = self._shape or shape
        if shape != self._shape:
            raise UserError(f"a stream began with frames of {self._shape}, now {shape}: start another stream for them")
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
        items, place = np.stack(items)[None], None
        if self._mesh is not None:
            place = video_sharding(self._mesh, *self._latent_size(*items.shape[2:4]), whole_batch=True)
            items = jax.device_put(items, place)
        program = programs(self._config, place)[self._which]
        result, self._frames = program(self._params, items, self._frames, False)
        return self._finished(np.asarray(result)[0])

    def _run_rest(self):
        full = self._waiting + [self._waiting[-1]] * (self._size() - len(self._waiting))
        self._waiting = []
        return self._run(full)


class EncodeStream(_Stream):
    """Frames of one video -> normalised latents, as they become final.

        stream = EncodeStream(config, params)
        for frames in pieces:                # uint8 [n, H, W, 3] (or float in [-1, 1]), any n
            latents += stream.push(frames)   # float32 [t, h, w, C] each
        latents += stream.finish()

    Args:
        chunk: frames that go through at a time, a multiple of the temporal stride: memory grows with it.
        mesh: of devices that share the work, as `sorax.sharding.video_sharding` says.
    """

    _which = 0

    def __init__(self, config: VAEConfig, params, chunk: int = CHUNK, mesh: Mesh | None = None):
        super().__init__(config, params, chunk, mesh)
        self._first, self._later = chunk + 1, chunk
        self._mean, self._std = (np.asarray(params[name]) for name in ("latents_mean", "latents_std"))

    def finish(self):
        """The latents of the frames that still wait. Raises UserError unless the video had 4n + 1 frames.

        4 is the temporal stride of Wan's VAEs; others have their own.
        """
        count, first = len(self._waiting), self._frames is None
        if not count:
            self._done = True
            return []
        over = (count - first) % self._stride
        if over:
            raise UserError(f"a video of {self._stride}n + 1 frames was expected, {over} were left over: "
                            "cut or repeat frames at the end")  # fmt: skip
        self._done = True
        return [self._run_rest()[: first + (count - first) // self._stride]]

    def _check(self, items):
        check_frames(self._config, items)

    def _latent_size(self, height, width):
        return self._config.latent_shape(1, height, width)[1:]

    def _finished(self, moments):
        return normalize(self._config, dict(latents_mean=self._mean, latents_std=self._std), moments)


class DecodeStream(_Stream):
    """Normalised latents of one video -> uint8 frames, as they become final; used like `EncodeStream`.

    first: latents of the first chunk, of which there is one more unless told otherwise.
    """

    _which = 1

    def __init__(self, config: VAEConfig, params, chunk: int = CHUNK, mesh: Mesh | None = None, first: int = 0):
        super().__init__(config, params, chunk, mesh)
        self._first, self._later = first or chunk // self._stride + 1, chunk // self._stride

    def finish(self):
        """The frames of the latents that still wait."""
        self._done = True
        count, first = len(self._waiting), self._frames is None
        if not count:
            return []
        return [self._run_rest()[: count * self._stride - first * (self._stride - 1)]]

    def _check(self, items):
        check_latents(self._config, items)

    def _latent_size(self, height, width):
        return height, width

    def _finished(self, video):
        return video


def in_chunks(program, params, items, first: int, later: int, put=np.asarray) -> list:
    """Results `[B, k, ...]` of items `[B, n, ...]` that are all there: whole if n <= first, else chunk by chunk.

    The last chunk is filled up with copies of the last item: the results together may be longer than asked for.

    Args:
        program: of `programs`; put: array -> what is passed to it, on the devices that are to run it.
    """
    n = items.shape[1]
    if n <= first:
        return [program(params, put(items), None, True)[0]]
    bounds = [0, *range(first, n, later), n]
    results, frames = [], None
    for start, end in itertools.pairwise(bounds):
        chunk, size = items[:, start:end], later if start else first
        chunk = np.concatenate([chunk, np.repeat(chunk[:, -1:], size - (end - start), axis=1)], axis=1)
        result, frames = program(params, put(chunk), frames, False)
        results.append(result)
    return results


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


def tiled(function, x, *, tile: int, overlap: int, unit_in: int, unit_out: int):
    """What function makes of x, from overlapping spatial tiles whose results are blended linearly.

    Args:
        function: list of tiles `[T, H, W, C]` of one shape -> list of results `[T', H', W', C']`.
        x: numpy `[T, H, W, C]`.
        tile, overlap: in latent pixels, which are unit_in pixels of x and unit_out of the result (8 and 1 to encode
            with Wan's VAE, 1 and 8 to decode).

    Returns:
        the result, of the dtype of the results.
    """
    rows, columns = (side // unit_in for side in x.shape[1:3])
    height, width = min(tile, rows), min(tile, columns)
    tops, lefts = tiles(rows, tile, overlap), tiles(columns, tile, overlap)
    places = list(itertools.product(range(len(tops)), range(len(lefts))))

    def window(array, top, left, unit):
        return array[:, top * unit : (top + height) * unit, left * unit : (left + width) * unit]

    parts = function([window(x, tops[i], lefts[j], unit_in) for i, j in places])
    down, across = (_weights(*sides, unit_out) for sides in ((rows, height, tops), (columns, width, lefts)))
    T, _, _, channels = parts[0].shape
    out = np.empty((T, rows * unit_out, columns * unit_out, channels), parts[0].dtype)
    for start in range(0, T, BLEND_FRAMES):
        some = slice(start, start + BLEND_FRAMES)
        total = np.zeros(out[some].shape, np.float32)
        for part, (i, j) in zip(parts, places):
            weight = (down[i][:, None] * across[j])[..., None]
            window(total, tops[i], lefts[j], unit_out)[...] += weight * part[some]
        out[some] = np.rint(total) if out.dtype == np.uint8 else total
    return out


def _weights(length: int, size: int, starts, unit: int):
    """Weights float32 `[size * unit]` of each tile along a side: they rise where tiles overlap, and add up to 1."""
    ramps, total = [], np.zeros(length * unit)
    for k, start in enumerate(starts):
        x = np.arange(size * unit) + 0.5
        ramp = np.ones(size * unit)
        if k:
            ramp = np.minimum(ramp, x / ((starts[k - 1] + size - start) * unit or 1))
        if k + 1 < len(starts):
            ramp = np.minimum(ramp, x[::-1] / ((start + size - starts[k + 1]) * unit or 1))
        total[start * unit : (start + size) * unit] += ramp
        ramps.append(ramp)
    return [(r / total[s * unit : (s + size) * unit]).astype(np.float32) for r, s in zip(ramps, starts)]
