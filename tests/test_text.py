"""The text encoder on packed captions. Errors are relative to the largest value of an array; 1e-5 is for float32 sums
in another order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close, random_params

from data_pipelines.text_tokens import MIN_VOCAB, Tokenizer
from sorax.attention import attention
from sorax.text import (
    EOS_ID,
    MAX_SLOTS,
    PAD_ID,
    TextConfig,
    TextEncoder,
    drop_captions,
    relative_bias,
    relative_bucket,
    slot_bias,
)

CONFIG = TextConfig(width=16, num_layers=2, num_heads=2, head_dim=8, ffn_dim=24, num_buckets=8, max_distance=12)
TOKENIZER = Tokenizer.train([], MIN_VOCAB)  # every byte is a token, and so is the space before a caption
CAPTIONS = ("a red circle", "", "two small blue stars, both still", "déjà vu")
LENGTH = 80


def row_of(captions, length=LENGTH, empty=1):
    """text_tokens and text_segment_ids `[1, length]`: each caption and its empty slots, then padding."""
    tokens, ids = [], []
    for segment, caption in enumerate(captions, start=1):
        tokens += [*TOKENIZER.encode(caption), *[PAD_ID] * empty]
        ids += [segment] * (len(tokens) - len(ids))
    space = length - len(tokens)
    return np.pad(np.array(tokens, np.int32), (0, space))[None], np.pad(np.array(ids, np.int32), (0, space))[None]


@functools.cache
def network(shared_bias):
    return random_params(TextEncoder, TextConfig(**{**CONFIG.__dict__, "shared_bias": shared_bias}))


@functools.partial(jax.jit, static_argnames="shared_bias")
def encode(params, tokens, ids, weights, shared_bias=False):
    """Encoding, and gradient of a weighted sum of it with respect to the parameters."""

    def total(params):
        out = nnx.merge(network(shared_bias)[0], params)(tokens, ids)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(total, has_aux=True)(params)
    return out, grads


@pytest.mark.parametrize("shared_bias", [False, True])
def test_packed_equals_separate_forward_and_gradient(shared_bias):
    params = network(shared_bias)[1]
    tokens, ids = row_of(CAPTIONS)
    weights = np.random.default_rng(0).standard_normal((1, LENGTH, CONFIG.width)).astype(np.float32)
    out, grads = encode(params, tokens, ids, weights, shared_bias)
    summed = jax.tree.map(jnp.zeros_like, grads)
    for segment, caption in enumerate(CAPTIONS, start=1):
        here = np.flatnonzero(ids[0] == segment)
        weights_alone = np.zeros_like(weights)
        weights_alone[:, : len(here)] = weights[:, here]
        alone, grads_alone = encode(params, *row_of([caption]), weights_alone, shared_bias)
        assert_close(out[:, here], alone[:, : len(here)])
        summed = jax.tree.map(jnp.add, summed, grads_alone)
    assert_close(grads, summed)
    assert len(jax.tree.leaves([grads["layers"][i].get("bias") for i in range(2)])) == (1 if shared_bias else 2)
    # Where no token stands, Wan has zeros.
    np.testing.assert_array_equal(out[0, tokens[0] == PAD_ID], 0.0)
    assert np.all(np.abs(out[0, tokens[0] != PAD_ID]).max(axis=-1) > 0.1)


@pytest.mark.parametrize("length", [1, 7, 150])
def test_relative_bias_is_a_lookup_by_distance(length):
    table = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    expected = table[np.asarray(relative_bucket(jnp.asarray(distance), 32, 128))].transpose(2, 0, 1)
    np.testing.assert_allclose(relative_bias(jnp.asarray(table), length, 128), expected, rtol=0, atol=1e-6)


def test_buckets_are_those_of_t5():
    """Exact up to 7, then 8 logarithmic ones up to 128 places; keys that come later have their own 16."""
    distance = np.array([0, -1, -7, -8, -11, -12, -16, -64, -127, -128, -1000, 1, 7, 8, 1000])
    bucket = np.asarray(relative_bucket(jnp.asarray(distance), 32, 128))
    np.testing.assert_array_equal(bucket, [0, 1, 7, 8, 8, 9, 10, 14, 15, 15, 15, 17, 23, 24, 31])


def test_slot_bias_makes_512_slots_of_every_caption():
    tokens, ids = row_of(CAPTIONS, empty=2)
    bias = np.asarray(slot_bias(jnp.asarray(tokens), jnp.asarray(ids), len(CAPTIONS)))
    np.testing.assert_array_equal(bias[tokens != PAD_ID], 0.0)
    for segment in range(1, len(CAPTIONS) + 1):
        np.testing.assert_allclose(np.exp(bias[ids == segment]).sum(), MAX_SLOTS, rtol=1e-5)
    full = row_of(["x" * (MAX_SLOTS - 2)], length=MAX_SLOTS + 1)
    assert np.exp(np.asarray(slot_bias(*map(jnp.asarray, full), 1))[0, MAX_SLOTS]) == 0  # nothing is unused


def test_a_dropped_caption_is_the_empty_caption():
    """What a query gets from it is what it gets from the encoding of ''."""
    params = network(False)[1]
    tokens, ids = (jnp.asarray(x) for x in row_of(CAPTIONS))
    weights = np.zeros((1, LENGTH, CONFIG.width), np.float32)
    dropped = drop_captions(jax.random.key(0), tokens, ids, len(CAPTIONS), 1.0)
    out, _ = encode(params, dropped, ids, weights)
    empty_tokens, empty_ids = (jnp.asarray(x) for x in row_of([""]))
    empty, _ = encode(params, empty_tokens, empty_ids, weights)

    def read(text, tokens, ids, segment):
        """What attention reads from a caption; the same random query and matrices each time."""
        q, to_k, to_v = (jax.random.normal(jax.random.key(i), (1, CONFIG.width, 4)) for i in range(3))
        bias = slot_bias(tokens, ids, len(CAPTIONS))[:, None, None]
        k, v = ((text @ matrix[0])[:, :, None] for matrix in (to_k, to_v))
        return attention(q[:, :1, None], k, v, jnp.full((1, 1), segment), ids, bias=bias)

    expected = read(empty, empty_tokens, empty_ids, 1)
    before, _ = encode(params, tokens, ids, weights)
    for segment, caption in enumerate(CAPTIONS, start=1):
        here = np.flatnonzero(ids[0] == segment)
        assert_close(out[:, here[:1]], empty[:, :1])
        np.testing.assert_array_equal(out[:, here[1:]], 0.0)
        assert_close(read(out, dropped, ids, segment), expected)
        if caption:
            assert np.abs(read(before, tokens, ids, segment) - expected).max() > 1e-3


def test_captions_are_dropped_whole_and_as_often_as_asked():
    row = row_of(CAPTIONS)
    tokens, ids = (jnp.asarray(np.repeat(x, 500, axis=0)) for x in row)
    kept = drop_captions(jax.random.key(0), tokens, ids, len(CAPTIONS), 0.0)
    np.testing.assert_array_equal(kept, tokens)
    some = np.asarray(drop_captions(jax.random.key(0), tokens, ids, len(CAPTIONS), 0.2))
    np.testing.assert_array_equal(some[:, row[1][0] == 0], PAD_ID)
    for segment, caption in enumerate(CAPTIONS, start=1):
        if caption:
            here = row[1][0] == segment
            original, empty = row[0][0, here], np.pad([EOS_ID], (0, here.sum() - 1))
            is_dropped = np.all(some[:, here] == empty, axis=1)
            assert np.all(is_dropped | np.all(some[:, here] == original, axis=1))
            assert 0.2 - 4 * 0.018 < is_dropped.mean() < 0.2 + 4 * 0.018  # 500 draws: a standard deviation of 0.018
