"""Text encoder of the T5 family (UMT5 and T5 v1.1) over packed captions.

Legend: B rows, M text tokens of a row, K heads, A head dim, D width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sorax.attention import attention
from sorax.linear import Linear

PAD_ID, EOS_ID = 0, 1  # as T5 has them
MAX_SLOTS = 512  # text slots of one caption, as in Wan: the unused ones are zeros, and are attended


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Hyper-parameters of the text encoder; the names of transformers' `UMT5Config` stand in brackets."""

    vocab_size: int = 512  # [vocab_size]; the tokenizer's or more
    width: int = 512  # [d_model]
    num_layers: int = 8  # [num_layers]
    num_heads: int = 6  # [num_heads]
    head_dim: int = 64  # [d_kv]
    ffn_dim: int = 1024  # [d_ff]
    num_buckets: int = 32  # [relative_attention_num_buckets]
    max_distance: int = 128  # [relative_attention_max_distance]
    shared_bias: bool = False  # True: T5 (bias of the first layer serves all); False: UMT5 (one a layer)
    eps: float = 1e-6  # [layer_norm_epsilon]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a learned scale; computed in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def relative_bucket(distance, num_buckets: int, max_distance: int):
    """Bucket of `key position - query position`: exact when near, logarithmic to `max_distance` (T5, bidirectional)."""
    half = num_buckets // 2
    exact = half // 2
    far = jnp.abs(distance)
    log_ratio = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    large = jnp.minimum(exact + (log_ratio * (half - exact)).astype(jnp.int32), half - 1)
    return jnp.where(distance > 0, half, 0) + jnp.where(far < exact, far, large)


def relative_bias(table, length: int, max_distance: int):
    """Attention bias `[K, M, M]` from a bucket table `[num_buckets, K]`.

    Only the 2M - 1 distances are looked up, by a product with one-hot rows (its gradient is a product too, not
    a scatter), then laid out as a Toeplitz matrix by a reshape.
    """
    num_buckets = table.shape[0]
    distance = jnp.concatenate([jnp.arange(length), jnp.arange(-length, 0)])  # [2M], read modulo 2M
    one_hot = jax.nn.one_hot(relative_bucket(distance, num_buckets, max_distance), num_buckets, dtype=table.dtype)
    line = (one_hot @ table).T  # [K, 2M]
    tiled = jnp.tile(line, (1, length))[:, : length * (2 * length - 1)]
    return tiled.reshape(-1, length, 2 * length - 1)[:, :, :length]  # [K, M, M]: row i starts i places earlier


class Layer(nnx.Module):
    """One encoder layer: self-attention without logit scaling, then a gated-GELU MLP; both pre-norm."""

    def __init__(self, config: TextConfig, has_bias: bool, rngs: nnx.Rngs):
        D, F, inner = config.width, config.ffn_dim, config.num_heads * config.head_dim

        def matrix(n_in, n_out, std):
            return Linear(
                n_in, n_out, use_bias=False, kernel_init=nnx.initializers.normal(std), rngs=rngs
            )

        # T5's own scales: unscaled logits ask for small queries.
        self.norm_attention = RMSNorm(D, config.eps)
        self.q = matrix(D, inner, (D * config.head_dim) ** -0.5)
        self.k = matrix(D, inner, D**-0.5)
        self.v = matrix(D, inner, D**-0.5)
        self.o = matrix(inner, D, inner**-0.5)
        self.norm_mlp = RMSNorm(D, config.eps)
        self.wi_gate = matrix(D, F, D**-0.5)
        self.wi = matrix(D, F, D**-0.5)
        self.wo = matrix(F, D, F**-0.5)
        self.num_heads = config.num_heads
        if has_bias:
            self.bias = nnx.Param(0.1 * jax.random.normal(rngs.params(), (config.num_buckets, config.num_heads)))

    def __call__(self, x, segment_ids, bias):
        B, M, _ = x.shape
        h = self.norm_attention(x)
        q, k, v = (f(h).reshape(B, M, self.num_heads, -1) for f in (self.q, self.k, self.v))
        h = attention(q, k, v, segment_ids, segment_ids, bias=bias, scale=1.0)
        x = x + self.o(h.reshape(B, M, -1))
        h = self.norm_mlp(x)
        return x + self.wo(jax.nn.gelu(self.wi_gate(h), approximate=True) * self.wi(h))


class TextEncoder(nnx.Module):
    """T5-family encoder that reads several captions laid end to end in a row.

    Relative positions make a caption's encoding independent of where in the row it stands.
    """

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.width)))
        self.layers = nnx.List(
            [Layer(config, i == 0 or not config.shared_bias, rngs) for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.width, config.eps)

    def __call__(self, text_tokens, text_segment_ids):
        """Encodes packed captions.

        Args:
            text_tokens: `[B, M]` int; 0 is an empty slot, which is neither read nor attended here.
            text_segment_ids: `[B, M]` int; 0 is padding of the row.

        Returns:
            `[B, M, D]`; zeros at empty slots and padding, as Wan has it.
        """
        length = text_tokens.shape[1]
        used = text_tokens != PAD_ID
        segment_ids = jnp.where(used, text_segment_ids, 0)
        x = self.embedding[...][text_tokens]
        bias = None
        for layer in self.layers:
            if bias is None or not self.config.shared_bias:
                bias = relative_bias(layer.bias[...].astype(jnp.float32), length, self.config.max_distance)
            x = layer(x, segment_ids, bias)
        return self.norm(x) * used[..., None].astype(x.dtype)


def slot_bias(text_tokens, text_segment_ids, num_samples: int):
    """Logit bias `[B, M]` float32 that lets a caption's empty slots in a row stand for all its `512 - L` unused ones.

    Wan attends to 512 slots a caption with no mask; the unused ones are equal, so e keys that each carry
    `log((512 - L) / e)` give the same softmax. A row has one of them a caption, and more where a caption was dropped.
    Real tokens get 0.
    """
    empty = text_tokens == PAD_ID
    member = text_segment_ids[:, :, None] == jnp.arange(num_samples + 1)  # [B, M, S + 1]

    def per_caption(where):  # how many slots of the caption of each slot
        return jnp.take_along_axis(jnp.sum(member & where[:, :, None], axis=1), text_segment_ids, axis=1)

    unused = jnp.maximum(MAX_SLOTS - per_caption(~empty), 0)
    share = unused / jnp.maximum(per_caption(empty), 1)
    log_share = jnp.where(unused > 0, jnp.log(jnp.maximum(share, 1e-30)), -1e30)
    return jnp.where(empty, log_share.astype(jnp.float32), 0.0)


def drop_captions(key, text_tokens, text_segment_ids, num_samples: int, probability: float):
    """Replaces whole captions by the empty one (its end-of-sequence token alone), which guidance is learned from.

    Args:
        text_tokens, text_segment_ids: `[B, M]` int, captions laid end to end.

    Returns:
        text_tokens `[B, M]`; the segment ids stay as they are.
    """
    B = text_tokens.shape[0]
    dropped = jax.random.bernoulli(key, probability, (B, num_samples + 1))
    dropped = jnp.take_along_axis(dropped, text_segment_ids, axis=1) & (text_segment_ids != 0)
    before = jnp.pad(text_segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = text_segment_ids != before
    return jnp.where(dropped, jnp.where(starts, EOS_ID, PAD_ID), text_tokens)


def drop_embeds(text_embeds, text_tokens, kept_tokens, empty_caption):
    """Embeddings of captions some of which `drop_captions` has replaced by the empty one.

    Args:
        text_embeds: `[B, M, D]`, of text_tokens `[B, M]`. kept_tokens: `[B, M]`, what `drop_captions` made of them.
        empty_caption: `[D]`, the embedding of the empty caption's one token.

    Returns:
        `[B, M, D]`, what the encoder gives of kept_tokens.
    """
    changed, starts = (kept_tokens != text_tokens)[..., None], (kept_tokens == EOS_ID)[..., None]
    return jnp.where(changed, jnp.where(starts, empty_caption, 0), text_embeds)
