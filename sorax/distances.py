"""Distances between two sets of feature vectors: Fréchet (FVD) and kernel (MMD, as JEDi), with intervals.

Both are estimates from samples. The Fréchet distance is biased upwards, more so the fewer videos there are: numbers of
different n are not comparable, and with no more videos than features its covariances are singular: it refuses. The
kernel distance is unbiased at any n: around zero, and as often below it, for two sets of one distribution.
"""

from collections.abc import Callable

import numpy as np

from sorax.errors import UserError

KERNEL_LEAST = 4  # videos of each set: its interval needs halves of two
KERNEL_SCALE = 100.0  # as JEDi prints it
Z = 1.959964  # of a 95 % interval


def frechet_distance(x, y, *, what: str = "FVD") -> float:
    """Fréchet distance of the Gaussians of two sets of features (Dowson and Landau 1982; for videos Unterthiner 2018).

    |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), covariances over n - 1. The last trace is the sum of singular
    values of A B^T, where A^T A = C_x and B^T B = C_y are QR factors of the centred features: no root of a matrix, no
    imaginary part, no offset that keeps it from failing.

    Args:
        x, y: `[n, D]` and `[m, D]`, n and m above D. what: names it in errors.

    Raises:
        UserError: there are too few vectors for covariances of full rank. Nothing is drawn again to make up for them.
    """
    x, y = _pair(x, y)
    check_frechet(len(x), len(y), x.shape[1], what)
    return _frechet(x, y)


def check_frechet(n: int, m: int, dim: int, what: str = "FVD"):
    """Raises UserError where sets of n and m videos are too small for the Fréchet distance of `dim` features."""
    if min(n, m) <= dim:
        raise UserError(f"{what} over {dim} features needs more than {dim} videos on either side, and there are {n} "
                        f"and {m}: add videos, or leave it out (the kernel distance needs {KERNEL_LEAST})")  # fmt: skip


def _frechet(x, y):
    mean = x.mean(0) - y.mean(0)
    a, b = (_factor(z) for z in (x, y))
    product = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(mean @ mean + np.sum(a * a) + np.sum(b * b) - 2 * product, 0.0))


def _factor(x):
    """R with R^T R the covariance of rows."""
    return np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")


def kernel_distance(x, y, *, degree: int = 2, gamma: float | None = None, coef0: float = 0.0) -> float:
    """Squared maximum mean discrepancy under k(a, b) = (gamma a.b + coef0)^degree, times 100; without bias.

    The U-statistic of Gretton et al. 2012 (lemma 6), with the kernel of JEDi (Luo et al. 2024, arXiv 2410.05203):
    degree 2, gamma 1 / D, coef0 0. JEDi's own code takes the mean over all pairs, a vector with itself among them,
    which adds a positive bias that falls with n.

    Args:
        x, y: `[n, D]` and `[m, D]`, n and m at least 2.

    Raises:
        UserError: fewer.
    """
    return _mmd(*_grams(*_pair(x, y), degree, gamma, coef0))


def _grams(x, y, degree, gamma, coef0):
    if min(len(x), len(y)) < 2:
        raise UserError(f"the kernel distance compares sets of at least 2 videos, these have {len(x)} and {len(y)}")
    gamma = 1 / x.shape[1] if gamma is None else gamma
    return tuple((gamma * (a @ b.T) + coef0) ** degree for a, b in ((x, x), (y, y), (x, y)))


def _mmd(xx, yy, xy):
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(KERNEL_SCALE * (within - 2 * xy.mean()))


def frechet_cell(x, y, *, draws: int = 20) -> dict:
    """Cell of a report: the Fréchet distance with a 95 % interval by subsampling, n the smaller set's size."""
    value, (x, y) = frechet_distance(x, y), _pair(x, y)
    spread = subsample_std(lambda i, j: _frechet(x[i], y[j]), len(x), len(y), draws, least=x.shape[1] + 1)
    return cell(value, spread, min(len(x), len(y)), lowest=0.0)


def kernel_cell(x, y, *, draws: int = 200) -> dict:
    """Cell of a report: the kernel distance with a 95 % interval by subsampling, n the smaller set's size.

    Raises:
        UserError: fewer than KERNEL_LEAST videos in a set.
    """
    x, y = _pair(x, y)
    if min(len(x), len(y)) < KERNEL_LEAST:
        raise UserError(f"the kernel distance and its interval need at least {KERNEL_LEAST} videos on either side, and "
                        f"there are {len(x)} and {len(y)}: add videos")  # fmt: skip
    xx, yy, xy = _grams(x, y, 2, None, 0.0)
    spread = subsample_std(lambda i, j: _mmd(xx[np.ix_(i, i)], yy[np.ix_(j, j)], xy[np.ix_(i, j)]), len(x), len(y),
                           draws)  # fmt: skip
    return cell(_mmd(xx, yy, xy), spread, min(len(x), len(y)))


def cell(value: float, spread: float, n: int, unit: str = "", lowest: float | None = None) -> dict:
    """Cell of a report (see `sorax.statistics`) of an estimate and its standard deviation; lower is better."""
    lo = value - Z * spread
    return dict(kind="mean", n=n, value=value, lo=lo if lowest is None else max(lo, lowest), hi=value + Z * spread,
                unit=unit, better="low")  # fmt: skip


def subsample_std(statistic: Callable, n: int, m: int, draws: int, *, least: int = 2, seed: int = 0) -> float:
    """Standard deviation of a statistic of two samples, from its values on parts drawn without putting back.

    A part of h of n has the variance s^2 (1/h - 1/n) around the whole where the whole has s^2 / n (the delete-d
    jackknife, Shao and Wu 1989), so its deviation times sqrt(h / (n - h)) is that of the whole. Parts are halves, or
    `least` where that is more. A bootstrap would draw the same video twice, which both distances take for closeness.
    Of an unbiased kernel distance of two sets of one distribution, whose variance falls faster, it says too much
    (by up to sqrt(3)).

    Args:
        statistic: of indices into the first sample and indices into the second.
    """
    share = max(0.5, least / min(n, m))
    h, k = (min(int(np.ceil(share * size)), size - 1) for size in (n, m))
    rng = np.random.default_rng(seed)
    values = [statistic(rng.permutation(n)[:h], rng.permutation(m)[:k]) for _ in range(draws)]
    left = min(n - h, m - k) / min(n, m)
    return float(np.std(values, ddof=1) * np.sqrt((1 - left) / left))


def _pair(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"two sets of vectors of one length are compared, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features hold NaN or infinite values")
    return x, y
