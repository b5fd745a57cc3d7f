"""The affine layer: what `x @ kernel` gives, in value, in both derivatives and in forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sorax.linear import Linear, matmul


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 5, 3), (3, 4), (2, 5, 3), (3, 4))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_value_and_gradients_are_those_of_a_product(dtype, rtol):
    x, kernel, _, _ = operands(dtype)
    value = lambda f: lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel).astype(jnp.float32)))  # noqa: E731
    for ours, theirs in zip(*(jax.grad(value(f), (0, 1))(x, kernel) for f in (matmul, jnp.matmul))):
        assert ours.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (ours, theirs)), rtol=rtol, atol=1e-5)
    np.testing.assert_array_equal(matmul(x, kernel), x @ kernel)


def test_forward_mode_is_that_of_a_product():
    x, kernel, dx, dkernel = operands(jnp.float32)
    ours, theirs = (jax.jvp(f, (x, kernel), (dx, dkernel)) for f in (matmul, jnp.matmul))
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    # Forward over reverse, as consistency distillation takes it.
    loss = lambda kernel: jnp.sum(jnp.tanh(matmul(x, kernel)))  # noqa: E731
    plain = lambda kernel: jnp.sum(jnp.tanh(x @ kernel))  # noqa: E731
    a, b = (jax.jvp(jax.grad(f), (kernel,), (dkernel,))[1] for f in (loss, plain))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_layer_is_flax_own():
    x = operands(jnp.float32)[0]
    for use_bias in (True, False):
        ours, theirs = (cls(3, 4, use_bias=use_bias, rngs=nnx.Rngs(0)) for cls in (Linear, nnx.Linear))
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
