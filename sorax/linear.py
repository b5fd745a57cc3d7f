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
    """`nnx.Linear` (same parameters, same initialisers) by `matmul`; with a low-rank branch beside it, where
    `sorax.lora` has put one: lora_a `[n, r]`, lora_b `[r, m]`."""

    lora_a = lora_b = None
    lora_scale = 1.0

    def __call__(self, x):
        y = matmul(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is None:
            return y
        return y + self.lora_scale * matmul(matmul(x, self.lora_a[...]), self.lora_b[...])
