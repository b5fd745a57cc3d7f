"""Writes a split of a data set of latents, shard by shard, by any number of processes; goes on where it was stopped.

The files are those of `data_pipelines.latent_records`. The same samples give the same bytes, whoever writes them.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from data_pipelines import latent_records as records
from sorax.errors import UserError

SHARD_BYTES = 256 << 20
_RECORD_BYTES = 256  # of a record besides its latents, tokens and texts: names, lengths and checksum


def sample_bytes(shapes, channels, texts=0):
    """Estimated bytes of records, int64 [n]: shapes int [n, 3] of latents; texts, bytes of tokens and captions."""
    latents = np.prod(np.asarray(shapes, np.int64).reshape(-1, 3), axis=1) * channels * 2 * 2
    return latents + texts + _RECORD_BYTES


def shard_bounds(count, num_shards):
    """int64 [K + 1]: shard k holds samples bounds[k] to bounds[k + 1] - 1."""
    return np.arange(num_shards + 1, dtype=np.int64) * count // num_shards


def choose_shards(sizes, limit=SHARD_BYTES):
    """The number of shards that keeps every one within `limit` bytes, as far as single samples (int [n]) allow it."""
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    count = len(sizes)
    num_shards = max(1, min(count, -(-int(ends[-1]) // limit)))
    while num_shards < count and np.diff(ends[shard_bounds(count, num_shards)]).max() > limit:
        num_shards = min(count, num_shards + max(1, num_shards // 16))
    return num_shards


class LatentWriter:
    """Writes one split.

    Args:
      folder, split: where; a folder may hold several splits of one VAE and tokenizer.
      identity: of the samples and of all that made their records.
      count: number of samples. num_shards: K.
      channels: C. metadata: JSON values to be kept in metadata.json; those of all splits must be equal.
      source: JSON value kept for this split alone.

    All processes make one alike; `prepare` and `finish` are for one of them, before and after all others' `write`.
    """

    def __init__(self, folder, split, *, identity, count, num_shards, channels, metadata, source=None):
        self.folder, self.split, self.channels = Path(folder), split, channels
        self.num_shards, self.bounds = num_shards, shard_bounds(count, num_shards)
        self.metadata = json.loads(json.dumps(metadata))
        self._plan = json.loads(
            json.dumps(dict(version=records.VERSION, split=split, identity=identity, count=count,
                            num_shards=num_shards, metadata=metadata, source=source))
        )  # fmt: skip

    def prepare(self, *, replace=False):
        """Makes the folder and keeps in it what will be written; finished shards of the same stay.

        Raises UserError where the folder holds another data set, unless `replace`: then that is deleted.
        """
        if (differs := self._differs()) is not None:
            if not replace:
                raise UserError(f"{self.folder} holds {differs}: write into another folder, or delete it first")
            self._delete()
        try:
            (self.folder / records.PARTS).mkdir(parents=True, exist_ok=True)
            _write(self._part(None, "json"), json.dumps(self._plan, indent=1, sort_keys=True))
        except OSError as error:
            raise UserError(f"latents cannot be written to {self.folder}: {error.strerror}; choose another") from error

    def is_finished(self):
        """Whether the split is there as a whole: every shard and what `finish` writes."""
        there = (self.folder / records.INFO).exists() and self._finished() is not None
        return there and self._differs() is None and not self.pending()

    def pending(self, process=0, processes=1):
        """The shards that this one of several processes has to write still."""
        finished = self._kept()
        return [k for k in range(process, self.num_shards, processes) if not self._is_written(k, finished)]

    def write(self, shard, samples):
        """Writes one shard whole or not at all.

        samples: iterable of the dicts that `RecordEncoder` takes, in order, with a "weight" if it is not 1.
        Raises UserError where the disk does not take it.
        """
        try:
            self._write(shard, samples)
        except (OSError, RuntimeError) as error:  # the writer of ArrayRecord raises the latter when a disk is full
            self._path(shard).with_name(self._path(shard).name + ".partial").unlink(missing_ok=True)  # room for others
            raise UserError(
                f"shard {shard} could not be written to {self.folder}: {getattr(error, 'strerror', None) or error}; "
                "free some space and run the same command, it goes on"
            ) from error

    def _write(self, shard, samples):
        import pyarrow.parquet
        from array_record.python import array_record_module

        kinds, path = caption_kinds(self.metadata), self._path(shard)
        encode = records.RecordEncoder(self.channels, text_width(self.metadata), kinds)
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        # One record a group: each is compressed and read alone.
        writer, columns = array_record_module.ArrayRecordWriter(str(partial), "group_size:1"), []
        for sample in samples:
            weight = sample.pop("weight", 1.0)
            record = encode(sample)
            writer.write(record)
            columns.append(records.columns_of(sample, record, weight, kinds))
        writer.close()
        expected = int(self.bounds[shard + 1] - self.bounds[shard])
        if len(columns) != expected:
            raise ValueError(f"shard {shard} takes {expected} samples, got {len(columns)}")
        entry = dict(file=path.name, count=expected, bytes=partial.stat().st_size, sha256=file_sha256(partial))
        os.replace(partial, path)
        pyarrow.parquet.write_table(_table(columns, kinds), self._part(shard, "parquet"))
        _write(self._part(shard, "json"), json.dumps(entry))  # the last: with it the shard is finished

    def finish(self):
        """Writes what makes the shards of all processes a data set; the folder's other splits stay in it."""
        import pyarrow.parquet

        missing = self.pending()
        if missing:
            raise UserError(f"{len(missing)} of {self.num_shards} shards are missing in {self.folder}, the first is "
                            f"{missing[0]}: run the same command again, it goes on")  # fmt: skip
        finished, merged = self._kept(), self.folder / f"{self.split}.parquet"
        shards = [self._entry(k, finished) for k in range(self.num_shards)]
        partial = merged.with_name(merged.name + ".partial")
        old = finished and pyarrow.parquet.read_table(merged)
        with pyarrow.parquet.ParquetWriter(partial, _table([], caption_kinds(self.metadata)).schema) as writer:
            for k in range(self.num_shards):
                if self._part(k, "parquet").exists():
                    writer.write_table(pyarrow.parquet.read_table(self._part(k, "parquet")))
                else:
                    writer.write_table(old.slice(self.bounds[k], self.bounds[k + 1] - self.bounds[k]))
        os.replace(partial, merged)
        text = json.dumps({**self._plan, "shards": shards}, indent=1, sort_keys=True)
        _write(self.folder / f"{self.split}.json", text)
        write_dataset_info(self.folder, self.channels)
        for path in [self._part(None, "json"), *self._parts()]:
            path.unlink(missing_ok=True)
        if not any((self.folder / records.PARTS).iterdir()):
            (self.folder / records.PARTS).rmdir()

    def _finished(self):
        return read_json(self.folder / f"{self.split}.json")

    def _kept(self):
        """SPLIT.json if its samples need not be written again: without their columns they have to be."""
        return self._finished() if (self.folder / f"{self.split}.parquet").exists() else None

    def _differs(self):
        """What else the folder holds, in words; None if it is empty or holds this data set, begun or finished."""
        there = self._finished() or read_json(self._part(None, "json"))
        if there is not None:
            names = dict(
                version="latents of another version of sorax",
                identity="other data, or latents of another VAE, tokenizer or text encoder", count="another data set",
                num_shards="the same data in another number of shards", metadata="other settings",
            )  # fmt: skip
            for name, words in names.items():
                if there.get(name) != self._plan[name]:
                    return f"{words} as its split {self.split!r}"
        for other in splits(self.folder):
            if other != self.split and read_json(self.folder / f"{other}.json")["metadata"] != self.metadata:
                return f"a split {other!r} of another VAE or tokenizer"
        return None

    def _delete(self):
        """Removes this split; and all others too if they are of another VAE or tokenizer."""
        others = [other for other in splits(self.folder) if other != self.split]
        stale = [s for s in others if read_json(self.folder / f"{s}.json")["metadata"] != self.metadata]
        for split in [self.split, *stale]:
            for path in self.folder.glob(f"{records.NAME}-{split}.array_record-*"):
                path.unlink()
            for suffix in ("json", "parquet"):
                (self.folder / f"{split}.{suffix}").unlink(missing_ok=True)
        shutil.rmtree(self.folder / records.PARTS, ignore_errors=True)
        (self.folder / records.INFO).unlink(missing_ok=True)

    def _is_written(self, shard, finished):
        entry, path = self._entry(shard, finished), self._path(shard)
        return entry is not None and path.exists() and path.stat().st_size == entry["bytes"]

    def _entry(self, shard, finished):
        """Size and sums of a shard, of its own file or of the finished split (JSON or None)."""
        return read_json(self._part(shard, "json")) or (finished and finished["shards"][shard])

    def _path(self, shard):
        return self.folder / records.shard_name(self.split, shard, self.num_shards)

    def _part(self, shard, suffix):
        name = self.split if shard is None else f"{self.split}-{shard:05d}"
        return self.folder / records.PARTS / f"{name}.{suffix}"

    def _parts(self):
        return [self._part(k, suffix) for k in range(self.num_shards) for suffix in ("json", "parquet")]


def text_width(metadata):
    """D of the captions' embeddings in a data set of latents of such metadata; 0 if it has none."""
    return metadata.get("text", {}).get("width", 0)


def caption_kinds(metadata):
    """Kinds of captions that the samples of a data set of latents of such metadata have beside their own."""
    return tuple(metadata.get("caption_kinds", ()))


def splits(folder):
    """Names of the finished splits in a folder, sorted."""
    found = (path.with_suffix("") for path in Path(folder).glob("*.parquet"))
    return sorted(path.name for path in found if path.with_suffix(".json").exists())


def read_json(path):
    """What a JSON file holds; None if it is not there or was not written to its end."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def file_sha256(path):
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_dataset_info(folder, channels):
    """Writes dataset_info.json, features.json and metadata.json for the finished splits of a folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, file_adapters, naming
    from tensorflow_datasets.core import splits as tfds_splits

    folder = Path(folder)
    manifests = {split: read_json(folder / f"{split}.json") for split in splits(folder)}
    template = naming.ShardedFileTemplate(
        dataset_name=records.NAME, data_dir=folder, filetype_suffix="array_record",
        template=naming.DEFAULT_FILENAME_TEMPLATE,
    )  # fmt: skip
    infos = [
        tfds_splits.SplitInfo(
            name=split, shard_lengths=[s["count"] for s in m["shards"]],
            num_bytes=sum(s["bytes"] for s in m["shards"]), filename_template=template.replace(split=split),
        )
        for split, m in manifests.items()
    ]  # fmt: skip
    shared = next(iter(manifests.values()))["metadata"]
    sources = {s: dict(identity=m["identity"], count=m["count"], source=m["source"]) for s, m in manifests.items()}
    identity = dataset_info.DatasetIdentity(
        name=records.NAME, version=tfds.core.Version(records.VERSION), data_dir=str(folder), module_name=__name__
    )
    info = dataset_info.DatasetInfo(
        builder=identity,
        description="Latents of videos: the posterior of a VAE, with captions and their tokens.",
        features=records.features(channels, text_width(shared), caption_kinds(shared)),
        metadata=dataset_info.MetadataDict({**shared, "splits": sources}),
        disable_shuffling=True,
        split_dict=tfds_splits.SplitDict(infos),
    )
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    info.write_to_directory(folder)


def _table(columns, kinds=()):
    import pyarrow

    kept = records.columns(kinds)
    columns = list(zip(*columns)) or [()] * len(kept)
    fields = [pyarrow.field(name, getattr(pyarrow, dtype)()) for name, dtype in kept]
    arrays = [pyarrow.array(np.array(c, dtype)) for c, (_, dtype) in zip(columns, kept)]
    return pyarrow.table(arrays, schema=pyarrow.schema(fields))


def _write(path, text):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
