"""Videos of a report's cases: which of them a page shows, as pictures it can step through, with what failed marked.

A video goes into the page as one picture of all its frames (a sprite sheet), of which a script shows one at a time: a
mark is then exactly on its frame, and all videos run in step.
"""

import base64
import io
import math
import os
import zipfile

import numpy as np
from PIL import Image

from data_pipelines.report_page import escape
from sorax.errors import UserError

SIDE = 160  # pixels of a screen for the longer side of a video: smaller ones are enlarged by a whole number
MOST_CASES = 24  # shown of a part: half of them the worst, a quarter each from the middle and the best
MOST_CHARACTERS = 600  # shown of a caption
_LOSSLESS = 64 << 10  # bytes of a video that is larger without loss: it is compressed with loss, the kept one is not
_WIDEST = 8192  # pixels of a row of frames in a sheet


def ranked(cases: list[dict], metric: str = "", better: str | None = None) -> list[dict]:
    """Cases from worst to best score; of equal ones by their value of a metric, worst first, then as they come."""

    def worth(case):
        value = (case.get("values") or {}).get(metric)
        return -math.inf if value is None else value if better == "high" else -value

    return sorted(cases, key=lambda case: (case.get("score") or 0.0, worth(case)))


def verdict_of(case: dict) -> bool | None:
    """Whether a case passed all its checks; None where nothing was checked."""
    if case["failed"]:
        return False
    checks = case.get("checks")
    return None if checks is not None and set(checks.values()) <= {None} else True


def choose(count: int, most: int = MOST_CASES) -> list[list[int]]:
    """Ranks of the worst, middle and best cases that are shown of `count`, worst first; all are "worst" if few."""
    if count <= most:
        return [list(range(count)), [], []]
    worst, best = most // 2, most // 4
    middle = most - worst - best
    start = min(max(count // 2 - middle // 2, worst), count - best - middle)
    return [list(range(worst)), list(range(start, start + middle)), list(range(count - best, count))]


def read_videos(folder: str, places) -> dict:
    """{(file, index): (video uint8 [T, H, W, 3], fps)} of places, dict(file, index), in the npz files of a report.

    Raises:
        UserError: a file is missing, damaged, or outside the folder, or has no such video.
    """
    by_file, found = {}, {}
    for place in places:
        by_file.setdefault(place["file"], set()).add(place["index"])
    for name, indices in by_file.items():
        path = os.path.join(folder, name)
        root = os.path.realpath(folder)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise UserError(f"the report in {folder!r} names a video outside its folder ({name!r}): it is no report")
        try:
            with np.load(path, allow_pickle=False) as file:
                videos, fps = file["videos"], float(file["fps"])
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}): it holds videos of the report, "
                            "evaluate again, which makes what is missing") from error  # fmt: skip
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): delete it and evaluate again") from error
        if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or max(indices) >= len(videos):
            raise UserError(f"{path} holds {videos.dtype} {list(videos.shape)}, where the report wants uint8 videos "
                            f"[n, T, H, W, 3] up to number {max(indices)}: delete it and evaluate again")  # fmt: skip
        found |= {(name, index): (videos[index].copy(), fps) for index in indices}
    return found


def sprite(video: np.ndarray) -> tuple[str, int, int]:
    """A video uint8 [T, H, W, 3] as (data URI of a WebP of its frames, columns, rows), no side longer than SIDE.

    Without loss where that is small.
    """
    T, H, W, _ = video.shape
    if max(H, W) > SIDE:
        size = (max(1, round(W * SIDE / max(H, W))), max(1, round(H * SIDE / max(H, W))))
        frames = [Image.fromarray(frame).resize(size, Image.Resampling.BOX) for frame in video]
        video = np.stack([np.asarray(frame) for frame in frames])
        W, H = size
    columns = min(T, max(1, _WIDEST // W))
    rows = math.ceil(T / columns)
    sheet = np.zeros((rows * columns, H, W, 3), np.uint8)
    sheet[:T] = video
    sheet = sheet.reshape(rows, columns, H, W, 3).swapaxes(1, 2).reshape(rows * H, columns * W, 3)
    data = _webp(sheet, lossless=True, quality=0, method=0)  # the quickest
    small = len(data) <= _LOSSLESS
    data = _webp(sheet, lossless=small, quality=20 if small else 88, method=1 if small else 2)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}", columns, rows


def _webp(picture, **options):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "WEBP", **options)
    return out.getvalue()


def stage(title: str, video: np.ndarray, *, start: int = 0, events=(), verdict: bool | None = None) -> str:
    """A video as an element that shows frame `start`; marks of events are drawn over it, each on its own frame.

    Args:
        verdict: whether its frame is drawn as right or wrong; None: neither.
    """
    uri, columns, rows = sprite(video)
    T, H, W, _ = video.shape
    scale = max(1, SIDE // max(H, W))
    width = min(W * scale, round(W * SIDE / max(H, W)))  # pixels of a screen
    marks = _marks(events, H, W, start, width * min(H, W) / W)
    style = f"--c:{columns};--r:{rows};width:{width}px;aspect-ratio:{W}/{H};{_position(start, columns, rows)}"
    style += f";background-image:url({uri})"
    css = {None: "stage", True: "stage right", False: "stage wrong"}[verdict]
    label = f"{title}, {T} frames of {W} by {H} pixels"
    return (
        f"<figure class=clip><figcaption><span>{escape(title, 60)}</span></figcaption>"
        f'<div class="{css}" role=img aria-label="{escape(label)}" data-n={T} data-c={columns} data-r={rows} '
        f'style="{style}">{marks}</div></figure>'
    )


def _position(frame, columns, rows):
    x, y = frame % columns, frame // columns
    return f"background-position:{100 * x / max(columns - 1, 1):.4f}% {100 * y / max(rows - 1, 1):.4f}%"


def _marks(events, height, width, start, pixels):
    """Rings with a word each; the script shows those of the frame in view. pixels: of the shorter side as shown."""
    if not events:
        return ""
    right, bottom = (side / min(height, width) for side in (width, height))  # the unit is the frame's shorter side
    line, drawn, used = 12 / pixels, [], {}
    for event in events:
        frame = int(event["frame"])
        x = min(max(float(event["x"]), 0.03), right - 0.03)
        y = min(max(float(event["y"]), 0.03), bottom - 0.03)
        at = y - line if y > 2.2 * line else y + 1.9 * line
        while any(abs(at - other) < 0.9 * line for other in used.get(frame, ())):
            at += line  # words of one frame stand below each other
        used.setdefault(frame, []).append(at)
        anchor = "start" if x < 0.3 * right else "end" if x > 0.7 * right else "middle"
        here = "" if frame == start else " hidden"
        drawn.append(
            f'<g data-frame="{frame}"{here}><circle cx="{x:.3f}" cy="{y:.3f}" r="{0.8 * line:.4f}" />'
            f'<text x="{x:.3f}" y="{at:.3f}" text-anchor="{anchor}">{escape(event["kind"], 20)}</text></g>'
        )
    style = f"font-size:{line:.4f}px;stroke-width:{0.22 * line:.4f}px"
    box = f"0 0 {right:.4f} {bottom:.4f}"
    return f'<svg class=marks viewBox="{box}" style="{style}" aria-hidden=true>{"".join(drawn)}</svg>'


def first_event(events, num_frames: int) -> int:
    """The frame that a page shows first: that of the first event, for it to be seen at once."""
    frames = [int(event["frame"]) for event in events]
    return min(max(min(frames), 0), num_frames - 1) if frames else 0


def card(stages: str, case: dict, *, num_frames: int, fps: float, start: int, tokens: str, facts, lines) -> str:
    """A case: its videos, when something happens in them, its caption and what failed.

    Args:
        stages: HTML of `stage`s. tokens: words that the page's filter knows the case by. facts: texts.
        lines: (title or None, case) of each video that was judged.
    """
    events = [event for _, judged in lines for event in judged.get("events") or []]
    last = max(num_frames - 1, 1)
    ticks = "".join(f'<i style="left:{100 * min(int(event["frame"]) / last, 1):.2f}%"></i>' for event in events)
    told = "".join(_verdict(*line) for line in lines)
    shown = " &middot; ".join(f"<span>{escape(fact, 160)}</span>" for fact in facts)
    return (
        f'<article class=case data-has="{tokens}" data-n={num_frames} data-fps="{fps:g}" data-start={start}>'
        f"<div class=pair>{stages}</div>"
        f'<div class=time aria-hidden=true>{ticks}<b style="left:{100 * start / last:.2f}%"></b></div>'
        f"<div class=at>frame <span>{start}</span> of 0 to {num_frames - 1}</div>"
        f"<p dir=auto class=caption>{escape(case.get('caption') or 'no caption', MOST_CHARACTERS)}</p>"
        f"{told}<div class=facts>{shown}</div></article>"
    )


def _verdict(title, case):
    failed, events = case["failed"], case.get("events") or []
    who = f"<em>{escape(title, 40)}</em>" if title else ""
    chips = "".join(f"<li class=bad>&#10007; {escape(name, 60)}</li>" for name in failed)
    chips += "".join(
        f'<li><button type=button data-frame="{int(event["frame"])}">{escape(event["kind"], 20)} '
        f"<small>frame {int(event['frame'])}</small></button></li>" for event in events
    )  # fmt: skip
    if verdict_of(case):
        chips = f"<li class=good>&#10003; all checks passed</li>{chips}"
    return f"<ul class=chips>{who}{chips}</ul>" if chips else ""
