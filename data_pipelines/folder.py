"""A folder of videos and images with captions as a source, by way of its index.

Shapes: T frames, H height, W width. A video is uint8 [T, H, W, 3] and T = 4n + 1.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.decode import TIME_LIMIT, DecodeError, decode
from data_pipelines.fit import CHANGES, Fit, Unfit, fit_sample
from data_pipelines.index import Index, build_index
from data_pipelines.inspection import Limits
from data_pipelines.listing import Inside, list_kinds
from data_pipelines.sources import Sample, SampleSpec
from sorax.errors import UserError

_CHUNK = 1 << 16  # rows that are Python objects at a time
_log = logging.getLogger(__name__)


class Rejected(NamedTuple):
    """A file that a folder source cannot use, and why."""

    file: str
    reason: str


class _Info(NamedTuple):
    """What `fit_sample` wants to know of a video."""

    height: int
    width: int
    fps: float
    span: float
    duration: float
    is_image: bool


class FolderSource:
    """A folder of videos and images with captions, each at its own size, shape and length, sorted by file name.

    Which files there are and what they hold is known from an index (see `data_pipelines.index`); what cannot be used,
    or not brought within the limits, is listed in `rejected` and logged once. An image is a video of one frame.
    `changes` counts what is done to the samples: {"rescaled": n, "retimed": n, "trimmed": n, "cropped to grid": n}.
    Where metadata.jsonl has captions of several kinds, `caption_kinds` are their names and `captions` gives them.

    Arguments:
      path: the folder.
      fit: the limits that samples are brought within.
      index: an index of the folder or its path; files that were added later are not seen. None: the folder is indexed
        now, as far into each file as the limits reach.
      cache: folder where an index that is made is kept, so that the next time only what has changed is decoded.
      progress: called with (files done, files to do) while an index is made.
      processes: workers that decode files for it; None: one a CPU.
      time_limit: seconds of work on one file.
    Raises UserError if the folder is missing, holds no usable file or cannot be listed, or the index is not one of a
    folder.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        fit: Fit,
        index: Index | str | os.PathLike | None = None,
        cache: str | os.PathLike | None = None,
        progress: Callable[[int, int], None] | None = None,
        processes: int | None = None,
        time_limit: float = TIME_LIMIT,
    ):
        self.path, self.fit, self.time_limit = Path(path), fit, time_limit
        if index is None:
            seconds = fit.max_frames / fit.fps if fit.fps else None
            frames = None if fit.fps else fit.max_frames
            limits = Limits(max_seconds=seconds, max_frames=frames, time_limit=time_limit)
            index = build_index(self.path, cache, limits=limits, processes=processes, progress=progress)
        else:
            if not self.path.is_dir():
                raise UserError(f"no folder {self.path}: give data.path the folder that was indexed")
            index = index if isinstance(index, Index) else Index.load(index)
            if index.settings["source"]["kind"] != "folder":
                raise UserError(f"data.index is one of {index.settings['source']['path']}, not of a folder of files")
        self._read(index)
        self._read_kinds()
        if len(self._rejected):
            summary = self._summary(len(index))
            if not len(self):
                raise UserError(f"no usable video in {self.path}: {summary}; mend or replace them")
            _log.warning("%s: %s", self.path, summary)

    def _read(self, index: Index):
        """Fits every usable row; keeps columns, not an object a sample: there may be millions."""
        usable, unfit, changes = index.usable, {}, Counter()
        shapes, rates = np.zeros((len(usable), 3), np.int32), np.zeros((len(usable), 2))
        kept = np.ones(len(usable), bool)
        for start in range(0, len(usable), _CHUNK):
            some = index.table.select(_Info._fields[:-1] + ("kind",)).take(pa.array(usable[start : start + _CHUNK]))
            for i, (*numbers, kind) in enumerate(zip(*some.to_pydict().values()), start):
                try:
                    fitted = fit_sample(_Info(*numbers, kind == "image"), self.fit)
                except Unfit as e:
                    kept[i], unfit[int(usable[i])] = False, e.reason
                    continue
                shapes[i] = fitted[:3]
                rates[i] = fitted.fps, fitted.start
                changes.update(fitted.changes)
        rows = usable[kept]
        table = index.table.select(["key", "caption", "bytes", "mtime_ns"]).take(pa.array(rows))
        self._shapes, self._rates = shapes[kept], rates[kept]  # (T, H, W); (fps, seconds into the file)
        self._keys, self._captions = (table[name].combine_chunks() for name in ("key", "caption"))
        self._sizes, self._times = table["bytes"].to_numpy(), table["mtime_ns"].to_numpy()
        self.changes = {change: changes[change] for change in CHANGES if changes[change]}
        left_out = np.setdiff1d(np.arange(len(index)), rows)
        left_out = index.table.select(["key", "reason"]).take(pa.array(left_out, pa.int64())).combine_chunks()
        if unfit:
            places = {key: reason for key, reason in zip(index.columns["key"][list(unfit)], unfit.values())}
            reasons = [reason or places[key] for key, reason in zip(*left_out.to_pydict().values())]
            left_out = pa.table({"key": left_out["key"], "reason": pa.array(reasons, pa.large_string())})
        self._rejected = left_out

    def _read_kinds(self):
        found = list_kinds(self.path)
        self.caption_kinds = tuple(sorted({kind for kinds in found.values() for kind in kinds}))
        keys = self._keys.to_pylist() if found else []
        self._kinds = {kind: pa.array([found.get(key, {}).get(kind) for key in keys], pa.large_string())
                       for kind in self.caption_kinds}  # fmt: skip

    def captions(self, index: int) -> dict[str, str]:
        """Captions of all kinds of a sample, by kind; one that it lacks is its own caption."""
        own = self._captions[index].as_py()
        return {kind: column[index].as_py() or own for kind, column in self._kinds.items()}

    @property
    def rejected(self) -> list[Rejected]:
        """The files that are not used, by name, each with its reason."""
        return [Rejected(*pair) for pair in zip(*self._rejected.to_pydict().values())]

    def _summary(self, num_files: int, most: int = 20) -> str:
        first = zip(*self._rejected.slice(0, most).to_pydict().values())
        named = "; ".join(f"{_printable(file)} ({reason})" for file, reason in first)
        count = len(self._rejected)
        more = f"; and {count - most} more" if count > most else ""
        return f"skipped {count} of {num_files} files: {named}{more}"

    def __len__(self) -> int:
        return len(self._shapes)

    def spec(self, index: int) -> SampleSpec:
        num_frames, height, width = self._shapes[index].tolist()
        fps = float(self._rates[index, 0])
        return SampleSpec(num_frames, height, width, fps, self._captions[index].as_py(), self._keys[index].as_py())

    def __getitem__(self, index: int) -> Sample:
        """Decodes one sample. Raises UserError if its file has changed since it was indexed."""
        spec = self.spec(index)
        path = self.path / spec.key
        remedy = "restore it, or index the folder again"
        try:
            check_inside(self.path, spec.key)
            found = os.stat(path)
            if (found.st_size, found.st_mtime_ns) != (self._sizes[index], self._times[index]):
                raise UserError(f"{path} has changed since it was indexed: {remedy}")
            # It decoded in time once: a busy machine is no reason to give up now.
            limit, start = 10 * self.time_limit, float(self._rates[index, 1])
            video = decode(path, spec.num_frames, spec.height, spec.width, spec.fps, start, time_limit=limit)
        except (DecodeError, OSError) as e:
            reason = e.reason if isinstance(e, DecodeError) else e.strerror
            raise UserError(f"{path} could be decoded when it was indexed but no longer: {reason}; {remedy}") from e
        return dict(video=video, caption=spec.caption, fps=spec.fps, key=spec.key)


def check_inside(folder: str | os.PathLike, file: str):
    """Raises DecodeError if a name, or the link it stands for, leads out of the folder."""
    reason = Inside(folder).reason(file)
    if reason:
        raise DecodeError(reason)


def _printable(name: str) -> str:
    """A file name on one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
