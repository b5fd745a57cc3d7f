"""Videos of any length from canvases: one window after the other, each with what is there given to it.

A timeline is counted in latent frames: 0 is the first frame, g > 0 the frames stride * (g - 1) + 1 .. stride * g. A
window [start, stop) is a clip by itself, as those of training are: its first frame is the last one of latent frame
`start`, and what is there already of its frames (made before, or given by the user) is encoded and given, and encoded
again when what comes before it is made. Its new latents go to one decoder for the whole video
(`sorax.stream.DecodeStream`): no seams, and memory that does not grow.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from sorax.errors import UserError
from sorax.generate import Generator, Request
from sorax.modes import Canvas, Piece, given_of
from sorax.stream import DecodeStream


@dataclasses.dataclass(frozen=True)
class Job:
    """A canvas and what is to become of it.

    prompt: what it shows; or several, ((frame at which it begins, prompt), ...), the first at 0.
    noise: of the first window, as `Request.noise`.
    """

    canvas: Canvas
    prompt: str | tuple[tuple[int, str], ...] = ""
    seed: int = 0
    negative_prompt: str = ""
    noise: np.ndarray | None = None

    def __post_init__(self):
        if not self.prompts or self.prompts[0][0] != 0:
            raise UserError("the first of several prompts begins at frame 0: give one for the beginning")

    @property
    def prompts(self) -> tuple[tuple[int, str], ...]:
        return ((0, self.prompt),) if isinstance(self.prompt, str) else tuple(sorted(self.prompt))


@dataclasses.dataclass(frozen=True)
class Window:
    """Latent frames [start, stop) that are looked at together, and those, [first, last), that are new and stay."""

    start: int
    stop: int
    first: int
    last: int


def plan(known: Sequence[bool], size: int, overlap: int, breaks: Sequence[int] = (), begin: int = 0):
    """Windows for a timeline, in the order in which they are made: those backwards, and those forwards.

    Args:
        known: whether each latent frame is known as a whole. size: most latent frames of a window, at least 3.
        overlap: latent frames that are there already which a window sees at least, of both sides as they fit.
        breaks: latent frames at which a window's new frames end. begin: those before it are made.

    Returns:
        (backward, forward), lists of `Window`. What lies before the first known latent frame is made backwards from
        there, where not all fits in one window.
    """
    known, end = list(map(bool, known)), len(known)
    if end <= size and not any(0 < b < end for b in breaks) and not begin:
        return [], [Window(0, end, 0, end)]
    if size < 3:
        raise UserError(f"windows of {size} latent frames are too short to go on from: make them 3 at least")
    backward, done = [], begin
    if not begin and True in known and not known[0]:
        done = todo = known.index(True)
        while todo:
            there = done - todo + _run(known, done)
            stop = todo + min(overlap, there, size - 2)
            start = max(0, stop - size)
            if not start:
                stop = min(size, todo + there)
            first = start + 1 if start else 0
            first = max([first, *(b for b in breaks if b < todo)])
            start = max(0, first - 1)  # what is before a break is another window's to make
            backward.append(Window(start, stop, first, todo))
            todo = first
    forward, (closing, behind) = [], _sides(size, overlap)
    while done < end:
        unknown = done + _run(known, done)
        # [unknown, last) is made next, to be closed with some of what is known behind it, up to `seen`.
        last = unknown + _run([not k for k in known], unknown)
        seen = last + min(behind, _run(known, last))
        start = max(0, done - overlap)
        target = min(unknown, max(done, seen - size + closing)) if unknown < end else end
        if target > done:  # nothing to make yet
            stop = min(target, start + size)
            forward.append(Window(start, stop, done, stop))
            done = stop
            continue
        if done >= seen - size + closing:
            start = max(0, seen - size)
            stop, reached = min(end, start + size), seen
            while reached < stop:  # more that is closed in this window
                more = reached + _run(known, reached)
                more += _run([not k for k in known], more)
                more += min(behind, _run(known, more))
                if more > stop or more == reached:
                    break
                reached = more
        else:
            stop = min(end, start + size)
            reached = stop if stop <= last else seen - size + closing
        reached = min([reached, *(b for b in breaks if b > done)])
        forward.append(Window(start, stop, done, reached))
        done = reached
    return backward, forward


def _sides(size: int, overlap: int) -> tuple[int, int]:
    """Latent frames that a window sees before and behind what it makes, where it has to reach what is known behind."""
    behind = min(overlap, (size - 1) // 2)
    return min(overlap, size - 1 - behind), behind


def latent_sizes(size: int, overlap: int, stride: int) -> tuple[int, int]:
    """Size and overlap of windows in latent frames, of both in frames as `make` takes them.

    Raises:
        UserError: they are negative, or leave nothing to make.
    """
    if size < 0 or overlap < 0 or (size and overlap >= size):
        raise UserError(f"windows of {size} frames with an overlap of {overlap}: give positive numbers, the overlap "
                        "smaller than the window")  # fmt: skip
    latent = (size - 1) // stride + 1 if size else 0
    return latent, -(-overlap // stride) if overlap else max(2, latent // 4)


def longest_gap(size: int, overlap: int, stride: int) -> int:
    """Most frames between known ones that one window of `make` can make; 0 where every job is one window."""
    latent, shared = latent_sizes(size, overlap, stride)
    return stride * max(1, latent - sum(_sides(latent, shared))) if latent else 0


def _run(flags, place: int) -> int:
    """How many are true from a place on."""
    count = 0
    while place + count < len(flags) and flags[place + count]:
        count += 1
    return count


def make(generator: Generator, jobs: Sequence[Job], *, size: int = 0, overlap: int = 0, on_frames=None,
         on_latents: Callable = lambda number, latents: None, on_request: Callable = lambda number, request: None,
         **settings):  # fmt: skip
    """Videos of jobs of any modes, shapes and lengths: windows of several jobs are packed in the same batches.

    Args:
        size: most frames of a window; 0: every job is one window.
        overlap: frames that a window shares with what is there, at least; 0: two latent frames, or a quarter of it.
        on_frames: called with (job's number, uint8 [n, H, W, 3]) as frames are final, in order; None: returned.
        on_latents: called likewise with the latents [t, h, w, C] that frames are made of.
        on_request: called with (job's number, Request) before each window is made.
        settings: as `Generator.latents` takes them.

    Returns:
        list of uint8 [T, H, W, 3]; None with on_frames.

    Raises:
        UserError: what a canvas, a request or a setting cannot be.
    """
    stride, kept = generator.codec.config.temporal_stride, [[] for _ in jobs]
    latent, shared = latent_sizes(size, overlap, stride)
    emit = on_frames or (lambda number, frames: kept[number].append(frames))
    makers = [_Maker(generator, job, latent or _latent_frames(job.canvas, stride), shared) for job in jobs]
    steps = [maker.steps() for maker in makers]
    waiting = {number: next(step) for number, step in enumerate(steps)}

    def answer(answers):
        for number, found in answers.items():
            try:
                waiting[number] = steps[number].send(found)
            except StopIteration:
                del waiting[number]

    while waiting:
        while final := {number: wish for number, wish in waiting.items() if isinstance(wish, _Final)}:
            for number, wish in final.items():
                on_latents(number, wish.latents)
                emit(number, wish.frames)
            answer(dict.fromkeys(final))
        decode = {number: wish.latents for number, wish in waiting.items() if isinstance(wish, _Decode)}
        if decode:
            answer(dict(zip(decode, generator.codec.decode(list(decode.values())))))
        elif waiting:  # all of them for their next window
            requests = dict(waiting)
            for number, request in requests.items():
                on_request(number, request)
            answer(dict(zip(requests, generator.latents(list(requests.values()), **settings))))
    return None if on_frames else [np.concatenate(frames) for frames in kept]


def _latent_frames(canvas: Canvas, stride: int) -> int:
    """Of a canvas as one window; a loop sees two of its beginning behind its end."""
    return (canvas.shape[0] - 1) // stride + 1 + (2 if canvas.back else 0)


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Asks for the frames of latents."""

    latents: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Final:
    """Frames that are final, and their latents."""

    frames: np.ndarray
    latents: np.ndarray


class _Maker:
    """How a job becomes frames. `steps` asks for what it needs: a `Request` is answered with its latents, `_Decode`
    with frames, `_Final` with nothing."""

    def __init__(self, generator: Generator, job: Job, size: int, overlap: int):
        codec = generator.codec
        self.generator, self.job, self.canvas, self.size = generator, job, job.canvas, size
        self.overlap = min(overlap, size - 1)
        self.stride = codec.config.temporal_stride
        self.decoder = DecodeStream(codec.config, codec.params, chunk=self.stride, mesh=codec.mesh, first=1)
        self.made, self.begin = [], 0  # the last frames that are there, and which one is the first of them
        self.windows = 0

    def steps(self) -> Iterator:
        canvas, stride = self.canvas, self.stride
        breaks = [-(-frame // stride) for frame, _ in self.job.prompts]
        backward, forward = plan(canvas.known_groups(stride), self.size, self.overlap, breaks)
        if not backward and len(forward) == 1 and not canvas.back:  # one window, decoded with those of other jobs
            latents = yield from self._latents(forward[0])
            yield _Final((yield _Decode(latents)), latents)
            return
        yield from self._backward(backward)
        beginning = []
        for window in forward:
            frames = yield from self._forward(window)
            if canvas.back and not len(beginning):
                beginning = frames
        if not canvas.back:
            return
        # On to the beginning again: it is known now, and is put behind the frames that lead to it.
        done, new = (canvas.num_frames - 1) // stride + 1, canvas.back // stride
        seen = max(1, min(self.overlap, len(beginning) // stride, self.size - 2))
        count, at = seen * stride, canvas.num_frames + canvas.back
        still = np.concatenate([beginning, beginning[-1:].repeat(count, axis=0)])[:count]
        self.canvas = dataclasses.replace(canvas, num_frames=at + count, pieces=(Piece(at, still, 0, count),), back=0)
        known = [True] * done + [False] * new + [True] * seen
        for window in plan(known, self.size, self.overlap, breaks, begin=done)[1]:
            if window.first < done + new:
                yield from self._forward(dataclasses.replace(window, last=min(window.last, done + new)))

    def _backward(self, windows):
        """Windows from the last to the first; their latents are kept until all are there."""
        kept = []
        for window in windows:
            latents = yield from self._latents(window)
            frames = yield _Decode(latents)
            self.begin = self._first_frame(window.first)
            self.made = frames[self.begin - window.start * self.stride :]
            kept.append(latents[window.first - window.start : window.last - window.start])
        self.made, self.begin = [], 0
        for latents in reversed(kept):
            yield from self._push(latents)

    def _forward(self, window):
        latents = yield from self._latents(window)
        return (yield from self._push(latents[window.first - window.start : window.last - window.start]))

    def _latents(self, window: Window):
        """Latents [stop - start, h, w, C] of a window: generated, or encoded where all of it is there."""
        lo, hi = window.start * self.stride, (window.stop - 1) * self.stride + 1
        frames, there, known = self.canvas.read(lo, hi)
        first, last = max(lo, self.begin), min(hi, self.begin + len(self.made))
        if first < last:
            place = slice(first - lo, last - lo)
            known = known.copy()
            frames[place], there[place], known[place] = self.made[first - self.begin : last - self.begin], True, True
        generator, canvas = self.generator, self.canvas
        given = edit = None
        if there.any():
            mask, latents = given_of(generator.codec, generator.dit_config.patch_size, frames, there, known)
            if mask.all():
                return latents
            given = (mask, latents) if mask.any() else None
            edit = (latents, canvas.strength) if canvas.strength < 1 else None
        noise = self._noise(hi - lo)
        self.windows += 1
        request = Request(self._prompt(window.first), hi - lo, canvas.height, canvas.width, seed=self.job.seed,
                          negative_prompt=self.job.negative_prompt, noise=noise, given=given, edit=edit)  # fmt: skip
        latents = yield request
        return latents if given is None else (yield from self._settled(latents, mask, frames, known))

    def _settled(self, latents, mask, frames, known):
        """Latents in which what is given behind or beside what was made is encoded with that as its past.

        Before, it was encoded as if nothing had moved until then: the decoder, which sees another past, would blur it.
        """
        behind = mask & (np.cumsum(~mask.all(axis=(1, 2))) > 0)[:, None, None]
        if not behind.any():
            return latents
        made = yield _Decode(latents)
        whole = self.generator.codec.encode([np.where(known[..., None], frames, made)])[0]
        return np.where(behind[..., None], whole, latents)

    def _first_frame(self, group: int) -> int:
        return (group - 1) * self.stride + 1 if group else 0

    def _prompt(self, group: int) -> str:
        return [prompt for begins, prompt in self.job.prompts if begins <= group * self.stride][-1]

    def _noise(self, num_frames: int):
        """Noise of the next window: of the first one as of a request by itself."""
        if not self.windows:
            return self.job.noise
        config = self.generator.codec.config
        shape = config.latent_shape(num_frames, self.canvas.height, self.canvas.width)
        key = jax.random.fold_in(jax.random.key(self.job.seed), self.windows)
        return np.asarray(jax.random.normal(key, (*shape, config.latent_channels)))

    def _push(self, latents):
        """Decodes what is next; returns its frames, and keeps as many as a window may look back to."""
        frames = np.concatenate(self.decoder.push(latents))
        end = self.begin + len(self.made)
        self.made = np.concatenate([self.made, frames] if len(self.made) else [frames])[-self.stride * self.size :]
        self.begin = end + len(frames) - len(self.made)
        yield _Final(frames, latents)
        return frames
