"""The videos that the video suite scores or compares with: every file of a folder or none, for nothing is left out."""

import dataclasses
import hashlib
import os

import numpy as np

from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.index import FolderRecords, build_index
from data_pipelines.inspection import Limits
from data_pipelines.listing import Inside, Listing
from data_pipelines.sources import is_folder, open_source
from data_pipelines.survey import source_identity
from sorax.errors import UserError
from sorax.evaluate_vae import data_section
from sorax.runlog import reporter

TOKEN_PIXELS = 4 * 16 * 16  # what `max_tokens` counts in the suite, whatever the grid: four frames of 16 x 16 pixels
SHOWN = 8  # files that an error names


@dataclasses.dataclass(frozen=True)
class Videos:
    """Captioned videos, decoded when they are asked for.

    Attributes:
        what: names them in errors. specs: `data_pipelines.sources.SampleSpec` of each. identity: hash of what they are.
    """

    what: str
    source: object
    indices: tuple[int, ...]
    identity: str

    def __len__(self):
        return len(self.indices)

    def video(self, i: int) -> np.ndarray:
        """Video i, uint8 `[T, H, W, 3]`."""
        return self.source[self.indices[i]]["video"]

    @property
    def specs(self) -> list:
        return [self.source.spec(i) for i in self.indices]

    @property
    def names(self) -> list[str]:
        """File names without their ending, by which copies are paired with originals."""
        return [os.path.splitext(spec.key)[0] for spec in self.specs]

    def captions(self, needed_for: str = "") -> list[str]:
        """Captions, "" where there is none.

        needed_for: why there has to be one for each.

        Raises:
            UserError: there are some without, which it names.
        """
        specs = self.specs
        without = [spec.key for spec in specs if not spec.caption.strip()]
        if without and needed_for:
            raise UserError(f"{len(without)} of {len(specs)} videos of {self.what} have no prompt, which {needed_for} "
                            f"needs: {_some(without)}. Add lines like {{\"file\": \"x.mp4\", \"caption\": \"...\"}} to "
                            "its metadata.jsonl")  # fmt: skip
        return [spec.caption for spec in specs]

    def spread(self, count: int | None) -> "Videos":
        """At most `count` of them, spread evenly."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise UserError(f"{count} clips cannot be scored: ask for at least 1")
        kept = np.unique(np.linspace(0, len(self) - 1, count).round().astype(int))
        return dataclasses.replace(self, indices=tuple(self.indices[i] for i in kept))

    def named(self, names: list[str]) -> "Videos":
        """Those of these names, in their order."""
        place = dict(zip(self.names, self.indices))
        return dataclasses.replace(self, indices=tuple(place[name] for name in names))


class _Files(FolderRecords):
    """The files of a folder, with or without captions."""

    def listing(self) -> Listing:
        found, inside = super().listing(), Inside(self.folder)
        reasons = [inside.reason(key) if reason.startswith("no caption") else reason
                   for key, reason in zip(found.keys, found.reasons)]  # fmt: skip
        return found._replace(reasons=reasons)


def open_videos(
    path: str, *, overrides=(), what: str, spatial_multiple: int = 1, temporal_stride: int = 1, own=None, cache=None
) -> Videos:
    """The videos of a folder or of another source, each at its own size and length within limits.

    Args:
        path: as `data.path` of an experiment: a folder, "tfds:NAME" or "world".
        overrides: `KEY=VALUE` of a `data` section, such as "max_frames=17"; max_tokens counts TOKEN_PIXELS.
        what: names them in errors, such as "--videos".
        spatial_multiple, temporal_stride: grid of sizes and lengths; beyond whole steps of it frames are cropped.
        own: `data` section of a run, whose world "world" is.
        cache: folder where the index of a folder is kept.

    Raises:
        UserError: there is nothing, or there are files that cannot be read or brought within the limits: it lists them.
    """
    section = data_section(own if path == "world" else None, path, overrides, path)
    budget = max(1, section.max_tokens * TOKEN_PIXELS // (spatial_multiple**2 * temporal_stride))
    grid = dict(spatial_multiple=spatial_multiple, temporal_stride=temporal_stride)
    if not is_folder(section):
        source = open_source(section, split="test" if path == "world" else section.split, max_tokens=budget, **grid)
        if rejected := getattr(source, "rejected", ()):
            _refuse(what, path, [(r.file, r.reason) for r in rejected], len(source) + len(rejected))
        return Videos(what, source, tuple(range(len(source))), source_identity(source))
    if not os.path.isdir(path):
        raise UserError(f"{what} {path!r} is no folder: name one that holds videos")
    fit = Fit(max_tokens=budget, fps=section.fps or None, max_frames=section.max_frames, min_frames=section.min_frames,
              oversize=section.oversize, **grid)  # fmt: skip
    seconds = fit.max_frames / fit.fps if fit.fps else None
    limits = Limits(max_seconds=seconds, max_frames=None if fit.fps else fit.max_frames)
    index = build_index(_Files(path, limits), cache, limits=limits, progress=reporter(f"read {what}", "files"))
    bad = [(k, r) for k, r in zip(*index.table.select(["key", "reason"]).to_pydict().values()) if r]
    if bad:
        _refuse(what, path, bad, len(index))
    source = FolderSource(path, fit=fit, index=index)
    if source.rejected:
        _refuse(what, path, [(r.file, r.reason) for r in source.rejected], len(index))
    identity = hashlib.sha256(f"{index.identity} {source_identity(source)}".encode()).hexdigest()[:16]
    return Videos(what, source, tuple(range(len(source))), identity)


def pair(videos: Videos, references: Videos):
    """(videos, references) in one order, name by name; endings do not matter.

    Raises:
        UserError: a name is there twice, or on one side only, or two of a name differ in size or length.
    """
    for side in (videos, references):
        names = side.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{side.what} has two files called {twice}: paired videos are found by their names without "
                            "the ending, so keep one of them")  # fmt: skip
    ours, theirs = set(videos.names), set(references.names)
    if ours != theirs:
        said = [f"without an original: {_some(sorted(ours - theirs))}"] if ours - theirs else []
        said += [f"without a copy: {_some(sorted(theirs - ours))}"] if theirs - ours else []
        raise UserError(f"{videos.what} and {references.what} do not pair by their names: {'; '.join(said)}. Name both "
                        "alike, or score them without --paired")  # fmt: skip
    order = sorted(ours)
    videos, references = videos.named(order), references.named(order)
    differ = [
        f"{name} ({_shape(a)}, original {_shape(b)})"
        for name, a, b in zip(order, videos.specs, references.specs) if _shape(a) != _shape(b)
    ]  # fmt: skip
    if differ:
        raise UserError(f"{len(differ)} of {len(order)} pairs differ in size or length: {_some(differ)}. Bring both to "
                        "one with --data.max_frames, --data.fps or --data.max_tokens, or score them without "
                        "--paired")  # fmt: skip
    return videos, references


def _shape(spec):
    return f"{spec.num_frames} frames of {spec.width}x{spec.height}"


def _refuse(what, path, bad, count):
    said = _some([f"{file} ({reason})" for file, reason in bad])
    raise UserError(f"{len(bad)} of {count} files of {what} {path} cannot be used: {said}. Mend or remove them: a "
                    "score of the others would be of something else")  # fmt: skip


def _some(names):
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
