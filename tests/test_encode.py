"""The codec: what a video's latents are scaled by."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_params import random_params

from sorax.encode import Codec
from sorax.vae import VAE, VAEConfig

CONFIG = VAEConfig(base_width=4, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=3,
                   temporal_downsample=(True,))  # fmt: skip
GRAPH, PARAMS = random_params(VAE, CONFIG)


def videos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for shape in ((5, 8, 8, 3), (1, 8, 12, 3), (5, 8, 8, 3))]


def test_statistics_are_those_of_latents_drawn_from_the_posterior():
    mean, std = Codec(CONFIG, PARAMS).statistics(videos())
    encode = jax.jit(lambda video: nnx.merge(GRAPH, PARAMS).encode(video))
    draws = []
    for i, video in enumerate(videos()):
        m, logvar = encode(jnp.asarray(video, jnp.float32)[None] / 127.5 - 1.0)
        noise = jax.random.normal(jax.random.key(i), (500, *m.shape[1:]))
        draws.append(np.asarray(m + jnp.exp(0.5 * logvar) * noise).reshape(-1, 3))
    draws = np.concatenate(draws)
    np.testing.assert_allclose(mean, draws.mean(0), atol=0.02 * draws.std())
    np.testing.assert_allclose(std, draws.std(0), rtol=0.02)


def test_a_channel_that_the_vae_leaves_unused_is_not_scaled_up():
    quant = jax.tree.map(jnp.copy, PARAMS["quant_conv"])
    # Channel 1: means of a thousandth, draws of variance 1.
    kernel = quant["kernel"].at[..., 1].multiply(1e-3).at[..., 4].set(0.0)
    bias = quant["bias"].at[jnp.array([1, 4])].set(0.0)
    params = dict(PARAMS, quant_conv=dict(kernel=kernel, bias=bias))
    mean, std = Codec(CONFIG, params).statistics(videos())
    np.testing.assert_allclose(std[1], 1.0, atol=1e-2)
    latents = Codec(CONFIG, dict(params, latents_mean=mean, latents_std=std)).encode(videos())
    assert all(np.abs(z[..., 1]).max() < 0.05 for z in latents)
