"""Video and image files to frames, through PyAV; bounded in pixels, frames and time.

A file is a path, or a binary file object such as io.BytesIO. Times are in seconds from the first frame that
decodes, whatever the container's clock says. An output frame is the input frame on screen at its time, so variable
rates need no special case. A file is read with an allow-list of container formats: a playlist dressed up as a video
cannot make FFmpeg open other files.

Shapes: T frames, H height, W width. Files may be hostile; whatever is wrong with one is a DecodeError.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".ogv")
MAX_PIXELS = 8192 * 4320  # of one stored frame
TIME_LIMIT = 60.0  # seconds of work on one file
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,ogg,ivf"


class DecodeError(Exception):
    """A file that cannot be decoded; `reason` says why, without the file's name: its kind, then ": " and details."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds, as it is meant to be shown (rotated upright, square pixels).

    num_frames and span (seconds from the first frame to the last) count no further than the limits that were given.
    fps is the header's rate where the timestamps agree with it, else the measured one. rotation is in degrees
    counter-clockwise, already applied to height and width. duration: seconds of the whole video, measured where it
    was read to its end, else what the file claims. codec, container: FFmpeg's names. reason: "" or why the file is
    not to be used; the other fields then tell what was found before that.
    """

    num_frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    span: float = 0.0
    rotation: int = 0
    duration: float = 0.0
    codec: str = ""
    container: str = ""
    is_image: bool = False
    reason: str = ""


class Clock:
    """Raises DecodeError once the work on one file has taken too long."""

    def __init__(self, limit: float):
        self.limit, self.end = limit, time.monotonic() + limit

    def check(self):
        if time.monotonic() > self.end:
            raise DecodeError(f"too slow: decoding took longer than {self.limit:g} s")


@contextlib.contextmanager
def reasons():
    """Turns what FFmpeg, Pillow and the file system raise into a DecodeError with a short reason."""
    try:
        yield
    except DecodeError:
        raise
    except av.error.InvalidDataError as e:
        raise DecodeError("not a video, or corrupt (invalid data)") from e
    except UnidentifiedImageError as e:
        raise DecodeError("not an image, or corrupt") from e
    except MemoryError as e:
        raise DecodeError("out of memory: decoding needs more than it may take") from e
    except OSError as e:
        if e.errno == errno.ENOMEM:
            raise DecodeError("out of memory: decoding needs more than it may take") from e
        raise DecodeError(e.strerror or f"cannot be decoded: {e}") from e
    except (
        av.FFmpegError,
        EOFError,
        ValueError,
        SyntaxError,
        OverflowError,
        Image.DecompressionBombError,
    ) as e:
        why = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise DecodeError(f"cannot be decoded: {why}") from e


def check_file(file):
    """Raises DecodeError unless a file can be opened without blocking and holds anything."""
    if hasattr(file, "read"):
        file.seek(0)
        empty = not file.read(1)
        file.seek(0)
        if empty:
            raise DecodeError("empty file (zero bytes)")
        return
    path = os.fspath(file)
    if not os.path.exists(path):
        raise DecodeError("no such file")
    if not os.path.isfile(path):  # a named pipe would block for ever
        raise DecodeError("not a regular file")
    if os.path.getsize(path) == 0:
        raise DecodeError("empty file (zero bytes)")


@contextlib.contextmanager
def open_video(path, max_pixels: int):
    """Opens the container; yields it and its main picture stream, to be decoded on one thread."""
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_pixels": str(max_pixels)}
    try:
        container = av.open(path, options=options, metadata_errors="replace")  # titles may be in any encoding
    except av.FFmpegError as e:
        if e.errno == errno.EINVAL:  # what FFmpeg says of a format that is not on the list
            raise DecodeError("not a video of a format that is read here") from e
        raise
    with container:
        streams = [s for s in container.streams.video if not _is_cover_art(s)]
        if not streams:
            raise DecodeError("holds no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise DecodeError("cannot be decoded: unknown codec")
        _check_pixels(stream.width, stream.height, max_pixels)
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        # One thread a file: callers run files in parallel, and frame threads would hold frames of their own.
        stream.codec_context.thread_count = 1
        yield container, stream


def _check_pixels(width: int, height: int, most: int):
    if width * height > most:
        raise DecodeError(f"too large: {width}x{height} is over the limit of {most} pixels")


def _is_cover_art(stream) -> bool:
    return "attached_pic" in str(getattr(stream, "disposition", ""))


def header_rate(stream) -> float:
    """The header's frame rate, or 0 if it has none."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate and 0 < rate < 1e6 else 0.0


def is_image(file) -> bool:
    """Whether a file is to be read as an image: a path by its suffix, a file object by its first bytes."""
    if hasattr(file, "read"):
        head = file.read(8)
        file.seek(0)
        return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
    return os.fspath(file).lower().endswith(IMAGE_SUFFIXES)


def image_frame(path, max_pixels: int) -> tuple[av.VideoFrame, str]:
    """An image file, upright by its EXIF flag and on white where transparent, as a frame; and its format."""
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        _check_pixels(image.width, image.height, max_pixels)
        form = image.format.lower()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        elif "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return av.VideoFrame.from_image(image.convert("RGB")), form


def upright_size(frame, stream) -> tuple[int, int, int]:
    """(height, width, degrees to turn counter-clockwise) of a frame as it is meant to be shown."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    height, width = frame.height, frame.width
    if aspect and 0.1 < aspect < 10:
        width = max(1, round(width * float(aspect)))
    turn = round(frame.rotation / 90) * 90 % 360
    return (width, height, turn) if turn % 180 else (height, width, turn)


def probe(path, *, max_seconds=math.inf, max_frames=math.inf, max_pixels=MAX_PIXELS, time_limit=TIME_LIMIT):
    """Size, rotation, rate and length of a video or image file, from its packets and its first frame.

    Reads no further than max_seconds or max_frames into the file, so that a film costs no more than a clip.
    Returns a VideoInfo. Raises DecodeError if the file is missing, empty, no video, over max_pixels a frame,
    shorter than its header says, or takes longer than time_limit seconds.
    """
    clock = Clock(time_limit)
    with reasons():
        check_file(path)
        if is_image(path):
            frame, form = image_frame(path, max_pixels)
            return VideoInfo(1, frame.height, frame.width, 1.0, codec=form, container=form, is_image=True)
        with open_video(path, max_pixels) as (container, stream):
            return _probe_stream(container, stream, max_seconds, max_frames, clock)


def _probe_stream(container, stream, max_seconds, max_frames, clock) -> VideoInfo:
    first, times, num_packets, end, reached_end = None, set(), 0, 0.0, True
    low, high = math.inf, -math.inf
    for packet in container.demux():  # all streams: sound that goes on shows the file is whole
        clock.check()
        if packet.stream is stream and first is None:
            first = next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        num_packets += 1
        if stamp is not None and not packet.is_discard:
            now = float(stamp * packet.time_base)
            times.add(now)
            low, high = min(low, now), max(high, now)
        # Packets come in decoding order: 32 more than needed covers any reordering.
        if num_packets > max_frames + 32 or high - low > max_seconds + 1:
            reached_end = False
            break
    if first is None:
        raise DecodeError("no frame can be decoded")
    if reached_end:
        stamps = sorted(times)
        gap = max((b - a for a, b in zip(stamps, stamps[1:])), default=0.0)
        check_whole(container, stream, num_packets, end, gap)
    rate = header_rate(stream)
    if first.time is None:  # no clock in the file: trust the rate
        times = {i / (rate or 1.0) for i in range(num_packets)}
    origin = first.time or 0.0
    kept = sorted(t for t in times if origin - 1e-6 <= t <= origin + max_seconds) or [origin]
    if max_frames < len(kept):
        kept = kept[: int(max_frames)]
    span = kept[-1] - origin
    fps = true_rate(rate, len(kept), span)
    height, width, turn = upright_size(first, stream)
    duration = span + 1 / fps if reached_end else max(span + 1 / fps, claimed_duration(container, stream))
    names = stream.codec_context.name, container.format.name
    return VideoInfo(len(kept), height, width, fps, span, turn, duration, *names)


def true_rate(rate: float, num_frames: int, span: float) -> float:
    """Frames per second of num_frames over span seconds: the header's rate if it agrees with them, else theirs."""
    measured = (num_frames - 1) / span if span > 0 else 0.0
    # A header rate that is off (a live recording may say 1000) would repeat or drop frames.
    return rate if rate and (not measured or 0.9 < rate / measured < 1.1) else measured or rate or 1.0


def claimed_duration(container, stream) -> float:
    """Seconds that the headers give the stream, or the file; 0 where they make no sense."""
    for ticks, unit in ((stream.duration, stream.time_base), (container.duration, 1 / av.time_base)):
        if ticks and unit and 0 < float(ticks * unit) < 1e7:
            return float(ticks * unit)
    return 0.0


def check_whole(container, stream, num_packets: int, end: float, gap: float):
    """Raises DecodeError if a file that was read to its end stops well before what its header promises.

    end: seconds at which its last packet ends. gap: the longest time between two of its frames.
    """
    if stream.frames and num_packets < 0.98 * stream.frames - 1:
        raise DecodeError(f"truncated: {num_packets} of {stream.frames} frames are there")
    if "matroska" in container.format.name and container.duration:
        seconds = container.duration / av.time_base
        if end < seconds - max(0.5, 0.05 * seconds, 2 * gap):
            raise DecodeError(f"truncated: {end:.1f} of {seconds:.1f} s are there")


class Timeline:
    """Seconds of each frame of a stream since its first, in order and ever growing, whatever the file's clock does."""

    def __init__(self, rate: float, origin: float | None = None):
        self.rate, self.origin = rate, origin
        self.previous, self.count = -math.inf, 0

    def at(self, frame) -> float:
        now = self.count / (self.rate or 1.0) if frame.time is None else frame.time
        self.origin = now if self.origin is None else self.origin
        if now <= self.previous:  # a clock that stands still or jumps back
            now = self.previous + 1 / (self.rate or 25.0)
        self.previous, self.count = now, self.count + 1
        return now - self.origin


def _frames(path, start: float, max_pixels: int, clock: Clock) -> Iterator[tuple]:
    """(time, frame, degrees to turn, header's rate) in order, from the frame shown at `start` or earlier."""
    if is_image(path):
        yield 0.0, image_frame(path, max_pixels)[0], 0, 0.0
        return
    with open_video(path, max_pixels) as (container, stream):
        rate = header_rate(stream)
        origin = None
        if start > 0:
            # Time zero is the first frame that decodes; only then can a time be sought.
            first = next(container.decode(stream), None)
            if first is not None and first.time is not None:
                origin = first.time
                container.seek(int((origin + start) / stream.time_base), stream=stream)
            else:  # no clock to seek by: count from the beginning
                container.seek(0)
        timeline = Timeline(rate, origin)
        for frame in container.decode(stream):
            clock.check()
            yield timeline.at(frame), frame, round(frame.rotation / 90) * 90 % 360, rate


def frames(path, *, max_pixels=MAX_PIXELS, time_limit=TIME_LIMIT) -> Iterator[tuple]:
    """Every frame of a file in order, as it is stored.

    Yields (seconds from the first frame, PyAV's frame, degrees to turn it counter-clockwise, the header's rate or 0).
    time_limit counts the seconds that the caller spends on frames too. Raises DecodeError.
    """
    with reasons():
        check_file(path)
        yield from _frames(path, 0.0, max_pixels, Clock(time_limit))


def decode(path, num_frames, height, width, fps, start=0.0, *, max_pixels=MAX_PIXELS, time_limit=TIME_LIMIT):
    """Decodes num_frames frames at fps from `start` seconds on, upright, scaled to height x width.

    Frame k is the one on screen at start + k / fps, to within half a frame (of the file or of the result,
    whichever is shorter). Scaling down averages areas (swscale), scaling up is bicubic; the aspect ratio is
    the caller's affair. Holds one or two decoded frames beside the result.
    Returns uint8 [T, H, W, 3]. Raises DecodeError if the file cannot be decoded that far.
    """
    out, before = None, None
    reformatter = VideoReformatter()
    with reasons():
        for k, (frame, turn) in enumerate(_select(path, num_frames, fps, start, max_pixels, Clock(time_limit))):
            if out is None:  # only now: a broken file must not cost the memory of a whole clip
                out = np.empty((num_frames, height, width, 3), np.uint8)
            out[k] = out[k - 1] if frame is before else to_pixels(reformatter, frame, turn, height, width)
            before = frame
    return out


def _select(path, num_frames: int, fps: float, start: float, max_pixels: int, clock: Clock) -> Iterator[tuple]:
    """(frame, degrees to turn) on screen at start + k / fps, for each k; a repeated frame is the same object."""
    check_file(path)
    k, current, last, rate = 0, None, 0.0, 0.0
    for now, frame, turn, rate in _frames(path, start, max_pixels, clock):
        # A little under half a frame: a tie must not hang on how a container rounds its timestamps.
        slack = 0.45 * min(1 / fps, 1 / rate if rate else math.inf)
        while current is not None and start + k / fps + slack < now:
            yield current
            k += 1
            if k == num_frames:
                return
        current, last = (frame, turn), now
    if current is None:
        raise DecodeError("no frame can be decoded")
    # The last frame stays on screen for its own duration, no longer.
    stays = max(1 / fps, 1 / rate) if rate else 0.5 / fps
    while k < num_frames:
        if start + k / fps > last + stays + 1e-6:
            raise DecodeError(f"ends at {last:.2f} s: {k} of {num_frames} frames at {fps:g} fps decode")
        yield current
        k += 1


def to_pixels(reformatter, frame, turn: int, height: int, width: int) -> np.ndarray:
    """One frame as RGB [H, W, 3], scaled before it is turned (the scaler cannot turn)."""
    h, w = (width, height) if turn % 180 else (height, width)
    smaller = h <= frame.height and w <= frame.width
    scaled = reformatter.reformat(
        frame, w, h, "rgb24", interpolation=Interpolation.AREA if smaller else Interpolation.BICUBIC
    )
    # A view: PyAV's to_ndarray would copy what callers copy to its place anyway.
    lines = np.frombuffer(scaled.planes[0], np.uint8).reshape(h, -1)
    return np.rot90(lines[:, : 3 * w].reshape(h, w, 3), turn // 90)
