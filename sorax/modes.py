"""Every mode of generation as a canvas: a video of which some frames or pixels are there already.

A canvas becomes a `given` mask over latent patches (`given_of`), the one thing that the model knows of modes; training
draws such masks (`flow.draw_given`). Frames and images are uint8 [n, H, W, 3], arrays or what is sliced like one
(`sorax.inputs.Clip` reads a file as it is needed).

A causal VAE makes a latent frame of the first frame and one of each `stride` frames after it, and what it makes of them
depends on the frames before. In training all of a clip is encoded together. So is a canvas here: where nothing is known
the nearest known frame stands still. For a clip that begins in the middle that puts its first latent frame 0.11
deviations from that of the whole clip and the second one 0.04; mirrored frames put them at 0.16 and 0.07, grey ones at
0.56 and 0.18 (the quickstart's VAE on clips of the world). An image in the middle is shown for a whole latent frame.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from sorax.encode import Codec
from sorax.errors import UserError
from sorax.flow import GIVEN_MODES

HOLE_LEVEL = 128  # of a mask's pixels: as bright or brighter is made anew


@dataclasses.dataclass(frozen=True)
class Piece:
    """Frames offset .. offset + count of `frames`, which are the canvas's from frame `at` on."""

    at: int
    frames: Any
    offset: int
    count: int


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A video that is to be made, and what there is of it.

    num_frames: stride * n + 1. pieces: what is there; they do not overlap.
    holes: None, or bool [num_frames, H, W], sliced as pieces are: pixels of pieces that are made anew.
    strength: below 1, how far what lies in holes goes back to noise; without holes that is everything.
    back: frames made behind the last one, that lead to the first one again: the video has num_frames + back.
    notes: what was cut or rounded, in words for the user.
    """

    num_frames: int
    height: int
    width: int
    pieces: tuple[Piece, ...] = ()
    holes: Any = None
    strength: float = 1.0
    back: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for piece in self.pieces:
            if tuple(piece.frames.shape[1:]) != (self.height, self.width, 3):
                raise UserError(f"what is given has {piece.frames.shape[2]}x{piece.frames.shape[1]} pixels, the video "
                                f"{self.width}x{self.height}: scale it to that")  # fmt: skip
        if not 0.01 <= self.strength <= 1:
            raise UserError(f"strength is {self.strength:g}: give 0.01 (hardly changed) to 1 (nothing is left)")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the video that comes out."""
        return self.num_frames + self.back, self.height, self.width

    @property
    def is_edit(self) -> bool:
        """Whether pieces are there to be changed, not to be kept."""
        return self.holes is None and self.strength < 1

    def read(self, lo: int, hi: int):
        """Frames [lo, hi): uint8 [n, H, W, 3] (0 where there are none), whether each is there, bool [n], and which
        pixels are known, bool [n, H, W]."""
        frames = np.zeros((hi - lo, self.height, self.width, 3), np.uint8)
        there = np.zeros(hi - lo, bool)
        for piece in self.pieces:
            first, last = max(lo, piece.at), min(hi, piece.at + piece.count)
            if first < last:
                place = slice(first - lo, last - lo)
                shift = piece.offset - piece.at
                frames[place], there[place] = piece.frames[first + shift : last + shift], True
        known = np.broadcast_to((there & (not self.is_edit))[:, None, None], frames.shape[:3])
        if self.holes is not None:
            known = known & ~np.asarray(self.holes[lo:hi], bool)
        return frames, there, known

    def known_groups(self, stride: int) -> np.ndarray:
        """bool [t]: which latent frames are known as a whole."""
        whole = np.zeros(self.num_frames, bool)
        for piece in () if self.is_edit else self.pieces:
            if self.holes is None:
                whole[piece.at : piece.at + piece.count] = True
                continue
            for k in range(piece.at, piece.at + piece.count):  # one by one: a mask may be long
                whole[k] = not np.any(self.holes[k : k + 1])
        return np.append(whole[:1], whole[1:].reshape(-1, stride).all(axis=1))


# --- Modes. new_frames and between are what is asked for; canvases round them to whole latent frames.


def text(num_frames: int, height: int, width: int) -> Canvas:
    """Nothing is there. A loop of it: see `loop_of_text`."""
    return Canvas(num_frames, height, width)


def extend(clip, new_frames: int, stride: int, *, backward: bool = False) -> Canvas:
    """A clip with new frames behind it or before it."""
    new, n = _groups(new_frames, stride) * stride, len(clip)
    if not backward:
        kept = (n - 1) // stride * stride + 1
        return Canvas(kept + new, *clip.shape[1:3], (Piece(0, clip, n - kept, kept),), notes=_cut(n - kept, "first"))
    piece, notes = _tail(clip, 1 + new, stride)
    return Canvas(1 + new + piece.count, *clip.shape[1:3], (piece,), notes=notes)


def connect(first, second, between: int, stride: int) -> Canvas:
    """Two clips with new frames between them."""
    canvas = extend(first, between, stride)
    piece, notes = _tail(second, canvas.num_frames, stride)
    return dataclasses.replace(canvas, num_frames=canvas.num_frames + piece.count, pieces=(*canvas.pieces, piece),
                               notes=canvas.notes + notes)  # fmt: skip


def loop(clip, new_frames: int, stride: int) -> Canvas:
    """A clip with new frames behind it that lead to its first frame again."""
    n = len(clip)
    kept = (n - 1) // stride * stride + 1
    return Canvas(kept, *clip.shape[1:3], (Piece(0, clip, 0, kept),), back=_groups(new_frames, stride) * stride,
                  notes=_cut(n - kept, "last"))  # fmt: skip


def loop_of_text(num_frames: int, height: int, width: int, stride: int, longest: int) -> Canvas:
    """A loop of num_frames frames, whose last leads to its first; at most `longest` of them lead back."""
    if num_frames < 2 * stride + 1:
        raise UserError(f"a loop of {num_frames} frames is too short: ask for {2 * stride + 1} at least")
    groups = (num_frames - 1) // stride
    back = max(1, min(groups // 2, longest // stride)) * stride
    return Canvas(groups * stride + 1 - back, height, width, back=back)


def edit(clip, stride: int, *, strength: float = 1.0, holes=None) -> Canvas:
    """A clip made anew from where noise has taken it, by `strength`; or only what lies in `holes`."""
    n = len(clip)
    kept = (n - 1) // stride * stride + 1
    if holes is None and strength == 1:
        raise UserError("an edit of strength 1 without a mask would leave nothing of the video: give less")
    if holes is not None and (tuple(holes.shape[1:3]) != tuple(clip.shape[1:3]) or len(holes) < kept):
        raise UserError(f"the mask has {len(holes)} frames of {holes.shape[2]}x{holes.shape[1]}, the video {kept} of "
                        f"{clip.shape[2]}x{clip.shape[1]}: make one of that size")  # fmt: skip
    return Canvas(kept, *clip.shape[1:3], (Piece(0, clip, 0, kept),), holes=holes, strength=strength,
                  notes=_cut(n - kept, "last"))  # fmt: skip


def keyframes(images: dict[int, Any], num_frames: int, stride: int) -> Canvas:
    """Images [1, H, W, 3] at given frames, each shown for the latent frame that it falls into; at 0: image to video."""
    pieces, notes = {}, []
    for frame, image in sorted(images.items()):
        if not 0 <= frame < num_frames:
            raise UserError(f"a keyframe at frame {frame} is outside of the video's frames 0 to {num_frames - 1}")
        group = -(-frame // stride)
        begin, count = (0, 1) if group == 0 else ((group - 1) * stride + 1, stride)
        if begin in pieces:
            raise UserError(f"two keyframes fall into frames {begin} to {begin + count - 1}, which are one latent "
                            "frame: put them further apart")  # fmt: skip
        if count > 1:
            notes.append(f"the keyframe at frame {frame} is shown in frames {begin} to {begin + count - 1}, which are "
                         "one latent frame")  # fmt: skip
        pieces[begin] = Piece(begin, np.repeat(image[0:1], count, axis=0), 0, count)
    size = next(iter(images.values())).shape[1:3]
    return Canvas(num_frames, *size, tuple(pieces.values()), notes=tuple(notes))


def _groups(frames: int, stride: int) -> int:
    if frames < 1:
        raise UserError(f"{frames} new frames: ask for at least 1")
    return max(1, round(frames / stride))


def _tail(clip, at: int, stride: int):
    """A clip as the end of a canvas, in whole latent frames: what is over is cut, a clip of less stands still."""
    n = len(clip)
    if n < stride:
        still = np.concatenate([clip[0:n], np.repeat(clip[n - 1 : n], stride - n, axis=0)])
        return Piece(at, still, 0, stride), (f"the end is shown for {stride} frames, which are one latent frame",)
    kept = n // stride * stride
    return Piece(at, clip, 0, kept), _cut(n - kept, "last")


def _cut(count: int, which: str) -> tuple[str, ...]:
    if not count:
        return ()
    some = "frame is" if count == 1 else f"{count} frames are"
    return (f"the {which} {some} left out: a clip fills whole latent frames",)


# --- Masks


def still_where_unknown(frames, there):
    """Frames [n, H, W, 3] with the nearest one that is there (the earlier of two) where none is."""
    places = np.flatnonzero(there)
    if not len(places):
        return frames
    distance = np.abs(np.arange(len(frames))[:, None] - places)
    return frames[places[distance.argmin(axis=1)]]


def patches_of(config, patch_size, known):
    """bool [t, h, w]: latents of which all pixels that their patch stands for are known, of known bool [T, H, W].

    config: of the VAE.
    """
    stride, unit = config.temporal_stride, [config.spatial_stride * p for p in patch_size[1:]]
    T, H, W = known.shape
    cells = known.reshape(T, H // unit[0], unit[0], W // unit[1], unit[1]).all(axis=(2, 4))
    later = cells[1:].reshape((T - 1) // stride, stride, *cells.shape[1:]).all(axis=1)
    cells = np.concatenate([cells[:1], later])
    together = cells.reshape(len(cells) // patch_size[0], patch_size[0], *cells.shape[1:]).all(axis=1)
    return np.repeat(np.repeat(np.repeat(together, patch_size[0], 0), patch_size[1], 1), patch_size[2], 2)


def given_of(codec: Codec, patch_size, frames, there, known):
    """(mask bool [t, h, w], latents [t, h, w, C]): what `Request.given` takes, of what `Canvas.read` returns.

    The latents are those of the whole, whatever of it is known, see above.
    """
    return patches_of(codec.config, patch_size, known), codec.encode([still_where_unknown(frames, there)])[0]


def hole_shares(canvas: Canvas, config, patch_size) -> tuple[float, float]:
    """Shares of a canvas's pixels that lie in holes, and that are made anew: holes are rounded to whole patches."""
    holes = np.asarray(canvas.holes[0 : canvas.num_frames], bool)
    kept = patches_of(config, patch_size, ~holes).mean(axis=(1, 2))
    kept = (kept[0] + config.temporal_stride * kept[1:].sum()) / len(holes)
    return float(holes.mean()), 1 - float(kept)


# --- What a run was trained for


def drawn_by(mask) -> set[str]:
    """Which of `flow.GIVEN_MODES` draw a mask bool [t, h, w]; none of them if it is empty."""
    frames, t = mask.all(axis=(1, 2)), len(mask)
    if not mask.any():
        return set()
    if (mask.any(axis=(1, 2)) != frames).any():
        return {"box"}
    given, gap = np.flatnonzero(frames), np.flatnonzero(~frames)
    modes = {"keyframes"}
    if len(given) == t:
        return modes
    if gap[-1] - gap[0] + 1 == len(gap):
        modes |= {"box"}
        if frames[0] and frames[-1]:
            modes |= {"both_k"} | ({"both"} if len(given) == 2 else set())
        elif frames[0]:
            modes |= {"first_k"} | ({"first"} if len(given) == 1 else set())
        elif frames[-1]:
            modes |= {"last_k"} | ({"last"} if len(given) == 1 else set())
    return modes


def untrained(mask, weights) -> str | None:
    """Why a model knows nothing of such a mask, in words for a warning; None where it was trained for it.

    weights: `config.flow.given` of the run. `keyframes` and `box` draw most masks, but rarely a given one of them: they
    count where no other mode draws it.
    """
    share = dict(zip(GIVEN_MODES, weights))
    modes = drawn_by(mask)
    narrow = modes - {"keyframes", "box"} or modes
    if not modes or any(share.get(mode, 0) > 0 for mode in narrow):
        return None
    names = " or ".join(mode for mode in GIVEN_MODES if mode in narrow)
    there = [mode for mode in GIVEN_MODES[1:] if share.get(mode, 0) > 0]
    return (f"the checkpoint was not trained for this mode: it needs {names} of config.flow.given, and was trained "
            f"with {', '.join(there) or 'nothing given'}; what comes out may not follow what is given")  # fmt: skip


def untrained_rising(rising: float, share: float) -> str | None:
    """The same of noise that rises along time. share: `config.flow.rising` of the run."""
    if not rising or share > 0:
        return None
    return ("the checkpoint was not trained with noise that rises along time (config.flow.rising is 0): what comes out "
            "may be worse than without")  # fmt: skip


def frames_of_seconds(seconds: float, fps: float, what: str = "--seconds") -> int:
    """Frames in so many seconds, at least 1. Raises UserError unless they are above 0 and finite."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"{what} is {seconds:g}: give a number above 0")
    return max(1, round(seconds * fps))
