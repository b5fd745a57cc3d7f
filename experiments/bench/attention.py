"""CPU time of packed attention, forward and backward: blocks of other segments skipped (ours) against dense and masked.

    python -m experiments.bench.attention [--rounds 5] [--case NAME]
    python -m experiments.bench.attention --tpu [--tokens 65536] [--heads 12]        # needs libtpu, but no TPU

Every case is run in turns with its dense form on the same arrays; medians of process CPU time and their ratio are
printed, with the largest difference between the gradients, relative to the largest value. `packed` is the one that
must stay at or below 0.35.

With --tpu nothing is timed: forward and gradient of the TPU's kernels are compiled for v5e, v5p and v6e, in bfloat16,
with heads of 128, and what they need of a chip's memory is printed; then the same kernels are interpreted on a short
row in float32, and the largest difference from dense attention, relative to the largest value, must be 1e-5 at most.
"""

import argparse
import time

from sorax import topology
from sorax.backend import configure

configure()
topology.prepare()  # this process computes on the CPU in any case

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from experiments.bench.timing import median_cpu_seconds  # noqa: E402
from sorax.attention import attention  # noqa: E402
from sorax.devices import GIB  # noqa: E402

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


def difference(actual, expected):
    """Largest, of trees of arrays, relative to the largest value of each."""
    errors = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(y).max()), actual, expected)
    return max(jax.tree.leaves(errors))


def compile_for_tpus(tokens, heads):
    def forward(q, k, v, ids):
        return attention(q, k, v, ids, ids)

    def gradients(q, k, v, ids):
        return jax.grad(lambda *x: jnp.sum(attention(*x, ids, ids).astype(jnp.float32)), argnums=(0, 1, 2))(q, k, v)

    for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        place = topology.open_topology(name)
        here = jax.sharding.SingleDeviceSharding(place.devices[0])
        x = jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16, sharding=here)
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=here)
        for function in (forward, gradients):
            began = time.perf_counter()
            program = jax.jit(function).lower(x, x, x, ids).compile()
            sizes, kernels = program.memory_analysis(), program.as_text().count('custom_call_target="tpu_custom_call"')
            temporaries = sizes.temp_size_in_bytes / GIB
            total = temporaries + (sizes.argument_size_in_bytes + sizes.output_size_in_bytes) / GIB
            print(f"{place.device.name}: {function.__name__} of 1 x {tokens} tokens, {heads} heads of 128: {total:.2f} "
                  f"of {place.device.memory / GIB:.2f} GiB (temporaries {temporaries:.2f}), kernel calls {kernels}, "
                  f"compiled in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


def interpret_for_tpus(N=1280, K=2, segments=6):
    """Forward and gradients against dense attention, where a row has several blocks and segments end within them."""
    rng = np.random.default_rng(0)
    ids = ids_of(rng, 1, N, segments)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(1, N, K, 128)), jnp.float32) for _ in range(4))
    both = [(jax.jit(attention, static_argnames="implementation")(q, k, v, ids, ids, implementation=name),
             gradient(name, arguments := (q, k, v, ids, ids, weights))(*arguments))
            for name in ("splash", "dense")]  # fmt: skip
    error = difference(*both)
    print(f"interpreted: 1 x {N} tokens, {K} heads of 128, {segments} segments, float32: output and gradients differ "
          f"from dense attention by {error:.0e} ({'ok' if error <= 1e-5 else 'TOO MUCH'})", flush=True)  # fmt: skip
    return error <= 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--tpu", action="store_true", help="compile and interpret the TPU's kernels; nothing is timed")
    parser.add_argument("--tokens", type=int, default=65536, help="of the row that --tpu compiles")
    parser.add_argument("--heads", type=int, default=12)
    settings = parser.parse_args()
    if settings.tpu:
        compile_for_tpus(settings.tokens, settings.heads)
        raise SystemExit(0 if interpret_for_tpus() else 1)
    for name in settings.case or CASES:
        B, N, M, K, A, segments = CASES[name]
        rng = np.random.default_rng(0)
        draw = lambda n, rng=rng, B=B, K=K, A=A: jnp.asarray(rng.normal(size=(B, n, K, A)), jnp.float32)  # noqa: E731
        q_ids = ids_of(rng, B, N, segments)
        kv_ids = ids_of(rng, B, M, segments) if M else q_ids
        arguments = draw(N), draw(M or N), draw(M or N), q_ids, kv_ids, draw(N)
        runs = [gradient(implementation, arguments) for implementation in ("dense", "auto")]
        dense, ours = median_cpu_seconds(runs, arguments, settings.rounds)
        error = difference(*(run(*arguments) for run in runs))
        print(f"{name}: {B} x {N} tokens, {M or N} keys, {K} heads of {A}, {segments} segments: dense "
              f"{dense * 1e3:.0f} ms, ours {ours * 1e3:.0f} ms of CPU time, ratio {ours / dense:.2f}, "
              f"gradients differ by {error:.0e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
