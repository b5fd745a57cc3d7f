"""Captions written anew: the same data comes out, nothing is asked twice, and what is out is trained on."""

import json
import os

import numpy as np
import pytest
from fake_endpoint import CAPTIONS, completion, serving
from PIL import Image
from video_files import numbered, write

from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.rows import PixelExamples, RowSource
from data_pipelines.sources import open_source
from sorax import cli

NAMES = ("a.mp4", "inner/b.mp4", "c.mp4", "d.png")


@pytest.fixture
def folder(tmp_path):
    """Videos of which two have captions, one none, and one file is broken."""
    raw = tmp_path / "raw"
    (raw / "inner").mkdir(parents=True)
    for k, name in enumerate(NAMES[:3]):
        write(raw / name, numbered(5 + k))
    Image.fromarray(numbered(1)[0]).save(raw / "d.png")
    (raw / "broken.mp4").write_bytes(b"not a video")
    lines = [dict(file="a.mp4", caption="my own words"), dict(file="broken.mp4", caption="x"),
             dict(file="inner/b.mp4", caption="b", caption_original="old b")]  # fmt: skip
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return raw


def by_video(request):
    """An answer that tells how bright the first frame is: another one for every video."""
    url = request["messages"][1]["content"][1]["image_url"]["url"]
    return completion(json.dumps(dict(short=f"short {hash(url) % 1000}", detailed=f"Detailed {hash(url) % 1000}.")))


def caption(server, raw, out, *more):
    return cli.main(["caption", "--data", str(raw), "--out", str(out), "--endpoint", server.url, "--model", "m",
                     "--tries", "2", *more])  # fmt: skip


def lines_of(out):
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return {row.get("file") or row["key"]: row for row in rows}


def test_a_folder_comes_out_as_it_was_with_both_captions_and_the_old_one(folder, tmp_path, capsys):
    out = tmp_path / "out"
    with serving(then=completion(json.dumps(CAPTIONS))) as server:
        assert caption(server, folder, out) == 0
    lines = lines_of(out)
    assert sorted(lines) == sorted(NAMES)
    assert {name: row["caption_original"] for name, row in lines.items()} == {
        "a.mp4": "my own words", "inner/b.mp4": "old b", "c.mp4": "", "d.png": ""}  # fmt: skip
    for name, row in lines.items():
        assert row["caption"] == CAPTIONS["detailed"] and row["captions"] == CAPTIONS
        assert os.path.samefile(out / name, folder / name)  # a link: no copy
    assert "4 of 4 videos captioned, 0 failed" in capsys.readouterr().out
    assert json.loads((out / "captions.json").read_text())["rejected"][0][0] == "broken.mp4"
    before = (folder / "metadata.jsonl").read_text()
    assert "my own words" in before

    source = FolderSource(out, fit=Fit(max_tokens=100), processes=0)
    assert len(source) == 4 and source.caption_kinds == ("detailed", "original", "short")
    assert source.captions(0) == CAPTIONS | dict(original="my own words")
    letters = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)  # noqa: E731
    rows = RowSource(PixelExamples(source, letters), row_tokens=200, row_text=400, batch_size=1, seed=0,
                     patch_size=(1, 16, 16), mix={"detailed": 0.9, "original": 0.1})  # fmt: skip
    assert rows[0]["segment_ids"].max() >= 1


def test_a_run_that_is_stopped_goes_on_and_repeats_no_call(folder, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", []
    with serving(then=by_video) as server:

        def stop(request):
            raise ConnectionError  # the server hangs up

        server.script = [by_video, by_video, stop, stop, stop, stop]
        assert caption(server, folder, out, "--concurrency", "1", "--timeout", "5") == 0
        asked = list(server.requests)
        failed = json.loads((out / "captions.json").read_text())["failed"]
        assert len(failed) == 2 and lines_of(out)[sorted(failed)[0]]["captions"] == {}
        assert caption(server, folder, out) == 0
        again = server.requests[len(asked) :]
        assert len(again) == 2 and not json.loads((out / "captions.json").read_text())["failed"]
        assert caption(server, folder, out) == 0
        assert len(server.requests) == len(asked) + 2
        # Without the record of what is done, the answers are still there.
        for path in (out / ".captions").glob("done-*"):
            path.unlink()
        assert caption(server, folder, out) == 0
        assert len(server.requests) == len(asked) + 2


def test_other_settings_are_not_gone_on_with_once_something_is_done(folder, tmp_path, capsys):
    out = tmp_path / "out"
    with serving(then=by_video) as server:
        server.script = [(404, b"no such model", {})]
        assert caption(server, folder, out, "--model", "mistyped", "--concurrency", "1") == 2
        assert caption(server, folder, out) == 0  # nothing was there yet
        asked = len(server.requests)
        for more, words in ((["--data.fps=2"], "data.fps: 8.0 there, 2.0 here"),
                            (["--temperature", "1.5"], "temperature: 0.0 there, 1.5 here")):  # fmt: skip
            assert caption(server, folder, out, *more) == 2
            assert words in capsys.readouterr().err
        assert len(server.requests) == asked


def test_shares_make_the_whole_and_the_last_writes_it(folder, tmp_path, capsys):
    with serving(then=by_video) as server:
        assert caption(server, folder, tmp_path / "whole") == 0
        assert caption(server, folder, tmp_path / "parts", "--shard", "1/2") == 0
        assert not (tmp_path / "parts" / "metadata.jsonl").exists()
        assert caption(server, folder, tmp_path / "parts", "--shard", "0/2") == 0
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")


def test_a_record_that_breaks_off_is_done_again(folder, tmp_path):
    with serving(then=by_video) as server:
        assert caption(server, folder, tmp_path / "out") == 0
        whole, path = lines_of(tmp_path / "out"), next((tmp_path / "out" / ".captions").glob("done-*"))
        path.write_text(path.read_text()[:-30])  # killed in the middle of a line
        assert caption(server, folder, tmp_path / "out") == 0
    assert lines_of(tmp_path / "out") == whole


@pytest.mark.parametrize("more, words", [
    (["--shard", "2/2"], "is no share"), (["--data.fpss=3"], "did you mean"), (["--model", ""], "no model"),
    (["--frames", "0"], "show nothing"), (["--run", "x"], "and not both"),
        (["--caption", "nonsense"], "short, detailed"),
])  # fmt: skip
def test_what_cannot_be_meant_is_said(folder, tmp_path, capsys, more, words):
    with serving() as server:
        assert caption(server, folder, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err


def test_captions_of_another_model_are_not_mixed_in(folder, tmp_path, capsys):
    with serving(then=by_video) as server:
        assert caption(server, folder, tmp_path / "out") == 0
        assert caption(server, folder, tmp_path / "out", "--model", "other") == 2
        assert "writer: endpoint model m there, endpoint model other here" in capsys.readouterr().err
        assert caption(server, folder, folder) == 2 and caption(server, folder, tmp_path) == 2


def test_a_server_that_is_down_stops_the_run_and_says_why(folder, tmp_path, capsys):
    with serving(then=(500, "the model is gone", {})) as server:
        assert caption(server, folder, tmp_path / "out", "--tries", "1") == 2
    assert "the first 4 samples failed" in (said := capsys.readouterr().err) and "the model is gone" in said


def test_the_world_comes_out_as_captions_for_it(tmp_path):
    out = tmp_path / "out"
    with serving(then=by_video) as server:
        more = ("--data.world.num_samples=3", "--data.world.shapes=((1,32,32),)")
        assert caption(server, "world", out, *more) == 0
    source = open_source(dict(path=f"captions:{out}"))
    assert len(source) == 3 and source.spec(0).caption.startswith("Detailed ")
    assert set(source.captions(1)) == {"short", "detailed", "original"}


def test_clips_are_captioned_as_they_are_curated(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    moving = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    for k in (1, 2):
        write(raw / f"{k}.mp4", np.roll(moving, k, axis=2))
    (raw / "metadata.jsonl").write_text(json.dumps(dict(file="1.mp4", caption="noise")))
    arguments = ["data", "curate", "--path", str(raw), "--out", str(out), "--processes", "1", "--duplicate-bits", "0"]
    with serving(then=by_video) as server:
        assert cli.main([*arguments, "--endpoint", server.url, "--model", "m"]) == 0
    lines = lines_of(out)
    assert len(lines) == len(server.requests) == 2
    assert {row["caption_original"] for row in lines.values()} == {"noise", ""}
    assert all(row["caption"] == row["captions"]["detailed"] != "" for row in lines.values())
