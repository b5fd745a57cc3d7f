"""A folder of real files as a source: what it offers, and what it says of what it cannot offer."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from video_files import damaged, numbered, numbers, write

from data_pipelines import folder as folder_lib
from data_pipelines import inspection
from data_pipelines.fit import Fit, tokens
from data_pipelines.index import SourceRecords, build_index
from data_pipelines.world import World, WorldConfig
from sorax.errors import UserError


def FolderSource(folder, **options):
    """Made in this process: to start workers costs a second, and their protection is tested elsewhere."""
    return folder_lib.FolderSource(folder, **(dict(processes=0) | options))


def specs(source):
    return [source.spec(i) for i in range(len(source))]


def metadata(folder, captions):
    rows = [json.dumps({"file": f, "caption": c}) for f, c in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path):
    """Three clips of different size, length and container, and an image."""
    write(tmp_path / "long.mp4", numbered(40, 48, 64), fps=8)
    write(tmp_path / "short.webm", numbered(7, 64, 32), fps=8)
    write(tmp_path / "fast.mov", numbered(33, 80, 96), fps=30)
    Image.fromarray(numbered(1, 50, 70)[0]).save(tmp_path / "photo.png")
    metadata(tmp_path, {f: f"caption of {f}" for f in ("long.mp4", "short.webm", "fast.mov", "photo.png")})
    return tmp_path


def test_native_sizes_and_lengths_within_the_limits(folder):
    source = FolderSource(folder, fit=Fit(1000, fps=8, max_frames=17))
    found = {spec.key: spec for spec in specs(source)}
    assert {k: (s.num_frames, s.height, s.width) for k, s in found.items()} == {
        "long.mp4": (17, 48, 64),
        "short.webm": (5, 64, 32),
        "fast.mov": (9, 80, 96),
        "photo.png": (1, 48, 64),
    }
    assert all(s.fps == 8.0 and s.caption == f"caption of {k}" for k, s in found.items())
    assert source.rejected == []


def test_samples_have_exactly_the_shape_of_their_spec_and_the_right_frames(folder):
    source = FolderSource(folder, fit=Fit(1000, fps=8, max_frames=17))
    frames = {}
    for i in range(len(source)):
        spec, sample = source.spec(i), source[i]
        assert sample["video"].shape == (spec.num_frames, spec.height, spec.width, 3)
        assert sample["video"].dtype == np.uint8
        assert (sample["caption"], sample["fps"], sample["key"]) == (spec.caption, spec.fps, spec.key)
        frames[spec.key] = numbers(sample["video"])
    assert frames["long.mp4"] == list(range(17))
    assert frames["fast.mov"] == [0, 4, 7, 11, 15, 19, 22, 26, 30]


def test_without_a_rate_each_file_keeps_its_own(folder):
    source = FolderSource(folder, fit=Fit(1000, max_frames=81))
    found = {spec.key: spec for spec in specs(source)}
    assert (found["fast.mov"].fps, found["fast.mov"].num_frames) == (30.0, 33)
    assert (found["long.mp4"].fps, found["long.mp4"].num_frames) == (8.0, 37)


def test_samples_are_scaled_down_to_the_token_budget(folder):
    source = FolderSource(folder, fit=Fit(24, fps=8, max_frames=17))
    for i in range(len(source)):
        spec = source.spec(i)
        assert 1 <= tokens(spec) <= 24 and spec.height % 16 == spec.width % 16 == 0
        assert source[i]["video"].shape == (spec.num_frames, spec.height, spec.width, 3)


def test_source_survives_pickling(folder):
    source = FolderSource(folder, fit=Fit(1000, fps=8, max_frames=17))
    copy = pickle.loads(pickle.dumps(source))
    assert specs(copy) == specs(source) and copy.rejected == source.rejected
    np.testing.assert_array_equal(copy[0]["video"], source[0]["video"])


def test_order_is_by_name_not_by_listing_order(folder):
    keys = [s.key for s in specs(FolderSource(folder, fit=Fit(1000)))]
    assert keys == sorted(keys)


def test_unusable_files_are_listed_by_name_and_reason_and_logged_once(folder, tmp_path_factory, caplog):
    outside = write(tmp_path_factory.mktemp("outside") / "secret.mp4", numbered(5))
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    good = write(tmp_path_factory.mktemp("good") / "good.mp4", noise)
    damaged(good, folder / "cut.mp4", keep=0.5)
    damaged(good, folder / "broken.mp4", garbage=(0.3, 0.5))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 20)
    (folder / "link.mp4").symlink_to(outside)
    write(folder / "silent.mp4", numbered(5))
    write(folder / "unlisted.mp4", numbered(5))
    write(folder / "tiny.mp4", numbered(5, 8, 8))
    names = ["long.mp4", "cut.mp4", "broken.mp4", "empty.mp4", "text.mp4", "link.mp4", "tiny.mp4", "gone.mp4"]
    escape = f"../{outside.parent.name}/secret.mp4"
    metadata(folder, {n: "words" for n in [*names, escape, str(outside)]} | {"silent.mp4": " "})
    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder, fit=Fit(1000, fps=8, max_frames=81))
    assert [spec.key for spec in specs(source)] == ["long.mp4"]
    assert [file for file, _ in source.rejected] == sorted(file for file, _ in source.rejected)
    reasons = dict(source.rejected)
    for name, part in {
        "cut.mp4": "truncated",
        "broken.mp4": "corrupt",
        "empty.mp4": "zero bytes",
        "text.mp4": "not a video",
        "link.mp4": "outside the folder",
        escape: "outside the folder",
        str(outside): "outside the folder",
        "silent.mp4": "no caption",
        "unlisted.mp4": "not listed",
        "tiny.mp4": "smaller than one patch",
        "gone.mp4": "no such file",
    }.items():
        assert part in reasons.pop(name), name
    assert set(reasons) == {"short.webm", "fast.mov", "photo.png"}  # no longer listed either
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "skipped 14 of 15 files" in message and "text.mp4 (not a video" in message and "\n" not in message


def test_clips_shorter_than_asked_are_rejected(folder):
    source = FolderSource(folder, fit=Fit(1000, fps=8, min_frames=9))
    assert {s.key for s in specs(source)} == {"long.mp4", "fast.mov"}
    assert dict(source.rejected)["photo.png"].startswith("too short: 1 frames")


def test_a_file_that_changes_later_is_a_plain_error(folder):
    source = FolderSource(folder, fit=Fit(1000, fps=8))
    index = [spec.key for spec in specs(source)].index("long.mp4")
    source[index]
    os.utime(folder / "long.mp4", ns=(1, 1))
    with pytest.raises(UserError, match=r"long\.mp4 has changed since it was indexed: restore it, or index"):
        source[index]
    (folder / "long.mp4").unlink()
    with pytest.raises(UserError, match=r"long\.mp4 could be decoded when it was indexed but no longer: No such file"):
        source[index]


def test_changes_are_counted(folder):
    source = FolderSource(folder, fit=Fit(1000, fps=8, max_frames=17))
    # fast.mov has another rate, long.mp4 is cut; short.webm gives 5 of its 7 frames, photo.png loses its border.
    assert source.changes == {"retimed": 1, "trimmed": 1, "cropped to grid": 2}
    assert FolderSource(folder, fit=Fit(24, fps=8, max_frames=17)).changes["rescaled"] == 2


def test_an_index_gives_the_samples_that_the_folder_gives(folder, tmp_path_factory):
    (folder / "broken.mp4").write_bytes(b"no video")
    fit = Fit(40, fps=8, max_frames=17)
    made = FolderSource(folder, fit=fit)
    index = build_index(folder, tmp_path_factory.mktemp("index"), processes=0)
    for given in (index, tmp_path_factory.getbasetemp() / "index0"):
        source = FolderSource(folder, fit=fit, index=given)
        assert specs(source) == specs(made) and source.changes == made.changes and source.rejected == made.rejected
        for i in range(len(source)):
            np.testing.assert_array_equal(source[i]["video"], made[i]["video"])


def test_files_added_after_the_index_are_not_seen(folder):
    index = build_index(folder, processes=0)
    write(folder / "new.mp4", numbered(9))
    metadata(folder, {"new.mp4": "words"})
    source = FolderSource(folder, fit=Fit(1000), index=index)
    assert [spec.key for spec in specs(source)] == list(index.columns["key"])


def test_a_cached_index_spares_decoding_what_has_not_changed(folder, tmp_path_factory, monkeypatch):
    decoded = []
    inspect = inspection.inspect
    monkeypatch.setattr(inspection, "inspect", lambda path, *args: (decoded.append(path), inspect(path, *args))[1])
    options = dict(fit=Fit(1000, fps=8), cache=tmp_path_factory.mktemp("cache") / "index")
    first = FolderSource(folder, **options)
    assert len(decoded) == 4
    assert specs(FolderSource(folder, **options)) == specs(first) and len(decoded) == 4
    os.utime(folder / "long.mp4", ns=(1, 1))
    FolderSource(folder, **options)[1]
    assert len(decoded) == 5
    # A cache of other limits is no use: other frames were checked.
    FolderSource(folder, **(options | dict(fit=Fit(1000, fps=4))))
    assert len(decoded) == 9


def test_an_index_of_something_else_is_refused(folder):
    index = build_index(SourceRecords(World(WorldConfig(num_samples=2)), "world"), processes=0)
    with pytest.raises(UserError, match=r"data\.index is one of world, not of a folder"):
        FolderSource(folder, fit=Fit(1000), index=index)


def one_line(error):
    return "\n" not in str(error.value)


def test_missing_or_empty_or_useless_folder_is_a_user_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_text("no")
    (tmp_path / "bad" / "x.txt").write_text("caption")
    for path, words in {
        tmp_path / "none": "no folder",
        tmp_path / "empty": "no videos in",
        tmp_path / "bad" / "x.mp4": "is a file",
        tmp_path / "bad": r"no usable video in .*skipped 1 of 1 files: x\.mp4 \(not a video",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            FolderSource(path, fit=Fit(100))
        assert one_line(error)
