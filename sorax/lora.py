"""LoRA: a frozen DiT with a low-rank branch beside some of its affine layers (Hu et al. 2021, arXiv:2106.09685).

    y = x W + bias + alpha / rank (x A) B        x [..., n], W [n, m], A [n, r], B [r, m]; B is zero at the start

In training the branch is computed as it stands (`sorax.linear.Linear`). Merged into W, it would need another copy of
the frozen kernels and, for the gradients of A and B, those of every W: at 14B parameters more memory than all else, and
half again the time. The branch costs r (n + m) operations a token beside n m, and no memory of the order of W. It also
keeps what is learned apart from the rounding of a frozen W in bfloat16, whose steps are larger than most of a LoRA.
What samples or is exported after training is W + alpha / rank A B in float32, merged layer by layer as it is read.

Adapters are a tree of their own, with the paths of the DiT: `blocks/self_attention/q/lora_a` [L, n, r] and `lora_b`
[L, r, m]. A layer is adapted in all L blocks, whose parameters are stacked.
"""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sorax import config as config_lib
from sorax import convert, functional
from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError

LEAVES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The `lora` section of a DiT experiment.

    rank: r; 0: there is no LoRA.
    alpha: the branch is scaled by alpha / rank; 0: as the rank, so that it is not scaled.
    targets: the layers, by the names that diffusers and PEFT give them. Each is a regular expression that a whole name
        such as blocks.0.attn1.to_q, or what stands behind one of its dots, must match: to_q is in self-attention
        (attn1) and cross-attention (attn2), attn1.to_q in the first alone.
    init: file or folder of a LoRA to start from, as a path or inside the run folder; see `sorax.lora_files`.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    init: str = ""

    def __post_init__(self):
        if self.rank < 0 or self.alpha < 0:
            raise ValueError(f"rank is {self.rank} and alpha {self.alpha}: neither is below 0")
        if self.init and not self.rank:
            raise ValueError(f"init is {self.init!r}, but rank is 0 (no LoRA): set rank to that of the file")

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


def read(config) -> LoRAConfig:
    """The `lora` section of a DiT run, which older ones do not have."""
    return config_lib.build(LoRAConfig, config.get("lora") or {}, "lora")


def frozen_networks(config) -> tuple[str, ...]:
    """Networks of a DiT run that keep the weights of config.init: with a LoRA both, else those of train.freeze."""
    return ("dit", "text") if read(config).rank else tuple(config.train.get("freeze") or ())


def linear_layers(config: DiTConfig) -> dict[str, tuple[str, int]]:
    """Affine layers of the blocks: name in diffusers -> (path of ours, block), as blocks.0.attn1.to_q ->
    (blocks/self_attention/q, 0)."""
    return {
        name.theirs.removesuffix(".weight"): (name.ours.removesuffix("/kernel"), name.layer)
        for name in convert.dit_names(config) if name.layer is not None and name.ours.endswith("/kernel")
    }  # fmt: skip


def kind(name: str) -> str:
    """A layer's name without its block: attn1.to_q of blocks.0.attn1.to_q."""
    return name.split(".", 2)[2]


def adapted_layers(config: DiTConfig, targets) -> tuple[str, ...]:
    """Paths of the layers that targets name.

    Raises:
        UserError: a target that is no regular expression, matches no layer, or matches it in some blocks only.
    """
    layers, found = linear_layers(config), set()
    known = ", ".join(dict.fromkeys(map(kind, layers)))
    for target in targets:
        try:
            names = [name for name in layers if re.fullmatch(rf"(.*\.)?({target})", name)]
        except re.error as error:
            raise UserError(f"config.lora.targets: {target!r} is no regular expression ({error})") from error
        if not names:
            raise UserError(f"config.lora.targets: {target!r} matches no layer, and would train nothing: the layers of "
                            f"a block are {known}")  # fmt: skip
        blocks = collections.Counter(layers[name][0] for name in names)
        if set(blocks.values()) != {config.num_layers}:
            raise UserError(f"config.lora.targets: {target!r} matches {names[0]} in some blocks only; all blocks are "
                            f"adapted alike: name layers of a block, which are {known}")  # fmt: skip
        found |= blocks.keys()
    if not found:
        raise UserError(f"config.lora.targets is empty: name layers of a block, which are {known}")
    return tuple(dict.fromkeys(ours for ours, _ in layers.values() if ours in found))


def adapted_dit(config: DiTConfig, lora: LoRAConfig):
    """(graph definition of a DiT with adapters, shapes of the adapters).

    The definition is for the parameters that `join` makes. Raises UserError as `adapted_layers` does.
    """
    paths = adapted_layers(config, lora.targets)

    def build(config, rngs):
        dit = DiT(config, rngs)
        for path in paths:
            layer = functools.reduce(getattr, path.split("/"), dit)
            L, n, m = layer.kernel.shape
            layer.lora_a = nnx.Param(jnp.zeros((L, n, lora.rank)))
            layer.lora_b = nnx.Param(jnp.zeros((L, lora.rank, m)))
            layer.lora_scale = lora.scale
        return dit

    graphdef, shapes = functional.abstract(build, config)
    return graphdef, unflatten_dict({path: x for path, x in flatten_dict(shapes).items() if path[-1] in LEAVES})


def init(shapes, key):
    """Fresh adapters: A uniform within 1 / sqrt(n), as PEFT draws it, and B zero."""
    flat = flatten_dict(shapes)
    keys = dict(zip(flat, jax.random.split(key, len(flat))))

    def draw(path, x):
        if path[-1] == "lora_b":
            return jnp.zeros(x.shape, x.dtype)
        bound = 1 / math.sqrt(x.shape[-2])
        return jax.random.uniform(keys[path], x.shape, x.dtype, -bound, bound)

    return unflatten_dict({path: draw(path, x) for path, x in flat.items()})


def join(dit, adapters):
    """Parameters for the graph definition of `adapted_dit`: those of the DiT, and its adapters in their places."""
    return unflatten_dict(flatten_dict(dit) | flatten_dict(adapters))


def merge(dit, adapters, scale: float):
    """Parameters of a DiT with the adapters added to its kernels, each of which is a `MergedParam`.

    dit: tree of arrays, or of what is left on the disk. adapters: tree of numpy arrays.
    """
    flat = flatten_dict(dit)
    flat_adapters = flatten_dict(adapters)
    for path in {path[:-1] for path in flat_adapters}:
        a, b = (flat_adapters[(*path, leaf)] for leaf in LEAVES)
        flat[(*path, "kernel")] = MergedParam(flat[(*path, "kernel")], a, b, scale)
    return unflatten_dict(flat)


class MergedParam:
    """W + scale A B, float32 `[L, n, m]`, of a W that may be on the disk: computed when it is read, layer by layer.

    `merged[i]` is that of layer i, `np.asarray(merged)` all of it.
    """

    is_stacked, dtype = True, np.dtype(np.float32)

    def __init__(self, kernel, a, b, scale: float):
        self._kernel, self._a, self._b, self._scale = kernel, a, b, np.float32(scale)
        self.shape, self.size, self.ndim = tuple(kernel.shape), kernel.size, kernel.ndim

    def __getitem__(self, layer) -> np.ndarray:
        a, b = (np.asarray(x[layer], np.float32) for x in (self._a, self._b))
        return np.asarray(self._kernel[layer], np.float32) + self._scale * (a @ b)

    def __array__(self, dtype=None, copy=None):
        return np.stack([np.asarray(self[layer], dtype) for layer in range(self.shape[0])])
