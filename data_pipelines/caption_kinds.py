"""Several captions of one video: their kinds, the mix of them that training sees, and captions written for a source.

Every sample has its own caption, kind "caption". What `sorax caption` writes has more: "short", "detailed", and
"original", the caption that was there before. Training draws one of them each time that it meets a sample, by the
ratios of `data.caption_mix`: DALL-E 3 (Betker et al. 2023) took 95 % written by a captioner and 5 % of people's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from data_pipelines.shuffle import fold
from sorax.errors import UserError

CAPTION, ORIGINAL = "caption", "original"
PREFIX = "captions:"  # of a data.path: captions for a source that is no folder of files
METADATA, SOURCE = "metadata.jsonl", "source.json"
_KIND = re.compile("[a-z][a-z0-9_]{0,30}")


def parse_mix(value) -> dict[str, float]:
    """Kind -> share of a `data.caption_mix`, such as "detailed:0.95,original:0.05" or a dict; the shares add up to 1.

    Empty for "": every sample has its own caption. Raises UserError where it cannot be read.
    """
    if not value:
        return {}
    wanted = "write for example detailed:0.95,original:0.05"
    if isinstance(value, str):
        pairs = [part.partition(":")[::2] for part in value.split(",")]
    elif isinstance(value, Mapping) or hasattr(value, "items"):
        pairs = list(value.items())
    else:
        raise UserError(f"data.caption_mix is {value!r}: {wanted}")
    mix = {}
    for kind, weight in pairs:
        kind = kind.strip()
        try:
            weight = float(weight)
        except (TypeError, ValueError):
            raise UserError(f"data.caption_mix: {kind!r} has the share {weight!r}: {wanted}") from None
        if not _KIND.fullmatch(kind) or kind in mix or not 0 <= weight < float("inf"):
            raise UserError(f"data.caption_mix is {value!r}: {wanted}, each kind once")
        mix[kind] = weight
    total = sum(mix.values())
    if not total:
        raise UserError(f"data.caption_mix is {value!r}: a share must be above 0")
    return {kind: weight / total for kind, weight in mix.items() if weight}


def check_mix(mix: Mapping[str, float], kinds):
    """Raises UserError where a mix has a kind that samples do not have."""
    for kind in mix:
        if kind not in (CAPTION, *kinds):
            known = ", ".join((CAPTION, *kinds))
            raise UserError(f"data.caption_mix has {kind!r}, but the data has these kinds of captions: {known}; write "
                            "others with `sorax caption`")  # fmt: skip


def draw_kind(mix: Mapping[str, float], *key: int) -> str:
    """The kind of caption that is drawn from a mix by a key: a pure function of both."""
    place, last = fold(*key) / 2**64, CAPTION
    for kind, share in mix.items():
        last, place = kind, place - share
        if place < 0:
            break
    return last


def kinds_in(row: Mapping) -> dict[str, str]:
    """Kind -> caption of a line of metadata.jsonl: those under "captions", and "caption_original"."""
    found = row.get("captions")
    found = dict(found) if isinstance(found, dict) else {}
    if isinstance(row.get("caption_original"), str):
        found.setdefault(ORIGINAL, row["caption_original"])
    return {kind: text.strip() for kind, text in found.items()
            if isinstance(text, str) and _KIND.fullmatch(kind) and kind != CAPTION}  # fmt: skip


def is_captioned(path) -> bool:
    """Whether a data.path names captions that were written for another source."""
    return str(path or "").startswith(PREFIX)


def behind(data: Mapping) -> Mapping:
    """The `data` section of the source that captions were written for; any other section as it is.

    Raises UserError where the folder does not say.
    """
    if not is_captioned(data.get("path")):
        return data
    path = Path(str(data["path"])[len(PREFIX) :], SOURCE)
    try:
        section = json.loads(path.read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a folder that `sorax caption --out` wrote") from error
    return {**dict(data), **section}


def open_captioned(data: Mapping, overrides: Mapping):
    """The source behind `data`, with the captions that were written for it."""
    from data_pipelines.sources import open_source

    section = dict(behind(data), caption_mix="")
    return CaptionedSource(open_source(section, **overrides), str(data["path"])[len(PREFIX) :])


class CaptionedSource:
    """A source whose samples have the captions that a folder has for their keys. Raises UserError where some lack."""

    def __init__(self, source, folder: str):
        self.source, rows = source, {}
        path = Path(folder, METADATA)
        try:
            with open(path, encoding="utf-8") as f:
                for line in f:
                    row = json.loads(line)
                    rows[row["key"]] = (row["caption"], kinds_in(row))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): write it again with `sorax caption`") from error
        keys = [source.spec(i).key for i in range(len(source))]
        missing = [key for key in keys if key not in rows]
        if missing:
            raise UserError(f"{path} has no caption for {len(missing)} of {len(keys)} samples, such as {missing[0]}: "
                            "it was written for other data")  # fmt: skip
        self._rows = [rows[key] for key in keys]
        self.caption_kinds = tuple(sorted({kind for _, kinds in self._rows for kind in kinds}))

    def __getattr__(self, name):  # what else a source has: weights, path, rejected
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def spec(self, index):
        return replace(self.source.spec(index), caption=self._rows[index][0])

    def __getitem__(self, index):
        return {**self.source[index], "caption": self._rows[index][0]}

    def captions(self, index):
        """Captions of all kinds, by kind; a kind that the sample lacks is its own caption."""
        caption, kinds = self._rows[index]
        return {kind: kinds.get(kind) or caption for kind in self.caption_kinds}
