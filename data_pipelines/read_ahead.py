"""Samples of a source one after the other, read a little ahead of their use by threads or worker processes."""

from data_pipelines import reading
from data_pipelines.loader import Loader


def read_ahead(source, order, *, ahead, num_workers=0):
    """Closable iterator over source[i] for i in order (ints), in that order; endless dicts without entries follow.

    ahead: samples held in memory before they are asked for, of all workers together. num_workers: 0 for threads.
    Raises UserError that names the sample a worker died over.
    """
    prefetch = max(1, ahead // max(1, num_workers))
    return Loader(_ReadSample(source, order), batch_size=1, name=lambda i: source.spec(int(i)).key,
                  num_workers=num_workers, prefetch=prefetch)  # fmt: skip


class _ReadSample:
    """A class, because workers need to pickle it."""

    def __init__(self, source, order):
        self.source, self.order = source, order

    def __call__(self, step, start, stop):
        if step >= len(self.order):
            return {}
        index = int(self.order[step])
        with reading.note(index):
            return self.source[index]
