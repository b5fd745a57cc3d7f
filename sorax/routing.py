"""Token routing (TREAD, Krause et al. 2025): in training, a random share of tokens skips the layers between two.

The tokens that go through are gathered into shorter rows, and put back in their places behind. Letters: B rows, N
tokens of a row, K tokens that go through, S samples of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_ROUNDING = 1e-4  # so that half of 10 tokens is 5 in floating point too
_MULTIPLE = 8  # of places: what kernels and a mesh that splits tokens divide best


class Route(NamedTuple):
    """Which tokens go through: kept `[B, N]` bool; index `[B, K]` their places, in order, filled up with others; slot
    `[B, N]` the place of a kept token among them."""

    kept: jax.Array
    index: jax.Array
    slot: jax.Array


def choose(key, segment_ids, num_samples: int, share: float) -> Route:
    """Draws which tokens skip: of each sample of n tokens exactly those that leave floor((1 - share) n).

    So a sample's share does not depend on its neighbours, and (1 - share) N places are enough, whatever rows hold.

    Args:
        segment_ids: `[B, N]` int in 0..num_samples, 0 = padding, which always skips. share: in [0, 1).
    """
    B, N = segment_ids.shape
    places = int((1 - share) * N + num_samples * _ROUNDING)
    places = min(N, -(-places // _MULTIPLE) * _MULTIPLE)
    counts = jnp.sum(segment_ids[:, :, None] == jnp.arange(num_samples + 1), axis=1)  # [B, S + 1]
    through = jnp.floor((1 - share) * counts + _ROUNDING).astype(jnp.int32).at[:, 0].set(0)
    first = jnp.cumsum(counts, axis=1) - counts
    shuffled = jnp.argsort(segment_ids + jax.random.uniform(key, (B, N)), axis=1)  # by sample, in random order within
    rank = jnp.argsort(shuffled, axis=1)
    kept = rank - jnp.take_along_axis(first, segment_ids, 1) < jnp.take_along_axis(through, segment_ids, 1)
    index = jnp.argsort(~kept, axis=1, stable=True)[:, :places]
    return Route(kept, index, jnp.maximum(jnp.cumsum(kept, axis=1) - 1, 0))


def _take(x, index):
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _where(mask, x):
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


@jax.custom_vjp
def narrow(x, route: Route):
    """`[B, N, ...]` -> `[B, K, ...]`: the tokens that go through; zeros where there are fewer."""
    return _where(_take(route.kept, route.index), _take(x, route.index))


@jax.custom_vjp
def widen(x, y, route: Route):
    """Puts y `[B, K, ...]`, which went through, in its places among x `[B, N, ...]`, which skipped."""
    return _where(~route.kept, x) + _where(route.kept, _take(y, route.slot))


# Both ways are gathers, and so are their gradients: the transpose that JAX would make is a scatter, slow everywhere.
narrow.defvjp(
    lambda x, route: (narrow(x, route), route),
    lambda route, g: (_where(route.kept, _take(g, route.slot)), None),
)
widen.defvjp(
    lambda x, y, route: (widen(x, y, route), route),
    lambda route, g: (_where(~route.kept, g), narrow(g, route), None),
)
