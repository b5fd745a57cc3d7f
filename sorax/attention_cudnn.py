"""Packed attention by NVIDIA's cuDNN on Hopper GPUs and later: kernels that take the place and length of each segment.

JAX reaches them through a module of its own that is not public; `jax.nn.dot_product_attention` has no such arguments.
Nothing here has been run on a GPU yet: what is tested is the arguments and that the program lowers.

Legend: B rows, N query tokens, M key tokens, K heads, A head dim, S segments of a row.
"""

import jax
import jax.numpy as jnp

try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    _attention, _packed = cudnn.dot_product_attention, cudnn.MaskType.PADDING
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"jax {jax.__version__} has not the cuDNN attention that sorax calls ({error}): use a jax from 0.10.2 up to "
        "but not with 0.12, or attention(..., implementation='triton')"
    ) from error

MAX_SEGMENTS = 64  # of a row; the kernels' statistics take room in proportion


def why_not(q, k, v):
    """Why these arguments cannot be computed by cuDNN in this process: a phrase, or None if they can."""
    if jax.default_backend() != "gpu":
        return f"this process runs on {jax.default_backend()}, not on a GPU"
    if not cudnn.check_compute_capability("9.0"):
        return "the GPU is older than Hopper"
    try:
        cudnn.check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must all be bfloat16 or all float16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dim must be a multiple of 8 up to 128, and is {q.shape[-1]}"
    return None


def in_order(ids):
    """bool `[B]`: the ids `[B, n]` of a row ascend from 1 to at most MAX_SEGMENTS, padding comes last."""
    before, after = ids[:, :-1], ids[:, 1:]
    ascending = jnp.all((after == 0) | ((before != 0) & (before <= after)), axis=1)
    return ascending & jnp.all((ids >= 0) & (ids <= MAX_SEGMENTS), axis=1)


def _spans(ids):
    """First place and length of the segments 1..S of each row, int32 `[B, S]`, length 0 for those that it has not."""
    mine = ids[:, None] == jnp.arange(1, MAX_SEGMENTS + 1, dtype=ids.dtype)[:, None]  # [B, S, n]
    return jnp.argmax(mine, axis=2).astype(jnp.int32), jnp.sum(mine, axis=2, dtype=jnp.int32)


def layout(q_ids, kv_ids):
    """Arguments of cuDNN: q_offsets, kv_offsets `[B, S + 1]` and q_seqlen, kv_seqlen `[B, S]`, int32, -1 for none.

    A segment that has no queries or no keys is left out of both.
    """
    (q_first, q_length), (kv_first, kv_length) = _spans(q_ids), _spans(kv_ids)
    there = (q_length > 0) & (kv_length > 0)
    last = jnp.full((q_ids.shape[0], 1), -1, jnp.int32)

    def offsets(first):
        return jnp.concatenate([jnp.where(there, first, -1), last], axis=1)

    return dict(q_offsets=offsets(q_first), kv_offsets=offsets(kv_first),
                q_seqlen=jnp.where(there, q_length, -1), kv_seqlen=jnp.where(there, kv_length, -1))  # fmt: skip


def _has_partner(ids, arguments):
    """bool `[B, n, 1, 1]`: the token's segment is among those that are computed."""
    there = jnp.pad(arguments["q_seqlen"] > 0, ((0, 0), (1, 0)))  # of id 0, 1, ...
    return jnp.take_along_axis(there, jnp.clip(ids, 0, MAX_SEGMENTS), axis=1)[:, :, None, None]


def attention(q, k, v, q_ids, kv_ids, key_bias, scale):
    """See `sorax.attention.attention`. Rows whose ids are not `in_order` give NaN.

    Raises:
        ValueError: these arguments are nothing for cuDNN, and why.
    """
    problem = "it takes no key_bias" if key_bias is not None else why_not(q, k, v)
    if problem:
        raise ValueError(f"attention: cudnn cannot do this: {problem}; use 'triton' or 'dense'")
    q_ids, kv_ids = q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    arguments = layout(q_ids, kv_ids)
    # The kernels leave what belongs to no segment as it was in memory: no output and no gradient of it may get out.
    q_there, kv_there = _has_partner(q_ids, arguments), _has_partner(kv_ids, arguments)
    q, k, v = jnp.where(q_there, q, 0), jnp.where(kv_there, k, 0), jnp.where(kv_there, v, 0)
    out = _attention(q, k, v, scale=scale, mask_type=_packed, qkv_layout="BTNH", **arguments)
    right = (in_order(q_ids) & in_order(kv_ids))[:, None, None, None]
    return jnp.where(right, jnp.where(q_there, out, 0), jnp.nan).astype(v.dtype)
