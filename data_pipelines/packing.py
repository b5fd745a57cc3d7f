"""Which samples go into which row of tokens: a deterministic plan of one epoch, made from lengths alone.

Letters: n = samples, R = rows of the plan, S = steps, G = rows of one step over all ranks.
A row has room for `row_tokens` video tokens and `row_text` text slots.
"""

import dataclasses
import hashlib
from array import array
from bisect import bisect_left, bisect_right, insort

import numpy as np

from sorax.errors import UserError

_VERSION = 1  # of the algorithm: part of a plan's identity
# Rows are sorted by cost inside windows of this many steps; the first that balances the ranks well enough
# is taken, since the fewer steps share a window, the better mixed are their samples.
_SORT_WINDOWS = (1, 2, 4, 8, 16, 32, 64)
_TARGET_IMBALANCE = 1.005
# Cost of s tokens that attend to each other: COST_A * s + COST_B * s^2; here that of Wan's 1.3B (`token_costs`).
COST_A, COST_B = 1.0, 6.6e-5
_LOW = (1 << 32) - 1


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """One epoch of rows, in the order in which they are trained on.

    row_starts: int64 [R + 1] and samples: int64 [row_starts[-1]]: row r holds samples
      samples[row_starts[r]:row_starts[r + 1]], in this order. Step k is rows k * G .. (k + 1) * G - 1, those
      of rank 0 first.
    repeated_rows: int64, the rows that occur a second time to fill the last step; every other row is new, and
      the new rows hold every sample exactly once.
    fill: useful video tokens / all video tokens. text_fill: the same of text slots.
    imbalance: time of the epoch / its time if all ranks always had equal cost: sum of max / sum of mean, >= 1.
    identity: hash of the plan; equal plans, equal identity.
    """

    row_starts: np.ndarray
    samples: np.ndarray
    repeated_rows: np.ndarray
    rows_per_step: int
    fill: float
    text_fill: float
    imbalance: float
    identity: str

    def __len__(self):
        return len(self.row_starts) - 1

    @property
    def num_steps(self):
        """Steps of the epoch, all of them full."""
        return len(self) // self.rows_per_step

    @property
    def repeated(self):
        """How many rows occur a second time."""
        return len(self.repeated_rows)

    def row(self, index):
        """Samples int64 [k] of one row."""
        return self.samples[self.row_starts[index] : self.row_starts[index + 1]]


def token_costs(width, ffn_width):
    """(cost_a, cost_b) of a Wan-shaped block: FLOPs a token, and FLOPs a pair of tokens that attend.

    8 width^2 for the projections of self- and cross-attention (keys and values of the text taken as queries'
    cost at most), 2 width * ffn_width for the MLP, two FLOPs a weight; 4 width for scores and values.
    """
    return 2.0 * (8 * width**2 + 2 * width * ffn_width), 4.0 * width


def plan_epoch(
    video_tokens,
    text_tokens,
    *,
    row_tokens,
    row_text,
    max_segments,
    seed,
    epoch,
    window=512,
    ranks=1,
    rows_per_rank_step=1,
    cost_a=COST_A,
    cost_b=COST_B,
    names=None,
):
    """Pack n samples into rows and order the rows so that all ranks of every step carry equal cost.

    The samples are shuffled by (seed, epoch). A row starts with the oldest of the `window` samples that wait,
    then takes the largest that still fits in both capacities, until none does: no sample waits for ever, and
    rows end up full. Rows are then sorted by cost inside short windows of steps, dealt to the ranks largest
    to least loaded, and the steps shuffled again, so that cost has no order in time. The last step is filled
    up with rows from the start of the epoch, which the plan names.

    Args:
      video_tokens: [n] patches of each sample, >= 1. text_tokens: [n] text slots it takes, empty slot included.
      row_tokens, row_text: room of a row. max_segments: most samples of a row, None for any number.
      seed, epoch: >= 0. ranks: data-parallel ranks. rows_per_rank_step: rows that each reads at a step.
      cost_a, cost_b: cost of a row = sum of cost_a * s + cost_b * s^2 over its samples of s tokens.
      names: function index -> what to call a sample in an error; default "sample 7".

    Returns: a PackPlan, a pure function of the arguments.
    Raises: UserError where there is no sample, or one does not fit in a row or has no tokens.
    """
    video = np.ascontiguousarray(video_tokens, np.int64)
    text = np.ascontiguousarray(text_tokens, np.int64)
    if video.ndim != 1 or video.shape != text.shape:
        raise ValueError(f"video_tokens {video.shape} and text_tokens {text.shape} must both be [n]")
    if min(row_tokens, row_text, window, ranks, rows_per_rank_step) < 1:
        raise ValueError("row_tokens, row_text, window, ranks and rows_per_rank_step must be at least 1")
    max_segments = row_tokens if max_segments is None else max_segments
    if max_segments < 1:
        raise ValueError(f"max_segments must be at least 1, got {max_segments}")
    check_fits(video, text, row_tokens, row_text, names)

    rng = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    order = rng.permutation(len(video))
    starts, packed = _pack(video, text, order, row_tokens, row_text, max_segments, window)
    num_rows = len(starts) - 1

    cost = cost_a * np.add.reduceat(video[packed], starts[:-1])
    cost = cost + cost_b * np.add.reduceat(video[packed] ** 2, starts[:-1])
    rows_per_step = ranks * rows_per_rank_step
    num_steps = -(-num_rows // rows_per_step)
    rows = np.arange(num_steps * rows_per_step) % num_rows  # wraps: the last step is full
    rows, imbalance = _order(rows, cost[rows], ranks, rows_per_rank_step, rng)

    # Of a row that occurs twice, the earlier is the new one.
    first = np.full(num_rows, len(rows))
    np.minimum.at(first, rows, np.arange(len(rows)))
    repeated_rows = np.flatnonzero(first[rows] != np.arange(len(rows)))

    row_starts, samples = _gather(starts, packed, rows)
    digest = hashlib.sha256(repr((_VERSION, row_tokens, row_text, rows_per_step)).encode())
    for part in (row_starts, samples, video, text):
        digest.update(part.astype("<i8", copy=False))
    return PackPlan(
        row_starts=row_starts,
        samples=samples,
        repeated_rows=repeated_rows,
        rows_per_step=rows_per_step,
        fill=float(video.sum() / (num_rows * row_tokens)),
        text_fill=float(text.sum() / (num_rows * row_text)),
        imbalance=imbalance,
        identity=digest.hexdigest()[:16],
    )


def check_fits(video, text, row_tokens, row_text, names=None):
    """Raise UserError where a sample fits in no row, has no tokens, or there is none at all; [n] int64 each."""
    if not len(video):
        raise UserError("there is no sample to pack: the data set is empty")
    call = names or (lambda i: f"sample {i}")
    for what, lengths, room, least, option, remedy in (
        ("video tokens", video, row_tokens, 1, "row_tokens", "shorten or shrink it"),
        ("text tokens", text, row_text, 0, "row_text", "shorten its caption"),
    ):
        worst = int(lengths.argmax())
        if lengths[worst] > room:
            more = int((lengths > room).sum()) - 1
            also = f" ({more} more do not fit either)" if more else ""
            raise UserError(
                f"{call(worst)} has {lengths[worst]} {what}, but a row holds {room}{also}: "
                f"{remedy}, or set {option} to at least {lengths[worst]}"
            )
        if lengths.min() < least:
            raise UserError(f"{call(int(lengths.argmin()))} has no {what}: leave it out")


def _pack(video, text, order, row_tokens, row_text, max_segments, window):
    """Lookahead packing. Returns starts int64 [R + 1] and samples int64 [n], rows in order of their oldest."""
    n = len(order)
    least_video, least_text = int(video.min()), int(text.min())
    samples, starts = array("q"), array("q", [0])

    # `waiting` holds one number a sample, sorted: its video tokens above, how young it is below, so that the
    # last number under a bound is the oldest of the largest samples that fit. `slots`: text of those waiting.
    waiting, slots = [], {}
    arrivals = _arrivals(video, text, order)
    for number, size in arrivals:
        insort(waiting, number)
        slots[number] = size
        if len(waiting) == window:
            break
    oldest = iter(_numbers(video, order))
    take = samples.append
    while waiting:
        number = next(oldest)
        while number not in slots:
            number = next(oldest)
        index = bisect_left(waiting, number)
        room_video, room_text, room_segments = row_tokens, row_text, max_segments
        while True:
            del waiting[index]
            room_video -= number >> 32
            room_text -= slots.pop(number)
            room_segments -= 1
            take(_LOW - (number & _LOW))
            for new, size in arrivals:  # one leaves, one comes in
                insort(waiting, new)
                slots[new] = size
                break
            if room_video < least_video or room_text < least_text or not room_segments:
                break
            index = bisect_right(waiting, (room_video << 32) | _LOW) - 1
            while index >= 0 and slots[waiting[index]] > room_text:
                index -= 1
            if index < 0:
                break
            number = waiting[index]
        starts.append(len(samples))
    assert len(samples) == n
    return np.array(starts, np.int64), order[np.array(samples, np.int64)]


def _numbers(video, order, chunk=1 << 16):
    """For each sample as it arrives: video tokens * 2^32 + how young it is. In chunks: Python ints are large."""
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        yield from ((video[part] << 32) | (_LOW - np.arange(start, start + len(part)))).tolist()


def _arrivals(video, text, order, chunk=1 << 16):
    """Pairs of a sample's number, as above, and its text slots."""
    texts = (size for start in range(0, len(order), chunk) for size in text[order[start : start + chunk]].tolist())
    return zip(_numbers(video, order, chunk), texts)


def _order(rows, cost, ranks, rows_per_rank, rng):
    """Order S * G rows into steps whose ranks carry equal cost. Returns (rows, imbalance)."""
    num_steps = len(rows) // (ranks * rows_per_rank)
    step_of = np.arange(len(rows)) // (ranks * rows_per_rank)
    best, best_imbalance = np.arange(len(rows)), 1.0
    if ranks > 1:
        best_imbalance = np.inf
        for sort_window in _SORT_WINDOWS:
            by_cost = np.lexsort((-cost, step_of // sort_window)).reshape(num_steps, rows_per_rank, ranks)
            dealt, load = _deal(by_cost, cost)  # [S, ranks, rows_per_rank], [S, ranks]
            imbalance = float(load.max(axis=1).sum() / load.mean(axis=1).sum())
            if imbalance < best_imbalance:
                best, best_imbalance = dealt, imbalance
            if best_imbalance <= _TARGET_IMBALANCE or sort_window >= num_steps:
                break
        # Rank 0 would always get the largest row: which rank gets which share is drawn for each step.
        best = best[np.arange(num_steps)[:, None], rng.random((num_steps, ranks)).argsort(axis=1)]
    best = best.reshape(num_steps, -1)[rng.permutation(num_steps)]
    return rows[best.ravel()], best_imbalance


def _deal(by_cost, cost):
    """Deal each step's rows [S, rows_per_rank, ranks], costliest first, to the ranks: largest to least loaded.

    Longest processing time first, in rounds, so that each rank gets the same number of rows.
    Returns rows [S, ranks, rows_per_rank] and load [S, ranks].
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


def _gather(starts, packed, rows):
    """The CSR table (starts, packed) with its rows put in the order `rows`."""
    lengths = np.diff(starts)[rows]
    row_starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    offsets = np.repeat(starts[rows] - row_starts[:-1], lengths)
    return row_starts, packed[offsets + np.arange(row_starts[-1])]
