"""How a video is brought within the limits of training: rate, length, size on the patch grid, token budget.

Pure functions of numbers: nothing here opens a file. Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from sorax.errors import UserError

OVERSIZE = ("scale", "trim", "refuse")
# Scaled down, resampled in time, cut in time; or only what is beyond the last whole patch (in space or time) left off.
CHANGES = ("rescaled", "retimed", "trimmed", "cropped to grid")


class Unfit(Exception):
    """A sample that cannot be brought within the limits; `reason` says why: its kind, then ": " and details."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Fit:
    """The limits that samples are brought within.

    max_tokens: budget of a sample, in tokens (see `tokens`). spatial_multiple: pixels that height and width are
    multiples of (VAE stride x patch). temporal_stride: video frames a latent frame; lengths are stride * n + 1, as of a
    VAE whose first latent frame is one frame alone. any_length: all lengths will do, as for patches of pixels, of which
    the last one is filled up.
    fps: rate that videos are resampled to, in frames per second; None (or 0) keeps each one's own.
    max_frames: longest clip; a longer video gives its beginning. min_frames: shortest clip; 1 lets images in.
    oversize: what is done to a sample over max_tokens: "scale" shrinks its picture, "trim" keeps its size and cuts it
    in time, "refuse" leaves it out. Raises UserError, naming the key of the `data` section, for an impossible value.
    """

    max_tokens: int
    spatial_multiple: int = 16
    temporal_stride: int = 4
    fps: float | None = None
    max_frames: int = 81
    min_frames: int = 1
    oversize: str = "scale"
    any_length: bool = False

    def __post_init__(self):
        object.__setattr__(self, "fps", self.fps or None)
        for name in ("max_tokens", "max_frames", "min_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}: it must be at least 1")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UserError(f"data.fps is {self.fps}: give frames per second above 0, or 0 to keep each file's own")
        if self.min_frames > self.max_frames:
            raise UserError(f"data.min_frames is {self.min_frames}, above data.max_frames {self.max_frames}: lower it")
        if self.oversize not in OVERSIZE:
            raise UserError(f"data.oversize is {self.oversize!r}: choose of {', '.join(OVERSIZE)}")
        # From here on the longest clip that the grid allows.
        object.__setattr__(self, "max_frames", self.legal_frames(self.max_frames))

    def legal_frames(self, num_frames: int) -> int:
        """The longest legal length that is at most num_frames (which is at least 1)."""
        return num_frames if self.any_length else legal_frames(num_frames, self.temporal_stride)


class Fitted(NamedTuple):
    """What a sample is decoded to: frames and pixels of the result, its rate, the seconds it starts at in the video.

    changes: what that does to the video, a subset of CHANGES.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    start: float
    changes: tuple[str, ...]


def tokens(spec, spatial_multiple: int = 16, temporal_stride: int = 4) -> int:
    """Length of a sample in tokens: latent frames x (height x width in units of spatial_multiple pixels).

    spec is anything with num_frames, height and width.
    """
    latent_frames = (spec.num_frames - 1) // temporal_stride + 1  # also where only the last one is not full
    return latent_frames * (spec.height // spatial_multiple) * (spec.width // spatial_multiple)


def legal_frames(num_frames: int, temporal_stride: int = 4) -> int:
    """The largest stride * n + 1 that is at most num_frames (which is at least 1)."""
    return (num_frames - 1) // temporal_stride * temporal_stride + 1


def frames_at(span: float, fps: float) -> int:
    """Number of frames that a video fills at a rate, if span seconds lie between its first and its last frame."""
    # The slack of a tenth of a frame forgives timestamps rounded to milliseconds.
    return math.floor(span * fps + 0.1) + 1


@functools.lru_cache(maxsize=1 << 16)  # a large data set has few sizes
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


def fit_sample(info, fit: Fit) -> Fitted:
    """Native length and size of a video, brought within the limits.

    Arguments:
      info: anything with height, width (upright, square pixels), fps, span (seconds from its first frame to the last
        that may be used), duration (seconds of the whole video) and is_image.
    Raises Unfit if the limits leave nothing of it: too short, smaller than a patch, or over the budget in every way
    that `fit.oversize` allows.
    """
    fps = fit.fps or info.fps
    available = 1 if info.is_image else frames_at(info.span, fps)
    num_frames = fit.legal_frames(min(available, fit.max_frames))
    _check_length(num_frames, fps, fit)
    shape = f"{info.width}x{info.height}"
    rows, columns = info.height // fit.spatial_multiple, info.width // fit.spatial_multiple
    if not rows or not columns:
        raise Unfit(f"too small: {shape} is smaller than one patch of {fit.spatial_multiple} pixels")
    latent_frames = (num_frames - 1) // fit.temporal_stride + 1
    native = (rows * fit.spatial_multiple, columns * fit.spatial_multiple)
    over = rows * columns * latent_frames > fit.max_tokens
    size, changes = native, []
    if over and fit.oversize == "refuse":
        raise Unfit(f"over budget: {shape} in {num_frames} frames is {rows * columns * latent_frames} tokens, over "
                    f"data.max_tokens {fit.max_tokens}")  # fmt: skip
    if over and fit.oversize == "trim":
        latent_frames = fit.max_tokens // (rows * columns)
        if not latent_frames:
            raise Unfit(f"over budget: one frame of {shape} is {rows * columns} tokens, over data.max_tokens "
                        f"{fit.max_tokens}")  # fmt: skip
        num_frames = fit.legal_frames(min(latent_frames * fit.temporal_stride, num_frames))
        _check_length(num_frames, fps, fit)
    if over and fit.oversize == "scale":
        size = fit_size(info.height, info.width, fit.max_tokens // latent_frames, fit.spatial_multiple)
        if size is None:
            raise Unfit(f"over budget: {shape} in {num_frames} frames cannot be brought within data.max_tokens "
                        f"{fit.max_tokens}")  # fmt: skip
        changes.append("rescaled")
    elif native != (info.height, info.width):
        changes.append("cropped to grid")
    if not info.is_image:
        if abs(fps - info.fps) > 1e-3 * info.fps:
            changes.append("retimed")
        whole = max(available, frames_at(max(info.duration - 1 / info.fps, 0.0), fps))
        if num_frames < fit.legal_frames(whole):
            changes.append("trimmed")
        elif num_frames < whole and "cropped to grid" not in changes:
            changes.append("cropped to grid")
    return Fitted(num_frames, *size, float(fps), 0.0, tuple(sorted(changes, key=CHANGES.index)))


def _check_length(num_frames: int, fps: float, fit: Fit):
    if num_frames < fit.min_frames:
        raise Unfit(f"too short: {num_frames} frames at {fps:g} fps, fewer than data.min_frames {fit.min_frames}")
