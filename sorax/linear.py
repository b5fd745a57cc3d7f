"""The affine layer of every network, with a gradient that XLA's CPU backend runs fast."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import linear_call


@jax.custom_jvp
def matmul(x, kernel):
    """`[..., n] x [n, m] -> [..., m]`, whose gradient for the kernel is the one product `x^T g`.

    JAX's own rule makes `g^T x` and transposes that, for which XLA's CPU backend computes g column by column: a
    training step of the DiT takes a fifth longer. A rule for tangents, so that forward mode works too.
    """
    return x @ kernel


@matmul.defjvp
def _matmul_jvp(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    return x @ kernel, dx @ kernel + linear_call(jnp.matmul, _kernel_gradient, x, dkernel)


def _kernel_gradient(x, g):
    axes = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, g, ((axes, axes), ((), ())))


class Linear(nnx.Linear):
    """`nnx.Linear` (same parameters, same initialisers) by `matmul`."""

    def __call__(self, x):
        y = matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]
