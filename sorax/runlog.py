"""What a run says while it runs: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

import atexit
import contextlib
import json
import os
import sys
import time

import jax
import numpy as np
import rich.console
import rich.progress

from sorax.media import gif_bytes


def _tensorboard():
    """(EventsWriter, Event, SessionLog, Summary) of tensorboardX, which imports PyTorch where there is one. What is
    written here needs none, and it takes seconds: tensorboardX is told that there is none."""
    hidden = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
    finally:
        for name in hidden:
            del sys.modules[name]
    return EventsWriter, Event, SessionLog, Summary


class RunLog:
    """Metrics of one run folder. Lines after `start_step`, left by an interrupted run, are cut off first.

    With write=False nothing is written: another process does.
    """

    def __init__(self, workdir: str, start_step: int = 0, *, write: bool = True):
        self.path, self._file = os.path.join(workdir, "metrics.jsonl"), None
        if not write:
            return
        self._keep_until(start_step)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        board = os.path.join(workdir, "tensorboard")
        os.makedirs(board, exist_ok=True)
        writer, self._Event, session, self._Summary = _tensorboard()
        self._board = writer(os.path.join(board, "events"))
        # Points of later steps, left by an interrupted run, are not shown.
        self._event(step=start_step + 1, session_log=session(status=session.START))

    def _event(self, **what):
        """Writes a TensorBoard event, at once. The usual writer has a thread with a queue, in which an interrupt
        may leave a lock that the process then waits for when it ends."""
        self._board.write_event(self._Event(wall_time=time.time(), **what))
        self._board.flush()

    def _keep_until(self, step):
        if not os.path.exists(self.path):
            return
        kept = []
        with open(self.path) as f:
            for line in f:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the half-written last line of a killed run
                if row["step"] <= step:
                    kept.append(line)
        with open(self.path + ".partial", "w") as f:
            f.writelines(kept)
        os.replace(self.path + ".partial", self.path)

    def write(self, step: int, metrics: dict):
        """One JSON line and one TensorBoard point per metric; values are numbers."""
        if self._file is None:
            return
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        values = [self._Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        self._event(step=step, summary=self._Summary(value=values))

    def video(self, step: int, name: str, video: np.ndarray, fps: float):
        """A video uint8 `[T, H, W, 3]` for TensorBoard, which plays animated GIFs as images."""
        if self._file is None:
            return
        _, H, W, _ = video.shape
        Summary, gif = self._Summary, gif_bytes(video, fps)
        image = Summary.Image(height=H, width=W, colorspace=3, encoded_image_string=gif)
        self._event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self):
        if self._file is None:
            return
        self._file.close()
        self._board.close()


class Trace:
    """A profiler's trace of some steps of a run, for TensorBoard or xprof, in `profile/` of the run folder.

    Args:
        steps: (start, stop), counted from `first`, the step that the run goes on from; None for no trace.
    """

    def __init__(self, workdir: str, steps: tuple[int, int] | None, first: int = 0):
        self._folder, self._running = os.path.join(workdir, "profile"), False
        self._steps = None if steps is None else (first + steps[0], first + steps[1])

    def __enter__(self):
        return self

    def at(self, step: int, state):
        """Says that a step is about to begin, from `state`: starts or ends the trace once that is computed."""
        if self._steps and (step == self._steps[0] or (self._running and step == self._steps[1])):
            jax.block_until_ready(state)
            self._stop() if self._running else self._start()

    def __exit__(self, *exception):
        if self._running:
            self._stop()

    def _start(self):
        jax.profiler.start_trace(self._folder)
        self._running = True

    def _stop(self):
        jax.profiler.stop_trace()
        self._running, self._steps = False, None
        print(f"profile: {self._folder}, look at it with `tensorboard --logdir {self._folder}`")


class Progress:
    """What, how far and how long: a bar on a terminal, a line every so often elsewhere.

    Use as a context manager; `advance` reports.
    """

    def __init__(self, title: str, total: int, start: int = 0, unit: str = "steps", every_seconds: float = 10.0):
        self.title, self.total, self.done, self.unit = title, total, start, unit
        self.start, self.began, self.every = start, time.monotonic(), every_seconds
        self.last, self.bar = self.began, None
        if sys.stdout.isatty():
            columns = (
                rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(), rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(), rich.progress.TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self.bar = rich.progress.Progress(*columns)
            self.task = self.bar.add_task(title, total=total, completed=start, note="")

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()

    @contextlib.contextmanager
    def pause(self, what: str):
        """Says what is done besides the steps, such as compiling; its time is none of theirs when time left is told."""
        if self.bar:
            self.bar.update(self.task, note=what)
        else:
            print(f"{self.title}: {what}", flush=True)
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def advance(self, done: int, note: str = ""):
        """Reports that `done` of `total` are finished."""
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self.last >= self.every or done >= self.total:
            self.last = now
            elapsed = now - self.began
            left = elapsed / max(done - self.start, 1) * (self.total - done)
            times = f"{elapsed:.0f} s, {left:.0f} s left"
            print(f"{self.title}: {done}/{self.total} {self.unit}, {times}{', ' + note if note else ''}", flush=True)


def reporter(title: str, unit: str = "samples"):
    """A function (done, total) that shows a Progress from its first call until all is done."""
    bars = []

    def report(done: int, total: int):
        if not bars:
            bars.append(Progress(title, total, max(done - 1, 0), unit).__enter__())  # what was done before took no time
            atexit.register(bars[0].__exit__)  # an interrupt must not leave the terminal without its cursor
        bars[0].advance(done)
        if done >= total:
            atexit.unregister(bars[0].__exit__)
            bars.pop().__exit__()

    return report
