"""Samples into rows and rows into steps: the two algorithms behind a pack plan, as pure functions of lengths.

Letters: n = samples, R = rows, S = steps, G = rows of one step over all ranks. `settings` is a
`data_pipelines.packing.PackSettings`.
"""

from array import array
from itertools import islice

import numpy as np

from data_pipelines.shuffle import fold, permute, random_bits

_UNITS = 2048  # that a row is divided into when lengths are compared
_GOOD = 1000  # a gap below a row / this is as good as none
_WORTH = 10  # two samples in place of one must fill at least the smaller's size / this
# Rows are sorted by cost inside windows of this many steps; the first that balances the ranks well enough
# is taken, since the fewer steps share a window, the better mixed are their samples.
_SORT_WINDOWS = (1, 2, 4, 8, 16, 32, 64)
_TARGET_IMBALANCE = 1.005


class _Waiting:
    """Samples that wait to be packed, by size; `bits` has bit k set where one of size k waits, `mirror` bit top - k.

    With both, one shift and one AND of whole numbers find all pairs of sizes with a given sum.
    """

    def __init__(self, sizes, top):
        self.sizes, self.top = sizes, top
        self.by_size = [[] for _ in range(top + 1)]  # places in the order of arrival, oldest first
        self.bits = self.mirror = 0

    def add(self, place):
        size = self.sizes[place]
        if not self.by_size[size]:
            self.bits |= 1 << size
            self.mirror |= 1 << self.top - size
        self.by_size[size].append(place)

    def remove(self, place):
        size = self.sizes[place]
        self.by_size[size].remove(place)  # mostly the first
        if not self.by_size[size]:
            self.bits ^= 1 << size
            self.mirror ^= 1 << self.top - size

    def pair(self, total, among):
        """Sizes (a, b) of two that wait, a + b = total, a >= b as near as can be, of those in `among`; or None."""
        half = (total + 1) // 2
        found = (among & (self.mirror >> self.top - total)) >> half
        if found and 2 * half == total and found & 1 and len(self.by_size[half]) < 2:
            found ^= 1  # the same one twice
        if not found:
            return None
        a = half + (found & -found).bit_length() - 1
        return a, total - a


def pack_rows(video, text, settings, last):
    """Lookahead packing. A row starts with the oldest of the `window` samples that wait, then takes the largest that
    fits in both capacities, until none does: no sample waits for ever, and rows end up full. Where the largest would
    leave a gap that nothing else fills, two samples take its place that leave less. Once nothing arrives any more,
    rows start with the largest.

    Args:
      video, text: int [n] lengths in the order in which the samples arrive, none above the room of a row.
      last: whether nothing arrives after them; else packing stops once fewer than `window` wait.

    Returns: starts int64 [R + 1] and members int64 [starts[-1]]: row r holds the samples at the places
      members[starts[r]:starts[r + 1]] of the order of arrival; and left int64, the places that still wait, in
      order, empty if `last`.
    """
    unit = max(1, settings.row_tokens // _UNITS)  # lengths are compared in units: sets of them are short numbers
    top = settings.row_tokens // unit
    video, text = np.asarray(video, np.int64), np.asarray(text).tolist()
    sizes, video = np.minimum(-(-video // unit), top).tolist(), video.tolist()
    waiting, gone = _Waiting(sizes, top), bytearray(len(sizes))
    fits = [(2 << room) - 1 for room in range(top + 1)]  # bits of the sizes that fit
    members, starts = array("q"), array("q", [0])

    arrivals = iter(range(len(sizes)))
    for place in islice(arrivals, settings.window):
        waiting.add(place)
    count, oldest = min(len(sizes), settings.window), 0
    while count and (last or count >= settings.window):
        while gone[oldest]:
            oldest += 1
        taken = (oldest,)
        if count < settings.window:  # nothing arrives any more: what is hardest to place goes first
            taken = (waiting.by_size[waiting.bits.bit_length() - 1][0],)
        room, room_text = settings.row_tokens, settings.row_text
        room_samples = settings.max_segments or settings.row_tokens
        while taken:
            for place in taken:
                waiting.remove(place)
                gone[place] = 1
                members.append(place)
                room -= video[place]
                room_text -= text[place]
                room_samples -= 1
                count -= 1
                for new in arrivals:  # one leaves, one comes in
                    waiting.add(new)
                    count += 1
                    break
            fitting = waiting.bits & fits[room // unit] if room_samples else 0
            taken = _choose(waiting, text, fitting, room // unit, room_text, room_samples > 1)
        starts.append(len(members))
    left = np.flatnonzero(np.frombuffer(gone, np.uint8) == 0)
    return np.array(starts, np.int64), np.array(members, np.int64), left


def _choose(waiting, text, fitting, room, room_text, two):
    """Places of the one or (if `two`) two samples that a row takes next, () if none fits.

    fitting: bits of the sizes to choose from. room: in units. room_text: text slots. text: of each place.
    """
    while fitting:
        size = fitting.bit_length() - 1
        smallest = (fitting & -fitting).bit_length() - 1
        if two and waiting.top // _GOOD < room - size < smallest:
            # Small samples are what gaps are filled with: two must save more than a share of the smaller one.
            for total in range(room, size + smallest // _WORTH, -1):
                pair = waiting.pair(total, fitting)
                if pair and _WORTH * (total - size) > pair[1]:
                    a, b = waiting.by_size[pair[0]], waiting.by_size[pair[1]]
                    some = (a[0], a[1] if a is b else b[0])
                    if text[some[0]] + text[some[1]] <= room_text:
                        return some
        for place in waiting.by_size[size]:
            if text[place] <= room_text:
                return (place,)
        fitting ^= 1 << size  # the captions of all of this size are too long
    return ()


def row_costs(video, starts, settings):
    """Cost float64 [R] of rows given as a table: video int [starts[-1]] lengths row after row, starts int64 [R + 1]."""
    video = np.asarray(video, np.float64)
    if not len(video):
        return np.zeros(0)
    return np.add.reduceat(settings.cost_a * video + settings.cost_b * video**2, starts[:-1])


def order_rows(rows, cost, settings, key):
    """Put S * G rows in the order in which they are trained on: ranks of a step carry equal cost, steps are mixed.

    Rows are sorted by cost inside short windows of steps, dealt to the ranks largest to least loaded, and the
    steps shuffled again, so that cost has no order in time.

    Args:
      rows: int64 [S * G]. cost: float64 [S * G] of each. key: of the shuffle.

    Returns: rows [S * G], those of rank 0 of the first step first; and the sums over steps of the largest and of
      the mean cost of a rank.
    """
    ranks, rounds = settings.ranks, settings.rows_per_rank_step
    num_steps = len(rows) // (ranks * rounds)
    if not num_steps:
        return rows, 0.0, 0.0
    step_of = np.arange(len(rows)) // (ranks * rounds)
    order = np.arange(len(rows))
    largest = mean = float(cost.sum()) / ranks
    if ranks > 1:
        largest = np.inf
        for sort_window in _SORT_WINDOWS:
            by_cost = np.lexsort((-cost, step_of // sort_window)).reshape(num_steps, rounds, ranks)
            dealt, load = _deal(by_cost, cost)  # [S, ranks, rounds], [S, ranks]
            found = float(load.max(axis=1).sum())
            if found < largest:
                order, largest = dealt, found
            if largest <= _TARGET_IMBALANCE * mean or sort_window >= num_steps:
                break
        # Rank 0 would always get the largest row: which rank gets which share is drawn for each step.
        turns = random_bits(np.arange(num_steps * ranks), fold(key, 0)).reshape(num_steps, ranks)
        order = order[np.arange(num_steps)[:, None], turns.argsort(axis=1, kind="stable")]
    order = order.reshape(num_steps, -1)[permute(np.arange(num_steps), num_steps, fold(key, 1))]
    return rows[order.ravel()], largest, mean


def _deal(by_cost, cost):
    """Deal each step's rows [S, rounds, ranks], costliest first, to the ranks: largest to least loaded.

    Longest processing time first, in rounds, so that each rank gets the same number of rows.
    Returns rows [S, ranks, rounds] and load [S, ranks].
    """
    num_steps, rounds, ranks = by_cost.shape
    dealt = np.empty((num_steps, ranks, rounds), np.int64)
    load = np.zeros((num_steps, ranks))
    steps = np.arange(num_steps)[:, None]
    for turn in range(rounds):
        least_loaded = load.argsort(axis=1, kind="stable")
        dealt[steps, least_loaded, turn] = by_cost[:, turn]
        load[steps, least_loaded] += cost[by_cost[:, turn]]
    return dealt, load


def gather_rows(starts, members, rows):
    """The table (starts int64 [R + 1], members) with its rows put in the order `rows`."""
    lengths = np.diff(starts)[rows]
    row_starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    offsets = np.repeat(starts[rows] - row_starts[:-1], lengths)
    return row_starts, members[offsets + np.arange(row_starts[-1])]
