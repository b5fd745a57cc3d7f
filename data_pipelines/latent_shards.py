"""Reads a data set of latents: the examples that rows are packed from, and a check of every record.

The files are those of `data_pipelines.latent_records`; what is read here is also read by plain TFDS.
"""

import functools
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from data_pipelines import latent_records as records
from data_pipelines.latent_writer import caption_kinds, file_sha256, read_json, splits, text_width
from data_pipelines.text_tokens import Tokenizer
from sorax.errors import UserError

PREFIX = "shards:"  # of a data.path that names a folder of latent shards
HELD_BYTES = 512 << 20  # data sets of up to this size are kept in memory once read
_OPEN_SHARDS = 256  # files; a process may have 1,024 open


class LatentShards:
    """One split of a data set of latents, or its first samples: random access, picklable.

    Args:
      path: folder, as `sorax encode` or `LatentWriter` wrote it. split: its split.
      first: only so many samples; None for all.
      text_embeds: read the embeddings of captions too, which must be there.
      held_bytes: a data set whose means and deviations are no larger in float32 is kept in memory as it is read, in
        this process but not in its workers.

    Attributes:
      shapes: int32 [n, 3], (t, h, w) of the latents. text_lengths: int32 [n].
      weights: float64 [n], or None if they are all 1.
      text_width: D of the embeddings that are read, or 0.
      caption_kinds: of the captions that samples have beside their own; kind_lengths: kind -> int32 [n], their tokens.
      identity: of the samples, the VAE and the tokenizer. metadata: dict, as written.

    Nothing is read of the records themselves until a sample is asked for.
    Raises UserError where the folder holds no such split, or not all of its shards.
    """

    def __init__(self, path, split="train", *, first=None, text_embeds=False, held_bytes=HELD_BYTES):
        self.path, self.split = Path(path), split
        manifest = read_manifest(path, split)
        self.metadata, self.source = manifest["metadata"], manifest["source"]
        self._shards = manifest["shards"]
        self._ends = np.cumsum([s["count"] for s in self._shards])
        for shard in self._shards:
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                what = "has another size than when it was written" if file.exists() else "is missing"
                raise UserError(f"{file} {what}: delete it and run the `sorax encode` that made it again")
        self._manifest, self._first = manifest, first
        column = self._columns("t", "h", "w", "text_length", "weight")
        self.shapes = np.stack([column["t"], column["h"], column["w"]], axis=1)
        self.text_lengths = column["text_length"]
        self.caption_kinds = caption_kinds(self.metadata)
        found = self._columns(*(records.KIND_LENGTH + kind for kind in self.caption_kinds))
        self.kind_lengths = {kind: found[records.KIND_LENGTH + kind] for kind in self.caption_kinds}
        self.weights = column["weight"] if (column["weight"] != 1).any() else None
        whole = len(self) == manifest["count"]
        self.identity = manifest["identity"] if whole else f"{manifest['identity']}-{len(self)}"
        self._mean = np.asarray(self.metadata["vae"]["latents_mean"], np.float32)
        self._std = np.asarray(self.metadata["vae"]["latents_std"], np.float32)
        self.text_width = text_width(self.metadata) if text_embeds else 0
        size = int(self.shapes.astype(np.int64).prod(1).sum()) * len(self._mean) * 2 * 4  # means and deviations
        size += 2 * self.text_width * sum(int(n.sum(dtype=np.int64)) for n in
                                          (self.text_lengths, *self.kind_lengths.values()))  # fmt: skip
        self._held = {} if size <= held_bytes else None
        self._readers, self._lock = OrderedDict(), threading.Lock()

    @functools.cached_property
    def video_shapes(self):
        """int32 [n, 3], (T, H, W) of the videos."""
        column = self._columns("num_frames", "height", "width")
        return np.stack([column["num_frames"], column["height"], column["width"]], axis=1)

    @functools.cached_property
    def fps(self):
        """float32 [n], of the videos."""
        return self._columns("fps")["fps"]

    @functools.cached_property
    def empty_caption(self):
        """float32 [D], the embedding of the empty caption. Raises UserError where it is not as it was written."""
        return _read_empty(self.path, text_width(self.metadata))

    def _columns(self, *names):
        return {name: column[: self._first] for name, column in _read_columns(self.path, self._manifest, names)}

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, i):
        """dict(latents float32 [t, h, w, C]: normalised means of the posterior, text_tokens int32 [L], and text_embeds
        uint16 [L, D], the bits of bfloat16, if they are read; likewise text_tokens_KIND and text_embeds_KIND)."""
        mean, _, text = self._moments(i, deviation=False)
        return dict(latents=mean, **text)

    def sample(self, i, key):
        """As `self[i]`, with latents drawn from the posterior; (key, i) decides the draw. key: ints of at least 0."""
        mean, deviation, text = self._moments(i, deviation=True)
        noise = np.random.default_rng([*np.atleast_1d(key).tolist(), int(i)]).standard_normal(mean.shape, np.float32)
        return dict(latents=mean + deviation * noise, **text)

    def _moments(self, i, *, deviation):
        """(mean, deviation or None, dict of what is read of its text), the first two those of normalised latents."""
        i = range(len(self))[i]
        held = self._held.get(i) if self._held is not None else None
        if held is None or (deviation and held[1] is None):
            sample = self.record(i)
            mean = (records.floats(sample["mean"]) - self._mean) / self._std
            spread = np.exp(np.float32(0.5) * records.floats(sample["logvar"])) / self._std if deviation else None
            starts = ("text_tokens", "text_embeds") if self.text_width else ("text_tokens",)
            names = [start + end for start in starts for end in ("", *(f"_{kind}" for kind in self.caption_kinds))]
            held = mean, spread, {name: sample[name] for name in names}
            if self._held is not None:
                self._held[i] = held
        return held

    def key(self, i):
        """Name of a sample; reads its record."""
        return self.record(i)["key"]

    def caption(self, i):
        """Caption of a sample; reads its record."""
        return self.record(i)["caption"]

    def record(self, i):
        """The whole record of a sample: a dict as `latent_records.features` describes it."""
        i = range(len(self))[i]
        shard = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[shard]) - self._shards[shard]["count"]
        try:
            return records.parse_record(self._reader(shard).read([i - first])[0])
        except Exception as error:  # the reader of ArrayRecord raises RuntimeError or ValueError, the parser its own
            file = self.path / self._shards[shard]["file"]
            raise UserError(f"record {i - first} of {file} cannot be read ({error}): `sorax encode --verify "
                            f"{self.path}` says what is damaged") from error  # fmt: skip

    def _reader(self, shard):
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _open_shard(self.path / self._shards[shard]["file"])
                while len(self._readers) > _OPEN_SHARDS:  # closed when the last thread that reads it lets go of it
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]

    def __getstate__(self):  # for workers: a reader does not travel, and each holding all would be many times all
        return {**self.__dict__, "_lock": None, "_readers": OrderedDict(), "_held": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()


def read_manifest(path, split):
    """SPLIT.json of a folder of latents. Raises UserError where there is none, or it is not finished."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name one that `sorax encode --out` wrote")
    manifest = read_json(folder / f"{split}.json")
    if manifest is None or "shards" not in manifest:
        if (folder / records.PARTS / f"{split}.json").exists():
            raise UserError(f"the latents in {folder} are not finished: run its `sorax encode` again, it goes on")
        others = ", ".join(splits(folder))
        there = f"it has {others}" if others else "name a folder that `sorax encode --out` wrote"
        raise UserError(f"{folder} holds no latents of a split {split!r}: {there}")
    if manifest["version"] != records.VERSION:
        raise UserError(f"{folder} was written by another version of sorax ({manifest['version']}, here "
                        f"{records.VERSION}): encode again")  # fmt: skip
    return manifest


def is_shards(path):
    """Whether a config's data.path names latent shards."""
    return str(path or "").startswith(PREFIX)


def shards_folder(path):
    """The folder in "shards:FOLDER"."""
    return os.path.expanduser(str(path)[len(PREFIX) :])


def source_of(data):
    """The `data` section that names videos: the section itself, or that which its (first) shards were made of.

    Raises UserError where the shards do not say.
    """
    path = next((part["path"] for part in data.get("mixture") or ()), data.get("path"))
    if not is_shards(path):
        return data
    source = (read_manifest(shards_folder(path), "train")["source"] or {}).get("data")
    if not source:
        raise UserError(f"{path} does not say which videos it was made of: give data.path their folder")
    return source


def _open_shard(path):
    from array_record.python import array_record_module

    # Random access: nothing is read ahead.
    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=32768)


def verify(path, progress=lambda done: None):
    """What is wrong with a data set of latents, as a list of lines that name shard and record; empty if nothing is.

    Reads everything: count, size and SHA-256 of every shard, checksum of every record, SHA-256 of its latents, and
    whether it has the promised shape. progress: called with the number of samples checked.
    Raises UserError where the folder holds no finished split.
    """
    folder, done, problems = Path(path), 0, []
    info = read_json(folder / records.INFO) or {}
    for split in written_splits(folder):
        manifest = read_manifest(folder, split)
        problems += _verify_tokenizer(folder, manifest) + _verify_empty(folder, manifest)
        lengths = [s["count"] for s in manifest["shards"]]
        there = [list(map(int, s["shardLengths"])) for s in info.get("splits", ()) if s["name"] == split]
        if there != [lengths]:
            problems.append(f"{records.INFO} does not list the shards of split {split}")
        if sum(lengths) != manifest["count"]:
            problems.append(f"{split}.json lists {sum(lengths)} samples, but should have {manifest['count']}")
        try:
            kept = records.columns(caption_kinds(manifest["metadata"]))
            columns = dict(_read_columns(folder, manifest, [name for name, _ in kept]))
        except UserError as error:
            problems.append(str(error))
            columns = None
        for shard in manifest["shards"]:
            # Whatever else is found in a shard, its samples are `count` rows of the columns.
            part = columns and {name: column[: shard["count"]] for name, column in columns.items()}
            problems += [f"{shard['file']}: {what}" for what in _verify_shard(folder, shard, part)]
            columns = columns and {name: column[shard["count"] :] for name, column in columns.items()}
            done += shard["count"]
            progress(done)
    return problems


def _read_empty(folder, width):
    path = folder / records.EMPTY_CAPTION
    try:
        bits = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {folder} and encode again") from error
    if bits.dtype != np.uint16 or bits.shape != (width,) or not np.isfinite(values := records.floats(bits)).all():
        raise UserError(f"{path} does not hold {width} finite numbers: delete {folder} and encode again")
    return values


def _verify_empty(folder, manifest):
    try:
        if width := text_width(manifest["metadata"]):
            _read_empty(folder, width)
    except UserError as error:
        return [str(error)]
    return []


def _verify_tokenizer(folder, manifest):
    if "tokenizer" not in manifest["metadata"]:
        return []
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer.identity == manifest["metadata"]["tokenizer"]:
            return []
    except UserError as error:
        return [str(error)]
    return [f"{tokenizer.file} is not the one that split {manifest['split']} was encoded with"]


def written_splits(path):
    """Names of the splits of which a folder has at least one of the two files that make one finished, sorted.

    Raises UserError where there is none.
    """
    folder = Path(path)
    names = {file.stem for file in folder.glob("*.parquet")}
    names |= {file.stem for file in folder.glob("*.json") if "shards" in (read_json(file) or ())}
    if not names:
        read_manifest(folder, "train")  # says what is there
    return sorted(names)


def _read_columns(folder, manifest, names):
    """(name, array [n]) of columns of SPLIT.parquet, one in memory at a time.

    Raises UserError where it is not as it was written.
    """
    import pyarrow.parquet

    path = folder / f"{manifest['split']}.parquet"
    remedy = f"delete {folder} and encode again"
    for name in names:
        try:
            column = pyarrow.parquet.read_table(path, columns=[name])[name].to_numpy()
        except (OSError, KeyError, ValueError) as error:  # pyarrow's own errors are among them
            raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
        if len(column) != manifest["count"]:
            raise UserError(f"{path} has {len(column)} samples, not {manifest['count']}: {remedy}")
        yield name, column


def _verify_shard(folder, shard, columns):
    file = folder / shard["file"]
    if not file.exists():
        yield "is missing"
        return
    if file.stat().st_size != shard["bytes"]:
        yield f"has {file.stat().st_size} bytes, not {shard['bytes']}"
    if file_sha256(file) != shard["sha256"]:
        yield "its SHA-256 is not that of the file that was written"
    try:
        reader = _open_shard(file)
        found = reader.num_records()
    except Exception as error:  # whatever the reader of ArrayRecord raises
        yield f"cannot be opened: {error}"
        return
    if found != shard["count"]:
        yield f"has {found} records, not {shard['count']}"
    for i in range(min(found, shard["count"])):
        for what in _verify_record(reader, i, columns):
            yield f"record {i}: {what}"


def _verify_record(reader, i, columns):
    try:
        record = reader.read([i])[0]
        sample = records.parse_record(record)
    except Exception as error:
        yield f"cannot be read: {error}"
        return
    name = f"({sample['key']})"
    if records.latents_sha256(sample["mean"], sample["logvar"]) != sample["sha256"]:
        yield f"{name} its latents have another SHA-256 than the record says"
    if columns:
        promised = {c: column[i] for c, column in columns.items()}
        kinds = [c.removeprefix(records.KIND_LENGTH) for c in columns if c.startswith(records.KIND_LENGTH)]
        if records.checksum(record) != int(promised["checksum"]):
            yield f"{name} is not the record that was written"
        for (column, _), value in zip(records.columns(kinds), records.columns_of(sample, record, kinds=kinds)):
            if column not in ("weight", "checksum") and value != promised[column]:
                yield f"{name} has {column} {value}, not {promised[column]}"
