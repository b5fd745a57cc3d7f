"""Numbers about videos: fidelity to a reference, and rates with intervals of many judgements (`sorax.judging`)."""

import itertools
import math

import numpy as np
from skimage.metrics import structural_similarity


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape, over all values; inf if they are equal."""
    a, b = _paired(a, b)
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64)
    return math.inf if error == 0 else float(10 * math.log10(255**2 / error))


def ssim(a, b):
    """Mean structural similarity of two uint8 videos [T, H, W, 3], frame by frame (Wang et al. 2004).

    Gaussian window of 1.5 pixels, as the paper; frames of at least 11 pixels a side.
    """
    a, b = _paired(a, b)
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, not {a.shape[1]} x {a.shape[2]}")
    options = dict(channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(np.mean([structural_similarity(x, y, **options) for x, y in zip(a, b)]))


def flicker(a, b):
    """Mean absolute error of the frame differences of uint8 videos [T, H, W, 3], in 8-bit levels; None for one frame.

    mean |(a[t+1] - a[t]) - (b[t+1] - b[t])| over frames, pixels and channels: what a copy adds to or takes from motion.
    An error that stands still, such as a shift of colour, costs nothing here.
    """
    a, b = _paired(a, b)
    if len(a) < 2:
        return None
    error = a.astype(np.int16) - b  # its differences are within +-510
    return float(np.mean(np.abs(np.diff(error, axis=0)), dtype=np.float64))


def _paired(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"two uint8 videos of one shape are compared, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    return a, b


def wilson_interval(k, n, z=1.959964):
    """95 % interval (lo, hi) of a rate of which k of n were seen (Wilson 1927); (0, 1) if nothing was seen."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = k / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(judgements):
    """Rates of a list of judgements: dict attribute -> dict(rate, k, n, lo, hi), the interval being of 95 %.

    The keys of the judgements are the attributes. n counts the clips whose caption says something about one (it is not
    None); rate is nan if none does.
    """
    names = list(dict.fromkeys(itertools.chain(*judgements)))
    table = {}
    for name in names:
        values = [bool(j[name]) for j in judgements if j.get(name) is not None]
        k, n = sum(values), len(values)
        lo, hi = wilson_interval(k, n)
        table[name] = dict(rate=k / n if n else math.nan, k=k, n=n, lo=lo, hi=hi)
    return table
