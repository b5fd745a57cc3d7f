"""Packed attention for GPUs by Pallas on Triton: a program per block, over the blocks of its own segments only.

Forward and backward as in FlashAttention-2 (Dao 2023), with bounds of the loops from segment ids. Block sizes are not
tuned on hardware.

Legend: B rows, N query tokens, M key tokens, K heads, A head dim.
"""

import functools

import einops
import jax
import jax.numpy as jnp

from sorax.attention_blocks import blocks_meet, first_and_stop, fit_block, pad_to

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError as error:
    raise ImportError(
        f"jax {jax.__version__} cannot write Triton kernels with Pallas ({error}): use a jax from 0.10.2 up to but not "
        "with 0.12, or attention(..., implementation='dense')"
    ) from error

BLOCK = 64
UNIT = 16  # the least side of a product of matrices
MASKED, FLOOR, UNSEEN = -1e30, -1e20, 1e30


def _dot(x, y):
    """x y for matrices, summed in float32; float32 ones are not rounded."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=precision)


def _load(ref, at, block):
    return ref[pl.ds(at * block, block)]


def _logits(q, k, q_ids, k_ids, k_bias):
    """Logits and mask `[rows of q, rows of k]`, or of q as k and k as q where the bias is a column."""
    return _dot(q, k.T) + k_bias, (q_ids == k_ids) & (q_ids != 0)


def _forward_kernel(q, k, v, q_ids, k_ids, k_bias, first, stop, out, lse, *, block_k):
    queries, ids = q[...], q_ids[...][:, None]

    def step(at, carry):
        peak, total, acc = carry
        logits, mask = _logits(queries, _load(k, at, block_k), ids, _load(k_ids, at, block_k)[None],
                               _load(k_bias, at, block_k)[None])  # fmt: skip
        logits = jnp.where(mask, logits, MASKED)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp(logits - higher[:, None]), jnp.exp(peak - higher)
        values = _load(v, at, block_k)
        acc = acc * shrink[:, None] + _dot(weights.astype(values.dtype), values)
        return higher, total * shrink + jnp.sum(weights, axis=1), acc

    rows = queries.shape[0]
    empty = jnp.full((rows,), FLOOR, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros(out.shape, jnp.float32)
    peak, total, acc = jax.lax.fori_loop(first[0], stop[0], step, empty)
    safe = jnp.where(total == 0, 1.0, total)
    out[...] = (acc / safe[:, None]).astype(out.dtype)
    lse[...] = jnp.where(total == 0, UNSEEN, peak + jnp.log(safe))


def _dq_kernel(q, k, v, q_ids, k_ids, k_bias, grad, lse, delta, first, stop, dq, *, block_k):
    queries, ids, grads = q[...], q_ids[...][:, None], grad[...]
    lses, deltas = lse[...][:, None], delta[...][:, None]

    def step(at, acc):
        keys = _load(k, at, block_k)
        logits, mask = _logits(queries, keys, ids, _load(k_ids, at, block_k)[None], _load(k_bias, at, block_k)[None])
        p = jnp.where(mask, jnp.exp(logits - lses), 0.0)
        ds = p * (_dot(grads, _load(v, at, block_k).T) - deltas)
        return acc + _dot(ds.astype(keys.dtype), keys)

    dq[...] = jax.lax.fori_loop(first[0], stop[0], step, jnp.zeros(dq.shape, jnp.float32)).astype(dq.dtype)


def _dkv_kernel(q, k, v, q_ids, k_ids, k_bias, grad, lse, delta, first, stop, dk, dv, dbias, *, block_q):
    keys, values, ids, bias = k[...], v[...], k_ids[...][:, None], k_bias[...][:, None]

    def step(at, carry):
        dk, dv, dbias = carry
        queries, grads = _load(q, at, block_q), _load(grad, at, block_q)
        logits, mask = _logits(keys, queries, ids, _load(q_ids, at, block_q)[None], bias)  # keys by queries
        p = jnp.where(mask, jnp.exp(logits - _load(lse, at, block_q)[None]), 0.0)
        ds = p * (_dot(values, grads.T) - _load(delta, at, block_q)[None])
        dv = dv + _dot(p.astype(grads.dtype), grads)
        return dk + _dot(ds.astype(queries.dtype), queries), dv, dbias + jnp.sum(ds, axis=1)

    empty = jnp.zeros(dk.shape, jnp.float32), jnp.zeros(dv.shape, jnp.float32), jnp.zeros(dbias.shape, jnp.float32)
    total = jax.lax.fori_loop(first[0], stop[0], step, empty)
    for ref, value in zip((dk, dv, dbias), total):
        ref[...] = value.astype(ref.dtype)


class _Plan:
    """Whole blocks of everything, `[B, K, n, A]` with A a power of 2, and the bounds of the loops."""

    def __init__(self, q, k, v, q_ids, kv_ids, key_bias, scale, interpret):
        (self.B, self.N, self.K, self.A), self.M = q.shape, k.shape[1]
        self.block_q, n = fit_block(self.N, BLOCK, UNIT)
        self.block_k, m = fit_block(self.M, BLOCK, UNIT)
        # Triton wants powers of 2.
        self.block_q, self.block_k = pl.next_power_of_2(self.block_q), pl.next_power_of_2(self.block_k)
        self.n, self.m = (-(-size // block) * block for size, block in ((n, self.block_q), (m, self.block_k)))
        self.width = max(pl.next_power_of_2(self.A), UNIT)
        self.interpret = interpret
        bias = jnp.zeros(kv_ids.shape, jnp.float32) if key_bias is None else key_bias.astype(jnp.float32)
        q_ids, kv_ids = (pad_to(ids.astype(jnp.int32), size, 1) for ids, size in ((q_ids, self.n), (kv_ids, self.m)))
        self.inputs = (self.heads(q * scale, self.n), self.heads(k, self.m), self.heads(v, self.m),
                       q_ids, kv_ids, pad_to(bias, self.m, 1))  # fmt: skip
        meet = blocks_meet(q_ids, kv_ids, self.block_q, self.block_k)
        self.by_queries, self.by_keys = first_and_stop(meet), first_and_stop(meet.swapaxes(1, 2))

    def heads(self, x, size):
        return pad_to(pad_to(einops.rearrange(x, "b n k a -> b k n a"), size, 2), self.width, 3)

    def tokens(self, x, size, dtype):
        return einops.rearrange(x[:, :, :size, : self.A], "b k n a -> b n k a").astype(dtype)

    def call(self, kernel, inputs, outputs, grid_block, grid_length, whole):
        """A program for every block (`grid_block` of `grid_length` tokens), head and row.

        inputs, outputs: arrays, or shapes, `[B, K, n, A]`, `[B, K, n]`, `[B, n]`. whole: the lengths of those that a
        program is given all of; of the others it gets its block.
        """

        def spec(x, has_heads, is_whole, block):
            shape = (None, None, *x.shape[2:]) if has_heads else (None, *x.shape[1:])
            at = 2 if has_heads else 1
            shape = shape if is_whole else (*shape[:at], block, *shape[at + 1 :])

            def index(i, head, row):
                rest = (0 if is_whole else i,) + (0,) * (x.ndim - at - 1)
                return (row, head, *rest) if has_heads else (row, *rest)

            return pl.BlockSpec(shape, index)

        specs = [spec(x, x.ndim > 2, name in whole, 1 if name in ("first", "stop") else grid_block)
                 for name, x in inputs.items()]  # fmt: skip
        out_specs = [spec(x, True, False, grid_block) for x in outputs]
        # The backend is named by its parameters, for Pallas has more than one for GPUs.
        params = triton.CompilerParams(num_warps=4 if self.width <= 64 else 8, num_stages=2)
        grid = (grid_length // grid_block, self.K, self.B)
        return pl.pallas_call(
            kernel, grid=grid, in_specs=specs, out_specs=out_specs, out_shape=outputs, compiler_params=params,
            interpret=self.interpret,
        )(*inputs.values())  # fmt: skip

    def named(self, bounds):
        names = ("q", "k", "v", "q_ids", "k_ids", "k_bias")
        return dict(zip(names, self.inputs)), dict(zip(("first", "stop"), bounds))

    def shape(self, length, dtype, *rest):
        return jax.ShapeDtypeStruct((self.B, self.K, length, *rest), dtype)


def forward(q, k, v, q_ids, kv_ids, key_bias, *, scale, interpret=False):
    """Output `[B, N, K, A]` and log-sum-exp of the logits `[B, K, N]`; see `sorax.attention`."""
    plan = _Plan(q, k, v, q_ids, kv_ids, key_bias, scale, interpret)
    inputs, bounds = plan.named(plan.by_queries)
    outputs = plan.shape(plan.n, v.dtype, plan.width), plan.shape(plan.n, jnp.float32)
    kernel = functools.partial(_forward_kernel, block_k=plan.block_k)
    whole = ("k", "v", "k_ids", "k_bias")
    out, lse = plan.call(kernel, inputs | bounds, outputs, plan.block_q, plan.n, whole)
    return plan.tokens(out, plan.N, v.dtype), lse[:, :, : plan.N]


def backward(q, k, v, q_ids, kv_ids, key_bias, out, lse, grad, *, scale, interpret=False):
    """Gradients for q, k, v and key_bias (None without one) from that of the output, `grad` `[B, N, K, A]`."""
    plan = _Plan(q, k, v, q_ids, kv_ids, key_bias, scale, interpret)
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=3).swapaxes(1, 2)  # [B, K, N]
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, plan.n - plan.N)), constant_values=UNSEEN)
    given = dict(grad=plan.heads(grad.astype(v.dtype), plan.n), lse=lse, delta=pad_to(delta, plan.n, 2))

    inputs, bounds = plan.named(plan.by_queries)
    kernel = functools.partial(_dq_kernel, block_k=plan.block_k)
    outputs = (plan.shape(plan.n, q.dtype, plan.width),)
    whole = ("k", "v", "k_ids", "k_bias")
    (dq,) = plan.call(kernel, inputs | given | bounds, outputs, plan.block_q, plan.n, whole)

    inputs, bounds = plan.named(plan.by_keys)
    kernel = functools.partial(_dkv_kernel, block_q=plan.block_q)
    outputs = (plan.shape(plan.m, k.dtype, plan.width), plan.shape(plan.m, v.dtype, plan.width),
               plan.shape(plan.m, jnp.float32))  # fmt: skip
    whole = ("q", "q_ids", "grad", "lse", "delta")
    dk, dv, dbias = plan.call(kernel, inputs | given | bounds, outputs, plan.block_k, plan.m, whole)
    dq = plan.tokens(dq, plan.N, jnp.float32) * scale
    dbias = None if key_bias is None else jnp.sum(dbias, axis=1)[:, : plan.M].astype(key_bias.dtype)
    return dq.astype(q.dtype), plan.tokens(dk, plan.M, k.dtype), plan.tokens(dv, plan.M, v.dtype), dbias
