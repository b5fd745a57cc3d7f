"""Clips cut out of a raw file and written: copied where nothing changes, else encoded anew.

All clips of a file are written in one decode of it, frame by frame as the scan counted them, so that no seek can
land elsewhere. Planes of Y, U and V are cropped and turned as they are; nothing passes through RGB.
Shapes: a picture is Y [H, W], U and V [H/2, W/2], uint8.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from fractions import Fraction

import av
import numpy as np

from data_pipelines.curate_checks import crop_box
from data_pipelines.decode import DecodeError, frames, probe

CLOCK = 90_000  # ticks a second of clips of variable rate
QUALITY = {"crf": "14", "preset": "veryfast", "threads": "1"}  # one thread: the same bytes on every machine
KEYFRAME_SECONDS = 2.0
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class CannotWrite(Exception):
    """The output folder cannot be written: a matter of the disk, not of a clip."""


def clip_path(file: str, number: int, whole: bool) -> str:
    """Where a clip goes in the output folder: readable, of plain letters, and another one for every raw file."""
    stem, suffix = os.path.splitext(os.path.basename(file))
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:60]
    name = f"{plain}-{hashlib.sha256(file.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"
    return f"clips/{name}{suffix.lower()}" if whole else f"clips/{name}-{number:04d}.mp4"


def write_clips(folder: str, file: str, out: str, parts: str, info: dict, clips: list[dict], time_limit: float):
    """Writes the clips of one file.

    info and clips are those of `curate_scan.scan`, each clip with its path in `out`; parts is a folder on the same
    disk for what is not whole yet. Returns {path: bytes}. A clip is H.264 of high quality (crf 14) in yuv420p, upright,
    without sound, at its frames' own times; one that is the whole file is a copy of it, byte for byte.
    Raises DecodeError if the file does not decode as it did, CannotWrite if the disk does not take it.
    """
    source = os.path.join(folder, file)
    sizes, waiting = {}, []
    try:
        for clip in sorted(clips, key=lambda c: c["first"]):
            # A runner may try the same file twice at a time.
            part = os.path.join(parts, f"{uuid.uuid4().hex}-{os.path.basename(clip['path'])}")
            target = os.path.join(out, clip["path"])
            if clip["whole"]:
                shutil.copyfile(source, part)
                sizes[clip["path"]] = _finish(part, target)
            else:
                waiting.append((clip, part, target))
        writer = None
        for index, (now, frame, turn, _) in enumerate(frames(source, time_limit=time_limit) if waiting else ()):
            clip, part, target = waiting[0]
            if index < clip["first"]:
                continue
            if writer is None:
                writer = _Writer(part, clip, info)
            writer.add(frame, turn, now - clip["start"])
            if index + 1 == clip["end"]:
                writer.close()
                writer = None
                _check(part, clip)
                sizes[clip["path"]] = _finish(part, target)
                waiting.pop(0)
                if not waiting:
                    break
        if waiting:
            raise DecodeError("changed while it was curated: fewer frames decode than before")
    except (OSError, av.FFmpegError) as error:
        if error.errno in _FATAL:
            raise CannotWrite(f"{error.strerror or error}") from error
        raise DecodeError(f"cannot be cut ({error.strerror or error})") from error
    return sizes


def _finish(part: str, target: str) -> int:
    size = os.path.getsize(part)
    os.replace(part, target)
    return size


def _check(path: str, clip: dict):
    """Raises DecodeError if a clip does not hold what it should: no frame may be lost in writing."""
    found = probe(path)
    if (found.num_frames, found.height, found.width) != (clip["end"] - clip["first"], clip["height"], clip["width"]):
        raise DecodeError(f"was not written well: {found.num_frames} frames of {found.width}x{found.height}")


class _Writer:
    """Encodes the frames of one clip."""

    def __init__(self, path: str, clip: dict, info: dict):
        self.clip, self.info = clip, info
        self.rate = Fraction(clip["fps"]).limit_denominator(1001)
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.container = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
        self.stream, self.last = None, -1

    def add(self, frame, turn: int, seconds: float):
        """Encodes a frame, shown `seconds` after the first one."""
        planes, model = self._upright(frame, turn)
        height, width = planes[0].shape
        data = np.concatenate([p.ravel() for p in planes]).reshape(height * 3 // 2, width)
        new = av.VideoFrame.from_ndarray(data, format="yuv420p")
        new.colorspace, new.color_range = model.colorspace, model.color_range
        if self.stream is None:
            self._start(height, width, model)
        if self.clip["constant"]:
            new.pts, new.time_base = self.last + 1, 1 / self.rate
        else:
            new.pts, new.time_base = max(self.last + 1, round(seconds * CLOCK)), Fraction(1, CLOCK)
        self.last = new.pts
        self.container.mux(self.stream.encode(new))

    def _start(self, height: int, width: int, model):
        stream = self.stream = self.container.add_stream("libx264", rate=self.rate, options=dict(QUALITY))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = max(1, round(KEYFRAME_SECONDS * self.rate))
        codec = stream.codec_context
        codec.time_base = 1 / self.rate if self.clip["constant"] else Fraction(1, CLOCK)
        # Decoders turn Y, U and V into colours by these; without them the clip would look another.
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(codec, name, getattr(model, name))

    def _upright(self, frame, turn: int):
        """The planes of a frame, of even sides, turned and cropped, and a frame that says what its colours mean."""
        height, width = self.info["height"], self.info["width"]  # upright, square pixels
        if turn % 180:
            height, width = width, height
        same = (frame.height, frame.width) == (height, width)
        if not same or frame.format.name not in ("yuv420p", "yuvj420p"):
            frame = self.reformatter.reformat(frame, width, height, "yuv420p", interpolation="BICUBIC")
        planes = [np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width] for p in frame.planes]
        halves = (2, 1, 1)  # of an odd side the last line has no colour of its own
        planes = [p[: height // 2 * n, : width // 2 * n] for p, n in zip(planes, halves)]
        planes = [np.rot90(p, turn // 90) for p in planes]
        y, x, h, w = crop_box(*planes[0].shape, self.clip["bars"])
        return [p[y // 2 * n : (y + h) // 2 * n, x // 2 * n : (x + w) // 2 * n]
                for p, n in zip(planes, halves)], frame  # fmt: skip

    def close(self):
        self.container.mux(self.stream.encode())
        self.container.close()
