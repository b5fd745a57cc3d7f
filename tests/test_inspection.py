"""What one pass over a file finds: what decoding it gives, the reason against it, nothing beyond the limits."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from video_files import make_bad, numbered, write

from data_pipelines.decode import MAX_PIXELS, DecodeError, decode, probe
from data_pipelines.inspection import Limits, MeasureFile, MeasureSample, inspect, reason_kind


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "avi"])
def test_frames_size_rate_and_length_are_found(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", numbered(33), fps=30)
    info = inspect(path)
    assert (info.num_frames, info.height, info.width, info.rotation, info.reason) == (33, 48, 64, 0, "")
    assert info.fps == pytest.approx(30.0, abs=1e-6)
    assert info.span == pytest.approx(32 / 30, abs=2e-3) and info.duration == pytest.approx(33 / 30, abs=2e-3)
    assert info.codec == dict(mp4="h264", mov="h264", webm="vp8", avi="mpeg4")[suffix] and info.container


def test_what_passes_decodes_to_its_last_frame(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(9), times_ms=[0, 250, 300, 350, 1500, 1600, 1610, 2000, 2750])
    info = inspect(path)
    num_frames = int(info.span * 8) + 1
    assert len(decode(path, num_frames, 48, 64, 8.0)) == num_frames
    with pytest.raises(DecodeError, match="ends at"):
        decode(path, num_frames + 8, 48, 64, 8.0)


def test_an_image_is_one_frame(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned a quarter clockwise
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.jpg", exif=exif)
    info = inspect(tmp_path / "a.jpg")
    assert info.is_image and (info.num_frames, info.height, info.width) == (1, 64, 48)
    assert (info.codec, info.duration, info.span) == ("jpeg", 0.0, 0.0)


def test_a_file_in_memory_is_read_like_one_on_disk(tmp_path):
    write(tmp_path / "a.mp4", numbered(9))
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.png")
    for name in ("a.mp4", "a.png"):
        data = io.BytesIO((tmp_path / name).read_bytes())
        assert inspect(data) == inspect(tmp_path / name)
        copy = decode(data, 1, 48, 64, 8.0)
        np.testing.assert_array_equal(copy, decode(tmp_path / name, 1, 48, 64, 8.0))
    assert inspect(io.BytesIO()).reason == "empty file (zero bytes)"
    assert inspect(io.BytesIO(b"text")).reason.startswith("not a video")


def test_no_further_than_the_limits(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(200, 16, 16), fps=10)
    assert inspect(path, Limits(max_frames=33)).num_frames == 33
    info = inspect(path, Limits(max_seconds=2.0))
    assert (info.num_frames, info.reason) == (21, "") and info.span == pytest.approx(2.0)
    assert info.duration == pytest.approx(20.0)  # what the header says of the rest
    assert inspect(path, Limits(max_seconds=None)).num_frames == 200


def test_damage_beyond_the_limits_does_not_matter(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    path = write(tmp_path / "a.mp4", noise)
    data = bytearray(path.read_bytes())
    data[int(0.8 * len(data)) : int(0.9 * len(data))] = bytes(int(0.9 * len(data)) - int(0.8 * len(data)))
    path.write_bytes(data)
    whole = inspect(path)
    assert whole.reason.startswith("corrupt: invalid data after") and 20 <= whole.num_frames < 40
    assert inspect(path, Limits(max_seconds=2.0)).reason == ""


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("truncated mp4", r"^truncated: \d+ of 40 frames"),
        ("truncated webm", r"^truncated: 2\.\d of 5\.0 s"),
        ("garbage inside", r"^corrupt: invalid data after \d+ frames"),
        ("garbage header", "^not a video"),
        ("zero bytes", "zero bytes"),
        ("text", "^not a video"),
        ("playlist", "^not a video"),
        ("list of files", "^not a video"),
        ("pipe", "not a regular file"),
        ("missing", "no such file"),
        ("cut image", "truncated|corrupt"),
    ],
)
def test_a_bad_file_gives_its_reason_and_never_raises(tmp_path, kind, reason):
    info = inspect(make_bad(tmp_path, kind))
    assert re.search(reason, info.reason), info.reason
    assert str(tmp_path) not in info.reason and "\n" not in info.reason
    assert info.is_image == (kind == "cut image")
    if kind == "garbage inside":  # what was good before is told
        assert info.num_frames > 0 and info.span > 0 and (info.height, info.width) == (48, 64)


def test_pixels_and_time_are_bounded(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(9))
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.png")
    for file in (path, tmp_path / "a.png"):
        assert inspect(file, Limits(max_pixels=1000)).reason == "too large: 64x48 is over the limit of 1000 pixels"
    assert inspect(path, Limits(time_limit=0)).reason.startswith("too slow: ")


def test_a_header_that_claims_a_huge_picture_takes_no_memory(tmp_path):
    # PNG: the size stands in the first chunk, whose checksum is not looked at before the size is.
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    (tmp_path / "a.png").write_bytes(data)
    assert MAX_PIXELS < 100_000**2
    reason = inspect(tmp_path / "a.png").reason
    assert reason_kind(reason) in ("too large", "cannot be decoded", "not an image, or corrupt")


def test_the_quick_look_agrees_with_the_thorough_one(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(40), fps=10)
    assert probe(path) == inspect(path)


def test_a_file_is_hashed_with_what_it_holds(tmp_path):
    write(tmp_path / "a.mp4", numbered(5))
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    write(tmp_path / "c.mp4", numbered(6))
    measure = MeasureFile(tmp_path, Limits())
    (a, hash_a), (b, hash_b), (_, hash_c) = (measure(f"{name}.mp4") for name in "abc")
    assert a == b and hash_a == hash_b != hash_c and len(hash_a) == 64
    assert measure("gone.mp4")[0].reason == "no such file" and measure("gone.mp4")[1] == ""


def test_a_sample_that_breaks_its_promise_is_told():
    class Liar:
        def spec(self, index):
            from data_pipelines.sources import SampleSpec

            return SampleSpec(5, 16, 16, 8.0, "", "")

        def __getitem__(self, index):
            return dict(video=np.zeros((4, 16, 16, 3), np.uint8))

    info, digest = MeasureSample(Liar())(0)
    assert info.reason == "not what was promised: uint8 [4, 16, 16, 3]" and digest == ""


def test_what_workers_import_is_light():
    code = "import data_pipelines.inspection, data_pipelines.workers, sys; " \
           "print([m for m in ('jax', 'pyarrow', 'grain', 'tensorflow_datasets') if m in sys.modules])"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
