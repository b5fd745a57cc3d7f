"""From a data set to batches: packed rows for the DiT, clips of one shape for the VAE.

What batch k holds is a pure function of (data, settings, seed, k): the state of a loader is the number of the
next step, and the same batches come on one process or many, with workers or without. grain reads ahead.

Letters: B = rows or clips of a batch over all processes, B_local = of this process; N, P, M as in a packed row.
"""

import functools
import tempfile

import grain
import numpy as np
from absl import flags

from data_pipelines import blocks, reading
from data_pipelines.clips import VideoClipSource
from sorax.errors import UserError

_ENDLESS = 1 << 48  # grain wants a length: more batches than anybody trains on


class Loader:
    """Iterator over the batches of this process, with the number of the next step as its whole state.

    Args:
      read: picklable function (step, start, stop) -> dict of arrays [stop - start, ...], the rows start..stop - 1
        of a step's batch; pure.
      identity: of the data and the settings that `read` depends on: part of the state, so that another is refused.
      name: function of a sample's number -> what to call it, if a worker dies over it.
      process_index, process_count: the part of each batch that is read, or several parts in ascending order, and how
        many equal parts there are.
      start_step: step of the first batch. prefetch: batches read ahead (of each worker), 0 for none.
      num_workers: processes that read, and send batches through shared memory; 0 = as many threads of this process as
        batches are read ahead, faster where reading releases the GIL, as decoding does, and cores are few.

    Close it after use where there are workers. An error of a worker is raised here; `read` has to name the sample.
    Raises UserError where batch_size is no multiple of process_count, and where a worker dies.
    """

    def __init__(
        self,
        read,
        *,
        batch_size,
        identity="",
        name=str,
        process_index=0,
        process_count=1,
        start_step=0,
        num_workers=0,
        prefetch=2,
    ):
        if batch_size % process_count:
            raise UserError(
                f"a batch of {batch_size} cannot be shared equally by {process_count} processes: "
                f"make it a multiple of {process_count}"
            )
        part, own = batch_size // process_count, (process_index,) if np.ndim(process_index) == 0 else process_index
        self._read, self._runs, self._name = read, _runs(own, part), name
        self._num_workers, self._prefetch = num_workers, prefetch
        self._iterator = self._notes = self._received = None
        self.identity, self.step = identity, start_step
        self._move(start_step)

    def __iter__(self):
        return self

    def __next__(self):
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batch = next(self._iterator)
        except Exception as error:
            # A worker that is killed, or crashes in a codec, says no more than that it is gone.
            lost = reading.last_of_the_dead(self._notes.name) if self._notes else []
            self.close()
            if not lost:
                raise
            named = ", ".join(self._name(sample) for sample in lost)
            raise UserError(
                f"a worker died while it read {named}, for step {self.step} ({error}): if memory ran out, set "
                "data.workers lower; else that sample crashes its decoder: leave it out"
            ) from error
        self.step += 1
        return batch if self._received is None else {name: self._received.array(v) for name, v in batch.items()}

    def get_state(self):
        """dict(step=of the next batch, identity=of the batches)."""
        return dict(step=self.step, identity=self.identity)

    def set_state(self, state):
        """Go on where a loader was that gave this state, whatever its workers and processes.

        Raises UserError where it is the state of other data or settings.
        """
        if state["identity"] != self.identity:
            raise UserError(
                f"these batches are not those of the checkpoint ({self.identity} here, {state['identity']} there): the "
                "data or its settings changed; put them back, or start a new run"
            )
        self._move(state["step"])

    def close(self):
        """Stop threads and workers; the next batch starts them anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        if self._notes is not None:
            self._notes.cleanup()
            self._notes = self._received = None

    def _move(self, step):
        if step < 0:
            raise ValueError(f"steps are numbered from 0, got {step}")
        self.close()
        self.step = int(step)

    def _open(self):
        # Steps are counted in the source, not by grain: its own state depends on the number of workers.
        batches = grain.MapDataset.source(_Batches(self._read, self.step, self._runs))
        # Its default buffer of 500 elements is meant for single samples: here an element is a batch.
        ahead = 0 if self._num_workers else self._prefetch  # workers are ahead by themselves
        options = grain.ReadOptions(num_threads=min(ahead, 16), prefetch_buffer_size=ahead)
        dataset = batches.to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # outside absl's app nobody has; grain's workers ask for flags
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(
                num_workers=self._num_workers, per_worker_buffer_size=max(self._prefetch, 1)
            )
            self._notes = tempfile.TemporaryDirectory(
                prefix="sorax-reading-", dir=blocks.FOLDER, ignore_cleanup_errors=True
            )
            self._received = blocks.Received(self._notes.name)
            dataset = dataset.mp_prefetch(workers, functools.partial(reading.start_worker, self._notes.name))
        return iter(dataset)


class _Batches:
    """Random-access source of the batches from `first_step` on: what grain reads."""

    def __init__(self, read, first_step, runs):
        self._read, self._first_step, self._runs = read, first_step, runs

    def __len__(self):
        return _ENDLESS

    def __getitem__(self, index):
        parts = [self._read(self._first_step + int(index), *run) for run in self._runs]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]
        return reading.send(joined)


def _runs(parts, size):
    """(start, stop) of the rows of ascending parts of so many rows each; neighbours are read together."""
    runs = []
    for part in parts:
        if runs and runs[-1][1] == part * size:
            runs[-1] = (runs[-1][0], (part + 1) * size)
        else:
            runs.append((part * size, (part + 1) * size))
    return runs


class _ReadRows:
    """Rows start..stop - 1 of a step; a class, because workers need to pickle it."""

    def __init__(self, row_source):
        self.row_source = row_source

    def __call__(self, step, start, stop):
        first = step * self.row_source.batch_size
        return self.row_source.read(first + start, first + stop)


def make_loader(row_source, **options):
    """Loader of packed rows: dicts of tokens [B_local, N, P] and the other fields of `data_pipelines.rows.RowSource`.

    options as in `Loader`; the size of a batch is that of the source, for which its steps are balanced.
    """
    about = dict(batch_size=row_source.batch_size, identity=row_source.identity, name=row_source.name)
    return Loader(_ReadRows(row_source), **about, **options)


def make_clip_loader(source, *, batch_size, seed, crop=None, temporal_stride=4, **options):
    """Loader of dense clips: dict(video uint8 [B_local, T, H, W, 3]), one shape a batch (`VideoClipSource`).

    options as in `Loader`.
    """
    clips = VideoClipSource(source, batch_size=batch_size, seed=seed, crop=crop, temporal_stride=temporal_stride)
    return Loader(clips.read, batch_size=batch_size, identity=clips.identity, name=clips.name, **options)
