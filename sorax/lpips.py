"""LPIPS: distance of two pictures in the features of a VGG16, the perceptual term of VAE training and evaluation.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018), version 0.1 with
VGG16 features. The weights are the user's: a safetensors file with torchvision's names of the VGG16's convolutions
and lpips' names of the learned weights of the channels. With both packages at hand it is made by

    import lpips, safetensors.torch, torchvision
    vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict()
    channels = lpips.LPIPS(net="vgg").state_dict()  # which has them under two names, of which one is saved
    tensors = {k: v for k, v in vgg.items() if k.startswith("features.")}
    tensors |= {k: channels[k] for k in (f"lin{n}.model.1.weight" for n in range(5))}
    safetensors.torch.save_file(tensors, "lpips_vgg.safetensors")
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np

from sorax.conv import conv_frames
from sorax.errors import UserError

# Convolutions between two poolings: (place in torchvision's `features`, channels out); after each block features are
# compared.
BLOCKS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
# What pictures in [-1, 1] are shifted and scaled by: ImageNet's statistics.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
LEAST_SIDE = 16  # pixels: four poolings leave one


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the file."""
    shapes, n_in = {}, 3
    for k, block in enumerate(BLOCKS):
        for place, n_out in block:
            shapes |= {f"features.{place}.weight": (n_out, n_in, 3, 3), f"features.{place}.bias": (n_out,)}
            n_in = n_out
        shapes[f"lin{k}.model.1.weight"] = (1, n_in, 1, 1)
    return shapes


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """The metric with its weights: `params` is a pytree, the functions are pure."""

    params: dict

    @classmethod
    def load(cls, path):
        """From a safetensors file. Raises UserError that lists what is missing, has no place, is of another shape or
        not finite."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            why = f"LPIPS weights {path!r} cannot be read ({error})"
            raise UserError(f"{why}: see the docstring of sorax/lpips.py") from error
        return cls.from_tensors(tensors, str(path))

    @classmethod
    def from_tensors(cls, tensors, where="LPIPS weights"):
        """From arrays by name, in PyTorch's layout: those of `tensor_shapes`, no less and no more.

        Raises UserError as `load`.
        """
        wanted = tensor_shapes()
        wrong = (
            [f"{k} is missing" for k in wanted if k not in tensors],
            [f"{k} has no place" for k in sorted(tensors.keys() - wanted.keys())],
            [f"{k} is {tuple(tensors[k].shape)}, not {shape}" for k, shape in wanted.items()
             if k in tensors and tuple(tensors[k].shape) != shape],
            [f"{k} holds NaN or infinite values" for k in wanted
             if k in tensors and not np.isfinite(np.asarray(tensors[k], np.float32)).all()],
        )  # fmt: skip
        shown = [problem for kind in wrong for problem in kind[:2]]
        if shown:
            left = sum(map(len, wrong)) - len(shown)
            more = f" and {left} more" if left else ""
            raise UserError(f"{where}: {'; '.join(shown)}{more}: see the docstring of sorax/lpips.py")
        params = {}
        for name in wanted:
            value = np.asarray(tensors[name], np.float32)
            params[name] = einops.rearrange(value, "o i h w -> h w i o") if value.ndim == 4 else value
        return cls(params)

    def __call__(self, a, b, params=None):
        """Distance float32 `[B]` of pictures a and b `[B, H, W, 3]` in [-1, 1], at least 16 pixels a side.

        params: in place of the metric's own, to pass them into a compiled function as an argument.
        Raises UserError for smaller pictures.
        """
        if min(a.shape[1:3]) < LEAST_SIDE:
            raise UserError(f"LPIPS compares pictures of at least {LEAST_SIDE} pixels a side, these are {a.shape[1]} x "
                            f"{a.shape[2]}: take larger crops, or do without it")  # fmt: skip
        params = self.params if params is None else params
        both = jnp.concatenate([a, b]).astype(jnp.float32)
        x = (both - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        total = 0.0
        for k, block in enumerate(BLOCKS):
            if k:
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for place, _ in block:
                kernel, bias = params[f"features.{place}.weight"], params[f"features.{place}.bias"]
                x = jax.nn.relu(conv_frames(x, kernel, (1, 1), ((1, 1), (1, 1))) + bias)
            # Theirs divides by norm + eps; the tiny addend inside keeps the gradient of a zero vector finite.
            unit = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + EPS**2) + EPS)
            first, second = jnp.split(unit, 2)
            weights = params[f"lin{k}.model.1.weight"][0, 0, :, 0]
            total = total + jnp.mean(jnp.square(first - second) @ weights, axis=(1, 2))
        return total
