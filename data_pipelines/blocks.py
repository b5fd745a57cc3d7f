"""Memory that a worker process fills and its loader reads without a copy, used again and again.

New shared memory costs the system about as much as decoding a tenth of what it holds. So a worker keeps its blocks:
files that both sides map, of one page that tells whether the loader still needs the block, and then the data. They
lie in a folder that belongs to the loader and goes with it.
"""

import contextlib
import errno
import math
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sorax.errors import UserError

FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory where the system has such a place
_DATA = mmap.PAGESIZE  # offset of the data
_FREE, _TAKEN = 0, 1


@dataclass(frozen=True)
class Reference:
    """What is sent in place of an array that lies in a block."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class Blocks:
    """A worker's blocks. One thread fills one at a time.

    Args:
      folder: where they are made. prefix: of their names, this worker's own.
    """

    def __init__(self, folder, prefix):
        self._folder, self._prefix, self._made = Path(folder), prefix, 0
        self._blocks = {}  # name -> mapping
        self._sent = {}  # id of an array -> (the array, its name)

    @contextlib.contextmanager
    def empty(self, shape, dtype):
        """A writable array of any contents in a block that the loader does not need; it is to be given to `refer`."""
        name = self._take(math.prod(shape) * np.dtype(dtype).itemsize)
        block = self._blocks[name]
        block[0] = _TAKEN
        array = _flat(block, shape, dtype).reshape(shape)
        self._sent[id(array)] = array, name
        try:
            yield array
        except BaseException:  # nobody will receive it
            del self._sent[id(array)]
            block[0] = _FREE
            raise

    def refer(self, value):
        """A `Reference` to an array of `empty`, once; anything else as it is."""
        array, name = self._sent.pop(id(value), (None, None))
        return value if array is None else Reference(name, array.shape, array.dtype.str)

    def _take(self, size):
        free = {name: len(block) - _DATA for name, block in self._blocks.items() if block[0] == _FREE}
        fitting = [name for name, room in free.items() if room >= size]
        if fitting:
            return min(fitting, key=free.get)
        for name in free:  # too small for what comes now: make room
            os.unlink(self._folder / name)
            del self._blocks[name]
        self._made += 1
        name = f"{self._prefix}-{self._made}"
        self._blocks[name] = _create(self._folder / name, _DATA + size)
        return name


class Received:
    """The loader's side: arrays of the references that workers send."""

    def __init__(self, folder):
        self._folder, self._blocks = Path(folder), {}

    def array(self, value):
        """The array that a `Reference` is to, in the worker's memory, which has it back when the last view of the array
        is gone; anything else as it is."""
        if not isinstance(value, Reference):
            return value
        if value.file not in self._blocks:
            kept = {name: block for name, block in self._blocks.items() if (self._folder / name).exists()}
            with open(self._folder / value.file, "r+b") as file:
                self._blocks = kept | {value.file: mmap.mmap(file.fileno(), 0)}
        block = self._blocks[value.file]
        flat = _flat(block, value.shape, np.dtype(value.dtype))
        weakref.finalize(flat, block.__setitem__, 0, _FREE).atexit = False
        return flat.reshape(value.shape)


def _flat(block, shape, dtype):
    """The values of an array in a block, [math.prod(shape)]: what numpy keeps alive while there is any view of them."""
    return np.frombuffer(block, dtype, math.prod(shape), _DATA)


def _create(path, size):
    with open(path, "xb+") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # written without room, a mapping kills the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            os.unlink(path)
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{path.parent} has no room for a batch of {size / 2**20:.0f} MiB: give it more (docker: --shm-size), "
                "or set data.workers lower or 0"
            ) from error
        return mmap.mmap(file.fileno(), size)
