"""Near-duplicate clips: who is near whom, found without comparing everyone with everyone.

A clip is known by its hashes (`curate_checks.perceptual_hash` of frames at fixed fractions of its length); two are
near if their hashes differ in at most `bits` bits in the mean. Banding finds every such pair: some hash of the pair
differs in at most `bits` of its bits; cut into bits + 2 bands, at least two bands are equal in both. So clips that
share a pair of bands at the same place are compared, and no others (the pigeonhole form of Manku, Jain and Das Sarma
2007). Being near is taken to be transitive: of a chain of near clips one is kept. Nothing here depends on the order
of clips or of groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipelines.curate_checks import HASH_BITS


def band_keys(hashes, bits: int) -> Iterator[tuple[int, int, int, int]]:
    """(place of the hash, its two bands, their values in one) of every pair of bands; near clips share one."""
    count = bits + 2
    edges = [HASH_BITS * k // count for k in range(count + 1)]
    for place, value in enumerate(hashes):
        bands = [value >> a & (1 << b - a) - 1 for a, b in zip(edges[:-1], edges[1:])]
        for i, j in itertools.combinations(range(count), 2):
            yield place, i, j, bands[i] << HASH_BITS | bands[j]


def links(clips: Iterable[tuple[str, tuple[int, ...]]], bits: int, chunk: int = 1 << 22) -> list[tuple[str, str]]:
    """Pairs of names that join the near clips of a group of (name, hashes): a tree for each set, not every pair.

    Equal clips are joined without comparison, so that a thousand copies of one video cost no more than one.
    chunk bounds the memory: comparisons at a time.
    """
    first_with, joined = {}, []
    for name, hashes in sorted(set(clips)):
        first = first_with.setdefault(tuple(hashes), name)
        if first != name:
            joined.append((first, name))
    names, count = list(first_with.values()), len(first_with)
    values = np.array(list(first_with), np.uint64)  # [count, hashes]
    forest = Forest()
    rows = max(1, chunk // max(1, count))
    for start in range(0, count if count > 1 else 0, rows):
        differ = values[start : start + rows, None] ^ values[None, :]
        near = np.bitwise_count(differ).sum(-1) <= bits * values.shape[1]
        for i, j in zip(*np.nonzero(near)):
            if i + start < j and forest.join(names[i + start], names[j]):
                joined.append((names[i + start], names[j]))
    return sorted(joined)


class Forest:
    """Sets of names that grow together (union-find)."""

    def __init__(self):
        self._above: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The first name, in alphabetical order, of the set that a name is in."""
        path = []
        while (above := self._above.get(name, name)) != name:
            path.append(name)
            name = above
        for passed in path:
            self._above[passed] = name
        return name

    def join(self, one: str, other: str) -> bool:
        """Makes one set of two names' sets; False if they are together already."""
        low, high = sorted((self.root(one), self.root(other)))
        self._above.setdefault(low, low)
        self._above[high] = low
        return low != high

    def sets(self) -> list[tuple[str, str]]:
        """(name, root) of every name that was joined, sorted."""
        return sorted((name, self.root(name)) for name in list(self._above))


def components(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, first name of its set) of every name in the pairs, near ones of near ones counted as near."""
    forest = Forest()
    for one, other in pairs:
        forest.join(one, other)
    return forest.sets()


def best_first(clips: list[dict]) -> list[dict]:
    """Clips of a set, the one to keep first: with a caption, then the largest picture, the longest, the first name."""

    def rank(clip):
        return not clip["caption"], -clip["height"] * clip["width"], -(clip["stop"] - clip["start"]), clip["name"]

    return sorted(clips, key=rank)
