"""CPU time of the quickstart's DiT, forward and backward: by `sorax.linear.Linear` (ours) against flax's own layer.

    python -m experiments.bench.linear

The two are interleaved; the ratio of medians of process CPU time is printed.
"""

from sorax.backend import configure

configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from experiments.bench.timing import median_cpu_seconds  # noqa: E402
from experiments.quickstart import get_config  # noqa: E402
from sorax import functional  # noqa: E402
from sorax.config import build  # noqa: E402
from sorax.dit import DiT, DiTConfig  # noqa: E402
from sorax.linear import Linear  # noqa: E402

B, N, M, S = 32, 48, 32, 4  # rows, tokens, text tokens, samples of a row


def gradient(model, inputs):
    graphdef, _ = functional.abstract(DiT, model)
    return jax.jit(jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(*inputs, unroll=True) ** 2)))


def main():
    model = build(DiTConfig, get_config().model, "model")
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    ids, text_ids = (jnp.asarray(np.repeat(np.arange(1, S + 1), n // S)[None].repeat(B, 0)) for n in (N, M))
    positions = jnp.asarray(rng.integers(0, 3, (B, N, 3)))
    inputs = (draw(B, N, model.patch_dim), positions, ids, jnp.abs(draw(B, S + 1)) % 1, ids,
              draw(B, M, model.text_dim), text_ids, jnp.zeros((B, M)))  # fmt: skip
    params = functional.init(DiT, model, jax.random.key(0, impl="rbg"))
    params = jax.tree.map(lambda p: p + 0.02 * draw(*p.shape), params)  # nothing is zero
    by_matmul = Linear.__call__
    runs = []
    for call in (nnx.Linear.__call__, by_matmul):
        Linear.__call__ = call
        runs.append(gradient(model, inputs).lower(params).compile())
    plain, ours = median_cpu_seconds(runs, (params,), rounds=15)
    print(f"flax {plain * 1e3:.0f} ms, ours {ours * 1e3:.0f} ms of CPU time, ratio {plain / ours:.2f}")


if __name__ == "__main__":
    main()
