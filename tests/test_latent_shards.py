"""Latent shards: what is written is what is read, by TFDS too; the same whoever writes; damage is found and named."""

import hashlib
import os
import pathlib
import pickle
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import latent_records as records
from data_pipelines import latent_shards
from data_pipelines.latent_shards import LatentShards, verify
from data_pipelines.latent_writer import LatentWriter, choose_shards, shard_bounds
from data_pipelines.rows import RowSource
from sorax.errors import UserError

COUNT, SHARDS, CHANNELS = 11, 3, 4
SHAPES = ((3, 4, 6), (1, 4, 4), (2, 6, 4))
VAE = dict(identity="vae", latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 0.5, 4.0])


def bits_of(numbers):
    return numbers.astype(ml_dtypes.bfloat16).view(np.uint16)


def sample(i):
    rng = np.random.default_rng(i)
    t, h, w = SHAPES[i % len(SHAPES)]
    mean, logvar = rng.normal(size=(2, t, h, w, CHANNELS)).astype(np.float32)
    return dict(
        key=f"clips/{i}.mp4", caption=f"{i}: ein roter Kreis, 红色", text_tokens=np.arange(3, 5 + i, dtype=np.int32),
        mean=bits_of(mean), logvar=bits_of(logvar - 2), num_frames=4 * t - 3, height=8 * h,
        width=8 * w, fps=7.5,
    )  # fmt: skip


def writer(folder, split="train", **options):
    settings = dict(identity="data", count=COUNT, num_shards=SHARDS, channels=CHANNELS, metadata=dict(vae=VAE))
    return LatentWriter(folder, split, **settings | options)


def fill(made, shards):
    for k in shards:
        made.write(k, (sample(i) for i in range(made.bounds[k], made.bounds[k + 1])))


def written(folder, processes=1):
    made = writer(folder)
    made.prepare()
    for process in reversed(range(processes)):
        fill(writer(folder), made.pending(process, processes))
    made.finish()
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return written(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def copy(shards, tmp_path):
    for name, data in contents(shards).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_plain_tfds_reads_every_feature(shards):
    builder = tfds.builder_from_directory(shards)
    source = builder.as_data_source("train")
    assert builder.info.splits["train"].shard_lengths == np.diff(shard_bounds(COUNT, SHARDS)).tolist()
    assert builder.info.metadata["vae"] == VAE and len(source) == COUNT
    for i in range(COUNT):
        found, expected = source[i], sample(i)
        digest = hashlib.sha256(expected["mean"].tobytes() + expected["logvar"].tobytes()).hexdigest()
        assert found.pop("sha256").decode() == digest and set(found) == set(expected)
        for name, value in expected.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(found[name], value)
                assert found[name].dtype == value.dtype
            else:
                assert (found[name].decode() if isinstance(value, str) else found[name]) == value


def test_samples_are_read_without_tfds(shards):
    """Its lazy imports wait for each other for ever where two threads of a loader start them at once."""
    code = ("import sys; from data_pipelines.latent_shards import LatentShards; LatentShards(sys.argv[1])[0]; "
            "print('tensorflow_datasets' in sys.modules)")  # fmt: skip
    argv = [sys.executable, "-c", code, str(shards)]
    root = pathlib.Path(__file__).parents[1]
    assert subprocess.run(argv, capture_output=True, text=True, cwd=root).stdout == "False\n"


def test_examples_are_normalised_means_and_what_the_columns_promise(shards):
    examples = LatentShards(shards)
    assert len(examples) == COUNT and examples.weights is None
    for i in range(COUNT):
        expected, found = sample(i), examples[i]
        latents = (records.floats(expected["mean"]) - np.float32(VAE["latents_mean"])) / np.float32(VAE["latents_std"])
        np.testing.assert_array_equal(found["latents"], latents)
        np.testing.assert_array_equal(found["text_tokens"], expected["text_tokens"])
        assert found["latents"].dtype == np.float32
        assert tuple(examples.shapes[i]) == latents.shape[:3] and examples.text_lengths[i] == len(found["text_tokens"])
        assert tuple(examples.video_shapes[i]) == tuple(expected[n] for n in ("num_frames", "height", "width"))
        assert (examples.key(i), examples.caption(i)) == (expected["key"], expected["caption"])
    with pytest.raises(IndexError):
        examples[COUNT]


def test_opening_reads_no_record(shards, monkeypatch):
    def refuse(path):
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(latent_shards, "_open_shard", refuse)
    examples = LatentShards(shards)
    assert examples.shapes.dtype == examples.text_lengths.dtype == np.int32
    with pytest.raises(UserError, match="cannot be read"):
        examples[0]


def test_what_is_held_in_memory_is_read_once_and_is_the_same(shards, monkeypatch):
    held, always_read = LatentShards(shards), LatentShards(shards, held_bytes=0)
    before = [held[i] for i in range(COUNT)]
    drawn = [held.sample(i, 1)["latents"] for i in range(COUNT)]
    monkeypatch.setattr(LatentShards, "record", lambda *_: pytest.fail("read again"))
    again = [held[i] for i in range(COUNT)]
    assert all(np.array_equal(held.sample(i, 1)["latents"], drawn[i]) for i in range(COUNT))
    monkeypatch.undo()
    assert all(np.array_equal(always_read.sample(i, 1)["latents"], drawn[i]) for i in range(COUNT))
    for i in range(COUNT):
        for found in (again[i], always_read[i], pickle.loads(pickle.dumps(held))[i]):
            assert all(np.array_equal(found[name], before[i][name]) for name in before[i])
    assert len(pickle.dumps(held)) < len(pickle.dumps(before))  # workers hold nothing


def test_draws_follow_the_posterior_and_their_key(shards):
    examples = LatentShards(shards)
    same, other = examples.sample(2, (7, 1)), examples.sample(2, (7, 2))
    np.testing.assert_array_equal(same["latents"], examples.sample(2, (7, 1))["latents"])
    assert not np.array_equal(same["latents"], other["latents"])
    draws = np.stack([examples.sample(2, (0, k))["latents"] for k in range(600)])
    deviation = np.exp(0.5 * records.floats(sample(2)["logvar"])) / np.float32(VAE["latents_std"])
    # 600 draws: the mean is off by a 1 / sqrt(600) of the deviation, the deviation by 1 / sqrt(1200); 5 times that.
    assert np.abs((draws.mean(0) - examples[2]["latents"]) / deviation).max() < 5 / 600**0.5
    assert np.abs(draws.std(0) / deviation - 1).max() < 5 / 1200**0.5


def test_rows_are_drawn_from_the_posterior_if_asked(shards):
    settings = dict(row_tokens=24, row_text=64, batch_size=2, seed=5, patch_size=(1, 2, 2))
    mean, one, two = (
        RowSource(LatentShards(shards), posterior=p, **settings) for p in ("mean", "sample", "sample")
    )  # fmt: skip
    for r in range(4):
        a, b, c = mean[r], one[r], two[r]
        assert all(np.array_equal(b[name], c[name]) for name in b)
        assert np.array_equal(a["segment_ids"], b["segment_ids"]) and not np.array_equal(a["tokens"], b["tokens"])


@pytest.mark.parametrize("processes", [2, 5])
def test_any_number_of_processes_writes_the_same_bytes(shards, tmp_path, processes):
    assert contents(written(tmp_path, processes)) == contents(shards)


def test_a_stopped_writer_goes_on_with_what_is_missing(shards, tmp_path):
    made = writer(tmp_path)
    made.prepare()
    fill(made, [1])

    def stopped():
        yield sample(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.write(0, stopped())
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        made.finish()
    with pytest.raises(UserError, match="not finished"):
        LatentShards(tmp_path)
    again = writer(tmp_path)
    again.prepare()
    assert again.pending() == [0, 2] and not again.is_finished()
    fill(again, again.pending())
    again.finish()
    assert again.is_finished() and contents(tmp_path) == contents(shards)


LOST = {records.shard_name("train", 1, SHARDS): [1], "dataset_info.json": [], "train.parquet": [0, 1, 2]}


@pytest.mark.parametrize("lost", LOST)
def test_what_was_deleted_is_written_again(shards, copy, lost):
    (copy / lost).unlink()
    again = writer(copy)
    assert not again.is_finished()
    again.prepare()
    assert again.pending() == LOST[lost]
    fill(again, again.pending())
    again.finish()
    assert again.is_finished() and contents(copy) == contents(shards)


def test_data_sets_with_parts_missing_are_not_read(copy):
    (copy / records.shard_name("train", 1, SHARDS)).unlink()
    with pytest.raises(UserError, match="00001-of-00003 is missing"):
        LatentShards(copy)
    (copy / "train.parquet").unlink()
    (copy / records.shard_name("train", 1, SHARDS)).write_bytes(b"")
    with pytest.raises(UserError, match="another size"):
        LatentShards(copy)


def test_splits_share_a_folder_if_they_share_the_vae(copy):
    val = writer(copy, "val", count=2, num_shards=1)
    val.prepare()
    fill(val, [0])
    val.finish()
    assert set(tfds.builder_from_directory(copy).info.splits) == {"train", "val"}
    assert (len(LatentShards(copy, "val")), len(LatentShards(copy))) == (2, COUNT)
    assert verify(copy) == []
    other = writer(copy, "test", metadata=dict(vae=VAE | dict(identity="other")))
    with pytest.raises(UserError, match="a split 'train' of another VAE"):
        other.prepare()


@pytest.mark.parametrize("change", [dict(identity="new"), dict(num_shards=2), dict(metadata=dict(vae={}))])
def test_other_data_is_not_written_over_unless_asked(copy, change):
    made = writer(copy, **change)
    assert not made.is_finished()
    before = contents(copy)
    with pytest.raises(UserError, match="delete it first"):
        made.prepare()
    assert contents(copy) == before
    made.prepare(replace=True)
    assert made.pending() == list(range(made.num_shards))


def test_verify_passes_what_is_whole(shards):
    seen = []
    assert verify(shards, seen.append) == [] and seen[-1] == COUNT


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)


def swap(folder):
    a, b = (folder / records.shard_name("train", k, SHARDS) for k in (1, 2))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def rewrite_with_wrong_latents(folder):
    from array_record.python import array_record_module

    path = folder / records.shard_name("train", 0, SHARDS)
    made = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for i in range(3):
        record = records.RecordEncoder(CHANNELS)(sample(i))
        mean = sample(i)["mean"].tobytes()
        made.write(record.replace(mean, mean[::-1]) if i == 1 else record)
    made.close()


FIRST = records.shard_name("train", 0, SHARDS)
DAMAGE = {
    "a flipped bit": (lambda f: flip(f / FIRST, 0.1), FIRST, "SHA-256"),
    "a lost end": (lambda f: os.truncate(f / FIRST, 70_000), FIRST, "bytes, not"),
    "a lost file": (lambda f: (f / FIRST).unlink(), FIRST, "is missing"),
    "swapped shards": (swap, records.shard_name("train", 1, SHARDS), r"record 0: \(clips/7.mp4\) is not the record"),
    "other latents": (rewrite_with_wrong_latents, FIRST, r"record 1: \(clips/1.mp4\) its latents have another SHA-256"),
    "lost columns": (lambda f: os.truncate(f / "train.parquet", 100), "train.parquet", "cannot be read"),
    "a lost table": (lambda f: (f / "train.parquet").unlink(), "train.parquet", "cannot be read"),
    "a lost list": (lambda f: (f / "dataset_info.json").unlink(), "dataset_info.json", "does not list"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_what_is_damaged(copy, damage):
    spoil, where, what = DAMAGE[damage]
    spoil(copy)
    problems = verify(copy)
    assert any(where in p for p in problems)
    assert any(re.search(what, p) for p in problems), problems


def test_a_folder_without_latents_is_named(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        LatentShards(tmp_path / "none")
    with pytest.raises(UserError, match="holds no latents of a split 'train'"):
        LatentShards(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(50, 400))
def test_shards_keep_to_their_size_and_hold_everything_once(sizes, limit):
    count = choose_shards(np.array(sizes), limit)
    bounds = shard_bounds(len(sizes), count)
    assert bounds[0] == 0 and bounds[-1] == len(sizes) and (np.diff(bounds) > 0).all()
    held = [sum(sizes[a:b]) for a, b in zip(bounds, bounds[1:])]
    assert max(held) <= limit or count == len(sizes)


def test_every_bfloat16_is_read_as_the_number_it_stands_for():
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(records.floats(bits), bits.view(ml_dtypes.bfloat16).astype(np.float32))
