"""Packed attention for CPUs: blocks of queries, each against the keys of its own segments only.

Blocks begin where segments begin, so that little of them is wasted, and small segments share a block. What a block
needs is read from the segment ids at run time; XLA cannot differentiate such loops, so the gradient is written out.
Online softmax and gradient as in FlashAttention (Dao et al. 2022).

Legend: B rows, N query tokens, M key tokens, K heads, A head dim; T = B * N and U = B * M, all rows laid end to end.
"""

import einops
import jax
import jax.numpy as jnp

# Measured on two x86-64 cores at heads of 32 to 128. One head at a time: the logits of a block stay in the cache.
BLOCK_Q, BLOCK_KV = 128, 128
MASKED, FLOOR = -1e30, -1e20  # of a masked logit, and of the largest logit so far: exp(MASKED - FLOOR) is 0


def _rows(x, room):
    """`[B, n, K, A]` to `[K, B * n + room, A]`: slices of blocks that reach over the end stay where they are."""
    return jnp.pad(einops.rearrange(x, "b n k a -> k (b n) a"), ((0, 0), (0, room), (0, 0)))


def _take(x, head, start, size):
    """`[size, ...]` of x `[K, T, ...]`."""
    return jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_index_in_dim(x, head, 0, keepdims=False), start, size)


def _put(x, value, head, start):
    return jax.lax.dynamic_update_slice(x, value[None].astype(x.dtype), (head, start) + (0,) * (x.ndim - 2))


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


class _Plan:
    """Segment ids of all rows, and what follows from them for a block.

    q_ids `[B, N]`, kv_ids `[B, M]` int, key_bias `[B, M]` or None.
    """

    def __init__(self, q_ids, kv_ids, key_bias):
        (B, self.N), (_, self.M) = q_ids.shape, kv_ids.shape
        self.total, self.block_q, self.block_kv = B * self.N, min(BLOCK_Q, self.N), min(BLOCK_KV, self.M)
        self.q_ids = jnp.pad(q_ids.reshape(-1).astype(jnp.int32), (0, self.block_q + 1))
        self.kv_ids = jnp.pad(kv_ids.reshape(-1).astype(jnp.int32), (0, self.block_kv))
        self.bias = None if key_bias is None else jnp.pad(key_bias.reshape(-1), (0, self.block_kv))

    def queries(self, start):
        """The block of queries that begins at `start`: (its size, ids `[block_q]`, first key, last key + 1).

        It ends with the last segment that ends within `block_q`, or with the row, and where nothing does, when full.
        """
        row, i = start // self.N, jnp.arange(self.block_q)
        left = (row + 1) * self.N - start
        ids = jax.lax.dynamic_slice_in_dim(self.q_ids, start, self.block_q + 1)
        ends = ((ids[1:] != ids[:-1]) | (i + 1 == left)) & (i < left)
        size = jnp.max(jnp.where(ends, i + 1, 0))
        size = jnp.where(size == 0, self.block_q, size)
        ids = jnp.where((i < size) & (ids[:-1] != 0), ids[:-1], -1)  # -1 sees nothing
        keys, place = jax.lax.dynamic_slice_in_dim(self.kv_ids, row * self.M, self.M), jnp.arange(self.M)
        lowest = jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max))
        near = (keys >= lowest) & (keys <= jnp.max(ids)) & (keys != 0)
        first, stop = jnp.min(jnp.where(near, place, self.M)), jnp.max(jnp.where(near, place + 1, 0))
        return size, ids, row * self.M + first, row * self.M + stop

    def logits(self, q, k, ids, start, stop):
        """Logits and mask `[block_q, block_kv]` of a block of queries and the block of keys that begins at `start`."""
        keys = jax.lax.dynamic_slice_in_dim(self.kv_ids, start, self.block_kv)
        keys = jnp.where(start + jnp.arange(self.block_kv) < stop, keys, 0)
        logits = _product("qa,ka->qk", q, k)
        if self.bias is not None:
            logits = logits + jax.lax.dynamic_slice_in_dim(self.bias, start, self.block_kv)
        return logits, ids[:, None] == keys

    def each(self, num_heads, block, arrays):
        """arrays = block(head, start, arrays), which also gives the block's size, over all blocks of all heads."""

        def step(carry):
            head, start, *arrays = carry
            size, arrays = block(head, start, arrays)
            done = start + size >= self.total
            return head + done, jnp.where(done, 0, start + size), *arrays

        return jax.lax.while_loop(lambda carry: carry[0] < num_heads, step, (0, 0, *arrays))[2:]


def forward(q, k, v, q_ids, kv_ids, key_bias, *, scale):
    """Output `[B, N, K, A]` in the dtype of v, and log-sum-exp of the logits `[B, K, N]`; see `sorax.attention`."""
    (B, N, K, A), dtype = q.shape, v.dtype
    plan = _Plan(q_ids, kv_ids, key_bias)
    bq, bk = plan.block_q, plan.block_kv
    q, k, v = _rows(q * scale, bq), _rows(k, bk), _rows(v, bk)

    def block(head, start, arrays):
        out, lse = arrays
        size, ids, first, stop = plan.queries(start)
        queries = _take(q, head, start, bq)

        def step(carry):
            at, peak, total, acc = carry
            logits, mask = plan.logits(queries, _take(k, head, at, bk), ids, at, stop)
            logits = jnp.where(mask, logits, MASKED)
            higher = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
            weights, shrink = jnp.exp(logits - higher), jnp.exp(peak - higher)
            acc = acc * shrink + _product("qk,ka->qa", weights.astype(dtype), _take(v, head, at, bk))
            return at + bk, higher, total * shrink + jnp.sum(weights, axis=1, keepdims=True), acc

        empty = jnp.full((bq, 1), FLOOR), jnp.zeros((bq, 1)), jnp.zeros((bq, A))
        _, peak, total, acc = jax.lax.while_loop(lambda carry: carry[0] < stop, step, (first, *empty))
        safe = jnp.where(total == 0, 1.0, total)
        value = jnp.where(total == 0, -MASKED, peak + jnp.log(safe))  # of a query that sees nothing: exp(x - it) = 0
        # What a block writes behind its own end, the next one writes over.
        return size, (_put(out, acc / safe, head, start), _put(lse, value[:, 0], head, start))

    out, lse = plan.each(K, block, (jnp.zeros(q.shape, dtype), jnp.zeros(q.shape[:2])))
    out = einops.rearrange(out[:, : B * N], "k (b n) a -> b n k a", b=B)
    return out, einops.rearrange(lse[:, : B * N], "k (b n) -> b k n", b=B)


def backward(q, k, v, q_ids, kv_ids, key_bias, out, lse, grad, *, scale):
    """Gradients for q, k, v and key_bias (None without one) from that of the output, `grad` `[B, N, K, A]`."""
    (B, N, K, A), M = q.shape, k.shape[1]
    dtypes = q.dtype, k.dtype, v.dtype
    plan = _Plan(q_ids, kv_ids, key_bias)
    bq, bk = plan.block_q, plan.block_kv
    # ds = p * (dp - delta), delta = sum of p * dp over the keys = out . grad
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=3)
    delta = jnp.pad(einops.rearrange(delta, "b n k -> k (b n)"), ((0, 0), (0, bq)))
    lse = jnp.pad(einops.rearrange(lse, "b k n -> k (b n)"), ((0, 0), (0, bq)))
    q, grad, k, v = _rows(q * scale, bq), _rows(grad.astype(v.dtype), bq), _rows(k, bk), _rows(v, bk)

    def block(head, start, arrays):
        dq, *others = arrays
        size, ids, first, stop = plan.queries(start)
        queries, grads = _take(q, head, start, bq), _take(grad, head, start, bq)
        lses, deltas = _take(lse, head, start, bq)[:, None], _take(delta, head, start, bq)[:, None]

        def step(carry):
            at, acc, dk, dv, *dbias = carry
            keys, values = _take(k, head, at, bk), _take(v, head, at, bk)
            logits, mask = plan.logits(queries, keys, ids, at, stop)
            p = jnp.where(mask, jnp.exp(logits - lses), 0.0)
            ds = p * (_product("qa,ka->qk", grads, values) - deltas)
            dv = _put(dv, _take(dv, head, at, bk) + _product("qk,qa->ka", p.astype(v.dtype), grads), head, at)
            if dbias:
                total = jax.lax.dynamic_slice_in_dim(dbias[0], at, bk) + jnp.sum(ds, axis=0)
                dbias = [jax.lax.dynamic_update_slice_in_dim(dbias[0], total, at, 0)]
            ds = ds.astype(q.dtype)
            dk = _put(dk, _take(dk, head, at, bk) + _product("qk,qa->ka", ds, queries), head, at)
            return at + bk, acc + _product("qk,ka->qa", ds, keys), dk, dv, *dbias

        carry = (first, jnp.zeros((bq, A)), *others)
        _, acc, *others = jax.lax.while_loop(lambda carry: carry[0] < stop, step, carry)
        return size, (_put(dq, acc, head, start), *others)

    arrays = [jnp.zeros(x.shape) for x in (q, k, v)]
    arrays += [] if key_bias is None else [jnp.zeros(plan.bias.shape)]
    dq, dk, dv, *dbias = plan.each(K, block, arrays)
    dq, dk, dv = (einops.rearrange(x[:, : B * n], "k (b n) a -> b n k a", b=B).astype(dtype)
                  for x, n, dtype in zip((dq * scale, dk, dv), (N, M, M), dtypes))  # fmt: skip
    return dq, dk, dv, dbias[0][: B * M].reshape(B, M).astype(key_bias.dtype) if dbias else None
