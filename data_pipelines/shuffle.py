"""Random orders that are computed where they are asked for: any range of a permutation, with no table of the whole.

All of it is integer arithmetic written out here, so that no release of a library can change the order of a run.
"""

import math

import numpy as np

_ROUNDS = 8
_BLOCK = 1 << 15  # numbers permuted at a time: what the cache holds
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # any odd number with no pattern: 0 must not stay 0
_PHASE_BITS = 20  # few enough that adding a phase to a whole number is exact


def fold(*numbers):
    """One number below 2^64 made of several, to be a key: other numbers, or another order, another key."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mix(key + _GOLDEN ^ _mix(np.array([number % (1 << 64)], np.uint64) + _GOLDEN))
    return int(key[0])


def random_bits(numbers, key):
    """64 bits for each of `numbers` (integers below 2^63), a pure function of it and the key: uint64, same shape."""
    return _mix(np.asarray(numbers).astype(np.uint64) + np.uint64(key))


def permute(places, size, key):
    """What stands at `places` (integers in 0..size - 1) of a random order of 0..size - 1: int64, same shape.

    A Feistel network over pairs of remainders, each round adding a hash of one to the other, is one to one on a
    rectangle that holds size; what leaves the range goes through it again until it is back (cycle walking:
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    places = np.asarray(places, np.int64)
    out = np.empty(places.shape, np.int64)
    flat, target = places.reshape(-1), out.reshape(-1)
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)  # the rectangle a x b is less than a larger than size: hardly any number goes round again
    keys = [fold(key, turn) for turn in range(_ROUNDS)]
    for start in range(0, len(flat), _BLOCK):
        block = _network(flat[start : start + _BLOCK].astype(np.uint64), a, b, keys)
        outside = np.flatnonzero(block >= size)
        while len(outside):
            block[outside] = _network(block[outside], a, b, keys)
            outside = outside[block[outside] >= size]
        target[start : start + _BLOCK] = block.astype(np.int64)
    return out


def _network(x, a, b, keys):
    left, right = x // np.uint64(b), x % np.uint64(b)
    for turn, key in enumerate(keys):
        if turn % 2:
            right = _add(right, left, b, key)
        else:
            left = _add(left, right, a, key)
    return left * np.uint64(b) + right


def _add(x, other, size, key):
    """x + hash(other), modulo size."""
    # The top 32 bits times size, divided by 2^32: below size, with no division.
    x = x + ((random_bits(other, key) >> np.uint64(32)) * np.uint64(size) >> np.uint64(32))
    return np.where(x >= size, x - np.uint64(size), x)


def _mix(x):
    """Bits of uint64 x, each of them dependent on all: the finalizer of MurmurHash3 (Appleby)."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def epoch_counts(weights, seed, epoch, first=0):
    """How often each sample comes in an epoch: int64 [k] for weights float64 [k] of samples first, first + 1, ...

    floor(w (e + 1) + phase) - floor(w e + phase), with a phase in [0, 1) that is a hash of the sample and the seed:
    over E epochs a sample comes w E times, rounded up or down; weight 1 is exactly once an epoch.
    """
    numbers = np.arange(first, first + len(weights))
    bits = random_bits(numbers, fold(seed, 1)) >> np.uint64(64 - _PHASE_BITS)
    phase = bits.astype(np.float64) / (1 << _PHASE_BITS)
    before, after = (np.floor(weights * e + phase) for e in (epoch, epoch + 1))
    return (after - before).astype(np.int64)


class EpochOrder:
    """The samples of one epoch in random order; `take` computes any part of it.

    Args:
      num_samples: n. weights: float64 [n] or None for one of each; see `epoch_counts`.

    Holds nothing without weights, and 4 bytes a sample (8 from 2^32 draws an epoch on) with them.
    """

    def __init__(self, num_samples, seed, epoch, weights=None):
        self._key, self._size, self._ends = fold(seed, epoch, 0), num_samples, None
        if weights is not None:
            wide = float(np.sum(weights)) + num_samples >= 1 << 32
            counts = np.empty(num_samples, np.uint64 if wide else np.uint32)
            for start in range(0, num_samples, 1 << 20):
                part = weights[start : start + (1 << 20)]
                counts[start : start + len(part)] = epoch_counts(part, seed, epoch, start)
            self._ends = np.cumsum(counts, dtype=counts.dtype, out=counts)
            self._size = int(self._ends[-1])

    def __len__(self):
        return self._size

    def take(self, start, stop):
        """Samples int64 [stop - start] at these places of the order."""
        draws = permute(np.arange(start, stop), self._size, self._key)
        if self._ends is None:
            return draws
        # Draw d is a copy of the sample whose copies end after d.
        return np.searchsorted(self._ends, draws.astype(self._ends.dtype), side="right").astype(np.int64)
