"""CPU time of the VAE's causal convolution, forward and backward: by time taps (ours) against the plain 3-D form.

    python -m experiments.bench.conv

The two are interleaved; the ratio of medians of process CPU time is printed for each shape.
"""

from sorax.backend import configure

configure()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from experiments.bench.timing import median_cpu_seconds  # noqa: E402
from sorax.conv import conv_causal  # noqa: E402

SHAPES = ((4, 9, 32, 32, 16), (4, 9, 16, 16, 32), (4, 5, 8, 8, 64), (32, 1, 16, 16, 32))


def plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((2, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def main():
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x = rng.normal(size=shape).astype(np.float32)
        kernel = rng.normal(size=(3, 3, 3, shape[-1], shape[-1])).astype(np.float32)
        runs = [jax.jit(jax.grad(lambda x, k, f=f: (f(x, k) ** 2).sum(), (0, 1))) for f in (plain, conv_causal)]
        whole, taps = median_cpu_seconds(runs, (x, kernel), rounds=10)
        print(f"{shape}: 3-D {whole * 1e3:.1f} ms, by taps {taps * 1e3:.1f} ms, ratio {whole / taps:.2f}")


if __name__ == "__main__":
    main()
