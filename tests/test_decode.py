"""What files decode to, and what bad files say."""

import av
import numpy as np
import pytest
from PIL import Image
from video_files import COLORS, make_bad, numbered, numbers, write

from data_pipelines.decode import DecodeError, decode, probe
from data_pipelines.fit import frames_at


def quadrants(height, width):
    """A picture whose corners have four colours, to see which way up it is."""
    picture = np.zeros((height, width, 3), np.uint8)
    for i, rows in enumerate((slice(None, height // 2), slice(height // 2, None))):
        for j, columns in enumerate((slice(None, width // 2), slice(width // 2, None))):
            picture[rows, columns] = COLORS[2 * i + j]
    return picture


def corners(picture):
    """Indices into COLORS of the four corners, row by row."""
    h, w = picture.shape[0] // 4, picture.shape[1] // 4
    found = (picture[y, x].astype(int) for y in (h, -h) for x in (w, -w))
    return [int(np.abs(np.array(COLORS) - c).sum(-1).argmin()) for c in found]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "avi"])
def test_frames_come_back_in_order_at_the_native_rate(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", numbered(33), fps=30)
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (33, 48, 64, 30.0)
    assert numbers(decode(path, 33, 48, 64, 30.0)) == list(range(33))


@pytest.mark.parametrize("suffix", ["mp4", "webm"])  # exact timestamps, and timestamps in whole milliseconds
def test_rate_is_resampled_by_time(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", numbered(33), fps=30)
    assert frames_at(probe(path).span, 8) == 9
    assert numbers(decode(path, 9, 48, 64, 8.0)) == [0, 4, 7, 11, 15, 19, 22, 26, 30]
    assert numbers(decode(path, 6, 48, 64, 60.0)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_variable_rate_shows_the_frame_on_screen_at_each_time(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", numbered(5), times_ms=[0, 250, 500, 1500, 2000])
    assert numbers(decode(path, 9, 48, 64, 4.0)) == [0, 1, 2, 2, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi"])
def test_start_skips_to_a_time(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", numbered(40), fps=10)
    assert numbers(decode(path, 5, 48, 64, 10.0, start=2.3)) == [23, 24, 25, 26, 27]


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_flag_is_honoured(tmp_path, turn):
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV reads rotation flags but cannot write them")
    picture = quadrants(48, 80)
    path = write(tmp_path / "a.mp4", np.stack([picture] * 2), rotation=turn)
    upright = np.rot90(picture, turn // 90)  # the flag counts counter-clockwise
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (*upright.shape[:2], turn)
    video = decode(path, 1, info.height, info.width, 8.0)
    assert video.shape == (1, *upright.shape)
    assert corners(video[0]) == corners(upright)


def test_image_is_one_frame_turned_upright_by_its_exif_flag(tmp_path):
    picture, exif = quadrants(48, 80), Image.Exif()
    exif[0x112] = 6  # to be turned a quarter clockwise
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "a.jpg")
    assert info.is_image and (info.num_frames, info.height, info.width) == (1, 80, 48)
    assert corners(decode(tmp_path / "a.jpg", 1, 80, 48, 8.0)[0]) == corners(np.rot90(picture, -1))


def test_transparent_image_lies_on_white(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", 1, 32, 32, 1.0) == 255).all()


def test_wide_pixels_make_a_wide_picture(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(2), aspect=2)
    assert (probe(path).height, probe(path).width) == (48, 128)


def test_scaling_down_averages_areas(tmp_path):
    # One-pixel stripes: picking pixels would give black or white, averaging gives grey.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    small = decode(tmp_path / "a.png", 1, 16, 16, 1.0)
    assert np.abs(small.astype(int) - 127).max() <= 2  # swscale rounds in fixed point


def test_colours_survive_the_codec(tmp_path):
    picture = quadrants(64, 64)
    path = write(tmp_path / "a.mp4", np.stack([picture] * 3), pixel_format="yuv444p")
    error = decode(path, 1, 64, 64, 8.0)[0].astype(float) - picture
    assert np.abs(error).mean() < 4  # a swapped channel or a wrong range costs 15 and more


def test_probe_reads_no_further_than_asked(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(200, 16, 16), fps=10)
    assert probe(path, max_frames=33).num_frames == 33
    assert probe(path, max_seconds=2).span == pytest.approx(2.0)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("truncated mp4", r"truncated: \d+ of 40 frames"),
        ("truncated webm", r"truncated: 2\.\d of 5\.0 s"),
        ("garbage inside", "corrupt"),
        ("garbage header", "not a video"),
        ("zero bytes", "zero bytes"),
        ("text", "not a video"),
        ("playlist", "not a video"),
        ("list of files", "not a video"),
        ("pipe", "not a regular file"),
        ("missing", "no such file"),
        ("cut image", "truncated|corrupt"),
    ],
)
def test_bad_file_gives_its_reason(tmp_path, kind, reason):
    bad = make_bad(tmp_path, kind)
    with pytest.raises(DecodeError, match=reason) as error:
        probe(bad)
        decode(bad, 33, 48, 64, 8.0)
    assert str(tmp_path) not in error.value.reason and "\n" not in error.value.reason


def test_asking_beyond_the_end_is_an_error(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(9))
    with pytest.raises(DecodeError, match=r"ends at 1\.00 s: 10 of 17 frames"):
        decode(path, 17, 48, 64, 8.0)


def test_pixels_and_time_are_bounded(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(9))
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.png")
    for file in (path, tmp_path / "a.png"):
        with pytest.raises(DecodeError, match="64x48 is over the limit of 1000 pixels"):
            probe(file, max_pixels=1000)
    with pytest.raises(DecodeError, match="longer than 0 s"):
        decode(path, 9, 48, 64, 8.0, time_limit=0)
