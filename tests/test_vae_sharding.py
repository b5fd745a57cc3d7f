"""A VAE over a mesh gives the numbers of one device, exchanges edges alone, and needs that much less memory of each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close, random_params

from sorax import encode, sharding
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.stream import DecodeStream, EncodeStream, programs
from sorax.vae import VAE, VAEConfig

CONFIGS = {
    "first": VAEConfig(4, (1, 2, 1), 1, 3, (True, True)),
    "second": VAEConfig(4, (1, 2, 2), 1, 3, (True, True), pixel_patch=2, decoder_base_width=8, shortcuts=True),
}
NETWORKS = {name: random_params(VAE, config) for name, config in CONFIGS.items()}
each_generation = pytest.mark.parametrize("name", CONFIGS)


def clips(name, count, frames, rows, columns):
    """Videos of rows x columns latent pixels."""
    rng, side = np.random.default_rng(0), CONFIGS[name].spatial_stride
    return list(rng.integers(0, 256, (count, frames, rows * side, columns * side, 3), np.uint8))


def assert_same(name, videos, mesh, bound):
    """Codecs with and without a mesh agree: to 1e-5 of the largest latent, and to a level of a byte."""
    config, params = CONFIGS[name], NETWORKS[name][1]
    one, split = Codec(config, params), Codec(config, params, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PIXELS_A_BATCH", bound)
        latents, shown = split.encode(videos), split.decode(one.encode(videos))
    expected = one.encode(videos)
    assert_close(latents, expected)
    differences = np.abs(np.int16(shown) - np.int16(one.decode(expected)))
    assert differences.max() <= 1 and differences.mean() < 1e-3


@each_generation
def test_whole_clips_on_eight_devices_equal_one(name):
    """The height over 4 devices, and three videos over 2."""
    mesh = sharding.make_mesh(data=1, fsdp=2, context=4)
    assert_same(name, clips(name, 3, 5, 4, 3), mesh, encode.PIXELS_A_BATCH)


@each_generation
def test_chunks_on_eight_devices_equal_one(name):
    """Rows that do not divide: it is the width that is split."""
    mesh = sharding.make_mesh(data=1, context=8)
    assert_same(name, clips(name, 1, 13, 3, 8), mesh, 1)


@each_generation
def test_videos_decoded_on_eight_devices_equal_one_before_they_are_rounded(name):
    """To 1e-5 of the largest value: bytes, which the codec returns, would hide more."""
    (graphdef, params), mesh = NETWORKS[name], sharding.make_mesh(data=1, context=8)
    place = sharding.video_sharding(mesh, 8, 3, whole_batch=True)
    z = np.random.default_rng(1).standard_normal((1, 3, 8, 3, 3)).astype(np.float32)

    def decode(params, z):
        return nnx.merge(graphdef, params).decode(z)

    params_there = jax.device_put(params, sharding.replicated(mesh))
    split = jax.jit(decode, out_shardings=place)(params_there, jax.device_put(z, place))
    assert len({str(shard.index) for shard in split.addressable_shards}) == 8  # none has all
    assert_close(split, jax.jit(decode)(params, z))


def test_streams_on_eight_devices_equal_one():
    config, params = CONFIGS["second"], NETWORKS["second"][1]
    mesh, video = sharding.make_mesh(data=2, context=4), clips("second", 1, 9, 4, 2)[0]
    latents = Codec(config, params).encode([video])[0]
    stream = EncodeStream(config, params, 4, mesh)
    assert_close(np.concatenate(stream.push(video) + stream.finish()), latents)
    stream = DecodeStream(config, params, 4, mesh)
    shown = np.concatenate(stream.push(latents) + stream.finish())
    assert np.abs(np.int16(shown) - np.int16(Codec(config, params).decode([latents])[0])).max() <= 1


def compiled(name, way, mesh, rows, columns):
    """The program for a chunk of 2 latent frames behind another chunk."""
    config, side = CONFIGS[name], CONFIGS[name].spatial_stride
    place = None if mesh is None else sharding.video_sharding(mesh, rows, columns, whole_batch=True)
    whole = None if mesh is None else sharding.replicated(mesh)
    program = programs(config, place)[way]

    def struct(shape):
        return jax.ShapeDtypeStruct(shape, (jnp.uint8, jnp.float32)[way], sharding=place)

    def shape(frames):
        return ((1, frames, rows * side, columns * side, 3), (1, 1 + frames // 4, rows, columns, 3))[way]

    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), NETWORKS[name][1])
    _, frames = program.eval_shape(params, struct(shape(5)), None, False)
    frames = jax.tree.map(lambda f: jax.ShapeDtypeStruct(f.shape, f.dtype, sharding=place), frames)
    return program.lower(params, struct(shape((8, 4)[way])), frames, False).compile()


def communicated(text, operation):
    """Numbers of elements of the results of an operation in HLO."""
    shapes = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* {operation}(?:-start)?\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


@pytest.mark.parametrize("way", [encode.ENCODE, encode.DECODE], ids=["encode", "decode"])
@pytest.mark.parametrize("name, rows, columns", [("first", 16, 15), ("second", 15, 16)], ids=["height", "width"])
def test_devices_exchange_edges_alone_and_need_little_memory(name, way, rows, columns):
    """Only attention, at the lowest resolution, gathers; each of 8 devices needs at most a fifth of one's memory."""
    split = compiled(name, way, sharding.make_mesh(data=1, context=8), rows, columns)
    text, config = split.as_text(), CONFIGS[name]
    assert len(communicated(text, "collective-permute")) > 10
    # Keys and values of 2 frames: what attention looks at.
    width = max(config.stages(way == encode.DECODE)[0 if way else -1][:2])
    assert all(n <= 2 * rows * columns * width for n in communicated(text, "all-gather"))
    for operation in ("all-to-all", "all-reduce", "reduce-scatter"):
        assert not communicated(text, operation), operation
    one = compiled(name, way, None, rows, columns)
    assert split.memory_analysis().temp_size_in_bytes < one.memory_analysis().temp_size_in_bytes / 5


def test_sizes_that_do_not_divide_are_refused():
    codec = Codec(CONFIGS["first"], NETWORKS["first"][1], sharding.make_mesh(data=1, context=8))
    with pytest.raises(UserError, match=r"3 x 5 .* cannot be split over 8 devices: .*context.* or crop"):
        codec.encode(clips("first", 1, 1, 3, 5))
