"""CPU time of packed attention, forward and backward: blocks of other segments skipped (ours) against dense and masked.

    python -m experiments.bench.attention [--rounds 5] [--case NAME]

Every case is run in turns with its dense form on the same arrays; medians of process CPU time and their ratio are
printed, with the largest difference between the gradients, relative to the largest value. `packed` is the one that
must stay at or below 0.35.
"""

import argparse

from sorax.backend import configure

configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from experiments.bench.timing import median_cpu_seconds  # noqa: E402
from sorax.attention import attention  # noqa: E402

# Rows, query tokens, key tokens, heads, head dim, and segments of a row; keys are the queries' own where 0.
CASES = dict(
    packed=(1, 4096, 0, 4, 128, 6),
    single=(1, 4096, 0, 4, 128, 1),  # nothing to skip
    heads_of_64=(1, 4096, 0, 4, 64, 6),
    cross=(1, 4096, 600, 4, 128, 6),
    small=(16, 512, 0, 4, 32, 6),
    small_single=(16, 512, 0, 4, 32, 1),
    tiny=(16, 160, 0, 4, 32, 4),
)


def ids_of(rng, B, n, segments):
    """Segment ids `[B, n]`: segments of random lengths that fill the row."""
    cuts = [np.sort(rng.choice(np.arange(1, n), segments - 1, replace=False)) for _ in range(B)]
    return jnp.asarray(np.stack([1 + np.searchsorted(cut, np.arange(n), side="right") for cut in cuts]), jnp.int32)


def gradient(implementation, arguments):
    def weighted(q, k, v, q_ids, kv_ids, weights):
        return jnp.sum(attention(q, k, v, q_ids, kv_ids, implementation=implementation) * weights)

    return jax.jit(jax.grad(weighted, argnums=(0, 1, 2))).lower(*arguments).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append")
    settings = parser.parse_args()
    for name in settings.case or CASES:
        B, N, M, K, A, segments = CASES[name]
        rng = np.random.default_rng(0)
        draw = lambda n, rng=rng, B=B, K=K, A=A: jnp.asarray(rng.normal(size=(B, n, K, A)), jnp.float32)  # noqa: E731
        q_ids = ids_of(rng, B, N, segments)
        kv_ids = ids_of(rng, B, M, segments) if M else q_ids
        arguments = draw(N), draw(M or N), draw(M or N), q_ids, kv_ids, draw(N)
        runs = [gradient(implementation, arguments) for implementation in ("dense", "auto")]
        dense, ours = median_cpu_seconds(runs, arguments, settings.rounds)
        error = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(*(run(*arguments) for run in runs)))
        print(f"{name}: {B} x {N} tokens, {M or N} keys, {K} heads of {A}, {segments} segments: dense "
              f"{dense * 1e3:.0f} ms, ours {ours * 1e3:.0f} ms of CPU time, ratio {ours / dense:.2f}, "
              f"gradients differ by {error:.0e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
