"""Programs of several libraries measured side by side: a process each, one at work at a time, in turns."""

import os
import subprocess
import sys
import time

import numpy as np

from sorax import backend


def serve(tasks, prefix: str):
    """Main loop of a side's process: runs a task for each line of stdin and answers with its CPU seconds and seconds.

    tasks: name -> function () -> dict of arrays, which are written to `PREFIX.TASK.npz`.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        task = line.strip()
        wall, cpu = time.perf_counter(), time.process_time()
        result = tasks[task]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        np.savez(f"{prefix}.{task}.npz", **result)
        print(cpu, wall, flush=True)


class Side:
    """A process that runs `serve`."""

    def __init__(self, command: list[str], prefix: str, environment: dict):
        self.prefix = prefix
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | environment)  # fmt: skip
        while self._answer() != "ready":  # libraries greet on stdout
            pass

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with {self.process.wait()}: see its error above")
        return line.strip()

    def run(self, task):
        """(CPU seconds, seconds) of a task."""
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return tuple(map(float, self._answer().split()))

    def result(self, task):
        """What the task gave when it ran last."""
        with np.load(f"{self.prefix}.{task}.npz") as arrays:
            return dict(arrays)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def start(module: str, names, folder: str, python: dict, arguments) -> dict[str, Side]:
    """A side for each name: `python -m MODULE --side NAME --prefix FOLDER/NAME ARGUMENTS`.

    Each runs as it does by itself: ours begins as `sorax` does, with large pages of memory, theirs with the libraries'
    own defaults. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 or =0 in the environment holds for all of them.

    python: interpreter by name, for those that need another than this one.
    """
    sides = {}
    for name in names:
        prefix = os.path.join(folder, name)
        command = [python.get(name, sys.executable), "-m", module, "--side", name, "--prefix", prefix, *arguments]
        sides[name] = Side(command, prefix, backend.large_pages() if name.startswith("ours") else {})
    return sides


def median_times(pairs, rounds: int, goes_on=False):
    """Runs each (side, task), in turns. Each should have run before, so that what it compiles is not counted.

    goes_on: a task follows itself, as a training step does: each turn runs it twice, and counts the second. While the
        others run, a virtual machine may take back the memory that a process has given to the kernel, and the first
        step waits until it has it again.

    Returns:
        medians `[pairs, 2]`: CPU seconds, seconds.
    """
    times = [[] for _ in pairs]
    for _ in range(rounds):
        for (side, task), taken in zip(pairs, times):
            if goes_on:
                side.run(task)
            taken.append(side.run(task))
    return np.median(np.array(times), axis=1)
