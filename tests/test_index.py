"""The index: one row a sample, the same however often it was interrupted, and only what changed is measured again."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from video_files import COLORS, damaged, numbered, write
from worker_functions import Misbehave

from data_pipelines import inspection
from data_pipelines.index import COLUMNS, FolderRecords, Index, SourceRecords, build_index
from data_pipelines.inspection import Limits
from data_pipelines.world import World, WorldConfig
from sorax import cli
from sorax.errors import UserError


def caption(folder, *names, text="words"):
    for name in names:
        (folder / name).with_suffix(".txt").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """Six good files, one that is cut, one that is text, one without a caption."""
    path = tmp_path / "clips"
    path.mkdir()
    for k in range(5):
        write(path / f"{k}.mp4", numbered(9 + k, 48, 64), fps=8)
    Image.fromarray(numbered(1, 50, 70)[0]).save(path / "photo.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    damaged(write(tmp_path / "whole.mp4", noise), path / "cut.mp4", keep=0.5)
    (path / "text.mp4").write_text("this is no video\n" * 20)
    write(path / "silent.mp4", numbered(9))
    caption(path, *(f"{k}.mp4" for k in range(5)), "photo.png", "cut.mp4", "text.mp4")
    return path


@pytest.fixture
def measured(monkeypatch):
    """Names of the files that are measured (in this process)."""
    names, measure = [], inspection.MeasureFile.__call__

    def spy(self, key):
        names.append(key)
        return measure(self, key)

    monkeypatch.setattr(inspection.MeasureFile, "__call__", spy)
    return names


def build(folder, out=None, **options):
    return build_index(folder, out, **(dict(processes=0) | options))


def test_a_row_says_what_a_file_holds(folder):
    index = build(folder)
    rows = {row["key"]: row for row in index.table.to_pylist()}
    assert list(rows) == sorted(rows) and index.table.schema == COLUMNS
    path = folder / "2.mp4"
    assert rows["2.mp4"] == dict(
        key="2.mp4", kind="video", num_frames=11, height=48, width=64, fps=8.0, rotation=0, duration=11 / 8,
        span=10 / 8, codec="h264", container="mov,mp4,m4a,3gp,3g2,mj2", bytes=path.stat().st_size,
        mtime_ns=path.stat().st_mtime_ns,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(), caption="words", caption_length=5, reason="",
    )  # fmt: skip
    assert (rows["photo.png"]["kind"], rows["photo.png"]["num_frames"]) == ("image", 1)
    assert rows["cut.mp4"]["reason"].startswith("truncated: ") and rows["text.mp4"]["reason"].startswith("not a video")
    assert rows["silent.mp4"] | dict(bytes=0, mtime_ns=0) == dict.fromkeys(COLUMNS.names, 0) | dict(
        key="silent.mp4", kind="", codec="", container="", sha256="", caption="", reason="no caption: no .txt beside it"
    )


def test_every_sample_is_counted_once(folder):
    index = build(folder)
    assert len(index) == len(index.usable) + sum(index.rejected().values()) == 9
    assert index.rejected() == {"no caption": 1, "not a video, or corrupt (invalid data)": 1, "truncated": 1}
    assert [index.columns["key"][i] for i in index.usable] == [*(f"{k}.mp4" for k in range(5)), "photo.png"]
    assert {name: len(column) for name, column in index.columns.items()} == dict.fromkeys(COLUMNS.names, 9)
    assert index.info(1).num_frames == 10 and not index.info(1).is_image


def test_a_turned_video_is_upright(tmp_path):
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:, 40:] = COLORS[0]
    write(tmp_path / "a.mp4", np.stack([picture] * 2), rotation=90)
    caption(tmp_path, "a.mp4")
    (row,) = build(tmp_path).table.to_pylist()
    assert (row["height"], row["width"], row["rotation"]) == (80, 48, 90)


def test_workers_measure_what_this_process_measures(folder, tmp_path):
    assert build(folder, tmp_path / "a", processes=2).table.equals(build(folder, tmp_path / "b").table)


def test_what_is_loaded_is_what_was_made(folder, tmp_path):
    made = build(folder, tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    assert loaded.table.equals(made.table) and loaded.settings == made.settings and loaded.identity == made.identity
    settings = json.loads((tmp_path / "index" / "settings.json").read_text())
    assert (settings["rows"], settings["usable"]) == (9, 6) and settings["limits"]["max_seconds"] == 60.0
    assert sorted(os.listdir(tmp_path / "index")) == ["index.parquet", "lock", "settings.json"]


KILLED = """
import os, signal, sys
from data_pipelines import index
index._PART_ROWS = 1  # a file a part
def progress(done, total):
    if done == 3:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
index.build_index(sys.argv[1], sys.argv[2], processes=0, progress=progress)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_run_goes_on_and_ends_with_the_same_table(folder, tmp_path, measured, how):
    out, reference = tmp_path / "index", tmp_path / "reference"
    build(folder, reference)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out), how], stderr=subprocess.DEVNULL,
                          cwd=os.path.dirname(os.path.dirname(__file__)))  # fmt: skip
    assert done.returncode != 0 and not (out / "index.parquet").exists()
    with pytest.raises(UserError, match="was begun there but not finished"):
        Index.load(out)
    measured.clear()
    build(folder, out)
    assert len(measured) == 8 - 3
    for name in ("index.parquet", "settings.json"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()
    assert not (out / "parts").exists()


def test_an_interrupt_loses_nothing_that_was_done(folder, tmp_path, measured):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "index", progress=interrupt)
    build(folder, tmp_path / "index")
    assert sorted(measured) == sorted(set(measured))


def test_a_second_run_measures_nothing_and_writes_nothing(folder, tmp_path, measured):
    first = build(folder, tmp_path / "index")
    times = {name: os.stat(tmp_path / "index" / name).st_mtime_ns for name in ("index.parquet", "settings.json")}
    measured.clear()
    assert build(folder, tmp_path / "index").table.equals(first.table) and not measured
    assert times == {name: os.stat(tmp_path / "index" / name).st_mtime_ns for name in times}


def test_only_what_has_changed_is_measured_again(folder, tmp_path, measured):
    out = tmp_path / "index"
    before = build(folder, out)
    write(folder / "1.mp4", numbered(20, 48, 64), fps=8)  # other bytes
    os.utime(folder / "3.mp4", ns=(1, 1))  # another time
    caption(folder, "0.mp4", text="other words")  # read anew in any case
    caption(folder, "silent.mp4")  # was not opened before
    (folder / "2.mp4").unlink()
    write(folder / "new.mp4", numbered(9))
    caption(folder, "new.mp4")
    measured.clear()
    after = build(folder, out)
    assert measured == ["1.mp4", "3.mp4", "new.mp4", "silent.mp4"]
    assert after.table.equals(build(folder).table) and after.identity != before.identity
    assert [row["num_frames"] for row in after.table.to_pylist() if row["key"] == "1.mp4"] == [20]
    # What was broken in between is whole again.
    write(folder / "1.mp4", numbered(10, 48, 64), fps=8)
    assert build(folder, out).info(1).num_frames == 10


def test_identity_is_of_the_samples_not_of_their_files(folder, tmp_path):
    first = build(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = build(tmp_path / "copy")
    assert copy.identity == first.identity and not copy.table.equals(first.table)
    caption(tmp_path / "copy", "0.mp4", text="other words")
    assert build(tmp_path / "copy").identity != first.identity


def test_other_limits_or_another_folder_start_anew(folder, tmp_path, measured):
    out = tmp_path / "index"
    build(folder, out)
    measured.clear()
    assert build(folder, out, limits=Limits(max_seconds=0.5)).info(0).num_frames == 5
    assert len(measured) == 8
    shutil.copytree(folder, tmp_path / "copy")
    build(tmp_path / "copy", out)
    assert len(measured) == 8 + 8


class Misbehaving(FolderRecords):
    def measurer(self):
        return Misbehave(self.folder, self.limits)


def test_files_that_hang_or_kill_their_worker_cost_themselves_only(tmp_path):
    good = write(tmp_path / "good.mp4", numbered(9))
    names = ["a.mp4", f"signal {signal.SIGSEGV.value}.mp4", "b.mp4", "hang 60.mp4", "c.mp4", "exit 7.mp4",
             f"allocate {1 << 33}.mp4"]  # fmt: skip
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in names:
        shutil.copyfile(good, folder / name)
        caption(folder, name)
    limits = Limits(time_limit=1.0, memory=1 << 30)
    index = build_index(Misbehaving(folder, limits), tmp_path / "index", limits=limits, processes=2)
    reasons = dict(zip(index.columns["key"], index.columns["reason"]))
    assert {name: reasons[name] for name in reasons if reasons[name]} == {
        "signal 11.mp4": "worker died: signal 11", "hang 60.mp4": "too slow: stopped after 3 s",
        "exit 7.mp4": "worker died: exit code 7",
        names[-1]: "out of memory: it needs more than a worker may take",
    }  # fmt: skip
    assert index.rejected() == {"worker died": 2, "out of memory": 1, "too slow": 1} and len(index.usable) == 3
    assert set(index.columns["kind"]) == {"video"}


def test_any_source_is_indexed_in_its_own_order():
    world = World(WorldConfig(num_samples=12, shapes=((5, 32, 48), (1, 16, 24))))
    index = build(SourceRecords(world, "world", dict(seed=0)))
    specs = [world.spec(i) for i in range(12)]
    columns = index.columns
    for name in ("num_frames", "height", "width", "fps", "caption", "key"):
        assert list(columns[name]) == [getattr(spec, name) for spec in specs]
    assert set(zip(columns["kind"], columns["num_frames"])) == {("video", 5), ("image", 1)}
    same = build(SourceRecords(World(world.config), "world"))
    assert list(same.columns["sha256"]) == list(columns["sha256"]) and len(set(columns["sha256"])) == 12
    other = build(SourceRecords(World(WorldConfig(num_samples=12, seed=1)), "world"))
    assert not set(other.columns["sha256"]) & set(columns["sha256"])


def test_two_runs_at_once_take_turns(folder, tmp_path, measured):
    made = [None] * 3

    def work(k):
        made[k] = build(folder, tmp_path / "index")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 8 and all(index.table.equals(made[0].table) for index in made)


def test_what_is_no_index_is_told(folder, tmp_path):
    with pytest.raises(UserError, match=r"no index is there; make it with `sorax data index"):
        Index.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds something else than an index"):
        build(folder, tmp_path / "other")
    with pytest.raises(UserError, match="is a file: name a folder"):
        build(folder, tmp_path / "other" / "thesis.tex")
    with pytest.raises(UserError, match=r"index /dev/null/x cannot be written \(Not a directory\): choose another"):
        build(folder, "/dev/null/x")
    out = tmp_path / "index"
    build(folder, out)
    (out / "settings.json").write_text(json.dumps(json.loads((out / "settings.json").read_text()) | dict(version=0)))
    with pytest.raises(UserError, match="another version of sorax"):
        Index.load(out)
    build(folder, out)
    (out / "index.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(UserError, match="cannot be read"):
        Index.load(out)
    assert build(folder, out).table.equals(pq.read_table(out / "index.parquet"))  # made again


def test_the_command_makes_an_index_and_counts(folder, tmp_path, capsys):
    out = str(tmp_path / "index")
    assert cli.main(["data", "index", "--path", str(folder), "--out", out, "--processes", "1"]) == 0
    text = capsys.readouterr().out
    assert "9 samples, 6 usable, 3 rejected" in text and "1  truncated" in text and "index: 8/8 samples" in text
    assert len(Index.load(out)) == 9
    config = os.path.join(os.path.dirname(os.path.dirname(__file__)), "experiments", "quickstart.py")
    command = ["data", "index", "--path", "world", "--out", str(tmp_path / "world"), "--processes", "1"]
    assert cli.main([*command, "--config", config, "--config.data.world.num_samples=7"]) == 0
    assert "7 samples, 7 usable, 0 rejected" in capsys.readouterr().out
    assert cli.main(["data", "index", "--path", str(folder), "--out", str(tmp_path / "world")]) == 2
    assert "is the index of world, not of" in capsys.readouterr().err
    for wrong, words in {"--memory=0": "--memory is 0", "--config.data.fps=8": "name one with --config FILE"}.items():
        assert cli.main(["data", "index", "--path", str(folder), "--out", out, wrong]) == 2
        assert words in capsys.readouterr().err
