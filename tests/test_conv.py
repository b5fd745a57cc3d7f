"""Convolutions of frames: their gradients are XLA's, in the order of axes that its CPU backend has a fast one for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sorax.conv import conv_frames

CASES = {
    "same": (9, 8, 3, (1, 1), ((1, 1), (1, 1))), "even taps, strided": (8, 10, 4, (2, 2), ((1, 1), (1, 1))),
    "one side padded": (8, 8, 3, (2, 2), ((0, 1), (0, 1))), "uneven strides": (7, 9, 3, (2, 1), ((0, 0), (0, 0))),
    "pixels that nothing reads": (8, 8, 2, (3, 3), ((0, 0), (0, 0))), "one tap": (5, 4, 1, (1, 1), ((0, 0), (0, 0))),
}  # fmt: skip


def plain(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_xla(name):
    height, width, taps, stride, padding = CASES[name]
    x = jax.random.normal(jax.random.key(0), (3, height, width, 5))
    kernel = jax.random.normal(jax.random.key(1), (taps, taps, 5, 4))
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k, stride, padding))), (0, 1)))(x, kernel)
        for f in (conv_frames, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_every_convolution_of_a_gradient_within_a_branch_is_of_the_fast_order():
    def orders(f):
        def loss(x, kernel):
            return jnp.sum(f(x, kernel, (2, 2), ((1, 1), (1, 1))) ** 2)

        def step(x, kernel, on):
            return jax.lax.cond(on, jax.grad(loss, (0, 1)), lambda x, kernel: (x, kernel), x, kernel)

        shapes = jnp.zeros((2, 8, 8, 3)), jnp.zeros((4, 4, 3, 8)), True
        return set(re.findall(r"dim_labels=(\S+?)[,\s]", jax.jit(step).lower(*shapes).compile().as_text()))

    assert orders(conv_frames) == {"b01f_01io->b01f"} < orders(plain)
