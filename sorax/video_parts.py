"""The parts of a video report, made of what was measured of each row's clips, and their tables in Markdown.

Reference means the real videos. Beside the numbers of what is scored stand those of the reference itself, where they
make sense: each clip against the others, one half against the other half, right captions and wrong ones.
"""

import numpy as np

from sorax import video_metrics
from sorax.distances import KERNEL_LEAST, frechet_cell, kernel_cell
from sorax.score_report import number
from sorax.statistics import mean_cell
from sorax.video_units import Table

PLAIN = {
    "temporal_spectrum": "temporal spectrum (dB)", "spatial_spectrum": "spatial spectrum (dB)",
    "motion": "motion (sides/s)", "motion_distance": "motion, distance (sides/s)", "flicker": "flicker (levels)",
    "difference": "frame difference (levels)", "warping_error": "warping error (1e-3)", "untracked": "not followed",
}  # fmt: skip
PAIRED = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "flicker_error": "flicker error (levels)"}
DISTANCES = {"fvd": "FVD (VideoMAE)", "mmd": "kernel distance (x 100)"}
CLIP = {"clip": "CLIP score", "clip_consistency": "frame consistency"}
BETTER = {"motion": "", "difference": "", "psnr": "high", "ssim": "high", "clip": "high", "clip_consistency": "high"}
UNITS = {
    "temporal_spectrum": "dB", "spatial_spectrum": "dB", "motion": "sides/s", "flicker": "levels",
    "difference": "levels", "warping_error": "1e-3", "psnr": "dB", "flicker_error": "levels",
}  # fmt: skip
BOTH_SIDES = ("motion", "difference")  # too little of it is wrong as well
FORMS = {"psnr": ".2f", "motion": ".3f", "motion_distance": ".3f", "ssim": ".4f", "lpips": ".4f", "clip": ".2f",
         "clip_consistency": ".2f", "untracked": ".3f", "mmd": ".3f", "flicker": ".2f", "difference": ".2f",
         "warping_error": ".3f", "fvd": ".1f", "temporal_spectrum": ".2f", "spatial_spectrum": ".2f",
         "flicker_error": ".2f"}  # fmt: skip


def plain_part(tables: dict[str, Table], data: str, scored: str) -> dict:
    """What needs no network; see `sorax.video_metrics`. scored: the row whose clips the report shows."""
    reference, rows, clips = tables["reference"], {}, {}
    for name, table in tables.items():
        values = {key: table.values[key] for key in PLAIN if key in table.values}
        for kind in ("spatial", "temporal"):
            spectra = reference.spectra(kind)
            values[f"{kind}_spectrum"] = video_metrics.distances_to(table.spectra(kind), spectra,
                                                                    same=table is reference)  # fmt: skip
        cells = {key: _mean(values, key) for key in values}
        motion = table.values["motion"]
        if table is reference:
            cells["motion_distance"] = video_metrics.motion_distance(motion[::2], motion[1::2])
        else:
            cells["motion_distance"] = video_metrics.motion_distance(motion, reference.values["motion"])
        rows[name], clips[name] = cells, values
    ranges = {key: _range(values, key in BOTH_SIDES) for key, values in clips["reference"].items()}
    cases = []
    for i in range(len(tables[scored])):
        looked = {key: values[i] for key, values in clips[scored].items() if values[i] is not None and ranges[key]}
        failed = [key for key, value in looked.items() if not ranges[key][0] <= value <= ranges[key][1]]
        cases.append((i, 1 - len(failed) / max(len(looked), 1), [PLAIN[key] for key in failed], looked))
    return _part(
        "Motion, flicker and spectra, without a network", "Means over clips. Spectra: difference in decibel from the "
        "reference's mean spectrum of brightness over space or time. Motion: mean optical flow, in shorter sides of "
        "the frame a second, and how far its distribution over clips is from the reference's. Flicker: what a frame "
        "differs from the mean of its neighbours. Warping error: what a frame differs from the next one warped back to "
        "it, where it can be followed. The reference's own row is what to be near to: its spectra are each clip's "
        "against the others', its distance of motion is that of one half to the other. A case fails where it lies "
        "outside of what 95 % of the reference's clips have.",
        data, PLAIN, rows, _cases(tables, scored, cases), [*_spectra(tables), *_motion(tables)],
    )  # fmt: skip


def paired_part(tables: dict[str, Table], data: str) -> dict:
    """Copies against their originals, of those rows that are copies."""
    copies = {name: table for name, table in tables.items() if table.row.originals is not None}
    rows = {name: {key: _mean(table.values, key) for key in PAIRED if key in table.values}
            for name, table in copies.items()}  # fmt: skip
    scored = list(copies)[-1]
    table = copies[scored]
    exact = sum(value is None for value in table.values["psnr"])
    cases = [(i, float(np.clip(table.values["ssim"][i] or 0.0, 0, 1)), [],
              {key: table.values[key][i] for key in rows[scored]}) for i in range(len(table))]  # fmt: skip
    about = ("Each clip against its original, on 8-bit pixels. Flicker error: mean absolute error of the differences "
             "between frames that follow each other.")  # fmt: skip
    if exact:
        about += f" {exact} clips are exact copies, which have no finite PSNR: the mean is that of the others."
    return _part("Copies and their originals", about, data, PAIRED, rows, _cases(tables, scored, cases))


def distance_part(tables: dict[str, Table], data: str, dim: int, network: str, fvd: bool) -> dict:
    """Distances of the features of a row's clips to the reference's."""
    reference, rows = tables["reference"].arrays["features"].astype(np.float64), {}
    for name, table in tables.items():
        ours, theirs = table.arrays["features"].astype(np.float64), reference
        if name == "reference":
            ours, theirs = reference[::2], reference[1::2]
        cells = {}
        if fvd and min(len(ours), len(theirs)) > dim:
            cells["fvd"] = frechet_cell(ours, theirs)
        if min(len(ours), len(theirs)) >= KERNEL_LEAST:
            cells["mmd"] = kernel_cell(ours, theirs)
        if cells:
            rows[name] = cells
    about = (f"Over {dim} features of {network}. Kernel distance: squared maximum mean discrepancy with a polynomial "
             "kernel of degree 2, without bias, times 100 (JEDi's, in this feature space). Reference: one half against "
             "the other half.")  # fmt: skip
    if fvd:
        about += " FVD has a bias that falls with n: compare numbers of equal n and of one network alone."
    else:
        about += " FVD was left out."
    return _part("Distance of distributions", about, data, DISTANCES, rows, [])


def clip_part(tables: dict[str, Table], data: str, network: str, scored: str) -> dict:
    """How well frames go with prompts."""
    rows = {}
    for name, table in tables.items():
        rows[name] = {key: _mean(table.values, key) for key in CLIP}
        if name == "reference":
            rows["wrong_captions"] = {"clip": _mean(dict(clip=table.values["clip_other"]), "clip")}
    cut = sum(map(bool, tables[scored].values["cut"]))
    table = tables[scored]
    cases = [(i, max(score, 0.0) / 100, [], dict(clip=score)) for i, score in enumerate(table.values["clip"])
             if score is not None]  # fmt: skip
    about = (f"100 x cosine of frames and prompt, mean over frames, of {network}; and of frames that follow each "
             "other. Wrong captions: the reference's videos with captions of other clips.")  # fmt: skip
    if cut:
        about += f" {cut} prompts are longer than it reads, and are cut."
    return _part("Frames and prompts", about, data, CLIP, rows, _cases(tables, scored, cases))


def _mean(values, key):
    return mean_cell(values[key], UNITS.get(key, ""), BETTER.get(key, "low"))


def _part(title, about, data, metrics, rows, cases, series=()):
    found = {key: name for key, name in metrics.items()
             if any(cells.get(key, {}).get("value") is not None for cells in rows.values())}  # fmt: skip
    rows = {name: {key: cells[key] for key in found if key in cells} for name, cells in rows.items()}
    return dict(title=title, about=about, data=data, metrics=found, headline=next(iter(found), None), rows=rows,
                series=list(series), cases=cases)  # fmt: skip


def _range(values, both):
    """(lowest, highest) that 95 % of the reference's clips have; None where there are none."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    low, high = np.quantile(there, (0.025, 0.975) if both else (0.0, 0.95))
    return (low if both else -np.inf), high


def _cases(tables, scored, found):
    """Those cases whose videos are kept. found: (number of the clip, score, failed, values) of each."""
    row, places, part = tables[scored].row, tables[scored].places, []
    reference = tables["reference"]
    for i, score, failed, values in found:
        if i in places:
            same = i < len(reference) and reference.row.names[i] == row.names[i]
            part.append(dict(
                id=f"{row.name}/{row.names[i]}", caption=row.captions[i], seed=row.seeds[i] if row.seeds else None,
                failed=failed, score=score, values=values, events=[], video=places[i],
                truth=reference.places.get(i) if same else None,
            ))  # fmt: skip
    return part


def _spectra(tables):
    series = []
    for kind, frequencies, unit in (("spatial", video_metrics.SPATIAL_FREQUENCIES, "cycles a pixel"),
                                    ("temporal", video_metrics.TEMPORAL_FREQUENCIES, "cycles a frame")):  # fmt: skip
        lines = {}
        for name, table in tables.items():
            if there := [s for s in table.spectra(kind) if s is not None]:
                cells = [mean_cell(column.tolist()) for column in np.stack(there).T]
                lines[name] = dict(x=frequencies.tolist(), **_line(cells))
        if lines:
            series.append(dict(title=f"Mean {kind} spectrum of brightness", x_label=unit, y_label="dB", lines=lines))
    return series


def _line(cells):
    return {ours: [cell[theirs] for cell in cells] for ours, theirs in (("y", "value"), ("lo", "lo"), ("hi", "hi"))}


def _motion(tables):
    shares, lines = np.linspace(0, 1, 21), {}
    for name, table in tables.items():
        if there := [value for value in table.values["motion"] if value is not None]:
            quantiles = np.quantile(there, shares).tolist()
            lines[name] = dict(x=shares.tolist(), y=quantiles, lo=quantiles, hi=quantiles)
    series = dict(title="Motion that this share of clips stays below", x_label="share of clips", y_label="sides/s",
                  lines=lines)  # fmt: skip
    return [series] if lines else []


# --- In words


def titles(tables: dict[str, Table]) -> dict[str, str]:
    """Row -> what it is called."""
    return {name: table.row.title for name, table in tables.items()} | {"wrong_captions": "wrong captions"}


def markdown(scores: dict) -> str:
    """scores.md."""
    at = "" if scores["step"] is None else f" at step {scores['step']}"
    lines = [f"# Video scores of {scores['run']}{at}", "", f"{scores['clips']} clips.", ""]
    for part in scores["parts"].values():
        lines += [f"## {part['title']}", "", part["about"], "", f"| | {' | '.join(part['metrics'].values())} | n |",
                  "|---|" + "---|" * (len(part["metrics"]) + 1)]  # fmt: skip
        for row, cells in part["rows"].items():
            said = [_cell(key, cells.get(key)) for key in part["metrics"]]
            n = max((cell["n"] for cell in cells.values()), default=0)
            lines.append(f"| {scores['titles'][row]} | {' | '.join(said)} | {n} |")
        lines.append("")
    if scores["not_scored"]:
        lines += ["## Not scored", "", *(f"- {name}: {why}." for name, why in scores["not_scored"].items()), ""]
    hashes = ", ".join(f"{name} {scores[name]}" for name in ("code", "config", "checkpoint"))
    data = ", ".join(f"{name} {identity}" for name, identity in (scores["data"] | scores["networks"]).items())
    lines.append(f"sorax {scores['code_version']}; {hashes}; {data}; seed {scores['seed']}.")
    return "\n".join(lines) + "\n"


def summary_lines(scores: dict) -> list[str]:
    """The scores in a few lines of plain text, for a terminal."""
    lines = []
    for part in scores["parts"].values():
        for row, cells in part["rows"].items():
            said = ", ".join(f"{part['metrics'][key]} {_cell(key, cell)}" for key, cell in cells.items())
            lines.append(f"{scores['titles'][row]}: {said}")
    return lines + [f"not scored: {name}: {why}" for name, why in scores["not_scored"].items()]


def _cell(key, cell):
    if cell is None or cell["value"] is None:
        return "none"
    form = FORMS[key]
    return f"{number(cell['value'], form)} [{number(cell['lo'], form)}, {number(cell['hi'], form)}]"
