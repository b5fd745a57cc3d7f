"""Floating-point operations of the networks, counted analytically: attention by segment, never by row.

A multiply and an add are two operations; the backward pass costs twice the forward one (Kaplan et al. 2020).
"""

import numpy as np

from sorax.dit import DiTConfig
from sorax.text import TextConfig


def dit_forward(config: DiTConfig, lengths, text_lengths, *, share=0.0, route_layers=(0, 0)) -> float:
    """Forward operations of the DiT for samples of `lengths` video tokens with `text_lengths` text slots each.

    share, route_layers: of the tokens that skip layers, see `sorax.routing` and `DiT`.
    """
    s, m = np.asarray(lengths, np.float64), np.asarray(text_lengths, np.float64)
    D, F = config.width, config.ffn_dim
    patch_out = config.patch_dim // config.in_channels * config.out_channels
    narrow = len(range(config.num_layers)[slice(*route_layers)]) if share else 0  # layers, of the tokens that remain
    layers = 0.0
    for number, n in ((config.num_layers - narrow, s), (narrow, np.floor((1 - share) * s + 1e-4))):
        layers += number * ((2 * 6 * D * D + 2 * 2 * D * F) * n.sum() + 4 * D * np.sum(n * (n + m)))
    ends = 2 * D * (config.patch_dim + patch_out) * s.sum()
    text = config.num_layers * 2 * 2 * D * D + 2 * D * (config.text_dim + D)
    level = 2 * (config.freq_dim * D + D * D + 6 * D * D)
    return float(layers + ends + text * m.sum() + level * len(s))


def text_forward(config: TextConfig, text_lengths) -> float:
    """Forward operations of the text encoder for captions of `text_lengths` slots."""
    m = np.asarray(text_lengths, np.float64)
    inner = config.num_heads * config.head_dim
    token = config.num_layers * (2 * 4 * config.width * inner + 2 * 3 * config.width * config.ffn_dim)
    return float(token * m.sum() + config.num_layers * 4 * inner * np.sum(m * m))


def rows_work(dit: DiTConfig, text: TextConfig, batch, **routing) -> dict:
    """Host-side counts of a batch of packed rows (numpy): samples, useful tokens, capacity, and training FLOPs.

    routing: that of `dit_forward`.
    """
    lengths, text_lengths = [], []
    for ids, text_ids in zip(batch["segment_ids"], batch["text_segment_ids"]):
        counts, text_counts = np.bincount(ids)[1:], np.bincount(text_ids)[1:]
        lengths.extend(counts)
        text_lengths.extend(text_counts[: len(counts)])
    flops = 3 * (dit_forward(dit, lengths, text_lengths, **routing) + text_forward(text, text_lengths))
    return dict(samples=len(lengths), tokens=int(np.sum(lengths)), capacity=batch["segment_ids"].size, flops=flops)
