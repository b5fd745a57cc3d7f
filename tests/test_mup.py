"""muP: what a step of Adam does to the network does not depend on its width; the base width is the plain network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_params import assert_close

from sorax import mup
from sorax.dit import DiT, DiTConfig
from sorax.functional import abstract, init
from sorax.optim import OptimConfig, make_tx

BASE = DiTConfig(in_channels=4, out_channels=4, num_layers=2, num_heads=2, head_dim=8, ffn_dim=32, text_dim=8,
                 freq_dim=16, mup_base_width=16)  # fmt: skip
STEPS, N = 4, 24


def widened(times, **changes):
    return dataclasses.replace(BASE, num_heads=2 * times, ffn_dim=32 * times, **changes)


def start(config):
    params = init(DiT, config, jax.random.key(0, impl="rbg"))
    return dict(dit=mup.rescale(params, config))


def change_of_velocity(config):
    """Root mean square of what a few steps of Adam make of a velocity that was zero."""
    graphdef, _ = abstract(DiT, config)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    ids, text_ids = jnp.ones((1, N), int), jnp.ones((1, 4), int)
    args = (draw(1, N, 16), jnp.asarray(rng.integers(0, 4, (1, N, 3))), ids, jnp.asarray([[0.0, 0.6]]), ids,
            draw(1, 4, 8), text_ids, jnp.zeros((1, 4)))  # fmt: skip
    target = draw(1, N, 16)
    optim = OptimConfig(lr=0.01, schedule="constant", warmup_steps=0, clip_norm=0.0)
    tx = make_tx({"": optim}, STEPS, mup.lr_factor(config))

    def velocity(params):
        return nnx.merge(graphdef, params["dit"])(*args)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            gradients = jax.grad(lambda p: jnp.mean((velocity(p) - target) ** 2))(params)
            updates, state = tx.update(gradients, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return jnp.sqrt(jnp.mean(velocity(params) ** 2))

    return float(train(start(config)))


def test_steps_change_wide_networks_as_narrow_ones():
    """The coordinate check of the paper: 8 times the width, the same change; without muP it grows."""
    narrow, wide = change_of_velocity(BASE), change_of_velocity(widened(8))
    plain = change_of_velocity(widened(8, mup_base_width=0))
    assert 0.6 < wide / narrow < 1.6
    assert plain / narrow > 2.5


def test_the_base_width_is_the_plain_network():
    plain = dataclasses.replace(BASE, mup_base_width=0)
    assert_close(start(BASE), start(plain))
    assert mup.lr_factor(BASE)("dit/blocks/mlp_in/kernel", (2, 16, 32)) == 1.0
    assert mup.lr_factor(plain) is None


def test_scales_at_the_start_follow_the_table():
    """Variances and learning rates: as 1 / width of what reads the width, constant of all else."""
    times = 4
    base, plain, wide = (start(c)["dit"] for c in (BASE, widened(times, mup_base_width=0), widened(times)))
    factor = mup.lr_factor(widened(times))
    for name in ("patch_embed", "text_in", "time_in"):
        np.testing.assert_allclose(np.std(wide[name]["kernel"]), np.std(base[name]["kernel"]), rtol=0.15)
        assert factor(f"dit/{name}/kernel", ()) == 1.0
    for name in ("text_out", "time_out", "time_proj"):
        np.testing.assert_allclose(2 * np.std(wide[name]["kernel"]), np.std(base[name]["kernel"]), rtol=0.15)
        assert factor(f"dit/{name}/kernel", ()) == 1 / times
    for name in ("self_attention/q", "cross_attention/o", "mlp_in", "mlp_out"):
        path = ["blocks", *name.split("/"), "kernel"]
        here, there = (functools.reduce(lambda tree, key: tree[key], path, tree) for tree in (wide, base))
        np.testing.assert_allclose(2 * np.std(here), np.std(there), rtol=0.15)
    assert factor("dit/proj_out/kernel", ()) == factor("dit/blocks/mlp_out/kernel", ()) == 1 / times
    assert factor("dit/blocks/mlp_out/bias", ()) == factor("text/layers/0/q/kernel", ()) == 1.0
    np.testing.assert_allclose(np.std(wide["modulation"]), np.std(base["modulation"]), rtol=0.35)
    assert np.std(plain["patch_embed"]["kernel"]) < 0.8 * np.std(wide["patch_embed"]["kernel"])
