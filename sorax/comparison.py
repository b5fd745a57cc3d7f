"""What two or more evaluations differ in: every difference with its interval, and whether it is more than chance.

All reports are compared with the first one. Where two of them judge the same cases, made from the same seeds, the test
is paired: what one case is worth in one run is held against the same case in the other. Otherwise the runs are taken as
unrelated samples. All tests of a comparison are corrected together (Holm).
"""

import json
import math
import os
import pathlib

from sorax import significance
from sorax.errors import UserError
from sorax.report_clips import verdict_of
from sorax.report_html import is_share, scored_row, texts_of

ALPHA = 0.05
METHODS = {
    "McNemar": "exact test over the same cases; Newcombe's interval for paired proportions",
    "paired t": "test of the differences over the same cases",
    "grouped t": "test of the differences over the same cases, groups of them (such as the samples of a prompt) "
    "being independent",
    "Fisher": "exact test over unrelated cases; Newcombe's interval",
    "Welch": "t-test over unrelated cases, from the intervals of the reports",
}


def compare(folders: list[str]) -> tuple[dict, list[dict]]:
    """Compares reports of one suite: what compare.json holds (see `sorax.report_compare`), and the scores of each.

    Raises:
        UserError: fewer than two folders, one of them twice or no report, reports of different suites or versions or
            with no part in common.
    """
    reports = _read_all(folders)
    labels = [_label(i) for i in range(len(reports))]
    first = reports[0]
    common = [name for name in first["parts"] if all(name in report["parts"] for report in reports)]
    if not common:
        raise UserError(f"the reports have no part in common: {folders[0]!r} has {', '.join(first['parts'])}; evaluate "
                        "the runs with the same parts")  # fmt: skip
    runs = [
        dict(label=label, folder=folder)
        | {k: report.get(k) for k in ("run", "step", "kind", "checkpoint", "config", "code", "sampling", "seed")}
        for label, folder, report in zip(labels, folders, reports)
    ]
    parts = {name: _compare_part(labels, [report["parts"][name] for report in reports]) for name in common}
    tested = [d for part in parts.values() for m in part["metrics"].values() for d in m["differences"].values()]
    for entry, p in zip(tested, significance.holm(entry["p"] for entry in tested)):
        entry["p_holm"] = p
    for part in parts.values():
        for metric in part["metrics"].values():
            for entry in metric["differences"].values():
                entry["verdict"] = _verdict(entry, metric["better"])
    used = {entry["method"] for entry in tested if entry["p"] is not None}
    result = dict(
        suite=first["suite"], version=first["version"], runs=runs, notes=_notes(reports, labels, common),
        alpha=ALPHA, tests=sum(entry["p"] is not None for entry in tested), correction="Holm over all tests",
        methods={name: text for name, text in METHODS.items() if name in used}, parts=parts,
    )  # fmt: skip
    return result, reports


def _label(number):
    """A, B, ... Z, AA, ..."""
    return (_label(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


# --- Reading


def _read_all(folders):
    if len(folders) < 2:
        raise UserError(f"a comparison takes two or more report folders, not {len(folders)}: name them after --compare")
    seen = {}
    for folder in folders:
        place = os.path.realpath(folder)
        if place in seen:
            raise UserError(f"{folder!r} and {seen[place]!r} are one folder: compare different reports")
        seen[place] = folder
    reports = [read_scores(folder) for folder in folders]
    kinds = [(report["suite"], report["version"]) for report in reports]
    for folder, kind in zip(folders, kinds):
        if kind != kinds[0]:
            raise UserError(f"{folders[0]!r} is of suite {kinds[0][0]!r}, version {kinds[0][1]}, and {folder!r} of "
                            f"suite {kind[0]!r}, version {kind[1]}: evaluate the runs with one of them")  # fmt: skip
    return reports


def read_scores(folder: str) -> dict:
    """The scores of a suite's report folder. Raises UserError where it is none."""
    path = os.path.join(folder, "scores.json")
    try:
        scores = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(f"{folder!r} is no finished report ({path}: {error.strerror}): name a folder that `sorax "
                        "evaluate` wrote to the end") from error  # fmt: skip
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again") from error
    if not isinstance(scores, dict) or not {"suite", "version", "parts"} <= scores.keys():
        raise UserError(f"{folder!r} is no report of a suite: evaluate the run with --suite")
    return scores


def _notes(reports, labels, common):
    """What the reader of a comparison must know: which parts are left out, and what differs besides the run."""
    notes, first = [], reports[0]
    for label, report in zip(labels, reports):
        extra = [name for name in report["parts"] if name not in common]
        if extra:
            notes.append(f"Not compared, because not all have it: {', '.join(extra)} of {label}.")
        theirs, ours = report.get("sampling") or {}, first.get("sampling") or {}
        differ = [f"{k} {ours.get(k)} and {theirs.get(k)}" for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if differ:
            notes.append(f"A and {label} were sampled in different ways: {'; '.join(differ)}.")
        other = [name for name in common if report["parts"][name].get("data") != first["parts"][name].get("data")]
        if other:
            notes.append(f"A and {label} have different data, so that nothing is paired, in: {', '.join(other)}.")
        if report is not first and report.get("checkpoint") and report.get("checkpoint") == first.get("checkpoint"):
            notes.append(f"A and {label} are of the same checkpoint.")
    return notes


# --- Comparing


def _compare_part(labels, parts):
    first, rows = parts[0], [part["rows"][scored_row(part["rows"])] for part in parts]
    metrics = {}
    for name, title in first["metrics"].items():
        cells = {label: row.get(name) for label, row in zip(labels, rows)}
        given = [cell for cell in cells.values() if cell]
        if not cells["A"] or any(cell["kind"] != given[0]["kind"] for cell in given):
            continue
        better = given[0].get("better") or ("high" if given[0]["kind"] == "rate" else None)
        differences = {
            label: _difference(name, first, part, cells["A"], cells[label])
            for label, part in zip(labels[1:], parts[1:]) if cells[label]
        }  # fmt: skip
        metrics[name] = dict(title=title, unit=given[0].get("unit", ""), better=better, cells=cells,
                             differences=differences)  # fmt: skip
    cases = {}
    for label, part in zip(labels[1:], parts[1:]):
        pairs, _ = paired_cases(first, part)
        good = [sides for sides in ((verdict_of(a), verdict_of(b)) for a, b in pairs) if None not in sides]
        if good:
            cases[label] = dict(both=good.count((True, True)), neither=good.count((False, False)),
                                only_a=good.count((True, False)), only_b=good.count((False, True)))  # fmt: skip
    return dict(title=first["title"], about=first.get("about", ""), headline=first["headline"], metrics=metrics,
                cases=cases)  # fmt: skip


def paired_cases(a: dict, b: dict) -> tuple[list, str]:
    """The cases of two reports' parts as pairs [(case of a, case of b)], or [] and why they cannot be paired."""
    if a.get("data") != b.get("data"):
        return [], "other data"
    ours, theirs = ({case["id"]: case for case in part.get("cases") or []} for part in (a, b))
    if not ours or not theirs:
        return [], "no list of cases"
    if ours.keys() != theirs.keys():
        return [], "other cases"
    pairs = [(case, theirs[name]) for name, case in ours.items()]
    if any(x["seed"] != y["seed"] for x, y in pairs):
        return [], "other seeds"
    return ([], "other captions") if any(x["caption"] != y["caption"] for x, y in pairs) else (pairs, "")


def _difference(metric, part_a, part_b, cell_a, cell_b):
    """b - a of one metric, with its test and, where it is not paired, why not."""
    rate = cell_a["kind"] == "rate"
    pairs, why = paired_cases(part_a, part_b)
    if pairs:
        values = [(_value(a, metric), _value(b, metric)) for a, b in pairs]
        kept = [i for i, pair in enumerate(values) if None not in pair]
        if any(set(side) == {None} for side in zip(*values)):
            why = "no value of each case"
        elif any((a is None) != (b is None) for a, b in values):
            why = "counted over other cases"
        elif not (_adds_up([values[i][0] for i in kept], cell_a) and _adds_up([values[i][1] for i in kept], cell_b)):
            why = "no value of each case"
        else:
            a, b = [values[i][0] for i in kept], [values[i][1] for i in kept]
            groups = [pairs[i][0].get("group") for i in kept]
            grouped = all(g is not None for g in groups) and len(set(map(str, groups))) < len(groups)
            if grouped:
                found, method = significance.paired_means(a, b, groups), "grouped t"
            elif rate:
                found, method = significance.paired_rates(a, b), "McNemar"
            else:
                found, method = significance.paired_means(a, b), "paired t"
            return found | dict(method=method, paired=True, why="")
    if rate:
        found = significance.unpaired_rates(cell_a["k"], cell_a["n"], cell_b["k"], cell_b["n"])
        method = "Fisher"
    else:
        error = significance.error_of_interval
        sides = [(c["value"], error(c.get("lo"), c.get("hi")), c["n"]) for c in (cell_a, cell_b)]
        found, method = significance.unpaired_means(*sides[0], *sides[1]), "Welch"
    return found | dict(method=method, paired=False, why=why)


def _value(case, metric):
    checks = case.get("checks") or {}
    return checks[metric] if metric in checks else (case.get("values") or {}).get(metric)


def _adds_up(values, cell):
    """Whether a cell is the mean of these values, so that it may be taken apart into them."""
    if len(values) != cell["n"] or not values:
        return False
    return math.isclose(math.fsum(values) / len(values), cell["value"], rel_tol=1e-6, abs_tol=1e-9)


def _verdict(entry, better):
    if entry["p_holm"] is None:
        return "not tested"
    if entry["p_holm"] >= ALPHA:
        return "no significant difference"
    up = entry["difference"] > 0
    return ("higher" if up else "lower") if better is None else "better" if up == (better == "high") else "worse"


# --- As text


def text_table(result: dict) -> str:
    """The comparison in plain text, for a terminal."""
    lines = [f"Suite {result['suite']}, version {result['version']}"]
    lines += [f"{run['label']}: {run['run']}, step {run['step']}, checkpoint {run['checkpoint']} ({run['folder']})"
              for run in result["runs"]]  # fmt: skip
    lines += result["notes"]
    heads = ("metric", "run", "A", "run's", "difference [95 %]", "p (Holm)", "verdict", "test")
    for name, part in result["parts"].items():
        rows = []
        for metric in part["metrics"].values():
            cell = metric["cells"]["A"]
            for label, entry in metric["differences"].items():
                other = metric["cells"][label]
                rows.append((metric["title"], label, _text(cell), _text(other), difference_text(cell, entry),
                             p_text(entry["p_holm"]), entry["verdict"], entry["method"]))  # fmt: skip
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        lines += ["", f"{part['title']} ({name})"]
        lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in (heads, *rows)]
    lines += ["", f"{result['tests']} tests, corrected together (Holm); significant below {result['alpha']:g}."]
    lines += [f"{name}: {text}." for name, text in result["methods"].items()]
    return "\n".join(lines) + "\n"


def _text(cell):
    return "none" if cell["value"] is None else texts_of(cell, cell["value"])[0]


def difference_text(cell: dict, entry: dict) -> str:
    """A difference with its interval, in the form of the cells; of shares in percentage points."""
    if entry["difference"] is None:
        return "none"
    share = is_share(cell)
    values = [entry["difference"]] + ([] if entry["lo"] is None else [entry["lo"], entry["hi"]])
    texts = [f"{100 * v:+.1f}" for v in values] if share else [f"{v:+.3g}" for v in values]
    return texts[0] + (" pp" if share else "") + (f" [{texts[1]}, {texts[2]}]" if len(texts) > 1 else "")


def p_text(p) -> str:
    """A p-value as it is read."""
    return "none" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
