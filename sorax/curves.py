"""Curves over training, for a report: what a run's metrics.jsonl says of validation."""

import json
import math
import os

_TITLES = {"val_loss": ("Validation loss", "loss"), "val_psnr": ("Validation PSNR", "dB")}
_SIGMA = "val_loss_sigma_"


def training_curves(workdir: str) -> list[dict]:
    """Curves of a run over its steps: validation losses, and the scores `eval/...` logged while training.

    Each is dict(title, x_label, y_label, lines {name: dict(x, y, lo, hi)}), lo and hi being None where no interval was
    logged. `eval/prompts/joint` is the line "joint" of the curve "prompts"; its interval is `eval/prompts/joint_lo` and
    `_hi`. A step that was logged twice, by a run that was resumed, has its last value. Lines that are no JSON (the last
    one of a killed run) are left out. A run without the file has no curves.
    """
    points = _points(os.path.join(workdir, "metrics.jsonl"))
    curves = {}
    for name, values in sorted(points.items(), key=lambda item: item[0] not in _TITLES):
        place = _place(name)
        if place is None or (name[-3:] in ("_lo", "_hi") and name[:-3] in points):
            continue
        title, y_label, line = place
        entry = curves.setdefault(title, dict(title=title, x_label="step", y_label=y_label, lines={}))
        steps = sorted(values)
        bands = {end: [points.get(f"{name}_{end}", {}).get(step) for step in steps] for end in ("lo", "hi")}
        entry["lines"][line] = dict(x=steps, y=[values[step] for step in steps]) | {
            end: band if None not in band else None for end, band in bands.items()
        }
    return list(curves.values())


def _points(path):
    """{metric: {step: value}} of a metrics.jsonl."""
    points = {}
    try:
        with open(path, errors="replace") as file:
            rows = list(filter(None, map(_row, file)))
    except FileNotFoundError:
        return {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, {})[row["step"]] = value
    return points


def _row(line):
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _place(name):
    """Title, y label and name of the line on which a metric is drawn; None where it is none of a report's."""
    if name in _TITLES:
        return *_TITLES[name], "model"
    if name.startswith(_SIGMA):
        return "Validation loss by noise level", "loss", f"noise level {name.removeprefix(_SIGMA)}"
    if name.startswith("eval/"):
        *group, metric = name.removeprefix("eval/").split("/")
        return ("/".join(group) or metric).replace("_", " "), "score", metric.replace("_", " ") if group else "model"
    return None
