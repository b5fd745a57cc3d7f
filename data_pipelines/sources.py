"""Random-access sources of captioned videos: what every source offers, and a folder of real files.

Shapes: T frames, H height, W width. A video is uint8 [T, H, W, 3] and T = 4n + 1.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_pipelines.decode import (
    IMAGE_SUFFIXES,
    TIME_LIMIT,
    VIDEO_SUFFIXES,
    DecodeError,
    VideoInfo,
    decode,
    probe,
    verify,
)
from sorax.errors import UserError

Sample = dict[str, Any]  # video uint8 [T, H, W, 3], caption str, fps float, key str

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleSpec:
    """What a sample will look like, known without decoding it.

    num_frames, height and width are those of the decoded video exactly; fps is in frames per second;
    key names the sample for people (a file name, or an index in a generated world).
    """

    num_frames: int
    height: int
    width: int
    fps: float
    caption: str
    key: str


class Source(Protocol):
    """A picklable sequence of captioned videos whose shapes are known before they are decoded."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def spec(self, index: int) -> SampleSpec:
        """Shape, rate and caption of one sample; cheap, decodes nothing."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample itself; its video has exactly the shape that spec(index) promised."""
        ...


class Rejected(NamedTuple):
    """A file that a folder source cannot use, and why."""

    file: str
    reason: str


def tokens(spec: SampleSpec, spatial_multiple: int = 16, temporal_stride: int = 4) -> int:
    """Length of a sample in tokens: latent frames x (height x width in units of spatial_multiple pixels)."""
    latent_frames = (spec.num_frames - 1) // temporal_stride + 1
    return latent_frames * (spec.height // spatial_multiple) * (spec.width // spatial_multiple)


def legal_frames(num_frames: int, temporal_stride: int = 4) -> int:
    """The largest stride * n + 1 that is at most num_frames (which is at least 1)."""
    return (num_frames - 1) // temporal_stride * temporal_stride + 1


def fit_size(height: int, width: int, max_patches: int, multiple: int) -> tuple[int, int] | None:
    """The size at which a picture keeps to a budget of patches of multiple x multiple pixels, never enlarged.

    Within the budget both sides are rounded down to the multiple. Over it, the largest size is taken whose one
    side is a whole number of patches and whose other side is the nearest one to the aspect ratio.
    Returns (height, width), or None if the picture is smaller than a patch or the budget holds no such size.
    """
    most_rows, most_columns = height // multiple, width // multiple
    if most_rows == 0 or most_columns == 0:
        return None
    if most_rows * most_columns <= max_patches:
        return most_rows * multiple, most_columns * multiple
    aspect = width / height
    sizes = {(rows, round(rows * aspect)) for rows in range(1, min(most_rows, max_patches) + 1)}
    sizes |= {(round(columns / aspect), columns) for columns in range(1, min(most_columns, max_patches) + 1)}
    legal = [
        (r, c) for r, c in sizes if 1 <= r <= most_rows and 1 <= c <= most_columns and r * c <= max_patches
    ]  # fmt: skip
    if not legal:
        return None
    rows, columns = max(legal, key=lambda s: (s[0] * s[1], -abs(math.log(s[1] / s[0] / aspect)), s))
    return rows * multiple, columns * multiple


class FolderSource:
    """A folder of videos and images with captions, each at its own size, shape and length.

    Captions come from `metadata.jsonl` (a line per file: {"file": ..., "caption": ...}) if there is one, else
    from x.txt beside x.mp4. An image is a video of one frame. Every file is decoded once at construction, as far
    as training will read it; what cannot be used is listed in `rejected` and logged once.

    Arguments:
      path: the folder.
      max_tokens: budget of a sample (see `tokens`); larger pictures are scaled down to it, none is scaled up.
      spatial_multiple: pixels that height and width are multiples of (VAE stride x patch).
      temporal_stride: video frames a latent frame; lengths are stride * n + 1.
      fps: rate that videos are resampled to, in frames per second; None keeps each file's own.
      max_frames: longest clip; a longer file gives its beginning.
      min_frames: shortest clip; 1 lets images in.
      time_limit: seconds that decoding one file may take at construction.
    Raises UserError if the folder is missing or holds no usable file, or metadata.jsonl cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        max_tokens: int,
        spatial_multiple: int = 16,
        temporal_stride: int = 4,
        fps: float | None = None,
        max_frames: int = 81,
        min_frames: int = 1,
        time_limit: float = TIME_LIMIT,
    ):
        self.path = Path(path)
        self.max_tokens, self.spatial_multiple, self.temporal_stride = max_tokens, spatial_multiple, temporal_stride
        self.fps, self.min_frames, self.time_limit = fps or None, min_frames, time_limit
        self._check_settings(max_frames)
        self.max_frames = legal_frames(max_frames, temporal_stride)
        entries, self.rejected = _list_folder(self.path)
        num_files = len(entries) + len(self.rejected)
        if not num_files:
            raise UserError(
                f"no videos in {self.path}: put files ({', '.join(VIDEO_SUFFIXES[:4])}, .png, .jpg ...) there, with "
                "metadata.jsonl or a .txt caption beside each"
            )
        # FFmpeg releases the interpreter lock, so threads decode in parallel; map keeps the order.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = list(pool.map(self._scan, entries))
        self._specs = [r for r in results if isinstance(r, SampleSpec)]
        self.rejected += [r for r in results if isinstance(r, Rejected)]
        self.rejected.sort()
        if self.rejected:
            summary = _summary(self.rejected, num_files)
            if not self._specs:
                raise UserError(f"no usable video in {self.path}: {summary}; mend or replace them")
            _log.warning("%s: %s", self.path, summary)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, index: int) -> SampleSpec:
        return self._specs[index]

    def __getitem__(self, index: int) -> Sample:
        """Decodes one sample. Raises UserError if its file has changed since construction."""
        spec = self._specs[index]
        try:
            _check_inside(self.path, spec.key)
            # It decoded in time once: a busy machine is no reason to give up now.
            video = decode(self.path / spec.key, *_clip(spec), time_limit=10 * self.time_limit)
        except DecodeError as e:
            raise UserError(
                f"{self.path / spec.key} could be decoded at start but no longer: {e.reason}; restore the file"
            ) from e
        return dict(video=video, caption=spec.caption, fps=spec.fps, key=spec.key)

    def _check_settings(self, max_frames: int):
        for name, value in (
            ("max_tokens", self.max_tokens),
            ("max_frames", max_frames),
            ("min_frames", self.min_frames),
        ):
            if value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UserError(f"data.fps is {self.fps}: give frames per second above 0, or None to keep each file's own")
        if self.min_frames > max_frames:
            raise UserError(f"data.min_frames is {self.min_frames}, above data.max_frames {max_frames}: lower it")

    def _scan(self, entry: tuple[str, str]) -> SampleSpec | Rejected:
        """Decides what a file gives and decodes that much of it, so that training meets no surprise."""
        file, caption = entry
        try:
            _check_inside(self.path, file)
            if self.fps is None:
                info = probe(self.path / file, max_frames=self.max_frames, time_limit=self.time_limit)
            else:
                seconds = self.max_frames / self.fps
                info = probe(self.path / file, max_seconds=seconds, time_limit=self.time_limit)
            spec = self._plan(info, caption, file)
            verify(self.path / file, *_clip(spec), time_limit=self.time_limit)
        except DecodeError as e:
            return Rejected(file, e.reason)
        return spec

    def _plan(self, info: VideoInfo, caption: str, file: str) -> SampleSpec:
        """Native length and size of a file, brought within the limits. Raises DecodeError if it cannot be."""
        fps = self.fps or info.fps
        available = 1 if info.is_image else min(info.frames_at(fps), self.max_frames)
        num_frames = legal_frames(available, self.temporal_stride)
        if num_frames < self.min_frames:
            raise DecodeError(f"gives {num_frames} frames at {fps:g} fps, fewer than data.min_frames {self.min_frames}")
        latent_frames = (num_frames - 1) // self.temporal_stride + 1
        size = fit_size(info.height, info.width, self.max_tokens // latent_frames, self.spatial_multiple)
        if size is None:
            shape = f"{info.width}x{info.height}"
            if min(info.height, info.width) < self.spatial_multiple:
                raise DecodeError(f"{shape} is smaller than one patch of {self.spatial_multiple} pixels")
            raise DecodeError(
                f"{shape} in {num_frames} frames cannot be brought within data.max_tokens {self.max_tokens}"
            )
        return SampleSpec(num_frames, *size, float(fps), caption, file)


def _clip(spec: SampleSpec) -> tuple[int, int, int, float]:
    return spec.num_frames, spec.height, spec.width, spec.fps


def _summary(rejected: list[Rejected], num_files: int, most: int = 20) -> str:
    named = "; ".join(f"{r.file} ({r.reason})" for r in rejected[:most])
    more = f"; and {len(rejected) - most} more" if len(rejected) > most else ""
    return f"skipped {len(rejected)} of {num_files} files: {named}{more}"


def _check_inside(folder: Path, file: str):
    """Raises DecodeError if a name, or the link it stands for, leads out of the folder."""
    try:
        inside = (folder / file).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a name with a zero byte, a name too long
        raise DecodeError("not a usable file name") from e
    if not inside:
        raise DecodeError("lies outside the folder")


def _list_folder(folder: Path) -> tuple[list[tuple[str, str]], list[Rejected]]:
    """(file, caption) of each captioned file and the files without a caption, sorted by name.

    Raises UserError if the folder or its metadata.jsonl cannot be read.
    """
    if not folder.exists():
        raise UserError(f"no folder {folder}: give data.path an existing folder of videos")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give data.path the folder that holds the videos")
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    try:
        # Links to folders are not followed: they could lead anywhere, or round in a circle.
        found = [
            Path(root, name).relative_to(folder).as_posix()
            for root, _, names in os.walk(folder, onerror=_raise)
            for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
        if (folder / "metadata.jsonl").is_file():
            captions, missing = _read_metadata(folder / "metadata.jsonl"), "not listed in metadata.jsonl"
            files = sorted({*captions, *found})
        else:
            captions, missing = {f: _read_text(folder, f) for f in found}, "no .txt beside it"
            files = sorted(found)
    except OSError as e:
        raise UserError(f"cannot read {e.filename or folder}: {e.strerror}; check its permissions") from e
    entries, rejected = [], []
    for file in files:
        caption = captions.get(file)
        if caption is None:
            rejected.append(Rejected(file, f"no caption: {missing}"))
        elif not caption:
            rejected.append(Rejected(file, "no caption: it is empty"))
        else:
            entries.append((file, caption))
    return entries, rejected


def _raise(error: OSError):
    raise error


def _read_text(folder: Path, file: str) -> str | None:
    """The caption in x.txt beside x.mp4; None if there is none, or it lies elsewhere, or is not text."""
    text = Path(file).with_suffix(".txt")
    try:
        _check_inside(folder, str(text))
        return (folder / text).read_text(encoding="utf-8-sig").strip()
    except (DecodeError, FileNotFoundError, UnicodeDecodeError):
        return None


def _read_metadata(path: Path) -> dict[str, str]:
    """{file: caption} of a metadata.jsonl. Raises UserError with the number of a line that is wrong."""
    captions, line_of = {}, {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): save it as UTF-8") from e
    wanted = 'each line must be like {"file": "x.mp4", "caption": "..."}'
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} line {number} is not JSON ({getattr(e, 'msg', e)}): {wanted}") from e
        if not isinstance(row, dict) or not isinstance(row.get("file"), str) or not row["file"]:
            raise UserError(f'{path} line {number} has no "file": {wanted}')
        caption = row.get("caption", "")
        if not isinstance(caption, str | None):
            raise UserError(f'{path} line {number}: "caption" is not text: {wanted}')
        file = os.path.normpath(row["file"]).replace(os.sep, "/")
        if file in captions:
            raise UserError(f"{path} line {number} lists {file} again, after line {line_of[file]}: keep one of them")
        captions[file], line_of[file] = (caption or "").strip(), number
    return captions


_FOLDER_KEYS = ("max_tokens", "spatial_multiple", "temporal_stride", "fps", "max_frames", "min_frames")


def open_source(data: Mapping[str, Any], **overrides: Any) -> Source:
    """The source that a config's `data` section names.

    `path` "" or "world" is the generated world, made from the section `world` (fields of WorldConfig); anything
    else is a folder, read with those of max_tokens, spatial_multiple, temporal_stride, fps, max_frames and
    min_frames that the section has. Overrides replace entries of the section that is used (of `world`, or of
    `data`); those that mean nothing to a folder or to the world are not passed on.
    Raises UserError for a setting that the source does not know or cannot use.
    """
    path = data.get("path") or "world"
    if path == "world":
        from data_pipelines.world import World, WorldConfig

        known = [f.name for f in fields(WorldConfig)]
        settings = {name: _tuples(value) for name, value in dict(data.get("world") or {}).items()}
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0)
                raise UserError(f"unknown key data.world.{name}: did you mean data.world.{near[0]}?")
        settings |= {name: _tuples(value) for name, value in overrides.items() if name in known}
        return World(WorldConfig(**settings))
    settings = {name: data[name] for name in _FOLDER_KEYS if name in data and data[name] is not None}
    settings |= {name: value for name, value in overrides.items() if name in _FOLDER_KEYS and value is not None}
    if "max_tokens" not in settings:
        raise UserError("data.max_tokens is not set: give the largest number of tokens a sample of the folder may have")
    return FolderSource(path, **settings)


def _tuples(value):
    """Lists as tuples, all the way down: a config read from JSON has lists where a frozen one wants tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
