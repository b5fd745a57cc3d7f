"""Packed attention. 1e-5: float32 sums in another order; measured errors are around 1e-6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sorax.attention import attention

K, A = 2, 8
QUERIES, KEYS = (5, 1, 8), (3, 4, 2)  # tokens of each sample, as in a row of video tokens and one of text
TOLERANCE = 1e-5


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def ids_of(lengths, total):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.pad(ids, (0, total - len(ids))))[None]


def slices(lengths):
    ends = np.cumsum(lengths)
    return [slice(end - n, end) for n, end in zip(lengths, ends)]


@pytest.fixture(scope="module")
def row():
    """Queries, keys, values, logit bias and a weighting of the output; 16 query and 12 key places, the last padding."""
    arrays = dict(q=normal(0, 1, 16, K, A), k=normal(1, 1, 12, K, A), v=normal(2, 1, 12, K, A))
    return arrays, normal(3, 1, K, 16, 12), normal(4, 1, 16, K, A), ids_of(QUERIES, 16), ids_of(KEYS, 12)


def weighted(arrays, bias, weights, q_ids, kv_ids):
    out = attention(arrays["q"], arrays["k"], arrays["v"], q_ids, kv_ids, bias=bias)
    return jnp.sum(out * weights), out


value_and_grad = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))


def test_packed_equals_separate_forward_and_gradient(row):
    arrays, bias, weights, q_ids, kv_ids = row
    (_, packed), (packed_grads, packed_bias_grad) = value_and_grad(arrays, bias, weights, q_ids, kv_ids)
    for some, others in zip(slices(QUERIES), slices(KEYS)):
        alone = dict(q=arrays["q"][:, some], k=arrays["k"][:, others], v=arrays["v"][:, others])
        ones = jnp.ones_like(q_ids[:, some]), jnp.ones_like(kv_ids[:, others])
        (_, out), (grads, bias_grad) = value_and_grad(alone, bias[:, :, some, others], weights[:, some], *ones)
        np.testing.assert_allclose(packed[:, some], out, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(packed_bias_grad[:, :, some, others], bias_grad, atol=TOLERANCE, rtol=0)
        for name, where in dict(q=some, k=others, v=others).items():
            np.testing.assert_allclose(packed_grads[name][:, where], grads[name], atol=TOLERANCE, rtol=0)


def test_separate_attention_is_softmax_of_scaled_products(row):
    arrays, bias, *_ = row
    q, k, v = (arrays[name].astype(jnp.float32) for name in "qkv")
    logits = np.einsum("bnka,bmka->bknm", q, k) * A**-0.5 + bias
    expected = np.einsum("bknm,bmka->bnka", jax.nn.softmax(logits), v)
    out = attention(q, k, v, jnp.ones((1, 16), int), jnp.ones((1, 12), int), bias=bias)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


def test_nothing_leaks_between_segments(row):
    """Replacing one segment's queries, keys and values by huge ones moves no bit of any other segment."""
    arrays, bias, weights, q_ids, kv_ids = row
    (_, before), (grads_before, _) = value_and_grad(arrays, bias, weights, q_ids, kv_ids)
    changed = {
        name: jnp.where((q_ids if name == "q" else kv_ids)[..., None, None] == 2, 1e4 * (x + 1), x)
        for name, x in arrays.items()
    }
    (_, after), (grads_after, _) = value_and_grad(changed, bias, weights, q_ids, kv_ids)
    other_q, other_kv = np.asarray(q_ids[0] != 2), np.asarray(kv_ids[0] != 2)
    assert not np.array_equal(before[:, ~other_q], after[:, ~other_q])
    np.testing.assert_array_equal(before[:, other_q], after[:, other_q])
    for name in arrays:
        where = other_q if name == "q" else other_kv
        np.testing.assert_array_equal(grads_before[name][:, where], grads_after[name][:, where])


def test_padding_gives_zeros_and_finite_gradients(row):
    arrays, bias, weights, q_ids, kv_ids = row
    # A sample without any key to see, too: all of its queries are as good as padding.
    kv_ids = jnp.where(kv_ids == 3, 0, kv_ids)
    (_, out), (grads, _) = value_and_grad(arrays, bias, weights, q_ids, kv_ids)
    blind = np.isin(np.asarray(q_ids[0]), (0, 3))
    assert blind.sum() == 2 + QUERIES[2]
    np.testing.assert_array_equal(out[:, blind], 0.0)
    assert np.all(np.abs(out[:, ~blind]).max(axis=(2, 3)) > 0)
    for g in grads.values():
        assert np.all(np.isfinite(g))
    np.testing.assert_array_equal(grads["q"][:, blind], 0.0)
    np.testing.assert_array_equal(grads["v"][:, np.asarray(kv_ids[0] == 0)], 0.0)


def test_log_n_on_a_key_counts_as_n_equal_keys(row):
    arrays, *_ = row
    q, k, v, n = arrays["q"], arrays["k"][:, :3], arrays["v"][:, :3], 509

    def ones(x):
        return jnp.ones(x.shape[:2], int)

    bias = jnp.array([0.0, 0.0, np.log(n)])
    once = attention(q, k, v, ones(q), ones(k), bias=bias)
    many_k, many_v = (jnp.concatenate([x[:, :2], jnp.repeat(x[:, 2:], n, axis=1)], axis=1) for x in (k, v))
    np.testing.assert_allclose(once, attention(q, many_k, many_v, ones(q), ones(many_k)), atol=TOLERANCE, rtol=0)
    assert np.abs(once - attention(q, k, v, ones(q), ones(k))).max() > 0.1
