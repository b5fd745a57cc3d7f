"""Small video files made on the spot, for the tests of everything that reads files."""

import os

import av
import numpy as np
from PIL import Image

COLORS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250), (250, 20, 250), (250, 250, 250)]
CODECS = {"mp4": "libx264", "mov": "libx264", "webm": "libvpx", "avi": "mpeg4"}


def numbered(num_frames, height=48, width=64):
    """uint8 [T, H, W, 3]: frame k is grey of brightness 20 + 5 k, so that a decoded frame tells its number."""
    levels = (20 + 5 * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def numbers(video):
    """The frame numbers that `numbered` wrote, read back from the middle of each frame."""
    h, w = video.shape[1:3]
    middle = video[:, h // 4 : -h // 4, w // 4 : -w // 4].astype(float).mean((1, 2, 3))
    return [round(float(v)) for v in (middle - 20) / 5]


def write(path, video, fps=8, times_ms=None, rotation=0, gop=12, pixel_format="yuv420p", aspect=None):
    """Encodes a video; times_ms gives each frame its own time (a variable rate). Returns the path."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=1000 if times_ms else fps)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.gop_size = gop
        stream.bit_rate = 2_000_000
        if aspect:
            stream.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = times_ms[i] if times_ms else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def damaged(path, target, keep=1.0, garbage=None):
    """A copy cut after a fraction of its bytes, or with a range of bytes (as fractions) overwritten."""
    data = bytearray(path.read_bytes())
    if garbage:
        start, end = (int(g * len(data)) for g in garbage)
        data[start:end] = np.random.default_rng(0).integers(0, 256, end - start, dtype=np.uint8).tobytes()
    target.write_bytes(data[: int(keep * len(data))])
    return target


def make_bad(tmp_path, kind):
    """A file that is bad in one of several ways, in a folder; returns its path."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    good = write(tmp_path / ("good.webm" if kind.endswith("webm") else "good.mp4"), noise)
    bad = tmp_path / f"bad{good.suffix}"
    if kind.startswith("truncated"):
        return damaged(good, bad, keep=0.5)
    if kind == "garbage inside":
        return damaged(good, bad, garbage=(0.3, 0.5))
    if kind == "garbage header":
        return damaged(good, bad, garbage=(0, 0.05))
    if kind == "zero bytes":
        bad.write_bytes(b"")
    if kind == "text":
        bad.write_text("not a video\n" * 50)
    if kind == "playlist":  # must not make FFmpeg open the file that it names
        bad.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{good}\n#EXT-X-ENDLIST\n")
    if kind == "list of files":
        bad.write_text("ffconcat version 1.0\nfile good.mp4\n")
    if kind == "pipe":
        os.mkfifo(bad)
    if kind == "cut image":
        Image.fromarray(noise[0]).save(tmp_path / "good.png")
        return damaged(tmp_path / "good.png", tmp_path / "bad.png", keep=0.6)
    return bad


def write_sound(path):
    """A file with sound and no picture. Returns the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
