"""Behind the page of `sorax app`: its form becomes a command of `sorax sample`, which runs here, one at a time.

So what the page makes, the command makes again, to the bit. The page itself is `sorax.app_page`.
"""

import argparse
import dataclasses
import functools
import hashlib
import logging
import math
import os
import queue
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from sorax import cli_sample, sample_files
from sorax.errors import UserError
from sorax.runs import Run

MODES = dict(
    text="Text to video", picture="Text to image", image="Image to video", keyframes="Keyframes",
    extend="Extend a clip", loop="Loop from text", loop_clip="Loop a clip", connect="Connect two clips",
    edit="Edit a clip", inpaint="Inpaint a clip", shots="Shots",
)  # fmt: skip
CANCELLING = "cancelling: it ends with the step that is being made, or when its programs are compiled"
INPUTS = "inputs"  # folder of the files that were given, in that of the results
_MADE = re.compile(r"(\d{5})\.(?:mp4|png)")
_OURS = re.compile(r"\d{5}\.(mp4|png)|\.\d{5}\.\d+\.part\.(mp4|png)")  # and what a killed process has left


@dataclasses.dataclass(frozen=True)
class Form:
    """What the page asks for; the flags of `sorax sample`, of which a mode uses some. "" and None: its default.

    Numbers that may be left out are words as well: what is wrong with one is said where the command is parsed.
    shots: a line a shot, TIME: PROMPT. keyframes: (time, file) each. video, second: clips; files are paths.
    """

    mode: str = "text"
    prompt: str = ""
    shots: str = ""
    cut: bool = False
    image: str | None = None
    video: str | None = None
    second: str | None = None
    mask: str | None = None
    keyframes: tuple[tuple[str, str], ...] = ()
    extend: str = "forward"
    strength: float | None = None
    seconds: float | str | None = None
    size: str = ""
    fps: float | str | None = None
    seed: int = 0
    negative_prompt: str = ""
    steps: int | None = None
    solver: str = ""
    guidance: float | None = None
    guidance_interval: str = ""
    guidance_rescale: float | str | None = None
    shift: float | None = None
    reuse: float | str | None = None
    window: int | str | None = None
    overlap: int | str | None = None


def words_of(form: Form, keep: Callable[[str], str] = lambda path: path) -> list[str]:
    """The flags of `sorax sample` that a form says, without those of the run and the file.

    keep: path of a file that was given -> the path that the command names.

    Raises:
        UserError: a mode is none, or lacks what it works on.
    """

    def file(name, what):
        if not getattr(form, name):
            raise UserError(f"{MODES[form.mode]} needs {what}: choose a file")
        return keep(getattr(form, name))

    words, takes_prompt, takes_seconds = [], True, True
    match form.mode:
        case "text":
            pass
        case "picture":
            words, takes_seconds = ["--frames", "1"], False
        case "image":
            words = ["--image", file("image", "an image")]
        case "keyframes":
            if not form.keyframes:
                raise UserError(f"{MODES[form.mode]} needs an image at least: choose a file, and a time for it")
            words = [word for at, path in form.keyframes for word in ("--keyframe", f"{at.strip()}:{keep(path)}")]
        case "extend":
            words = ["--video", file("video", "a clip"), "--extend", form.extend]
        case "loop":
            words = ["--loop"]
        case "loop_clip":
            words = ["--video", file("video", "a clip"), "--loop"]
        case "connect":
            words = ["--connect", file("video", "two clips"), file("second", "two clips")]
        case "edit":
            words = ["--video", file("video", "a clip"), *_flag("strength", form.strength)]
        case "inpaint":
            words = ["--video", file("video", "a clip"), "--mask", file("mask", "a mask")]
        case "shots":
            shots = [re.sub(r"^([^:]*):\s*", r"\1:", line.strip()) for line in form.shots.splitlines() if line.strip()]
            words = [word for shot in shots for word in _flag("shot", shot)] + ["--cut"] * form.cut
            takes_prompt = False
        case _:
            raise UserError(f"{form.mode!r} is not a mode: choose one of {', '.join(MODES)}")
    if takes_prompt and form.prompt.strip():
        words = [*_flag("prompt", form.prompt.strip()), *words]
    names = ["size", "fps", "seed", "negative_prompt", "steps", "solver", "guidance", "guidance_interval",
             "guidance_rescale", "shift", "reuse", "window", "overlap"]  # fmt: skip
    for name in ["seconds"] * takes_seconds + names:
        words += _flag(name, getattr(form, name))
    return words


def _flag(name, value):
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        value = str(int(value)) if math.isfinite(value) and value == int(value) else repr(float(value))
    name = "--" + name.replace("_", "-")
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


@functools.cache
def _parser():
    parser = _Parser(prog="sorax sample", add_help=False, allow_abbrev=False)
    cli_sample.add_flags(parser)
    return parser


def parse(words: list[str]):
    """Flags of `sorax sample` as its command line has them. Raises UserError where that would show its usage."""
    arguments = _parser().parse_args(words)
    arguments.argv = ["sample", *words]
    return arguments


@dataclasses.dataclass(frozen=True)
class Result:
    """A file that was made. facts: what it says of itself. notes: what was rounded, cut or is untrained, in words."""

    path: str
    facts: dict
    notes: tuple[str, ...]
    seconds: float

    @property
    def is_picture(self) -> bool:
        return self.path.endswith(".png")


@dataclasses.dataclass(frozen=True)
class Report:
    """How far it is: in words, as a share of 1, and after how many seconds; at the end what came of it."""

    text: str
    share: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    result: Result | None = None
    error: str = ""

    @property
    def is_last(self) -> bool:
        return bool(self.result or self.error)


class _StoppedError(Exception):
    """The user has cancelled it."""


class App:
    """A run with its networks in memory, the folder of what is made with it, and the results so far.

    Args:
        run_words: the flags of `sorax sample` that load this run, such as ["--run", W].
        out: folder of the results, made if need be; all in it may be shown to who opens the page.
        expander: run that makes prompts detailed, or the text-to-video run in whose `expander/` it is.
        max_seconds: longest file that is made, at the frame rate of the run: at another, as many frames.
        max_side: longest side of a frame, in pixels. What the run makes by itself is always allowed.

    Raises:
        UserError: there is no such run, or the folder holds files of other kinds.
    """

    def __init__(self, run: Run, run_words: list[str], out: str, expander: str = "", mesh=None, *,
                 max_seconds: float = 60.0, max_side: int = 1280):  # fmt: skip
        self.run, self.run_words, self.out, self.expander = run, list(run_words), out, expander
        self.results: list[Result] = []
        _check_folder(out)
        frames, height, width, fps = run.usual_shape()
        self.max_frames, self.max_side = max(frames, max_seconds * fps), max(height, width, max_side)
        self.generator = run.generator(mesh)
        self._busy, self._stop, self._closed = threading.Lock(), None, False
        logging.getLogger("jax._src.debugging").addFilter(_is_no_stop)

    def make(self, form: Form, stop: threading.Event) -> Iterator[Report]:
        """Makes the file of a form in another thread, and says how far it is; the last report has the result.

        stop: set it to cancel; so does who closes this iterator. Nothing is left of what was cancelled or failed.
        """
        reports, began = queue.SimpleQueue(), time.monotonic()

        def work():
            try:
                with self._busy:
                    self._stop = stop
                    last = self._make(form, stop, reports.put, began)
            except _StoppedError:
                last = Report("", error="cancelled: nothing was written")
            except UserError as error:
                last = Report("", error=" ".join(str(error).split()))
            except Exception as error:  # shown in the page; the server goes on
                traceback.print_exc()
                last = Report("", error=f"it failed, and the terminal says where: {type(error).__name__}: {error}")
            reports.put(last)

        thread = threading.Thread(target=work, daemon=True)
        report = Report("waiting for its turn" if self._busy.locked() else "getting ready")
        thread.start()
        try:
            while True:
                if stop.is_set() and not report.is_last:
                    report = dataclasses.replace(report, text=CANCELLING)
                yield dataclasses.replace(report, seconds=time.monotonic() - began)
                if report.is_last:
                    return
                try:
                    report = reports.get(timeout=1.0)
                    while not report.is_last:  # steps may be faster than the page
                        report = reports.get_nowait()
                except queue.Empty:
                    pass
        finally:
            stop.set()

    def close(self):
        """Cancels what is being made, and waits until its half-written file is gone."""
        self._closed = True
        if self._stop is not None:
            self._stop.set()
        if self._busy.acquire(timeout=20):
            self._busy.release()

    def expanded(self, prompt: str, seed: int):
        """A prompt made detailed, as `sorax sample --expand` does: `expand.Expansion`."""
        from sorax.expand import expand

        if not prompt.strip():
            raise UserError("there is no prompt to make detailed: write one")
        with self._busy:
            return expand([prompt.strip()], self._expander, seed)[0]

    @property
    def expands(self) -> bool:
        """Whether there is a model that makes prompts detailed."""
        from sorax.expand import EXPANDER

        return bool(self.expander) or os.path.isdir(os.path.join(self.run.workdir, EXPANDER))

    @functools.cached_property
    def _expander(self):
        from sorax.cli_caption import open_expander

        return open_expander(self.expander or self.run.workdir)

    def _make(self, form, stop, report, began):
        def check():
            if stop.is_set() or self._closed:
                raise _StoppedError

        check()
        name = self._free_name("png" if form.mode == "picture" else "mp4")
        words = [*self.run_words, *self._words(form), "--out", os.path.join(self.out, name)]
        arguments = parse(words)
        ask = sample_files.check(arguments)
        self._check_asked(ask)
        order = sample_files.prepare(arguments, ask, self.run)
        self._check_made(order)
        notes = list(order.notes)
        (job,) = order.scenes[0]
        progress = _Progress(order, self.run.networks.vae_config.temporal_stride)

        def say():
            check()
            report(Report(progress.text, progress.share, notes=tuple(notes)))

        def on_request(request):
            progress.begin(request)
            say()

        def on_step(step):
            progress.step = step
            say()

        def on_frames(count):
            progress.frames += count
            say()

        say()
        sample_files.make_files(self.generator, order, warn=notes.append, on_frames=on_frames, on_request=on_request,
                                on_step=on_step)  # fmt: skip
        facts = order.facts | dict(seed=job.seed, prompt=[scene[0].prompt for scene in order.scenes])
        result = Result(order.outs[0], facts, tuple(notes), time.monotonic() - began)
        self.results.append(result)
        return Report("done", 1.0, notes=result.notes, result=result)

    def _check_asked(self, ask):
        """Before any file is read at the size that is asked for."""
        *_, usual_fps = self.run.usual_shape()
        self._check(frames=(ask.seconds or 0.0) * (ask.fps or usual_fps), sides=map(int, re.findall(r"\d+", ask.size)))

    def _check_made(self, order):
        """What a file that was given adds, or decides; sizes are rounded up to the grid, which is allowed."""
        (frames, *sides), networks = order.shape, self.run.networks
        grid = networks.vae_config.spatial_stride * max(networks.dit_config.patch_size[1:])
        stride = networks.vae_config.temporal_stride
        self._check(frames=frames - stride, sides=[side - grid for side in sides])

    def _check(self, frames, sides):
        if frames > self.max_frames:
            raise UserError(f"{frames:.0f} frames are more than this page makes, {self.max_frames:.0f}: ask for fewer "
                            "seconds, or start the page with more --max-seconds")  # fmt: skip
        if (side := max(sides, default=0)) > self.max_side:
            raise UserError(f"{side} pixels a side are more than this page makes, {self.max_side}: ask for less, or "
                            "start the page with a larger --max-side")  # fmt: skip

    def _words(self, form):
        """Flags of a form; those that say what the run does anyway are left out."""
        usual = self.run.sampling()
        same = dict(steps=usual["num_steps"], solver=usual["solver"], guidance=usual["guidance_scale"],
                    shift=usual["shift"])  # fmt: skip
        left = {name: None if name != "solver" else "" for name, value in same.items() if getattr(form, name) == value}
        return words_of(dataclasses.replace(form, **left), self._keep)

    def _keep(self, path):
        """Copies a file that was given beside the results, named by what is in it: the command works later too."""
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
        suffix = os.path.splitext(path)[1].lower()
        kept = os.path.join(self.out, INPUTS, digest + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""))
        if not os.path.exists(kept):
            os.makedirs(os.path.dirname(kept), exist_ok=True)
            part = f"{kept}.{os.getpid()}.part"
            shutil.copyfile(path, part)
            os.replace(part, kept)
        return kept

    def _free_name(self, suffix):
        there = [int(match[1]) for match in map(_MADE.fullmatch, os.listdir(self.out)) if match]
        return f"{max(there, default=0) + 1:05}.{suffix}"


class _Progress:
    """How far an order of one file is, counted in latent frames that the steps of a solver make."""

    def __init__(self, order, stride):
        self.order, self.stride = order, stride
        self.frames = self.step = self.windows = self.now = self.done = 0
        canvases = [scene[0].canvas for scene in order.scenes]
        self.reads = any(canvas.pieces for canvas in canvases)
        self.total = sum((~c.known_groups(stride)).sum() + c.back // stride for c in canvases)

    def begin(self, request):
        """A window begins: what it makes is what is not given."""
        self.done, self.step, self.windows = self.done + self.now, 0, self.windows + 1
        self.now = (request.num_frames - 1) // self.stride + 1
        if request.given:
            self.now -= int(request.given[0].all(axis=(1, 2)).sum())

    @property
    def share(self) -> float:
        steps = self.order.sampling["num_steps"]
        return float(min(1.0, (self.done + self.now * max(0, self.step - 1) / steps) / max(1, self.total)))

    @property
    def text(self) -> str:
        frames, steps = self.order.shape[0], self.order.sampling["num_steps"]
        if not self.windows:
            return "reading what is given" if self.reads else "getting ready"
        if not self.step:
            return "getting ready: the first video of a size takes longer, for its programs are compiled"
        window = f"window {self.windows}, " if self.windows > 1 or self.now < self.total else ""
        done = f"; {self.frames} of {frames} frames are done" if self.frames else ""
        then = ", then its frames are decoded" if self.step == steps and not done else ""
        return f"{window}step {self.step} of {steps}{then}{done}"


def _is_no_stop(record):
    """Drops the trace that jax logs where a step of what was cancelled ends: it is no failure."""
    return not (record.exc_info and isinstance(record.exc_info[1], _StoppedError))


def _check_folder(out):
    try:
        os.makedirs(out, exist_ok=True)
        others = [name for name in os.listdir(out) if name != INPUTS and not _OURS.fullmatch(name)]
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a folder that can be written") from error
    if others:
        raise UserError(f"--out {out} holds {min(others)}, which the page could show to others: name a new folder")
