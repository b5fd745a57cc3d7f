"""The video VAE: causal in time, one network for images and clips, the size of Wan's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close, random_params

from sorax.conv import conv_causal
from sorax.functional import init
from sorax.vae import VAE, VAEConfig

CONFIG = VAEConfig(base_width=4, width_multipliers=(1, 2, 2), num_res_blocks=1, latent_channels=3,
                   temporal_downsample=(True, True))  # fmt: skip
GRAPH, PARAMS = random_params(VAE, CONFIG)
T, H, W = 9, 8, 12  # latents: frame 0; 1 to 4; 5 to 8


@jax.jit
def encode(params, video):
    return jnp.concatenate(nnx.merge(GRAPH, params).encode(video), axis=-1)  # mean and log-variance


@jax.jit
def decode(params, z):
    return nnx.merge(GRAPH, params).decode(z)


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(0), (1, T, H, W, 3), minval=-1.0, maxval=1.0)


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(1), (1, *CONFIG.latent_shape(T, H, W), CONFIG.latent_channels))


@pytest.mark.parametrize("frame", [1, 4, 5, 8])
def test_a_frame_changes_no_latent_before_it(video, frame):
    before, after = encode(PARAMS, video), encode(PARAMS, video.at[:, frame].add(0.5))
    first = (frame + 3) // 4
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert np.abs(after - before)[:, first].max() > 1e-3


def test_no_gradient_reaches_a_latent_from_its_future(video):
    def total(video, weights):
        return jnp.sum(encode(PARAMS, video) * weights)

    gradient = jax.jit(jax.grad(total))
    shape = jax.eval_shape(encode, PARAMS, video).shape
    for latent, frames_seen in ((0, 1), (1, 5)):
        g = gradient(video, jnp.zeros(shape).at[:, latent].set(jax.random.normal(jax.random.key(2), shape[2:])))
        np.testing.assert_array_equal(g[:, frames_seen:], 0.0)
        assert np.all(np.abs(g[:, :frames_seen]).max(axis=(0, 2, 3, 4)) > 0)


@pytest.mark.parametrize("latent", [1, 2])
def test_a_latent_changes_no_frame_before_it(latents, latent):
    before, after = decode(PARAMS, latents), decode(PARAMS, latents.at[:, latent].add(1.0))
    first = 4 * (latent - 1) + 1
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert np.all(np.abs(after - before)[:, first : first + 4].max(axis=(0, 2, 3, 4)) > 1e-3)


def test_an_image_is_the_first_frame_of_a_clip(video, latents):
    assert_close(encode(PARAMS, video[:, :1]), encode(PARAMS, video)[:, :1])
    assert_close(decode(PARAMS, latents[:, :1]), decode(PARAMS, latents)[:, :1])


def test_a_shorter_clip_is_the_beginning_of_a_longer_one(video, latents):
    assert_close(encode(PARAMS, video[:, :5]), encode(PARAMS, video)[:, :2])
    assert_close(decode(PARAMS, latents[:, :2]), decode(PARAMS, latents)[:, :5])


@pytest.mark.parametrize("num_frames, kernel", [(5, (3, 3, 3)), (1, (3, 3, 3)), (2, (3, 1, 1)), (3, (1, 3, 3))])
def test_convolution_by_time_taps_is_the_3d_convolution(num_frames, kernel):
    """What CPUs run (sums of 2-D convolutions) and what accelerators run are one function, gradients included."""
    rng = np.random.default_rng(0)
    x, k, weights = (rng.standard_normal(shape).astype(np.float32)
                     for shape in ((2, num_frames, 6, 4, 3), (*kernel, 3, 5), (2, num_frames, 6, 4, 5)))  # fmt: skip

    def whole(x, k):
        padding = ((kernel[0] - 1, 0), (kernel[1] // 2,) * 2, (kernel[2] // 2,) * 2)
        names = ("NDHWC", "DHWIO", "NDHWC")
        return jax.lax.conv_general_dilated(x, k, (1, 1, 1), padding, dimension_numbers=names)

    def value_and_gradients(conv):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(conv(x, k) * weights), argnums=(0, 1)))(x, k)

    assert_close(jax.jit(conv_causal)(x, k), jax.jit(whole)(x, k))
    assert_close(value_and_gradients(conv_causal), value_and_gradients(whole), tolerance=1e-4)


def test_a_fresh_network_treats_every_frame_of_a_still_clip_as_an_image(video):
    """It starts as an inflated image network, so that what is learned from images holds for clips."""
    params = jax.jit(lambda: init(VAE, CONFIG, jax.random.key(0, impl="rbg")))()
    image = encode(params, video[:, :1])
    assert np.abs(image[..., : CONFIG.latent_channels]).max() > 0.1
    clip = encode(params, jnp.repeat(video[:, :1], T, axis=1))
    assert_close(clip, jnp.repeat(image, clip.shape[1], axis=1))
    z = image[..., : CONFIG.latent_channels]
    shown = decode(params, jnp.repeat(z, clip.shape[1], axis=1))
    assert_close(shown, jnp.repeat(decode(params, z), T, axis=1))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 8, 8, 3), r"4n \+ 1 frames, got 4"),
        ((1, 9, 8, 10, 3), "multiples of 4, got 8 x 10"),
        ((1, 9, 0, 8, 3), "multiples of 4, got 0 x 8"),
        ((1, 3, 9, 8, 8), r"channels last.*\(1, 3, 9, 8, 8\)"),
        ((9, 8, 8, 3), "channels last"),
    ],
)
def test_a_video_off_the_grid_is_refused_in_words(shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(encode, PARAMS, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("shape, dtype", [((1, 3, 2, 3, 4), "float32"), ((3, 2, 3, 3), "float32"),
                                          ((1, 3, 2, 3, 3), "uint8")])  # fmt: skip
def test_latents_of_another_form_are_refused_in_words(shape, dtype):
    with pytest.raises(ValueError, match=r"the VAE takes latents .*(\(channels last\), got \(|floats, got uint8)"):
        jax.eval_shape(decode, PARAMS, jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize("field, value", [("base_width", 0), ("latent_channels", -1), ("num_res_blocks", 0),
                                          ("pixel_patch", 1.5), ("width_multipliers", (1, 0, 4, 4))])  # fmt: skip
def test_a_size_of_nothing_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*whole numbers of at least 1"):
        VAEConfig(**{field: value})


def test_a_halving_without_its_temporal_flag_is_refused():
    with pytest.raises(ValueError, match="temporal_downsample needs one entry for each of the 3"):
        VAEConfig(temporal_downsample=(True, True))
