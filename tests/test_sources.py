"""A folder of real files as a source: what it offers, and what it says of what it cannot offer."""

import json
import logging
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import damaged, numbered, numbers, write

from data_pipelines.sources import FolderSource, SampleSpec, fit_size, open_source, tokens
from sorax.errors import UserError


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
    source = FolderSource(folder, max_tokens=1000, fps=8, max_frames=17)
    specs = {source.spec(i).key: source.spec(i) for i in range(len(source))}
    assert {k: (s.num_frames, s.height, s.width) for k, s in specs.items()} == {
        "long.mp4": (17, 48, 64),
        "short.webm": (5, 64, 32),
        "fast.mov": (9, 80, 96),
        "photo.png": (1, 48, 64),
    }
    assert all(s.fps == 8.0 and s.caption == f"caption of {k}" for k, s in specs.items())
    assert source.rejected == []


def test_samples_have_exactly_the_shape_of_their_spec_and_the_right_frames(folder):
    source = FolderSource(folder, max_tokens=1000, fps=8, max_frames=17)
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
    source = FolderSource(folder, max_tokens=1000, max_frames=81)
    specs = {source.spec(i).key: source.spec(i) for i in range(len(source))}
    assert (specs["fast.mov"].fps, specs["fast.mov"].num_frames) == (30.0, 33)
    assert (specs["long.mp4"].fps, specs["long.mp4"].num_frames) == (8.0, 37)


def test_samples_are_scaled_down_to_the_token_budget(folder):
    source = FolderSource(folder, max_tokens=24, fps=8, max_frames=17)
    for i in range(len(source)):
        spec = source.spec(i)
        assert 1 <= tokens(spec) <= 24 and spec.height % 16 == spec.width % 16 == 0
        assert source[i]["video"].shape == (spec.num_frames, spec.height, spec.width, 3)


def test_source_survives_pickling(folder):
    source = FolderSource(folder, max_tokens=1000, fps=8, max_frames=17)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.spec(i) for i in range(len(copy))] == [source.spec(i) for i in range(len(source))]
    np.testing.assert_array_equal(copy[0]["video"], source[0]["video"])


def test_order_is_by_name_not_by_listing_order(folder):
    keys = [s.key for s in FolderSource(folder, max_tokens=1000)._specs]
    assert keys == sorted(keys)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    budget=st.integers(1, 2000),
    multiple=st.sampled_from([8, 16, 32]),
)
def test_fitted_size_keeps_budget_grid_and_aspect(height, width, budget, multiple):
    size = fit_size(height, width, budget, multiple)
    if size is None:
        # Only for a picture below one patch, or one so elongated that its longer side alone breaks the budget.
        assert min(height, width) < multiple or max(height, width) / min(height, width) > budget - 0.5
        return
    h, w = size
    assert h % multiple == w % multiple == 0
    assert 0 < h <= height and 0 < w <= width
    assert (h // multiple) * (w // multiple) <= budget
    # One side is the nearest multiple to the aspect ratio given the other, or both are native rounded down.
    near = min(abs(w - h * width / height), abs(h - w * height / width)) <= multiple / 2
    assert near or (height - h < multiple and width - w < multiple)


def test_fitted_size_uses_the_budget():
    assert fit_size(480, 720, 10_000, 16) == (480, 720)
    h, w = fit_size(480, 720, 240, 16)
    assert 240 * 0.85 <= h * w / 256 <= 240


def test_tokens_count_latent_patches():
    spec = SampleSpec(17, 64, 96, 8.0, "", "")
    assert tokens(spec, 16, 4) == 5 * 4 * 6
    assert tokens(SampleSpec(1, 16, 16, 8.0, "", ""), 16, 4) == 1


def test_text_files_beside_videos_are_captions(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.mp4", numbered(5))
    write(tmp_path / "sub" / "b.mp4", numbered(5))
    write(tmp_path / "c.mp4", numbered(5))
    (tmp_path / "a.txt").write_text("  one thing\n")
    (tmp_path / "sub" / "b.txt").write_text("another thing")
    source = FolderSource(tmp_path, max_tokens=100)
    assert [(s.key, s.caption) for s in source._specs] == [("a.mp4", "one thing"), ("sub/b.mp4", "another thing")]
    assert source.rejected == [("c.mp4", "no caption: no .txt beside it")]


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
        source = FolderSource(folder, max_tokens=1000, fps=8, max_frames=81)
    assert [source.spec(i).key for i in range(len(source))] == ["long.mp4"]
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
    source = FolderSource(folder, max_tokens=1000, fps=8, min_frames=9)
    assert {s.key for s in source._specs} == {"long.mp4", "fast.mov"}
    assert dict(source.rejected)["photo.png"].startswith("gives 1 frames")


def test_a_file_that_changes_later_is_a_plain_error(folder):
    source = FolderSource(folder, max_tokens=1000, fps=8)
    index = [s.key for s in source._specs].index("long.mp4")
    (folder / "long.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"long\.mp4 could be decoded at start but no longer: empty file"):
        source[index]


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
            FolderSource(path, max_tokens=100)
        assert one_line(error)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{not json", "line 2 is not JSON"),
        ('["a.mp4", "words"]', 'line 2 has no "file"'),
        ('{"caption": "words"}', 'line 2 has no "file"'),
        ('{"file": "b.mp4", "caption": 3}', 'line 2: "caption" is not text'),
        ('{"file": "a.mp4", "caption": "again"}', r"line 2 lists a\.mp4 again, after line 1"),
        (b'{"file": "b.mp4", "caption": "\xff"}', "not UTF-8"),
    ],
)
def test_malformed_metadata_names_its_line(tmp_path, line, words):
    write(tmp_path / "a.mp4", numbered(5))
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file": "a.mp4", "caption": "words"}\n' + line + b"\n")
    with pytest.raises(UserError, match=words) as error:
        FolderSource(tmp_path, max_tokens=100)
    assert one_line(error)


@pytest.mark.parametrize("setting", [dict(max_tokens=0), dict(fps=-1.0), dict(max_frames=0), dict(min_frames=99)])
def test_impossible_settings_are_user_errors(folder, setting):
    with pytest.raises(UserError, match=f"data.{next(iter(setting))} is"):
        FolderSource(folder, **(dict(max_tokens=100) | setting))


def test_open_source_reads_a_folder_with_the_settings_of_the_section(folder):
    data = dict(path=str(folder), max_tokens=1000, fps=8.0, max_frames=9, row_length=512, world=dict(seed=1))
    source = open_source(data)
    assert max(s.num_frames for s in source._specs) == 9
    assert max(s.num_frames for s in open_source(data, max_frames=5)._specs) == 5
    with pytest.raises(UserError, match=r"data\.max_tokens is not set"):
        open_source(dict(path=str(folder)))


def test_open_source_makes_the_world_from_its_section():
    source = open_source(dict(path="", world=dict(shapes=[[5, 32, 48]], num_samples=3)), split="test")
    assert len(source) == 3 and source.config.split == "test"
    assert source[0]["video"].shape == (5, 32, 48, 3)
    with pytest.raises(UserError, match=r"unknown key data\.world\.shape: did you mean data\.world\.shapes"):
        open_source(dict(path="world", world=dict(shape=1)))
