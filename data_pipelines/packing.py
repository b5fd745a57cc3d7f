"""Which samples go into which row of tokens: a deterministic plan of every epoch, made from lengths alone.

Rows are planned chunk by chunk where they are asked for. What is kept of a plan is small: the samples that wait at
each chunk's beginning. Any row can then be had for the price of one chunk, on any process, in any order.

Letters: n = samples, R = rows of an epoch, G = rows of one step over all ranks.
"""

import dataclasses
import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import cached_property

import numpy as np

from data_pipelines.pack_rows import gather_rows, order_rows, pack_rows, row_costs
from data_pipelines.shuffle import EpochOrder, fold
from sorax.errors import UserError

VERSION = 2  # of the algorithm: part of a plan's identity
_KEPT_CHUNKS = 2  # reading ahead crosses from one chunk into the next,
_KEPT_EPOCHS = 2  # and from one epoch into the next
_STEPS_A_CHUNK = 16  # at least, so that rows can be balanced however large a step is
# Cost of s tokens that attend to each other: COST_A * s + COST_B * s^2; here that of Wan's 1.3B (`token_costs`).
COST_A, COST_B = 1.0, 6.6e-5


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """How samples are packed; everything that a plan depends on besides the lengths.

    row_tokens, row_text: room of a row. seed: >= 0. max_segments: most samples of a row, None for any number.
    window: samples that wait to be packed. ranks: data-parallel ranks that a step's rows are balanced for.
    rows_per_rank_step: rows that each of them reads at a step.
    cost_a, cost_b: cost of a row = sum of cost_a * s + cost_b * s^2 over its samples of s tokens (`token_costs`).
    chunk: samples planned at a time, which bounds the memory.
    """

    row_tokens: int
    row_text: int
    seed: int
    max_segments: int | None = None
    window: int = 512
    ranks: int = 1
    rows_per_rank_step: int = 1
    cost_a: float = COST_A
    cost_b: float = COST_B
    chunk: int = 1 << 20

    def __post_init__(self):
        names = ("row_tokens", "row_text", "max_segments", "window", "ranks", "rows_per_rank_step", "chunk")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    @property
    def rows_per_step(self):
        """G."""
        return self.ranks * self.rows_per_rank_step


def token_costs(width, ffn_width):
    """(cost_a, cost_b) of a Wan-shaped block: FLOPs a token, and FLOPs a pair of tokens that attend.

    8 width^2 for the projections of self- and cross-attention (keys and values of the text taken as queries'
    cost at most), 2 width * ffn_width for the MLP, two FLOPs a weight; 4 width for scores and values.
    """
    return 2.0 * (8 * width**2 + 2 * width * ffn_width), 4.0 * width


def check_fits(video, text, row_tokens, row_text, names=None):
    """Raise UserError where a sample fits in no row, has no tokens, or there is none at all; [n] integers each.

    names: function index -> what to call a sample in an error; default "sample 7".
    """
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """Rows as a table: row r holds samples[starts[r]:starts[r + 1]]; int64 both."""

    starts: np.ndarray
    samples: np.ndarray

    def __len__(self):
        return len(self.starts) - 1

    def row(self, index):
        return self.samples[self.starts[index] : self.starts[index + 1]]

    def take(self, rows):
        return _Table(*gather_rows(self.starts, self.samples, rows))

    def __add__(self, other):
        starts = np.concatenate([self.starts, other.starts[1:] + self.starts[-1]])
        return _Table(starts, np.concatenate([self.samples, other.samples]))


_EMPTY = _Table(np.zeros(1, np.int64), np.zeros(0, np.int64))


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """The state of an epoch's plan where a chunk begins; after the last chunk, its totals.

    first_row: rows before it. waiting: int64 samples that wait, oldest first. held: rows too few for a step.
    The sums count every new row once: rows, video tokens, text slots; and over steps the largest and the mean cost
    of a rank. repeated: int64 rows that occur a second time.
    """

    first_row: int
    waiting: np.ndarray
    held: _Table
    rows: int
    video: int
    text: int
    largest: float
    mean: float
    repeated: np.ndarray


class EpochPlan:
    """The rows of one epoch, in the order in which they are trained on; made by `PackPlan.epoch`.

    Step k is rows k * G .. (k + 1) * G - 1, those of rank 0 first. The last step is filled up with rows of the last
    chunk, which `repeated_rows` names; every other row is new, and the new rows hold every sample exactly once (or as
    often as its weight says, see `data_pipelines.shuffle.epoch_counts`).

    `row` plans as far as it must; everything that describes the epoch as a whole (its length, fill, ...) plans all.
    """

    def __init__(self, plan, epoch):
        self._plan, self.epoch = plan, epoch
        self.rows_per_step = plan.settings.rows_per_step
        self._order = plan.order(epoch)
        # Chunks of equal size: a short one at the end would be packed less well, and repeat more.
        count = max(1, -(-len(self._order) // plan.chunk))
        self._edges = [len(self._order) * c // count for c in range(count + 1)]
        self._starts = [_Start(0, _EMPTY.samples, _EMPTY, 0, 0, 0, 0.0, 0.0, _EMPTY.samples)]
        self._chunks = OrderedDict()

    def row(self, index):
        """Samples int64 [k] of one row."""
        with self._plan.lock:
            if index < 0 or not self.holds(index):
                raise IndexError(f"epoch {self.epoch} has {len(self)} rows, not row {index}")
            chunk = bisect_right(self._starts, index, key=lambda start: start.first_row) - 1
            return self._chunk(chunk).row(index - self._starts[chunk].first_row)

    def holds(self, index):
        """Whether the epoch has more than `index` rows; plans no further than is needed to know."""
        with self._plan.lock:
            while self._starts[-1].first_row <= index and not self.complete:
                self._chunk(len(self._starts) - 1)
            return index < self._starts[-1].first_row

    @property
    def complete(self):
        """Whether all of it has been planned."""
        return len(self._starts) == len(self._edges)

    def __len__(self):
        return self._totals.first_row

    @property
    def num_steps(self):
        """Steps of the epoch, all of them full."""
        return len(self) // self.rows_per_step

    @property
    def repeated_rows(self):
        """Rows that occur a second time to fill the last step: int64, fewer than G unless the epoch has fewer."""
        return self._totals.repeated

    @property
    def repeated(self):
        """How many rows occur a second time."""
        return len(self.repeated_rows)

    @property
    def fill(self):
        """Useful video tokens / all video tokens of the new rows."""
        return self._totals.video / max(1, self._totals.rows * self._plan.settings.row_tokens)

    @property
    def text_fill(self):
        """Useful text slots / all text slots of the new rows."""
        return self._totals.text / max(1, self._totals.rows * self._plan.settings.row_text)

    @property
    def imbalance(self):
        """Time of the epoch / its time if all ranks always had equal cost: sum of largest / sum of mean, >= 1."""
        return self._totals.largest / self._totals.mean if self._totals.mean else 1.0

    @property
    def row_starts(self):
        """int64 [R + 1]: row r holds samples[row_starts[r]:row_starts[r + 1]]. Plans, and holds, the whole epoch."""
        return self._table.starts

    @property
    def samples(self):
        """int64 [row_starts[-1]]: the samples of all rows, row after row."""
        return self._table.samples

    @property
    def identity(self):
        """That of the plan of all epochs."""
        return self._plan.identity

    @cached_property
    def _table(self):
        with self._plan.lock:
            table = _EMPTY
            for chunk in range(len(self._edges) - 1):
                table = table + self._chunk(chunk)
            return table

    @property
    def _totals(self):
        with self._plan.lock:
            while not self.complete:
                self._chunk(len(self._starts) - 1)
            return self._starts[-1]

    def _chunk(self, chunk):
        """Rows of a chunk as a table; plans all before it that have not been."""
        for c in range(min(chunk, len(self._starts) - 1), chunk + 1):
            if c not in self._chunks:
                rows, after = self._make(c)
                self._chunks[c] = rows
                if c + 1 == len(self._starts):
                    self._starts.append(after)
            self._chunks.move_to_end(c)
            while len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return self._chunks[chunk]

    def _make(self, chunk):
        """(rows as a table, _Start of the next chunk)."""
        plan, settings, start = self._plan, self._plan.settings, self._starts[chunk]
        last = chunk == len(self._edges) - 2
        if self._order is None:
            self._order = plan.order(self.epoch)
        samples = np.concatenate([start.waiting, self._order.take(self._edges[chunk], self._edges[chunk + 1])])
        row_starts, members, left = pack_rows(plan.video[samples], plan.text[samples], settings, last)
        new = _Table(row_starts, samples[members])
        rows = start.held + new
        count, size = len(rows), self.rows_per_step
        # What fills no step goes on to the next chunk; at the end of the epoch, rows are repeated (wrapping around).
        used = -(-count // size) * size if last else count // size * size
        order = np.arange(used) % max(count, 1)
        cost = row_costs(plan.video[rows.samples], rows.starts, settings)
        order, largest, mean = order_rows(order, cost[order], settings, fold(settings.seed, self.epoch, 2, chunk))
        ordered = rows.take(order)
        after = _Start(
            first_row=start.first_row + used,
            waiting=samples[left],
            held=rows.take(np.arange(used, count)),
            rows=start.rows + len(new),
            video=start.video + int(plan.video[new.samples].sum(dtype=np.int64)),
            text=start.text + int(plan.text[new.samples].sum(dtype=np.int64)),
            largest=start.largest + largest,
            mean=start.mean + mean,
            repeated=start.first_row + _second_times(order),
        )
        return ordered, after

    def __getstate__(self):  # for workers: rows, and with weights the order, are quicker made than sent
        state = {**self.__dict__, "_chunks": OrderedDict(), "_order": None}
        state.pop("_table", None)
        return state


def _second_times(order):
    """Places int64 at which `order` has a number that it has earlier."""
    first = np.zeros(len(order), bool)
    first[np.unique(order, return_index=True)[1]] = True
    return np.flatnonzero(~first)


class PackPlan:
    """The rows of all epochs, one epoch after the other, each of whole steps.

    Args:
      video_tokens: [n] patches of each sample, >= 1. text_tokens: [n] text slots it takes, empty slot included.
      weights: float64 [n] or None: how often a sample comes in an epoch on average, >= 0; None means once.
      names: function index -> what to call a sample in an error; default "sample 7".
      settings: those of `PackSettings`.

    Holds int32 copies of the lengths (none where they are int32 already) and little else. Safe to use from threads.
    Raises UserError where there is no sample, one does not fit in a row or has no tokens, or weights are impossible.
    """

    def __init__(self, video_tokens, text_tokens, *, weights=None, names=None, **settings):
        self.settings = PackSettings(**settings)
        video, text = np.asarray(video_tokens), np.asarray(text_tokens)
        if video.ndim != 1 or video.shape != text.shape:
            raise ValueError(f"video_tokens {video.shape} and text_tokens {text.shape} must both be [n]")
        check_fits(video, text, self.settings.row_tokens, self.settings.row_text, names)
        self.video, self.text = (np.ascontiguousarray(x, np.int32) for x in (video, text))
        self.weights = None if weights is None else _checked(weights, len(video), names)
        samples_a_row = -(-self.settings.row_tokens * len(video) // int(self.video.sum(dtype=np.int64)))
        self.chunk = max(self.settings.chunk, _STEPS_A_CHUNK * self.settings.rows_per_step * samples_a_row)
        self.lock = threading.RLock()
        self._first_rows = [0]  # global index of the first row of each epoch known so far, and of the one after
        self._epochs, self._identity = OrderedDict(), None

    @property
    def identity(self):
        """Hash of the lengths, the weights and every setting: equal plans, equal identity."""
        if self._identity is None:
            digest = hashlib.sha256(repr((VERSION, self.chunk, dataclasses.astuple(self.settings))).encode())
            for array, kind in ((self.video, "<i4"), (self.text, "<i4"), (self.weights, "<f8")):
                if array is not None:
                    digest.update(np.ascontiguousarray(array, kind))
            self._identity = digest.hexdigest()[:16]
        return self._identity

    def epoch(self, epoch):
        """The `EpochPlan` of an epoch."""
        with self.lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = EpochPlan(self, epoch)
            self._epochs.move_to_end(epoch)
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def locate(self, index):
        """(epoch, row of the epoch) of a global row index; plans no further than that row."""
        if index < 0:
            raise IndexError(f"rows are numbered from 0, got {index}")
        with self.lock:
            epoch = bisect_right(self._first_rows, index) - 1
            while not (epoch + 1 < len(self._first_rows) or self.epoch(epoch).holds(index - self._first_rows[epoch])):
                # How many rows an epoch has is known only from its plan.
                self._first_rows.append(self._first_rows[epoch] + len(self.epoch(epoch)))
                epoch = bisect_right(self._first_rows, index) - 1
            return epoch, index - self._first_rows[epoch]

    def row(self, index):
        """Samples int64 [k] of a global row."""
        with self.lock:
            epoch, row = self.locate(index)
            return self.epoch(epoch).row(row)

    def order(self, epoch):
        """The `EpochOrder` of an epoch."""
        return EpochOrder(len(self.video), self.settings.seed, epoch, self.weights)

    def __getstate__(self):  # for workers: a lock does not travel
        return {**self.__dict__, "lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.lock = threading.RLock()


def _checked(weights, count, names):
    weights = np.ascontiguousarray(weights, np.float64)
    if weights.shape != (count,):
        raise ValueError(f"weights {weights.shape} must be [{count}], one a sample")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        worst = int(wrong.argmax())
        name = names(worst) if names else f"sample {worst}"
        raise UserError(f"{name} has weight {weights[worst]}: give it a number >= 0, 0 to leave it out")
    if weights.sum() < 1:
        raise UserError(f"the weights add up to {weights.sum():g} samples an epoch: make them larger, 1 being once")
    return weights


def plan_epoch(video_tokens, text_tokens, *, epoch, weights=None, names=None, **settings):
    """The `EpochPlan` of one epoch; arguments and errors as in `PackPlan`. A pure function of the arguments."""
    return PackPlan(video_tokens, text_tokens, weights=weights, names=names, **settings).epoch(epoch)
