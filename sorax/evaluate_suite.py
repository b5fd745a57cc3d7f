"""Runs a suite on a run: whole, in part, again, and by several processes; its tables in words."""

import dataclasses
import json

import jax

from sorax import processes, sharding
from sorax.curves import training_curves
from sorax.errors import UserError
from sorax.report_html import write_report
from sorax.runs import Run
from sorax.score_report import code_hash, header, number, params_hash, write_scores, writing
from sorax.suite import begin, collect, identity_of, make_units, read_described, verify_units
from sorax.world_suite import Counts, Makers, world_parts

VERSION = 1  # of the world suite: what is asked, and how it is judged; numbers of two versions are not compared
ROWS = {"ground_truth": "ground truth", "vae": "VAE", "model": "model", "untrained": "untrained model"}


def evaluate_world(run: Run, out: str, *, counts: Counts | None = None, only=(), **sampling) -> dict | None:
    """Scores a run by the world suite and writes the report folder `out`, or goes on with it.

    Several processes share the work; each has the networks on its own devices, and their rows are split over those.

    Args:
        counts: how much is asked. only: parts, by how their names begin; all by default. sampling: num_steps,
            guidance_scale, shift, solver; None: as the run's config says.

    Returns:
        what scores.json holds; None in processes that are not the first.

    Raises:
        UserError: the run is not of the embedded world, or `out` holds the evaluation of something else.
    """
    counts = counts or Counts()
    described, parts, left = _prepare(run, counts, sampling, only)
    identity = begin(out, described)
    make_units(parts, out, identity, rank=jax.process_index(), ranks=jax.process_count())
    processes.wait("suite: units")
    if not processes.is_first():
        return None
    scores = header(run.workdir, run.config.kind, run.step, run.config.to_dict())
    del scores["splits"]
    scores |= described | dict(identity=identity, parts=collect(parts, out, identity), not_scored=left,
                               curves=training_curves(run.workdir))  # fmt: skip
    with writing(out):
        write_report(out, scores)
        write_scores(out, scores, markdown(scores))
    return scores


def verify_world(run: Run, out: str, *, units: int = 3, seed: int = 0) -> list[str]:
    """Makes some units of a report again, drawn by `seed`, and says what differs: nothing, if it can be reproduced.

    Raises:
        UserError: `out` is no report of the suite, or one of other weights or of other code: then nothing can be said.
    """
    there = read_described(out)
    if there.get("suite") != "world":
        raise UserError(f"{out!r} is a report of the suite {there.get('suite')!r}: only those of the world suite can "
                        "be verified")  # fmt: skip
    described, parts, _ = _prepare(run, Counts(**there["counts"]), there["sampling"], there["only"])
    differ = [k for k in sorted(described.keys() | there.keys()) if described.get(k) != there.get(k)]
    if differ:
        shown = "; ".join(f"{k}: {there.get(k)!r} there, {described.get(k)!r} here" for k in differ[:3])
        raise UserError(f"{out!r} was made by something else ({shown}): verify it with the same code and run")
    return verify_units(parts, out, identity_of(described), units, seed)


def _prepare(run, counts, sampling, only):
    """(what is evaluated, parts, why others are not scored)."""
    sampling = run.sampling() | {name: value for name, value in sampling.items() if value is not None}
    mesh = sharding.local_mesh() if len(jax.local_devices()) > 1 else None
    makers = Makers(run.generator(mesh), run.networks, sampling)
    parts, left = world_parts(run, makers, counts)
    for name in only:
        if not any(part.name.startswith(name) for part in parts):
            why = "".join(f" ({reason})" for part, reason in left.items() if part.startswith(name))
            raise UserError(f"no part {name!r}{why}: there are {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if not only or part.name.startswith(tuple(only))]
    n = run.networks
    checkpoint = params_hash(dict(dit=n.dit, text=n.text, vae=n.vae))
    config = header(run.workdir, run.config.kind, run.step, run.config.to_dict())["config"]
    described = dict(
        suite="world", version=VERSION, code=code_hash(), config=config, checkpoint=checkpoint, step=run.step,
        tokenizer=run.tokenizer.identity, sampling=sampling, counts=dataclasses.asdict(counts),
        only=list(only),
        data=[part.data for part in parts],
    )  # fmt: skip
    return json.loads(json.dumps(described)), parts, left


# --- In words


def cell_text(cell: dict | None) -> str:
    """A cell of a table: `64.1 % [51.8, 74.7]`, or `0.0123 [0.0110, 0.0136] units/s`."""
    if not cell or cell["value"] is None:
        return "none"
    if cell["kind"] == "rate" or cell["unit"] == "share":
        return f"{100 * cell['value']:.1f} % [{100 * cell['lo']:.1f}, {100 * cell['hi']:.1f}]"
    digits = ".3g" if abs(cell["value"]) < 10 else ".1f"
    text = f"{number(cell['value'], digits)} [{number(cell['lo'], digits)}, {number(cell['hi'], digits)}]"
    return f"{text} {cell['unit']}".rstrip()


def summary_lines(scores: dict) -> list[str]:
    """The headline of each part, for a terminal."""
    lines = []
    for part in scores["parts"].values():
        name = part["headline"]
        cells = {row: table.get(name) for row, table in part["rows"].items()}
        main = "model" if "model" in cells else next(iter(cells))
        others = ", ".join(f"{ROWS.get(row, row)} {cell_text(cell)}" for row, cell in cells.items() if row != main)
        beside = f" ({others})" if others else ""
        lines.append(f"{part['title']}: {part['metrics'][name]} {cell_text(cells[main])}{beside}")
    return lines + [f"not scored: {name}: {reason}" for name, reason in scores.get("not_scored", {}).items()]


def markdown(scores: dict) -> str:
    """scores.md."""
    lines = [f"# {scores['run']} at step {scores['step']}: {scores['suite']} suite, version {scores['version']}", ""]
    for part in scores["parts"].values():
        n = {cell["n"] for table in part["rows"].values() for cell in table.values()}
        lines += [f"## {part['title']}", "",
                  f"{part['about']} With 95 % intervals; n = {max(n, default=0)} unless given.", "",
                  f"| | {' | '.join(part['metrics'].values())} |", "|---|" + "---|" * len(part["metrics"])]  # fmt: skip
        for row, table in part["rows"].items():
            cells = []
            for name in part["metrics"]:
                cell = table.get(name)
                fewer = f" of {cell['n']}" if cell and cell["n"] not in (0, max(n)) else ""
                cells.append(cell_text(cell) + fewer)
            lines.append(f"| {ROWS.get(row, row)} | {' | '.join(cells)} |")
        lines.append("")
    for name, reason in scores.get("not_scored", {}).items():
        lines += [f"Not scored: {name}: {reason}.", ""]
    how = ", ".join(f"{name} {value}" for name, value in scores.get("sampling", {}).items())
    lines.append(f"sorax {scores['code_version']}; code {scores['code']}, config {scores['config']}, checkpoint "
                 f"{scores['checkpoint']}; sampling: {how}.")  # fmt: skip
    return "\n".join(lines) + "\n"
