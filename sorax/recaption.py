"""A data set captioned anew: any source in, the same source out with short and detailed captions.

Out of a folder of files comes a folder with the same files (links, or copies on another disk) and a metadata.jsonl
whose lines have

    file, caption (the detailed one), caption_original (the one before, "" if there was none), captions {kind: caption}

Of another source, such as the world or a TFDS data set, metadata.jsonl has a `key` in place of `file`, and source.json
says what it belongs to: train on it as --config.data.path=captions:FOLDER. What is done is kept in .captions/ as it is
done, so that a run that was stopped goes on, and several processes share the work; the last to finish writes the list.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipelines.caption_kinds import METADATA, ORIGINAL, SOURCE
from data_pipelines.decode import DecodeError
from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.index import FolderRecords, build_index
from data_pipelines.inspection import Limits
from data_pipelines.listing import list_kinds
from data_pipelines.sources import is_folder, open_source
from sorax import config as config_lib
from sorax.caption_endpoint import DETAILED, EndpointCaptioner
from sorax.caption_writer import CaptionRun
from sorax.decoding import DecodingConfig
from sorax.endpoint import AnswerError, concurrently
from sorax.errors import UserError

WORK, SUMMARY, SETTINGS = ".captions", "captions.json", "settings.json"
BATCH = 32  # videos that a captioner sees together
FAILURES = 20  # one after the other, at which a run stops: it is no matter of single videos then


def open_uncaptioned(data: dict, cache: str, progress=None, **grid):
    """The source of a `data` section, where it is a folder with the files that have no caption yet too.

    Args:
        cache: folder where its index is kept. grid: see `data_pipelines.sources.open_source`.
    """
    if not is_folder(data):
        return open_source(data, index_cache=cache, index_progress=progress, **grid)
    names = ("max_tokens", "fps", "max_frames", "min_frames", "oversize")
    fit = Fit(**{name: data[name] for name in names if data.get(name) is not None}, **grid)
    limits = Limits(max_seconds=fit.max_frames / fit.fps if fit.fps else None,
                    max_frames=None if fit.fps else fit.max_frames)  # fmt: skip
    index = build_index(FolderRecords(data["path"], limits, allow_uncaptioned=True), cache, limits=limits,
                        progress=progress)  # fmt: skip
    return FolderSource(data["path"], fit=fit, index=index)


class Records:
    """Captions that are done, by key, in files that are added to line by line; one file a process.

    identity: of the source and of who writes, in words: others' captions are not gone on with. shard: (k, n).

    Raises:
        UserError: the folder holds captions of something else, or cannot be written.
    """

    def __init__(self, out: str, identity: dict, shard: tuple[int, int] = (0, 1)):
        self.folder, self._file = Path(out, WORK), None
        self._name = f"done-{shard[0]:05d}-of-{shard[1]:05d}.jsonl"
        settings = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = json.loads(settings.read_text()) if settings.exists() else None
            begun = any(path.stat().st_size for path in self.folder.glob("done-*.jsonl"))
            if there is not None and begun:
                if differ := _differences(there, identity):
                    raise UserError(f"{out} holds captions of other settings ({'; '.join(differ[:4])}): name another "
                                    "--out; what an endpoint was asked already it is not asked again with --cache "
                                    f"{self.folder / 'answers'}")  # fmt: skip
            elif there is None and any(path.name != WORK for path in Path(out).iterdir()):
                raise UserError(f"--out {out} holds something else: name a new folder")
            else:
                config_lib.write_atomic(str(settings), json.dumps(identity))
        except (OSError, ValueError) as error:
            raise UserError(f"captions cannot be kept in {out} ({error}): name another --out") from error

    def read(self) -> dict[str, dict]:
        """What all processes have done: key -> its line. What failed and was done later is done."""
        done = {}
        for path in sorted(self.folder.glob("done-*.jsonl")):
            with open(path, encoding="utf-8") as f:
                for line in f:
                    try:
                        row = json.loads(line)
                        key = row["key"]
                    except (ValueError, KeyError, TypeError):  # the last line of one that was killed
                        continue
                    if "failed" not in row or key not in done:
                        done[key] = row
        return done

    def add(self, key: str, **row):
        """Keeps a line, at once."""
        if self._file is None:
            path = self.folder / self._name
            whole = not path.exists() or path.read_bytes()[-1:] in (b"\n", b"")
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the work goes on)
            self._file.write("" if whole else "\n")
        self._file.write(json.dumps(dict(key=key) | row) + "\n")
        self._file.flush()

    def close(self):
        if self._file is not None:
            self._file.close()
            self._file = None


def _differences(there, here, name="") -> list[str]:
    """What differs between two settings, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [line for key in {**there, **here}
                for line in _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))]  # fmt: skip
    return [] if there == here else [f"{name}: {there} there, {here} here"]


def recaption(
    source, out: str, captions: Callable[[list[int]], Iterator[tuple]], *, identity: dict, section: dict,
    shard: tuple[int, int] = (0, 1), caption: str = DETAILED, progress: Callable[[int, int], None] = lambda *_: None,
) -> dict | None:  # fmt: skip
    """Captions a source and writes it to a folder.

    Args:
        source: see `open_uncaptioned`. section: the `data` section it was opened from, with its path absolute.
        captions: numbers of samples -> (number, {kind: caption} or an exception) as they are done.
        progress: called with how many of this process's samples are done, those of former runs too, and how many there
            are.
        identity: of who writes, in words; more entries than the source's own, which is added.
        shard: (k, n): this process does every n-th sample. caption: the kind that becomes a sample's own caption.

    Returns:
        what captions.json holds: counts of samples captioned, failed and rejected, with the reasons; None where other
        processes are still at work.

    Raises:
        UserError: the folder holds something else, or FAILURES samples failed one after the other.
    """
    keys = [source.spec(i).key for i in range(len(source))]
    records = Records(out, dict(data=json.loads(json.dumps(section)), samples=len(keys)) | identity, shard)
    _write(records, keys, range(shard[0], len(keys), shard[1]), captions, progress)
    done = records.read()
    if any(key not in done for key in keys):
        return None
    return _finish(source, out, keys, done, section, caption)


def clip_captions(open_writer: Callable, identity: dict, data: dict, work: str, progress=lambda *_: None, **grid):
    """The captioning stage of `data_pipelines.curate`: function folder -> {path of a clip: {kind: caption}}.

    Args:
        open_writer: source -> `captions` of `recaption`. identity: of who writes. data: how clips are looked at, a
            `data` section without its path. work: folder in that of the clips where what is done is kept.
    """

    def run(folder: str) -> dict[str, dict[str, str]]:
        here = os.path.join(folder, work)
        source = open_uncaptioned(dict(data, path=folder), os.path.join(here, WORK, "index"), **grid)
        keys, records = [source.spec(i).key for i in range(len(source))], Records(here, identity)
        _write(records, keys, range(len(keys)), open_writer(source), progress)
        return {key: row["captions"] for key, row in records.read().items() if "captions" in row}

    return run


def _write(records, keys, mine, captions, progress):
    """Captions of the samples `mine` that are not done yet, into the records."""
    done, failures = records.read(), 0
    todo = [i for i in mine if "captions" not in done.get(keys[i], {})]
    before = len(mine) - len(todo)
    try:
        for count, (i, found) in enumerate(captions(todo), 1):
            if isinstance(found, Exception):
                if not isinstance(found, AnswerError | DecodeError | _Unreadable):
                    raise found
                failures += 1
                records.add(keys[i], failed=" ".join(str(found).split())[:300])
                if failures >= min(FAILURES, len(mine)) and failures == count:
                    raise UserError(f"the first {failures} samples failed, the last one so: {found}")
                if failures >= FAILURES:
                    raise UserError(f"{failures} samples failed one after the other, the last one so: {found}; what is "
                                    "done is kept")  # fmt: skip
            else:
                failures = 0
                records.add(keys[i], captions=found)
            progress(before + count, len(mine))
    finally:
        records.close()


class _Unreadable(Exception):
    """A sample that could be decoded when it was indexed but no longer."""


# --- Who writes


def by_endpoint(captioner: EndpointCaptioner, source) -> Callable:
    """`captions` of `recaption`, by a model behind an endpoint: as many at a time as it is asked to take."""

    def one(i):
        sample = _read(source, i)
        return captioner.captions(sample["video"], sample["fps"])

    return lambda numbers: concurrently(one, numbers, captioner.endpoint.config.concurrency)


def by_run(run: CaptionRun, settings: DecodingConfig, source) -> Callable:
    """`captions` of `recaption`, by a captioner that was trained here: all kinds that it writes."""

    def write(numbers):
        for start in range(0, len(numbers), BATCH):
            some, samples = [], []
            for i in numbers[start : start + BATCH]:
                try:
                    samples.append(_read(source, i)["video"])
                    some.append(i)
                except _Unreadable as error:
                    yield i, error
            texts = {kind: run.writer.captions(samples, kind, settings, seeds=some) for kind in run.writer.config.kinds}
            for k, i in enumerate(some):
                found = {kind: texts[kind][k] for kind in texts}
                silent = [kind for kind, text in found.items() if not text.strip()]
                yield i, AnswerError(f"the captioner wrote nothing as {silent[0]!r} caption") if silent else found

    return write


def _read(source, i):
    try:
        return source[i]
    except UserError as error:
        raise _Unreadable(str(error)) from error


# --- The folder that is written


def _finish(source, out, keys, done, section, caption) -> dict:
    folder, files = Path(out), is_folder(section)
    kinds = list_kinds(section["path"]) if files else {}
    lines, failed = [], {}
    for i, key in enumerate(keys):
        row, before = done[key], source.spec(i).caption
        own = kinds.get(key) or (source.captions(i) if not files and getattr(source, "caption_kinds", ()) else {})
        if "failed" in row:
            failed[key] = row["failed"]
        written = own | row.get("captions", {})
        written.pop(ORIGINAL, None)
        line = {"file" if files else "key": key, "caption": row.get("captions", {}).get(caption) or before}
        line |= dict(caption_original=own.get(ORIGINAL, before), captions=written)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    try:
        if files:
            for key in keys:
                _link(Path(section["path"], key), folder / key)
        else:
            config_lib.write_atomic(str(folder / SOURCE), json.dumps(dict(version=1, data=section), indent=1))
        config_lib.write_atomic(str(folder / METADATA), "".join(lines))
        rejected = [tuple(r) for r in getattr(source, "rejected", ())]
        summary = dict(samples=len(keys), captioned=len(keys) - len(failed), failed=failed, rejected=rejected,
                       written=time.strftime("%Y-%m-%d"))  # fmt: skip
        config_lib.write_atomic(str(folder / SUMMARY), json.dumps(summary, indent=1, ensure_ascii=False))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): free space, and run the same command "
                        "again") from error  # fmt: skip
    return summary


def _link(source: Path, target: Path):
    """The same file under another name: a link of the file system, or a copy on another disk."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A symbolic link would lead out of the folder, which sources refuse.
        os.link(os.path.realpath(source), target)
    except FileExistsError:  # by a process that finished at the same time
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES):
            raise
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.copy2(source, part)
        os.replace(part, target)


def finished(out: str) -> dict | None:
    """What captions.json of a folder holds; None where it is not there."""
    try:
        return json.loads(Path(out, SUMMARY).read_text())
    except (OSError, ValueError):
        return None


