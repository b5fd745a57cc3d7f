"""From a data set to batches: packed rows for the DiT, clips of one shape for the VAE.

What batch k holds is a pure function of (data, settings, seed, k): the state of a loader is the number of the
next step, and the same batches come on one process or many, with workers or without. grain reads ahead.

Letters: B = rows or clips of a batch over all processes, B_local = of this process; N, P, M as in a packed row.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache

import grain
import numpy as np
from absl import flags

from data_pipelines.packing import COST_A, COST_B, check_fits, plan_epoch
from data_pipelines.text_tokens import PAD_ID
from sorax.errors import UserError
from sorax.patchify import PATCH_SIZE, num_tokens, patchify, positions

_ENDLESS = 1 << 48  # grain wants a length: more batches than anybody trains on
_KEPT_PLANS = 2  # reading ahead crosses from one epoch into the next


# Small samples are read by the thousand, and there are few shapes.
_positions = lru_cache(maxsize=256)(positions)


class RowSource:
    """Packed rows of all epochs, one after the other, with random access by global row index.

    Args:
      examples: random access, picklable: len(examples); shape(i) -> (t, h, w) of its latents and
        text_length(i) -> L, both cheap; examples[i] -> dict(latents float [t, h, w, C], text_tokens int [L]);
        and, if it has it, key(i) -> the name of a sample for errors.
      row_tokens, row_text: N and M, the room of a row. Each caption takes L + 1 text slots: its tokens and one
        empty slot, which stands for all slots that it leaves unused.
      max_segments: most samples of a row; None for any number.
      batch_size: rows of a step over all processes. ranks: data-parallel ranks that share them, in order.
      The others as in `data_pipelines.packing.plan_epoch`.

    Row index r is row r % batch_size of step r // batch_size; epochs are whole steps. `source[r]` is a dict of
    tokens float32 [N, P], positions int32 [N, 3], segment_ids int32 [N] (1.., 0 = padding), text_tokens
    int32 [M], text_segment_ids int32 [M].

    Raises UserError where a sample does not fit in a row, and, when read, where it has not the promised size.
    """

    def __init__(
        self,
        examples,
        *,
        row_tokens,
        row_text,
        batch_size,
        seed,
        max_segments=None,
        patch_size=PATCH_SIZE,
        ranks=1,
        window=512,
        cost_a=COST_A,
        cost_b=COST_B,
    ):
        if batch_size % ranks:
            raise UserError(
                f"{batch_size} rows a step cannot be shared equally by {ranks} data-parallel ranks: "
                f"make the batch a multiple of {ranks}"
            )
        self.examples = examples
        self.row_tokens, self.row_text, self.batch_size = row_tokens, row_text, batch_size
        self.patch_size = patch_size
        count = len(examples)
        self._video = np.fromiter((num_tokens(examples.shape(i), patch_size) for i in range(count)), np.int64, count)
        self._text = np.fromiter((examples.text_length(i) + 1 for i in range(count)), np.int64, count)
        self._settings = dict(
            row_tokens=row_tokens,
            row_text=row_text,
            max_segments=max_segments,
            seed=seed,
            window=window,
            ranks=ranks,
            rows_per_rank_step=batch_size // ranks,
            cost_a=cost_a,
            cost_b=cost_b,
        )
        check_fits(self._video, self._text, row_tokens, row_text, self._name)
        self._first_rows = [0]  # global index of the first row of each epoch known so far, and of the one after
        self._plans = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, epoch):
        """The PackPlan of an epoch."""
        with self._lock:
            return self._plan(epoch)

    @property
    def identity(self):
        """Hash of the data's lengths and of every setting: a checkpoint that has another is of other batches."""
        return self.plan(0).identity

    def locate(self, index):
        """(epoch, row of the epoch) of a global row index."""
        if index < 0:
            raise IndexError(f"rows are numbered from 0, got {index}")
        with self._lock:
            # How many rows an epoch has is known only from its plan.
            while index >= self._first_rows[-1]:
                self._first_rows.append(self._first_rows[-1] + len(self._plan(len(self._first_rows) - 1)))
            epoch = bisect_right(self._first_rows, index) - 1
            return epoch, index - self._first_rows[epoch]

    def samples(self, index):
        """Which samples are in a row: int64 [k] indices into `examples`, in order of their segment ids."""
        epoch, row = self.locate(index)
        return self.plan(epoch).row(row)

    def __len__(self):
        return _ENDLESS

    def __getitem__(self, index):
        tokens = None
        where = np.zeros((self.row_tokens, 3), np.int32)
        segment_ids = np.zeros(self.row_tokens, np.int32)
        text_tokens = np.full(self.row_text, PAD_ID, np.int32)
        text_segment_ids = np.zeros(self.row_text, np.int32)
        at, text_at = 0, 0
        for segment, sample in enumerate(self.samples(index).tolist(), start=1):
            latents, text = self._read(sample)
            patches = patchify(latents, self.patch_size)  # [n, P]
            if tokens is None:
                tokens = np.zeros((self.row_tokens, patches.shape[1]), np.float32)
            end, text_end = at + len(patches), text_at + len(text) + 1  # + 1: the empty slot
            tokens[at:end] = patches
            where[at:end] = _positions(*latents.shape[:3], tuple(self.patch_size))
            segment_ids[at:end] = segment
            text_tokens[text_at : text_end - 1] = text
            text_segment_ids[text_at:text_end] = segment
            at, text_at = end, text_end
        return dict(
            tokens=tokens,
            positions=where,
            segment_ids=segment_ids,
            text_tokens=text_tokens,
            text_segment_ids=text_segment_ids,
        )

    def _plan(self, epoch):
        if epoch not in self._plans:
            self._plans[epoch] = plan_epoch(self._video, self._text, epoch=epoch, names=self._name, **self._settings)
            while len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def _read(self, sample):
        example = self.examples[sample]
        latents, text = np.asarray(example["latents"]), np.asarray(example["text_tokens"])
        found = num_tokens(latents.shape[:3], self.patch_size), len(text) + 1
        if found != (self._video[sample], self._text[sample]):
            raise UserError(
                f"{self._name(sample)} was planned as {self._video[sample]} video and {self._text[sample]} text "
                f"tokens, but reads as {found[0]} and {found[1]}: the data changed; start again from its index"
            )
        return latents, text

    def _name(self, sample):
        return str(self.examples.key(sample)) if hasattr(self.examples, "key") else f"sample {sample}"

    def __getstate__(self):  # for workers: a lock does not travel, plans are quicker made than sent
        return {**self.__dict__, "_lock": None, "_plans": OrderedDict()}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()


class VideoClipSource:
    """Batches of dense clips, all of one shape, drawn from a source of mixed shapes; random access by step.

    Step k takes a shape with probability proportional to how many samples have it, then batch_size samples of
    that shape, different ones as far as there are enough; (seed, k) decides both.

    Args:
      source: a `data_pipelines.sources.Source`.
      crop: (frames, height, width) or None. Longer or larger videos are cut to it, at a place drawn for each
        clip, so that videos of many native sizes train in one shape; smaller ones keep their own size.

    Raises UserError where the source is empty or crop has not 4n + 1 frames.
    """

    def __init__(self, source, *, batch_size, seed, crop=None):
        if not len(source):
            raise UserError("there is no video to train on: the data set is empty")
        if crop is not None and (min(crop) < 1 or crop[0] % 4 != 1):
            raise UserError(f"crop {tuple(crop)}: clips have 4n + 1 frames (1, 5, 9, 13, ...) and a positive size")
        self.source, self.batch_size, self.seed, self.crop = source, batch_size, seed, crop
        specs = (source.spec(i) for i in range(len(source)))
        shapes = np.array([(s.num_frames, s.height, s.width) for s in specs])
        cropped = shapes if crop is None else np.minimum(shapes, crop)
        # Sorted, so that equal data draws equally: [groups, 3], members [groups] of indices.
        self.shapes, group_of, sizes = np.unique(cropped, axis=0, return_inverse=True, return_counts=True)
        self.groups = np.split(np.argsort(group_of.ravel(), kind="stable"), sizes.cumsum()[:-1])
        self._ends = sizes.cumsum()

    def draw(self, step):
        """(shape, members, where) of a step: (T, H, W), int64 [B] indices, float64 [B, 3] places of the crops."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64)))
        group = int(np.searchsorted(self._ends, rng.integers(self._ends[-1]), side="right"))
        members = self.groups[group]
        if len(members) >= self.batch_size:
            chosen = rng.choice(members, self.batch_size, replace=False)
        else:
            chosen = np.resize(rng.permutation(members), self.batch_size)  # wraps around
        return tuple(self.shapes[group].tolist()), chosen, rng.random((self.batch_size, 3))

    def read(self, step, start, stop):
        """Clips start..stop - 1 of a step: dict(video uint8 [stop - start, T, H, W, 3])."""
        shape, members, where = self.draw(step)
        clips = np.empty((stop - start, *shape, 3), np.uint8)
        for clip, member, place in zip(clips, members[start:stop].tolist(), where[start:stop]):
            video = self.source[member]["video"]
            spare = np.array(video.shape[:3]) - shape
            if spare.min() < 0:
                raise UserError(
                    f"{self.source.spec(member).key} was listed as {shape} frames x height x width or larger, "
                    f"but reads as {video.shape[:3]}: the data changed; start again"
                )
            corner = (place * (spare + 1)).astype(int)
            clip[:] = video[tuple(slice(c, c + s) for c, s in zip(corner, shape))]
        return dict(video=clips)


class Loader:
    """Iterator over the batches of this process, with the number of the next step as its whole state.

    Args:
      read: picklable function (step, start, stop) -> dict of arrays [stop - start, ...], the rows start..stop - 1
        of a step's batch; pure.
      start_step: step of the first batch. prefetch: batches read ahead (of each worker), 0 for none.
      num_workers: processes that read; 0 = threads of this process, enough where reading releases the GIL.

    Close it after use where there are workers.
    """

    def __init__(self, read, *, batch_size, process_index=0, process_count=1, start_step=0, num_workers=0, prefetch=2):
        if batch_size % process_count:
            raise UserError(
                f"a batch of {batch_size} cannot be shared equally by {process_count} processes: "
                f"make it a multiple of {process_count}"
            )
        self._local = batch_size // process_count
        self._read, self._start = read, process_index * self._local
        self._num_workers, self._prefetch = num_workers, prefetch
        self._iterator = None
        self.set_state(start_step)

    def __iter__(self):
        return self

    def __next__(self):
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self.step += 1
        return batch

    def get_state(self):
        """The step of the next batch."""
        return self.step

    def set_state(self, step):
        """Make `step` the step of the next batch."""
        if step < 0:
            raise ValueError(f"steps are numbered from 0, got {step}")
        self.close()
        self.step = int(step)

    def close(self):
        """Stop threads and workers; the next batch starts them anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self):
        # Steps are counted in the source, not by grain: its own state depends on the number of workers.
        batches = grain.MapDataset.source(_Batches(self._read, self.step, self._start, self._start + self._local))
        # Its default buffer of 500 elements is meant for single samples: here an element is a batch.
        ahead = 1 if self._num_workers else self._prefetch
        options = grain.ReadOptions(num_threads=min(ahead, 4), prefetch_buffer_size=ahead)
        dataset = batches.to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # outside absl's app nobody has; grain's workers ask for flags
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(
                num_workers=self._num_workers, per_worker_buffer_size=max(self._prefetch, 1)
            )
            dataset = dataset.mp_prefetch(workers)
        return iter(dataset)


class _Batches:
    """Random-access source of the batches from `first_step` on: what grain reads."""

    def __init__(self, read, first_step, start, stop):
        self._read, self._first_step, self._start, self._stop = read, first_step, start, stop

    def __len__(self):
        return _ENDLESS

    def __getitem__(self, index):
        return self._read(self._first_step + int(index), self._start, self._stop)


class _ReadRows:
    """Stacks rows start..stop - 1 of a step; a class, because workers need to pickle it."""

    def __init__(self, row_source):
        self.row_source = row_source

    def __call__(self, step, start, stop):
        first = step * self.row_source.batch_size
        rows = [self.row_source[first + row] for row in range(start, stop)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def make_loader(row_source, *, batch_size=None, **options):
    """Loader of packed rows: dicts of tokens [B_local, N, P] and the other fields of `RowSource`.

    batch_size is that of the source, for which its steps are balanced; options as in `Loader`.
    """
    if batch_size not in (None, row_source.batch_size):
        raise ValueError(f"rows were planned for {row_source.batch_size} a step, not {batch_size}")
    return Loader(_ReadRows(row_source), batch_size=row_source.batch_size, **options)


def make_clip_loader(source, *, batch_size, seed, crop=None, **options):
    """Loader of dense clips: dict(video uint8 [B_local, T, H, W, 3]), one shape a batch (`VideoClipSource`).

    options as in `Loader`.
    """
    clips = VideoClipSource(source, batch_size=batch_size, seed=seed, crop=crop)
    return Loader(clips.read, batch_size=batch_size, **options)
