"""Packed attention for TPUs: JAX's Pallas splash attention kernels, given masks of blocks made from segment ids.

With `SegmentIds` alone those kernels compute every pair of blocks and mask; with a table that says which pairs of
blocks meet they neither fetch nor compute the others. The table has an entry a pair of blocks, not a pair of tokens.
Block sizes are not tuned on hardware.

Legend: B rows, N query tokens, M key tokens, K heads, A head dim.
"""

import einops
import jax
import jax.numpy as jnp

from sorax.attention_blocks import blocks_meet, fit_block, next_met, pad_to

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_info

    _forward, _backward = splash._splash_attention_forward, splash._splash_attention_bwd
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"jax {jax.__version__} has not the splash attention kernels that sorax calls ({error}): use a jax from 0.10.2 "
        "up to but not with 0.12, or attention(..., implementation='dense')"
    ) from error

BLOCK, LANES = 512, 128
UNSEEN = 1e30  # log-sum-exp of a query that sees nothing: exp(x - it) is 0
BIAS_COLUMNS = 3  # a float32 is the sum of three bfloat16, which is what the matrix unit multiplies


def _bias_parts(bias):
    """float32 `[..., 3]`, each of them exact in bfloat16, which sum to the bias. Not by a cast, which XLA may drop."""
    parts = []
    for _ in range(BIAS_COLUMNS):
        parts.append(jax.lax.reduce_precision(bias, exponent_bits=8, mantissa_bits=7))
        bias = bias - parts[-1]
    return jnp.stack(parts, axis=-1)


def _heads_first(x, length):
    return pad_to(einops.rearrange(x, "b n k a -> b k n a"), length, axis=2)


class _Plan:
    """Blocks, their table, and q, k and v as the kernels want them: `[B, K, N, A]`, N and M in whole blocks.

    key_bias goes into more columns of k, which meet ones in q.
    """

    def __init__(self, q, k, v, q_ids, kv_ids, key_bias, scale, interpret):
        (_, self.N, _, self.A), self.M = q.shape, k.shape[1]
        bq, N = fit_block(self.N, BLOCK, LANES)
        bkv, M = fit_block(self.M, BLOCK, LANES)
        q_ids, kv_ids = (pad_to(ids.astype(jnp.int32), n, 1) for ids, n in ((q_ids, N), (kv_ids, M)))
        self.meet = blocks_meet(q_ids, kv_ids, bq, bkv)
        q = q * scale
        if key_bias is not None:
            parts = _bias_parts(key_bias.astype(jnp.float32))[:, :, None].astype(k.dtype)  # [B, M, 1, 3]
            q = jnp.concatenate([q, jnp.ones((*q.shape[:3], BIAS_COLUMNS), q.dtype)], axis=3)
            k = jnp.concatenate([k, jnp.broadcast_to(parts, (*k.shape[:3], BIAS_COLUMNS))], axis=3)
        self.qkv = _heads_first(q, N), _heads_first(k, M), _heads_first(v, M)
        self.q_ids = q_ids
        # The kernels take equal ids for the same segment; those of padding equal nothing.
        self.ids = jnp.where(q_ids == 0, -1, q_ids), jnp.where(kv_ids == 0, -2, kv_ids)
        sizes = splash.BlockSizes(block_q=bq, block_kv=bkv, block_kv_compute=bkv, block_q_dkv=bq, block_kv_dkv=bkv,
                                  block_kv_dkv_compute=bkv, block_q_dq=bq, block_kv_dq=bkv)  # fmt: skip
        self.settings = dict(mask_value=splash.DEFAULT_MASK_VALUE, is_mqa=False, block_sizes=sizes,
                             residual_checkpoint_name=None, mask_function=None, attn_logits_soft_cap=None,
                             interpret=interpret)  # fmt: skip

    def table(self, by_keys=False):
        """(which blocks meet, what to fetch next), `[B, 1, q blocks, kv blocks]`; by_keys: keys in the outer loop."""
        meet = self.meet
        fetch = next_met(meet.swapaxes(1, 2)).swapaxes(1, 2) if by_keys else next_met(meet)
        small = jnp.int8 if max(meet.shape[1:]) <= 128 else jnp.int16  # it lies in the scalar memory, which is scarce
        return meet[:, None].astype(jnp.int8), fetch[:, None].astype(small)


def _mask_info(table):
    block_mask, data_next = table
    return splash_info.MaskInfo(data_next=data_next, mask_next=None, block_mask=block_mask, partial_mask_blocks=None,
                                q_sequence=None, is_dynamic_mask=True)  # fmt: skip


def _each_row(function, arrays):
    """function over rows, whose tables differ: one after the other, for a TPU runs one kernel at a time anyway."""
    if arrays[0].shape[0] == 1:
        out = function(jax.tree.map(lambda x: x[0], arrays))
        return jax.tree.map(lambda x: x[None], out)
    return jax.lax.map(function, arrays)


def forward(q, k, v, q_ids, kv_ids, key_bias, *, scale, interpret=False):
    """Output `[B, N, K, A]` and log-sum-exp of the logits `[B, K, N]`; see `sorax.attention`."""
    plan = _Plan(q, k, v, q_ids, kv_ids, key_bias, scale, interpret)

    def row(arrays):
        q, k, v, q_ids, kv_ids, table = arrays
        out, (lse,) = _forward(_mask_info(table), q, k, v, splash.SegmentIds(q_ids, kv_ids), sinks=None,
                               save_residuals=True, **plan.settings)  # fmt: skip
        return out, lse

    out, lse = _each_row(row, (*plan.qkv, *plan.ids, plan.table()))
    # A query without keys: the kernel leaves its mask value as the largest logit, and divides by zero.
    seen = (plan.q_ids != 0)[:, None] & (lse > 0.5 * splash.DEFAULT_MASK_VALUE)
    out = jnp.where(seen[..., None], out, 0)[:, :, : plan.N]
    return einops.rearrange(out, "b k n a -> b n k a").astype(v.dtype), jnp.where(seen, lse, UNSEEN)[:, :, : plan.N]


def backward(q, k, v, q_ids, kv_ids, key_bias, out, lse, grad, *, scale, interpret=False):
    """Gradients for q, k, v and key_bias (None without one) from that of the output, `grad` `[B, N, K, A]`."""
    plan = _Plan(q, k, v, q_ids, kv_ids, key_bias, scale, interpret)
    length = plan.qkv[0].shape[2]
    out, grad = _heads_first(out, length), _heads_first(grad.astype(v.dtype), length)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, length - plan.N)), constant_values=UNSEEN)

    def row(arrays):
        q, k, v, q_ids, kv_ids, out, lse, grad, dq_table, dkv_table = arrays
        residuals = (q, k, v, splash.SegmentIds(q_ids, kv_ids), None, out, lse,
                     _mask_info(dq_table), _mask_info(dkv_table))  # fmt: skip
        return _backward(save_residuals=False, res=residuals, do=grad, **plan.settings)[3:6]

    tables = plan.table(), plan.table(by_keys=True)
    dq, dk, dv = _each_row(row, (*plan.qkv, *plan.ids, out, lse, grad, *tables))
    dq, dk, dv = (einops.rearrange(x, "b k n a -> b n k a")[:, :n]
                  for x, n in ((dq, plan.N), (dk, plan.M), (dv, plan.M)))  # fmt: skip
    dbias = None if key_bias is None else jnp.sum(dk[..., plan.A].astype(jnp.float32), axis=2).astype(key_bias.dtype)
    return (dq[..., : plan.A] * scale).astype(q.dtype), dk[..., : plan.A].astype(k.dtype), dv.astype(v.dtype), dbias
