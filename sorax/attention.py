"""Packed attention: one function for self-, cross- and text attention over rows that hold several samples.

Legend: B rows, N query tokens, M key tokens, K heads, A head dim.
"""

import functools

import einops
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

IMPLEMENTATIONS = ("auto", "dense", "blocked", "splash", "triton", "cudnn")
# Queries times keys of a row up to which dense attention is the faster: measured on a CPU, where blocks pay above it.
SMALL = 192 * 192
MASKED = -1e30  # finite, so that a padding query (which may see nothing) gives zeros and no NaN gradient


def attention(q, k, v, q_segment_ids, kv_segment_ids, *, key_bias=None, bias=None, scale=None, implementation="auto"):
    """Softmax attention in which a query sees the keys of its own segment and nothing else.

    Args:
        q: `[B, N, K, A]` queries. k, v: `[B, M, K, A]` keys and values.
        q_segment_ids: `[B, N]` int, kv_segment_ids: `[B, M]` int, none negative. A query attends to a key iff the ids
            are equal and non-zero; 0 is padding, whose output is zero. All but "cudnn" are right for any order of the
            ids; blocks can be skipped where segments are contiguous and ascending.
        key_bias: `[B, M]` float, added to the logits of a key. `log(n)` makes it count as `n` equal keys.
        bias: added to the logits; anything that broadcasts to `[B, K, N, M]`. Dense only.
        scale: factor on the logits; `A ** -0.5` if None.
        implementation: all but "dense" compute pairs of blocks that share a segment, and no others, forward and
            backward, and keep nothing of size N x M.
            "dense": masked softmax over all pairs; the reference.
            "blocked": plain XLA, for CPUs. "splash": Pallas for TPUs. "triton": Pallas for GPUs.
            "cudnn": NVIDIA's packed kernels, Hopper or later, 16-bit floats, no key_bias, segments contiguous and
            ascending (else the output is NaN).
            "auto": dense for up to `SMALL` pairs of tokens a row and where there is a `bias`; cudnn where this process
            has a GPU for it and the arguments allow it; else the one of the platform that the program is compiled
            for, which need not be that of this process.
            On other platforms than theirs, "splash" and "triton" are interpreted: slow, for tests.

    Returns:
        `[B, N, K, A]` in the dtype of `v`. The softmax is taken in float32. Differentiable once, in reverse mode
        ("dense" also otherwise); the output and the log-sum-exp that the gradient needs bear the checkpoint name
        "attention". Inside `jax.shard_map`, which must be told `check_vma=False`, rows and heads may be split.

    Raises:
        ValueError: an unknown implementation, or one that cannot do what is asked of it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if bias is not None and implementation not in ("auto", "dense"):
        raise ValueError(f"attention: {implementation!r} takes no bias, only key_bias; use 'dense'")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "auto":
        implementation = _choose(q, k, v, key_bias, bias)
    if implementation == "dense":
        return _dense(q, k, v, q_segment_ids, kv_segment_ids, key_bias, bias, scale)
    if implementation == "cudnn":
        from sorax import attention_cudnn

        return attention_cudnn.attention(q, k, v, q_segment_ids, kv_segment_ids, key_bias, scale)
    return _blocked(implementation, float(scale), q, k, v, q_segment_ids, kv_segment_ids, key_bias)


def _choose(q, k, v, key_bias, bias):
    if bias is not None or q.shape[1] * k.shape[1] <= SMALL:
        return "dense"
    if jax.default_backend() == "gpu" and key_bias is None:
        from sorax import attention_cudnn

        if attention_cudnn.why_not(q, k, v) is None:
            return "cudnn"
    return "auto"


def _dense(q, k, v, q_segment_ids, kv_segment_ids, key_bias, bias, scale):
    B, N, K, _ = q.shape
    # Heads merged into the batch axis, and the division by the sum after the product with the values:
    # both are what XLA's CPU backend runs fastest, and neither costs anything elsewhere.
    q, k, v = (einops.rearrange(x, "b n k a -> (b k) n a") for x in (q, k, v))
    logits = jnp.einsum("xna,xma->xnm", q * scale, k, preferred_element_type=jnp.float32)  # [B*K, N, M]
    logits = logits.reshape(B, K, *logits.shape[1:])
    if key_bias is not None:
        logits = logits + key_bias[:, None, None]
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


# --- Kernels: pairs of functions forward(q, k, v, ids, ids, key_bias) -> out, log-sum-exp, and backward


def _on_platform(implementation, which, scale):
    """The function `which` ("forward" or "backward") of an implementation; it looks up its platform when lowered."""
    from sorax import attention_cpu, attention_gpu, attention_tpu

    def of(module, **settings):
        return functools.partial(getattr(module, which), scale=scale, **settings)

    if implementation == "blocked":
        return of(attention_cpu)
    if implementation == "splash":
        kernels = dict(tpu=of(attention_tpu), default=of(attention_tpu, interpret=True))
    elif implementation == "triton":
        kernels = dict(cuda=of(attention_gpu), rocm=of(attention_gpu), default=of(attention_gpu, interpret=True))
    else:
        gpu = of(attention_gpu)
        kernels = dict(tpu=of(attention_tpu), cuda=gpu, rocm=gpu, default=of(attention_cpu))
    return lambda *args: jax.lax.platform_dependent(*args, **kernels)


# jit: the kernels of all platforms are traced once a shape, not once a call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(implementation, scale, *args):
    return _on_platform(implementation, "forward", scale)(*args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(implementation, scale, *args):
    return _on_platform(implementation, "backward", scale)(*args)


# The platform is chosen inside the rules: a gradient through `platform_dependent` would keep what any branch wants.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(implementation, scale, q, k, v, q_ids, kv_ids, key_bias):
    return _forward(implementation, scale, q, k, v, q_ids, kv_ids, key_bias)[0]


def _blocked_forward(implementation, scale, q, k, v, q_ids, kv_ids, key_bias):
    out, lse = _forward(implementation, scale, q, k, v, q_ids, kv_ids, key_bias)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, q_ids, kv_ids, key_bias, out, lse)


def _blocked_backward(implementation, scale, residuals, grad):
    dq, dk, dv, dbias = _backward(implementation, scale, *residuals, grad)
    return dq, dk, dv, None, None, dbias


_blocked.defvjp(_blocked_forward, _blocked_backward)
