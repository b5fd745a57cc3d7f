"""Several data sets as one, each with its own weight: of sources of videos, or of latents."""

import difflib
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

import numpy as np

from sorax.errors import UserError

# What a part of `data.mixture` may set.
PART_KEYS = (
    "path", "weight", "world", "phyworld", "split", "data_dir", "video_key", "caption_key", "index", "fps",
    "max_frames", "min_frames", "max_tokens", "oversize",
)  # fmt: skip


class _Concatenation:
    """Parts one after the other, each with a weight.

    weights: float64 [n], of every sample: one of weight w comes w times an epoch on average, exactly so over epochs
    (`data_pipelines.shuffle.epoch_counts`); 1 for all is every sample once an epoch.
    """

    def __init__(self, parts, weights):
        _check_weights(weights)
        if len(parts) != len(weights) or not parts:
            raise ValueError(f"{len(parts)} parts and {len(weights)} weights")
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, parts)))
        self.weights = np.repeat(np.asarray(weights, np.float64), np.diff([0, *self._ends]))
        inner = [getattr(part, "weights", None) for part in parts]
        if any(w is not None for w in inner):
            self.weights *= np.concatenate([np.ones(len(p)) if w is None else w for p, w in zip(parts, inner)])

    def __len__(self):
        return self._ends[-1]

    def locate(self, i):
        """(part, index in it) of a sample."""
        i = range(len(self))[i]
        part = bisect_right(self._ends, i)
        return part, i - (self._ends[part - 1] if part else 0)

    def __getitem__(self, i):
        part, index = self.locate(i)
        return self.parts[part][index]


class MixtureSource(_Concatenation):
    """Sources as one `data_pipelines.sources.Source`, with `weights`. Keys begin with the number and name of a part."""

    def __init__(self, parts, weights, names):
        super().__init__(parts, weights)
        self.names = [f"{k}:{name}" for k, name in enumerate(names)]
        self.caption_kinds = tuple(sorted({kind for part in parts for kind in getattr(part, "caption_kinds", ())}))

    def spec(self, index):
        part, i = self.locate(index)
        spec = self.parts[part].spec(i)
        return replace(spec, key=f"{self.names[part]}/{spec.key}")

    def __getitem__(self, index):
        part, i = self.locate(index)
        sample = self.parts[part][i]
        return {**sample, "key": f"{self.names[part]}/{sample['key']}"}

    def captions(self, index):
        """Captions of all kinds of a sample; one that its part lacks is its own caption."""
        part, i = self.locate(index)
        source = self.parts[part]
        own = source.captions(i) if getattr(source, "caption_kinds", ()) else {}
        return {kind: own.get(kind) or source.spec(i).caption for kind in self.caption_kinds}


class MixtureExamples(_Concatenation):
    """Sets of latents as one set of examples, with `weights`; see `data_pipelines.latent_shards.LatentShards`."""

    def __init__(self, parts, weights):
        super().__init__(parts, weights)
        self.shapes, self.text_lengths = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("shapes", "text_lengths")
        )
        self.identity = "-".join(part.identity for part in parts)
        self.text_width = getattr(parts[0], "text_width", 0)
        lengths = [getattr(part, "kind_lengths", {}) for part in parts]
        kinds = sorted(set().union(*lengths))
        self.kind_lengths = {
            kind: np.concatenate([own.get(kind, part.text_lengths) for own, part in zip(lengths, parts)])
            for kind in kinds
        }

    @property
    def empty_caption(self):
        return self.parts[0].empty_caption

    def key(self, i):
        part, index = self.locate(i)
        return f"{self.parts[part].path}/{self.parts[part].key(index)}"

    def sample(self, i, key):
        part, index = self.locate(i)
        return self.parts[part].sample(index, key)


def part_sections(data):
    """(sections, weights) of a `data` section with a `mixture`: a whole `data` section for each of its parts.

    A part has what it does not set from the section around it; `world` is taken as a whole.
    Raises UserError for what is no list of sections, a part without a path, an unknown key or an impossible weight.
    """
    mixture = data["mixture"]
    if not isinstance(mixture, list | tuple) or not all(hasattr(part, "keys") for part in mixture):
        raise UserError(f"data.mixture is {mixture!r}: give a list of sections such as dict(path='FOLDER', weight=1.0)")
    if data.get("index"):
        raise UserError(f"data.index is {data['index']!r} beside data.mixture: give each part its own index")
    for k, part in enumerate(mixture):
        for key in part:
            if key not in PART_KEYS:
                near = difflib.get_close_matches(key, PART_KEYS, 1, 0)
                raise UserError(f"unknown key data.mixture[{k}].{key}: did you mean {near[0]!r}?")
        if not part.get("path"):
            raise UserError(f"data.mixture[{k}] has no path: name a folder, 'world', 'tfds:NAME' or 'shards:FOLDER'")
    weights = [part.get("weight", 1.0) for part in mixture]
    _check_weights(weights)
    around = {key: data[key] for key in data if key in PART_KEYS}
    return [{**around, **{key: part[key] for key in part if key != "weight"}} for part in mixture], weights


def _check_weights(weights):
    for k, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight) or weight < 0:
            raise UserError(f"data.mixture[{k}].weight is {weight!r}: give a number of at least 0, how often each of "
                            "its samples comes in an epoch")  # fmt: skip
    if not any(weights):
        raise UserError("every data.mixture weight is 0, so that nothing would be trained on: raise one of them")
