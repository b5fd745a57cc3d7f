"""Raw videos to cleaned, captioned clips: an Apache Beam pipeline, and a record of what was dropped where and why.

    listing -> scan (probe, cuts, trimming, measuring) -> check -> duplicates -> write -> (caption) -> records

Every raw file and every clip cut out of it ends in exactly one place: kept, or dropped at a stage for a reason. Files
are read and clips are written in bounded worker processes (`workers`), whatever the runner. The pipeline is made of
plain functions; Beam is imported when it runs. Results do not depend on the order in which a runner does things.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines import curate_duplicates as duplicates
from data_pipelines.curate_checks import distance
from data_pipelines.curate_clips import CannotWrite, clip_path, write_clips
from data_pipelines.curate_records import clip_row, file_row, write_outputs
from data_pipelines.curate_scan import judge, scan
from data_pipelines.curate_settings import Settings
from data_pipelines.decode import DecodeError
from data_pipelines.listing import Inside, list_folder
from data_pipelines.workers import Failure, run_bounded
from sorax.errors import UserError

WORK = ".curate"  # in the output folder, until it is finished: what an interrupted run goes on from
RUNNERS = {"flink": "FlinkRunner", "spark": "SparkRunner", "dataflow": "DataflowRunner"}
BATCH = 64  # files that are handed to the worker processes at a time
_STOPPED = re.compile(r"<curation stopped: (.*?)>")
_tell: Callable[[str], None] | None = None  # set while the embedded runner works in this process


@dataclass(frozen=True)
class Context:
    """What every stage knows; paths are absolute, the same on every worker of a runner."""

    raw: str
    out: str
    settings: Settings
    processes: int | None


def curate(
    raw: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings = Settings(),
    *,
    runner="fnapi",
    beam_options: tuple[str, ...] = (),
    processes: int | None = None,
    tell: Callable[[str, int, int], None] | None = None,
    caption: Callable[[str], dict[str, dict[str, str]]] | None = None,
) -> dict:
    """Curates a folder of raw videos into a folder that FolderSource reads.

    Arguments:
      raw: folder of videos, with captions as FolderSource takes them.
      out: new or empty folder, or one that an interrupted run with the same settings left.
      runner: "fnapi" (embedded), "flink", "spark", "dataflow", or a Beam runner.
      beam_options: options for Beam, such as "--flink_master=host:8081".
      processes: worker processes on a machine; None: one a CPU; 0: none, without limits (for tests).
      tell: called with "scan" or "write", the number of files done and the most there can be; embedded runner only.
      caption: the last stage: output folder -> {path of a clip: {kind: caption}}, see `sorax.recaption.clip_captions`.
        It may keep what is done in a folder inside that of the unfinished curation.
    Returns what curation.json holds (`curate_records.write_outputs`), and Beam's own counts as "counters".
    Raises UserError if a folder or a setting cannot be used, or the disk does not take the clips.
    """
    global _tell
    beam = _beam()
    options = _options(runner, beam_options)
    context = Context(os.path.abspath(raw), os.path.abspath(out), settings, processes)
    listing, num_files = _start(context)
    embedded = runner == "fnapi"
    if embedded:
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner

        # Beam's default, the Direct runner, may fetch a program from the net.
        runner = FnApiRunner()
    pipeline = beam.Pipeline(runner=RUNNERS.get(runner, runner) if isinstance(runner, str) else runner, options=options)
    records = _clips_and_records(pipeline | "listing" >> beam.io.ReadFromText(listing), context)
    records | "records" >> beam.io.WriteToText(os.path.join(context.out, WORK, "records"), ".jsonl")
    done = Counter()

    def count(what: str):
        done[what] += 1
        tell(what, done[what], num_files)

    _tell = count if embedded and tell else None
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:
        if "KeyboardInterrupt" in str(error):  # in one of Beam's threads, which tells in its own way
            raise KeyboardInterrupt from None
        stopped = _STOPPED.search(str(error))
        if stopped:
            raise UserError(
                f"cannot write to {out}: {stopped[1]}; make room or choose another folder, then run the command again"
            ) from error
        raise
    finally:
        _tell = None
    counters = {c.key.metric.name: c.committed or c.attempted or 0
                for c in result.metrics().query()["counters"] if c.key.metric.namespace == "curate"}  # fmt: skip
    rows = (json.loads(line) for path in sorted(Path(context.out, WORK).glob("records*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines())  # fmt: skip
    rows = sorted(rows, key=lambda r: (r["file"], r["clip"]))
    kept = {r["path"] for r in rows if r["status"] == "kept"}
    for path in Path(context.out, "clips").iterdir():  # of a file whose last clip could not be written
        if f"clips/{path.name}" not in kept:
            path.unlink()
    captions = caption(context.out) if caption and kept else {}
    summary = write_outputs(context.out, rows, settings=asdict(settings), raw=context.raw, captions=captions)
    shutil.rmtree(os.path.join(context.out, WORK))
    return summary | dict(counters=dict(sorted(counters.items())))


def _beam():
    logging.disable(logging.WARNING)  # Beam warns of programs for clouds that nobody asked for
    try:
        import apache_beam
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise UserError(f"curation needs {error.name}: install it with pip install 'sorax[curate]'") from error
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def _options(runner, flags):
    """Beam's options. Raises UserError for a runner or an option that is not known."""
    from apache_beam.options.pipeline_options import PipelineOptions

    if isinstance(runner, str) and runner not in ("fnapi", *RUNNERS):
        raise UserError(f"--runner {runner!r} is not known: choose one of fnapi, {', '.join(RUNNERS)}")
    known = PipelineOptions([]).get_all_options()
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0]
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise UserError(f"Beam has no option {name!r}: did you mean --beam.{near}?")
    return PipelineOptions(list(flags))


def _start(context: Context) -> tuple[str, int]:
    """Makes the output folder, or finds that it can be gone on with; writes the listing: its path, its length."""
    raw, out = Path(context.raw), Path(context.out)
    for outer, inner in ((raw, out), (out, raw)):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise UserError(f"{inner} lies in {outer}: --path and --out must be folders beside each other")
    if not raw.is_dir():
        raise UserError(f"no folder {raw}: give --path the folder that holds the raw videos")
    listing, inside = list_folder(raw), Inside(raw)
    settings = json.loads(json.dumps(asdict(context.settings) | dict(raw=context.raw)))
    kept = out / WORK / "settings.json"
    if (out / "curation.json").exists():
        raise UserError(f"{out} holds a finished curation: choose another --out, or remove it")
    if kept.exists():
        before = json.loads(kept.read_text())
        changed = sorted(k for k in settings | before if settings.get(k) != before.get(k))
        if changed:
            raise UserError(f"{out} holds an unfinished curation with other settings ({', '.join(changed)}): "
                            "give those again, choose another --out, or remove it")  # fmt: skip
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not an empty folder: choose another, or remove what is in it")
    try:
        for folder in ("clips", f"{WORK}/parts"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for old in (out / WORK).glob("records*"):
            old.unlink()
        _write_whole(kept, json.dumps(settings))
        entries = [_entry(inside, *row) for row in zip(listing.keys, listing.captions, listing.reasons)]
        _write_whole(out / WORK / "files.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; choose another folder") from error
    return str(out / WORK / "files.jsonl"), len(entries)


def _entry(inside: Inside, file: str, caption: str, reason: str) -> dict:
    """A line of the listing: a file, its caption, why it has none, and why it is not to be opened ("" if it may)."""
    missing, unusable = ("", reason) if caption else (reason, "")
    return dict(file=file, caption=caption, missing=missing, refused=inside.reason(file) or unusable)


def _write_whole(path: Path, text: str):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# --- The pipeline


def _clips_and_records(lines, context: Context):
    """The stages, from the lines of a listing to the lines of the records, as Beam's PCollections."""
    import apache_beam as beam

    def stage(name, clips, function):
        done = clips | name >> beam.FlatMap(function, context).with_outputs("records", main="clips")
        return done.clips, done.records

    files = lines | beam.Map(json.loads) | beam.Reshuffle() | beam.BatchElements(BATCH, BATCH)
    scanned, records_of_files = stage("scan", files, scan_batch)
    good, dropped = stage("check", scanned, check)
    unique, copies = stage("duplicates", join_sets(good, context.settings.duplicate_bits), keep_best)
    by_file = unique | beam.GroupBy(lambda c: c["file"]) | "files to cut" >> beam.BatchElements(BATCH, BATCH)
    written, lost = stage("write", by_file, write_batch)
    kept = written | "kept" >> beam.Map(lambda c: _record(clip_row(c)))
    return (records_of_files, dropped, copies, lost, kept) | beam.Flatten()


def join_sets(clips, bits: int):
    """Groups clips into lists of those that are near-duplicates of each other, however many steps apart."""
    import apache_beam as beam

    banded = clips | beam.FlatMap(
        lambda c: [(".".join(map(str, key)), (c["name"], tuple(c["hashes"])))
                   for key in duplicates.band_keys(c["hashes"], bits)]
    )  # fmt: skip
    pairs = banded | beam.GroupByKey() | beam.FlatMap(lambda group: duplicates.links(group[1], bits)) | beam.Distinct()
    # One worker joins the pairs: they are few, two names for every clip that has a double.
    sets = pairs | beam.combiners.ToList() | beam.FlatMap(duplicates.components)
    named = clips | "by name" >> beam.Map(lambda c: (c["name"], c))
    joined = dict(clip=named, set=sets) | beam.CoGroupByKey()
    return (
        joined
        | "by set" >> beam.FlatMap(lambda pair: [((list(pair[1]["set"]) or [pair[0]])[0], c) for c in pair[1]["clip"]])
        | "sets" >> beam.GroupByKey()
        | beam.Map(lambda group: list(group[1]))
    )


def _count(name: str, many: int = 1):
    from apache_beam.metrics import Metrics

    Metrics.counter("curate", name).inc(many)


def _record(row: dict):
    """A line of the records, and its count."""
    _count(f"{row['kind']}s {row['status']}" + (f" by {row['stage']}" if row["stage"] else ""))
    return json.dumps(row)


def _dropped(clip: dict, stage: str, reason: str, **more):
    from apache_beam.pvalue import TaggedOutput

    return TaggedOutput("records", _record(clip_row(clip, stage, reason, **more)))


def scan_batch(entries: list[dict], context: Context) -> Iterator:
    """Files to clips with their scores; a record of each file."""
    from apache_beam.pvalue import TaggedOutput

    allowed, jobs = context.settings.allow_uncaptioned, []
    for entry in entries:
        stage, reason = ("probe", entry["refused"]) if entry["refused"] else ("caption", entry["missing"])
        if reason and not (allowed and stage == "caption"):
            yield TaggedOutput("records", _record(file_row(entry, {}, stage, reason)))
        else:
            jobs.append(entry)
    for entry, found in _remembered(context, "scan", _scan_file, jobs):
        if "reason" in found:
            yield TaggedOutput("records", _record(file_row(entry, {}, "probe", found["reason"])))
            continue
        blank = ("trim", "nothing but blank frames and fades") if not found["clips"] else ("", "")
        yield TaggedOutput("records", _record(file_row(entry, found, *blank)))
        about = {k: found[k] for k in ("height", "width", "is_image")}
        for number, clip in enumerate(found["clips"]):
            more = dict(file=entry["file"], caption=entry["caption"], number=number, info=about)
            # Names sort as files and numbers do: zero bytes cannot be in a name.
            yield clip | more | dict(name=f"{entry['file']}\0{number:06d}",
                                     path=clip_path(entry["file"], number, clip["whole"]))  # fmt: skip


def check(clip: dict, context: Context) -> Iterator:
    """Lets clips pass whose scores are within the settings."""
    stage, reason = judge(clip, context.settings, clip["info"]["is_image"])
    yield _dropped(clip, stage, reason) if stage else clip


def keep_best(clips: list[dict], _) -> Iterator:
    """The best clip of a set of near-duplicates."""
    best, *others = duplicates.best_first(clips)
    yield best
    for clip in others:
        yield _dropped(clip, "duplicate", "near-duplicate", duplicate_of=best["path"],
                       duplicate_bits=distance(best["hashes"], clip["hashes"]))  # fmt: skip


def write_batch(groups: list[tuple[str, list[dict]]], context: Context) -> Iterator:
    """Writes the clips of some files; passes on those that lie in the output folder."""
    jobs = [dict(file=file, clips=sorted(clips, key=lambda c: c["number"])) for file, clips in groups]
    for job, done in _remembered(context, "write", _write_file, jobs):
        for clip in job["clips"]:
            if "reason" in done:
                yield _dropped(clip, "write", done["reason"])
            else:
                yield clip | dict(bytes=done["bytes"][clip["path"]])


# --- In worker processes


def _scan_file(job: dict, context: Context) -> dict:
    try:
        return scan(os.path.join(context.raw, job["file"]), context.settings)
    except DecodeError as error:
        return dict(reason=error.reason)


def _write_file(job: dict, context: Context) -> dict:
    parts = os.path.join(context.out, WORK, "parts")
    info = job["clips"][0]["info"]
    try:
        limit = 10 * context.settings.time_limit  # encoding is slower than looking
        return dict(bytes=write_clips(context.raw, job["file"], context.out, parts, info, job["clips"], limit))
    except DecodeError as error:
        return dict(reason=error.reason)
    except CannotWrite as error:
        return dict(stop=str(error))


def _remembered(context: Context, what: str, function, jobs: list[dict]) -> Iterator[tuple[dict, dict]]:
    """(job, function(job, context)) in order, or what an interrupted run has found for the same job."""
    if not jobs:
        return
    known = {job["file"]: _recall(context, what, job) for job in jobs}
    todo = [job for job in jobs if known[job["file"]] is None]
    factor = 1 if what == "scan" else 10
    for job, result in run_bounded(
        functools.partial(function, context=context), todo, processes=context.processes,
        time_limit=factor * context.settings.time_limit, memory_limit=context.settings.memory << 20,
    ):  # fmt: skip
        if isinstance(result, Failure):  # perhaps a busy machine: an interrupted run tries it again
            result = dict(reason=result.reason)
        elif "stop" in result:
            raise UserError(f"<curation stopped: {result['stop']}>")
        else:
            path, identity = _memory(context, what, job)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(path, json.dumps(dict(identity=identity, result=result)))
            except OSError as error:
                raise UserError(f"<curation stopped: {error.strerror or error}>") from error
        known[job["file"]] = result
        if _tell:
            _tell(what)
    yield from ((job, known[job["file"]]) for job in jobs)


def _memory(context: Context, what: str, job: dict):
    """Where the result for a job is kept, and what it holds for."""
    name = hashlib.sha256(job["file"].encode()).hexdigest()
    try:
        status = os.stat(os.path.join(context.raw, job["file"]))
        identity = [status.st_size, status.st_mtime_ns]
    except OSError:
        identity = [0, 0]
    clips = [[c["path"], c["first"], c["end"], c["bars"]] for c in job.get("clips", ())]
    return Path(context.out, WORK, what, name[:2], name + ".json"), [*identity, clips]


def _recall(context: Context, what: str, job: dict) -> dict | None:
    path, identity = _memory(context, what, job)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept["result"] if kept["identity"] == identity else None
