"""Diffusion transformer over packed rows of spacetime patches, with the architecture of Wan 2.x.

Legend: B rows, N tokens of a row, P patch size flattened, D width, K heads, A head dim, L layers, M text tokens,
S noise levels of a row (level 0 is clean, level s belongs to the row's sample s).
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sorax.attention import attention
from sorax.functional import Keys
from sorax.linear import Linear
from sorax.routing import narrow, widen

BLOCK_INPUT = "block_input"  # what a block keeps for its backward pass, by this name
REMAT = ("none", "full", "dots", "offload")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Hyper-parameters; `WanTransformer3DModel` of diffusers has the same, under the names in brackets."""

    in_channels: int = 16  # [in_channels]
    out_channels: int = 16  # [out_channels]
    patch_size: tuple[int, int, int] = (1, 2, 2)  # [patch_size]
    num_layers: int = 30  # [num_layers]
    num_heads: int = 12  # [num_attention_heads]
    head_dim: int = 128  # [attention_head_dim]
    ffn_dim: int = 8960  # [ffn_dim]
    text_dim: int = 4096  # [text_dim]
    freq_dim: int = 256  # [freq_dim]
    rope_theta: float = 10000.0
    eps: float = 1e-6  # [eps]
    mup_base_width: int = 0  # training only: the width whose initial scales and learning rates are meant; 0: this one

    def __post_init__(self):
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"head_dim must be even and at least 6 (it is split over t, h, w), got {self.head_dim}")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Head dim given to t, h and w; 44, 42, 42 of 128."""
        space = 2 * (self.head_dim // 6)
        return (self.head_dim - 2 * space, space, space)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.patch_size[0] * self.patch_size[1] * self.patch_size[2]


def _single_row_flat(norm):
    """norm, of a single row `[1, N, D]` as `[N, D]`: XLA's faster CPU kernels sum over the former ten times as long."""

    def wrapped(x, *others):
        single = x.ndim == 3 and x.shape[0] == 1
        return norm(x[0], *others)[None] if single else norm(x, *others)

    return functools.wraps(norm)(wrapped)


@_single_row_flat
def layer_norm(x, eps, scale=None, bias=None):
    """LayerNorm over the last axis, in float32; without parameters where none are given."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x if scale is None else x * scale + bias


@_single_row_flat
def rms_norm(x, scale, eps):
    """RMSNorm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def gelu(x):
    """GELU's tanh approximation (Hendrycks and Gimpel 2016), by the sigmoid that it equals: cheaper on a CPU."""
    return x * jax.nn.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))  # 2 * sqrt(2 / pi)


def rope_of(angles):
    """Factors `[B, N, A]` each of `apply_rope` for angles `[B, N, A / 2]`: cosines twice, sines with either sign.

    Spread by a product, exact, so that they are made once: XLA would compute them anew in each loop that reads them,
    for all heads of all layers, which is 7 % of a training step on a CPU.
    """
    twice = jnp.repeat(jnp.eye(angles.shape[-1], dtype=jnp.float32), 2, axis=1)
    signed = twice * jnp.tile(jnp.float32([-1, 1]), angles.shape[-1])
    spread = functools.partial(jnp.matmul, precision="highest")
    return spread(jnp.cos(angles), twice), spread(jnp.sin(angles), signed)


def rope_factors(positions, config: DiTConfig):
    """Factors `[B, N, A]` of 3-D rotary embedding for positions `[B, N, 3]` (t, h, w)."""
    angles = []
    for axis, dim in enumerate(config.rope_dims):
        freqs = config.rope_theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        angles.append(positions[..., axis, None].astype(jnp.float32) * freqs)
    return rope_of(jnp.concatenate(angles, axis=-1))


def apply_rope(x, cos, sin):
    """Rotates the interleaved pairs of x `[B, N, K, A]` (RoFormer; pair layout of Wan) by the factors of `rope_of`."""
    pairs = x.astype(jnp.float32)
    # (even, odd) * cos + (odd, even) * (-sin, sin): a fused loop each way, where slices would have pads for a gradient.
    turned = jnp.flip(pairs.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return (pairs * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def sinusoids(x, dim: int):
    """Features `[..., dim]` of numbers, cosines first: DDPM's of a timestep in [0, 1000], as diffusers flips them."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = x[..., None].astype(jnp.float32) * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _remat_policy(name):
    policies = jax.checkpoint_policies
    if name == "dots":
        # Attention is none of the products that it means, and as dear as they are.
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("attention")
        )
    if name == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    if name != "full":
        raise ValueError(f"remat must be one of {REMAT}, got {name!r}")
    return policies.nothing_saveable


def run_layers(step, x, layers, *, remat: str = "none", unroll: bool = False):
    """x after stacked layers, one after the other: step(x, layer) -> x for each slice of their parameters `[L, ...]`.

    remat, unroll: see `DiT.__call__`.
    """

    def body(x, layer):
        return step(checkpoint_name(x, BLOCK_INPUT), layer), None

    if remat != "none":
        body = jax.checkpoint(body, policy=_remat_policy(remat), prevent_cse=False)
    if unroll:
        # Split, not sliced one by one: the gradient is one concatenation, not a sum of padded layers.
        leaves, treedef = jax.tree.flatten(layers)
        ones = (1,) * len(leaves[0])
        for layer in zip(*(jax.lax.split(p, ones) for p in leaves)):
            x, _ = body(x, jax.tree.unflatten(treedef, [jnp.squeeze(p, 0) for p in layer]))
        return x
    return jax.lax.scan(body, x, layers)[0]


def run_some_layers(step, x, layers, first: int, last: int):
    """x after layers first .. last - 1 of stacked ones, none of which is copied. Without a gradient."""

    def body(k, x):
        return step(x, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, k, keepdims=False), layers))

    return jax.lax.fori_loop(first, last, body, x)


def linear(n_in, n_out, rngs, std=None):
    init = nnx.initializers.xavier_uniform() if std is None else nnx.initializers.normal(std)
    return Linear(n_in, n_out, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Self- or cross-attention with RMSNorm of queries and keys over the whole width, before the head split."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        D = config.width
        self.q, self.k, self.v, self.o = (linear(D, D, rngs) for _ in range(4))
        self.norm_q = nnx.Param(jnp.ones(D))
        self.norm_k = nnx.Param(jnp.ones(D))
        self.num_heads, self.eps = config.num_heads, config.eps

    def __call__(self, x, context, x_segment_ids, context_segment_ids, attend, rope=None, **options):
        q = rms_norm(self.q(x), self.norm_q[...], self.eps)
        k = rms_norm(self.k(context), self.norm_k[...], self.eps)
        q, k, v = (
            einops.rearrange(y, "b n (k a) -> b n k a", k=self.num_heads) for y in (q, k, self.v(context))
        )
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        out = attend(q, k, v, x_segment_ids, context_segment_ids, **options)
        return self.o(einops.rearrange(out, "b n k a -> b n (k a)"))


class Block(nnx.Module):
    """Self-attention and MLP modulated by the noise level (AdaLN), with ungated text cross-attention between."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        D = config.width
        self.self_attention = Attention(config, rngs)
        self.cross_attention = Attention(config, rngs)
        self.norm_scale = nnx.Param(jnp.ones(D))
        self.norm_bias = nnx.Param(jnp.zeros(D))
        self.mlp_in = linear(D, config.ffn_dim, rngs)
        self.mlp_out = linear(config.ffn_dim, D, rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, D)) * D**-0.5)
        self.eps = config.eps

    def __call__(self, x, row):
        # The six vectors are made once a level and given to tokens by a one-hot product, each where it is used: exact,
        # and its gradient is a product rather than a scatter.
        table = row["level_proj"] + self.modulation[...].astype(jnp.float32)  # [B, S, 6, D]
        dtype, ids, constrain = x.dtype, row["segment_ids"], row["constrain"]

        def given(k):
            vector = constrain(table[:, :, k], tokens=False)
            return constrain(jnp.einsum("bns,bsd->bnd", row["level_one_hot"], vector))  # float32

        # What goes into and comes out of the products is pinned: else the compiler may split its width too, and gather.
        h = constrain((layer_norm(x, self.eps) * (1 + given(1)) + given(0)).astype(dtype))
        h = self.self_attention(h, h, ids, ids, row["attend"], rope=row["rope"])
        x = (x.astype(jnp.float32) + constrain(h) * given(2)).astype(dtype)

        h = constrain(layer_norm(x, self.eps, self.norm_scale[...], self.norm_bias[...]).astype(dtype))
        text, text_ids = row["text"], row["text_segment_ids"]
        h = self.cross_attention(h, text, ids, text_ids, row["attend_text"], key_bias=row["text_bias"])
        x = x + constrain(h)

        h = constrain((layer_norm(x, self.eps) * (1 + given(4)) + given(3)).astype(dtype))
        h = constrain(self.mlp_out(gelu(self.mlp_in(h))))
        return (x.astype(jnp.float32) + h * given(5)).astype(dtype)


class DiT(nnx.Module):
    """Velocity network of `WanTransformer3DModel`, for packed rows. Layers are stacked: parameters lead with [L]."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.config = config
        D = config.width
        self.patch_embed = linear(config.patch_dim, D, rngs)
        self.text_in = linear(config.text_dim, D, rngs, std=0.02)
        self.text_out = linear(D, D, rngs, std=0.02)
        self.time_in = linear(config.freq_dim, D, rngs, std=0.02)
        self.time_out = linear(D, D, rngs, std=0.02)
        self.time_proj = linear(D, 6 * D, rngs)
        stacked = nnx.vmap(lambda key: Block(config, Keys(params=key)), in_axes=0, out_axes=0)
        self.blocks = stacked(jax.random.split(rngs.params(), config.num_layers))
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, D)) * D**-0.5)
        patch_out = config.patch_dim // config.in_channels * config.out_channels
        # Zero at the start: the untrained network predicts no velocity, as in DiT.
        self.proj_out = Linear(D, patch_out, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self, tokens, positions, segment_ids, levels, level_index, text, text_segment_ids, text_bias,
        *, remat: str = "none", unroll: bool = False, constrain=lambda x, tokens=True: x, attend=attention,
        attend_text=attention, route=None, route_layers: tuple[int, int] = (1, -1), remember=None,
    ):  # fmt: skip
        """Predicts `velocity = noise - x0` for every token of the rows.

        Args:
            tokens: `[B, N, P]` noisy patches, P ordered (c, pt, ph, pw).
            positions: `[B, N, 3]` int (t, h, w) of each patch in its own sample.
            segment_ids: `[B, N]` int, 0 = padding.
            levels: `[B, S]` noise levels (sigma) in [0, 1]; level_index: `[B, N]` int, the level of each token.
            text: `[B, M, text_dim]` text encoder outputs; text_segment_ids: `[B, M]`; text_bias: `[B, M]` float32
                (`sorax.text.slot_bias`).
            remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full" (all but the
                input of each block), "offload" (as full, with those inputs in the memory of the host meanwhile).
            unroll: a Python loop over the layers in place of a scan: compiles in proportion to their number, and runs
                faster on a CPU, where a scan copies what it keeps for the backward pass.
            route: `sorax.routing.Route` of the tokens that skip some layers, in training; None: none does.
            route_layers: the first layer that they skip and the first that they do not, as in slices.
            remember: in sampling, in place of running all layers `(x, x after the first, function of that for the
                others) -> (x after all, memory)`, see `sorax.sampler.reuse_layers`.
            constrain: a sharding constraint, if any: applied to activations `[B, N, ...]`, and with tokens=False to
                those of levels and text, `[B, S, ...]` and `[B, M, ...]`.
            attend, attend_text: attention of tokens to each other and to text, as `sorax.attention.attention`.

        Returns:
            velocity `[B, N, P_out]`, ordered as `tokens`, in float32; with `remember` (velocity, memory).
        """
        config, dtype = self.config, tokens.dtype
        x = constrain(self.patch_embed(constrain(tokens)))
        features = sinusoids(1000.0 * levels, config.freq_dim).astype(dtype)
        time = constrain(self.time_out(jax.nn.silu(self.time_in(features))), tokens=False)  # [B, S, D]
        level_proj = einops.rearrange(self.time_proj(jax.nn.silu(time)), "b s (six d) -> b s six d", six=6)
        row = dict(
            segment_ids=segment_ids,
            rope=tuple(constrain(factors) for factors in rope_factors(positions, config)),
            level_proj=constrain(level_proj.astype(jnp.float32), tokens=False),
            level_one_hot=constrain(jax.nn.one_hot(level_index, levels.shape[1], dtype=jnp.float32)),
            text=constrain(self.text_out(gelu(self.text_in(text))), tokens=False),
            text_segment_ids=text_segment_ids,
            text_bias=text_bias,
            constrain=constrain,
            attend=attend,
            attend_text=attend_text,
        )
        graphdef, layers = nnx.split(self.blocks)

        def run(x, row, layers):
            step = lambda x, layer: constrain(nnx.merge(graphdef, layer)(x, row))  # noqa: E731
            return run_layers(step, x, layers, remat=remat, unroll=unroll)

        memory = None
        if remember is not None:
            step = lambda x, layer: constrain(nnx.merge(graphdef, layer)(x, row))  # noqa: E731
            after_first = run_some_layers(step, x, layers, 0, 1)
            rest = functools.partial(run_some_layers, step, layers=layers, first=1, last=config.num_layers)
            x, memory = remember(x, after_first, rest)
        elif route is None:
            x = run(x, row, layers)
        else:
            first, middle, last = (
                jax.tree.map(lambda p: p[part], layers)  # noqa: B023 (used at once)
                for part in (slice(0, route_layers[0]), slice(*route_layers), slice(route_layers[1], None))
            )
            x = run(x, row, first)
            through = {name: jax.tree.map(lambda a: narrow(a, route), row[name])
                       for name in ("segment_ids", "rope", "level_one_hot")}  # fmt: skip
            x = widen(x, run(narrow(x, route), row | through, middle), route)
            x = run(x, row, last)

        table = self.modulation[...].astype(jnp.float32) + time.astype(jnp.float32)[:, :, None]  # [B, S, 2, D]
        take = functools.partial(jnp.einsum, "bns,bsd->bnd", row["level_one_hot"])
        shift, scale = take(table[:, :, 0]), take(table[:, :, 1])
        x = (layer_norm(x, config.eps) * (1 + scale) + shift).astype(dtype)
        out = constrain(self.proj_out(x)).astype(jnp.float32)
        pt, ph, pw = config.patch_size
        out = einops.rearrange(out, "b n (pt ph pw c) -> b n (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return out if remember is None else (out, memory)
