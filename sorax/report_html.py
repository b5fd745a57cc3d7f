"""The page of an evaluation: one HTML file with its pictures, curves and videos inside, that reaches nothing outside.

It is made of the scores of a suite (see `sorax.suite`) and the videos that they name. Whatever is text of others, such
as a caption, is escaped.
"""

import math
import os

from data_pipelines.report_page import document, escape, percent, table
from sorax import config as config_lib
from sorax.report_assets import SCRIPT, STYLE
from sorax.report_clips import card, choose, first_event, ranked, read_videos, stage, verdict_of
from sorax.report_svg import Lane, axis_of, color_of, curves, gauge, key, lanes, line_key
from sorax.score_report import writing

PAGE = "index.html"
MOST_BYTES = 24_000_000  # of all videos on a page
SHARE = "share"  # unit of a mean that is read in per cent
FIRST = 6  # cases of a part that are unfolded; the style sheet knows it too
_ROWS = {"ground_truth": "ground truth", "vae": "VAE", "model": "model", "untrained": "untrained model"}


def write_report(folder: str, scores: dict, most_bytes: int = MOST_BYTES) -> str:
    """Writes the page of a suite's scores to `folder/index.html`, and returns its path.

    Args:
        folder: of the report, with the npz files that the scores name.
        scores: what scores.json holds.
        most_bytes: of all videos on the page. Of each part the 12 worst cases, 6 from the middle and the 6 best are
            shown, or fewer where they would take more than that.

    Raises:
        UserError: a video is missing or damaged, or the folder cannot be written.
    """
    parts, filters, sections, left = scores["parts"], Filters(), "", most_bytes
    for i, (name, part) in enumerate(parts.items()):
        gallery, spent = _gallery(folder, part, filters, left / (len(parts) - i))
        left -= spent
        sections += _part(f"part-{i}", name, part, gallery)
    titles = {f"part-{i}": part["title"] for i, part in enumerate(parts.values())}
    sub = (
        f"Suite {escape(scores['suite'])}, version {escape(scores['version'])}; "
        f"checkpoint <code>{escape(scores.get('checkpoint') or 'none')}</code>, "
        f"config <code>{escape(scores.get('config') or 'none')}</code>. Intervals are of 95 %."
    )
    step = scores.get("step")
    body = (
        controls(titles, filters) + _heads(parts) + plots_section("Training", "training", scores.get("curves"))
        + sections + _made(scores)
    )  # fmt: skip
    links = {"results": "Results", "training": "Training", "made": "How it was made"}
    if not scores.get("curves"):
        del links["training"]
    heading = f"{scores['run']}, step {step:,}" if step is not None else str(scores["run"])
    text = document("evaluation", heading, sub, body, links=links, style=STYLE, script=SCRIPT)
    path = os.path.join(folder, PAGE)
    with writing(folder):
        config_lib.write_atomic(path, text)
    return path


# --- Numbers as people read them


def row_title(row: str) -> str:
    """A row in words."""
    return _ROWS.get(row, row.replace("_", " "))


def scored_row(rows: dict) -> str | None:
    """Which row is what is evaluated: the model, or else the first one. Its cases are those of the part."""
    return "model" if "model" in rows else next(iter(rows), None)


def is_share(cell: dict) -> bool:
    """Whether a cell is read in per cent: a rate, or a mean of shares."""
    return cell["kind"] == "rate" or cell.get("unit") == SHARE


def texts_of(cell: dict, *values) -> list[str]:
    """Values in the form of a cell, without its unit: the digits of all are those of the first, three."""
    if is_share(cell):
        return [f"{'-' if value < 0 else ''}{percent(abs(value))}" for value in values]
    size = abs(values[0])
    if size and not 1e-5 <= size < 1e7:
        return [f"{value:.3g}" for value in values]
    digits = max(0, 2 - math.floor(math.log10(size))) if size else 3
    return [f"{value:,.{digits}f}" for value in values]


def unit_of(cell: dict) -> str:
    """The unit as it stands behind a value."""
    return "" if is_share(cell) or not cell.get("unit") else f" {cell['unit']}"


def value_text(cell: dict | None, unit: bool = True) -> str:
    """A cell's value with its unit; "none asked" where nothing was."""
    if not cell or cell["value"] is None:
        return "none asked" if cell and cell["n"] == 0 else "none"
    return texts_of(cell, cell["value"])[0] + (unit_of(cell) if unit else "")


def interval_text(cell: dict | None) -> str:
    """[lo, hi] of a cell; nothing where it has none."""
    if not cell or cell["value"] is None or cell.get("lo") is None or cell.get("hi") is None:
        return ""
    _, lo, hi = texts_of(cell, cell["value"], cell["lo"], cell["hi"])
    return f"[{lo.removesuffix(' %')}, {hi.removesuffix(' %')}]"


def count_text(cell: dict) -> str:
    """Of how many a cell is."""
    return f"{cell['k']:,} of {cell['n']:,}" if cell.get("k") is not None else f"n = {cell['n']:,}"


def cell_html(cell: dict | None) -> str:
    """A cell of a table: value, interval and n below each other."""
    if not cell or cell["value"] is None:
        return f"<small class=none>{value_text(cell)}</small>"
    small = "".join(f"<small>{text}</small>" for text in (interval_text(cell), count_text(cell)) if text)
    return f"<b>{value_text(cell, unit=False)}</b>{small}"


def metric_head(title: str, cells) -> str:
    """The head of a metric's column, with the unit of its cells."""
    unit = next((unit_of(cell) for cell in cells if cell), "").strip()
    return f"#{escape(title, 60)}{f'<small>{escape(unit, 20)}</small>' if unit else ''}"


# --- Sections


class Filters:
    """What cases can be filtered by: failed checks and kinds of events, each with how many shown cases have it."""

    def __init__(self):
        self.words, self.counts, self.frames = {}, {}, 1

    def add(self, failed, events, num_frames: int, *others: tuple[str, str]) -> str:
        """Counts a case, and returns its words for the page's script; others: (group, text) of the page's own."""
        names = {("check", name) for name in failed} | {("event", event["kind"]) for event in events} | set(others)
        self.frames = max(self.frames, num_frames)
        for name in sorted(names):
            self.words.setdefault(name, f"w{len(self.words)}")
            self.counts[name] = self.counts.get(name, 0) + 1
        return " ".join(sorted(self.words[name] for name in names))

    def options(self) -> str:
        """<option>s for all of them, in groups."""
        text = ""
        groups = dict(all="", check="failed check", event="event in the video")
        for group, label in groups.items():
            items = "".join(
                f'<option value="{self.words[name]}">{escape(name[1], 60)} ({count:,})</option>'
                for name, count in sorted(self.counts.items()) if name[0] == group
            )  # fmt: skip
            text += f'<optgroup label="{label}">{items}</optgroup>' if label and items else items
        return text


def controls(parts: dict[str, str], filters: Filters) -> str:
    """The bar that filters a page by part and check and runs its videos in step; parts: {id of a section: title}."""
    items = "".join(f'<option value="{name}">{escape(title, 80)}</option>' for name, title in parts.items())
    text = f'<label><select name=part aria-label="Part"><option value="">all parts</option>{items}</select></label>'
    if filters.words:
        text += (
            '<label><select name=check aria-label="Cases by what failed"><option value="">all cases</option>'
            f"{filters.options()}</select></label>"
            "<div class=frames><button type=button aria-pressed=false>Play all</button>"
            f'<input type=range min=0 max={filters.frames - 1} value=0 step=1 aria-label="Frame of all videos">'
            "<output></output></div>"
        )
    return f"<div class=controls hidden>{text}</div>"  # for the script, which shows it


def _heads(parts):
    tiles = []
    for i, part in enumerate(parts.values()):
        row, name = scored_row(part["rows"]), part["headline"]
        cell = part["rows"].get(row, {}).get(name)
        beside = {
            other: cells[name] for other, cells in part["rows"].items()
            if other != row and cells.get(name) and cells[name]["value"] is not None
        }  # fmt: skip
        hint = ", ".join(f"{row_title(other)} {value_text(c, unit=False)}" for other, c in beside.items())
        line = ""
        if cell and is_share(cell) and cell["value"] is not None:
            line = gauge(cell["value"], cell["lo"], cell["hi"], {o: c["value"] for o, c in beside.items()})
        unit = f"<i>{escape(unit_of(cell))}</i>" if cell and cell["value"] is not None else ""
        tiles.append(
            f'<a class=tile href="#part-{i}"><div class=label><b>{escape(part["title"], 100)}</b>'
            f"{escape(part['metrics'].get(name, name), 60)}</div>"
            f"<div class=value>{value_text(cell, unit=False)}{unit}<small>{interval_text(cell)}</small></div>{line}"
            f"<div class=hint>{escape(hint)}</div></a>"
        )
    return f'<div class="tiles heads" id=results>{"".join(tiles)}</div>'


def plots_section(title: str, name: str, series: list | None) -> str:
    """A section of curves; nothing where there are none."""
    if not series:
        return ""
    return f'<section id="{name}"><h2>{title}</h2><div class=plots>{_curves(series)}</div></section>'


def _curves(series):
    text = ""
    for entry in series:
        names = {name: row_title(name) for name in entry["lines"]}
        picture = curves(entry["title"], entry["x_label"], entry["y_label"], entry["lines"])
        legend = line_key(names) if len(names) > 1 else ""
        caption = f"{escape(entry['title'], 120)}<small>{escape(entry['y_label'], 80)}</small>"
        text += f"<figure><figcaption>{caption}</figcaption>{legend}{picture}</figure>"
    return text


def _part(identity, name, part, gallery):
    pictures = _bars(part) + _curves(part.get("series") or [])
    return (
        f'<section id="{identity}" class=part><h2>{escape(part["title"], 160)}</h2>'
        f"<p class=about>{escape(part.get('about') or '')}</p>{_scores_table(part)}"
        f"<div class=plots>{pictures}</div>{gallery}"
        f"<p class=remark>Part <code>{escape(name)}</code>, data <code>{escape(part.get('data') or 'none')}</code>.</p>"
        "</section>"
    )


def _scores_table(part):
    scored, rows = scored_row(part["rows"]), []
    for i, (row, cells) in enumerate(part["rows"].items()):
        css = " class=me" if row == scored else ""
        first = f'<span{css}><i class=dot style="background:{color_of(row, i)}"></i>{escape(row_title(row), 60)}</span>'
        rows.append([first, *(cell_html(cells.get(metric)) for metric in part["metrics"])])
    columns = {metric: [cells.get(metric) for cells in part["rows"].values()] for metric in part["metrics"]}
    heads = ["", *(metric_head(title, columns[metric]) for metric, title in part["metrics"].items())]
    return table(heads, rows, "scores")


def _bars(part):
    """Rates as bars over one axis; other numbers as dots, those of one unit over one axis."""
    families = {}
    for metric in part["metrics"]:
        cells = {row: cells[metric] for row, cells in part["rows"].items() if metric in cells}
        cells = {row: cell for row, cell in cells.items() if cell["value"] is not None}
        if cells:
            cell = next(iter(cells.values()))
            family = (SHARE, None) if is_share(cell) else (cell.get("unit", ""), cell.get("better"))
            families.setdefault(family, {})[metric] = cells
    return "".join(_lanes(part, *family, members) for family, members in families.items())


def _lanes(part, unit, better, members):
    places = {row: i for i, row in enumerate(part["rows"])}
    scored, groups, rows = scored_row(part["rows"]), [], {}
    for metric, cells in members.items():
        made = []
        for row, cell in cells.items():
            rows[row_title(row)] = color_of(row, places[row])
            hint = f"{row_title(row)}: {value_text(cell)} {interval_text(cell)}, {count_text(cell)}"
            made.append(Lane(cell["value"], cell.get("lo"), cell.get("hi"), hint, color_of(row, places[row])))
        mine = cells.get(scored)
        note = f"{value_text(mine, unit=False)} {interval_text(mine)}" if mine else ""
        groups.append((part["metrics"][metric], note, made))
    flat = [lane for _, _, made in groups for lane in made]
    if unit == SHARE:
        title, remark = "Shares", "with the 95 % interval"
        axis = axis_of(flat, share=True, label=lambda value: f"{100 * value:.0f} %")
    else:
        title, axis = f"Means ({unit})" if unit else "Means", axis_of(flat)
        words = {"low": "lower is better", "high": "higher is better"}.get(better)
        remark = ", ".join(filter(None, [words, "logarithmic axis" if axis.log else "", "with the 95 % interval"]))
    return lanes_figure(title, remark, rows, groups, axis)


def lanes_figure(title: str, remark: str, colors: dict[str, str], groups: list, axis) -> str:
    """A figure of lanes (see `sorax.report_svg.lanes`), many groups side by side in columns; colors: its legend."""
    count = min(3, math.ceil(len(groups) / 4))
    ends = [math.ceil(i * len(groups) / count) for i in range(count + 1)]
    some = [groups[a:b] for a, b in zip(ends, ends[1:])]
    pictures = "".join(lanes(f"{title}: {'; '.join(f'{a} {b}' for a, b, _ in part)}", part, axis) for part in some)
    wide = " class=wide" if count > 1 else ""
    return (
        f"<figure{wide}><figcaption>{escape(title)}<small>{escape(remark)}</small></figcaption>{key(colors)}"
        f"<div class=columns>{pictures}</div></figure>"
    )


def _gallery(folder, part, filters, most_bytes):
    """HTML of a part's cases, worst first, and the bytes that it takes."""
    every = part.get("cases") or []
    headline = part["rows"].get(scored_row(part["rows"]), {}).get(part["headline"]) or {}
    cases = ranked([case for case in every if case.get("video")], part["headline"], headline.get("better"))
    if not cases:
        return "", 0
    who, groups = row_title(scored_row(part["rows"])), choose(len(cases))
    # Where bytes are few, the most telling come first: the worst, the best, one from the middle, and so on.
    turns = (groups[0], groups[2][::-1], groups[1])
    wanted = [group[i] for i in range(max(map(len, turns))) for group in turns if i < len(group)]
    places = [place for rank in wanted for place in (cases[rank]["video"], cases[rank].get("truth")) if place]
    videos, made, spent = read_videos(folder, places), {}, 0
    for rank in wanted:
        case = cases[rank]
        stages, frames, fps, start = _stages(case, videos, who)
        if made and spent + len(stages) > most_bytes:
            break
        spent += len(stages)
        right = verdict_of(case)
        values = [(title, (case.get("values") or {}).get(name)) for name, title in part["metrics"].items()]
        facts = [f"{rank + 1:,} of {len(cases):,}, worst first", f"score {case.get('score') or 0:.2f}",
                 *(f"{title} {value:.3g}" for title, value in values if value is not None),
                 f"seed {case['seed']}", case["id"]]  # fmt: skip
        whole = [] if right is None else [("all", "passed all checks" if right else "failed any check")]
        tokens = filters.add(case["failed"], case.get("events") or [], frames, *whole)
        made[rank] = card(stages, case, num_frames=frames, fps=fps, start=start, facts=facts, tokens=tokens,
                          lines=[(None, case)])  # fmt: skip
    shown = [sum(rank in made for rank in group) for group in groups]
    return gallery_html("Cases", _shown(shown, len(cases), len(every)), [made[rank] for rank in sorted(made)]), spent


def _stages(case, videos, who):
    """Videos of a case in HTML, the longest one's frames, their rate, and the frame that is shown first."""
    video, fps = videos[case["video"]["file"], case["video"]["index"]]
    events, frames = case.get("events") or [], len(video)
    start = first_event(events, frames)
    text = stage(who, video, start=start, events=events, verdict=verdict_of(case))
    if case.get("truth"):
        truth, _ = videos[case["truth"]["file"], case["truth"]["index"]]
        text, frames = text + stage("ground truth", truth, start=min(start, len(truth) - 1)), max(frames, len(truth))
    return text, frames, fps, start


def _shown(shown, kept, count):
    worst, middle, best = shown
    if worst + middle + best == count:
        return f"All {count:,} cases, from worst to best."
    text = f"{worst + middle + best:,} of {count:,} cases, from worst to best: "
    text += f"the {worst:,} worst" + (f", {middle:,} from the middle" if middle else "")
    text += f", the {best:,} best" if best else ""
    return f"{text}.{f' Of {kept:,} the videos were kept.' if kept < count else ''}"


def gallery_html(title: str, remark: str, cards: list[str], wide: bool = False) -> str:
    """A title, how many of how many cases are shown, and their cards, of which the page unfolds the first ones."""
    more = f"Show all {len(cards)}"
    button = f'<button type=button class=more data-more="{more}" hidden>{more}</button>' if len(cards) > FIRST else ""
    return (
        f"<div class=gallery><h3>{title}</h3><p class=remark>{remark}<span class=found></span> "
        "Point at a video to play it; press an event to see its frame.</p>"
        f'<div class="cases{" wide" if wide else ""}">{"".join(cards)}</div>{button}</div>'
    )


def _made(scores):
    """What was evaluated and how, for whoever repeats it."""
    names = ("run", "kind", "step", "checkpoint", "config", "code", "code_version", "suite", "version", "seed")
    facts = {name.replace("_", " "): scores[name] for name in names if scores.get(name) is not None}
    facts |= {f"sampling: {name}": value for name, value in (scores.get("sampling") or {}).items()}
    rows = [[escape(name, 80), f"<code>{escape(value, 200)}</code>"] for name, value in facts.items()]
    remark = (
        "All numbers are in scores.json, all videos in samples/, as they were judged. On this page large videos are "
        "smaller or compressed, and small ones are enlarged. Frames count from 0."
    )
    return (
        f'<section id="made"><h2>How it was made</h2>{table(("", ""), rows, "facts")}'
        f"<p class=remark>{remark}</p></section>"
    )
