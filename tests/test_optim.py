"""Optimizers, schedules and clipping by config."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import assert_close

from sorax.captioner import Captioner, CaptionerConfig
from sorax.dit import DiT, DiTConfig
from sorax.functional import abstract
from sorax.optim import (
    CLIP_AFTER,
    OPTIMIZERS,
    SCHEDULES,
    OptimConfig,
    clip_by_deviation,
    evaluation_params,
    learning_rate,
    make_tx,
    muon_dimensions,
)
from sorax.sharding import path_string
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig


def config_of(optimizer, **values):
    schedule = "constant" if optimizer == "schedule_free" else "cosine"
    return OptimConfig(**dict(optimizer=optimizer, schedule=schedule, warmup_steps=0, lr=0.1) | values)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_finds_the_bottom(optimizer):
    target = dict(kernel=draw(4, 3), bias=draw(3, seed=1))
    tx = make_tx({"": config_of(optimizer, lr=0.05, clip_norm=10.0)}, 300)

    @jax.jit
    def descend(params, state):
        def step(carry, _):
            params, state = carry
            gradients = jax.tree.map(jnp.subtract, params, target)
            updates, state = tx.update(gradients, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(step, (params, state), length=300)[0]

    params = jax.tree.map(jnp.zeros_like, target)
    params, state = descend(params, jax.jit(tx.init)(params))
    for name, value in evaluation_params(params, state).items():
        np.testing.assert_allclose(value, target[name], atol=0.05)


def test_schedule_free_is_evaluated_at_its_average():
    """By the paper's equations with plain gradients in place of Adam's: x is the mean of z, weighted by lr^2."""
    b1, lr = 0.8, 0.3
    tx = make_tx({"": config_of("schedule_free", lr=lr, b1=b1, b2=0.0, eps=0.0, clip_norm=0.0)}, 10)
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    y = z = x = np.float32([1.0, -2.0])
    params, frozen = jnp.asarray(y), jnp.float32([3.0])
    tree = dict(scale=params, latents_std=frozen)
    state = init(tree)
    for k in range(4):
        gradients = dict(scale=draw(2, seed=k), latents_std=jnp.zeros(1))
        updates, state = update(gradients, state, tree)
        tree = jax.tree.map(jnp.add, tree, updates)
        z = z - lr * np.sign(gradients["scale"])  # Adam without memory
        x = x + (z - x) / (k + 1)
        y = b1 * x + (1 - b1) * z
        np.testing.assert_allclose(tree["scale"], y, atol=1e-5)
        np.testing.assert_allclose(evaluation_params(tree, state)["scale"], x, atol=1e-5)
    np.testing.assert_array_equal(evaluation_params(dict(tree, latents_std=frozen + 1), state)["latents_std"], 4.0)
    both = dict(a=tree, b=tree), dict(a=state, b=make_tx({"": config_of("adamw")}, 10).init(tree))
    found = evaluation_params(*both)
    np.testing.assert_array_equal(found["b"]["scale"], tree["scale"])
    np.testing.assert_allclose(found["a"]["scale"], x, atol=1e-5)


def test_schedule_free_averages_itself():
    assert config_of("schedule_free").average_decay == 0.0 and config_of("adamw").average_decay == 0.9999
    with pytest.raises(ValueError, match="takes its learning rate constant"):
        OptimConfig(optimizer="schedule_free")


def test_muon_takes_each_layer_of_a_stacked_kernel_for_itself():
    """Updates of [L, n, m] are those of L matrices, and orthogonal up to what five iterations leave (Jordan 2024)."""
    tx = make_tx({"": config_of("muon", clip_norm=0.0)}, 10)
    kernel = draw(3, 8, 8) + 4 * jnp.eye(8)  # not near a singular matrix, which five iterations do not reach
    stacked = dict(blocks=dict(q=dict(kernel=kernel)))
    gradients = jax.tree.map(lambda p: p * jnp.float32([1, 10, 100]).reshape(3, 1, 1), stacked)
    step = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    updates = step(gradients, stacked)
    for layer in range(3):
        alone = dict(out=dict(kernel=stacked["blocks"]["q"]["kernel"][layer]))
        of_alone = dict(out=dict(kernel=gradients["blocks"]["q"]["kernel"][layer]))
        expected = step(of_alone, alone)["out"]["kernel"]
        found = updates["blocks"]["q"]["kernel"][layer]
        assert_close(found, expected)
        singular = np.linalg.svd(np.asarray(found) / 0.1, compute_uv=False)
        assert singular.min() > 0.5 and singular.max() < 1.3


def test_muon_knows_inputs_from_outputs_in_every_network():
    dit = abstract(DiT, DiTConfig(num_layers=3, num_heads=2, head_dim=6, ffn_dim=8, text_dim=4, freq_dim=4))[1]
    vae = abstract(VAE, VAEConfig(base_width=4, width_multipliers=(1, 2), temporal_downsample=(True,)))[1]
    text = abstract(TextEncoder, TextConfig(width=4, num_layers=2, num_heads=1, head_dim=4, ffn_dim=8))[1]
    tiny = CaptionerConfig(encoder_layers=2, decoder_layers=3, num_heads=1, head_dim=6, ffn_dim=8)
    shapes = dict(dit=dit, vae=vae, text=text, captioner=abstract(Captioner, tiny)[1])
    found = jax.tree_util.tree_leaves_with_path(
        muon_dimensions(shapes), is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
    )
    found = {path_string(path): rule for path, rule in found}
    for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
        path, rule = path_string(path), found[path_string(path)]
        if not path.endswith("kernel"):
            assert rule is None
            continue
        batch = 1 if re.match("dit/blocks|captioner/(encoder|decoder)", path) else 0  # layers that are stacked
        assert tuple(rule.reduction_axis) == tuple(range(batch, len(shape.shape) - 1)), path
        assert tuple(rule.output_axis) == (len(shape.shape) - 1,), path


def test_only_matrices_decay():
    tx = make_tx({"": config_of("adamw", weight_decay=0.5)}, 10)
    params = dict(kernel=draw(2, 2), embedding=draw(3, 2), bias=draw(2), modulation=draw(6, 2), latents_mean=draw(2))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for name, update in updates.items():
        expected = -0.1 * 0.5 * params[name] if name in ("kernel", "embedding") else jnp.zeros_like(params[name])
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_have_their_shape(schedule):
    config = OptimConfig(schedule=schedule, lr=2.0, warmup_steps=10, final_lr=0.1, decay_fraction=0.25)
    rate = np.array([learning_rate(config, 100)(step) for step in range(101)], np.float64)
    np.testing.assert_allclose(rate[:11], np.linspace(0.2, 2.0, 11), rtol=1e-5)  # warm-up
    steps = np.arange(10, 101)
    expected = dict(
        cosine=0.2 + 1.8 * (1 + np.cos(np.pi * (steps - 10) / 90)) / 2,
        linear=np.interp(steps, [10, 100], [2.0, 0.2]),
        constant=np.full(91, 2.0),
        wsd=np.interp(steps, [75, 100], [2.0, 0.2]),
        inverse_sqrt=2.0 * np.sqrt(10 / steps),
    )
    np.testing.assert_allclose(rate[10:], expected[schedule], rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_bear_short_runs(schedule):
    for steps in (1, 2, 5):
        rate = learning_rate(OptimConfig(schedule=schedule, warmup_steps=1000), steps)
        values = np.array([rate(step) for step in range(steps + 1)])
        assert np.all(np.isfinite(values)) and np.all(values >= 0) and values[0] > 0


def test_an_unknown_name_or_an_impossible_number_is_refused():
    with pytest.raises(ValueError, match="cosine, linear"):
        OptimConfig(schedule="step")
    with pytest.raises(ValueError, match="adamw, muon"):
        OptimConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="clip_sigmas is -1: it is not negative"):
        OptimConfig(clip_sigmas=-1)


def test_clipping_by_deviation_follows_the_norms_and_not_the_outlier():
    tx = clip_by_deviation(3.0)
    update, state = jax.jit(tx.update), tx.init(None)
    rng = np.random.default_rng(0)
    for k in range(200):
        size = 5.0 + 0.1 * rng.standard_normal()
        gradient, state = update(jnp.float32([size, 0.0]), state)
        if k < CLIP_AFTER:
            np.testing.assert_allclose(gradient[0], size, rtol=1e-6)  # nothing is known yet
    before = state
    gradient, state = update(jnp.float32([0.0, 500.0]), state)
    np.testing.assert_allclose(gradient, [0.0, 5.3], atol=0.15)
    assert abs(float(state.mean - before.mean)) < 0.02  # the outlier has not moved the mean
    for bad in (np.nan, np.inf):
        gradient, after = update(jnp.float32([bad, 1.0]), state)
        np.testing.assert_array_equal(gradient, 0.0)
        assert_close(after, state)
    for _ in range(600):  # a lasting change is followed
        gradient, state = update(jnp.float32([50.0, 0.0]), state)
    np.testing.assert_allclose(gradient[0], 50.0, rtol=0.02)


def test_clipping_is_part_of_the_state_and_of_the_step():
    config = config_of("adamw", clip_sigmas=3.0, clip_norm=0.0, b1=0.0, b2=0.99)
    tx, params = make_tx({"": config}, 10), dict(kernel=jnp.ones((2, 2)))
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    counts = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if path_string(path).endswith("mean")]
    np.testing.assert_allclose(counts, [0.02], rtol=1e-5)  # a hundredth of the norm 2
