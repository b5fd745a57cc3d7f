"""Videos, pictures and contact sheets to files; a file appears whole or not at all.

Shapes: T frames, H height, W width. A video is uint8 [T, H, W, 3].
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import itertools
import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sorax.errors import UserError

SUFFIXES = (".mp4", ".gif", ".png", ".jpg")


@contextlib.contextmanager
def _whole(path: Path):
    """Yields a temporary name beside `path` that becomes `path` at the end, or is removed after an error."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, av.FFmpegError) as e:
        raise UserError(
            f"cannot write {path}: {e.strerror or e}; free space, or name another file that can be written"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _check_video(video: np.ndarray) -> np.ndarray:
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video is uint8 [T, H, W, 3] and not empty; got {video.dtype} {list(video.shape)}")
    return video


def check_suffix(path: str | os.PathLike, num_frames: int):
    """Raises UserError if `write_video` could not write so many frames to a file of this name."""
    suffix = Path(path).suffix.lower()
    if frame_pattern(path):
        return
    if suffix not in SUFFIXES:
        raise UserError(f"cannot write {path}: its name must end in one of {', '.join(SUFFIXES)}, or in / for a folder "
                        "of frames")  # fmt: skip
    if suffix in (".png", ".jpg") and num_frames != 1:
        raise UserError(f"cannot write {num_frames} frames to {path}: a {suffix} holds one; name a .mp4 or .gif file, "
                        "or FOLDER/ or NAME_%04d.png for a file a frame")  # fmt: skip


def frame_pattern(path: str | os.PathLike) -> str:
    """The name of each frame's file, with one %d, where a path is of frames: FOLDER/ or NAME_%04d.png; else ""."""
    text = os.fspath(path)
    if text.endswith(("/", os.sep)):
        return os.path.join(text, "%05d.png")
    return text if re.fullmatch(r"[^%]*%(0\d)?d[^%]*\.png", os.path.basename(text), re.IGNORECASE) else ""


def write_video(path: str | os.PathLike, video: np.ndarray, fps: float, comment: str = ""):
    """Writes uint8 [T, H, W, 3] at fps frames per second, to what `video_writer` can write."""
    video = _check_video(video)
    check_suffix(path, len(video))
    with video_writer(path, fps, comment) as write:
        write(video)


@contextlib.contextmanager
def video_writer(path: str | os.PathLike, fps: float, comment: str = ""):
    """A function that adds frames, uint8 [n, H, W, 3], to a video: `with video_writer(path, fps) as write: ...`

    .mp4 is H.264 in yuv420p with its index first, which every player and browser reads. That format has even sides
    only: a last row or column is repeated where H or W is odd, so the file is one pixel larger there. .gif loops for
    ever, and is written at the end. FOLDER/ and NAME_%04d.png are a PNG file a frame; .png and .jpg hold one frame.
    Folders on the way are made. Nothing has its name before the end, and nothing is left after an error or interrupt.

    comment: kept in the file: the comment of .mp4, .gif and .jpg, the text `Comment` of .png.

    Raises UserError if the name's ending is unknown, the file cannot be written, or such frames are there already.
    """
    check_suffix(path, 1)
    pattern, suffix = frame_pattern(path), Path(path).suffix.lower()
    form = _pictures if pattern else dict(zip(SUFFIXES, (_mp4, _gif, _picture, _picture)))[suffix]
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(_whole_frames(pattern) if pattern else _whole(Path(path)))
        yield stack.enter_context(form(part, fps, comment))


@contextlib.contextmanager
def _mp4(path, fps, comment):
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17", "preset": "medium"}

        def write(frames):
            height, width = _check_video(frames).shape[1:3]
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield write
        container.mux(stream.encode())


@contextlib.contextmanager
def _gif(path, fps, comment):
    frames = []  # of 256 colours: a third of the memory
    yield lambda some: frames.extend(map(_of_256_colors, _check_video(some)))
    path.write_bytes(_gif_bytes(frames, fps, comment))


@contextlib.contextmanager
def _picture(path, fps, comment):
    options = dict(pnginfo=_png_text(comment))
    if path.suffix.lower() == ".jpg":
        options = dict(comment=comment.encode(), quality=95)
    yield lambda frames: Image.fromarray(_check_video(frames)[0]).save(path, **options)


@contextlib.contextmanager
def _pictures(pattern, fps, comment):
    numbers = itertools.count()

    def write(frames):
        for frame in _check_video(frames):
            Image.fromarray(frame).save(pattern % next(numbers), pnginfo=_png_text(comment))

    yield write


def _png_text(comment):
    info = PngInfo()
    if comment:
        info.add_itxt("Comment", comment)
    return info


@contextlib.contextmanager
def _whole_frames(pattern: str):
    """Yields a pattern in a temporary folder; its files come to where they belong at the end."""
    folder, name = os.path.split(pattern)
    folder = folder or "."
    if os.path.isdir(folder) and (there := fnmatch.filter(os.listdir(folder), re.sub(r"%(0\d)?d", "*", name))):
        raise UserError(f"{os.path.join(folder, min(there))} is there already: name another folder for the frames, or "
                        "remove them")  # fmt: skip
    part = os.path.join(folder, f".frames.{os.getpid()}.part")
    made = not os.path.exists(folder)
    try:
        os.makedirs(part)
        yield os.path.join(part, name)
        for file in sorted(os.listdir(part)):
            os.replace(os.path.join(part, file), os.path.join(folder, file))
        made = False
    except OSError as e:
        raise UserError(
            f"cannot write {pattern}: {e.strerror or e}; free space, or name another file that can be written"
        ) from e
    finally:
        shutil.rmtree(folder if made else part, ignore_errors=True)


def gif_bytes(video: np.ndarray, fps: float) -> bytes:
    """An endlessly looping GIF of uint8 [T, H, W, 3]; TensorBoard plays it where it expects a picture.

    A GIF counts time in hundredths of a second: single frames are rounded, the whole keeps its duration.
    Viewers slow down frames shorter than two hundredths, so fps above 50 is shown at 50.
    """
    return _gif_bytes([_of_256_colors(frame) for frame in _check_video(video)], fps, "")


def _of_256_colors(frame):
    return Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)


def _gif_bytes(frames, fps, comment):
    ends = np.rint(np.arange(len(frames) + 1) * 100 / min(fps, 50.0))
    durations = [int(d) * 10 for d in np.diff(ends)]
    out = io.BytesIO()
    frames[0].save(
        out, "GIF", save_all=True, append_images=frames[1:], loop=0, optimize=False,
        duration=durations if len(frames) > 1 else durations[0], **(dict(comment=comment.encode()) if comment else {}),
    )  # fmt: skip
    return out.getvalue()


def contact_sheet(
    videos: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6, cell: int = 96
) -> np.ndarray:
    """A picture of several videos: a row each, its caption above it, `columns` of its frames across.

    Frames are spread evenly from the first to the last. A frame smaller than `cell` pixels is enlarged by a whole
    number, its pixels kept square and sharp; one larger than three cells is scaled down to that.
    Arguments: videos, uint8 [T, H, W, 3], their sizes free; one caption for each. Returns uint8 [H, W, 3].
    """
    if len(videos) != len(captions) or not videos:
        raise ValueError(f"{len(videos)} videos and {len(captions)} captions: one for each, at least one")
    font, gap, background, ink = ImageFont.load_default(), 4, (24, 24, 24), (235, 235, 235)
    strips = [_strip(_check_video(v), columns, cell, gap, background) for v in videos]
    width = max(240, *(s.width for s in strips)) + 2 * gap
    letter = max(1, int(font.getlength("n")))
    texts = ["\n".join(textwrap.wrap(_plain(c), max(1, (width - 2 * gap) // letter))) for c in captions]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heights = [int(measure.multiline_textbbox((0, 0), t or " ", font=font)[3]) + 1 for t in texts]
    sheet = Image.new("RGB", (width, gap + sum(h + s.height + 3 * gap for h, s in zip(heights, strips))), background)
    draw, y = ImageDraw.Draw(sheet), gap
    for strip, text, height in zip(strips, texts, heights):
        draw.multiline_text((gap, y), text, fill=ink, font=font)
        sheet.paste(strip, (gap, y + height + gap))
        y += height + strip.height + 3 * gap
    return np.asarray(sheet)


def write_array(path: str | os.PathLike, arrays):
    """Writes arrays of one shape, stacked, as a .npy file. Raises UserError if it cannot be written."""
    with _whole(Path(path)) as part, open(part, "wb") as file:
        np.save(file, np.stack(arrays))


def side_by_side(left: np.ndarray, right: np.ndarray, gap: int = 4) -> np.ndarray:
    """Two uint8 videos `[T, H, W, 3]` of one shape as one, with a white line of gap pixels between them."""
    line = np.full((*left.shape[:2], gap, 3), 255, np.uint8)
    return np.concatenate([left, line, right], axis=2)


def write_sheet(
    path: str | os.PathLike, videos: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6, cell: int = 96
):
    """Writes contact_sheet(videos, captions, columns, cell) as a PNG. Raises UserError if it cannot be written."""
    sheet = contact_sheet(videos, captions, columns, cell)
    with _whole(Path(path)) as part:
        Image.fromarray(sheet).save(part, "PNG")


def _strip(video: np.ndarray, columns: int, cell: int, gap: int, background: tuple) -> Image.Image:
    count, height, width = video.shape[:3]
    picks = np.unique(np.rint(np.linspace(0, count - 1, min(columns, count))).astype(int))
    longer = max(height, width)
    scale = max(1, round(cell / longer))
    size = (width * scale, height * scale)
    if longer > 3 * cell:
        size = (max(1, width * 3 * cell // longer), max(1, height * 3 * cell // longer))
    way = Image.Resampling.BOX if longer > 3 * cell else Image.Resampling.NEAREST
    strip = Image.new("RGB", (len(picks) * (size[0] + gap) - gap, size[1]), background)
    for i, pick in enumerate(picks):
        strip.paste(Image.fromarray(video[pick]).resize(size, way), (i * (size[0] + gap), 0))
    return strip


def _plain(caption: str) -> str:
    """The caption in letters that Pillow's smallest built-in font has."""
    return caption.encode("latin-1", "replace").decode("latin-1")
