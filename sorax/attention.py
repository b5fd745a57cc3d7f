"""Packed attention: one function for self-, cross- and text attention over rows that hold several samples.

Legend: B rows, N query tokens, M key tokens, K heads, A head dim.
"""

import einops
import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a padding query (which may see nothing) gives zeros and no NaN gradient


def attention(q, k, v, q_segment_ids, kv_segment_ids, *, key_bias=None, bias=None, scale=None):
    """Softmax attention in which a query sees the keys of its own segment and nothing else.

    Args:
        q: `[B, N, K, A]` queries. k, v: `[B, M, K, A]` keys and values.
        q_segment_ids: `[B, N]` int, kv_segment_ids: `[B, M]` int. A query attends to a key iff the ids are equal
            and non-zero; 0 is padding, whose output is zero.
        key_bias: `[B, M]`, added to the logits of each key. A bias of `log(n)` makes it count as `n` equal keys.
        bias: added to the logits; anything that broadcasts to `[B, K, N, M]`.
        scale: factor on the logits; `A ** -0.5` if None.

    Returns:
        `[B, N, K, A]` in the dtype of `v`. The softmax is taken in float32.
    """
    B, N, K, A = q.shape
    scale = A**-0.5 if scale is None else scale
    # Heads merged into the batch axis, and the division by the sum after the product with the values:
    # both are what XLA's CPU backend runs fastest, and neither costs anything elsewhere.
    q, k, v = (einops.rearrange(x, "b n k a -> (b k) n a") for x in (q, k, v))
    logits = jnp.einsum("xna,xma->xnm", q * scale, k, preferred_element_type=jnp.float32)  # [B*K, N, M]
    logits = logits.reshape(B, K, *logits.shape[1:])
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :]
    if bias is not None:
        logits = logits + bias
    same = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (q_segment_ids[:, :, None] != 0)
    logits = jnp.where(same[:, None], logits, MASKED)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(same[:, None], jnp.exp(logits - peak), 0.0).reshape(B * K, N, -1)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("xnm,xma->xna", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.where(total == 0, 1.0, total)
    return einops.rearrange(out.astype(v.dtype), "(b k) n a -> b n k a", k=K)
