"""Curation of a folder: what is kept, what is dropped where, and that nothing is lost, doubled or overwritten."""

import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from curate_videos import panning, texture
from PIL import Image
from video_files import damaged, write

from data_pipelines import curate as curation
from data_pipelines import curate_clips
from data_pipelines.curate import curate
from data_pipelines.curate_records import COLUMNS
from data_pipelines.curate_settings import Settings
from data_pipelines.decode import DecodeError
from data_pipelines.sources import open_source
from sorax.cli import main
from sorax.errors import UserError

beam = pytest.importorskip("apache_beam", reason="curation needs sorax[curate]")
pytest.importorskip("scenedetect", reason="curation needs sorax[curate]")

SETTINGS = Settings(min_seconds=0.5, margin=0.0)
# Where every file, and every clip by its number, should end.
FILES = {
    "black.mp4": "trim", "broken.mp4": "probe", "cut.mp4": "", "dark.mp4": "", "half.mp4": "", "link.mp4": "probe",
    "nameless.mp4": "caption", "photo.png": "", "same.mp4": "", "static.mp4": "", "sub/whole.webm": "",
    "text.mp4": "probe",
}  # fmt: skip
CLIPS = {
    ("cut.mp4", 0): "", ("cut.mp4", 1): "", ("cut.mp4", 2): "length", ("dark.mp4", 0): "brightness",
    ("half.mp4", 0): "duplicate", ("photo.png", 0): "", ("same.mp4", 0): "duplicate", ("static.mp4", 0): "motion",
    ("sub/whole.webm", 0): "",
}  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "raw"
    (folder / "sub").mkdir(parents=True)
    whole = panning(2, 20)
    write(folder / "cut.mp4", np.concatenate([panning(0, 12), panning(1, 14), panning(3, 4)]), fps=12)
    write(folder / "sub" / "whole.webm", whole, fps=12)
    write(folder / "half.mp4", whole[:, ::2, ::2], fps=12)  # smaller, of another codec
    write(folder / "same.mp4", (whole * 0.9).astype(np.uint8), fps=24)  # darker, faster
    write(folder / "static.mp4", np.repeat(panning(4, 1), 12, 0), fps=12)
    write(folder / "dark.mp4", (panning(5, 12) * 0.12).astype(np.uint8), fps=12)
    write(folder / "black.mp4", 0 * panning(6, 12), fps=12)
    write(folder / "nameless.mp4", panning(7, 12), fps=12)
    damaged(write(folder.parent / "good.mp4", panning(8, 30)), folder / "broken.mp4", keep=0.5)
    (folder / "text.mp4").write_text("no video")
    (folder / "link.mp4").symlink_to(folder.parent / "good.mp4")
    Image.fromarray(texture(9, 60, 80)).save(folder / "photo.png")
    rows = [json.dumps(dict(file=f, caption=f"caption of {f}")) for f in FILES if f != "nameless.mp4"]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def curated(raw):
    out = raw.parent / "curated"
    return out, curate(raw, out, SETTINGS, processes=0)


def table(out):
    return pq.read_table(out / "curation.parquet").to_pylist()


def contents(out):
    """Everything in a folder but where the raw videos were."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    files["curation.json"] = json.loads(files["curation.json"]) | dict(raw="")
    return files


def test_every_file_and_every_clip_ends_in_one_place(curated):
    out, _ = curated
    rows = table(out)
    assert {r["file"]: r["stage"] for r in rows if r["kind"] == "file"} == FILES
    assert {(r["file"], r["clip"]): r["stage"] for r in rows if r["kind"] == "clip"} == CLIPS
    assert len(rows) == len(FILES) + len(CLIPS)
    assert all(bool(r["reason"]) == (r["status"] == "dropped") for r in rows)
    assert {r["path"] for r in rows if r["path"]} == {f"clips/{p.name}" for p in (out / "clips").iterdir()}
    assert {p.name for p in out.iterdir()} == {"clips", "metadata.jsonl", "curation.json", "curation.parquet"}
    reasons = {r["file"]: r["reason"] for r in rows if r["kind"] == "file"}
    assert reasons["link.mp4"] == "lies outside the folder" and reasons["broken.mp4"].startswith("truncated: ")
    assert reasons["nameless.mp4"] == "no caption: not listed in metadata.jsonl"


def test_a_duplicate_names_the_clip_that_was_kept(curated):
    rows = {r["file"]: r for r in table(curated[0]) if r["kind"] == "clip"}
    for file in ("half.mp4", "same.mp4"):
        assert rows[file]["duplicate_of"] == rows["sub/whole.webm"]["path"] and rows[file]["duplicate_bits"] <= 6


def test_counts_add_up_and_are_those_that_beam_counted(curated):
    out, summary = curated
    assert json.loads((out / "curation.json").read_text()) == {k: v for k, v in summary.items() if k != "counters"}
    counts = summary["counts"]
    for kind, rest in (("files", "cut"), ("clips", "kept")):
        dropped = {stage: sum(reasons.values()) for stage, reasons in counts[kind]["dropped"].items()}
        assert counts[kind][rest] + sum(dropped.values()) == counts[kind]["total"]
        counted = {name: n for name, n in summary["counters"].items() if name.startswith(kind)}
        by_stage = {f"{kind} dropped by {stage}": n for stage, n in dropped.items()}
        assert counted == {f"{kind} {rest}": counts[kind][rest]} | by_stage
    frames = counts["frames"]
    assert frames["kept"] + frames["dropped"] + sum(frames["trimmed"].values()) == frames["total"]
    assert frames["total"] == 30 + 20 + 20 + 20 + 12 + 12 + 12 + 1 and frames["trimmed"]["blank"] == 12
    assert counts["clips"]["copied"] == 2 and set(COLUMNS) == set(table(out)[0])


def test_the_folder_is_a_source_with_its_captions(curated):
    source = open_source(dict(path=str(curated[0]), max_tokens=10_000))
    samples = [source[i] for i in range(len(source))]
    kept = [file for (file, _), stage in CLIPS.items() if not stage]
    assert sorted(s["caption"] for s in samples) == sorted(f"caption of {file}" for file in kept)
    assert all(s["video"].shape[1:] == (96, 128, 3) for s in samples if "photo" not in s["caption"])


def test_results_do_not_depend_on_workers_runner_or_order(raw, curated, monkeypatch):
    out, chain = raw.parent / "again", curation._clips_and_records

    def shuffled(lines, context):
        def mix(lines):
            return random.Random(1).sample(sorted(lines), len(lines))

        return chain(lines | "all" >> beam.combiners.ToList() | beam.FlatMap(mix), context)

    monkeypatch.setattr(curation, "_clips_and_records", shuffled)
    monkeypatch.setattr(curation, "BATCH", 7)
    from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner

    curate(raw, out, SETTINGS, processes=2, runner=BundleBasedDirectRunner())
    assert contents(out) == contents(curated[0])


def test_an_interrupted_run_goes_on_and_a_full_disk_is_said(raw, curated, monkeypatch):
    out, done = raw.parent / "interrupted", []
    write_file = curation._write_file

    def until_full(job, context):
        done.append(job["file"])
        return write_file(job, context) if len(done) < 3 else dict(stop="No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        patch.setattr(curation, "_write_file", until_full)
        curate(raw, out, SETTINGS, processes=0)
    assert not (out / "metadata.jsonl").exists()
    with pytest.raises(UserError, match=r"unfinished curation with other settings \(min_motion\)"):
        curate(raw, out, Settings(min_seconds=0.5, margin=0.0, min_motion=0.5), processes=0)
    told = []
    monkeypatch.setattr(curation, "_scan_file", lambda job, context: pytest.fail(f"{job['file']} is scanned again"))
    curate(raw, out, SETTINGS, processes=0, tell=lambda *progress: told.append(progress))
    assert told == [("write", 1, len(FILES))]  # three files give clips; two were written before
    assert contents(out) == contents(curated[0])


def test_a_file_that_has_changed_is_looked_at_again(raw, tmp_path, monkeypatch):
    path = write(_folder(tmp_path) / "a.mp4", panning(0, 12), fps=12)
    (tmp_path / "raw" / "a.txt").write_text("one")
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(curation, "_write_file", lambda job, context: dict(stop="full"))
        curate(tmp_path / "raw", tmp_path / "out", SETTINGS, processes=0)
    write(path, panning(1, 18), fps=12)
    summary = curate(tmp_path / "raw", tmp_path / "out", SETTINGS, processes=0)
    assert summary["counts"]["frames"]["kept"] == 18


def test_a_file_that_breaks_its_worker_or_cannot_be_cut_costs_itself_alone(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        seeds = [ord(name[0]), ord(name[0]) + 100]
        write(_folder(tmp_path) / name, np.concatenate([panning(seed, 12) for seed in seeds]), fps=12)
        (tmp_path / "raw" / name).with_suffix(".txt").write_text("two scenes")
    scan_file, check = curation._scan_file, curate_clips._check

    def scan_or_break(job, context):
        if job["file"] == "b.mp4":
            raise MemoryError
        return scan_file(job, context)

    def lose_the_second(path, clip):
        check(path, clip)
        if "-c-" in path and clip["first"] == 12:
            raise DecodeError("was not written well")

    monkeypatch.setattr(curation, "_scan_file", scan_or_break)
    monkeypatch.setattr(curate_clips, "_check", lose_the_second)
    counts = curate(tmp_path / "raw", tmp_path / "out", SETTINGS, processes=0)["counts"]
    assert counts["files"]["dropped"] == {"probe": {"out of memory": 1}}
    assert counts["clips"]["kept"] == 2 and counts["clips"]["dropped"] == {"write": {"was not written well": 2}}
    listed = [json.loads(line)["file"] for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert sorted(f"clips/{p.name}" for p in (tmp_path / "out" / "clips").iterdir()) == listed


def _folder(tmp_path):
    (tmp_path / "raw").mkdir(exist_ok=True)
    return tmp_path / "raw"


def test_uncaptioned_files_are_kept_on_demand_and_counted(raw, tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / "raw" / name, panning(0, 12), fps=12)
    (tmp_path / "raw" / "b.txt").write_text("the same, with a caption")
    settings = Settings(min_seconds=0.5, allow_uncaptioned=True)
    summary = curate(tmp_path / "raw", tmp_path / "out", settings, processes=0)
    assert summary["counts"]["clips"]["kept"] == 1 and summary["counts"]["clips"]["uncaptioned"] == 0
    (tmp_path / "raw" / "b.txt").unlink()
    summary = curate(tmp_path / "raw", tmp_path / "bare", settings, processes=0)
    assert summary["counts"]["clips"]["uncaptioned"] == 1
    assert json.loads((tmp_path / "bare" / "metadata.jsonl").read_text())["caption"] == ""


def test_nothing_is_overwritten(raw, curated, tmp_path):
    before = contents(curated[0])
    with pytest.raises(UserError, match="holds a finished curation"):
        curate(raw, curated[0], SETTINGS, processes=0)
    assert contents(curated[0]) == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        curate(raw, tmp_path, SETTINGS, processes=0)
    for out in (raw, raw / "clips", raw.parent):
        with pytest.raises(UserError, match="must be folders beside each other"):
            curate(raw, out, SETTINGS, processes=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_and_runners_that_cannot_be_are_refused(raw, tmp_path):
    out = tmp_path / "out"
    for settings, wrong in (
        (dict(min_seconds=11), "--min-seconds 11 is more than half of --max-seconds 20"),
        (dict(duplicate_bits=15), "--duplicate-bits must be from 0 to 14"),
        (dict(min_brightness=250), "--min-brightness must be below"),
        (dict(min_picture=40), "--min-picture is a fraction"),
        (dict(max_seconds=float("nan")), "--max-seconds must be above 0"),
    ):
        with pytest.raises(UserError, match=wrong):
            Settings(**settings)
    with pytest.raises(UserError, match=r"--runner 'prism' is not known: choose one of fnapi, flink, spark, dataflow"):
        curate(raw, out, runner="prism")
    with pytest.raises(UserError, match=r"Beam has no option 'flink_mastr': did you mean --beam.flink_master"):
        curate(raw, out, runner="flink", beam_options=("--flink_mastr=host:8081",))
    with pytest.raises(UserError, match=r"no folder .*nowhere: give --path"):
        curate(tmp_path / "nowhere", out)
    assert not out.exists()


def test_the_command_says_what_became_of_everything(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / "a.mp4", np.concatenate([panning(0, 12), panning(1, 5)]), fps=12)
    write(tmp_path / "raw" / "b.mp4", panning(2, 12), fps=12)
    (tmp_path / "raw" / "a.txt").write_text("two scenes")
    command = [
        "data",
        "curate",
        "--path",
        str(tmp_path / "raw"),
        "--out",
        str(tmp_path / "out"),
        "--min-seconds",
        "0.5",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 files, 1 cut into 2 clips, 1 kept" in said
    assert "1  file(s) dropped by caption: no caption" in said
    assert "1  clip(s) dropped by length: shorter than --min-seconds 0.5" in said
    assert main(command) == 2 and "holds a finished curation" in capsys.readouterr().err


@pytest.mark.parametrize("name", curation.RUNNERS.values())
def test_beam_knows_the_runners(name):
    assert type(beam.runners.runner.create_runner(name)).__name__ == name
