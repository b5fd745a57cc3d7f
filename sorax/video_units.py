"""Rows of the video suite: videos made a few at a time, measured, and kept, so that what was stopped goes on.

A row is whose videos they are: those of the reference, copies of a VAE, a model's samples, another generator's files. A
unit is some clips of one shape and rate of a row: a file `samples/ROW_NUMBER.npz` with what was measured of each clip
and, of those that are kept, the videos (uint8 [n, T, H, W, 3], fps). All of a model's samples are kept; of videos that
lie elsewhere or can be made again as many as fit KEPT_BYTES, spread evenly.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from sorax import clip_model, video_metrics
from sorax.clip_model import CLIPScore
from sorax.errors import UserError
from sorax.evaluate_vae import clip_scores
from sorax.runlog import Progress
from sorax.score_report import writing
from sorax.suite import SAMPLES
from sorax.videomae import VideoFeatures

UNIT_PIXELS, UNIT_CLIPS = 1 << 24, 64  # of a unit, at most
KEPT_BYTES = 1 << 28  # of a row's videos that are kept, before compression


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Whose videos.

    Attributes:
        name: such as "model". title: in a table. shapes: (T, H, W) of each clip; fps. names, captions, seeds (None:
        not made from one). make: numbers of some clips of one shape -> their videos. keep_all: keep every video.
        originals: number of a clip -> what it is a copy of; None for what is no copy.
    """

    name: str
    title: str
    shapes: list[tuple[int, int, int]]
    fps: list[float]
    names: list[str]
    captions: list[str]
    make: Callable[[Sequence[int]], list[np.ndarray]]
    seeds: list[int] | None = None
    keep_all: bool = False
    originals: Callable[[int], np.ndarray] | None = None

    @functools.cached_property
    def kept(self) -> set[int]:
        """Clips whose videos are kept."""
        sizes = [3 * math.prod(shape) for shape in self.shapes]
        count = len(sizes)
        while not self.keep_all and count > 1 and sum(sizes[i] for i in _spread(len(sizes), count)) > KEPT_BYTES:
            count = max(1, count * 7 // 8)
        return set(_spread(len(sizes), count))

    @functools.cached_property
    def units(self) -> list["Unit"]:
        """In order of shape and rate."""
        groups, made = collections.defaultdict(list), []
        for i, (shape, fps) in enumerate(zip(self.shapes, self.fps)):
            groups[shape, fps].append(i)
        for (shape, _), members in sorted(groups.items()):
            size = min(UNIT_CLIPS, max(1, UNIT_PIXELS // math.prod(shape)))
            made += [members[start : start + size] for start in range(0, len(members), size)]
        return [Unit(self, number, tuple(members)) for number, members in enumerate(made)]


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Clips `members` of a row."""

    row: Row
    number: int
    members: tuple[int, ...]

    @property
    def file(self) -> str:
        """Path inside a report folder."""
        return f"{SAMPLES}/{self.row.name}_{self.number:05d}.npz"

    def measure(self, measures: "Measures") -> dict[str, np.ndarray]:
        """What its file holds, but for the identity."""
        videos = self.row.make(self.members)
        kept = [k for k, i in enumerate(self.members) if i in self.row.kept]
        shape = self.row.shapes[self.members[0]]
        stored = np.stack([videos[k] for k in kept]) if kept else np.zeros((0, *shape, 3), np.uint8)
        values, arrays = measures(self.row, self.members, videos)
        return dict(videos=stored, kept=np.array(kept, np.int32), fps=np.float64(self.row.fps[self.members[0]]),
                    values=np.array(json.dumps(values)), **arrays)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured of a clip. Networks that are not at hand are None."""

    features: VideoFeatures | None = None
    clip: CLIPScore | None = None
    lpips: Callable | None = None

    def __call__(self, row: Row, members: Sequence[int], videos: list[np.ndarray]):
        """(values: a dict of numbers or None a clip; arrays: name -> [n, ...], nan where a clip has none)."""
        values, arrays = [], collections.defaultdict(list)
        for i, video in zip(members, videos):
            values.append(dict(
                flicker=video_metrics.temporal_flicker(video), difference=video_metrics.frame_difference(video),
                **video_metrics.flow_metrics(video, row.fps[i]),
            ))  # fmt: skip
            for name, bins in (("spatial", video_metrics.SPATIAL_BINS), ("temporal", video_metrics.TEMPORAL_BINS)):
                spectrum = getattr(video_metrics, f"{name}_spectrum")(video)
                arrays[name].append(np.full(bins, np.nan) if spectrum is None else spectrum)
            if row.originals is not None:
                found = clip_scores(row.originals(i), video, self.lpips)
                values[-1] |= {("flicker_error" if name == "flicker" else name): v for name, v in found.items()}
                values[-1]["psnr"] = None if math.isinf(found["psnr"]) else found["psnr"]
            if self.clip is not None:
                values[-1] |= self._clip(row, i, video)
        arrays = {name: np.stack(rows) for name, rows in arrays.items()}
        return values, arrays | ({} if self.features is None else dict(features=self.features(videos)))

    def _clip(self, row, i, video):
        frames, caption = self.clip.embed_frames(video), row.captions[i]
        found = dict(clip_consistency=clip_model.frame_consistency(frames), clip=None, clip_other=None)
        n = len(row.captions)
        other = next((c for c in (row.captions[(i + k) % n] for k in range(1, n)) if c and c != caption), None)
        for name, text in (("clip", caption), ("clip_other", other)):
            if text:
                found[name] = clip_model.clip_score(frames, self.clip.embed_texts([text])[0])
        return found | dict(cut=bool(caption) and self.clip.tokens(caption)[1])


class Table:
    """What was measured of a row. values: name -> a number or None a clip; arrays: name -> [n, ...], where measured;
    places: number of a clip -> dict(file=, index=) of its video, of those that are kept."""

    def __init__(self, row: Row, files: dict[Unit, dict[str, np.ndarray]]):
        self.row, self.places, by_clip, arrays = row, {}, {}, collections.defaultdict(dict)
        for unit, found in files.items():
            by_clip.update(zip(unit.members, json.loads(str(found["values"]))))
            self.places |= {unit.members[k]: dict(file=unit.file, index=index) for index, k in enumerate(found["kept"])}
            for name in ("spatial", "temporal", "features"):
                if name in found:
                    arrays[name].update(zip(unit.members, found[name]))
        names = dict.fromkeys(name for values in by_clip.values() for name in values)
        self.values = {name: [by_clip[i].get(name) for i in sorted(by_clip)] for name in names}
        self.arrays = {name: np.stack([rows[i] for i in sorted(rows)]) for name, rows in arrays.items()}

    def __len__(self):
        return len(self.row.shapes)

    def spectra(self, name: str) -> list:
        """Spectra of the clips, None where one is too short or too small."""
        return [None if np.isnan(spectrum).any() else spectrum for spectrum in self.arrays[name]]


def make_units(units: Sequence[Unit], measures: Measures, out: str, identity: str):
    """Makes and measures those units whose files are not there."""
    with Progress("evaluate", sum(len(unit.members) for unit in units), unit="clips") as progress:
        for unit in units:
            if read_unit(out, unit, identity) is None:
                found = unit.measure(measures)
                with writing(out):
                    path = os.path.join(out, unit.file)
                    with open(path + ".partial", "wb") as f:
                        np.savez_compressed(f, identity=np.array(identity), **found)
                    os.replace(path + ".partial", path)
            progress.advance(progress.done + len(unit.members), unit.row.title)


def read_unit(out: str, unit: Unit, identity: str, videos: bool = False) -> dict[str, np.ndarray] | None:
    """What a unit's file holds (the videos only if asked); None if it is missing or of another evaluation.

    Raises:
        UserError: it is damaged.
    """
    path = os.path.join(out, unit.file)
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            return {name: file[name] for name in file.files if name != "identity" and (videos or name != "videos")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and evaluate again, which makes only what is "
                        "missing") from error  # fmt: skip


def read_table(out: str, row: Row, identity: str) -> Table:
    """All that was measured of a row. Raises UserError where a unit is missing."""
    files = {unit: read_unit(out, unit, identity) for unit in row.units}
    for unit, found in files.items():
        if found is None:
            raise UserError(f"{os.path.join(out, unit.file)} is missing: evaluate again, which makes what is missing")
    return Table(row, files)


def compare_unit(out: str, unit: Unit, identity: str, measures: Measures) -> list[str]:
    """Makes a unit again. Returns what differs from its file, in words; nothing if it is the same to the bit."""
    there = read_unit(out, unit, identity, videos=True)
    if there is None:
        return [f"{unit.file}: missing, or of another evaluation"]
    again = unit.measure(measures)
    return [
        f"{unit.file}: {name} differs" for name in sorted(there.keys() | again.keys())
        if name not in there or name not in again
        or not np.array_equal(there[name], again[name], equal_nan=np.asarray(again[name]).dtype.kind == "f")
    ]  # fmt: skip


def _spread(count, most):
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
