"""The page that holds evaluations against each other: differences, their significance, and cases that changed sides.

The statistics are in `sorax.comparison`.
"""

import json
import os

from data_pipelines.report_page import document, escape, table
from sorax import config as config_lib
from sorax.comparison import compare, difference_text, p_text, paired_cases, text_table
from sorax.report_assets import SCRIPT, STYLE
from sorax.report_clips import card, first_event, read_videos, stage, verdict_of
from sorax.report_html import (
    MOST_BYTES,
    SHARE,
    Filters,
    cell_html,
    controls,
    gallery_html,
    is_share,
    lanes_figure,
    metric_head,
)
from sorax.report_svg import Lane, axis_of, color_of
from sorax.score_report import make_folder, without_nan, writing

MOST_CASES = 12  # shown of those that one run got right and the other wrong, and of the others
_CSS = {"better": "better", "worse": "worse"}
_COLORS = {"better": "var(--good)", "worse": "var(--bad)"}


def compare_reports(folders: list[str], out: str) -> dict:
    """Compares reports of one suite, and writes compare.html, compare.json and compare.txt to the folder `out`.

    Args:
        folders: two or more report folders; the first is what the others are compared with.

    Returns:
        What compare.json holds: `runs`, `notes`, `methods`, `tests` (how many there were), and `parts`: part ->
        title, headline, `cases` {label: dict(both, neither, only_a, only_b)} where the cases are the same, and
        `metrics` -> title, unit, better, `cells` {label: cell}, `differences` {label: dict(difference, lo, hi, p,
        p_holm, n, method, paired, why, verdict)}: the run of that label less run A. why: why it is not paired.

    Raises:
        UserError: fewer than two folders, one of them twice or no report, reports of different suites or versions or
            with no part in common, a video that is missing, or `out` cannot be written.
    """
    result, reports = compare(folders)
    make_folder(out)
    page = _page(result, folders, reports)
    with writing(out):
        config_lib.write_atomic(os.path.join(out, "compare.html"), page)
        config_lib.write_atomic(os.path.join(out, "compare.txt"), text_table(result))
        text = json.dumps(without_nan(result), indent=1, allow_nan=False)
        config_lib.write_atomic(os.path.join(out, "compare.json"), text + "\n")
    return result


def _page(result, folders, reports):
    filters, sections, left = Filters(), "", MOST_BYTES
    for i, (name, part) in enumerate(result["parts"].items()):
        galleries = ""
        share = left / (len(result["parts"]) - i)
        for run, folder, report in list(zip(result["runs"], folders, reports))[1:]:
            pair = (folders[0], reports[0]["parts"][name]), (folder, report["parts"][name])
            text, spent = _galleries(run["label"], *pair, filters, share / (len(folders) - 1))
            galleries, left = galleries + text, left - spent
        sections += _part(f"part-{i}", name, part, result["runs"], galleries)
    titles = {f"part-{i}": part["title"] for i, part in enumerate(result["parts"].values())}
    names = [f"{run['label']}: {run['run']}" for run in result["runs"]]
    notes = "".join(f"<li class=note><b>Note</b><span>{escape(note)}</span></li>" for note in result["notes"])
    body = (
        controls(titles, filters) + (f"<ul class=warnings>{notes}</ul>" if notes else "") + _heads(result) + sections
        + _made(result)
    )  # fmt: skip
    sub = (
        f"Suite {escape(result['suite'])}, version {escape(result['version'])}. Differences are of a run less run A, "
        f"with 95 % intervals; {result['tests']:,} tests are corrected together (Holm)."
    )
    links = {"results": "Results", "made": "How it was compared"}
    return document("comparison", " and ".join(names), sub, body, links=links, style=STYLE, script=SCRIPT)


def _heads(result):
    tiles = []
    for run in result["runs"][1:]:
        entries = [m["differences"].get(run["label"]) for p in result["parts"].values() for m in p["metrics"].values()]
        verdicts = [entry["verdict"] for entry in entries if entry]
        better, worse = verdicts.count("better"), verdicts.count("worse")
        same = verdicts.count("no significant difference")
        rest = len(verdicts) - better - worse - same
        names = f"{escape(run['run'], 60)} against {escape(result['runs'][0]['run'], 60)}"
        hint = f"{same:,} without a significant difference"
        hint += f", {rest:,} without a test or a better side" if rest else ""
        tiles.append(
            f"<div class=tile><div class=label><b>{names}</b>{run['label']} and A, metrics of all parts</div>"
            f"<div class=value><span class=better>{better:,}</span> better, <span class=worse>{worse:,}</span> worse"
            f"</div><div class=hint>{hint}</div></div>"
        )
    for i, part in enumerate(result["parts"].values()):
        metric = part["metrics"].get(part["headline"])
        for label, entry in metric["differences"].items() if metric else ():
            text = difference_text(metric["cells"]["A"], entry)
            value, _, interval = text.partition(" [")
            tiles.append(
                f'<a class=tile href="#part-{i}"><div class=label><b>{escape(part["title"], 100)}</b>'
                f"{escape(metric['title'], 60)}, {label} less A</div><div class=value>{escape(value)}"
                f"<small>{escape(f'[{interval}' if interval else '')}</small></div>"
                f"<div class=hint>{_verdict(entry)}, p {p_text(entry['p_holm'])}</div></a>"
            )
    return f'<div class="tiles heads" id=results>{"".join(tiles)}</div>'


def _verdict(entry):
    css = _CSS.get(entry["verdict"], "same")
    return f"<span class={css}>{entry['verdict']}</span>"


def _part(identity, name, part, runs, galleries):
    several = len(runs) > 2
    heads = ["", *(["run"] if several else []), "#A", "#run" if several else "#B", "#difference", "#p", "#p (Holm)",
             "", "test"]  # fmt: skip
    rows = []
    for metric in part["metrics"].values():
        for label, entry in metric["differences"].items():
            title = metric_head(metric["title"], metric["cells"].values()).removeprefix("#")
            value, _, interval = difference_text(metric["cells"]["A"], entry).partition(" [")
            small = f"<small>{escape(f'[{interval}')}</small>" if interval else ""
            how = entry["method"] + (f"<small>not paired: {entry['why']}</small>" if entry["why"] else "")
            rows.append([title, *([label] if several else []), cell_html(metric["cells"]["A"]),
                         cell_html(metric["cells"][label]), f"<b>{escape(value)}</b>{small}", p_text(entry["p"]),
                         p_text(entry["p_holm"]), _verdict(entry), how])  # fmt: skip
    counts = "".join(
        f"<p class=about>Of the same {sum(c.values()):,} cases, A and {label} both pass all checks in {c['both']:,}, A "
        f"alone in {c['only_a']:,}, {label} alone in {c['only_b']:,}, neither in {c['neither']:,}.</p>"
        for label, c in part["cases"].items()
    )
    return (
        f'<section id="{identity}" class=part><h2>{escape(part["title"], 160)}</h2>'
        f"<p class=about>{escape(part['about'])}</p>{table(heads, rows, 'scores')}"
        f"<div class=plots>{_forests(part, runs)}</div><div class=counts>{counts}</div>{galleries}"
        f"<p class=remark>Part <code>{escape(name)}</code>.</p></section>"
    )


def _forests(part, runs):
    """Differences as dots with intervals; those of one unit share an axis."""
    families = {}
    for metric in part["metrics"].values():
        cell = metric["cells"]["A"]
        entries = {label: e for label, e in metric["differences"].items() if e["difference"] is not None}
        if entries:
            family = (SHARE if is_share(cell) else metric["unit"], metric["better"])
            families.setdefault(family, []).append((metric, entries))
    text, several = "", len(runs) > 2
    for (unit, better), members in families.items():
        groups = []
        for metric, entries in members:
            made = []
            for label, e in entries.items():
                number = next(i for i, run in enumerate(runs) if run["label"] == label)
                color = color_of("", number) if several else _COLORS.get(e["verdict"], "var(--floor)")
                hint = f"{label} less A: {difference_text(metric['cells']['A'], e)}, {e['verdict']}"
                made.append(Lane(e["difference"], e["lo"], e["hi"], hint, color))
            verdicts = [entry["verdict"] for entry in entries.values()]
            note = verdicts[0] if not several and verdicts[0] in _CSS else ""
            groups.append((metric["title"], note, made))
        flat = [lane for _, _, some in groups for lane in some]
        options = dict(label=lambda value: f"{100 * value:+.0f}" if value else "0") if unit == SHARE else {}
        words = {"low": "lower is better", "high": "higher is better"}.get(better, "")
        title = "Differences" + (" in percentage points" if unit == SHARE else f" ({unit})" if unit else "")
        legend = {f"{run['label']} less A": color_of("", i) for i, run in enumerate(runs) if i} if several else {
            "better": "var(--good)", "worse": "var(--bad)", "no significant difference": "var(--floor)"
        }  # fmt: skip
        remark = f"{words}, with the 95 % interval" if words else "with the 95 % interval"
        text += lanes_figure(title, remark, legend, groups, axis_of(flat, may_log=False, **options))
    return text


def _galleries(label, ours, theirs, filters, most_bytes):
    """Cases that one run gets right and the other wrong, those first that differ most."""
    (folder_a, part_a), (folder_b, part_b) = ours, theirs
    pairs, _ = paired_cases(part_a, part_b)
    pairs = [(a, b) for a, b in pairs if a.get("video") and b.get("video")]
    text, spent = "", 0
    for title, word, chosen in (
        (f"A fails, {label} succeeds", "better", [(a, b) for a, b in pairs if a["failed"] and verdict_of(b)]),
        (f"A succeeds, {label} fails", "worse", [(a, b) for a, b in pairs if verdict_of(a) and b["failed"]]),
    ):
        if not chosen:
            continue
        order = sorted(chosen, key=lambda pair: -abs((pair[0].get("score") or 0) - (pair[1].get("score") or 0)))
        some = order[:MOST_CASES]
        videos_a = read_videos(folder_a, [p for a, _ in some for p in (a["video"], a.get("truth")) if p])
        videos_b = read_videos(folder_b, [b["video"] for _, b in some])
        cards, room = [], most_bytes / 2
        for a, b in some:
            stages, frames, fps, start = _stages(label, a, b, videos_a, videos_b)
            if cards and len(stages) > room:
                break
            room, spent = room - len(stages), spent + len(stages)
            events = [*(a.get("events") or []), *(b.get("events") or [])]
            tokens = filters.add({*a["failed"], *b["failed"]}, events, frames, ("all", title))
            facts, lines = [f"seed {a['seed']}", a["id"]], [("A", a), (label, b)]
            cards.append(card(stages, a, num_frames=frames, fps=fps, start=start, tokens=tokens, facts=facts,
                              lines=lines))  # fmt: skip
        remark = f"{len(cards):,} of {len(chosen):,} such cases, those first whose scores differ most."
        if len(cards) == len(chosen):
            remark = f"All {len(chosen):,} such cases, those first whose scores differ most."
        text += gallery_html(f"<span class={word}>{title}</span>", remark, cards, wide=True)
    return text, spent


def _stages(label, a, b, videos_a, videos_b):
    video_a, fps = videos_a[a["video"]["file"], a["video"]["index"]]
    video_b, _ = videos_b[b["video"]["file"], b["video"]["index"]]
    frames = max(len(video_a), len(video_b))
    start = first_event([*(a.get("events") or []), *(b.get("events") or [])], frames)
    text = ""
    for name, case, video in (("A", a, video_a), (label, b, video_b)):
        place = min(start, len(video) - 1)
        text += stage(name, video, start=place, events=case.get("events") or [], verdict=verdict_of(case))
    if a.get("truth"):
        truth, _ = videos_a[a["truth"]["file"], a["truth"]["index"]]
        text, frames = text + stage("ground truth", truth, start=min(start, len(truth) - 1)), max(frames, len(truth))
    return text, frames, fps, start


def _made(result):
    rows = []
    for run in result["runs"]:
        codes = [f"<code>{escape(run[name] or 'none', 60)}</code>" for name in ("checkpoint", "config", "code")]
        step = "none" if run["step"] is None else f"{run['step']:,}"
        rows.append([run["label"], escape(run["run"], 80), step, *codes, escape(run["folder"], 160)])
    runs = table(("", "run", "#step", "checkpoint", "config", "code", "folder"), rows)
    methods = [[f"<code>{name}</code>", escape(text)] for name, text in result["methods"].items()]
    remark = (
        f"Of {result['tests']:,} tests on this page, the chance that any of them calls significant what is chance "
        f"is {100 * result['alpha']:g} % at most: p-values are corrected for their number by Holm's method. All "
        "numbers are in compare.json, the tables in compare.txt."
    )
    return (
        f'<section id="made"><h2>How it was compared</h2>{runs}<h3>Tests</h3>{table(("", ""), methods, "facts")}'
        f"<p class=remark>{remark}</p></section>"
    )
