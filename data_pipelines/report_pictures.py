"""Thumbnails of a data report: a few frames of each sample side by side, decoded in processes that may die.

A picture is a JPEG of K frames [h, K * w], each scaled into a box of 232 x 174 pixels.
"""

import dataclasses
import io
import itertools
import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipelines.decode import DecodeError, decode, frames, to_pixels
from data_pipelines.listing import Inside
from data_pipelines.workers import Failure, default_processes, run_bounded

BOX = (174, 232)  # height, width
FRAMES = 6
KEPT, REJECTED = 48, 24
TIME_LIMIT = 30.0  # seconds a file
MEMORY_LIMIT = 2 << 30  # bytes a worker


@dataclasses.dataclass(frozen=True)
class Clip:
    """What to show of a file: `frames` frames over `seconds` from `start`, in the aspect of height x width.

    folder and key: where the file is; a key that leads out of the folder is not followed. height 0: nobody knows the
    size. broken: the file is known to be bad; its first frame is shown where the others cannot be decoded.
    """

    folder: str
    key: str
    frames: int
    height: int
    width: int
    start: float = 0.0
    seconds: float = 0.0
    broken: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """JPEG bytes of `frames` frames side by side, each height x width pixels."""

    jpeg: bytes
    frames: int
    height: int
    width: int


def box_size(height, width):
    """The largest (height, width) of that aspect inside the box, at least 2 x 2."""
    scale = min(BOX[0] / height, BOX[1] / width)
    return max(2, round(height * scale)), max(2, round(width * scale))


def draw_clip(clip: Clip) -> Picture:
    """The picture of a clip. Raises DecodeError where it cannot be decoded."""
    outside = Inside(clip.folder).reason(clip.key)
    if outside:
        raise DecodeError(outside)
    path = os.path.join(clip.folder, clip.key)
    if not clip.height:
        return _first_frame(path)
    count = clip.frames if clip.seconds > 0 else 1
    fps = (count - 1) / clip.seconds if count > 1 else 1.0
    try:
        size = box_size(clip.height, clip.width)
        return join_frames(decode(path, count, *size, fps, clip.start, time_limit=TIME_LIMIT))
    except DecodeError:
        if not clip.broken:
            raise
    return _first_frame(path)


def _first_frame(path):
    from av.video.reformatter import VideoReformatter

    for _, frame, turn, _ in frames(path, time_limit=TIME_LIMIT):
        size = (frame.width, frame.height) if turn % 180 else (frame.height, frame.width)
        return join_frames(to_pixels(VideoReformatter(), frame, turn, *box_size(*size))[None])
    raise DecodeError("no frame can be decoded")


def join_frames(video) -> Picture:
    """Frames uint8 [K, h, w, 3] as one picture."""
    frames, height, width = video.shape[:3]
    out = io.BytesIO()
    sheet = np.moveaxis(video, 0, 1).reshape(height, frames * width, 3)  # [h, K * w, 3]
    Image.fromarray(sheet).save(out, "JPEG", quality=78)
    return Picture(out.getvalue(), frames, height, width)


class DrawSample:
    """Pictures of the samples of a source: number -> Picture. Picklable as the source is."""

    def __init__(self, source):
        self.source = source

    def __call__(self, number) -> Picture:
        video = self.source[number]["video"]
        height, width = box_size(*video.shape[1:3])
        picks = np.unique(np.linspace(0, len(video) - 1, FRAMES).astype(int))
        small = [np.asarray(Image.fromarray(video[i]).resize((width, height), Image.Resampling.BOX)) for i in picks]
        return join_frames(np.stack(small))


def draw_all(function: Callable, items, *, processes=None):
    """(item, Picture or Failure) of each item of a list, in order, each in a bounded worker."""
    processes = min(default_processes() if processes is None else processes, len(items))
    return run_bounded(function, items, processes=processes, time_limit=2 * TIME_LIMIT, memory_limit=MEMORY_LIMIT)


def card(key, caption, facts, outcome, **numbers):
    """What the page shows of a sample; outcome: a Picture, a Failure, or None."""
    if isinstance(outcome, Picture):
        shown = dict(picture=outcome.jpeg, frames=outcome.frames, height=outcome.height, width=outcome.width)
    else:
        reason = outcome.reason if isinstance(outcome, Failure) else "no picture"
        shown = dict(picture=None, failure=reason.removeprefix("error: DecodeError: "))
    return dict(key=key, caption=caption, facts=facts, **shown, **numbers)


def pick_kept(count):
    """Positions of the kept samples to show: drawn at random, always the same, in order."""
    rng = np.random.Generator(np.random.Philox(key=0))
    return np.sort(rng.choice(count, min(KEPT, count), replace=False)) if count else np.zeros(0, np.int64)


def pick_rejected(rejected, like):
    """(row, reason) of the rejected samples to show: of each kind of reason in turn, the most frequent first.

    rejected: list of (row, stage, reason). like: function reason -> its kind.
    """
    kinds = {}
    for row, stage, reason in rejected:
        kinds.setdefault((stage, like(reason)), []).append((row, reason))
    queues = sorted(kinds.values(), key=len, reverse=True)
    turns = itertools.zip_longest(*(queue[:REJECTED] for queue in queues))
    return [one for turn in turns for one in turn if one is not None][:REJECTED]
