"""The diffusion transformer on packed rows. Errors are relative to the largest value of an array; 1e-5 is for
float32 sums in another order (measured: below 3e-6)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close, random_params

from sorax.dit import REMAT, DiT, DiTConfig
from sorax.functional import init
from sorax.patchify import patchify, positions
from sorax.text import MAX_SLOTS, slot_bias

CONFIG = DiTConfig(in_channels=4, out_channels=4, num_layers=2, num_heads=2, head_dim=12, ffn_dim=32, text_dim=8,
                   freq_dim=16)  # fmt: skip
GRAPH, PARAMS = random_params(DiT, CONFIG)

# Latent shape, caption length, noise level, latent frames given: clips of several shapes, and an image with no caption.
SAMPLES = (((3, 4, 4), 4, 0.7, (0,)), ((1, 4, 6), 0, 0.25, ()), ((2, 6, 4), 7, 0.95, ()), ((3, 4, 2), 2, 0.5, (0, 2)))
PADDING, TEXT_PADDING = 5, 3


def sample(index):
    """One sample alone, as a row that it fills: its fields without the batch axis."""
    shape, length, sigma, given_frames = SAMPLES[index]
    rng = np.random.default_rng(index)
    where = positions(*shape)
    text = np.pad(rng.standard_normal((length, CONFIG.text_dim)), ((0, 1), (0, 0)))  # and its one empty slot
    return dict(
        tokens=patchify(rng.standard_normal((*shape, CONFIG.in_channels)), CONFIG.patch_size).astype(np.float32),
        positions=where,
        segment_ids=np.ones(len(where), np.int32),
        level_index=np.where(np.isin(where[:, 0], given_frames), 0, 1),
        text=text.astype(np.float32),
        text_tokens=np.pad(np.full(length, 7), (0, 1)),
        text_segment_ids=np.ones(length + 1, np.int32),
        weights=rng.standard_normal((len(where), CONFIG.patch_dim)).astype(np.float32),
        sigma=np.float32(sigma),
    )


NUM_TOKENS = sum(int(np.prod(shape)) // 4 for shape, *_ in SAMPLES) + 5  # the last ones are padding
NUM_TEXT = sum(length + 1 for _, length, *_ in SAMPLES) + 3


def row_of(samples, padded=True):
    """One packed row `[1, ...]` of samples; its padding holds junk, which the network must not read."""
    row = {name: [] for name in samples[0]}
    for segment, fields in enumerate(samples, start=1):
        for name, value in fields.items():
            numbered = name in ("segment_ids", "text_segment_ids", "level_index")
            row[name].append(value * segment if numbered else value)
    levels = np.array([0.0, *row.pop("sigma")], np.float32)
    row = {name: np.concatenate(values)[None] for name, values in row.items()}
    if padded:
        levels = np.pad(levels, (0, len(SAMPLES) + 1 - len(levels)), constant_values=0.1)
        for name, value in row.items():
            space = (NUM_TEXT if name.startswith("text") else NUM_TOKENS) - value.shape[1]
            junk = 3 if name in ("tokens", "positions", "text") else 0
            row[name] = np.pad(value, ((0, 0), (0, space), *[(0, 0)] * (value.ndim - 2)), constant_values=junk)
    bias = slot_bias(row["text_tokens"], row["text_segment_ids"], len(SAMPLES))
    return row | dict(levels=levels[None], text_bias=bias)


def velocity(params, arrays, row, **options):
    row = row | arrays
    names = ("tokens", "positions", "segment_ids", "levels", "level_index", "text", "text_segment_ids", "text_bias")
    return nnx.merge(GRAPH, params)(*(jnp.asarray(row[name]) for name in names), **options)


forward = jax.jit(velocity)


@functools.partial(jax.jit, static_argnames=("remat", "unroll"))
def velocity_and_gradients(params, row, **options):
    """Velocity, and gradients of a weighted sum of it with respect to parameters and inputs."""

    def total(params, arrays):
        out = velocity(params, arrays, row, **options)
        return jnp.sum(out * row["weights"]), out

    arrays = {name: jnp.asarray(row[name]) for name in ("tokens", "text", "levels")}
    (_, out), (of_params, of_arrays) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, arrays)
    return out, of_params, of_arrays


@pytest.fixture(scope="module")
def packed():
    row = row_of([sample(i) for i in range(len(SAMPLES))])
    return row, velocity_and_gradients(PARAMS, row)


def test_packed_equals_separate_forward_and_gradient(packed):
    row, (out, of_params, of_arrays) = packed
    assert np.abs(out).max() > 0.1
    summed = jax.tree.map(jnp.zeros_like, of_params)
    for i in range(len(SAMPLES)):
        alone_out, alone_params, alone = velocity_and_gradients(PARAMS, row_of([sample(i)]))
        n, m = len(sample(i)["tokens"]), len(sample(i)["text"])
        here, text_here = row["segment_ids"][0] == i + 1, row["text_segment_ids"][0] == i + 1
        assert_close(out[:, here], alone_out[:, :n])
        assert_close(of_arrays["tokens"][:, here], alone["tokens"][:, :n])
        assert_close(of_arrays["text"][:, text_here], alone["text"][:, :m])
        assert_close(of_arrays["levels"][:, i + 1], alone["levels"][:, 1])
        summed = jax.tree.map(jnp.add, summed, alone_params)
    assert_close(of_params, summed)
    for name, ids in dict(tokens="segment_ids", text="text_segment_ids").items():
        np.testing.assert_array_equal(of_arrays[name][:, row[ids][0] == 0], 0.0)


def test_padding_changes_nothing(packed):
    fields = sample(0)
    out, of_params, of_arrays = velocity_and_gradients(PARAMS, row_of([fields], padded=False))
    padded_out, padded_params, padded_arrays = velocity_and_gradients(PARAMS, row_of([fields]))
    assert_close(padded_out[:, : len(fields["tokens"])], out)
    assert_close(padded_arrays["tokens"][:, : len(fields["tokens"])], of_arrays["tokens"])
    assert_close(padded_params, of_params)


def test_an_empty_slot_equals_all_unused_slots_attended(packed):
    """Wan attends to 512 slots a caption, the unused ones zeros; ours has one of them with a bias."""
    row, (out, *_) = packed
    fields = sample(0)
    length = SAMPLES[0][1]
    wan = row_of([fields], padded=False) | dict(
        text=np.pad(fields["text"][:length], ((0, MAX_SLOTS - length), (0, 0)))[None],
        text_segment_ids=np.ones((1, MAX_SLOTS), np.int32),
        text_bias=np.zeros((1, MAX_SLOTS), np.float32),
    )
    expected = forward(PARAMS, {}, wan)
    assert_close(out[:, row["segment_ids"][0] == 1], expected)
    unweighted = forward(PARAMS, {}, row | dict(text_bias=jnp.zeros_like(row["text_bias"])))
    assert np.abs(unweighted[:, row["segment_ids"][0] == 1] - expected).max() > 1e-3


def test_level_table_equals_one_level_a_token(packed):
    """Given tokens are at sigma 0 amid noisy ones: the table and its index mean a noise level for each token."""
    row, (out, *_) = packed
    sigma = np.take_along_axis(row["levels"], row["level_index"], axis=1)
    assert np.any((sigma == 0) & (row["segment_ids"] != 0))
    every = row | dict(levels=sigma, level_index=np.arange(sigma.shape[1])[None])
    assert_close(forward(PARAMS, {}, every), out)
    nothing_given = row | dict(level_index=row["segment_ids"])
    changed = np.abs(forward(PARAMS, {}, nothing_given) - out).max(axis=2)[0]
    for i, (*_, given_frames) in enumerate(SAMPLES):
        here = row["segment_ids"][0] == i + 1
        assert np.all(changed[here] > 1e-4) if given_frames else np.all(changed[here] < 1e-5)


def test_only_differences_of_positions_matter(packed):
    row, (out, *_) = packed
    moved = row | dict(positions=row["positions"] + np.array([3, 1, 2]))
    # The angles themselves are rounded differently.
    assert_close(forward(PARAMS, {}, moved), out, tolerance=1e-4)
    for axis in range(3):
        stretched = row | dict(positions=row["positions"] * np.eye(3, dtype=int)[axis] + row["positions"])
        assert np.abs(forward(PARAMS, {}, stretched) - out).max() > 1e-3


@pytest.mark.parametrize("remat, unroll", [("full", False), ("dots", False), ("none", True)])
def test_remat_and_unrolling_change_nothing(packed, remat, unroll):
    row, expected = packed
    assert_close(velocity_and_gradients(PARAMS, row, remat=remat, unroll=unroll), expected)


def test_an_unknown_remat_policy_is_named(packed):
    with pytest.raises(ValueError, match=f"{REMAT[0]}.*'some'"):
        jax.eval_shape(lambda: velocity(PARAMS, {}, packed[0], remat="some"))


def test_an_untrained_network_predicts_no_velocity(packed):
    params = jax.jit(lambda: init(DiT, CONFIG, jax.random.key(0, impl="rbg")))()
    np.testing.assert_array_equal(forward(params, {}, packed[0]), 0.0)
