"""One pass over a raw video: its shots, where clips are cut out of it, and what is measured on them.

Every frame is decoded once and looked at small. Cuts come from PySceneDetect's adaptive detector (frame differences
in hue, saturation and value against their rolling mean), which is fed with PyAV's frames: no other decoder opens the
file. All else is measured on a few frames a second (`curate_checks`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipelines import curate_checks as checks
from data_pipelines.curate_settings import Settings
from data_pipelines.decode import DecodeError, frames, probe

SAMPLES_PER_SECOND = 8.0  # frames that motion, bars and hashes are measured on
SMALL, SHORTEST = 256, 32  # pixels of the longer side of a frame that is looked at; of the shorter one, at least
MIN_SIDE = 16  # pixels; less is no picture
HASHES_AT = (0.1, 0.3, 0.5, 0.7, 0.9)  # where in a clip, in fractions of its length


def scan(path: str, settings: Settings) -> dict:
    """Measures a file and says which clips it gives; plain values that JSON holds.

    Returns height, width (upright, square pixels), fps, num_frames, seconds, rotation, is_image, trimmed (frames that
    no clip has, by reason) and clips: a list, in order, of dicts with shot, first, end (frames [first, end)), start,
    stop (seconds from the first frame), height, width (of the clip as it will be), fps, constant (its frames keep to
    that rate), bars (top, bottom, left, right in pixels, cut off), whole (the file as it is), motion (None where too
    short to tell), brightness, contrast, hashes, and stage and reason of one that is too short or mostly bars.
    Raises DecodeError.
    """
    info = probe(path, max_seconds=settings.max_file_seconds + 1, time_limit=settings.time_limit)
    if info.span > settings.max_file_seconds:
        raise DecodeError(f"longer than --max-file-seconds {settings.max_file_seconds:g}: cut it, or raise the limit")
    if min(info.height, info.width) < MIN_SIDE:
        raise DecodeError(f"too small: {info.width}x{info.height}, of at least {MIN_SIDE} pixels a side")
    seen = _look(path, info, settings)
    num_frames = len(seen.times)
    usual = float(np.median(np.diff(seen.times))) if num_frames > 1 else 1 / info.fps
    out = dict(
        height=info.height, width=info.width, fps=float(info.fps), num_frames=num_frames, rotation=info.rotation,
        seconds=0.0 if info.is_image else float(seen.times[-1] + usual), is_image=info.is_image,
    )  # fmt: skip
    if info.is_image:
        out["trimmed"], out["clips"] = {}, [_measure(seen, info, 0, 0, 1, usual, settings)]
        return out
    is_blank = checks.blank(seen.brightness, seen.contrast)
    trimmed, clips = Counter(), []
    for shot, (first, end) in enumerate(checks.shots(num_frames, seen.cuts, is_blank)):
        a, b, taken = checks.trim(
            seen.times[first:end], seen.brightness[first:end], seen.contrast[first:end],
            cut_before=first > 0, cut_after=end < num_frames, margin=settings.margin,
        )  # fmt: skip
        trimmed.update(taken)
        for part in checks.split(first + a, first + b, seen.times, usual, settings.max_seconds) if a < b else ():
            clips.append(_measure(seen, info, shot, *part, usual, settings))
    out["trimmed"], out["clips"] = {k: v for k, v in sorted(trimmed.items()) if v}, clips
    return out


@dataclass
class _Seen:
    """What is kept of the frames of a file: F of them, S looked at more closely."""

    times: np.ndarray  # [F] seconds
    brightness: np.ndarray  # [F]
    contrast: np.ndarray  # [F]
    cuts: list[int]  # first frames of new shots
    sampled: np.ndarray  # [S] indices of frames
    pictures: list[np.ndarray]  # S grey pictures [64, 64], upright
    rows: list[np.ndarray]  # S of [H], for find_bars
    columns: list[np.ndarray]  # S of [W]
    motions: np.ndarray  # [S - 1] from each sample to the next


def _look(path, info, settings: Settings) -> _Seen:
    """Decodes a file once. Its memory grows by 40 bytes a frame and 4 kB + height + width a sample."""
    import cv2
    from av.video.reformatter import Interpolation, VideoReformatter
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)  # files run in parallel
    detector = AdaptiveDetector(min_scene_len=2)
    turned = info.rotation % 180 != 0
    height, width = (info.width, info.height) if turned else (info.height, info.width)  # as stored
    scale = min(1.0, SMALL / max(height, width))
    size = [max(SHORTEST, round(side * scale)) for side in (width, height)]
    scalers = [VideoReformatter() for _ in range(3)]
    # Any clip of the least length has a sample, and usually a pair of them.
    step = min(1 / SAMPLES_PER_SECOND, settings.min_seconds / 4)
    times, brightness, contrast, cuts = [], [], [], []
    sampled, pictures, rows, columns, motions = [], [], [], [], []
    before = None
    for index, (now, frame, turn, _) in enumerate(frames(path, time_limit=settings.time_limit)):
        if now > settings.max_file_seconds + 1:
            raise DecodeError(f"goes on beyond --max-file-seconds {settings.max_file_seconds:g}, against its header")
        small = scalers[0].reformat(frame, *size, "bgr24", interpolation=Interpolation.AREA).to_ndarray()
        grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
        cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(index, 25.0), small)]
        mean, deviation = cv2.meanStdDev(grey)
        times.append(now)
        brightness.append(float(mean[0, 0]))
        contrast.append(float(deviation[0, 0]))
        if sampled and now < times[sampled[-1]] + step - 2e-3:  # containers may round times to milliseconds
            continue
        if before is not None:
            motions.append(checks.motion(before, grey, now - times[sampled[-1]]))
        sampled.append(index)
        before = grey
        picture = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA)
        pictures.append(np.ascontiguousarray(np.rot90(picture, turn // 90)))
        # Averages over 32 pieces of a line: noise goes down, a small bright thing stays.
        tall = scalers[1].reformat(frame, 32, height, "gray", interpolation=Interpolation.AREA).to_ndarray()
        wide = scalers[2].reformat(frame, width, 32, "gray", interpolation=Interpolation.AREA).to_ndarray()
        tall, wide = np.rot90(tall, turn // 90), np.rot90(wide, turn // 90)
        rows.append((wide if turned else tall).max(1))
        columns.append((tall if turned else wide).max(0))
    if not times:
        raise DecodeError("no frame can be decoded")
    return _Seen(np.array(times), np.array(brightness), np.array(contrast), cuts, np.array(sampled), pictures, rows,
                 columns, np.array(motions))  # fmt: skip


def _measure(seen: _Seen, info, shot: int, first: int, end: int, usual: float, settings: Settings) -> dict:
    """The clip of frames [first, end), its scores, and whether it is too short or mostly bars."""
    start, stop = float(seen.times[first]), float(seen.times[end - 1] + usual)
    inside = np.flatnonzero((seen.sampled >= first) & (seen.sampled < end))
    drift = (seen.times[first:end] - start) * info.fps - np.arange(end - first)  # in frames
    clip = dict(
        shot=shot, first=first, end=end, start=start, stop=stop, height=info.height, width=info.width,
        fps=float(info.fps), constant=bool(np.abs(drift).max() < 0.25), bars=[0] * 4,
        whole=end - first == len(seen.times), motion=None, brightness=None, contrast=None, hashes=[], stage="",
        reason="",
    )  # fmt: skip
    if not info.is_image and stop - start < settings.min_seconds - 0.1 * usual:
        return clip | dict(stage="length", reason=f"shorter than --min-seconds {settings.min_seconds:g}")
    if not len(inside):  # a clip between two samples: only of a variable rate and no least length
        inside = np.array([np.searchsorted(seen.sampled, first, side="right") - 1])
    if not info.is_image:  # the borders of a photograph are left alone
        clip["bars"] = [int(b) for b in checks.find_bars([seen.rows[i] for i in inside],
                                                         [seen.columns[i] for i in inside])]  # fmt: skip
    top, bottom, left, right = clip["bars"]
    part = (info.height - top - bottom) * (info.width - left - right) / (info.height * info.width)
    if any(clip["bars"]):
        clip["whole"] = False
    if not clip["whole"]:
        clip["height"], clip["width"] = checks.crop_box(info.height, info.width, clip["bars"])[2:]
    pictures = {int(i): checks.inside(seen.pictures[i], clip["bars"], info.height, info.width) for i in inside}
    clip["brightness"] = float(np.mean([p.mean() for p in pictures.values()]))
    clip["contrast"] = float(np.mean([p.std() for p in pictures.values()]))
    if len(inside) > 1:
        clip["motion"] = float(seen.motions[inside[:-1]].mean())
    at = [start + f * (float(seen.times[end - 1]) - start) for f in HASHES_AT]
    nearest = [inside[np.abs(seen.times[seen.sampled[inside]] - t).argmin()] for t in at]
    clip["hashes"] = [checks.perceptual_hash(pictures[int(i)]) for i in nearest]
    if part < settings.min_picture or min(clip["height"], clip["width"]) < MIN_SIDE:
        clip |= dict(stage="bars", reason=f"bars leave less than --min-picture {settings.min_picture:g} of the frame")
    return clip


def judge(clip: dict, settings: Settings, is_image: bool = False) -> tuple[str, str]:
    """(stage, reason) for which a clip that `scan` measured is dropped, or ("", "")."""
    if clip["stage"]:
        return clip["stage"], clip["reason"]
    if clip["brightness"] < settings.min_brightness:
        return "brightness", f"too dark: below --min-brightness {settings.min_brightness:g}"
    if clip["brightness"] > settings.max_brightness:
        return "brightness", f"too bright: above --max-brightness {settings.max_brightness:g}"
    if not is_image and clip["motion"] is not None and clip["motion"] < settings.min_motion:
        return "motion", f"static: below --min-motion {settings.min_motion:g}"
    return "", ""
