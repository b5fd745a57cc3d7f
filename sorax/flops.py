"""Floating-point operations of the networks, counted analytically: attention by segment, never by row.

A multiply and an add are two operations; the backward pass costs twice the forward one (Kaplan et al. 2020). What is
recomputed to save memory is no work of the model, and is not counted.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sorax.captioner import CaptionerConfig
from sorax.dit import DiTConfig
from sorax.functional import abstract
from sorax.text import TextConfig
from sorax.vae import VAE, VAEConfig


def dit_forward(
    config: DiTConfig, lengths, text_lengths, *, levels: int | None = None, share=0.0, route_layers=(0, 0)
) -> float:
    """Forward operations of the DiT for samples of `lengths` video tokens with `text_lengths` text slots each.

    levels: noise levels that a time embedding is made of; None for one a sample. share, route_layers: of the tokens
    that skip layers, see `sorax.routing` and `DiT`.
    """
    s, m = np.asarray(lengths, np.float64), np.asarray(text_lengths, np.float64)
    D, F = config.width, config.ffn_dim
    patch_out = config.patch_dim // config.in_channels * config.out_channels
    tokens = sum(number * n.sum() for number, n in _tokens(config, s, share, route_layers))
    ends = 2 * D * (config.patch_dim + patch_out) * s.sum()
    text = config.num_layers * 2 * 2 * D * D + 2 * D * (config.text_dim + D)
    level = 2 * (config.freq_dim * D + D * D + 6 * D * D) * (len(s) if levels is None else levels)
    pairs = dit_attention(config, s, m, share=share, route_layers=route_layers)
    return float((2 * 6 * D * D + 2 * 2 * D * F) * tokens + ends + text * m.sum() + pairs + level)


def dit_attention(config: DiTConfig, lengths, text_lengths, *, share=0.0, route_layers=(0, 0)) -> float:
    """The part of `dit_forward` that is products of queries, keys and values: 4 D a pair, to video and to text."""
    s, m = np.asarray(lengths, np.float64), np.asarray(text_lengths, np.float64)
    layers = _tokens(config, s, share, route_layers)
    return float(sum(number * 4 * config.width * np.sum(n * (n + m)) for number, n in layers))


def _tokens(config, s, share, route_layers):
    """(layers, tokens of each sample in them): all tokens, and those that remain where a share of them skips."""
    narrow = len(range(config.num_layers)[slice(*route_layers)]) if share else 0
    return (config.num_layers - narrow, s), (narrow, np.floor((1 - share) * s + 1e-4))


def text_forward(config: TextConfig, text_lengths) -> float:
    """Forward operations of the text encoder for captions of `text_lengths` slots."""
    m = np.asarray(text_lengths, np.float64)
    inner = config.num_heads * config.head_dim
    token = config.num_layers * (2 * 4 * config.width * inner + 2 * 3 * config.width * config.ffn_dim)
    return float(token * m.sum() + config.num_layers * 4 * inner * np.sum(m * m))


@functools.cache
def vae_forward(config: VAEConfig, num_frames: int, height: int, width: int) -> tuple[float, float]:
    """Forward operations of the encoder and of the decoder for one video of T x H x W pixels, by tracing them.

    Raises:
        ValueError: the video is off the VAE's grid.
    """
    graphdef, state = abstract(VAE, config)
    latents = (1, *config.latent_shape(num_frames, height, width), config.latent_channels)
    video = jax.ShapeDtypeStruct((1, num_frames, height, width, 3), jnp.float32)
    encode = traced(lambda state, x: nnx.merge(graphdef, state).encode(x), state, video)
    latents = jax.ShapeDtypeStruct(latents, jnp.float32)
    return encode, traced(lambda state, z: nnx.merge(graphdef, state).decode(z), state, latents)


def traced(function, *args) -> float:
    """Operations of the matrix products and convolutions of a function of arrays (or of their shapes).

    Counted in its jaxpr, a loop as often as it runs (of a `cond` the dearest branch; a `while` and a kernel not at
    all). Nothing is computed.
    """
    return _products(jax.make_jaxpr(function)(*args).jaxpr)


def _products(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = settings["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contract)
        elif name == "conv_general_dilated":
            kernel, out_channel = equation.invars[1].aval.shape, settings["dimension_numbers"].rhs_spec[0]
            total += 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[out_channel]
        elif name == "scan":
            total += settings["length"] * _products(settings["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_products(branch.jaxpr) for branch in settings["branches"])
        elif name not in ("while", "pallas_call"):
            total += sum(_products(inner) for inner in jax.core.jaxprs_in_params(settings))
    return total


def rows_work(dit: DiTConfig, text: TextConfig | None, batch, **options) -> dict:
    """Host-side counts of this process's packed rows (numpy) of a step: samples, tokens (places of the rows),
    useful_tokens (those that hold a sample's) and model_flops of training. text, options: those of `train_rows`."""
    lengths, text_lengths = [], []
    for ids, text_ids in zip(batch["segment_ids"], batch["text_segment_ids"]):
        counts, text_counts = np.bincount(ids)[1:], np.bincount(text_ids)[1:]
        lengths.extend(counts)
        text_lengths.extend(text_counts[: len(counts)])
    work = train_rows(dit, text, lengths, text_lengths, len(batch["segment_ids"]), **options)
    return dict(samples=len(lengths), tokens=batch["segment_ids"].size, useful_tokens=int(np.sum(lengths)),
                model_flops=work)  # fmt: skip


def train_rows(
    dit: DiTConfig, text: TextConfig | None, lengths, text_lengths, rows: int, *, frozen=(), **routing
) -> float:
    """Operations of a training step (forward and backward) on samples packed in so many rows, all samples together.

    A row has a noise level a sample, and the clean one. routing: that of `dit_forward`.

    Args:
        text: None where captions were embedded before.
        frozen: networks that are not trained. A text encoder then has no backward pass, and the affine layers of a DiT
            no gradients of kernels; those of the adapters of a LoRA, a hundredth of the work or less, are not counted.
    """
    forward = dit_forward(dit, lengths, text_lengths, levels=len(lengths) + rows, **routing)
    work = 3 * forward + ((1 if "text" in frozen else 3) * text_forward(text, text_lengths) if text else 0)
    return work - ((forward - dit_attention(dit, lengths, text_lengths, **routing)) if "dit" in frozen else 0)


def vae_work(config: VAEConfig, shape) -> dict:
    """Host-side counts of this process's clips `[B, T, H, W, 3]` of a step: frames, and model_flops of training."""
    B, T, H, W, _ = shape
    return dict(frames=B * T, model_flops=3 * B * sum(vae_forward(config, T, H, W)))


def captioner_work(config: CaptionerConfig, batch) -> dict:
    """As `rows_work`, of a captioner."""
    lengths = np.concatenate([np.bincount(ids)[1:] for ids in batch["segment_ids"]]).astype(np.float64)
    texts = np.concatenate([np.bincount(ids)[1:] for ids in batch["text_segment_ids"]]).astype(np.float64)
    n, m, D = lengths.sum(), texts.sum(), config.width
    mlp, read = 2 * D * config.ffn_dim, 0
    if config.reads != "text":
        read = (config.patch_dim + 3 * config.head_dim) * D + (config.patch_dim + D) * config.ffn_dim
    weights = config.encoder_layers * (4 * D * D + mlp) * n + read * n
    weights += config.decoder_layers * ((6 * D * D + mlp) * m + 2 * D * D * n) + D * config.vocab_size * m
    pairs = config.encoder_layers * np.sum(lengths**2)
    pairs += config.decoder_layers * np.sum(texts**2 + texts * lengths[: len(texts)])
    return dict(samples=len(lengths), tokens=batch["segment_ids"].size, useful_tokens=int(n), text_tokens=int(m),
                model_flops=float(3 * (2 * weights + 4 * D * pairs)))  # fmt: skip
