"""Floating-point operations of the networks, counted analytically: attention by segment, never by row.

A multiply and an add are two operations; the backward pass costs twice the forward one (Kaplan et al. 2020).
"""

import numpy as np

from sorax.dit import DiTConfig
from sorax.text import TextConfig


def dit_forward(config: DiTConfig, lengths, text_lengths) -> float:
    """Forward operations of the DiT for samples of `lengths` video tokens with `text_lengths` text slots each."""
    s, m = np.asarray(lengths, np.float64), np.asarray(text_lengths, np.float64)
    D, F = config.width, config.ffn_dim
    patch_out = config.patch_dim // config.in_channels * config.out_channels
    token = config.num_layers * (2 * 6 * D * D + 2 * 2 * D * F) + 2 * D * (config.patch_dim + patch_out)
    text = config.num_layers * 2 * 2 * D * D + 2 * D * (config.text_dim + D)
    pairs = config.num_layers * 4 * D * np.sum(s * (s + m))
    level = 2 * (config.freq_dim * D + D * D + 6 * D * D)
    return float(token * s.sum() + text * m.sum() + pairs + level * len(s))


def text_forward(config: TextConfig, text_lengths) -> float:
    """Forward operations of the text encoder for captions of `text_lengths` slots."""
    m = np.asarray(text_lengths, np.float64)
    inner = config.num_heads * config.head_dim
    token = config.num_layers * (2 * 4 * config.width * inner + 2 * 3 * config.width * config.ffn_dim)
    return float(token * m.sum() + config.num_layers * 4 * inner * np.sum(m * m))


def rows_work(dit: DiTConfig, text: TextConfig, batch) -> dict:
    """Host-side counts of a batch of packed rows (numpy): samples, useful tokens, capacity, and training FLOPs."""
    lengths, text_lengths = [], []
    for ids, text_ids in zip(batch["segment_ids"], batch["text_segment_ids"]):
        counts, text_counts = np.bincount(ids)[1:], np.bincount(text_ids)[1:]
        lengths.extend(counts)
        text_lengths.extend(text_counts[: len(counts)])
    flops = 3 * (dit_forward(dit, lengths, text_lengths) + text_forward(text, text_lengths))
    return dict(samples=len(lengths), tokens=int(np.sum(lengths)), capacity=batch["segment_ids"].size, flops=flops)
