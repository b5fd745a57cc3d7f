"""What the vision transformers of the metrics share: their blocks, their pictures, their folders.

A folder is one of transformers' `save_pretrained`: `config.json` and `model.safetensors` (or its shards and their
index), and where it is there `preprocessor_config.json`.

Legend: B batch, N tokens, K heads, A head dim, D width, H height, W width of pictures; channels last.
"""

import functools
import hashlib
import pathlib

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from sorax.convert import MATRIX, Name
from sorax.errors import UserError
from sorax.functional import Keys
from sorax.linear import Linear
from sorax.read_weights import read_json

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
PREPROCESSOR_FILE = "preprocessor_config.json"


def layer_norm(width: int, eps: float, rngs) -> nnx.LayerNorm:
    """LayerNorm with scale and bias; its variance in two passes, as PyTorch's."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """Self-attention, then an MLP, each behind a LayerNorm and with a residual branch around (ViT).

    qkv_bias: whether queries, keys and values have biases, each.
    """

    def __init__(self, width: int, num_heads: int, ffn_dim: int, activation: str, eps: float, qkv_bias, rngs):
        self.norm1, self.norm2 = (layer_norm(width, eps, rngs) for _ in range(2))
        self.q, self.k, self.v = (Linear(width, width, use_bias=bias, rngs=rngs) for bias in qkv_bias)
        self.o = Linear(width, width, rngs=rngs)
        self.mlp_in, self.mlp_out = Linear(width, ffn_dim, rngs=rngs), Linear(ffn_dim, width, rngs=rngs)
        self.num_heads, self.activation = num_heads, activation

    def __call__(self, x, causal: bool = False):
        h = self.norm1(x)
        q, k, v = (einops.rearrange(f(h), "b n (k a) -> b n k a", k=self.num_heads) for f in (self.q, self.k, self.v))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.o(einops.rearrange(h, "b n k a -> b n (k a)"))
        return x + self.mlp_out(ACTIVATIONS[self.activation](self.mlp_in(self.norm2(x))))


def stack(num_layers: int, rngs, **sizes) -> Block:
    """So many `Block`s, whose parameters lead with [L]."""
    make = nnx.vmap(lambda key: Block(rngs=Keys(params=key), **sizes), in_axes=0, out_axes=0)
    return make(jax.random.split(rngs.params(), num_layers))


def run(blocks: Block, x, causal: bool = False):
    """x `[B, N, D]` through stacked blocks, one after the other."""
    graphdef, layers = nnx.split(blocks)
    return jax.lax.scan(lambda x, layer: (nnx.merge(graphdef, layer)(x, causal), None), x, layers)[0]


# --- Folders


def linear_names(theirs: str, ours: str, layer: int | None = None, bias: str | None = "bias") -> list[Name]:
    """The tensors of a linear layer of PyTorch; bias: what its own is called, None without one."""
    names = [Name(f"{theirs}.weight", f"{ours}/kernel", MATRIX, layer)]
    return names + ([Name(f"{theirs}.{bias}", f"{ours}/bias", layer=layer)] if bias else [])


def norm_names(theirs: str, ours: str, layer: int | None = None) -> list[Name]:
    """The tensors of a LayerNorm of PyTorch."""
    return [Name(f"{theirs}.weight", f"{ours}/scale", layer=layer), Name(f"{theirs}.bias", f"{ours}/bias", layer=layer)]


def fields(path, there: dict, names: dict[str, str], defaults: dict) -> dict:
    """Sizes from a config.json of transformers, which leaves out what is at its default.

    Args:
        path: names it in errors. there: its content, or a part of it. names: theirs -> ours.
        defaults: theirs -> what it is where it is not said; one of these decides the type.

    Raises:
        UserError: a value of another type, or a size that is not positive.
    """
    values = {}
    for key, name in names.items():
        value, default = there.get(key, defaults[key]), defaults[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if type(value) is not type(default) and not (isinstance(default, float) and number):
            raise UserError(f"{path}: {key} is {value!r}: it should be like {default!r}")
        if number and not value > 0:
            raise UserError(f"{path}: {key} is {value!r}: it must be above 0")
        values[name] = value
    return values


def check_sizes(path, *, width: int, num_heads: int, hidden_act: str, image_size: int = 1, patch_size: int = 1):
    """Raises UserError where a config of these makes no network."""
    if width % num_heads:
        raise UserError(f"{path}: the width {width} is no multiple of the {num_heads} heads")
    if hidden_act not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act {hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if image_size % patch_size:
        raise UserError(f"{path}: the image size {image_size} is no multiple of the patch size {patch_size}")


def folder_of(path, what: str, remedy: str) -> pathlib.Path:
    """The folder of a network. Raises UserError where there is none: what it is for, and what to put there."""
    folder = pathlib.Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no {what} (config.json is missing): {remedy}")
    return folder


def normalization(folder: pathlib.Path, mean, std) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float32 [3], that pictures in [0, 1] are normalised with: the folder's, or those given."""
    path = folder / PREPROCESSOR_FILE
    there = read_json(path) if path.is_file() else {}
    found = []
    for key, default in (("image_mean", mean), ("image_std", std)):
        try:
            value = np.asarray(there.get(key, default), np.float32)
        except (TypeError, ValueError):
            value = np.empty(0)
        if value.shape != (3,) or not np.isfinite(value).all() or (key == "image_std" and not (value > 0).all()):
            raise UserError(f"{path}: {key} is {there[key]!r}: it takes three numbers")
        found.append(value)
    return found[0], found[1]


def weights_hash(config, params) -> str:
    """Hash of a network's config and weights (16 hexadecimal digits)."""
    digest = hashlib.sha256(repr(config).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


# --- Pictures


def pictures(frames, side: int, resample: Image.Resampling) -> np.ndarray:
    """Frames uint8 `[T, H, W, 3]` as squares of `side` pixels, uint8 `[T, side, side, 3]`.

    The shorter side is scaled to `side`, smoothed where it shrinks, and the middle is cut out: what transformers' image
    processors do with Pillow.
    """
    height, width = frames.shape[1:3]
    short, long = min(height, width), max(height, width)
    longer = int(side * long / short)
    size = (side, longer) if width <= height else (longer, side)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    scaled = (np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames)
    return np.stack([picture[top : top + side, left : left + side] for picture in scaled])


def spread_frames(video, count: int) -> np.ndarray:
    """`count` frames of a video, spread evenly from the first to the last; some twice where it has fewer."""
    return video[np.linspace(0, len(video) - 1, count).round().astype(int)]


def batches(items, size: int):
    """Stacks of `size` of the items; the last one repeats its last item, so that one shape is compiled.

    Yields (stack, how many of it count).
    """
    for start in range(0, len(items), max(size, 1)):
        some = items[start : start + size]
        yield np.stack(list(some) + [some[-1]] * (size - len(some))), len(some)


def normalized(x, mean, std):
    """uint8 pictures `[..., 3]` as float32, normalised."""
    return (x.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
