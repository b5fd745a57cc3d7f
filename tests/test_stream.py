"""Streams give the numbers of the whole clip, whatever the pieces; tiles come close."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_params import assert_close, random_params

from sorax.errors import UserError
from sorax.stream import DecodeStream, EncodeStream, tiled, tiles
from sorax.vae import VAE, VAEConfig

CONFIGS = {
    "first": VAEConfig(4, (1, 2, 2), 1, 3, (True, True)),
    "second": VAEConfig(4, (1, 2, 2), 1, 3, (True, True), pixel_patch=2, decoder_base_width=8, shortcuts=True),
}
NETWORKS = {name: random_params(VAE, config) for name, config in CONFIGS.items()}
T, H, W = 17, 8, 16
RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (T, H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=CONFIGS)
def network(request):
    """(config, params, whole-clip encode, whole-clip decode) on normalised latents and uint8 videos."""
    config, (graphdef, params) = CONFIGS[request.param], NETWORKS[request.param]

    @jax.jit
    def encode(video):
        vae = nnx.merge(graphdef, params)
        return vae.normalize(vae.encode(video.astype(jnp.float32)[None] / 127.5 - 1.0)[0])[0]

    @jax.jit
    def decode(latents):
        vae = nnx.merge(graphdef, params)
        return vae.decode(vae.denormalize(latents[None]))[0]

    return config, params, encode, decode


def pieces(array, cuts):
    return np.split(array, sorted(cuts))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_of_any_legal_length_equal_the_whole_clip(name):
    """At the level of the module, in float32, with posterior variances: no rounding to bytes in between."""
    graphdef, params = NETWORKS[name]
    encode_chunk = jax.jit(lambda video, frames: nnx.merge(graphdef, params).encode_chunk(video, frames))
    decode_chunk = jax.jit(lambda z, frames: nnx.merge(graphdef, params).decode_chunk(z, frames))
    video = jax.random.uniform(jax.random.key(0), (2, T, H, W, 3), minval=-1.0)
    whole = jax.jit(lambda video: nnx.merge(graphdef, params).encode(video))(video)
    for lengths in ((1, 4, 4, 8), (5, 8, 4)):
        frames, parts, start = None, [], 0
        for length in lengths:
            mean, logvar, frames = encode_chunk(video[:, start : start + length], frames)
            parts.append((mean, logvar))
            start += length
        assert_close([jnp.concatenate(x, axis=1) for x in zip(*parts)], list(whole))
    z = whole[0]
    shown = jax.jit(lambda z: nnx.merge(graphdef, params).decode(z))(z)
    for lengths in ((1, 1, 1, 2), (2, 3)):
        frames, parts, start = None, [], 0
        for length in lengths:
            part, frames = decode_chunk(z[:, start : start + length], frames)
            parts.append(part)
            start += length
        assert_close(jnp.concatenate(parts, axis=1), shown)


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, T), max_size=5), chunk=st.sampled_from([4, 8]))
def test_streams_equal_the_whole_clip_whatever_the_pieces(network, cuts, chunk):
    config, params, encode, decode = network
    stream = EncodeStream(config, params, chunk)
    parts = [part for piece in pieces(VIDEO, cuts) for part in stream.push(piece)] + stream.finish()
    latents = np.concatenate(parts)
    assert_close(latents, encode(VIDEO))
    stream = DecodeStream(config, params, chunk)
    parts = [p for piece in pieces(latents, [min(c, 5) for c in cuts]) for p in stream.push(piece)] + stream.finish()
    shown = np.concatenate(parts)
    wanted = (np.clip(decode(latents), -1, 1) + 1) * 127.5
    assert shown.shape == VIDEO.shape and np.abs(shown - wanted).max() <= 0.5 + 1e-2  # rounded to bytes


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_stream_of_few_frames_is_their_clip(network, frames):
    config, params, encode, _ = network
    stream = EncodeStream(config, params, 8)
    assert_close(np.concatenate(stream.push(VIDEO[:frames]) + stream.finish()), encode(VIDEO[:frames]))


def test_what_a_chunk_leaves_does_not_grow_with_its_length():
    graphdef, params = NETWORKS["second"]

    def left(frames):
        video = jax.ShapeDtypeStruct((1, frames, H, W, 3), jnp.float32)
        return jax.eval_shape(lambda v: nnx.merge(graphdef, params).encode_chunk(v)[2], video)

    assert left(5) == left(9) == left(17)


def test_frames_left_over_at_the_end_are_an_error(network):
    config, params, _, _ = network
    stream = EncodeStream(config, params, 4)
    stream.push(VIDEO[:7])
    with pytest.raises(UserError, match=r"4n \+ 1 frames was expected, 2 were left over"):
        stream.finish()
    with pytest.raises(UserError, match="a multiple of the temporal stride 4"):
        EncodeStream(config, params, 6)


@given(length=st.integers(1, 300), tile=st.integers(2, 80), overlap=st.integers(0, 79))
def test_tiles_cover_everything_and_overlap(length, tile, overlap):
    overlap = min(overlap, tile - 1)
    starts = tiles(length, tile, overlap)
    assert starts[0] == 0 and (starts[-1] + tile >= length)
    assert all(b + overlap <= a + tile and b > a for a, b in zip(starts, starts[1:]))
    assert length <= tile or starts[-1] + tile == length


def test_tiles_of_a_local_function_are_exact():
    x = RNG.normal(size=(2, 20, 28, 3)).astype(np.float32)
    np.testing.assert_allclose(tiled(lambda v: 2 * v, x, tile=8, overlap=3, scale=1), 2 * x, rtol=1e-5, atol=1e-6)
    up = tiled(lambda v: np.repeat(np.repeat(v, 2, 1), 2, 2), x, tile=12, overlap=4, scale=2)
    np.testing.assert_allclose(up, np.repeat(np.repeat(x, 2, 1), 2, 2), rtol=1e-5, atol=1e-6)
