"""The VAE's opponent: a 3-D patch discriminator, and the hinge losses of the two.

Patches: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017); hinge loss: Lim and
Ye, "Geometric GAN" (2017); the adaptive weight of the adversarial term: Esser et al., "Taming Transformers" (2021).

Legend: B batch, T frames, H height, W width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sorax.conv import conv_same


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Hyper-parameters: each of the num_layers - 1 inner layers halves space, and time where frames allow."""

    base_width: int = 64
    num_layers: int = 3
    max_multiplier: int = 8


class Layer(nnx.Module):
    """Convolution, normalisation over groups of channels, leaky ReLU."""

    def __init__(self, n_in, n_out, kernel_size, rngs, *, norm: bool):
        std = (n_in * kernel_size[0] * kernel_size[1] * kernel_size[2]) ** -0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*kernel_size, n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.norm = nnx.Param(jnp.ones(n_out)) if norm else None

    def __call__(self, x, stride):
        kernel = self.kernel[...]
        if x.shape[1] == 1:  # an image: the tap of now, as in a still clip it were the only one that moves
            kernel = kernel.sum(axis=0, keepdims=True)
            stride = (1, *stride[1:])
        x = conv_same(x, kernel.astype(x.dtype), stride)
        x = x + self.bias[...].astype(x.dtype)
        if self.norm is not None:
            x = _group_norm(x) * self.norm[...].astype(x.dtype)
        return x


def _group_norm(x, groups: int = 8, eps: float = 1e-5):
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], min(groups, x.shape[-1]), -1)
    axes = (1, 2, 3, 5)
    mean, var = jnp.mean(y, axes, keepdims=True), jnp.var(y, axes, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(var + eps)).reshape(x.shape).astype(x.dtype)


class Discriminator(nnx.Module):
    """Scores patches of clips and images: `[B, T, H, W, 3]` in [-1, 1] -> `[B, T', H', W']`, high where real."""

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        widths = [config.base_width * min(2**i, config.max_multiplier) for i in range(config.num_layers + 1)]
        self.first = Layer(3, widths[0], (3, 4, 4), rngs, norm=False)
        inner = [Layer(a, b, (3, 4, 4), rngs, norm=True) for a, b in zip(widths[:-1], widths[1:])]
        self.inner = nnx.List(inner)
        self.last = Layer(widths[-1], 1, (3, 4, 4), rngs, norm=False)

    def __call__(self, video):
        x = jax.nn.leaky_relu(self.first(video, (1, 2, 2)), 0.2)
        for i, layer in enumerate(self.inner):
            stride = (2, 2, 2) if i < len(self.inner) - 1 else (1, 1, 1)
            x = jax.nn.leaky_relu(layer(x, stride), 0.2)
        return self.last(x, (1, 1, 1))[..., 0]


def discriminator_loss(real, fake):
    """Hinge loss of the discriminator: mean of max(0, 1 - real) and max(0, 1 + fake), halved."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def generator_loss(fake):
    """What the VAE adds to its loss: minus the mean score of its reconstructions."""
    return -jnp.mean(fake)


def adaptive_weight(reconstruction_gradient, adversarial_gradient, most: float = 1e4):
    """Ratio of two gradient norms at the VAE's last layer: the adversarial term gets the reconstruction's force."""
    norm = [jnp.sqrt(jnp.sum(jnp.square(g))) for g in (reconstruction_gradient, adversarial_gradient)]
    return jax.lax.stop_gradient(jnp.clip(norm[0] / (norm[1] + 1e-4), 0.0, most))
