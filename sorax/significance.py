"""Whether two results differ: differences of rates and means with 95 % intervals, tests, and Holm's correction.

Every difference is b - a, and comes as dict(difference, lo, hi, p, n): `lo`, `hi` and `p` are None where the data are
too few to say; n is the number of pairs, or of both samples together.
"""

import math

import numpy as np
from scipy import stats

from sorax.metrics import wilson_interval

_Z = 1.959964  # two-sided, 95 %


def paired_rates(a, b) -> dict:
    """Difference of two rates over the same cases.

    Args:
        a, b: bool `[n]`, outcomes of the same case at the same place.

    p is that of McNemar's exact test, a sign test on the cases that differ (McNemar 1947); the interval is Newcombe's
    for paired proportions (1998, Statistics in Medicine 17:2635, method 10): Wilson's for each rate, put together with
    their correlation.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    n, both = len(a), int((a & b).sum())
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    neither = n - both - only_a - only_b
    if n == 0:
        return _nothing(0)
    k_a, k_b = both + only_a, both + only_b
    spread = k_a * (n - k_a) * k_b * (n - k_b)
    phi = 0.0
    if spread:
        excess = both * neither - only_a * only_b
        phi = (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(spread)
    lo, hi = _newcombe(k_a, n, k_b, n, phi)
    p = float(stats.binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return dict(difference=(only_b - only_a) / n, lo=lo, hi=hi, p=p, n=n)


def unpaired_rates(k_a: int, n_a: int, k_b: int, n_b: int) -> dict:
    """Difference of the rates k_a of n_a and k_b of n_b over unrelated cases.

    p is that of Fisher's exact test; the interval is Newcombe's hybrid of Wilson's (1998, Statistics in Medicine
    17:873, method 10).
    """
    if n_a == 0 or n_b == 0:
        return _nothing(n_a + n_b)
    lo, hi = _newcombe(k_a, n_a, k_b, n_b, 0.0)
    p = float(stats.fisher_exact([[k_a, n_a - k_a], [k_b, n_b - k_b]])[1])
    return dict(difference=k_b / n_b - k_a / n_a, lo=lo, hi=hi, p=p, n=n_a + n_b)


def _newcombe(k_a, n_a, k_b, n_b, phi):
    rate_a, rate_b = k_a / n_a, k_b / n_b
    (lo_a, hi_a), (lo_b, hi_b) = wilson_interval(k_a, n_a), wilson_interval(k_b, n_b)
    down_a, up_a, down_b, up_b = rate_a - lo_a, hi_a - rate_a, rate_b - lo_b, hi_b - rate_b
    below = math.sqrt(max(down_b**2 - 2 * phi * down_b * up_a + up_a**2, 0))
    above = math.sqrt(max(up_b**2 - 2 * phi * up_b * down_a + down_a**2, 0))
    difference = rate_b - rate_a
    return difference - below, difference + above


def paired_means(a, b, groups=None) -> dict:
    """Difference of two means over the same cases, by a t-test of the differences.

    Args:
        a, b: numbers `[n]` of the same case at the same place.
        groups: of each case, whatever stands together, such as the prompt of several samples: then groups, not cases,
            are independent, and the variance is that of a ratio of sums over groups (Cochran 1977, section 6.3).
    """
    change = np.asarray(b, float) - np.asarray(a, float)
    if not len(change):
        return _nothing(0)
    difference = float(change.mean())
    _, member = np.unique(np.arange(len(change)) if groups is None else list(map(str, groups)), return_inverse=True)
    sums, sizes = np.bincount(member, change), np.bincount(member)
    count = len(sums)
    if count < 2:
        return _nothing(len(change)) | dict(difference=difference)
    rest = (sums - sizes * difference) / sizes.mean()
    error = math.sqrt(float(rest @ rest) / (count * (count - 1)))
    return _t(difference, error, count - 1) | dict(n=len(change))


def unpaired_means(mean_a, error_a, n_a, mean_b, error_b, n_b) -> dict:
    """Difference of two means over unrelated cases, from their standard errors, by Welch's t-test (1947)."""
    if None in (mean_a, mean_b):
        return _nothing(n_a + n_b)
    if None in (error_a, error_b) or min(n_a, n_b) < 2:
        return _nothing(n_a + n_b) | dict(difference=mean_b - mean_a)
    a, b = error_a**2, error_b**2
    freedom = (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (n_b - 1)) if a + b else n_a + n_b - 2
    return _t(mean_b - mean_a, math.sqrt(a + b), freedom) | dict(n=n_a + n_b)


def error_of_interval(lo, hi):
    """Standard error of a number whose 95 % interval is lo .. hi; None where there is none."""
    return None if lo is None or hi is None else (hi - lo) / (2 * _Z)


def _t(difference, error, freedom):
    if error == 0:
        return dict(difference=difference, lo=difference, hi=difference, p=1.0 if difference == 0 else 0.0)
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    return dict(difference=difference, lo=difference - half, hi=difference + half, p=p)


def _nothing(n):
    return dict(difference=None, lo=None, hi=None, p=None, n=n)


def holm(p_values) -> list:
    """p-values corrected for their number, so that with all of them the chance of one false finding is 5 % at most.

    Holm 1979. None stays None, and does not count.
    """
    p_values = list(p_values)
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    corrected, so_far = [None] * len(p_values), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = so_far
    return corrected
