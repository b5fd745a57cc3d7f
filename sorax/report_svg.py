"""Pictures of scores as inline SVG in the page's own colours: bars and dots with intervals, and curves with bands."""

import math
from dataclasses import dataclass

from data_pipelines.report_page import escape
from data_pipelines.report_plots import short

WIDTH = 380  # units of a picture; the page scales it
_LETTERS = 58  # that fit in a line of it
_COLORS = dict(ground_truth="--truth", vae="--vae", model="--accent", untrained="--floor")
_DASHES = dict(ground_truth="6 3", vae="2 3", untrained="8 3 2 3")
_OTHERS = ("--accent", "--vae", "--truth", "--c4", "--c5", "--c6")
_MOST_POINTS = 400  # of a line; more cannot be told apart


def color_of(name: str, place: int = 0) -> str:
    """CSS colour of a row or line; names that are no row's take turns."""
    return f"var({_COLORS.get(name) or _OTHERS[place % len(_OTHERS)]})"


@dataclass(frozen=True)
class Lane:
    """A value with its interval (None where unknown), the text a pointer on it shows, and its colour."""

    value: float
    lo: float | None
    hi: float | None
    hint: str
    color: str


@dataclass(frozen=True)
class Axis:
    """Of a picture of lanes. label: text of a tick's value. bars: from 0, in place of dots. log: of positive values."""

    lo: float
    hi: float
    label: object = short
    bars: bool = False
    log: bool = False

    def ticks(self):
        return log_ticks(self.lo, self.hi) if self.log else nice_ticks(self.lo, self.hi)

    def place(self, value, start, end):
        """Where on start..end a value is; beyond the ends it is at them."""
        lo, hi = (math.log(self.lo), math.log(self.hi)) if self.log else (self.lo, self.hi)
        if self.log:
            value = math.log(max(value, self.lo))
        return start + (end - start) * min(max((value - lo) / ((hi - lo) or 1), 0), 1)


def axis_of(lanes, *, label=short, may_log=True, share=False) -> Axis:
    """An axis for all of the lanes: 0 to 1 for shares, logarithmic where positive values differ 30-fold."""
    if share:
        return Axis(0.0, 1.0, label, bars=True)
    values = [v for lane in lanes for v in (lane.value, lane.lo, lane.hi) if v is not None]
    middles = [lane.value for lane in lanes]
    if may_log and min(middles) > 0 and max(middles) / min(middles) > 30:
        least = min(middles) / 2
        return Axis(max(min(values), least) if min(values) > 0 else least, max(values) * 1.1, label, log=True)
    lo, hi = min([*values, 0.0]), max([*values, 0.0])
    room = 0.04 * (hi - lo)
    return Axis(lo - room if lo < 0 else 0.0, hi + room if hi > 0 else 0.0, label)


def lanes(title: str, groups: list[tuple[str, str, list[Lane]]], axis: Axis) -> str:
    """Groups of horizontal lanes over one axis, as an <svg>.

    Args:
        groups: (label at the left, label at the right, lanes).
    """
    left, right, step, parts, y = 3, WIDTH - 10, 8, [], 4
    ticks = [(axis.place(value, left, right), axis.label(value)) for value in axis.ticks()]
    bottom = sum(24 + step * len(members) for _, _, members in groups) + 4
    parts += [f'<path d="M{x:.1f} 4V{bottom}" class=grid />' for x, _ in ticks]
    zero = axis.place(0.0, left, right)
    if not axis.log:
        parts.append(f'<path d="M{zero:.1f} 4V{bottom}" class=axis />')
    for label, note, members in groups:
        room = max(_LETTERS - len(note), 12)
        name = label if len(label) <= room else f"{label[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
        parts.append(f'<text x="{left + 4}" y="{y + 13}" class=name>{escape(name)}</text>')
        parts.append(f'<text x="{right}" y="{y + 13}" class=note>{escape(note)}</text>')
        y += 20
        for lane in members:
            parts.append(_lane(lane, axis, zero, y, left, right))
            y += step
        y += 4
    parts += [
        f'<text x="{x:.1f}" y="{bottom + 14}" class="tick{_anchor(x)}">{escape(text)}</text>' for x, text in ticks
    ]
    return _svg(title, bottom + 20, parts)


def _lane(lane, axis, zero, y, left, right):
    x, middle = axis.place(lane.value, left, right), y + 3
    mark = f'<circle cx="{x:.1f}" cy="{middle}" r="3.2" fill="{lane.color}" />'
    if axis.bars:
        mark = f'<rect x="{zero:.1f}" y="{y}" width="{max(x - zero, 1):.1f}" height="6" rx="1.5" fill="{lane.color}" />'
    whisker = ""
    if lane.lo is not None and lane.hi is not None:
        lo, hi = axis.place(lane.lo, left, right), axis.place(lane.hi, left, right)
        style = "class=whisker" if axis.bars else f'stroke="{lane.color}" stroke-width="1.6"'
        whisker = f'<path d="M{lo:.1f} {middle}H{hi:.1f}M{lo:.1f} {y}v6M{hi:.1f} {y}v6" {style} />'
    return f"<g><title>{escape(lane.hint)}</title>{mark}{whisker}</g>"


def _anchor(x):
    return " start" if x < 12 else " end" if x > WIDTH - 24 else ""


def curves(title: str, x_label: str, y_label: str, lines: dict) -> str:
    """Lines with bands over numbers, as an <svg>; the x axis is logarithmic where it spans 50-fold.

    Args:
        lines: name -> dict(x, y, and lo, hi or None). A None in y is a gap.
    """
    data = {name: _thin(line) for name, line in lines.items()}
    points = [p for some in data.values() for p in some if p[1] is not None]
    if not points:
        return "<p class=remark>No points yet.</p>"
    xs, ys = [p[0] for p in points], [v for p in points for v in p[1:] if v is not None]
    log = min(xs) > 0 and max(xs) / min(xs) >= 50
    across = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, log=log)
    low, high = min(ys), max(ys)
    if 0 <= low <= 0.6 * high:
        low = 0.0
    room = 0.05 * ((high - low) or abs(high) or 1)
    up = Axis(low - (room if low else 0), high + room)
    left, right, top, bottom = 42, WIDTH - 20, 8, 200
    parts = []
    for value in up.ticks():
        y = up.place(value, bottom, top)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" class=grid />')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="tick end">{short(value)}</text>')
    different = sorted(set(xs))  # few values are named one by one, where there is room
    spread = [across.place(x, left, right) for x in different]
    one_by_one = len(different) <= 6 and all(b - a > 24 for a, b in zip(spread, spread[1:]))
    for value in different if one_by_one else across.ticks():
        x = across.place(value, left, right)
        parts.append(f'<path d="M{x:.1f} {bottom}v4" class=axis />')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" class=tick>{short(value)}</text>')
    parts.append(f'<path d="M{left} {bottom}H{right}" class=axis />')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 34}" class=tick>{escape(x_label, 60)}</text>')
    box = (left, right, top, bottom)
    drawn = [_line(name, i, some, across, up, box) for i, (name, some) in enumerate(data.items())]
    parts += [band for band, _ in drawn] + [line for _, line in drawn]
    ends = "; ".join(f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in
                     ((n, [q for q in some if q[1] is not None]) for n, some in data.items()) if p)  # fmt: skip
    return _svg(f"{title}: {y_label} over {x_label}; {ends}", bottom + 40, parts)


def _thin(line):
    """(x, y, lo, hi) of a line, in order of x; of too many points so many, evenly."""
    none = [None] * len(line["x"])
    points = sorted(zip(line["x"], line["y"], line.get("lo") or none, line.get("hi") or none), key=lambda p: p[0])
    keep = min(len(points), _MOST_POINTS)
    return [points[round(i * (len(points) - 1) / max(keep - 1, 1))] for i in range(keep)]


def _line(name, number, points, across, up, box):
    left, right, top, bottom = box
    color, dash = color_of(name, number), _DASHES.get(name)

    def at(x, y):
        return f"{across.place(x, left, right):.1f} {up.place(y, bottom, top):.1f}"

    runs, banded = [[]], [[]]
    for x, y, lo, hi in points:
        runs[-1].append((x, y)) if y is not None else runs.append([])
        banded[-1].append((x, lo, hi)) if None not in (lo, hi) else banded.append([])
    band = "".join(
        f'<path d="M{"L".join([at(x, hi) for x, _, hi in run] + [at(x, lo) for x, lo, _ in run[::-1]])}Z" '
        f'fill="{color}" opacity=".16" />' for run in banded if len(run) > 1
    )  # fmt: skip
    path = "".join(f"M{'L'.join(at(x, y) for x, y in run)}" for run in runs if len(run) > 1)
    style = f' stroke-dasharray="{dash}"' if dash else ""
    text = f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"{style} />' if path else ""
    if len(points) <= 40:
        for x, y, lo, hi in points:
            if y is not None:
                cx, cy = at(x, y).split()
                interval = "" if None in (lo, hi) else f" [{lo:.4g}, {hi:.4g}]"
                hint = escape(f"{name}: {y:.4g}{interval} at {x:g}")
                text += f'<circle cx="{cx}" cy="{cy}" r="2.8" fill="{color}"><title>{hint}</title></circle>'
    return band, text


def key(colors: dict[str, str]) -> str:
    """A legend of {title: CSS colour}, in HTML."""
    return _legend(
        (title, 10, f'<rect y="2" width="10" height="8" rx="2" fill="{color}" />') for title, color in colors.items()
    )


def line_key(names: dict[str, str]) -> str:
    """A legend of `curves`, {line: its title} in their order, in HTML."""
    marks = (f'stroke="{color_of(name, i)}" stroke-dasharray="{_DASHES.get(name, "")}"' for i, name in enumerate(names))
    lines = (f'<path d="M0 6H22" stroke-width="2.4" {mark} />' for mark in marks)
    return _legend((title, 22, line) for title, line in zip(names.values(), lines))


def _legend(items):
    text = "".join(
        f'<span><svg width="{width}" height="12" aria-hidden=true>{mark}</svg>{escape(title, 60)}</span>'
        for title, width, mark in items
    )
    return f"<div class=keys>{text}</div>"


def gauge(value: float, lo: float, hi: float, marks: dict[str, float]) -> str:
    """A share on a line from 0 to 1 with its interval; marks: {row: share} stand there as thin lines."""
    ticks = "".join(
        f'<i style="left:{100 * share:.2f}%;background:{color_of(row)}"></i>' for row, share in marks.items()
    )
    return (
        f'<div class=gauge aria-hidden=true><b style="left:{100 * lo:.2f}%;width:{100 * (hi - lo):.2f}%"></b>{ticks}'
        f'<u style="left:{100 * value:.2f}%"></u></div>'
    )


def nice_ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Round values within lo..hi, about `count` of them."""
    span = hi - lo
    if span <= 0:
        return [lo]
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * k for k in (1, 2, 5, 10) if span / (size * k) <= count + 0.5)
    first = math.ceil(lo / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(hi / step + 1e-9) + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """Powers of ten within lo..hi; also twice and five times those where there are few."""
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    every = max(1, len(powers) // 6)
    ticks = [10.0**p for p in powers[::every] if lo <= 10.0**p <= hi]
    if len(ticks) < 3:
        ticks = [k * 10.0**p for p in powers for k in (1, 2, 5) if lo <= k * 10.0**p <= hi]
    return ticks or [lo, hi]


def _svg(title, height, parts):
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role=img aria-label="{escape(title, 600)}" class=chart>'
        f"{''.join(parts)}</svg>"
    )
