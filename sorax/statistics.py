"""Numbers with their uncertainty: rates, means, and how many of several samples are good.

A cell is a dict that a report shows: `kind` ("rate" or "mean"), `value`, `n`, and the 95 % interval `lo`, `hi`; of a
rate also `k`; of a mean its `unit` ("share": of 0 to 1, shown as percent). Where nothing was seen `value`, `lo` and
`hi` of a mean are None, and a rate is None in [0, 1].
"""

import math

import numpy as np

from sorax.metrics import wilson_interval

DRAWS = 2000  # of a bootstrap


def rate_cell(values, better="high") -> dict:
    """Share of true among values; None among them is not asked, and is left out of n."""
    asked = [bool(value) for value in values if value is not None]
    k, n = sum(asked), len(asked)
    lo, hi = wilson_interval(k, n)
    return dict(kind="rate", k=k, n=n, value=k / n if n else None, lo=lo, hi=hi, better=better)


def mean_cell(values, unit="", better="low", groups=None) -> dict:
    """Mean of values with a bootstrap interval (percentiles, fixed draws); None among them is left out of n.

    Args:
        groups: of each value, whatever stands together, such as the samples of one prompt: what is drawn again.
    """
    kept = [(float(v), g) for v, g in zip(values, groups or range(len(values))) if v is not None]
    cell = dict(kind="mean", n=len(kept), value=None, lo=None, hi=None, unit=unit, better=better)
    if not kept:
        return cell
    data, names = np.array([v for v, _ in kept]), [g for _, g in kept]
    _, member = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    sums, sizes = np.bincount(member, data), np.bincount(member)
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    lo, hi = np.quantile(means, (0.025, 0.975))
    return cell | dict(value=float(data.mean()), lo=float(lo), hi=float(hi))


def pass_at(good: int, n: int, k: int) -> float:
    """Chance that of k samples, drawn without putting back from n of which `good` are good, at least one is good.

    1 - C(n - good, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374): without bias, for any k <= n.
    """
    if not 0 <= good <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {good} good samples of {n}")
    if n - good < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - good + 1, n + 1))


def reliability(good: np.ndarray, at=(1, 4, 16)) -> dict[str, dict]:
    """Cells of how reliable samples are: "usable", their share; "pass@k"; "worst of n", prompts of which all are.

    Args:
        good: bool `[prompts, samples]`.
    """
    prompts, samples = good.shape
    groups = [str(i) for i in range(prompts) for _ in range(samples)]
    cells = {"usable": mean_cell(good.reshape(-1).astype(float).tolist(), "share", "high", groups)}
    for k in (k for k in at if k <= samples):
        values = [pass_at(int(row.sum()), samples, k) for row in good]
        # With k = n it is a plain rate of prompts, whose interval does not vanish where all or none are good.
        cells[f"pass@{k}"] = rate_cell([v == 1 for v in values]) if k == samples else mean_cell(values, "share", "high")
    cells[f"worst of {samples}"] = rate_cell(good.all(1).tolist())
    return cells
