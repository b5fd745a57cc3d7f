"""CPU time of two programs, measured side by side."""

import time

import jax
import numpy as np


def median_cpu_seconds(runs, arguments, rounds: int) -> list[float]:
    """Median process CPU time of each of `runs` on the same arguments, interleaved; the first round is not counted."""
    times = [[] for _ in runs]
    for i in range(rounds + 1):
        for run, taken in zip(runs, times):
            began = time.process_time()
            jax.block_until_ready(run(*arguments))
            if i:
                taken.append(time.process_time() - began)
    return [float(np.median(taken)) for taken in times]
