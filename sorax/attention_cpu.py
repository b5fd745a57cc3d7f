"""Packed attention for CPUs: blocks of queries, each against the keys of its own segments only, and the reverse.

Blocks begin where segments begin, so that little of them is wasted, and small segments share a block. What a block
needs is read from the segment ids at run time; XLA cannot differentiate such loops, so the gradient is written out.
Online softmax and gradient as in FlashAttention (Dao et al. 2022).

What is read or written at a place known at run time lies flat, as `[K * B * N * A]`: XLA then copies a block at a third
of the time of one of a larger array. In the gradient, blocks of keys are the outer loop and logits are transposed: no
product then contracts over the first axis of both its operands, which takes twice as long as the others.

Legend: B rows, N query tokens, M key tokens, K heads, A head dim.
"""

import einops
import jax
import jax.numpy as jnp

# Measured on two x86-64 cores at heads of 32 to 128. One head at a time: the logits of a block stay in the cache.
BLOCK = 128
MASKED, FLOOR = -1e30, -1e20  # of a masked logit, and of the largest logit so far: exp(MASKED - FLOOR) is 0


def _flat(x):
    return einops.rearrange(x, "b n k a -> (k b n a)")


def _take(x, start, shape):
    """Block of `shape` `[n, A]` from token `start` on, of a flat array."""
    return jax.lax.dynamic_slice(x, (start * shape[1],), (shape[0] * shape[1],)).reshape(shape)


def _put(x, value, start):
    return jax.lax.dynamic_update_slice(x, value.astype(x.dtype).reshape(-1), (start * value.shape[1],))


def _halve(op, x):
    """`[n, l]`, l at most 16 where m is a power of 2: op over x `[n, m]`, halves upon halves: loops of wide vectors."""
    while x.shape[1] > 16 and x.shape[1] % 2 == 0:
        x = op(*jnp.split(x, 2, axis=1))
    return x


def _fold(op, x):
    return op.reduce(_halve(op, x), axis=1, keepdims=True)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


class _Plan:
    """Blocks of the tokens of all rows, from their segment ids `[B, N]`, each with those of the others `[B, M]` that it
    is to meet: queries with keys, or keys with queries.

    A block that would reach over the end of B * N (or B * M) begins earlier, and does nothing for what comes before its
    first token.
    """

    def __init__(self, ids, other_ids):
        (B, self.N), (_, self.M) = ids.shape, other_ids.shape
        self.total, self.other_total = B * self.N, B * self.M
        self.size, self.other_size = min(BLOCK, self.N), min(BLOCK, self.M)
        self.ids = jnp.pad(ids.reshape(-1).astype(jnp.int32), (0, 1))
        self.other_ids = other_ids.reshape(-1).astype(jnp.int32)

    def block(self, start):
        """The block from token `start` on: (how many tokens are done then, where its slices begin, whether each of them
        is from `start` on `[size, 1]`, ids `[size, 1]`, first of the others, last + 1).

        It ends with the last segment that ends within `size`, or with the row, and where nothing does, when full.
        """
        row, at = start // self.N, jnp.minimum(start, self.total - self.size)
        place = at - start + jnp.arange(self.size)
        left = (row + 1) * self.N - start
        ids = jax.lax.dynamic_slice_in_dim(self.ids, at, self.size + 1)
        ends = ((ids[1:] != ids[:-1]) | (place + 1 == left)) & (place >= 0) & (place < left)
        size = jnp.max(jnp.where(ends, place + 1, 0))
        size = jnp.where(size == 0, self.size, size)
        ids = jnp.where((place >= 0) & (place < size) & (ids[:-1] != 0), ids[:-1], -1)  # -1 meets nothing
        others, order = jax.lax.dynamic_slice_in_dim(self.other_ids, row * self.M, self.M), jnp.arange(self.M)
        lowest = jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max))
        near = (others >= lowest) & (others <= jnp.max(ids)) & (others != 0)
        first, stop = jnp.min(jnp.where(near, order, self.M)), jnp.max(jnp.where(near, order + 1, 0))
        return size, at, place[:, None] >= 0, ids[:, None], row * self.M + first, row * self.M + stop

    def others(self, start, stop):
        """Block of the others from `start` on: where its slices begin, and ids `[1, other_size]`, 0 outside of it."""
        at = jnp.minimum(start, self.other_total - self.other_size)
        ids, place = jax.lax.dynamic_slice_in_dim(self.other_ids, at, self.other_size), at + jnp.arange(self.other_size)
        return at, jnp.where((place >= start) & (place < stop), ids, 0)[None]

    def meet(self, first, stop, step, carry):
        """carry = step(start, carry) for all blocks of the others from `first` to `stop`."""

        def body(carry):
            start, *carry = carry
            return start + self.other_size, *step(start, carry)

        return jax.lax.while_loop(lambda carry: carry[0] < stop, body, (first, *carry))[1:]

    def each(self, num_heads, step, arrays):
        """arrays = step(head, block, arrays) over all blocks of all heads; `block` without its size."""

        def body(carry):
            head, start, *arrays = carry
            size, *block = self.block(start)
            done = start + size >= self.total
            return head + done, jnp.where(done, 0, start + size), *step(head, block, arrays)

        return jax.lax.while_loop(lambda carry: carry[0] < num_heads, body, (0, 0, *arrays))[2:]


def forward(q, k, v, q_ids, kv_ids, key_bias, *, scale):
    """Output `[B, N, K, A]` in the dtype of v, and log-sum-exp of the logits `[B, K, N]`; see `sorax.attention`."""
    (B, N, K, A), M, dtype = q.shape, k.shape[1], v.dtype
    plan = _Plan(q_ids, kv_ids)
    bq, bk = plan.size, plan.other_size
    q, k, v = map(_flat, (q, k, v))
    bias = None if key_bias is None else key_bias.reshape(-1)
    # Sums are kept as partial ones until a block is done: adding up the last 16 takes as long as all before.
    empty = jnp.full((bq, 1), FLOOR), _halve(jnp.add, jnp.zeros((bq, bk))), jnp.zeros((bq, A))

    def queries_of(head, block, arrays):
        out, lse = arrays
        at_q, ours, ids, first, stop = block
        here, there = head * (B * N) + at_q, head * (B * M)
        queries = _take(q, here, (bq, A)) * scale

        def step(start, carry):
            peak, total, acc = carry
            at, key_ids = plan.others(start, stop)
            logits = _product("qa,ka->qk", queries, _take(k, there + at, (bk, A)))
            if bias is not None:
                logits = logits + jax.lax.dynamic_slice_in_dim(bias, at, bk)
            logits = jnp.where(ids == key_ids, logits, MASKED)
            higher = jnp.maximum(peak, _fold(jnp.maximum, logits))
            weights, shrink = jnp.exp(logits - higher), jnp.exp(peak - higher)
            more = _product("qk,ka->qa", weights.astype(dtype), _take(v, there + at, (bk, A)))
            # Always true: without it XLA gives the rest to the kernels of products, which are slower at it.
            more = jnp.where(start < stop, more, 0.0)
            return higher, total * shrink + _halve(jnp.add, weights), acc * shrink + more

        peak, total, acc = plan.meet(first, stop, step, empty)
        total = jnp.sum(total, axis=1, keepdims=True)
        safe = jnp.where(total == 0, 1.0, total)
        value = jnp.where(total == 0, -MASKED, peak + jnp.log(safe))  # of a query that sees nothing: exp(x - it) = 0
        # What a block writes behind its own end, the next one writes over; what is before its start, stays.
        acc = jnp.where(ours, (acc / safe).astype(dtype), _take(out, here, (bq, A)))
        value = jnp.where(ours, value, _take(lse, here, (bq, 1)))
        return _put(out, acc, here), _put(lse, value, here)

    out, lse = plan.each(K, queries_of, (jnp.zeros(q.shape, dtype), jnp.zeros(K * B * N)))
    out = einops.rearrange(out, "(k b n a) -> b n k a", k=K, b=B, a=A)
    return out, einops.rearrange(lse, "(k b n) -> b k n", k=K, b=B)


def backward(q, k, v, q_ids, kv_ids, key_bias, out, lse, grad, *, scale):
    """Gradients for q, k, v and key_bias (None without one) from that of the output, `grad` `[B, N, K, A]`."""
    (B, N, K, A), M = q.shape, k.shape[1]
    plan = _Plan(kv_ids, q_ids)
    bk, bq = plan.size, plan.other_size
    dtypes, grad = (q.dtype, k.dtype, v.dtype), grad.astype(v.dtype)
    # ds = p * (dp - delta), delta = sum of p * dp over the keys = out . grad
    delta = _fold(jnp.add, (out.astype(jnp.float32) * grad.astype(jnp.float32)).reshape(-1, A))
    delta = einops.rearrange(delta, "(b n k) 1 -> (k b n)", b=B, k=K)
    lse = einops.rearrange(lse, "b k n -> (k b n)")
    q, k, v, grad = map(_flat, (q, k, v, grad))

    def keys_of(head, block, arrays):
        dq, dk, dv, *dbias = arrays
        at_k, ours, ids, first, stop = block
        here, there = head * (B * M) + at_k, head * (B * N)
        keys, values = _take(k, here, (bk, A)) * scale, _take(v, here, (bk, A))
        bias = 0.0 if key_bias is None else _take(key_bias.reshape(-1), at_k, (bk, 1))
        transposed = keys.T

        def step(start, carry):
            dq, dk, dv, *dbias = carry
            at, q_ids = plan.others(start, stop)
            queries, grads = (_take(x, there + at, (bq, A)) for x in (q, grad))
            lses, deltas = (_take(x, there + at, (bq, 1)).T for x in (lse, delta))
            mask = ids == q_ids
            # Both masks also keep XLA from giving what follows to the kernels of products, which are slower at it.
            logits = jnp.where(mask, _product("ka,qa->kq", keys, queries) + bias, MASKED)
            p = jnp.exp(logits - lses)
            ds = p * (jnp.where(mask, _product("ka,qa->kq", values, grads), 0.0) - deltas)
            dbias = [total + _fold(jnp.add, ds) for total in dbias]
            ds = ds.astype(queries.dtype)
            dv = dv + _product("kq,qa->ka", p.astype(grads.dtype), grads)
            dk = dk + _product("kq,qa->ka", ds, queries)
            more = jax.lax.dynamic_slice(dq, (head, 0, at), (1, A, bq)) + _product("ak,kq->aq", transposed, ds)[None]
            return jax.lax.dynamic_update_slice(dq, more, (head, 0, at)), dk, dv, *dbias

        empty = jnp.zeros((bk, A)), jnp.zeros((bk, A)), *[jnp.zeros((bk, 1)) for _ in dbias]
        dq, more_k, more_v, *more = plan.meet(first, stop, step, (dq, *empty))
        dk, dv = (
            _put(x, jnp.where(ours, new, _take(x, here, (bk, A))), here)
            for x, new in ((dk, more_k * scale), (dv, more_v))
        )
        dbias = [_put(x, jnp.where(ours, new, 0.0) + _take(x, at_k, (bk, 1)), at_k) for x, new in zip(dbias, more)]
        return dq, dk, dv, *dbias

    arrays = [jnp.zeros((K, A, B * N)), jnp.zeros(k.shape), jnp.zeros(v.shape)]
    arrays += [] if key_bias is None else [jnp.zeros(B * M)]
    dq, dk, dv, *dbias = plan.each(K, keys_of, arrays)
    dq = einops.rearrange(dq, "k a (b n) -> b n k a", b=B)
    dk, dv = (einops.rearrange(x, "(k b n a) -> b n k a", k=K, b=B, a=A) for x in (dk, dv))
    dq, dk, dv = (x.astype(dtype) for x, dtype in zip((dq, dk, dv), dtypes))
    return dq, dk, dv, dbias[0].reshape(B, M).astype(key_bias.dtype) if dbias else None
