"""What a video or image file holds and whether it can be trained on: one bounded pass that decodes every frame.

Frames are decoded, not converted to pixels, so that a file that passes holds no surprise for training. Whatever is
wrong with a file is its `reason`, a short text whose part before ": " is the kind that is counted (see `reason_kind`).
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipelines import decode
from data_pipelines.decode import MAX_PIXELS, TIME_LIMIT, Clock, DecodeError, VideoInfo
from sorax.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds on the work on one file.

    max_seconds, max_frames: how far into a video is decoded (None: to its end); what lies beyond is neither checked nor
    used. max_pixels: of one stored frame. time_limit: seconds of work. memory: bytes that a worker may take for it.
    """

    max_seconds: float | None = 60.0
    max_frames: int | None = None
    max_pixels: int = MAX_PIXELS
    time_limit: float = TIME_LIMIT
    memory: int = 2 << 30


def reason_kind(reason: str) -> str:
    """The part of a reason by which it is counted."""
    return reason.partition(": ")[0]


def inspect(file, limits: Limits = Limits()) -> VideoInfo:
    """Decodes a file as far as the limits let it and says what it holds.

    Arguments:
      file: a path, or a binary file object.
    Never raises for a bad file: whether it is missing, empty, no video, over the limits, corrupt or shorter than its
    header says is told by `reason`.
    """
    work = _Pass(limits)
    try:
        with decode.reasons():
            decode.check_file(file)
            clock = Clock(limits.time_limit)
            if decode.is_image(file):
                frame, form = decode.image_frame(file, limits.max_pixels)
                return VideoInfo(1, frame.height, frame.width, 1.0, codec=form, container=form, is_image=True)
            with decode.open_video(file, limits.max_pixels) as (container, stream):
                work.run(container, stream, clock)
    except DecodeError as e:
        image = not hasattr(file, "read") and decode.is_image(file)
        return replace(work.info(), is_image=image, reason=e.reason)
    return work.info()


class _Pass:
    """One pass over a stream: what was found so far, to be told even if an error ends it."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.num_frames, self.span, self.gap = 0, 0.0, 0.0
        self.size, self.rate, self.claimed, self.names = (0, 0, 0), 0.0, 0.0, ("", "")

    def run(self, container, stream, clock: Clock):
        # Kept here, for nothing of a container may be touched once it is closed.
        self.rate, self.claimed = decode.header_rate(stream), decode.claimed_duration(container, stream)
        self.names = stream.codec_context.name, container.format.name
        timeline, num_packets, end, broken = decode.Timeline(self.rate), 0, 0.0, None
        for packet in container.demux():  # all streams: sound that goes on shows the file is whole
            clock.check()
            stamp = packet.dts if packet.pts is None else packet.pts
            if packet.size and stamp is not None:
                end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream:
                continue
            num_packets += packet.size > 0
            try:
                decoded = packet.decode() if broken is None else ()
            except av.error.InvalidDataError as error:
                broken, decoded = error, ()  # the packets that follow tell whether the file was cut or spoilt
            for frame in decoded:
                clock.check()
                if not self.count(frame, timeline.at(frame), stream):
                    return
        if not self.num_frames:
            raise broken or DecodeError("no frame can be decoded")
        self.claimed = self.claimed if broken else 0.0  # no claim counts where it was measured
        decode.check_whole(container, stream, num_packets, end, self.gap)
        if broken is not None:
            raise DecodeError(f"corrupt: invalid data after {self.num_frames} frames") from broken

    def count(self, frame, now: float, stream) -> bool:
        """Counts a frame at `now` seconds; False if it lies beyond the limits."""
        limits = self.limits
        if now > (limits.max_seconds or math.inf) or self.num_frames == (limits.max_frames or math.inf):
            return False
        if self.num_frames == 0:
            self.size = decode.upright_size(frame, stream)
            VideoReformatter().reformat(frame, 16, 16, "rgb24")  # a pixel format that cannot be converted shows here
        self.num_frames += 1
        self.span, self.gap = now, max(self.gap, now - self.span)
        return True

    def info(self) -> VideoInfo:
        height, width, turn = self.size
        if not self.num_frames:
            return VideoInfo(duration=self.claimed, codec=self.names[0], container=self.names[1])
        fps = decode.true_rate(self.rate, self.num_frames, self.span)
        duration = max(self.span + 1 / fps, self.claimed)
        return VideoInfo(self.num_frames, height, width, fps, self.span, turn, duration, *self.names)


def file_hash(path: str | os.PathLike, clock: Clock) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError, or DecodeError when the clock runs out."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
            clock.check()
    return digest.hexdigest()


class MeasureFile:
    """What an index records of a file of a folder: file name -> (VideoInfo, SHA-256). Picklable, light to import."""

    def __init__(self, folder: str | os.PathLike, limits: Limits):
        self.folder, self.limits = os.fspath(folder), limits

    def __call__(self, key: str) -> tuple[VideoInfo, str]:
        path = os.path.join(self.folder, key)
        info = inspect(path, self.limits)
        try:
            with decode.reasons():
                return info, file_hash(path, Clock(self.limits.time_limit))
        except DecodeError as e:
            return replace(info, reason=info.reason or e.reason), ""


class MeasureSample:
    """What an index records of a sample of any source: its number -> (VideoInfo, SHA-256 of shape and pixels)."""

    def __init__(self, source):
        self.source = source

    def __call__(self, index: int) -> tuple[VideoInfo, str]:
        spec = self.source.spec(index)
        still = spec.num_frames == 1
        info = VideoInfo(spec.num_frames, spec.height, spec.width, spec.fps, (spec.num_frames - 1) / spec.fps,
                         duration=0.0 if still else spec.num_frames / spec.fps, is_image=still,
                         container=type(self.source).__name__)  # fmt: skip
        try:
            video = self.source[index]["video"]
        except UserError as e:  # what a source says of a sample that it cannot give
            return replace(info, reason=f"cannot be read: {' '.join(str(e).split())}"), ""
        if video.shape != (spec.num_frames, spec.height, spec.width, 3) or video.dtype != np.uint8:
            return replace(info, reason=f"not what was promised: {video.dtype} {list(video.shape)}"), ""
        return info, hashlib.sha256(repr(video.shape).encode() + np.ascontiguousarray(video).tobytes()).hexdigest()
