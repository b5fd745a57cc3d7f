"""Streams give the numbers of the whole clip, whatever the chunks and the pieces they come in; tiles come close."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_params import assert_close, random_params

from sorax.errors import UserError
from sorax.stream import DecodeStream, EncodeStream, normalize, programs, tiled, tiles
from sorax.vae import VAE, VAEConfig

CONFIGS = {  # temporal strides 4 and 2
    "first": VAEConfig(4, (1, 2, 1), 1, 3, (True, True)),
    "second": VAEConfig(4, (2, 1), 1, 3, (True,), pixel_patch=2, decoder_base_width=8, shortcuts=True),
}
NETWORKS = {name: random_params(VAE, config) for name, config in CONFIGS.items()}
t, H, W = 5, 8, 16
RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (17, H, W, 3), dtype=np.uint8)
# Chunks in latent frames. Few lengths, in any order: every length is a program.
ENCODED = [(2, 1, 2), (2, 2, 1), (2, 1, 1, 1)]
DECODED = [(1, 2, 2), (1, 1, 1, 2), (1, 1, 2, 1), (1, 2, 1, 1), (1, 1, 1, 1, 1)]
each_generation = pytest.mark.parametrize("name", CONFIGS)


def num_frames(name, latents=t):
    return 1 + (latents - 1) * CONFIGS[name].temporal_stride


@functools.cache
def compiled(name, method):
    """Compiled method of a VAE: (array, ...) -> its result."""
    graphdef, params = NETWORKS[name]
    return jax.jit(lambda *arguments: getattr(nnx.merge(graphdef, params), method)(*arguments))


@functools.cache
def whole(name):
    """Moments of the whole clip, its latents, and the video of its means."""
    video = VIDEO[: num_frames(name)][None].astype(np.float32) / 127.5 - 1
    moments = np.concatenate(compiled(name, "encode")(video), axis=-1)
    shown = compiled(name, "decode")(moments[..., :3])
    return moments[0], normalize(CONFIGS[name], NETWORKS[name][1], moments)[0], np.asarray(shown)[0]


def encode_in_chunks(name, lengths):
    encode, frames, parts, start = programs(CONFIGS[name])[0], None, [], 0
    for end in np.cumsum(lengths):
        end = num_frames(name, end)
        moments, frames = encode(NETWORKS[name][1], VIDEO[None, start:end], frames, False)
        parts.append(np.asarray(moments)[0])
        start = end
    return np.concatenate(parts)


def decode_in_chunks(name, z, lengths):
    """In floats, for which `programs` has none."""
    frames, parts = None, []
    for chunk in np.split(z, np.cumsum(lengths)[:-1]):
        video, frames = compiled(name, "decode_chunk")(chunk[None], frames)
        parts.append(np.asarray(video)[0])
    return np.concatenate(parts)


@each_generation
@settings(max_examples=5, deadline=None)
@given(frames=st.sampled_from(ENCODED), latents=st.sampled_from(DECODED))
def test_chunks_equal_the_whole_clip(name, frames, latents):
    """Means, log-variances and videos that are not rounded to bytes, in float32."""
    moments, _, video = whole(name)
    assert_close(encode_in_chunks(name, frames), moments)
    assert_close(decode_in_chunks(name, moments[..., :3], latents), video)


@each_generation
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 17), max_size=6), count=st.integers(1, t))
def test_streams_equal_the_whole_clip_whatever_the_pieces(name, cuts, count):
    """A shorter clip, of `count` latent frames, is the beginning of a longer one."""
    _, latents, video = whole(name)
    config, params, frames = CONFIGS[name], NETWORKS[name][1], num_frames(name, count)
    stream, cuts = EncodeStream(config, params, config.temporal_stride), sorted(min(cut, frames) for cut in cuts)
    parts = [part for piece in np.split(VIDEO[:frames], cuts) for part in stream.push(piece)] + stream.finish()
    assert_close(np.concatenate(parts), latents[:count])
    stream, cuts = DecodeStream(config, params, config.temporal_stride), [min(cut, count) for cut in cuts]
    parts = [part for piece in np.split(latents[:count], cuts) for part in stream.push(piece)] + stream.finish()
    shown, wanted = np.concatenate(parts), (np.clip(video[:frames], -1, 1) + 1) * 127.5
    assert shown.shape == wanted.shape and np.abs(shown - wanted).max() <= 0.5 + 1e-2  # rounded to bytes


@each_generation
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("last", [False, True], ids=["first-of-group", "last-of-group"])
def test_a_changed_frame_leaves_all_latents_before_its_group_bit_identical(name, group, last):
    """In the whole clip, and in a stream."""
    config, params, stride = CONFIGS[name], NETWORKS[name][1], CONFIGS[name].temporal_stride
    video = VIDEO[: num_frames(name)]
    changed = video.copy()
    changed[num_frames(name, group + 1) - 1 if last else num_frames(name, group)] += 77

    def at_once(video):
        return compiled(name, "encode")(video[None].astype(np.float32) / 127.5 - 1)[0][0]

    def streamed(video):
        stream = EncodeStream(config, params, stride)
        return np.concatenate(stream.push(video) + stream.finish())

    for encode in (at_once, streamed):
        before, after = np.asarray(encode(video)), np.asarray(encode(changed))
        np.testing.assert_array_equal(after[:group], before[:group])
        assert np.abs(after[group] - before[group]).max() > 1e-3


def test_what_a_chunk_leaves_does_not_grow_with_its_length():
    graphdef, params = NETWORKS["second"]

    def left(frames):
        video = jax.ShapeDtypeStruct((1, frames, H, W, 3), jnp.float32)
        return jax.eval_shape(lambda v: nnx.merge(graphdef, params).encode_chunk(v)[2], video)

    assert left(1) == left(5) == left(17)


def test_a_stream_refuses_what_the_vae_does_not_take():
    config, params = CONFIGS["first"], NETWORKS["first"][1]
    stream = EncodeStream(config, params, 8)
    stream.push(VIDEO[:7])
    with pytest.raises(UserError, match=r"4n \+ 1 frames was expected, 2 were left over: cut or repeat"):
        stream.finish()
    with pytest.raises(UserError, match="start another stream"):
        stream.push(VIDEO[:1, :, :8])
    with pytest.raises(UserError, match="NaN"):
        DecodeStream(config, params).push(np.full((1, 2, 2, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="a multiple of the temporal stride 4"):
        EncodeStream(config, params, 6)
    latents = np.zeros((1, 2, 2, 3), np.float32)
    for stream, items in ((EncodeStream(config, params), VIDEO[:1]), (DecodeStream(config, params), latents)):
        assert stream.finish() == []
        with pytest.raises(UserError, match="this stream is finished"):
            stream.push(items)


@given(length=st.integers(1, 300), tile=st.integers(2, 80), overlap=st.integers(0, 79))
def test_tiles_cover_everything_and_overlap(length, tile, overlap):
    overlap = min(overlap, tile - 1)
    starts = tiles(length, tile, overlap)
    assert starts[0] == 0 and (starts[-1] + tile >= length)
    assert all(b + overlap <= a + tile and b > a for a, b in zip(starts, starts[1:]))
    assert length <= tile or starts[-1] + tile == length


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), tile=st.integers(2, 8), overlap=st.integers(0, 7))
def test_tiles_of_a_local_function_are_exact(rows, columns, tile, overlap):
    grid = dict(tile=tile, overlap=min(overlap, tile - 1))
    x = RNG.normal(size=(3, rows, columns, 2)).astype(np.float32)
    up = np.repeat(np.repeat(x, 2, 1), 2, 2)

    def enlarged(parts):
        return [np.repeat(np.repeat(part, 2, 1), 2, 2) for part in parts]

    assert_close(tiled(enlarged, x, **grid, unit_in=1, unit_out=2), up, 1e-6)
    assert_close(tiled(lambda parts: [part[:, ::2, ::2] for part in parts], up, **grid, unit_in=2, unit_out=1), x, 1e-6)
    shown = np.uint8(100 + 50 * np.tanh(up))
    np.testing.assert_array_equal(tiled(lambda parts: parts, shown, **grid, unit_in=2, unit_out=2), shown)


def test_tiles_are_blended_where_they_overlap():
    """Two tiles that disagree: the result leads from the one to the other in a straight line, over the overlap."""
    values = iter((0.0, 1.0))
    out = tiled(lambda parts: [np.full_like(part, next(values)) for part in parts], np.zeros((1, 4, 12, 1), np.float32),
                tile=8, overlap=4, unit_in=1, unit_out=1)  # fmt: skip
    np.testing.assert_allclose(out[0, 0, :, 0], [0] * 4 + [0.125, 0.375, 0.625, 0.875] + [1] * 4, atol=1e-6)
