"""Which blocks of keys a block of queries can see, from segment ids alone: no table of tokens by tokens.

Whether two blocks meet is judged by the ranges of their ids. That misses nothing whatever the order of the ids, and is
tight where segments are contiguous and ascending, as the rows of `data_pipelines.rows` are.
"""

import jax
import jax.numpy as jnp

_NONE = jnp.iinfo(jnp.int32).max


def pad_to(x, size, axis, value=0):
    """Pads one axis at its end up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def fit_block(length, most, unit):
    """(block, padded length): the fewest blocks of at most `most`, each as small as that allows, in whole `unit`s."""
    count = -(-length // most)
    block = -(-length // (count * unit)) * unit
    return block, block * count


def id_range(ids, block):
    """Lowest and highest id of each block, `[B, n]` both, of ids `[B, n * block]`; an empty range where all are 0."""
    ids = ids.reshape(ids.shape[0], -1, block)
    return jnp.min(jnp.where(ids == 0, _NONE, ids), axis=2), jnp.max(ids, axis=2)


def blocks_meet(q_ids, kv_ids, block_q, block_kv):
    """Bool `[B, q blocks, kv blocks]`: whether any query of a block may see any key of another."""
    (q_low, q_high), (kv_low, kv_high) = id_range(q_ids, block_q), id_range(kv_ids, block_kv)
    return (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])


def first_and_stop(meet):
    """int32 `[B, q blocks]` both: the blocks of keys from `first` up to but not with `stop` hold all that are met."""
    places = jnp.arange(meet.shape[2], dtype=jnp.int32)
    stop = jnp.max(jnp.where(meet, places + 1, 0), axis=2)
    return jnp.min(jnp.where(meet, places, stop[:, :, None]), axis=2), stop


def next_met(meet):
    """int32 like `meet`: for each pair of blocks, taken row by row, the column of the next pair that meet, or itself.

    What a kernel that walks over all pairs is to fetch: nothing for those that it skips.
    """
    B, rows, columns = meet.shape
    order = jnp.arange(rows * columns, dtype=jnp.int32)
    ahead = jax.lax.cummin(jnp.where(meet.reshape(B, -1), order, _NONE), axis=1, reverse=True)
    return jnp.where(ahead == _NONE, 0, ahead % columns).reshape(meet.shape)
