"""Packed attention for CPUs: blocks of queries, each against the keys of its own segments only.

Blocks begin where segments begin, so that little of them is wasted, and small segments share a block. What a block
needs is read from the segment ids at run time; XLA cannot differentiate such loops, so the gradient is written out.
Online softmax and gradient as in FlashAttention (Dao et al. 2022).

Legend: B rows, N query tokens, M key tokens, K heads, A head dim; T = B * N and U = B * M, all rows laid end to end.
"""

import functools

import einops
import jax
import jax.numpy as jnp

# Measured on two x86-64 cores at heads of 32 to 128. One head at a time: the logits of a block stay in the cache.
BLOCK_Q, BLOCK_KV = 128, 128
# Forward, segments of 192 and more on average have blocks of twice the side: an eighth to a quarter less time.
LONG = 1.5  # in BLOCK_Q
MASKED, FLOOR = -1e30, -1e20  # of a masked logit, and of the largest logit so far: exp(MASKED - FLOOR) is 0


def _take(x, head, start, size):
    """`[size, A]` of one head of x `[T, K, A]`."""
    return jax.lax.dynamic_slice(x, (start, head, 0), (size, 1, x.shape[2]))[:, 0]


def _put(x, value, head, start):
    return jax.lax.dynamic_update_slice(x, value[:, None].astype(x.dtype), (start, head, 0))


def _take_kv(x, head, start, size):
    """`[size, A]` of one head of x `[K, U, A]`: what is read again and again lies in one piece."""
    return jax.lax.dynamic_slice(x, (head, start, 0), (1, size, x.shape[2]))[0]


def _put_kv(x, value, head, start):
    return jax.lax.dynamic_update_slice(x, value[None], (head, start, 0))


def _fold(op, x):
    """`[n, 1]`: op over each row of x `[n, m]`, halves upon halves first, which XLA makes one loop of wide vectors."""
    while x.shape[1] > 16 and x.shape[1] % 2 == 0:
        x = op(*jnp.split(x, 2, axis=1))
    return op.reduce(x, axis=1, keepdims=True)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


class _Plan:
    """Segment ids of all rows, and what follows from them for a block.

    q_ids `[B, N]`, kv_ids `[B, M]` int, key_bias `[B, M]` or None. A block that would reach over the end of T (or U)
    begins earlier, and does nothing for what comes before its first query (or key).
    """

    def __init__(self, q_ids, kv_ids, key_bias, sides=(1, 1)):
        (B, self.N), (_, self.M) = q_ids.shape, kv_ids.shape
        self.total, self.total_kv = B * self.N, B * self.M
        self.block_q, self.block_kv = min(sides[0] * BLOCK_Q, self.N), min(sides[1] * BLOCK_KV, self.M)
        self.q_ids = jnp.pad(q_ids.reshape(-1).astype(jnp.int32), (0, 1))
        self.kv_ids = kv_ids.reshape(-1).astype(jnp.int32)
        self.bias = None if key_bias is None else key_bias.reshape(-1)

    def queries(self, start):
        """The block of queries from `start` on: (its size, where its slices begin, place of each in the block, negative
        before `start`, ids `[block_q]`, first key, last key + 1).

        It ends with the last segment that ends within `block_q`, or with the row, and where nothing does, when full.
        """
        row, at = start // self.N, jnp.minimum(start, self.total - self.block_q)
        place = at - start + jnp.arange(self.block_q)
        left = (row + 1) * self.N - start
        ids = jax.lax.dynamic_slice_in_dim(self.q_ids, at, self.block_q + 1)
        ends = ((ids[1:] != ids[:-1]) | (place + 1 == left)) & (place >= 0) & (place < left)
        size = jnp.max(jnp.where(ends, place + 1, 0))
        size = jnp.where(size == 0, self.block_q, size)
        ids = jnp.where((place >= 0) & (place < size) & (ids[:-1] != 0), ids[:-1], -1)  # -1 sees nothing
        keys, order = jax.lax.dynamic_slice_in_dim(self.kv_ids, row * self.M, self.M), jnp.arange(self.M)
        lowest = jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max))
        near = (keys >= lowest) & (keys <= jnp.max(ids)) & (keys != 0)
        first, stop = jnp.min(jnp.where(near, order, self.M)), jnp.max(jnp.where(near, order + 1, 0))
        return size, at, place, ids, row * self.M + first, row * self.M + stop

    def keys(self, start):
        """Where the slices of the block of keys from `start` on begin."""
        return jnp.minimum(start, self.total_kv - self.block_kv)

    def logits(self, q, k, ids, start, stop):
        """Logits and mask `[block_q, block_kv]` of a block of queries and the block of keys from `start` on."""
        at = self.keys(start)
        keys, place = jax.lax.dynamic_slice_in_dim(self.kv_ids, at, self.block_kv), at + jnp.arange(self.block_kv)
        keys = jnp.where((place >= start) & (place < stop), keys, 0)
        logits = _product("qa,ka->qk", q, k)
        if self.bias is not None:
            logits = logits + jax.lax.dynamic_slice_in_dim(self.bias, at, self.block_kv)
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
    run = functools.partial(_forward, scale=scale)
    if q_ids.shape[1] < LONG * BLOCK_Q:
        return run(q, k, v, q_ids, kv_ids, key_bias)
    segments = jnp.sum(jnp.diff(q_ids, axis=1, prepend=0) > 0)
    long = jnp.sum(q_ids != 0) >= LONG * BLOCK_Q * segments
    sides = 2, 2 if k.shape[1] >= q.shape[1] else 1  # captions are short
    return jax.lax.cond(long, functools.partial(run, sides=sides), run, q, k, v, q_ids, kv_ids, key_bias)


def _forward(q, k, v, q_ids, kv_ids, key_bias, *, scale, sides=(1, 1)):
    (B, N, K, A), dtype = q.shape, v.dtype
    plan = _Plan(q_ids, kv_ids, key_bias, sides)
    bq, bk = plan.block_q, plan.block_kv
    q = q.reshape(-1, K, A)
    k, v = (einops.rearrange(x, "b n k a -> k (b n) a") for x in (k, v))

    def block(head, start, arrays):
        out, lse = arrays
        size, at_q, place, ids, first, stop = plan.queries(start)
        queries = _take(q, head, at_q, bq) * scale

        def step(carry):
            start, peak, total, acc = carry
            at = plan.keys(start)
            logits, mask = plan.logits(queries, _take_kv(k, head, at, bk), ids, start, stop)
            logits = jnp.where(mask, logits, MASKED)
            higher = jnp.maximum(peak, _fold(jnp.maximum, logits))
            weights, shrink = jnp.exp(logits - higher), jnp.exp(peak - higher)
            acc = acc * shrink + _product("qk,ka->qa", weights.astype(dtype), _take_kv(v, head, at, bk))
            return start + bk, higher, total * shrink + _fold(jnp.add, weights), acc

        empty = jnp.full((bq, 1), FLOOR), jnp.zeros((bq, 1)), jnp.zeros((bq, A))
        _, peak, total, acc = jax.lax.while_loop(lambda carry: carry[0] < stop, step, (first, *empty))
        safe = jnp.where(total == 0, 1.0, total)
        value = jnp.where(total == 0, -MASKED, peak + jnp.log(safe))  # of a query that sees nothing: exp(x - it) = 0
        # What a block writes behind its own end, the next one writes over; what is before its start, stays.
        ours = place[:, None] >= 0
        acc = jnp.where(ours, (acc / safe).astype(dtype), _take(out, head, at_q, bq))
        value = jnp.where(ours, value, jax.lax.dynamic_slice(lse, (head, at_q), (1, bq)).T)
        return size, (_put(out, acc, head, at_q), jax.lax.dynamic_update_slice(lse, value.T, (head, at_q)))

    out, lse = plan.each(K, block, (jnp.zeros(q.shape, dtype), jnp.zeros((K, B * N))))
    return out.reshape(B, N, K, A), einops.rearrange(lse, "k (b n) -> b k n", b=B)


def backward(q, k, v, q_ids, kv_ids, key_bias, out, lse, grad, *, scale):
    """Gradients for q, k, v and key_bias (None without one) from that of the output, `grad` `[B, N, K, A]`."""
    (B, N, K, A), M = q.shape, k.shape[1]
    plan = _Plan(q_ids, kv_ids, key_bias)
    bq, bk = plan.block_q, plan.block_kv
    lse = einops.rearrange(lse, "b k n -> k (b n)")
    dtypes = q.dtype, k.dtype, v.dtype
    q, out, grad = (x.reshape(-1, K, A) for x in (q, out, grad.astype(v.dtype)))
    k, v = (einops.rearrange(x, "b n k a -> k (b n) a") for x in (k, v))

    def block(head, start, arrays):
        dq, *others = arrays
        size, at_q, place, ids, first, stop = plan.queries(start)
        queries, grads = _take(q, head, at_q, bq) * scale, _take(grad, head, at_q, bq)
        # ds = p * (dp - delta), delta = sum of p * dp over the keys = out . grad
        delta = _fold(jnp.add, _take(out, head, at_q, bq).astype(jnp.float32) * grads.astype(jnp.float32))
        lses = jax.lax.dynamic_slice(lse, (head, at_q), (1, bq)).T

        def step(carry):
            start, acc, dk, dv, *dbias = carry
            at = plan.keys(start)
            keys, values = _take_kv(k, head, at, bk), _take_kv(v, head, at, bk)
            logits, mask = plan.logits(queries, keys, ids, start, stop)
            p = jnp.where(mask, jnp.exp(logits - lses), 0.0)
            ds = p * (_product("qa,ka->qk", grads, values) - delta)
            dv = _put_kv(dv, _take_kv(dv, head, at, bk) + _product("qk,qa->ka", p.astype(v.dtype), grads), head, at)
            if dbias:
                total = jax.lax.dynamic_slice_in_dim(dbias[0], at, bk) + jnp.sum(ds, axis=0)
                dbias = [jax.lax.dynamic_update_slice_in_dim(dbias[0], total, at, 0)]
            ds = ds.astype(q.dtype)
            dk = _put_kv(dk, _take_kv(dk, head, at, bk) + _product("qk,qa->ka", ds, queries), head, at)
            return start + bk, acc + _product("qk,ka->qa", ds, keys), dk, dv, *dbias

        carry = (first, jnp.zeros((bq, A)), *others)
        _, acc, *others = jax.lax.while_loop(lambda carry: carry[0] < stop, step, carry)
        acc = jnp.where(place[:, None] >= 0, acc * scale, _take(dq, head, at_q, bq))
        return size, (_put(dq, acc, head, at_q), *others)

    arrays = [jnp.zeros(x.shape) for x in (q, k, v)]
    arrays += [] if key_bias is None else [jnp.zeros(B * M)]
    dq, dk, dv, *dbias = plan.each(K, block, arrays)
    dq = dq.reshape(B, N, K, A)
    dk, dv = (einops.rearrange(x, "k (b n) a -> b n k a", b=B) for x in (dk, dv))
    dq, dk, dv = (x.astype(dtype) for x, dtype in zip((dq, dk, dv), dtypes))
    return dq, dk, dv, dbias[0].reshape(B, M).astype(key_bias.dtype) if dbias else None
