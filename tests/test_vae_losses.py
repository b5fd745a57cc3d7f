"""Terms of the VAE's loss: what they are of, and that two networks learn from one scalar."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from random_params import random_params

from sorax import functional, objectives, sharding
from sorax.discriminator import Discriminator, DiscriminatorConfig, adaptive_weight, discriminator_loss, generator_loss
from sorax.errors import UserError
from sorax.inflate import inflate
from sorax.vae import VAE, VAEConfig
from sorax.vae_losses import haar_details, kl_divergence, laplacian_pyramid, multiscale_error, wavelet_error
from sorax.vae_objective import _make_loss, _perceptual, vae_objective

MODEL = VAEConfig(base_width=4, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=3,
                  temporal_downsample=(True,), pixel_patch=2)  # fmt: skip
CRITIC = DiscriminatorConfig(base_width=8, num_layers=2)
SHAPE = (2, 5, 16, 16, 3)


def videos(seed=0, shape=SHAPE):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0)


NETWORKS = dict(vae=(VAE, MODEL), discriminator=(Discriminator, CRITIC))
WEIGHTS = objectives.VAELossConfig(l1=1.0, l2=0.5, kl=1e-3, multiscale=0.3, wavelet=0.2, adversarial=0.7,
                                   adversarial_start=3)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return {name: random_params(*network)[1] for name, network in NETWORKS.items()}


@pytest.fixture(scope="module")
def gradients(params):
    """(step, names of networks) -> (gradients of the loss, its sums)."""
    batch = dict(video=np.asarray((videos() + 1) * 127.5, np.uint8))
    key = jax.random.key(5)

    @functools.cache
    def program(names):
        loss = _make_loss({name: NETWORKS[name] for name in names}, WEIGHTS, None, jnp.float32, False)

        def total(params, step):
            sums = loss(params, batch, key, step, {})
            return sums["loss"][0] / sums["loss"][1], sums

        return jax.jit(jax.grad(total, has_aux=True))

    @functools.cache
    def run(step, *names):
        return program(names)({name: params[name] for name in names}, jnp.int32(step))

    run.video, run.noise_key = batch["video"].astype(jnp.float32) / 127.5 - 1.0, jax.random.split(key)[0]
    return run


def assert_trees_close(a, b, rtol=2e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5 * scale), a, b)


def test_both_networks_get_the_gradients_of_their_own_losses(gradients, params):
    """One scalar, one way back: as if each loss were differentiated by itself, with the adaptive weight held fixed."""
    both, sums = gradients(3, "vae", "discriminator")
    video, graphs = gradients.video, {name: functional.abstract(*network)[0] for name, network in NETWORKS.items()}
    ratio = sums["adversarial_weight"][0] / sums["adversarial_weight"][1]
    assert ratio > 0

    def fidelity(copy):
        error = copy - video
        return (jnp.mean(jnp.abs(error)) + 0.5 * jnp.mean(error**2) + 0.3 * multiscale_error(error)
                + 0.2 * wavelet_error(error))  # fmt: skip

    def critic(p, x):
        return nnx.merge(graphs["discriminator"], p)(x)

    def of_vae(p):
        """Terms of the VAE's loss."""
        vae = nnx.merge(graphs["vae"], p)
        mean, logvar = vae.encode(video)
        copy = vae.decode(mean + jnp.exp(0.5 * logvar) * jax.random.normal(gradients.noise_key, mean.shape))
        kl = jnp.mean(jnp.sum(kl_divergence(mean, logvar), axis=-1))
        terms = jnp.stack([fidelity(copy), generator_loss(critic(params["discriminator"], copy)), kl])
        return terms, copy

    each, copy = jax.jit(jax.jacrev(of_vae, has_aux=True))(params["vae"])
    weights = jnp.array([1.0, 0.7 * ratio, 1e-3])
    assert_trees_close(both["vae"], jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), each))
    of_critic = jax.jit(jax.grad(lambda p: discriminator_loss(critic(p, video), critic(p, copy))))
    assert_trees_close(both["discriminator"], of_critic(params["discriminator"]))
    at_last_layer = each["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(ratio, adaptive_weight(*at_last_layer[:2]), rtol=1e-3)


def test_before_its_start_the_discriminator_neither_learns_nor_teaches(gradients):
    early, sums = gradients(2, "vae", "discriminator")
    assert not any(np.any(x) for x in jax.tree.leaves(early["discriminator"]))
    alone, plain = gradients(2, "vae")
    assert_trees_close(early["vae"], alone["vae"])
    np.testing.assert_allclose(sums["loss"][0], plain["loss"][0], rtol=1e-6)


@pytest.mark.parametrize("step", [2, 3])
def test_the_loss_is_its_terms_by_their_weights(gradients, step):
    mean = {name: float(s / w) for name, (s, w) in gradients(step, "vae", "discriminator")[1].items()}
    expected = mean["l1"] + 0.5 * mean["mse"] + 0.3 * mean["multiscale"] + 0.2 * mean["wavelet"] + 1e-3 * mean["kl"]
    np.testing.assert_allclose(mean["loss"], expected, rtol=1e-5)


def test_the_perceptual_term_compares_the_copy_frame_by_frame_with_what_it_is_of(gradients, params):
    """By a metric whose weights are constants of the loss; here it is twice the mean absolute difference."""

    def metric(a, b, factor):
        return factor * jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))

    weights = dataclasses.replace(WEIGHTS, perceptual=0.6, perceptual_frames=0)
    loss = _make_loss(dict(vae=NETWORKS["vae"]), weights, metric, jnp.float32, False)
    batch = dict(video=np.asarray((videos() + 1) * 127.5, np.uint8))
    sums = jax.jit(loss)(dict(vae=params["vae"]), batch, jax.random.key(5), jnp.int32(0), jnp.float32(2))
    mean = {name: float(s / w) for name, (s, w) in sums.items()}
    np.testing.assert_allclose(mean["lpips"], 2 * mean["l1"], rtol=1e-5)
    without = {name: float(s / w) for name, (s, w) in gradients(2, "vae")[1].items()}
    np.testing.assert_allclose(mean["loss"], without["loss"] + 0.6 * mean["lpips"], rtol=1e-5)


def test_without_weights_of_lpips_the_multiscale_term_stands_in_and_says_so(capsys):
    weights, lpips = _perceptual(objectives.VAELossConfig(perceptual=0.5, multiscale=0.25))
    assert lpips is None and (weights.perceptual, weights.multiscale) == (0, 0.75)
    assert "the multi-scale term takes the perceptual term's place" in capsys.readouterr().out


def test_a_pyramid_holds_the_whole_video():
    video = videos(shape=(1, 2, 24, 40, 3))
    bands = laplacian_pyramid(video, 6)
    assert [band.shape[2:4] for band in bands] == [(24, 40), (12, 20), (6, 10), (3, 5)]  # odd sides end it
    whole = bands[-1]
    for band in bands[-2::-1]:
        whole = band + jnp.repeat(jnp.repeat(whole, 2, axis=2), 2, axis=3)
    np.testing.assert_allclose(whole, video, atol=1e-6)


def test_haar_details_keep_all_energy_but_that_of_the_means():
    video = videos(shape=(2, 4, 8, 6, 3))
    means = video.reshape(2, 2, 2, 4, 2, 3, 2, 3).sum(axis=(2, 4, 6)) / 8**0.5
    energy = jnp.sum(haar_details(video) ** 2) + jnp.sum(means**2)
    np.testing.assert_allclose(energy, jnp.sum(video**2), rtol=1e-5)


def test_a_still_video_has_no_details_in_time_and_a_flat_one_none_at_all():
    still = jnp.repeat(videos(shape=(1, 1, 8, 8, 3)), 5, axis=1)
    bands = haar_details(still)
    assert np.abs(bands[3:]).max() < 1e-6 < np.abs(bands[:3]).max()  # the last four differ in time
    assert wavelet_error(jnp.full((1, 5, 8, 8, 3), 0.5)) < 1e-6 < multiscale_error(jnp.full((1, 5, 8, 8, 3), 0.5))


def test_the_discriminator_scores_images_and_clips_and_learns_to_tell():
    graph, _ = functional.abstract(Discriminator, CRITIC)
    params = random_params(Discriminator, CRITIC)[1]
    assert nnx.merge(graph, params)(videos(shape=(2, 1, 16, 24, 3))).shape[:2] == (2, 1)
    real, fake = jnp.tanh(3 * videos(1)), 0.2 * videos(2)

    @jax.jit
    def step(params):
        def loss(p):
            critic = nnx.merge(graph, p)
            return discriminator_loss(critic(real), critic(fake))

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    values = []
    for _ in range(60):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


def test_an_inflated_image_vae_sees_each_frame_of_a_clip_as_the_image_vae_did():
    image = VAEConfig(base_width=4, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=3,
                      temporal_downsample=(False,))  # fmt: skip
    start = random_params(VAE, image)[1]
    start = jax.tree.map(lambda x: x[-1:] if x.ndim == 5 else x, start)  # one tap in time, as a network of images has
    clip = VAEConfig(**(image.__dict__ | dict(temporal_downsample=(True,))))
    fresh = jax.jit(lambda key: functional.init(VAE, clip, key))(jax.random.key(3))
    params = inflate(fresh, start, "an image VAE")
    still = jnp.repeat(videos(shape=(1, 1, 16, 16, 3)), 5, axis=1)
    small, large = functional.abstract(VAE, image)[0], functional.abstract(VAE, clip)[0]

    @jax.jit
    def both(start, params):
        images, clips = nnx.merge(small, start), nnx.merge(large, params)
        alone = images.encode(still[:, :1])[0]
        latents = jnp.repeat(alone, 3, axis=1)
        return alone, clips.encode(still)[0], images.decode(alone), clips.decode(latents)

    latent, latents, copy, copies = both(start, params)
    np.testing.assert_allclose(latents, jnp.repeat(latent, 3, axis=1), atol=1e-5)
    np.testing.assert_allclose(copies, jnp.repeat(copy, 5, axis=1), atol=1e-5)


def test_weights_of_another_architecture_are_refused_by_name():
    params = jax.tree.map(jnp.asarray, random_params(VAE, MODEL)[1])
    start = jax.tree.map(lambda x: x, params)
    start["extra"] = start.pop("latents_mean")
    start["encoder"]["conv_in"]["bias"] = np.zeros(7)
    with pytest.raises(UserError, match=r"bias is \(7,\), not \(4,\); latents_mean is missing; extra has no place"):
        inflate(params, start, "a VAE")


STAGES = {
    "no dict": ((5,), r"stages\[0\] is 5: a stage is a dict"),
    "no steps": (({"batch": 2},), r"stages\[0\] has no `steps`"),
    "no number": (({"steps": 0},), "has steps=0"),
    "no batch": (({"steps": 1, "batch": 0},), r"stages\[0\]: batch is 0: a step takes at least 1"),
    "a slip": (({"steps": 1, "bacth": 2},), "sets 'bacth': did you mean 'batch'"),
    "half a crop": (
        ({"steps": 1, "crop": (1, 0, 0)}, {"steps": 1, "crop": (9, 48)}), r"stages\[1\]: crop \(9, 48\): it is",
    ),
    "a crop off the grid": (({"steps": 1, "crop": (8, 0, 0)},), r"stages\[0\]: .* 2n \+ 1 frames"),
    "a side off the grid": (
        ({"steps": 1, "crop": (1, 0, 33)},), r"stages\[0\]: crop .* multiples of 4, such as \(1, 0, 36\)",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_cannot_be_is_refused_before_anything_is_trained(name, tmp_path):
    config = tiny_config().vae
    with config.unlocked():
        config.data.stages, config.data.path = STAGES[name][0], "world"
    objectives.complete(config)
    with pytest.raises(UserError, match=STAGES[name][1]):
        vae_objective(config, str(tmp_path), sharding.local_mesh())
