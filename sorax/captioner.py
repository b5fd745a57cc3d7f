"""Captioner over packed rows: a transformer reads the patches of videos, another writes their captions word by word.

The encoder sees packed rows as the DiT does, and each sample sees itself alone. The decoder's rows hold the captions of
the same samples, laid end to end: every token sees those of its own caption before it and all patches of its own
sample. Read token ids in place of patches, and it rewrites captions: a text-to-text model. After Vaswani et al. 2017,
with the norms and rotary positions of the DiT. Those tell patches apart by what lies between them; a caption says where
a thing is in the frame, so that patches have their absolute positions added, too: sines and cosines (ibid.), linearly.
Beside the linear embedding of a patch goes a layer with a nonlinearity, which sees what moves within it: of several
frames a patch may hold more than the width.

Legend: B rows, N patches of a row, M text tokens of a row, P patch size flattened, D width, K heads, A head dim, L
layers, V vocabulary, X captions that are written together, of all rows, T tokens of the longest.
"""

import dataclasses
import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from sorax.attention import MASKED, attention
from sorax.dit import Attention, apply_rope, gelu, linear, rms_norm, rope_factors, rope_of, run_layers, sinusoids
from sorax.functional import Keys
from sorax.text import PAD_ID

READS = ("pixels", "latents", "text")


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Hyper-parameters.

    reads: patches of in_channels channels, of "pixels" or "latents" of videos; or "text", tokens of its own vocabulary.
    kinds: of captions that it writes, see `data_pipelines.caption_kinds`; each has a start token of its own.
    """

    reads: str = "pixels"
    in_channels: int = 3
    patch_size: tuple[int, int, int] = (1, 16, 16)
    vocab_size: int = 512
    kinds: tuple[str, ...] = ("short", "detailed")
    encoder_layers: int = 12
    decoder_layers: int = 12
    num_heads: int = 12
    head_dim: int = 64
    ffn_dim: int = 3072
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self):
        if self.reads not in READS:
            raise ValueError(f"reads is {self.reads!r}: use one of {', '.join(READS)}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"head_dim must be even and at least 6 (it is split over t, h, w), got {self.head_dim}")
        for name in ("vocab_size", "encoder_layers", "decoder_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it is at least 1")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds are {self.kinds}: name each once, at least one")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Head dim given to t, h and w of patches; all of it to the place of a token."""
        space = 0 if self.reads == "text" else 2 * (self.head_dim // 6)
        return (self.head_dim - 2 * space, space, space)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * math.prod(self.patch_size)

    def start_token(self, kind):
        """What a caption of a kind begins with: an id behind the vocabulary."""
        return self.vocab_size + kind


class CachedAttention(Attention):
    """Attention whose keys and values can be kept: `[B, M, K, A]` each."""

    def keys(self, context, rope=None):
        k = rms_norm(self.k(context), self.norm_k[...], self.eps)
        k, v = (self._heads(y) for y in (k, self.v(context)))
        return (k if rope is None else apply_rope(k, *rope)), v

    def attend_to(self, x, keys, x_segment_ids, segment_ids, attend, rope=None, **options):
        q = self._heads(rms_norm(self.q(x), self.norm_q[...], self.eps))
        q = q if rope is None else apply_rope(q, *rope)
        out = attend(q, *keys, x_segment_ids, segment_ids, **options)
        return self.o(einops.rearrange(out, "b n k a -> b n (k a)"))

    def _heads(self, y):
        return einops.rearrange(y, "b n (k a) -> b n k a", k=self.num_heads)


class EncoderBlock(nnx.Module):
    """Self-attention and MLP, both behind a norm."""

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        D = config.width
        self.attention = CachedAttention(config, rngs)
        self.norm_attention, self.norm_mlp = nnx.Param(jnp.ones(D)), nnx.Param(jnp.ones(D))
        self.mlp_in, self.mlp_out = linear(D, config.ffn_dim, rngs), linear(config.ffn_dim, D, rngs)
        self.eps = config.eps

    def __call__(self, x, row):
        h = row["constrain"](rms_norm(x, self.norm_attention[...], self.eps))
        ids = row["segment_ids"]
        x = x + row["constrain"](self.attention(h, h, ids, ids, row["attend"], rope=row["rope"]))
        h = row["constrain"](rms_norm(x, self.norm_mlp[...], self.eps))
        return x + row["constrain"](self.mlp_out(gelu(self.mlp_in(h))))


class DecoderBlock(nnx.Module):
    """Self-attention to the words before, cross-attention to the video, and MLP, each behind a norm."""

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        D = config.width
        self.self_attention, self.cross_attention = (CachedAttention(config, rngs) for _ in range(2))
        self.norm_self, self.norm_cross, self.norm_mlp = (nnx.Param(jnp.ones(D)) for _ in range(3))
        self.mlp_in, self.mlp_out = linear(D, config.ffn_dim, rngs), linear(config.ffn_dim, D, rngs)
        self.eps = config.eps

    def __call__(self, x, row):
        """x `[B, M, D]` of packed captions."""
        constrain, ids = (lambda x: row["constrain"](x, tokens=False)), row["text_segment_ids"]
        h = constrain(rms_norm(x, self.norm_self[...], self.eps))
        # Softmax over all pairs of the row's text: it is short.
        h = self.self_attention(h, h, ids, ids, attention, rope=row["text_rope"], bias=row["causal"])
        x = x + constrain(h)
        h = constrain(rms_norm(x, self.norm_cross[...], self.eps))
        h = self.cross_attention(h, row["memory"], ids, row["segment_ids"], row["attend_text"])
        x = x + constrain(h)
        return x + constrain(self._mlp(x))

    def step(self, x, rope, memory, own, position, x_ids, memory_ids, attend):
        """The next token of X captions: x `[X, D]`.

        rope: of its position. memory: keys and values of the video. own: those `[X, T, K, A]` of the tokens before,
        to which this one's are added. x_ids `[B, X / B]`, memory_ids `[B, N]`: segments. Returns x, own.
        """
        h = rms_norm(x, self.norm_self[...], self.eps)[:, None]  # [X, 1, D]
        new = self.self_attention.keys(h, rope)
        own = tuple(jax.lax.dynamic_update_slice_in_dim(old, y.astype(old.dtype), position, axis=1)
                    for old, y in zip(own, new))  # fmt: skip
        seen = jnp.broadcast_to((jnp.arange(own[0].shape[1]) <= position).astype(jnp.int32), own[0].shape[:2])
        x = x + self.self_attention.attend_to(h, own, jnp.ones_like(seen[:, :1]), seen, attention, rope)[:, 0]
        h = rms_norm(x, self.norm_cross[...], self.eps).reshape(*x_ids.shape, -1)  # [B, X / B, D]
        x = x + self.cross_attention.attend_to(h, memory, x_ids, memory_ids, attend).reshape(x.shape)
        return x + self._mlp(x), own

    def _mlp(self, x):
        return self.mlp_out(gelu(self.mlp_in(rms_norm(x, self.norm_mlp[...], self.eps))))


class Captioner(nnx.Module):
    """Encoder and decoder; see the module. Layers are stacked: parameters lead with [L]."""

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        self.config = config
        D, table = config.width, config.vocab_size + len(config.kinds)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (table, D)))
        if config.reads != "text":
            self.patch_embed, self.pos_embed = linear(config.patch_dim, D, rngs), linear(3 * config.head_dim, D, rngs)
            self.patch_in = linear(config.patch_dim, config.ffn_dim, rngs)
            self.patch_out = linear(config.ffn_dim, D, rngs)

        def stacked(cls, count):
            build = nnx.vmap(lambda key: cls(config, Keys(params=key)), in_axes=0, out_axes=0)
            return build(jax.random.split(rngs.params(), count))

        self.encoder = stacked(EncoderBlock, config.encoder_layers)
        self.decoder = stacked(DecoderBlock, config.decoder_layers)
        self.norm_memory, self.norm_out = nnx.Param(jnp.ones(D)), nnx.Param(jnp.ones(D))
        self.head = linear(D, config.vocab_size, rngs, std=0.02)

    def encode(self, tokens, positions, segment_ids, *, remat="none", unroll=False, attend=attention,
               constrain=lambda x, tokens=True: x):  # fmt: skip
        """What the decoder attends to, `[B, N, D]`.

        Args:
            tokens: `[B, N, P]` patches, or `[B, N, 1]` int token ids where it reads text.
            positions: `[B, N, 3]` int (t, h, w); of text (place, 0, 0). segment_ids: `[B, N]` int, 0 = padding.
            the others: as of `__call__`.
        """
        if self.config.reads == "text":
            x = self.embedding[...][tokens[..., 0].astype(jnp.int32)]
        else:
            where = sinusoids(positions, self.config.head_dim)  # [B, N, 3, A]
            where = self.pos_embed(where.reshape(*positions.shape[:2], -1).astype(tokens.dtype))
            tokens = constrain(tokens)
            detail = constrain(self.patch_out(gelu(self.patch_in(tokens))))
            x = self.patch_embed(tokens) + constrain(where) + detail
        rope = tuple(constrain(factors) for factors in rope_factors(positions, self.config))
        row = dict(segment_ids=segment_ids, rope=rope, attend=attend, constrain=constrain)
        x = _run(self.encoder, constrain(x), row, remat, unroll)
        return rms_norm(x, self.norm_memory[...], self.config.eps)

    def __call__(
        self, tokens, positions, segment_ids, text_tokens, text_segment_ids, text_kinds, *, remat="none", unroll=False,
        constrain=lambda x, tokens=True: x, attend=attention, attend_text=attention,
    ):  # fmt: skip
        """Logits float32 `[B, M, V]` of every token of the captions, each from those before it and its video.

        Args:
            tokens, positions, segment_ids: see `encode`.
            text_tokens: `[B, M]` int, captions laid end to end, PAD_ID at empty slots. text_segment_ids: `[B, M]` int,
                numbered as segment_ids. text_kinds: `[B, M]` int, the kind of each slot's caption.
            remat, unroll, constrain, attend, attend_text: as `DiT.__call__` takes them; M must divide over the devices
                that share a row.
        """
        config, text = self.config, (lambda x: constrain(x, tokens=False))
        memory = self.encode(tokens, positions, segment_ids, remat=remat, unroll=unroll, attend=attend,
                             constrain=constrain)  # fmt: skip
        places, starts = places_in_segments(text_segment_ids)
        before = jnp.pad(text_tokens[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
        x = self.embedding[...][jnp.where(starts, config.start_token(text_kinds), before)].astype(memory.dtype)
        order = jnp.arange(text_tokens.shape[1])
        row = dict(
            memory=text(memory), segment_ids=segment_ids, text_segment_ids=text_segment_ids, attend_text=attend_text,
            constrain=constrain, text_rope=tuple(text(factors) for factors in self._text_rope(places)),
            causal=jnp.where(order[:, None] >= order, 0.0, MASKED),
        )  # fmt: skip
        return self._logits(_run(self.decoder, text(x), row, remat, unroll))

    def _text_rope(self, places):
        """Factors of `apply_rope` `[B, M, A]` for the places `[B, M]` of tokens in their captions."""
        half = self.config.head_dim // 2
        freqs = self.config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        return rope_of(places[..., None].astype(jnp.float32) * freqs)

    def _logits(self, x):
        return self.head(rms_norm(x, self.norm_out[...], self.config.eps)).astype(jnp.float32)

    # --- Word by word

    def memories(self, memory):
        """Keys and values `[B, N, K, A]` of the video, of each decoder layer."""
        return [block.cross_attention.keys(memory) for block in self._blocks()]

    def empty_cache(self, captions: int, length: int, dtype):
        """Keys and values of no tokens yet: of each layer two of `[X, T, K, A]`."""
        config = self.config
        shape = (captions, length, config.num_heads, config.head_dim)
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.decoder_layers)]

    def step(self, memories, segment_ids, caption_ids, cache, tokens, position, *, attend=attention):
        """Logits float32 `[X, V]` of the next token of X captions, and the cache with the last one's keys.

        Args:
            memories: see `memories`. segment_ids: `[B, N]`. caption_ids: `[B, X / B]`, the segment that each caption
                is of; 0: of none.
            tokens: `[X]` int, the last token of each, at first `config.start_token(kind)`; rows one after the other.
            position: its place, the same for all: 0 of the start token.
        """
        x = self.embedding[...][tokens].astype(memories[0][0].dtype)
        rope = self._text_rope(jnp.broadcast_to(position, (1, 1)))
        kept = []
        for block, memory, own in zip(self._blocks(), memories, cache):
            x, own = block.step(x, rope, memory, own, position, caption_ids, segment_ids, attend)
            kept.append(own)
        return self._logits(x), kept

    def _blocks(self):
        graphdef, layers = nnx.split(self.decoder)
        return [nnx.merge(graphdef, jax.tree.map(lambda p: p[i], layers))  # noqa: B023 (used at once)
                for i in range(self.config.decoder_layers)]  # fmt: skip


def _run(blocks, x, row, remat, unroll):
    graphdef, layers = nnx.split(blocks)
    return run_layers(lambda x, layer: nnx.merge(graphdef, layer)(x, row), x, layers, remat=remat, unroll=unroll)


def places_in_segments(segment_ids):
    """(place of each token in its segment, int `[B, M]`; whether it is the first, bool) of contiguous segments."""
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != before) & (segment_ids != 0)
    order = jnp.arange(segment_ids.shape[1])
    first = jax.lax.cummax(jnp.where(starts, order, 0), axis=1)
    return order - first, starts
