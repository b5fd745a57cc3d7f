"""What goes on inside a worker process of a loader.

What it is reading is kept where it outlives the process: a decoder that crashes tells nobody. Large arrays are made
where the parent can see them (`data_pipelines.blocks`), so that they need not be copied there. A worker ends when its
parent has died, and clears away what the parent no longer can.
"""

import contextlib
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np

from data_pipelines.blocks import Blocks

_DIGITS = 20
_file = _blocks = None  # of this worker; None in a process that is none


def start_worker(folder, _index=0, _count=1):
    """What a worker runs first: numbers of samples are noted in `folder`, in a file of this process, beside its blocks.

    The arguments after the folder are those that grain gives.
    """
    global _file, _blocks
    _file = os.open(Path(folder) / str(os.getpid()), os.O_WRONLY | os.O_CREAT)
    _blocks = Blocks(folder, f"{os.getpid()}-block")
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()


def _end_with(parent, folder):
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


@contextlib.contextmanager
def note(sample):
    """While this process is at it, it is noted that it reads the sample of this number. Costs some microseconds."""
    _write(str(sample))
    try:
        yield
    finally:
        _write("")


def _write(text):
    if _file is not None:
        os.pwrite(_file, text.encode().ljust(_DIGITS), 0)


@contextlib.contextmanager
def empty(shape, dtype):
    """Makes an array of any contents, to be filled and given to the loader; in a worker, in memory shared with it."""
    if _blocks is None:
        yield np.empty(shape, dtype)
        return
    with _blocks.empty(shape, dtype) as array:
        yield array


def send(batch):
    """A batch as it is to leave this process: references in place of what lies in shared memory."""
    return batch if _blocks is None else {name: _blocks.refer(value) for name, value in batch.items()}


def last_of_the_dead(folder):
    """Numbers of the samples that processes were reading that are no more."""
    noted = {int(path.name): path.read_text().strip() for path in Path(folder).iterdir() if path.name.isdigit()}
    return [int(sample) for process, sample in sorted(noted.items()) if sample and not _alive(process)]


def _alive(pid):
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
