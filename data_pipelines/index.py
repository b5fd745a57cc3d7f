"""The index of a data set: a table with one row a sample, usable or not, made by one pass and kept on disk.

An index is a folder with `index.parquet` (the columns of COLUMNS), `settings.json` (what was indexed, how far, counts)
and, while it is made, `parts/` (rows that are done). A run that was killed goes on from there; a later run measures
only what has changed since. A folder's rows are sorted by key; those of another source are in its own order.
kind is "video" or "image", and "" for what was never opened (its reason says why).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.decode import IMAGE_SUFFIXES, VideoInfo
from data_pipelines.inspection import Limits, MeasureFile, MeasureSample, reason_kind
from data_pipelines.listing import Inside, Listing, check_caption, list_folder
from data_pipelines.workers import Failure, default_processes, run_bounded
from sorax.errors import UserError

VERSION = 1
TABLE, SETTINGS, PARTS = "index.parquet", "settings.json", "parts"
# What is measured of a sample, then what its caption is and whether it is usable.
_MEASURED = {
    "key": pa.large_string(), "kind": pa.large_string(), "num_frames": pa.int32(), "height": pa.int32(),
    "width": pa.int32(), "fps": pa.float64(), "rotation": pa.int16(), "duration": pa.float64(), "span": pa.float64(),
    "codec": pa.large_string(), "container": pa.large_string(), "bytes": pa.int64(), "mtime_ns": pa.int64(),
    "sha256": pa.large_string(), "reason": pa.large_string(),
}  # fmt: skip
COLUMNS = pa.schema(
    [(name, kind) for name, kind in _MEASURED.items() if name != "reason"]
    + [("caption", pa.large_string()), ("caption_length", pa.int32()), ("reason", pa.large_string())]
)
_PART_ROWS, _PART_SECONDS = 4096, 10.0  # what a killed run loses at most


class Index:
    """The rows of an index. `table`: pyarrow, with the columns of COLUMNS; `settings`: see settings.json."""

    def __init__(self, table: pa.Table, settings: dict):
        self.table, self.settings = table, settings

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Index:
        """Reads an index. Raises UserError if there is none, or it cannot be read."""
        folder = Path(folder)
        if not (folder / SETTINGS).is_file() or not (folder / TABLE).is_file():
            begun = "was begun there but not finished" if (folder / PARTS).is_dir() else "is there"
            raise UserError(f"{folder}: no index {begun}; make it with `sorax data index --path FOLDER --out {folder}`")
        try:
            settings = json.loads((folder / SETTINGS).read_text())
            table = pq.read_table(folder / TABLE)
        except (OSError, ValueError, pa.ArrowException) as e:
            raise UserError(f"the index {folder} cannot be read ({_one_line(e)}): remove it and make it again") from e
        if settings.get("version") != VERSION or table.schema.names != COLUMNS.names:
            raise UserError(f"the index {folder} is of another version of sorax: remove it and make it again")
        return cls(table.cast(COLUMNS).combine_chunks(), settings)

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Every column as a numpy array [n]; text as objects. Made when it is first asked for."""
        return _Columns(self.table)

    @functools.cached_property
    def usable(self) -> np.ndarray:
        """Rows without a reason against them, int64."""
        return np.flatnonzero(pc.equal(self.table["reason"], "").to_numpy(zero_copy_only=False))

    def info(self, row: int) -> VideoInfo:
        """What was measured of a sample."""
        values = {name: self.table[name][row].as_py() for name in _MEASURED}
        names = {field.name for field in dataclasses.fields(VideoInfo)} & set(values)
        return VideoInfo(**{name: values[name] for name in names}, is_image=values["kind"] == "image")

    @property
    def identity(self) -> str:
        """Hash of what the samples are: keys, contents, captions and measures; not of times and places of files."""
        return self.settings["identity"]

    def rejected(self) -> dict[str, int]:
        """Number of unusable samples by the kind of their reason, the most frequent first."""
        return dict(self.settings["rejected"])


class _Columns(Mapping):
    """Columns of a table as numpy arrays, each made once."""

    def __init__(self, table: pa.Table):
        self._table, self._made = table, {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._made:
            self._made[name] = self._table[name].to_numpy()
        return self._made[name]

    def __iter__(self):
        return iter(self._table.column_names)

    def __len__(self):
        return self._table.num_columns


class FolderRecords:
    """The files of a folder, as what `build_index` measures. allow_uncaptioned: files without a caption are usable."""

    def __init__(self, folder: str | os.PathLike, limits: Limits, allow_uncaptioned: bool = False):
        self.folder, self.allow_uncaptioned = Path(folder), allow_uncaptioned
        self.limits = limits
        self.description = dict(kind="folder", path=str(self.folder.resolve()))

    def listing(self) -> Listing:
        listing = list_folder(self.folder)
        if not self.allow_uncaptioned:
            return listing
        inside, captionless = Inside(self.folder), ("no caption", "bad caption")  # which may hide that a name leads out
        reasons = [inside.reason(key) if reason.startswith(captionless) else reason
                   for key, reason in zip(listing.keys, listing.reasons)]  # fmt: skip
        return listing._replace(reasons=reasons)

    def measurer(self) -> Callable:
        return MeasureFile(self.folder, self.limits)

    def items(self, rows: np.ndarray, keys: list[str]):
        return (keys[i] for i in rows)


class SourceRecords:
    """The samples of any source, by the Source protocol; it says their sizes, and their pixels are hashed.

    path, section: what the source was made from, in words and in full (anything that JSON holds); an index of another
    is not gone on with. Of the same, samples of the same key and size are taken to be unchanged.
    """

    def __init__(self, source, path: str, section: Any = None):
        self.source = source
        self.description = dict(kind="source", path=path, section=json.loads(json.dumps(section)))

    def listing(self) -> Listing:
        specs = [self.source.spec(i) for i in range(len(self.source))]
        if not specs:
            raise UserError(f"{self.description['path']} holds no samples: nothing to index")
        keys = [spec.key for spec in specs]
        if len(set(keys)) < len(keys):
            twice = next(key for key, count in Counter(keys).items() if count > 1)
            raise UserError(f"two samples have the key {twice!r}: an index needs them to differ")
        captions = [spec.caption for spec in specs]
        reasons = [check_caption(caption) for caption in captions]
        sizes = np.array([3 * s.num_frames * s.height * s.width for s in specs], np.int64)
        lengths = np.array([len(caption) for caption in captions], np.int32)
        captions = ["" if reason else caption for caption, reason in zip(captions, reasons)]
        return Listing(keys, captions, lengths, reasons, sizes, np.zeros(len(keys), np.int64))

    def measurer(self) -> Callable:
        return MeasureSample(self.source)

    def items(self, rows: np.ndarray, keys: list[str]):
        return (int(i) for i in rows)


def build_index(
    records: str | os.PathLike | FolderRecords | SourceRecords,
    out: str | os.PathLike | None = None,
    *,
    limits: Limits = Limits(),
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Makes the index of a folder or a source, or brings it up to date.

    Arguments:
      records: a folder, or what else is to be measured.
      out: folder of the index; None keeps it in memory only. One process at a time works on it, others wait.
      limits: how far each file is decoded; an index that was made with others is made anew.
      processes: see `run_bounded`.
      progress: called with (samples done, samples to do) of those that have to be measured.
    Raises UserError if there is nothing to index, or `out` cannot be written or is something else.
    """
    if isinstance(records, str | os.PathLike):
        records = FolderRecords(records, limits)
    settings = dict(version=VERSION, source=records.description, limits=dataclasses.asdict(limits))
    with _locked(out):
        return _build(records, Path(out) if out else None, settings, limits, processes, progress)


def check_source(out: str | os.PathLike, records: FolderRecords | SourceRecords):
    """Raises UserError where `out` is the index of another source, which `build_index` would replace."""
    try:
        there = json.loads(Path(out, SETTINGS).read_text())["source"]
    except (OSError, ValueError, KeyError):
        return
    here = records.description
    if (there.get("kind"), there.get("path")) != (here["kind"], here["path"]):
        raise UserError(f"{out} is the index of {there.get('path')}, not of {here['path']}: name another folder")


def _build(records, out, settings, limits, processes, progress) -> Index:
    listing = records.listing()
    keys = pa.array(listing.keys, pa.large_string())
    parts = _Parts(out, settings)
    known = parts.known
    # A row still holds if size and time of the file are the same; captions are read anew in any case.
    place = pc.index_in(keys, known["key"]).fill_null(-1).to_numpy()
    fresh = np.array([reason == "" for reason in listing.reasons])
    held = (place >= 0) & fresh
    same = (known["bytes"].to_numpy()[place[held]] == listing.sizes[held]) & (
        known["mtime_ns"].to_numpy()[place[held]] == listing.mtimes[held]
    )
    held[held] = same
    todo = np.flatnonzero(fresh & ~held)

    results = run_bounded(
        records.measurer(),
        records.items(todo, listing.keys),
        processes=min(default_processes() if processes is None else processes, len(todo)),
        time_limit=limits.time_limit + 2.0,  # a decoder that hangs cannot look at the clock
        memory_limit=limits.memory,
    )
    try:
        if progress and len(todo):
            progress(0, len(todo))
        for done, (row, (_, result)) in enumerate(zip(todo.tolist(), results), 1):
            parts.add(listing.keys[row], listing.sizes[row], listing.mtimes[row], result)
            if progress:
                progress(done, len(todo))
    finally:
        results.close()
        parts.flush()

    measured = pa.concat_tables([known.take(pa.array(place[held])), parts.added()])
    where = np.full(len(keys), -1)
    where[held], where[todo] = np.arange(held.sum()), held.sum() + np.arange(len(todo))
    table = _assemble(listing, keys, measured, where)
    kinds = Counter(reason_kind(reason) for reason in table["reason"].to_pylist() if reason)
    settings |= dict(rows=len(table), usable=len(table) - sum(kinds.values()))
    settings |= dict(rejected=dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))), identity=_hash(table))
    if out:
        _write(out, table, settings)
    return Index(table.combine_chunks(), settings)


def _assemble(listing: Listing, keys: pa.Array, measured: pa.Table, where: np.ndarray) -> pa.Table:
    """The table of a listing; where: row of `measured` of each of its rows, -1 where it was left out unopened."""
    rows = measured.take(pa.array(where, pa.int64(), mask=where < 0))
    columns = {}
    for name, kind in _MEASURED.items():
        empty = pa.scalar("" if pa.types.is_large_string(kind) else 0, kind)
        columns[name] = rows[name].combine_chunks().fill_null(empty)
    left_out = pa.array(listing.reasons, pa.large_string())
    columns |= dict(
        key=keys, caption=pa.array(listing.captions, pa.large_string()),
        caption_length=pa.array(listing.caption_lengths, pa.int32()), bytes=pa.array(listing.sizes, pa.int64()),
        mtime_ns=pa.array(listing.mtimes, pa.int64()),
        reason=pc.if_else(pc.equal(left_out, ""), columns["reason"], left_out),
    )  # fmt: skip
    return pa.table([columns[name] for name in COLUMNS.names], schema=COLUMNS)


def _hash(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in ("key", "kind", "num_frames", "height", "width", "fps", "span", "sha256", "caption", "reason"):
        for start in range(0, len(table), 1 << 16):
            values = table[name][start : start + (1 << 16)].to_pylist()
            digest.update(json.dumps(values).encode())
    return digest.hexdigest()[:32]


class _Parts:
    """Rows that are measured: those known from before, and those that are added, written to disk every few seconds."""

    def __init__(self, out: Path | None, settings: dict):
        self.folder, self.tables, self.rows, self.number = out and out / PARTS, [], [], 0
        self.written = time.monotonic()
        known = []
        if out:
            if _read_settings(out / SETTINGS, settings) and (out / TABLE).is_file():
                known.append(_read_rows(out / TABLE))
            if _read_settings(self.folder / SETTINGS, settings):
                for path in sorted(self.folder.glob("*.parquet")):
                    known.append(_read_rows(path))
                    self.number = int(path.stem) + 1
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        empty = pa.schema(_MEASURED.items()).empty_table()
        # The latest first, so that it is found.
        known = pa.concat_tables([*reversed([table for table in known if table is not None]), empty])
        self.known = known.filter(pc.not_equal(known["kind"], "")).combine_chunks()
        self.settings = settings

    def add(self, key: str, size: int, mtime: int, result):
        """Adds what was measured of a sample, or that it could not be."""
        info, digest = (VideoInfo(reason=result.reason), "") if isinstance(result, Failure) else result
        row = dataclasses.asdict(info) | dict(key=key, bytes=size, mtime_ns=mtime, sha256=digest)
        row["kind"] = "image" if info.is_image or key.lower().endswith(IMAGE_SUFFIXES) else "video"
        self.rows.append([row[name] for name in _MEASURED])
        if len(self.rows) >= _PART_ROWS or time.monotonic() - self.written > _PART_SECONDS:
            self.flush()

    def flush(self):
        """Makes a table of the rows that were added, and keeps it on disk."""
        if not self.rows:
            return
        arrays = [pa.array(values, kind) for values, kind in zip(zip(*self.rows), _MEASURED.values())]
        self.tables.append(pa.table(arrays, schema=pa.schema(_MEASURED.items())))
        self.rows = []
        if self.folder:
            with _writing(self.folder.parent):
                self.folder.mkdir(parents=True, exist_ok=True)
                _write_json(self.folder / SETTINGS, self.settings)
                _write_table(self.folder / f"{self.number:08d}.parquet", self.tables[-1])
            self.number += 1
        self.written = time.monotonic()

    def added(self) -> pa.Table:
        return pa.concat_tables([*self.tables, pa.schema(_MEASURED.items()).empty_table()])


def _read_settings(path: Path, wanted: dict) -> bool:
    """Whether rows of the same source, measured within the same limits, are there."""
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return all(there.get(name) == wanted[name] for name in ("version", "source", "limits"))


def _read_rows(path: Path) -> pa.Table | None:
    """The measured columns of a table; None if it cannot be read, so that its samples are measured again."""
    try:
        return pq.read_table(path, columns=list(_MEASURED)).cast(pa.schema(_MEASURED.items()))
    except (OSError, ValueError, pa.ArrowException):
        return None


def _write(out: Path, table: pa.Table, settings: dict):
    with contextlib.suppress(UserError):
        there = Index.load(out)
        if there.settings == settings and there.table.equals(table):  # others may be reading it
            shutil.rmtree(out / PARTS, ignore_errors=True)
            return
    with _writing(out):
        (out / SETTINGS).unlink(missing_ok=True)  # a table is never beside the settings of another
        _write_table(out / TABLE, table)
        _write_json(out / SETTINGS, settings)
    shutil.rmtree(out / PARTS, ignore_errors=True)


@contextlib.contextmanager
def _writing(out: Path):
    try:
        yield
    except OSError as e:
        if e.errno == errno.ENOSPC:  # the command line has its own words for it
            raise
        raise UserError(f"the index {out} cannot be written ({_one_line(e)}): choose another folder") from e


def _write_table(path: Path, table: pa.Table):
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def _write_json(path: Path, values: dict):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


@contextlib.contextmanager
def _locked(out: str | os.PathLike | None):
    """One process at a time: hosts that share a run folder would write over each other's parts."""
    if out is None:
        yield
        return
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder for the index")
    if out.is_dir() and os.listdir(out) and not {TABLE, PARTS, "lock"} & set(os.listdir(out)):
        raise UserError(f"{out} holds something else than an index: name a new folder")
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")  # noqa: SIM115 (open as long as the lock is held)
    with lock as f:
        try:
            import fcntl
        except ImportError:  # not on every system
            yield
            return
        fcntl.flock(f, fcntl.LOCK_EX)  # ends with the process
        yield


def _one_line(error) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
