"""Convolutions of videos, causal in time, in the form that each backend runs fastest; no transposed convolution.

Legend: B batch, T frames, H height, W width, C channels.
"""

import functools

import einops
import jax
import jax.numpy as jnp
from flax import nnx


class Past:
    """What a causal network keeps from one chunk of a video to the next: each layer's last input frames.

    The layers that look back come to it in the same order in every chunk; each takes what it left in the chunk before
    and leaves what it needs in the next. Made anew for each call, from the `frames` of the last one: a value that
    travels beside the activations, not a state of the network.

    Args:
        frames: `frames` of the chunk before, or None for the first chunk.
    """

    def __init__(self, frames=None):
        self.first = frames is None
        self._before = iter(frames or ())
        self._left = []

    def take(self):
        """What this layer left in the chunk before; None in the first chunk."""
        return None if self.first else next(self._before)

    def leave(self, frames):
        """Keeps frames for the same layer's next chunk."""
        self._left.append(frames)

    @property
    def frames(self):
        """What the next chunk needs: a tuple of arrays, a pytree."""
        return tuple(self._left)


def conv_causal(x, kernel, before=None):
    """3-D convolution of x `[B, T, H, W, C]` by kernel `[kt, kh, kw, C, C_out]`: causal in time, SAME in space.

    XLA's CPU backend runs a 3-D convolution several times slower than the 2-D convolutions of its time taps, so
    there it is a sum of those, none of which reads padding; accelerators take it whole (`experiments/bench/conv.py`).

    Args:
        before: the kt - 1 frames before x `[B, kt - 1, H, W, C]`; None for zeros.
    """
    T = x.shape[1]
    if before is None:
        kernel = kernel[-T:]  # taps further back than the clip is long see padding alone
    else:
        x = jnp.concatenate([before, x], axis=1)
    missing = kernel.shape[0] - 1 if before is None else 0  # frames of zeros to be read before x

    def whole(x, kernel):
        kh, kw = kernel.shape[1:3]
        padding = ((missing, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2))
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def by_taps(x, kernel):
        out = conv_space(x[:, x.shape[1] - T :], kernel[-1])
        for back in range(1, kernel.shape[0]):
            if before is None:
                past = conv_space(x[:, : T - back], kernel[-1 - back])
                out = out + jnp.pad(past, ((0, 0), (back, 0), (0, 0), (0, 0), (0, 0)))
            else:
                end = x.shape[1] - back
                out = out + conv_space(x[:, end - T : end], kernel[-1 - back])
        return out

    return jax.lax.platform_dependent(x, kernel, cpu=by_taps, default=whole)


def conv_space(x, kernel, *, stride=(1, 1), padding="SAME"):
    """2-D convolution of every frame of `[B, T, H, W, C]`; kernel `[kh, kw, C, C_out]`."""
    B = x.shape[0]
    frames = einops.rearrange(x, "b t h w c -> (b t) h w c")
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(frames.shape[1:3], kernel.shape[:2], stride, padding)
    out = conv_frames(frames, kernel, tuple(stride), tuple(map(tuple, padding)))
    return einops.rearrange(out, "(b t) h w c -> b t h w c", b=B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_frames(x, kernel, stride, padding):
    """2-D convolution of x `[N, H, W, C]` by kernel `[kh, kw, C, C_out]`; padding: (before, after) of H and of W.

    XLA's CPU backend has a fast convolution for this order of axes, and puts others into it in a program's outermost
    computation alone: the gradients of `conv_general_dilated`, whose axes are exchanged, are many times slower within
    a branch or a loop. So its gradients are given in this order.
    """
    return _conv(x, kernel, window_strides=stride, padding=padding)


def _conv(x, kernel, **window):
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **window)


def _conv_frames_forward(x, kernel, stride, padding):
    return conv_frames(x, kernel, stride, padding), (x, kernel)


def _conv_frames_backward(stride, padding, kept, slope):
    def plain(x, kernel, slope):
        return jax.vjp(lambda x, kernel: _conv(x, kernel, window_strides=stride, padding=padding), x, kernel)[1](slope)

    def in_order(x, kernel, slope):
        sides, ends = [], []  # what is padded for the gradient of x, and of the kernel
        for size, taps, count, step, (before, _) in zip(x.shape[1:3], kernel.shape, slope.shape[1:3], stride, padding):
            reach = (count - 1) * step  # from the first output to the last, in pixels
            sides.append((taps - 1 - before, size - 1 - reach + before))
            ends.append((before, taps + reach - size - before))
        turned = jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)
        of_x = _conv(slope, turned, window_strides=(1, 1), padding=sides, lhs_dilation=stride)
        of_kernel = _conv(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(slope, (1, 2, 0, 3)), window_strides=(1, 1),
                          padding=ends, rhs_dilation=stride)  # fmt: skip
        return of_x, jnp.transpose(of_kernel, (1, 2, 0, 3))

    return jax.lax.platform_dependent(*kept, slope, cpu=in_order, default=plain)


conv_frames.defvjp(_conv_frames_forward, _conv_frames_backward)


def conv_same(x, kernel, strides: tuple[int, int, int]):
    """3-D convolution of x `[B, T, H, W, C]` with SAME padding and strides, by kernel `[kt, kh, kw, C, C_out]`.

    By time taps on a CPU, as `conv_causal`.
    """
    T, kt, stride = x.shape[1], kernel.shape[0], strides[0]
    count = -(-T // stride)
    missing = max(0, (count - 1) * stride + kt - T)

    def whole(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def by_taps(x, kernel):
        x = jnp.pad(x, ((0, 0), (missing // 2, missing - missing // 2), (0, 0), (0, 0), (0, 0)))
        last = (count - 1) * stride + 1
        return sum(conv_space(x[:, tap : tap + last : stride], kernel[tap], stride=strides[1:]) for tap in range(kt))

    return jax.lax.platform_dependent(x, kernel, cpu=by_taps, default=whole)


class Conv(nnx.Module):
    """Convolution with kernel (kt, kh, kw), causal in time: only past frames are padded, with zeros.

    It starts as the convolution of each frame alone (past taps are zero), so that what is learned from images holds
    for every frame of a clip from the start: an inflated image network.
    """

    def __init__(self, n_in, n_out, kernel_size, rngs, *, std_scale=1.0):
        kt, kh, kw = kernel_size
        std = std_scale * (n_in * kh * kw) ** -0.5
        now = std * jax.random.normal(rngs.params(), (1, kh, kw, n_in, n_out))
        self.kernel = nnx.Param(jnp.pad(now, ((kt - 1, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
        self.bias = nnx.Param(jnp.zeros(n_out))

    def __call__(self, x, past: Past | None = None):
        kernel = self.kernel[...]
        kt, kh, kw = kernel.shape[:3]
        if (kt, kh, kw) == (1, 1, 1):
            return x @ kernel[0, 0, 0] + self.bias[...]
        before = None
        if past is not None and kt > 1:
            before = past.take()
            seen = x if before is None else jnp.concatenate([before, x], axis=1)
            missing = max(0, kt - 1 - seen.shape[1])  # frames of zeros before a first chunk that is shorter
            past.leave(jnp.pad(seen, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))[:, -(kt - 1) :])
        if x.shape[1] == 0:
            return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)
        return conv_causal(x, kernel, before) + self.bias[...]
