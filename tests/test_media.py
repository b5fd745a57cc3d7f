"""Written files hold what was given to them, and nothing is left behind when writing fails."""

import errno
import io
import os

import av
import numpy as np
import pytest
from PIL import Image
from video_files import numbered, numbers

from data_pipelines.decode import decode, probe
from sorax.errors import UserError
from sorax.media import contact_sheet, gif_bytes, video_writer, write_sheet, write_video


@pytest.mark.parametrize("fps", [8, 12.5, 24, 30000 / 1001])
def test_mp4_keeps_frames_and_rate(tmp_path, fps):
    write_video(tmp_path / "deep" / "a.mp4", numbered(17), fps)
    info = probe(tmp_path / "deep" / "a.mp4")
    assert (info.num_frames, info.height, info.width) == (17, 48, 64)
    assert info.fps == pytest.approx(fps, rel=1e-4)
    assert numbers(decode(tmp_path / "deep" / "a.mp4", 17, 48, 64, info.fps)) == list(range(17))


def test_odd_sides_are_padded_by_repeating_the_edge(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(5, 47, 63), 8)
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == (48, 64)
    video = decode(tmp_path / "a.mp4", 5, 48, 64, 8.0).astype(int)
    assert np.abs(video[:, -1] - video[:, -2]).max() <= 4 and np.abs(video[:, :, -1] - video[:, :, -2]).max() <= 4


def test_mp4_has_its_index_first(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(5), 8)
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_gif_keeps_frames_and_duration():
    image = Image.open(io.BytesIO(gif_bytes(numbered(24), 24)))
    assert image.is_animated and image.n_frames == 24 and image.info["loop"] == 0
    frames, total = [], 0
    for k in range(24):
        image.seek(k)
        total += image.info["duration"]
        frames.append(np.asarray(image.convert("RGB")))
    assert total == 1000  # 24 frames of 1/24 s, though none of them can be exact
    assert numbers(np.stack(frames)) == list(range(24))


def test_single_frame_is_a_lossless_png(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    write_video(tmp_path / "a.png", frame, 8)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), frame[0])


def test_every_kind_of_file_keeps_its_comment_and_takes_frames_as_they_come(tmp_path):
    words = "a prompt: ein grüner Kreis 圆 " * 20
    for name in ("a.mp4", "a.gif", "b.png", "b.jpg", "f/", "g_%03d.png"):
        parts = [numbered(1)] if name.startswith("b") else [numbered(3), numbered(5)[3:]]
        with video_writer(f"{tmp_path}/{name}", 8, words) as write:
            for part in parts:
                write(part)
            assert not (tmp_path / name).is_file()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == words
    for name in ("a.gif", "b.jpg", "b.png", "f/00004.png", "g_004.png"):
        with Image.open(tmp_path / name) as image:
            found = image.text["Comment"] if name.endswith("png") else image.info["comment"].decode()
        assert found == words
    assert numbers(decode(tmp_path / "a.mp4", 5, 48, 64, 8.0)) == list(range(5))
    assert len(list(tmp_path.iterdir())) == 4 + 1 + 5 and len(list((tmp_path / "f").iterdir())) == 5


def test_frames_that_are_there_are_not_mixed_with_others(tmp_path):
    write_video(f"{tmp_path}/f/", numbered(2), 8)
    with pytest.raises(UserError, match=r"00000\.png is there already: name another folder"):
        write_video(f"{tmp_path}/f/", numbered(1), 8)
    with pytest.raises(KeyboardInterrupt), video_writer(f"{tmp_path}/g/", 8) as write:
        write(numbered(2))
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_name_that_cannot_hold_the_video_is_a_user_error(tmp_path):
    for name, words in {"a.png": "holds one", "a.xyz": "must end in one of", "a": "must end in one of"}.items():
        with pytest.raises(UserError, match=words):
            write_video(tmp_path / name, numbered(5), 8)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        write_video(tmp_path / "a.gif", numbered(5), 8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    assert (tmp_path / "a.gif").read_bytes() == b"old"


def test_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_video(tmp_path / "file" / "a.mp4", numbered(5), 8)


def test_wrong_arrays_are_refused(tmp_path):
    for video in (numbered(5).astype(np.float32), numbered(5)[0], numbered(5)[:0]):
        with pytest.raises(ValueError, match="uint8"):
            write_video(tmp_path / "a.mp4", video, 8)


def test_sheet_shows_each_video_enlarged_without_blur(tmp_path):
    videos = [numbered(9, 32, 32), numbered(1, 16, 48), numbered(5, 400, 700)]
    sheet = contact_sheet(videos, ["a red circle", "ein grüner Kreis 圆", "long " * 60], columns=3, cell=96)
    colors = set(map(tuple, sheet.reshape(-1, 3)))
    for level in (20, 20 + 5 * 4, 20 + 5 * 8):  # first, middle and last frame of the first video
        area = (sheet == level).all(-1)
        assert (level,) * 3 in colors and area.sum() >= 96 * 96
    write_sheet(tmp_path / "s.png", videos, ["x", "y", "z"], columns=3)
    assert Image.open(tmp_path / "s.png").width >= 3 * 96
