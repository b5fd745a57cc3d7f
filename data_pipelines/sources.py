"""Random-access sources of captioned videos: what every source offers, and the one that a config names.

Shapes: T frames, H height, W width. A video is uint8 [T, H, W, 3] and T = 4n + 1.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from data_pipelines.caption_kinds import CAPTION, is_captioned, open_captioned, parse_mix
from sorax.errors import UserError

GENERATED = ("world", "phyworld")  # paths of what is drawn, not read
Sample = dict[str, Any]  # video uint8 [T, H, W, 3], caption str, fps float, key str


@dataclass(frozen=True)
class SampleSpec:
    """What a sample will look like, known without decoding it.

    num_frames, height and width are those of the decoded video exactly; fps is in frames per second;
    key names the sample for people (a file name, or an index in a generated world).
    """

    num_frames: int
    height: int
    width: int
    fps: float
    caption: str
    key: str


class Source(Protocol):
    """A picklable sequence of captioned videos whose shapes are known before they are decoded.

    Where its samples have captions of several kinds, it has caption_kinds, their names, and captions(index), dict of
    kind -> caption, all kinds for every sample; see `data_pipelines.caption_kinds`.
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def spec(self, index: int) -> SampleSpec:
        """Shape, rate and caption of one sample; cheap, decodes nothing."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample itself; its video has exactly the shape that spec(index) promised."""
        ...


def open_source(data: Mapping[str, Any], **overrides: Any) -> Source:
    """The source that a config's `data` section names.

    `path` "" or "world" is the generated world, made from the section `world` (fields of WorldConfig), and "phyworld"
    the scenes of PhyWorld, from the section `phyworld` (fields of PhyWorldConfig);
    "tfds:NAME[/CONFIG][:VERSION]" is a TFDS data set, with `split`, `data_dir`, `video_key` and `caption_key`;
    "captions:FOLDER" is what `sorax caption` has written captions for, with these; anything else is a folder. Samples
    of files are brought within those fields of `data_pipelines.fit.Fit` that the section has,
    by way of the index `index` if the section names one. With a `mixture`, `path` is not used: it is a list of
    sections, each with a `weight` and its own path, which have what they do not set from this one.
    Overrides replace entries of the section that is used (of `world`, `phyworld` or `data`); those that mean nothing to
    a folder or to the world are not passed on. Two more of them are `index_cache`, the folder where an index that has
    to be made is kept, and `index_progress`, a function (done, to do) that is called meanwhile.
    Raises UserError for a setting that the source does not know or cannot use.
    """
    if data.get("mixture"):
        return _open_mixture(data, overrides)
    path = data.get("path") or "world"
    if is_captioned(path):
        return open_captioned(data, overrides)
    if path.startswith("shards:"):
        raise UserError(f"{path} is latents, which a DiT trains on; here videos are needed: name their folder")
    return _open_world(path, data, overrides) if path in GENERATED else _open_files(path, data, overrides)


def is_folder(data: Mapping[str, Any]) -> bool:
    """Whether a `data` section names a folder of files, not another source."""
    path = data.get("path") or "world"
    named = re.match("[a-z]+:", path) and not os.path.isdir(path)
    return path not in GENERATED and not named and not data.get("mixture")


def _open_world(path, data, overrides) -> Source:
    """A generated world, whose settings are in the section of its name."""
    from data_pipelines.phyworld import PhyWorld, PhyWorldConfig
    from data_pipelines.world import World, WorldConfig

    world, config = dict(world=(World, WorldConfig), phyworld=(PhyWorld, PhyWorldConfig))[path]
    if data.get("index"):
        raise UserError(f"data.index is {data['index']!r}, but the {path} needs no index: leave it empty")
    known = [f.name for f in fields(config)]
    settings = {name: _tuples(value) for name, value in dict(data.get(path) or {}).items()}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)
            raise UserError(f"unknown key data.{path}.{name}: did you mean data.{path}.{near[0]}?")
    settings |= {name: _tuples(value) for name, value in overrides.items() if name in known}
    kinds = [kind for kind in parse_mix(data.get("caption_mix")) if kind != CAPTION]
    if kinds and "kinds" not in settings and path == "world":
        settings["kinds"] = tuple(kinds)
    return world(config(**settings))


def _open_files(path, data, overrides) -> Source:
    """A folder, or a TFDS data set."""
    from data_pipelines.fit import Fit
    from data_pipelines.folder import FolderSource

    known = [f.name for f in fields(Fit)]
    settings = {name: data[name] for name in known if data.get(name) is not None}
    settings |= {name: value for name, value in overrides.items() if name in known and value is not None}
    if "max_tokens" not in settings:
        raise UserError("data.max_tokens is not set: give the largest number of tokens a sample of the folder may have")
    settings = dict(fit=Fit(**settings), index=data.get("index") or None, cache=overrides.get("index_cache"))
    if not path.startswith("tfds:"):
        return FolderSource(path, progress=overrides.get("index_progress"), **settings)
    from data_pipelines.tfds_source import TFDSSource

    place = {name: data.get(name) or "" for name in ("split", "data_dir", "video_key", "caption_key")}
    return TFDSSource(path.removeprefix("tfds:"), **place, **settings)


def _open_mixture(data, overrides) -> Source:
    from data_pipelines.mixture import MixtureSource, part_sections

    sections, weights = part_sections(data)
    cache, parts = overrides.get("index_cache"), []
    for k, section in enumerate(sections):
        own = dict(overrides, index_cache=cache and os.path.join(cache, f"part_{k}"))
        parts.append(open_source(dict(section, caption_mix=data.get("caption_mix", "")), **own))
    return MixtureSource(parts, weights, [section["path"] for section in sections])


def _tuples(value):
    """Lists as tuples, all the way down: a config read from JSON has lists where a frozen one wants tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
