"""Images, clips and masks that users give, as frames of the video that is asked for: its rate, its size.

Files may be hostile: they are read by `data_pipelines.decode`, bounded in pixels and time, and what is wrong with one
is a UserError that names it. A clip is read as it is needed, so that a long one costs no memory.
"""

import contextlib
import math
import os

import numpy as np

from data_pipelines.decode import DecodeError, VideoInfo, decode, probe
from data_pipelines.fit import fit_size, frames_at
from sorax.errors import UserError
from sorax.modes import HOLE_LEVEL


@contextlib.contextmanager
def _naming(path):
    try:
        yield
    except DecodeError as error:
        raise UserError(f"{os.fspath(path)!r} cannot be used: {error.reason}") from error


def inspect(path) -> VideoInfo:
    """Size, rate and length of a video or image. Raises UserError if it is none, is damaged, or is too large."""
    with _naming(path):
        return probe(path)


def fitting_size(info: VideoInfo, area: int, multiple: int) -> tuple[int, int]:
    """(height, width) on the grid, of about the shape of a picture and no larger than it or than an area in pixels."""
    size = fit_size(info.height, info.width, max(1, area // multiple**2), multiple)
    return size or (multiple, multiple)


class Clip:
    """A video or image as uint8 frames [n, height, width, 3] at a rate: `clip[lo:hi]` reads them from the file.

    The picture is scaled until it covers the size, and what is over on two sides is cut off.

    Args:
        fps: frames per second that it is read at. An image is one frame.
        seconds: of it that are used, from the beginning.

    Raises:
        UserError: as `inspect`.
    """

    def __init__(self, path, fps: float, height: int, width: int, seconds: float = math.inf):
        self.path, self.fps, self.info = path, fps, inspect(path)
        count = 1 if self.info.is_image else frames_at(self.info.span, fps)
        if math.isfinite(seconds):
            count = max(1, min(count, round(seconds * fps)))
        self.shape = (count, height, width, 3)
        scale = max(height / self.info.height, width / self.info.width)
        self._scaled = max(height, round(self.info.height * scale)), max(width, round(self.info.width * scale))

    def __len__(self):
        return self.shape[0]

    @property
    def is_cropped(self) -> bool:
        """Whether some of the picture is cut off."""
        return self._scaled != self.shape[1:3]

    def __getitem__(self, place: slice) -> np.ndarray:
        lo, hi, step = place.indices(len(self))
        if step != 1 or lo >= hi:
            raise ValueError(f"frames {place} of {len(self)}: read some, one after the other")
        (height, width), (H, W) = self._scaled, self.shape[1:3]
        with _naming(self.path):
            frames = decode(self.path, hi - lo, height, width, self.fps, start=lo / self.fps)
        top, left = (height - H) // 2, (width - W) // 2
        return frames[:, top : top + H, left : left + W]


class Mask:
    """A mask file as bool [n, height, width], true where it is white: what is to be made anew. Read as a `Clip` is.

    Args:
        of: the clip that it is a mask of; an image is one for all of its frames.

    Raises:
        UserError: it has another size than the file of the clip and than the clip, or fewer frames.
    """

    def __init__(self, path, of: Clip):
        info = inspect(path)
        sizes = {(of.info.height, of.info.width), of.shape[1:3]}
        if (info.height, info.width) not in sizes:
            raise UserError(f"the mask {os.fspath(path)!r} has {info.width}x{info.height} pixels, the video "
                            f"{of.info.width}x{of.info.height}: make them the same")  # fmt: skip
        self._clip = Clip(path, of.fps, *of.shape[1:3])
        if not info.is_image and len(self._clip) < len(of):
            raise UserError(f"the mask {os.fspath(path)!r} has {len(self._clip)} frames at {of.fps:g} fps, the video "
                            f"{len(of)}: make it as long, or use an image as the mask of all frames")  # fmt: skip
        self.shape, self._still = of.shape[:3], None
        if info.is_image:
            self._still = self._clip[0:1].mean(axis=-1) >= HOLE_LEVEL

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, place: slice) -> np.ndarray:
        lo, hi, _ = place.indices(len(self))
        if self._still is not None:
            return np.broadcast_to(self._still, (hi - lo, *self.shape[1:]))
        return self._clip[lo:hi].mean(axis=-1) >= HOLE_LEVEL


def read_image(path, height: int, width: int) -> np.ndarray:
    """An image, or the first frame of a video, as uint8 [1, height, width, 3]. Raises UserError as `inspect`."""
    return Clip(path, 1.0, height, width)[0:1]

