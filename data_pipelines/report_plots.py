"""Plots of a data report as inline SVG, whose colours are CSS variables: one picture for light and for dark pages.

matplotlib draws in a few colours that nothing else uses; they are replaced by `var(--ink)` and so on, which the page
defines.
"""

import io
import re

import numpy as np

INK, GRID, FILES, TRAINED = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_VARIABLES = {INK: "--ink-2", GRID: "--line", FILES: "--files", TRAINED: "--accent"}
_SIZE = (4.3, 2.5)  # inches; the page scales it
_MOST_POINTS = 3000  # of a scatter plot; more become a heat map
_RATIOS = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9), (21, 9))


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=8, length=3, color=GRID, which="both")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=8)
    return figure, axes


def _svg(figure, name):
    """The figure as an <svg> element; equal figures give equal text."""
    import matplotlib

    out = io.StringIO()
    # The salt keeps ids of several pictures on one page apart; text stays text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="(figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend)_[0-9]+"', "", text)
    head, rest = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest  # the viewBox stays: the page sets the size


def edges_of(values, log=False, most=48):
    """Edges float64 [bins + 1] of a histogram; whole numbers of few different values get a bin each."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        half = 0.5 if not log else low * 0.1
        return np.array([low - half, high + half])
    whole = bool(np.all(values == np.rint(values)))
    if whole and not log and high - low < most:
        return np.arange(low, high + 2) - 0.5
    if log and low > 0 and high / low > 4:
        return np.geomspace(low, high * (1 + 1e-9), most // 2 + 1)
    count = most // 2
    step = (high - low) / count
    if whole:  # bins of equally many whole numbers, else every other bin looks empty
        step = np.ceil(step)
        return low - 0.5 + step * np.arange(np.ceil((high - low + 1) / step) + 1)
    return low + step * np.arange(count + 1) + np.where(np.arange(count + 1) == count, 1e-9 * abs(high), 0)


def histogram(name, series, edges, *, xlabel, log=False, ylabel="samples"):
    """Bars of one or two series of counts over the same bins.

    Args:
      series: {label: counts int64 [bins]}; the last is filled, one before it is an outline.
      log: logarithmic x axis.
    Returns the text of an <svg>.
    """
    figure, axes = _figure()
    items = list(series.items())
    for label, counts in items[:-1]:
        axes.stairs(counts, edges, color=FILES, linewidth=1.2, label=label)
    axes.stairs(items[-1][1], edges, fill=True, color=TRAINED, label=items[-1][0])
    if log:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    elif np.all(edges % 1 == 0.5):  # bins of whole numbers
        from matplotlib.ticker import FixedLocator, MaxNLocator

        few = edges[-1] - edges[0] <= 8
        axes.xaxis.set_major_locator(FixedLocator(edges[:-1] + 0.5) if few else MaxNLocator(8, integer=True))
        if few:
            axes.set_xlim(edges[0] - 1, edges[-1] + 1)
    if len(items) > 1:
        axes.legend(fontsize=7, labelcolor=INK, frameon=False, loc="best", handlelength=1.2)
    _counts_axis(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _svg(figure, name)


def _counts_axis(axes):
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _plain_ticks(axis):
    """100, 1k, 10k in place of powers of ten; between them 2 and 5 where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    if low > 0 and high / low < 60:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def short(value):
    """1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def aspects(name, counts, edges):
    """Bars of aspect ratios, width / height on a logarithmic axis with the usual ratios named."""
    figure, axes = _figure()
    axes.stairs(counts, edges, fill=True, color=TRAINED)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    shown = [(w / h, f"{w}:{h}") for w, h in _RATIOS if low <= w / h <= high]
    if shown:
        axes.set_xticks([ratio for ratio, _ in shown], [text for _, text in shown])
        axes.set_xticks([], minor=True)
    else:
        _plain_ticks(axes.xaxis)
    _counts_axis(axes)
    axes.set_xlabel("width : height")
    axes.set_ylabel("samples")
    return _svg(figure, name)


def sizes(name, files, trained):
    """Width against height: of the files, and as trained.

    Args: files and trained: (widths [k], heights [k], counts [k]) of the different sizes. Discs have an area that
      grows with the count; beyond 3000 sizes a heat map takes their place.
    Returns the text of an <svg>.
    """
    figure, axes = _figure()
    for (widths, heights, counts), color, label, filled in (
        (files, FILES, "in the files", False),
        (trained, TRAINED, "as trained", True),
    ):
        if not len(widths):
            continue
        if len(widths) > _MOST_POINTS:
            _heat(axes, widths, heights, counts, color, label)
            continue
        area = 14 + 260 * np.sqrt(counts / counts.max()) * (len(widths) > 1)
        style = dict(facecolors="none", edgecolors=color)
        if filled:
            style = dict(facecolors=color, alpha=0.55, linewidths=0)
        axes.scatter(widths, heights, s=area, label=label, **style)
    every = np.concatenate([files[0], files[1], trained[0], trained[1]]).astype(float)
    low, high = every.min() / 1.3, every.max() * 1.3
    axes.set(xlim=(low, high), ylim=(low, high), xscale="log", yscale="log", xlabel="width (pixels)")
    axes.set_ylabel("height (pixels)")
    axes.plot([low, high], [low, high], color=GRID, linewidth=0.8, zorder=0)
    axes.grid(axis="both", color=GRID, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    handles = axes.get_legend_handles_labels()
    if handles[0]:
        legend = axes.legend(*handles, fontsize=7, labelcolor=INK, frameon=False, loc="upper left", markerscale=0.5)
        for handle in legend.legend_handles:
            if hasattr(handle, "set_sizes"):
                handle.set_sizes([24])
    return _svg(figure, name)


def _heat(axes, widths, heights, counts, color, label):
    """A 2-D histogram in one colour: the more samples, the less transparent, on a logarithmic scale."""
    edges = [np.geomspace(v.min(), v.max() * 1.0001 + 1e-6, 41) for v in (widths.astype(float), heights.astype(float))]
    table, _, _ = np.histogram2d(widths, heights, bins=edges, weights=counts)
    x, y = np.nonzero(table)
    opacity = 0.15 + 0.85 * np.log1p(table[x, y]) / np.log1p(table.max())
    from matplotlib.collections import PolyCollection

    left, right, bottom, top = edges[0][x], edges[0][x + 1], edges[1][y], edges[1][y + 1]
    corners = np.stack([[left, bottom], [right, bottom], [right, top], [left, top]]).transpose(2, 0, 1)  # [cells, 4, 2]
    cells = PolyCollection(corners, facecolors=color, linewidths=0, label=label)
    cells.set_alpha(opacity)
    axes.add_collection(cells)
