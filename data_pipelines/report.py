"""`sorax data report`: what a run will be trained on, before it is paid for.

`make_report` writes into a folder report.html (one page with everything inside), report.json (its numbers), and
rejected.csv and duplicates.csv (all names, where the page shows the first ones).
"""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np

from data_pipelines import report_pictures, report_plots
from data_pipelines.report_curation import find_curation, read_curation
from data_pipelines.report_fit import Settings
from data_pipelines.report_numbers import analyse, column, general
from data_pipelines.report_page import page
from data_pipelines.report_warnings import find_warnings
from data_pipelines.text_tokens import BYTES
from sorax.errors import UserError

PAGE, NUMBERS, REJECTED, DUPLICATES = "report.html", "report.json", "rejected.csv", "duplicates.csv"


def make_report(
    index, out, settings: Settings, *, ranks=1, curation=None, source=None, processes=None, say=lambda text: None
):
    """Write the report of an index into the folder `out`, which is made; files of an older report are replaced.

    Args:
      index: a `data_pipelines.index.Index`. ranks: data-parallel ranks of the planned run.
      curation: file or folder that `sorax data curate` wrote; None looks beside the indexed files.
      source: what was indexed if that was no folder, for thumbnails; its samples are numbered as the index's rows.
      processes: that decode thumbnails, None for one a CPU. say: is told what is done, a line each.
    Returns: the numbers, as in report.json.
    Raises: UserError where the report cannot be written, the curation cannot be read, or the settings cannot be used.
    """
    out = _make_folder(out)
    say(f"{len(index):,} samples")
    analysis = analyse(index, settings, ranks)
    numbers, arrays = analysis.numbers, analysis.arrays
    path, kind = str(index.settings["source"]["path"]), index.settings["source"]["kind"]
    numbers["source"] = dict(path=path, kind=kind, identity=index.identity, limits=index.settings.get("limits", {}))
    numbers["warnings"] = find_warnings(numbers, arrays)
    folder = path if kind == "folder" else None
    found = read_curation(curation) if curation else find_curation(folder) if folder else None
    numbers["curation"] = found and found.numbers
    say("thumbnails")
    draw = _Draw(index, folder, source, processes)
    cards = dict(
        kept=_kept_cards(index, draw, arrays),
        rejected=_rejected_cards(index, draw, analysis.rejected),
        dropped=found.cards(processes) if found else [],
    )
    numbers["shown"] = {name: [card["key"] for card in some] for name, some in cards.items()}
    say("plots")
    plots, numbers["histograms"] = make_plots(analysis, settings)
    text = page(numbers, plots, cards)
    try:
        keys = column(index, "key", [row for row, _, _ in analysis.rejected]).to_pylist()
        rows = ((key, stage, reason) for key, (_, stage, reason) in zip(keys, analysis.rejected))
        _write_csv(out / REJECTED, ("file", "stage", "reason"), rows)
        rows = ((group, key) for group, keys in enumerate(analysis.duplicates, 1) for key in keys)
        _write_csv(out / DUPLICATES, ("group", "file"), rows)
        _write(out / PAGE, text)
        _write(out / NUMBERS, json.dumps(_plain(numbers), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"the report in {out} cannot be written ({error.strerror or error}): free space, or name another folder "
            "with --out"
        ) from error
    return numbers


def make_plots(analysis, settings):
    """({title: (svg, remark)}, {name: {"edges": ..., series: counts}}) of the kept samples; empty if there are none."""
    arrays, numbers, plots, histograms = analysis.arrays, analysis.numbers, {}, {}
    if not len(arrays.rows):
        return plots, histograms
    video = arrays.video
    counted = [np.unique(np.stack(pair), axis=1, return_counts=True)
               for pair in ((arrays.own_width, arrays.own_height), (arrays.width, arrays.height))]  # fmt: skip
    plots["Size"] = report_plots.sizes("size", *((*sizes, counts) for sizes, counts in counted)), "width and height"
    aspect = arrays.width / arrays.height
    edges = np.geomspace(aspect.min() / 1.08, aspect.max() * 1.08, 32)
    histograms["aspect"] = {"edges": edges.tolist(), "as trained": np.histogram(aspect, edges)[0].tolist()}
    plots["Aspect ratio"] = report_plots.aspects("aspect", np.histogram(aspect, edges)[0], edges), "as trained"

    def plot(title, name, series, xlabel, remark="", **options):
        series = {label: values[np.isfinite(values)] for label, values in series.items() if len(values)}
        if not series:
            return
        everything = np.concatenate(list(series.values()))
        log = options.get("log", False) and everything.min() > 0 and everything.max() > 4 * everything.min()
        edges = report_plots.edges_of(everything, log=log)
        counts = {label: np.histogram(values, edges)[0] for label, values in series.items()}
        options["log"] = log
        histograms[name] = {"edges": edges.tolist(), **{label: some.tolist() for label, some in counts.items()}}
        plots[title] = report_plots.histogram(name, counts, edges, xlabel=xlabel, **options), remark

    own_fps, fps = arrays.own_fps[video].round(2), arrays.fps[video].round(2)
    estimated = ", partly estimated" if numbers["captions"]["estimated"] else ""
    plot("Frames", "frames", {"as trained": arrays.num_frames}, "frames", "as trained; an image is one frame")
    plot("Length", "seconds", {"in the files": arrays.own_seconds[video], "as trained": arrays.seconds[video]},
         "seconds", "videos only", log=True)  # fmt: skip
    plot("Frame rate", "fps", {"in the files": own_fps, "as trained": fps}, "frames per second", "videos only")
    plot("Caption length", "characters", {"captions": arrays.characters}, "characters", "kept samples")
    if settings.rows:
        plot("Video tokens", "tokens", {"as trained": arrays.tokens}, "tokens a sample",
             f"a row holds {settings.row_tokens:,}", log=True)  # fmt: skip
        plot("Text tokens", "text", {"captions": arrays.text}, "tokens a caption",
             f"end mark included, tokenizer {settings.tokenizer or BYTES}{estimated}")  # fmt: skip
        plot("Samples a row", "row", {"rows": analysis.row_sizes}, "samples a row",
             f"first epoch; at most {settings.max_segments}", ylabel="rows")  # fmt: skip
    else:
        plot("Video tokens", "tokens", {"as trained": arrays.tokens}, "latent positions a sample", log=True)
    return plots, histograms


# --- Thumbnails


class _Draw:
    """Draws rows of the index: files of a folder, or samples of a source; without either there are no pictures."""

    def __init__(self, index, folder, source, processes):
        self.index, self.folder, self.source, self.processes = index, folder, source, processes

    def __call__(self, rows, clip_of):
        """(row, Picture or Failure) of each row; clip_of: row -> what to show of its file, as keywords of a Clip."""
        if self.folder:
            keys = column(self.index, "key", rows).to_pylist()
            clips = [report_pictures.Clip(self.folder, key, **clip_of(row)) for key, row in zip(keys, rows)]
            outcomes = report_pictures.draw_all(report_pictures.draw_clip, clips, processes=self.processes)
        elif self.source is not None:
            function = report_pictures.DrawSample(self.source)
            outcomes = report_pictures.draw_all(function, rows, processes=self.processes)
        else:
            return
        yield from ((row, outcome) for row, (_, outcome) in zip(rows, outcomes))


def _kept_cards(index, draw, arrays):
    place = {int(arrays.rows[i]): i for i in report_pictures.pick_kept(len(arrays.rows)).tolist()}

    def clip_of(row):
        i = place[row]
        seconds = float((arrays.num_frames[i] - 1) / arrays.fps[i]) if arrays.video[i] else 0.0
        return dict(frames=min(report_pictures.FRAMES, int(arrays.num_frames[i])), height=int(arrays.height[i]),
                    width=int(arrays.width[i]), seconds=seconds)  # fmt: skip

    cards = []
    for row, outcome in draw(list(place), clip_of):
        i = place[row]
        width, height = int(arrays.width[i]), int(arrays.height[i])
        length = _length(int(arrays.num_frames[i]), arrays.fps[i], arrays.video[i])
        facts = [f"{width}x{height}", length, f"{arrays.tokens[i]:,} tokens"]
        if (width, height) != (arrays.own_width[i], arrays.own_height[i]):
            facts.append(f"file {arrays.own_width[i]}x{arrays.own_height[i]}")
        cards.append(report_pictures.card(
            *_texts(index, row), facts, outcome, tokens=int(arrays.tokens[i]),
            pixels=width * height, seconds=float(arrays.seconds[i]), characters=int(arrays.characters[i]),
        ))  # fmt: skip
    return cards


def _texts(index, row):
    return index.table["key"][row].as_py(), index.table["caption"][row].as_py()


def _length(num_frames, fps, video):
    if not video:
        return "image"
    return f"{num_frames} frame{'' if num_frames == 1 else 's'}, {num_frames / fps:.1f} s"


def _rejected_cards(index, draw, rejected):
    columns = index.columns
    picked = dict(report_pictures.pick_rejected(rejected, general))

    def clip_of(row):
        height, width, seconds = (columns[name][row].item() for name in ("height", "width", "span"))
        return dict(frames=report_pictures.FRAMES, height=height, width=width, seconds=seconds, broken=True)

    cards = []
    for row, outcome in draw(list(picked), clip_of):
        height, width = columns["height"][row], columns["width"][row]
        facts = [f"{width}x{height}"] if height else []
        card = report_pictures.card(*_texts(index, row), facts, outcome)
        cards.append(card | dict(tag=picked[row]))
    return cards


# --- Files


def _make_folder(out):
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"report folder {out} cannot be made ({error.strerror}): name another with --out") from error
    return Path(out)


def _write(path, text):
    """The whole file or none."""
    part = path.with_name(path.name + ".partial")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)


def _write_csv(path, heads, rows):
    part = path.with_name(path.name + ".partial")
    with open(part, "w", encoding="utf-8", errors="replace", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(heads)
        writer.writerows(rows)
    os.replace(part, path)


def _plain(value):
    """Numbers and texts that JSON has: numpy's become Python's, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
