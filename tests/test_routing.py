"""Tokens that skip layers: which, and that packed rows route each sample as it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close, random_params

from sorax import flops, routing
from sorax.dit import DiT, DiTConfig

CONFIG = DiTConfig(in_channels=2, out_channels=2, num_layers=4, num_heads=2, head_dim=8, ffn_dim=24, text_dim=6,
                   freq_dim=8)  # fmt: skip
LENGTHS = (7, 1, 10, 4)
SAMPLES, N = len(LENGTHS), sum(LENGTHS) + 3  # the last ones are padding


def ids_of(lengths, total):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.pad(ids, (0, total - len(ids))))[None]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_every_sample_keeps_its_share_and_the_places_are_enough(share):
    ids = jnp.concatenate([ids_of(LENGTHS, N), ids_of((6, 6, 6, 7), N), ids_of((N,), N)])
    route = jax.jit(lambda key: routing.choose(key, ids, SAMPLES, share))(jax.random.key(1))
    for row, row_ids in enumerate(np.asarray(ids)):
        kept = np.asarray(route.kept[row])
        for segment in range(1, SAMPLES + 1):
            n = np.sum(row_ids == segment)
            assert kept[row_ids == segment].sum() == int((1 - share) * n + 1e-4)
        assert not kept[row_ids == 0].any() and kept.sum() <= route.index.shape[1]
        # In their order, so that segments stay contiguous.
        np.testing.assert_array_equal(route.index[row, : kept.sum()], np.flatnonzero(kept))
    assert route.index.shape[1] < (1 - share) * N + 8


def test_all_tokens_of_a_sample_are_as_likely_to_skip():
    ids = jnp.tile(ids_of(LENGTHS, N), (4000, 1))
    kept = np.mean(jax.jit(lambda key: routing.choose(key, ids, SAMPLES, 0.5).kept)(jax.random.key(0)), axis=0)
    expected = np.concatenate([[int(n / 2) / n] * n for n in LENGTHS] + [[0] * 3])
    np.testing.assert_allclose(kept, expected, atol=0.04)  # five deviations


def test_there_and_back_changes_nothing_and_has_the_gradient_of_plain_indexing():
    ids, rng = ids_of(LENGTHS, N), np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal((1, N, 3)), jnp.float32) for _ in range(2))
    route = routing.choose(jax.random.key(0), ids, SAMPLES, 0.5)
    count = int(route.kept.sum())

    def plain(x):
        y = x[:, route.index[0]] ** 2
        return jnp.sum(weights * x.at[:, route.index[0, :count]].set(y[:, :count]) ** 2)

    def ours(x):
        return jnp.sum(weights * routing.widen(x, routing.narrow(x, route) ** 2, route) ** 2)

    np.testing.assert_array_equal(routing.widen(x, routing.narrow(x, route), route), x)
    (a, da), (b, db) = jax.value_and_grad(ours)(x), jax.value_and_grad(plain)(x)
    assert_close((a, da), (b, db))


GRAPH, PARAMS = random_params(DiT, CONFIG)


def row_of(lengths, total, seed=0):
    rng, ids = np.random.default_rng(seed), ids_of(lengths, total)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    text_ids = jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), 2))[None]
    levels = jnp.asarray([0.0, *rng.uniform(0.1, 0.9, len(lengths))], jnp.float32)[None]
    where = jnp.asarray(rng.integers(0, 4, (1, total, 3)))
    return [draw(1, total, CONFIG.patch_dim), where, ids, levels, ids, draw(1, text_ids.shape[1], CONFIG.text_dim),
            text_ids, jnp.zeros(text_ids.shape)]  # fmt: skip


def run(params, row, route, weights, **options):
    def total(params, tokens):
        out = nnx.merge(GRAPH, params)(tokens, *row[1:], route=route, route_layers=(1, -1), **options)
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, row[0])


def test_packed_equals_separate_with_the_same_tokens_skipping():
    row = row_of(LENGTHS, N)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((1, N, CONFIG.patch_dim)), jnp.float32)
    route = routing.choose(jax.random.key(2), row[2], SAMPLES, 0.5)
    (of_params, of_tokens), out = run(PARAMS, row, route, weights * (row[2] != 0)[..., None])
    (_, _), through = run(PARAMS, row, None, weights)
    summed = jax.tree.map(jnp.zeros_like, of_params)
    for segment in range(1, SAMPLES + 1):
        here, text = np.asarray(row[2][0] == segment), np.asarray(row[6][0] == segment)
        alone = [row[0][:, here], row[1][:, here], jnp.ones((1, here.sum()), int), row[3][:, [0, segment]],
                 jnp.ones((1, here.sum()), int), row[5][:, text], jnp.ones((1, text.sum()), int),
                 jnp.zeros((1, text.sum()))]  # fmt: skip
        kept = route.kept[:, here]
        index = jnp.flatnonzero(kept[0])[None]
        of_alone = routing.Route(kept, index, jnp.maximum(jnp.cumsum(kept, axis=1) - 1, 0))
        if not index.size:  # a sample of one token, which skips: there is no row to gather
            of_alone = routing.Route(kept, jnp.zeros((1, 1), int), jnp.zeros(kept.shape, int))
        (params_alone, tokens_alone), out_alone = run(PARAMS, alone, of_alone, weights[:, here])
        assert_close(out[:, here], out_alone)
        assert_close(of_tokens[:, here], tokens_alone)
        summed = jax.tree.map(jnp.add, summed, params_alone)
    assert_close(of_params, summed)
    assert np.abs(out - through).max() > 0.01  # it does skip


def test_unrolled_layers_and_remat_route_alike():
    row = row_of(LENGTHS, N)
    weights = jnp.ones((1, N, CONFIG.patch_dim)) * (row[2] != 0)[..., None]
    route = routing.choose(jax.random.key(2), row[2], SAMPLES, 0.5)
    assert_close(run(PARAMS, row, route, weights, unroll=True, remat="full"), run(PARAMS, row, route, weights))


def test_skipped_work_is_not_counted():
    D, F, s, m = CONFIG.width, CONFIG.ffn_dim, 100, 4
    whole = flops.dit_forward(CONFIG, [s], [m])
    skipping = flops.dit_forward(CONFIG, [s], [m], share=0.5, route_layers=(1, -1))
    a_layer = (12 * D * D + 4 * D * F) * s / 2 + 4 * D * (s * (s + m) - s / 2 * (s / 2 + m))
    np.testing.assert_allclose(whole - skipping, 2 * a_layer, rtol=1e-9)
    assert flops.dit_forward(CONFIG, [s], [m], share=0.0, route_layers=(1, -1)) == whole
