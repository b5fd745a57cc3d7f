"""Patches hold the same numbers as the latents, in the order of Wan's layers, on numpy and jax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sorax.patchify import grid, num_tokens, patchify, positions, reorder_output, unpatchify

small = st.integers(1, 3)
cases = st.tuples(
    st.tuples(small, small, small),  # patch size
    st.tuples(small, small, small),  # patches along t, h, w; t = 1 with pt = 1 is an image
    st.integers(1, 4),  # channels
    st.lists(st.integers(1, 2), max_size=2),  # batch dimensions
)


def latents_of(case):
    patch, counts, channels, batch = case
    shape = (*batch, *(p * n for p, n in zip(patch, counts)), channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32), patch


@settings(deadline=None, max_examples=60)
@given(cases)
def test_round_trip_is_exact(case):
    latents, patch = latents_of(case)
    shape = latents.shape[-4:-1]
    patches = patchify(latents, patch)
    assert patches.shape[-2:] == (num_tokens(shape, patch), latents.shape[-1] * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(patches, shape, patch), latents)


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 6)], ids=["image", "video"])
def test_numpy_equals_jax(shape):
    latents = np.random.default_rng(0).standard_normal((2, *shape, 5)).astype(np.float32)
    patches = patchify(latents)
    on_jax = jax.jit(patchify)(jnp.asarray(latents))
    assert isinstance(patches, np.ndarray) and isinstance(on_jax, jax.Array)
    np.testing.assert_array_equal(patches, on_jax)
    for order in ("in", "out"):
        back = unpatchify(on_jax, shape, order=order)
        assert isinstance(back, jax.Array)
        np.testing.assert_array_equal(unpatchify(patches, shape, order=order), back)
    np.testing.assert_array_equal(reorder_output(patches), reorder_output(on_jax))


@settings(deadline=None, max_examples=60)
@given(cases)
def test_output_order_is_reordered_into_the_order_of_tokens(case):
    latents, patch = latents_of(case)
    shape, channels = latents.shape[-4:-1], latents.shape[-1]
    tokens = patchify(latents, patch)
    # The model's order by hand: the channel axis moved from the front of each patch to its back.
    split = tokens.reshape(*tokens.shape[:-1], channels, *patch)
    emitted = np.moveaxis(split, -4, -1).reshape(tokens.shape)
    np.testing.assert_array_equal(reorder_output(emitted, patch, channels), tokens)
    np.testing.assert_array_equal(unpatchify(emitted, shape, patch, order="out"), latents)


def test_linear_on_patches_equals_strided_convolution():
    """A Conv3d weight [D, C, pt, ph, pw], flattened, embeds patches by one matrix product."""
    rng = np.random.default_rng(0)
    patch, width, channels = (1, 2, 2), 5, 3
    latents = rng.standard_normal((2, 3, 4, 6, channels)).astype(np.float32)
    weight = rng.standard_normal((width, channels, *patch)).astype(np.float32)
    dims = jax.lax.conv_dimension_numbers(latents.shape, weight.shape, ("NDHWC", "OIDHW", "NDHWC"))
    conv = jax.lax.conv_general_dilated(latents, weight, patch, "VALID", dimension_numbers=dims)
    linear = patchify(latents, patch) @ weight.reshape(width, -1).T
    # Only the order of summation of 12 fp32 products differs.
    np.testing.assert_allclose(linear, conv.reshape(linear.shape), atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(cases)
def test_positions_name_the_place_of_each_patch(case):
    patch, counts, _, _ = case
    t, h, w = (p * n for p, n in zip(patch, counts))
    where = positions(t, h, w, patch)
    assert where.dtype == np.int32 and where.shape == (num_tokens((t, h, w), patch), 3)
    assert grid((t, h, w), patch) == counts
    # Latents that hold their own coordinates: the first value of a patch is the coordinate of its corner.
    coordinates = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1)
    corners = patchify(coordinates, patch).reshape(len(where), 3, -1)[..., 0]
    np.testing.assert_array_equal(where * np.asarray(patch), corners)


def test_wrong_sizes_are_errors_that_name_the_dimension():
    with pytest.raises(ValueError, match="h = 5 is not a multiple of 2"):
        patchify(np.zeros((1, 5, 4, 3)))
    with pytest.raises(ValueError, match="w = 3 is not a multiple of 2"):
        num_tokens((1, 4, 3))
    with pytest.raises(ValueError, match="t = 3 is not a multiple of 2"):
        positions(3, 4, 4, (2, 2, 2))
    with pytest.raises(ValueError, match="positive"):
        num_tokens((0, 4, 4))
    with pytest.raises(ValueError, match="t, h, w, C"):
        patchify(np.zeros((5, 4, 3)))
    with pytest.raises(ValueError, match="7 patches cannot form"):
        unpatchify(np.zeros((7, 12)), (2, 4, 4))
    with pytest.raises(ValueError, match="not a multiple of 4"):
        unpatchify(np.zeros((8, 13)), (2, 4, 4))
    with pytest.raises(ValueError, match="order"):
        unpatchify(np.zeros((8, 12)), (2, 4, 4), order="wan")
    with pytest.raises(ValueError, match="3 channels, not 4"):
        reorder_output(np.zeros((8, 12)), channels=4)


def test_importing_it_loads_neither_jax_nor_flax():
    code = "import sys, sorax.patchify; sys.exit(any(m in sys.modules for m in ('jax', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
