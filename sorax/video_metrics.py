"""What can be said of a video without a network: flicker, motion, warping error and spectra.

Each is a number of one clip; what is good is not the least of it but what real videos of the same kind have, so a
report has the reference's numbers beside it. Lengths and rates matter: compare clips of the same frames per second.

Legend: T frames, H height, W width; a video is uint8 [T, H, W, 3].
"""

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.stats import wasserstein_distance
from skimage.registration import optical_flow_ilk

from sorax.distances import cell, subsample_std

LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601
FLOW_SIDE = 96  # pixels of the shorter side, at most, on which optical flow is estimated
FLOW_PAIRS = 8  # of frames that follow each other, spread evenly over a clip
FLOW_WARPS = 5  # of each level of its pyramid: more find no smaller error
TRACKED = 0.05  # share of pixels that have to be followed for a warping error to mean anything
SPATIAL_BINS, SPATIAL_SIDE = 12, 32  # of frequency, and the least side whose spectrum fills them
TEMPORAL_BINS, TEMPORAL_FRAMES = 8, 4
SPECTRUM_FRAMES, SPECTRUM_PIXELS = 16, 4096  # looked at, of each clip
ROUNDING = 1 / 12  # variance of rounding to 8 bits: no spectrum of pixels lies lower
SPATIAL_FREQUENCIES = (np.arange(SPATIAL_BINS) + 0.5) / (2 * SPATIAL_BINS)  # cycles a pixel
TEMPORAL_FREQUENCIES = (np.arange(TEMPORAL_BINS) + 1) / (2 * TEMPORAL_BINS)  # cycles a frame


def frame_difference(video) -> float | None:
    """Mean of |x[t + 1] - x[t]| over pixels and frames, in 8-bit levels; None for one frame.

    What VBench's temporal flickering is made of, which is (255 - this) / 255: motion counts as well as flicker.
    """
    if len(video) < 2:
        return None
    return float(np.mean([np.abs(b.astype(np.int16) - a).mean() for a, b in zip(video, video[1:])]))


def temporal_flicker(video) -> float | None:
    """Mean of |x[t] - (x[t - 1] + x[t + 1]) / 2| over pixels and frames, in 8-bit levels; None below three frames.

    What a frame differs from the mean of its neighbours: a steady change of brightness costs nothing, one that turns
    at every frame its whole size.
    """
    if len(video) < 3:
        return None
    middle = (np.abs(2 * b.astype(np.int16) - a - c).mean() / 2 for a, b, c in zip(video, video[1:], video[2:]))
    return float(np.mean(list(middle)))


def flow_metrics(video, fps: float) -> dict[str, float | None]:
    """Motion, and what is left of a frame when the motion of the next one is taken back; None for one frame.

    Flow is estimated both ways between FLOW_PAIRS pairs of neighbouring frames, at most FLOW_SIDE pixels on the
    shorter side, by iterative Lucas-Kanade (Le Besnerais and Champagnat 2005, as scikit-image has it). A pixel is
    followed if the way there and back ends where it began, |w + w'|^2 < 0.01 (|w|^2 + |w'|^2) + 0.5 (Sundaram et al.
    2010), and lies inside the frame: what is hidden or appears is not.

    motion: mean |flow| in shorter sides of the frame a second.
    warping_error: 1000 x mean squared difference of a frame and the next one warped back to it, of colours in [0, 1],
        over pixels that are followed (E_warp of Lai et al. 2018); None where hardly any is.
    untracked: share of pixels that cannot be followed.
    """
    if len(video) < 2:
        return dict(motion=None, warping_error=None, untracked=None)
    starts = np.unique(np.linspace(0, len(video) - 2, min(FLOW_PAIRS, len(video) - 1)).round().astype(int))
    speeds, errors, followed, count = [], 0.0, 0, 0
    for t in starts:
        a, b = (_small(frame).astype(np.float32) / 255 for frame in video[t : t + 2])
        there, back = (_flow(x @ LUMA, y @ LUMA) for x, y in ((a, b), (b, a)))
        speeds.append(np.hypot(*there).mean() / min(a.shape[:2]))
        places = np.stack(np.meshgrid(*map(np.arange, a.shape[:2]), indexing="ij")) + there
        returned = np.stack([map_coordinates(part, places, order=1, mode="nearest") for part in back])
        gap, size = ((x**2).sum(0) for x in (there + returned, np.stack([there, returned]).reshape(-1, *a.shape[:2])))
        inside = np.all([(p >= 0) & (p <= side - 1) for p, side in zip(places, a.shape)], axis=0)
        mask = inside & (gap < 0.01 * size + 0.5)
        warped = np.stack([map_coordinates(b[..., c], places, order=1, mode="nearest") for c in range(3)], axis=-1)
        errors += float(np.square(warped - a)[mask].sum(dtype=np.float64)) / 3
        followed, count = followed + int(mask.sum()), count + mask.size
    error = 1000 * errors / followed if followed >= TRACKED * count else None
    return dict(motion=float(np.mean(speeds) * fps), warping_error=error, untracked=1 - followed / count)


def spatial_spectrum(video) -> np.ndarray | None:
    """Power of brightness by spatial frequency, in dB of squared 8-bit levels: float64 [SPATIAL_BINS].

    Mean over frames (at most SPECTRUM_FRAMES of them) and directions of the periodogram of Hann-windowed frames;
    bins of equal width up to half a cycle a pixel. White noise has its variance in every bin. None for frames under
    SPATIAL_SIDE pixels.
    """
    _, H, W, _ = video.shape
    if min(H, W) < SPATIAL_SIDE:
        return None
    window = np.outer(np.hanning(H + 2)[1:-1], np.hanning(W + 2)[1:-1])
    radius = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.rfftfreq(W)[None])
    bins = np.where((radius > 0) & (radius < 0.5), (radius * 2 * SPATIAL_BINS).astype(int), SPATIAL_BINS).ravel()
    # A real picture's other half is the same: columns in the middle count twice.
    weight = np.broadcast_to(np.where((np.arange(W // 2 + 1) % W == 0) | (2 * np.arange(W // 2 + 1) == W), 1, 2),
                             radius.shape).ravel()  # fmt: skip
    counts = np.bincount(bins, weight, SPATIAL_BINS + 1)[:-1]
    power = np.zeros(SPATIAL_BINS)
    frames = _spread(len(video), SPECTRUM_FRAMES)
    for t in frames:
        grey = video[t] @ LUMA
        spectrum = np.square(np.abs(np.fft.rfft2((grey - grey.mean()) * window))).ravel() * weight
        power += np.bincount(bins, spectrum, SPATIAL_BINS + 1)[:-1] / counts / np.square(window).sum()
    return _decibel(power / len(frames))


def temporal_spectrum(video) -> np.ndarray | None:
    """Power of brightness by temporal frequency, in dB of squared 8-bit levels: float64 [TEMPORAL_BINS].

    Mean over some SPECTRUM_PIXELS pixels of the Hann-windowed periodogram of each one's brightness, at
    TEMPORAL_FREQUENCIES. None below TEMPORAL_FRAMES frames.
    """
    T, H, W, _ = video.shape
    if T < TEMPORAL_FRAMES:
        return None
    step = max(1, round((H * W / SPECTRUM_PIXELS) ** 0.5))
    grey = (video[:, step // 2 :: step, step // 2 :: step] @ LUMA).reshape(T, -1).astype(np.float64)
    window = np.hanning(T + 2)[1:-1]
    grey -= window @ grey / window.sum()  # no constant leaks into the lowest frequency
    waves = np.exp(-2j * np.pi * np.outer(TEMPORAL_FREQUENCIES, np.arange(T))) * window
    return _decibel(np.square(np.abs(waves @ grey)).mean(1) / np.square(window).sum())


def spectrum_distance(spectrum, mean) -> float:
    """Root-mean-square difference of two spectra, in dB."""
    return float(np.sqrt(np.mean(np.square(np.asarray(spectrum) - mean))))


def distances_to(spectra, references, *, same: bool = False) -> list[float | None]:
    """Distance of each of some spectra (None among them stays None) to the mean of the references' spectra.

    same: they are the references themselves: each is compared with the mean of the others. All None where there is
    nothing to compare with.
    """
    there = [s for s in references if s is not None]
    total, n = np.sum(there, axis=0), len(there) - same
    means = (None if s is None or not n else (total - same * np.asarray(s)) / n for s in spectra)
    return [None if mean is None else spectrum_distance(s, mean) for s, mean in zip(spectra, means)]


def motion_distance(x, y, *, draws: int = 200) -> dict:
    """Cell of a report: how far the motion of clips is distributed from that of others (Wasserstein-1 distance).

    x, y: motion of each clip (`flow_metrics`), None where there is none. The 95 % interval is by subsampling.
    """
    x, y = (np.array([v for v in values if v is not None]) for values in (x, y))
    if min(len(x), len(y)) < 4:
        return dict(kind="mean", n=min(len(x), len(y)), value=None, lo=None, hi=None, unit="sides/s", better="low")
    spread = subsample_std(lambda i, j: wasserstein_distance(x[i], y[j]), len(x), len(y), draws)
    value = float(wasserstein_distance(x, y))
    return cell(value, spread, min(len(x), len(y)), "sides/s", lowest=0.0)


def _flow(a, b):
    """Where the pixels of a grey frame are in the next one: float [2, H, W], (dy, dx)."""
    return optical_flow_ilk(a, b, num_warp=FLOW_WARPS)


def _small(frame):
    """A frame scaled down to FLOW_SIDE pixels on the shorter side, averaging areas; smaller ones as they are."""
    height, width = frame.shape[:2]
    scale = FLOW_SIDE / min(height, width)
    if scale >= 1:
        return frame
    return np.asarray(Image.fromarray(frame).resize((round(width * scale), round(height * scale)),
                                                    Image.Resampling.BOX))  # fmt: skip


def _spread(count, most):
    """At most so many numbers of 0 .. count - 1, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def _decibel(power):
    return 10 * np.log10(power + ROUNDING)
