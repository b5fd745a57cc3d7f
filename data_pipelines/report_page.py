"""The page of a data report: one HTML file with everything inside, readable in light and dark, safe with hostile names.

Whatever comes from the data (file names, captions, reasons) passes through `escape`; the page's own policy forbids
every script but the one written here, and every request.
"""

import base64
import hashlib
import html
import re

from data_pipelines.report_plots import short
from data_pipelines.report_style import SCRIPT, STYLE

MOST_CHARACTERS = 300  # shown of a caption
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_SORTED = ("tokens", "seconds", "pixels", "characters")
_LEVELS = dict(problem="Problem", warning="Warning", note="Note")
_STAGES = dict(index="when indexed", fit="by the limits", row="fits in no row")


def escape(text, most=None):
    """Text for HTML, in elements and in quoted attributes; control and direction marks are made visible."""
    text = str(text).encode("utf-8", "replace").decode()
    text = _UNSEEN.sub(lambda match: " " if match[0] in "\n\t\r" else "\N{REPLACEMENT CHARACTER}", text)
    if most and len(text) > most:
        text = f"{text[:most]} ... ({len(text):,} characters)"
    return html.escape(text, quote=True)


def page(numbers, plots, cards):
    """The text of the page.

    Args:
      numbers: the content of report.json. plots: {title: (text of an <svg>, remark)}.
      cards: {"kept" | "rejected" | "dropped": list of dicts of key, caption, facts (list of str), picture (JPEG bytes
        of frames side by side, or None), frames, height, width, failure, and numbers to sort by}.
    """
    sections = [
        ("outcome", "What happens to the samples", _outcome(numbers)),
        ("samples", "Samples as trained", _gallery(cards["kept"], "kept", numbers["totals"]["kept"])),
        ("distributions", "Distributions", _plots(plots) + _shapes(numbers)),
        ("packing", "Packing", _packing(numbers)),
        ("rejected", "Rejected", _rejected(numbers) + _gallery(cards["rejected"], "rejected")),
        ("curation", "Curation", _curation(numbers, cards)),
        ("duplicates", "Duplicates", _duplicates(numbers)),
        ("settings", "Settings", _settings(numbers)),
    ]
    sections = [section for section in sections if section[2]]
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{text}</section>' for name, title, text in sections)
    source = numbers["source"]
    sub = (
        f"What a training run with these settings will see: {escape(numbers['settings']['origin'])}. "
        f"Index <code>{escape(source['identity'])}</code>."
    )
    return document(
        "data report", source["path"], sub, f"{_tiles(numbers)}{_warnings(numbers)}{body}",
        links={name: title for name, title, _ in sections}, style=STYLE, script=SCRIPT,
    )  # fmt: skip


def document(kind, heading, sub, body, *, links, style, script):
    """A whole page that can reach nothing outside itself, and runs no script but this one.

    Args: kind: such as "data report". heading: text. sub, body: HTML. links: {id of a section: its title in HTML}.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title in links.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{kind.capitalize()}: {escape(heading, 100)}</title><style>{style}</style></head><body>"
        f"<header><p class=over>sorax {kind}</p><h1><bdi>{escape(heading, 200)}</bdi></h1>"
        f"<p class=sub>{sub}</p><nav>{nav}</nav></header><main>{body}</main><script>{script}</script></body></html>\n"
    )


# --- Numbers as people read them


def percent(share):
    """0.1234 as 12.3 %."""
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "< 0.1 %"


def count_of(value):
    """600.2 as 600, 1.234 as 1.23: three digits, or all of a larger number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(hours):
    """Hours, minutes or seconds, whichever is readable."""
    seconds = hours * 3600
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{hours:,.1f} h"


def size(count):
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def table(heads, rows, css="", groups=()):
    """A table; cells are HTML. A head that begins with # is of numbers; groups: (text, columns) of a line above."""
    number = [head.startswith("#") for head in heads]
    above = "".join(f"<th colspan={span}>{text}</th>" for text, span in groups)
    top = "".join(f"<th{' class=n' * n}>{head.lstrip('#')}</th>" for head, n in zip(heads, number))
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' * n}>{cell}</td>" for cell, n in zip(row, number)) + "</tr>" for row in rows
    )
    top = f"<tr class=groups>{above}</tr><tr>{top}</tr>" if above else f"<tr>{top}</tr>"
    return f'<div class=scroll><table class="{css}"><thead>{top}</thead><tbody>{body}</tbody></table></div>'


# --- Sections


def _planned(numbers):
    return next(x for x in numbers["packing"]["by_ranks"] if x["ranks"] == numbers["settings"]["ranks"])


def _tiles(numbers):
    totals, packing = numbers["totals"], numbers["packing"]
    tiles = [
        ("samples kept", f"{totals['kept']:,}", f"of {totals['samples']:,}; {totals['kept_videos']:,} videos, "
         f"{totals['kept_images']:,} images"),
        ("length as trained", duration(totals["kept_hours"]), f"of {duration(totals['hours'])} usable"),
        ("video tokens an epoch", short(totals["kept_tokens"]), f"{totals['kept_frames']:,} frames"),
    ]  # fmt: skip
    if packing:
        planned = _planned(numbers)
        epochs = ""
        if planned["epochs"]:
            epochs = f"{count_of(planned['epochs'])} epochs in {numbers['settings']['train.steps']:,} steps"
        tiles += [
            ("fill of rows", percent(packing["fill"]), f"of the text {percent(packing['text_fill'])}"),
            ("steps an epoch", f"{planned['steps_per_epoch']:,}", epochs),
        ]
    tiles.append(("data", size(totals["bytes"]), f"{numbers['captions']['different']:,} different captions"))
    items = (
        f"<div class=tile><div class=label>{label}</div><div class=value>{value}</div>"
        f"<div class=hint>{hint}</div></div>"
        for label, value, hint in tiles
    )
    return f"<div class=tiles>{''.join(items)}</div>"


def _warnings(numbers):
    if not numbers["warnings"]:
        return "<ul class=warnings><li class=fine><b>Fine</b><span>Nothing looks wrong.</span></li></ul>"
    items = (
        f"<li class={w['level']}><b>{_LEVELS[w['level']]}</b><span>{escape(w['text'])}</span></li>"
        for w in numbers["warnings"]
    )
    return f"<ul class=warnings>{''.join(items)}</ul>"


_CHANGES = {
    "rescaled": "scaled down to the token budget",
    "retimed": "re-timed to data.fps",
    "trimmed": "trimmed in time",
    "cropped to grid": "cropped to the grid",
}


def _outcome(numbers):
    lines = {line["what"]: line for line in numbers["outcome"]}
    total, rejected = max(numbers["totals"]["samples"], 1), numbers["totals"]["rejected"]
    same, kept = lines["unchanged"]["samples"], lines["kept"]["samples"]
    parts = [("unchanged", same, "as they are"), ("changed", kept - same, "changed to fit"),
             ("gone", rejected, "rejected")]  # fmt: skip
    bar = "".join(
        f'<div class="{css}" style="flex-grow:{count / total:.5f}"></div>' for css, count, _ in parts if count
    )
    legend = "".join(
        f'<span><i class="{css}"></i>{text} <b>{count:,}</b> ({percent(count / total)})</span>'
        for css, count, text in parts
    )
    rows = []
    for x in numbers["outcome"]:
        cells = [f"{x['samples']:,}", percent(x["share"]), duration(x["hours_before"]), percent(x["share_hours"]),
                 duration(x["hours_after"]), short(x["tokens_before"]), percent(x["share_tokens"]),
                 short(x["tokens_after"])]  # fmt: skip
        rows.append([_CHANGES.get(x["what"], escape(x["what"])), *(cells if x["samples"] else ["0", *["&ndash;"] * 7])])
    rows.append(["rejected", f"{rejected:,}", percent(rejected / total), *["&ndash;"] * 6])
    heads = ("", "#count", "#share", "#in the files", "#share", "#as trained", "#in the files", "#share", "#as trained")
    groups = (("", 1), ("samples", 2), ("length", 3), ("video tokens", 3))
    remark = (
        "A sample may be changed in several ways, so those lines overlap. Shares of samples are of the whole index, "
        "those of length and tokens of all samples within the limits. Tokens in the files are at "
        "their own size and length."
    )
    return (
        f"<div class=bar>{bar}</div><div class=legend>{legend}</div>{table(heads, rows, groups=groups)}"
        f"<p class=remark>{remark}</p>"
    )


def _plots(plots):
    items = (
        f"<figure><figcaption>{title}<small>{escape(remark)}</small></figcaption>{svg}</figure>"
        for title, (svg, remark) in plots.items()
    )
    return f"<div class=plots>{''.join(items)}</div>"


def _shapes(numbers):
    shapes = numbers["shapes"]
    if not shapes["listed"]:
        return ""
    rows = [[f"{s['num_frames']} &times; {s['width']}&times;{s['height']}", f"{s['samples']:,}", percent(s["share"]),
             percent(s["share_tokens"])] for s in shapes["listed"]]  # fmt: skip
    some = shapes["different"] > len(rows)
    title = f"The {len(rows)} most frequent of {shapes['different']:,} shapes" if some else "All shapes"
    return f"<h3>{title}</h3>" + table(("frames &times; size", "#samples", "#share", "#of tokens"), rows, "narrow")


def _packing(numbers):
    packing, settings = numbers["packing"], numbers["settings"]
    if packing is None:
        return ""
    a_row = packing["samples_a_row"]
    facts = [
        ["room of a row", f"{settings['data.row_tokens']:,} video tokens, {settings['data.row_text']:,} text slots, "
         f"{settings['data.max_segments']} samples"],
        ["fill", f"{percent(packing['fill'])} of the video tokens, {percent(packing['text_fill'])} of the text slots"],
        ["samples a row", f"{a_row['mean']:.1f} on average, {a_row['p0']:.0f} to {a_row['p100']:.0f}"],
        ["rows less than 95 % full", f"{percent(packing['underfilled_rows'])}; stopped by the number of samples: "
         f"{percent(packing['limited_by_segments'])}, by text: {percent(packing['limited_by_text'])}"],
        ["identity of the plan", f"<code>{escape(packing['identity'])}</code>"],
    ]  # fmt: skip
    rows = []
    for x in packing["by_ranks"]:
        here = x["ranks"] == settings["ranks"]
        epochs = "&ndash;" if x["epochs"] is None else count_of(x["epochs"])
        cells = [f"{x['ranks']}{' (planned)' if here else ''}", f"{x['batch']:,}", f"{x['steps_per_epoch']:,}",
                 f"{x['rows_per_epoch']:,}", f"{x['repeated_rows']:,}", f"{x['imbalance']:.4f}",
                 f"{x['tokens_per_step']:,.0f}", epochs]  # fmt: skip
        rows.append([f"<b>{cell}</b>" for cell in cells] if here else cells)
    heads = ("ranks", "#rows a step", "#steps an epoch", "#rows an epoch", "#of them repeated", "#imbalance",
             "#tokens a step", "#epochs in the run")  # fmt: skip
    remark = (
        "Made by the planner of training, for its first epoch. Each rank reads as many rows a step as in the planned "
        "run. Imbalance is the time of the epoch over its time with equal cost on all ranks; rows are repeated to fill "
        "the last step."
    )
    return f"{table(('', ''), facts, 'facts')}{table(heads, rows)}<p class=remark>{remark}</p>"


def _rejected(numbers):
    if not numbers["rejected"]:
        return "<p>None.</p>"
    parts = []
    for entry in numbers["rejected"]:
        names = "".join(
            f"<li><bdi>{escape(n['key'], 200)}</bdi> <span>{escape(n['reason'], 200)}</span></li>"
            for n in entry["names"]
        )
        rest = entry["samples"] - len(entry["names"])
        more = f"<li class=more>and {rest:,} more, in rejected.csv</li>" if rest else ""
        parts.append(
            f"<details><summary><b>{entry['samples']:,}</b> <bdi>{escape(entry['reason'], 200)}</bdi> "
            f"<span>{percent(entry['share'])}, {_STAGES[entry['stage']]}</span></summary>"
            f"<ul class=names>{names}{more}</ul></details>"
        )
    return "".join(parts)


def _gallery(cards, name, total=0):
    """Cards; those of which there are `total` in all can be filtered and sorted."""
    if not cards:
        return ""
    how = "all shown" if total == len(cards) else f"{len(cards)} of {total:,} shown, drawn at random, always the same"
    tools = (
        f'<div class=tools><input type=search data-for="{name}" placeholder="file or caption" '
        f'aria-label="Filter samples"><select data-for="{name}" aria-label="Order of samples">'
        '<option value="">in order of name</option>'
        "<option value=tokens>most tokens first</option>"
        "<option value=seconds>longest first</option><option value=pixels>largest first</option>"
        "<option value=characters>longest caption first</option></select>"
        f'<span class=count data-for="{name}">{how}; point at one to see its frames</span></div>'
    )
    shown = "".join(map(_card, cards))
    return f'{tools if total else ""}<div class=cards id="cards-{name}">{shown}</div>'


def _card(card):
    key, caption = escape(card["key"], 200), escape(card.get("caption") or "", MOST_CHARACTERS)
    if card["picture"] is None:
        picture = f"<div class=none>{escape(card['failure'] or 'no picture', 200)}</div>"
    else:
        height, width = int(card["height"]), int(card["width"])
        data = base64.b64encode(card["picture"]).decode()
        style = f"--k:{int(card['frames'])};aspect-ratio:{width}/{height};"
        style += f"{'width' if 3 * width >= 4 * height else 'height'}:100%;"
        style += f"background-image:url(data:image/jpeg;base64,{data})"
        picture = f'<div class=strip role=img tabindex=0 aria-label="frames of {key}" style="{style}"></div>'
    numbers = "".join(f' data-{name}="{float(card[name]):g}"' for name in _SORTED if name in card)
    facts = " &middot; ".join(f"<span>{escape(fact)}</span>" for fact in card["facts"])
    tag = f"<div class=tag>{escape(card['tag'], 120)}</div>" if card.get("tag") else ""
    return (
        f'<article class=card{numbers}><div class=frame>{picture}</div><div class=text><div class=key title="{key}">'
        f"<bdi>{key}</bdi></div>{tag}<div class=facts>{facts}</div><p dir=auto>{caption}</p></div></article>"
    )


def _curation(numbers, cards):
    curation = numbers.get("curation")
    if not curation:
        return ""
    rows = []
    for kind, total in (("file", curation["files"]), ("clip", curation["clips"])):
        first = "raw files" if kind == "file" else "clips cut out of them"
        rows.append([f"<b>{first}</b>", "", "", f"<b>{total:,}</b>", ""])
        for stage in (stage for stage in curation["stages"] if stage["kind"] == kind):
            reasons = "; ".join(f"{escape(r['reason'], 120)} ({r['count']:,})" for r in stage["reasons"])
            gone = [f"{stage['dropped']:,}", percent(stage["dropped"] / max(total, 1))] if reasons else ["&ndash;"] * 2
            rows.append([escape(stage["stage"]), *gone, f"{stage['left']:,}", reasons])
    head = (
        f"<p>Of {curation['files']:,} raw files in <code>{escape(curation['raw'])}</code>, {curation['kept']:,} clips "
        f"were kept and {curation['clips'] - curation['kept']:,} dropped (<code>{escape(curation['path'])}</code>).</p>"
    )
    text = head + table(("stage", "#dropped", "#share", "#left", "reasons"), rows)
    return text + (f"<h3>Dropped clips</h3>{_gallery(cards['dropped'], 'dropped')}" if cards["dropped"] else "")


def _duplicates(numbers):
    duplicates = numbers["duplicates"]
    if not duplicates["groups"]:
        return ""
    items = ""
    for keys in duplicates["listed"]:
        more = f" and {len(keys) - 20:,} more" if len(keys) > 20 else ""
        items += f"<li>{', '.join(f'<bdi>{escape(key, 200)}</bdi>' for key in keys[:20])}{more}</li>"
    some = duplicates["groups"] > len(duplicates["listed"])
    first = f"The first {len(duplicates['listed'])} groups" if some else "All groups"
    return (
        f"<p>{duplicates['groups']:,} groups of files with equal bytes, {duplicates['samples']:,} samples in all; "
        f"every one is trained on. All are in duplicates.csv.</p><details><summary>{first}</summary>"
        f"<ul class=names>{items}</ul></details>"
    )


def _settings(numbers):
    shown = {k: v for k, v in numbers["settings"].items() if k != "origin"}
    shown |= {f"index.{k}": v for k, v in numbers["source"]["limits"].items()}
    rows = [[f"<code>{escape(k)}</code>", escape("not set" if v is None else v, 200)] for k, v in shown.items()]
    return f"<p>From {escape(numbers['settings']['origin'])}.</p>" + table(("", ""), rows, "facts")
