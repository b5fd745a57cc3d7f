"""What curation measures on frames: cuts into shots, blank and faded ends, bars, motion, perceptual hashes.

Pure functions of small arrays, nothing is decoded here. Shapes: F frames of a file; grey pictures are uint8 [H, W],
brightness and contrast (mean and standard deviation of the grey levels of a frame) are float [F] in 0..255, times
are float [F] in seconds and rise.
"""

from __future__ import annotations

import math

import numpy as np

HASH_BITS = 63
FLAT = 3.0  # contrast of a frame that shows nothing; the noise of codecs stays below
BLACK, WHITE = 20.0, 235.0  # brightness of a frame that is blank if it is flat too
BAR = 28  # grey level, at most, of a bar; black is 0, codecs ring
FADE_SECONDS = 2.0


def blank(brightness, contrast) -> np.ndarray:
    """bool [F]: the frame is plain black or plain white."""
    brightness, contrast = np.asarray(brightness), np.asarray(contrast)
    return (contrast < FLAT) & ((brightness < BLACK) | (brightness > WHITE))


def shots(num_frames: int, cuts, is_blank) -> list[tuple[int, int]]:
    """Frame ranges [first, end) between cuts, in order; together they are all num_frames frames.

    cuts are the first frames of new shots. A dip to black or white inside a shot divides it too (fade detectors
    are right to see no cut there), in the middle of its blank frames, which trimming takes away afterwards.
    """
    edges = {0, num_frames, *(int(c) for c in cuts if 0 < c < num_frames)}
    padded = np.concatenate([[False], np.asarray(is_blank, bool), [False]])
    starts, ends = (np.flatnonzero(padded[1:] & ~padded[:-1]), np.flatnonzero(~padded[1:] & padded[:-1]))
    for start, end in zip(starts, ends):  # [start, end) is a run of blank frames
        if start > 0 and end < num_frames and not any(start <= edge <= end for edge in edges):
            edges.add(int(start + end) // 2)
    edges = sorted(edges)
    return list(zip(edges[:-1], edges[1:]))


def trim(times, brightness, contrast, *, cut_before: bool, cut_after: bool, margin: float):
    """Takes from both ends of a shot what does not show it: frames near a cut, blank frames, fades.

    times, brightness and contrast are those of the shot's frames. margin is in seconds, taken where there is a cut
    (cut_before, cut_after), for frames beside a cut are often blended with the other shot. A fade or the end of a
    dissolve is looked for after blank frames and where contrast starts below 60 % of the shot's; it lasts as long as
    contrast rises by 3 % in a quarter of a second, until it is at 95 %, or for FADE_SECONDS.
    Returns (first, end, counts): the frames [first, end) that are left and {"margin" | "blank" | "fade": frames}.
    """
    times, contrast = np.asarray(times, float), np.asarray(contrast, float)
    is_blank, count = blank(brightness, contrast), len(times)
    usual = float(np.median(contrast[~is_blank])) if not is_blank.all() else 0.0
    front = _trim_front(times, contrast, is_blank, usual, margin if cut_before else 0.0)
    back = _trim_front(-times[::-1], contrast[::-1], is_blank[::-1], usual, margin if cut_after else 0.0)
    first = sum(front.values())
    left = count - first
    for name in back:  # where the two sides meet, a frame counts once
        back[name] = min(back[name], left)
        left -= back[name]
    return first, first + left, {name: front[name] + back[name] for name in front}


def _trim_front(times, contrast, is_blank, usual: float, margin: float) -> dict[str, int]:
    """Frames to take off the front, by reason; times may run from any origin but rise."""
    count = len(times)
    near = int(np.searchsorted(times, times[0] + margin - 1e-6)) if margin > 0 else 0
    k = near
    while k < count and is_blank[k]:
        k += 1
    j = k
    if k < count and (k > near or contrast[k] < 0.6 * usual):
        later = np.minimum(np.searchsorted(times, times + 0.25), count - 1)
        while j < later[j] and contrast[j] < 0.95 * usual and contrast[later[j]] > 1.03 * contrast[j]:
            if times[j] >= times[k] + FADE_SECONDS:
                break
            j += 1
    return dict(margin=near, blank=k - near, fade=j - k)


def split(first: int, end: int, times, frame_seconds: float, max_seconds: float) -> list[tuple[int, int]]:
    """Frame ranges [first, end) cut into the fewest parts of equal length that last at most max_seconds.

    times are those of the whole file; the last frame lasts frame_seconds. Lengths differ by a frame at most where
    the rate is constant.
    """
    start, stop = times[first], times[end - 1] + frame_seconds
    parts = math.ceil((stop - start) / max_seconds - 1e-6)
    if parts <= 1:
        return [(first, end)]
    inner = [start + (stop - start) * k / parts for k in range(1, parts)]
    edges = [first, *(first + int(np.searchsorted(times[first:end], t - 1e-6)) for t in inner), end]
    return [(a, b) for a, b in zip(edges[:-1], edges[1:]) if a < b]


def find_bars(rows, columns) -> tuple[int, int, int, int]:
    """Black bars (letterbox, pillarbox) around a picture, as (top, bottom, left, right) in pixels.

    rows uint8 [S, H] and columns uint8 [S, W]: the brightest of the averages over 32 pieces of each row and column,
    for S frames of a clip. A bar is dark in all of them. Bars come in pairs: a dark sky or a dark floor alone is
    picture, so a pair counts if the smaller is at least half of the larger, 2 pixels, and 1 % of the side. Two pixels
    more are taken than were found, for codecs smear the edge. A clip that is dark all over has no bars.
    """
    return (*_pair(np.asarray(rows).max(0)), *_pair(np.asarray(columns).max(0)))


def _pair(profile) -> tuple[int, int]:
    lit = np.flatnonzero(profile > BAR)
    if not len(lit):
        return 0, 0
    before, after = int(lit[0]), int(len(profile) - 1 - lit[-1])
    if min(before, after) < max(0.5 * max(before, after), 0.01 * len(profile), 2):
        return 0, 0
    more = 2 if before + after + 4 < len(profile) else 0
    return before + more, after + more


def crop_box(height: int, width: int, bars) -> tuple[int, int, int, int]:
    """(top, left, height, width) within the bars, all even, as 4:2:0 colour wants; up to 2 pixels less a side."""
    top, bottom, left, right = bars
    y, x = top + top % 2, left + left % 2
    return y, x, (height - bottom - y) // 2 * 2, (width - right - x) // 2 * 2


def inside(picture: np.ndarray, bars, height: int, width: int) -> np.ndarray:
    """The part of a small picture that lies within the bars found at height x width; at least one pixel."""
    top, bottom, left, right = bars
    h, w = picture.shape[:2]
    y0, x0 = min(round(top / height * h), h - 1), min(round(left / width * w), w - 1)
    y1, x1 = max(h - round(bottom / height * h), y0 + 1), max(w - round(right / width * w), x0 + 1)
    return picture[y0:y1, x0:x1]


def motion(before: np.ndarray, after: np.ndarray, seconds: float) -> float:
    """How fast a scene moves: the mean length of the optical flow, in longer sides of the frame per second.

    before, after: grey pictures of one small size, `seconds` apart. Flow by dense inverse search (Kroeger et al.
    2016), in lines and columns that are not black throughout: nothing is known of bars. 0.1 means that the average
    point crosses the frame in ten seconds.
    """
    import cv2

    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(before, after, None)
    lit = before > BAR
    lengths = np.hypot(flow[..., 0], flow[..., 1])[lit.any(1)][:, lit.any(0)]
    return float(lengths.mean()) / max(before.shape) / seconds if lengths.size else 0.0


def perceptual_hash(picture: np.ndarray) -> int:
    """63 bits that survive re-encoding, scaling and small changes of brightness (pHash, Zauner 2010).

    picture is grey, of any size; it is averaged to 32 x 32, and each of the 63 lowest frequencies of its cosine
    transform but the mean says whether it is above the median of them.
    """
    import cv2
    from scipy.fft import dctn

    small = cv2.resize(picture.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)
    low = dctn(small, norm="ortho")[:8, :8].ravel()[1:]
    return int.from_bytes(np.packbits(np.concatenate([[False], low > np.median(low)])).tobytes(), "big")


def distance(a, b) -> float:
    """Bits that differ between two clips, in the mean over their hashes (sequences of equal length)."""
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True)) / len(a)
