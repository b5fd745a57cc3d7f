"""`sorax sample` in its modes: files say how they were made, one line says what cannot be, nothing is half-written."""

import json

import av
import numpy as np
import pytest
from PIL import Image
from video_files import numbered, write, write_sound

from data_pipelines.decode import decode, probe
from sorax import cli
from sorax.generate import Generator

FAST = ("--steps", "1", "--guidance", "1")


@pytest.fixture
def sample(tiny_run, tmp_path, monkeypatch):
    """Runs `sorax sample` in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: cli.main(["sample", "--run", tiny_run, *FAST, *map(str, argv)])


def refused(capsys, sample, *argv):
    """The one line of a command that must fail."""
    assert sample(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sorax: ") and "\n" not in error
    return error


def comment(path):
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"])


def test_an_image_becomes_a_video_that_says_how(sample, tmp_path, capsys):
    Image.fromarray(numbered(1, 60, 50)[0]).save("a.png")
    assert sample("--image", "a.png", "--prompt", "a red circle", "--prompt", "a blue one", "--seed", 7, "--out",
                  "x/v.mp4") == 0  # fmt: skip
    said = capsys.readouterr()
    assert "a.png has 50x60 pixels: it is scaled, and cut at its edges, to 32x32" in said.out and not said.err
    for k in range(2):
        facts = comment(f"x/v_{k}.mp4")
        assert facts["prompt"] == [("a red circle", "a blue one")[k]] and facts["seed"] == 7 + k
        assert facts["command"].startswith("sorax sample --run ") and "--image a.png" in facts["command"]
        assert (facts["frames"], facts["width"], facts["height"], facts["fps"]) == (5, 32, 32, 6.0)
        assert len(facts["checkpoint"]) == 16 and facts["sampling"]["num_steps"] == 1
        info = probe(f"x/v_{k}.mp4")
        assert (info.num_frames, info.height, info.width) == (5, 32, 32)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["v_0.mp4", "v_1.mp4"]


def test_a_clip_goes_on_in_windows_and_frames_come_out_as_files(sample, tmp_path, capsys):
    write(tmp_path / "a.mp4", numbered(6, 32, 32), fps=6)
    assert sample("--video", "a.mp4", "--extend", "forward", "--seconds", "1", "--window", "5", "--out", "f/") == 0
    assert "the first frame is left out" in capsys.readouterr().out
    files = sorted((tmp_path / "f").iterdir())
    assert [file.name for file in files] == [f"{k:05}.png" for k in range(5 + 6)]
    with Image.open(files[-1]) as image:
        assert json.loads(image.text["Comment"])["frames"] == 11
    assert "00000.png is there already" in refused(capsys, sample, "--prompt", "x", "--out", "f/")


def test_what_the_run_was_not_trained_for_is_warned_of(sample, tmp_path, capsys):
    Image.fromarray(numbered(1, 32, 32)[0]).save("a.png")
    assert sample("--keyframe", "0.4s:a.png", "--prompt", "x", "--out", "k.gif") == 0
    said = capsys.readouterr()
    assert said.err.count("warning: the checkpoint was not trained for this mode: it needs keyframes") == 1
    assert "is shown in frames 1 to 2" in said.out
    with Image.open("k.gif") as image:
        assert json.loads(image.info["comment"])["prompt"] == ["x"]


def test_noise_that_rises_is_warned_of_where_it_was_not_trained(sample, capsys):
    assert sample("--prompt", "x", "--steps", "2", "--rising", "0.5", "--out", "r.gif") == 0
    assert capsys.readouterr().err.count("warning: the checkpoint was not trained with noise that rises") == 1
    assert comment_of_gif("r.gif")["sampling"]["rising"] == 0.5


def comment_of_gif(path):
    with Image.open(path) as image:
        return json.loads(image.info["comment"])


def test_scenes_are_cut_and_masks_are_rounded_and_named(sample, tmp_path, capsys):
    shots = ["--shot", "0:a red circle", "--shot", "1s:a blue one"]
    assert sample(*shots, "--cut", "--frames", "11", "--out", "s_%02d.png") == 0
    assert len(list(tmp_path.glob("s_*.png"))) == 5 + 5  # each of 2n + 1 frames
    write(tmp_path / "a.mp4", numbered(5, 32, 32), fps=6)
    Image.fromarray(np.uint8(np.pad([[255]], ((0, 31), (0, 31))))).save("m.png")
    assert sample("--video", "a.mp4", "--mask", "m.png", "--prompt", "x", "--out", "m.mp4") == 0
    assert "0.1 % of the video is masked, 25.0 % is made anew" in capsys.readouterr().out
    made, copy = (decode(name, 5, 32, 32, 6.0).astype(int) for name in ("m.mp4", "a.mp4"))
    assert np.abs(made - copy)[:, 24:, 24:].mean() < np.abs(made - copy)[:, :12, :12].mean()


def test_what_cannot_be_is_one_line_that_says_why(sample, tmp_path, capsys):
    write(tmp_path / "a.mp4", numbered(5, 32, 32), fps=6)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    write_sound(tmp_path / "sound.mp4")
    Image.new("L", (16, 16)).save("small.png")
    Image.new("L", (32, 32)).save("black.png")
    for message, *argv in (
        ("nothing to show",), ("add --expand", "--prompt", "x", "--pin", "p.json"),
        ("say the same twice", "--prompt", "x", "--frames", 5, "--seconds", 1),
        ("'bad.png' cannot be used", "--image", "bad.png"),
        ("holds no video stream", "--video", "sound.mp4", "--extend", "forward"),
        ("--seconds is -1", "--prompt", "x", "--seconds", -1),
        ("16x16 pixels, the video 32x32", "--video", "a.mp4", "--mask", "small.png"),
        ("black everywhere", "--video", "a.mp4", "--mask", "black.png"),
        ("for a file a frame", "--prompt", "x", "--out", "x.png"),
        ("is not LO:HI", "--prompt", "x", "--guidance-interval", "0.5"),
        ("give one of them", "--prompt", "x", "--shot", "0:y"), ("--cut makes each", "--prompt", "x", "--cut"),
        ("write for example data=2", "--prompt", "x", "--mesh", "rows=2"),
        ("several pictures for one frame", "--image", "a.mp4", "--keyframe", "0:a.mp4"),
    ):  # fmt: skip
        assert message in refused(capsys, sample, *argv)
    assert not list(tmp_path.glob("sample*"))


def test_an_interrupted_run_leaves_no_half_file(sample, tmp_path, capsys, monkeypatch):
    whole, calls = Generator.latents, []

    def interrupted(self, *arguments, **settings):
        calls.append(0)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return whole(self, *arguments, **settings)

    monkeypatch.setattr(Generator, "latents", interrupted)
    for out in ("x.mp4", "x.gif", "f/"):
        calls.clear()
        assert sample("--prompt", "x", "--frames", 9, "--window", 5, "--out", out) == 130
    assert list(tmp_path.iterdir()) == []
