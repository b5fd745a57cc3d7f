"""Suites of scores: parts made of units, each of which is made once, kept, and can be made again to the bit.

A part asks for something (prompts followed, a hidden object that comes back, ...). Its cases are videos to make and to
judge; its rows are who makes them: the model, and beside it the ceilings and the floor. A unit is some cases of one
row of one part. It is a file of its videos and judgements, so that an interrupted evaluation goes on where it stood,
several processes share the work, and `verify` can make any unit again. A report folder holds

    suite.json       what is evaluated: hashes of code, config, checkpoint and data, and how
    samples/*.npz    the units: videos uint8 [n, T, H, W, 3], fps, judgements (JSON), identity
    scores.json      all scores, for programs      scores.md  the tables      index.html  the report
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from sorax import processes
from sorax.errors import UserError
from sorax.runlog import Progress
from sorax.score_report import make_folder, without_nan, writing
from sorax.statistics import mean_cell, rate_cell

SUITE_FILE, SAMPLES = "suite.json", "samples"


@dataclasses.dataclass(frozen=True)
class Part:
    """What is asked, of whom, and how it is counted.

    Attributes:
        name: such as "prompts/test/short". title, about: for the reader.
        count: cases; case i is the same at any time.
        chunk: cases of a unit.
        make: row -> function of a list of cases that gives their videos, uint8 `[T, H, W, 3]`.
        judge: (video, case) -> judgement, a dict of JSON: `checks` {name: bool, or None if not asked}, `values` {name:
            number or None}, `events` [{kind, frame, x, y}], `score` (from 0, worst, to 1; else the share of checks that
            are right), and what `tables` wants besides.
        caption, seed: of a case. group: of a case, which cases are no independent draws; None: all are.
        metrics: name -> title, in order, of checks, values and what `tables` adds; the first is the headline.
        units: of values, such as {"velocity_error": "units/s"}.
        tables: judgements of all cases of a row -> more cells.
        series: {row: judgements} -> curves.
        fps: of the videos. data: identity of what is asked.
    """

    name: str
    title: str
    about: str
    count: int
    chunk: int
    make: dict[str, Callable[[Sequence[int]], list]]
    judge: Callable[[np.ndarray, int], dict]
    caption: Callable[[int], str]
    seed: Callable[[int], int]
    metrics: dict[str, str]
    fps: float
    data: str
    units: dict[str, str] = dataclasses.field(default_factory=dict)
    group: Callable[[int], int] | None = None
    tables: Callable[[list[dict]], dict] = lambda judgements: {}
    series: Callable[[dict[str, list[dict]]], list] = lambda rows: []


@dataclasses.dataclass(frozen=True)
class Unit:
    """Cases `start..stop` of one row of a part."""

    part: Part
    row: str
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Path inside a report folder."""
        slug = re.sub(r"[^\w.+-]+", "_", f"{self.part.name}_{self.row}_{self.start}")
        return f"{SAMPLES}/{slug}.npz"

    def make(self) -> tuple[list, list[dict]]:
        """Videos and judgements."""
        cases = range(self.start, self.stop)
        videos = self.part.make[self.row](cases)
        return videos, [self.part.judge(video, case) for video, case in zip(videos, cases)]


def units_of(parts) -> list[Unit]:
    """All units of parts, in their order."""
    return [
        Unit(part, row, start, min(start + part.chunk, part.count))
        for part in parts for row in part.make for start in range(0, part.count, part.chunk)
    ]  # fmt: skip


def identity_of(described: dict) -> str:
    """Hash of what an evaluation is of (16 hexadecimal digits)."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def begin(out: str, described: dict) -> str:
    """Makes the report folder of an evaluation, or finds it half done; returns the identity.

    Raises:
        UserError: the folder holds an evaluation of something else: the first differences are named.
    """
    make_folder(out)
    path = os.path.join(out, SUITE_FILE)
    if os.path.exists(path):
        there = read_described(out)
        if there != described:
            keys = [k for k in sorted(there.keys() | described.keys()) if there.get(k) != described.get(k)]
            shown = "; ".join(f"{k}: {there.get(k)!r} there, {described.get(k)!r} here" for k in keys[:3])
            raise UserError(f"{out!r} holds the evaluation of something else ({shown}): name another --out, or delete "
                            "that folder")  # fmt: skip
    elif processes.is_first():
        with writing(out):
            os.makedirs(os.path.join(out, SAMPLES), exist_ok=True)
            _write_whole(path, json.dumps(described, indent=1, sort_keys=True).encode())
    processes.wait("suite: folder")
    return identity_of(described)


def read_described(out: str) -> dict:
    """What a report folder is the evaluation of. Raises UserError where it is none."""
    path = os.path.join(out, SUITE_FILE)
    try:
        return json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(f"{out!r} holds no report of a suite ({SUITE_FILE} is missing): name one that `sorax evaluate "
                        "--suite world --out` wrote") from error  # fmt: skip
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again, into another folder") from error


def make_units(parts, out: str, identity: str, *, rank: int = 0, ranks: int = 1):
    """Makes those units that are not there yet: each of `ranks` processes its share."""
    mine = units_of(parts)[rank::ranks]
    total = sum(unit.stop - unit.start for unit in mine)
    with Progress("evaluate", total, unit="clips") as progress:
        for unit in mine:
            if read_unit(out, unit, identity) is None:
                videos, judgements = unit.make()
                with writing(out):
                    _write_unit(os.path.join(out, unit.file), videos, judgements, unit.part.fps, identity)
            progress.advance(progress.done + unit.stop - unit.start, f"{unit.part.name}, {unit.row}")


def _write_unit(path, videos, judgements, fps, identity):
    temporary = path + ".partial"
    with open(temporary, "wb") as f:
        np.savez_compressed(f, videos=np.stack(videos), fps=np.float64(fps), identity=np.array(identity),
                            judgements=np.array(json.dumps(without_nan(judgements))))  # fmt: skip
    os.replace(temporary, path)


def _write_whole(path, data):
    temporary = path + ".partial"
    pathlib.Path(temporary).write_bytes(data)
    os.replace(temporary, path)


def read_unit(out: str, unit: Unit, identity: str, videos: bool = False):
    """Judgements (and videos) of a unit; None if it is not there or is of another evaluation.

    Raises:
        UserError: the file is damaged.
    """
    path = os.path.join(out, unit.file)
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            judgements = json.loads(str(file["judgements"]))
            return (judgements, file["videos"]) if videos else judgements
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and evaluate again, which makes only what is "
                        "missing") from error  # fmt: skip


def collect(parts, out: str, identity: str) -> dict:
    """The `parts` of scores.json, from units that are all there."""
    found = {}
    for part in parts:
        rows = {}
        for unit in units_of([part]):
            judgements = read_unit(out, unit, identity)
            if judgements is None:
                raise UserError(f"{os.path.join(out, unit.file)} is missing: evaluate again, which makes what is not "
                                "there")  # fmt: skip
            rows.setdefault(unit.row, []).extend(judgements)
        found[part.name] = dict(
            title=part.title, about=part.about, data=part.data, metrics=dict(part.metrics),
            headline=next(iter(part.metrics)), rows={row: _cells(part, js) for row, js in rows.items()},
            series=part.series(rows), cases=_cases(part, rows),
        )  # fmt: skip
    return found


def _cells(part, judgements):
    cells = {}
    for name in part.metrics:
        if any(name in j.get("checks", {}) for j in judgements):
            cells[name] = rate_cell([j["checks"].get(name) for j in judgements])
        elif any(name in j.get("values", {}) for j in judgements):
            cells[name] = mean_cell([j["values"].get(name) for j in judgements], part.units.get(name, ""))
    cells |= part.tables(judgements)
    return {name: cells[name] for name in part.metrics if name in cells}


def _cases(part, rows):
    """What the report shows of each case of the model."""
    row = "model" if "model" in rows else next(iter(rows))
    cases = []
    for i, judgement in enumerate(rows[row]):
        asked = {name: right for name, right in judgement.get("checks", {}).items() if right is not None}
        start = i // part.chunk * part.chunk
        files = {r: dict(file=Unit(part, r, start, start).file, index=i - start) for r in rows}
        cases.append(
            dict(id=f"{part.name}/{i}", caption=part.caption(i), seed=part.seed(i), checks=judgement.get("checks", {}),
                 values=judgement.get("values", {}),
                 failed=[part.metrics.get(name, name) for name, right in asked.items() if not right],
                 score=judgement.get("score", float(np.mean(list(asked.values()))) if asked else 0.0),
                 events=judgement.get("events", []), video=files[row], truth=files.get("ground_truth"),
                 **({"group": part.group(i)} if part.group else {}))
        )  # fmt: skip
    return cases


def verify_units(parts, out: str, identity: str, count: int, seed: int) -> list[str]:
    """Makes `count` units again, drawn by `seed`, and compares every pixel and judgement. Returns what differs."""
    units = units_of(parts)
    problems = []
    chosen = np.random.default_rng(seed).permutation(len(units))[:count]
    with Progress("verify", len(chosen), unit="units") as progress:
        for number in chosen:
            unit = units[number]
            there = read_unit(out, unit, identity, videos=True)
            if there is None:
                problems.append(f"{unit.file}: missing, or of another evaluation")
            else:
                videos, judgements = unit.make()
                differ = int(sum((a != b).any() for a, b in zip(np.stack(videos), there[1])))
                if differ:
                    problems.append(f"{unit.file}: {differ} of {len(videos)} videos differ")
                if json.loads(json.dumps(without_nan(judgements))) != there[0]:
                    problems.append(f"{unit.file}: judgements differ")
            progress.advance(progress.done + 1, unit.file)
    return problems
