"""Work on untrusted items in processes that are bounded in time and memory and may die without harm.

`pebble` runs the processes and ends those that overrun; here are the order of results, the memory limit, the bounded
queue and the names of what went wrong. The function and the items must be picklable; a worker is started afresh
(nothing is inherited by fork), so a script that calls this needs the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from sorax.errors import UserError

WINDOW = 256  # items that are handed out at most before the oldest of them is done
_NO_START = (
    'worker processes do not start: a script needs `if __name__ == "__main__":` around its work, and a worker some '
    "memory"
)
ATTEMPTS = 3  # pools that may break one after the other without finishing one item


class Failure(NamedTuple):
    """An item that no result could be had of, and why."""

    reason: str


def default_processes() -> int:
    """Number of CPUs that this process may use."""
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_bounded(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    processes: int | None = None,
    time_limit: float | None = None,
    memory_limit: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in the order of the items, computed in worker processes.

    Arguments:
      function: picklable; sent to each worker once.
      items: may be endless: at most WINDOW of them are taken ahead.
      processes: number of workers; None: one a CPU. 0: in this process, without limits and without protection.
      time_limit: seconds that one item may take; its worker is then killed.
      memory_limit: bytes of address space that a worker may take above what it starts with, where the system can
        limit it (not on Windows or macOS).
    An item whose worker dies, is killed or raises gives a Failure in place of a result; the others are not harmed.
    Closing the iterator, or an exception such as KeyboardInterrupt, ends the workers; so does this process's death.
    Raises UserError if workers cannot be started at all.
    """
    if processes == 0:
        for item in items:
            yield item, _guarded(function, item)
        return
    items, pending, broken = iter(items), collections.deque(), 0
    pool, futures, more = None, collections.deque(), True
    try:
        while True:
            while more and len(pending) < WINDOW:
                try:
                    pending.append(next(items))
                except StopIteration:
                    more = False
            if not pending:
                return
            if pool is None:
                pool = _pool(function, processes or default_processes(), memory_limit)
            try:
                for item in list(pending)[len(futures) :]:
                    futures.append(pool.schedule(_work, args=(item,), timeout=time_limit))
                outcome = _outcome(futures[0], time_limit)
            except (BrokenProcessPool, RuntimeError) as error:
                # A worker died between taking an item and saying so, or none can be started.
                _stop(pool)
                pool, broken = None, broken + 1
                futures.clear()
                if broken < ATTEMPTS:
                    continue
                if broken == ATTEMPTS and _starts(memory_limit):
                    outcome = Failure("worker died: it ended on this item")
                else:
                    raise UserError(_NO_START) from error
            else:
                futures.popleft()
            broken = 0
            yield pending.popleft(), outcome
    finally:
        if pool is not None:
            _stop(pool)


def _pool(function, processes: int, memory_limit: int | None):
    from pebble import ProcessPool

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(_NO_START)
    context = multiprocessing.get_context("spawn")  # no fork: this process may hold threads, locks and devices
    return ProcessPool(processes, initializer=_start, initargs=(function, memory_limit), context=context)


def _stop(pool):
    pool.stop()
    pool.join()


def _starts(memory_limit) -> bool:
    """Whether workers start and work, tried with an item that cannot harm them."""
    pool = _pool(_nothing, 1, memory_limit)
    try:
        return pool.schedule(_work, args=(0,)).result() == 0
    except (BrokenProcessPool, RuntimeError):
        return False
    finally:
        _stop(pool)


def _outcome(future, time_limit):
    from pebble import ProcessExpired

    try:
        return future.result()
    except TimeoutError:
        return Failure(f"too slow: stopped after {time_limit:g} s")
    except ProcessExpired as error:
        code = error.exitcode
        return Failure(f"worker died: {f'signal {-code}' if code < 0 else f'exit code {code}'}")


# --- Inside a worker

_function: Callable[[Any], Any] | None = None


def _start(function, memory_limit):
    """Once in each worker: keeps the function, limits the memory, and ends with the parent."""
    global _function
    _function = function
    warnings.simplefilter("ignore")  # libraries warn of odd files once a file; what is wrong with one is its reason
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash on a bad file should leave no dump
        if memory_limit is not None and os.path.exists("/proc/self/statm"):
            with open("/proc/self/statm") as f:
                taken = int(f.read().split()[0]) * resource.getpagesize()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            limit = taken + int(memory_limit)
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _end_with_parent():
    """A worker that hangs would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(item):
    return _guarded(_function, item)


def _nothing(item):
    return item


def _guarded(function, item):
    try:
        return function(item)
    except MemoryError:
        return Failure("out of memory: it needs more than a worker may take")
    except Exception as error:
        return Failure(f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
