"""The video suite: what is scored beside what, that it can be made again, and what is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from random_params import random_params
from video_files import damaged, write

from sorax import export_vae, video_units
from sorax.errors import UserError
from sorax.lpips import LPIPS, tensor_shapes
from sorax.vae import VAE, VAEConfig
from sorax.vbench import read_prompts, write_layout
from sorax.video_parts import summary_lines
from sorax.video_suite import evaluate_videos, prepare, verify_videos

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NETWORKS = dict(features=str(FIXTURES / "videomae"), clip=str(FIXTURES / "clip"))
TINY_VAE = VAEConfig(base_width=4, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=4,
                     temporal_downsample=(True,), pixel_patch=2)  # fmt: skip
COUNT = 6


def clip_of(seed, frames=5, height=32, width=48, speed=1):
    """A picture that moves over the frame, its texture drawn by the seed."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(90, 150, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    return np.stack([np.roll(picture, t * speed, axis=1) for t in range(frames)]).astype(np.uint8)


def folder_of(path, clips, captions=True, suffix=".mp4"):
    """Writes videos by name; captions in metadata.jsonl."""
    path.mkdir(parents=True)
    for name, video in clips.items():
        write(path / f"{name}{suffix}", video)
    if captions:
        lines = [json.dumps(dict(file=f"{name}{suffix}", caption=f"number {name}")) for name in clips]
        (path / "metadata.jsonl").write_text("\n".join(lines))
    return str(path)


def clips(first=0, count=COUNT, **settings):
    return {f"v{i}": clip_of(first + i, speed=1 + i % 3, **settings) for i in range(count)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("reference") / "real", clips())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Videos of other names and things, flickering, without captions."""
    bright = np.where(np.arange(5) % 2, 1.25, 1.0)[:, None, None, None]
    flickering = {f"w{i}": (video * bright).clip(0, 255).astype(np.uint8)
                  for i, video in enumerate(clips(100, 4).values())}  # fmt: skip
    return folder_of(tmp_path_factory.mktemp("other") / "peer", flickering, captions=False)


def cell(scores, part, row, metric):
    return scores["parts"][f"video/{part}"]["rows"][row][metric]


def test_a_copy_of_the_reference_scores_at_the_ceiling(reference, tmp_path):
    copies = str(tmp_path / "copies")
    shutil.copytree(reference, copies)
    scores = evaluate_videos(str(tmp_path / "report"), reference, videos=copies, paired=True, fvd=False, **NETWORKS)
    assert list(scores["parts"]) == ["video/no-network", "video/paired", "video/fvd", "video/clip"]
    assert not scores["not_scored"]
    paired = scores["parts"]["video/paired"]
    ssim = cell(scores, "paired", "videos", "ssim")
    assert (ssim["value"], ssim["n"]) == (1, 6)
    assert cell(scores, "paired", "videos", "flicker_error")["value"] == 0
    assert "psnr" not in paired["rows"]["videos"] and "6 clips are exact copies" in paired["about"]
    for metric in ("flicker", "motion", "warping_error", "untracked", "difference"):
        ours, theirs = (cell(scores, "no-network", row, metric) for row in ("videos", "reference"))
        assert ours == theirs, metric
    assert cell(scores, "no-network", "videos", "motion_distance")["value"] == 0
    assert cell(scores, "clip", "videos", "clip") == cell(scores, "clip", "reference", "clip")
    assert cell(scores, "fvd", "videos", "mmd")["value"] < 0  # identical sets: no bias leaves it below zero
    assert all(case["score"] == 1 for case in paired["cases"]) and len(paired["cases"]) == 6


def test_what_flickers_is_told_from_the_reference_and_its_frames_are_kept(reference, other, tmp_path):
    out = tmp_path / "report"
    scores = evaluate_videos(str(out), reference, videos=other)
    assert list(scores["parts"]) == ["video/no-network"]
    assert "download" in scores["not_scored"]["video/fvd"] and "--clip-model" in scores["not_scored"]["video/clip"]
    for metric in ("flicker", "temporal_spectrum", "warping_error"):
        ours, theirs = (cell(scores, "no-network", row, metric) for row in ("videos", "reference"))
        assert ours["lo"] > theirs["hi"], metric
    part = scores["parts"]["video/no-network"]
    assert len(part["cases"]) == 4 and all("flicker (levels)" in case["failed"] for case in part["cases"])
    assert {line["title"].split()[0] for line in part["series"]} == {"Mean", "Motion"}
    case = part["cases"][0]
    with np.load(out / case["video"]["file"]) as kept:
        assert kept["videos"].shape[1:] == (5, 32, 48, 3) and kept["fps"] == 8
        assert abs(kept["videos"][case["video"]["index"]].astype(int) - clip_of(100)).mean() < 60
    assert case["truth"] is None and case["caption"] == ""
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert "| videos of peer |" in (out / "scores.md").read_text()
    assert any("not scored: video/fvd" in line for line in summary_lines(scores))


def test_an_evaluation_can_be_made_again_and_goes_on_where_it_stopped(reference, other, tmp_path, monkeypatch):
    out = tmp_path / "report"
    first = evaluate_videos(str(out), reference, videos=other, num_clips=4)
    before = {file.name: file.read_bytes() for file in (out / "samples").iterdir()}
    lost = sorted(out.glob("samples/videos_*.npz"))[0]
    lost.unlink()
    made = []
    measure = video_units.Unit.measure
    monkeypatch.setattr(video_units.Unit, "measure", lambda self, m: made.append(self.file) or measure(self, m))
    assert evaluate_videos(str(out), reference, videos=other, num_clips=4) == first
    assert made == [f"samples/{lost.name}"]
    assert {file.name: file.read_bytes() for file in (out / "samples").iterdir()}.keys() == before.keys()
    assert verify_videos(str(out), count=2) == []
    with np.load(lost) as file:
        arrays = dict(file)
    arrays["spatial"] = arrays["spatial"] + 1e-9
    np.savez(lost, **arrays)
    assert verify_videos(str(out), count=9) == [f"samples/{lost.name}: spatial differs"]
    with pytest.raises(UserError, match="holds the evaluation of something else"):
        evaluate_videos(str(out), reference, videos=other, num_clips=3)
    lost.write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged"):
        evaluate_videos(str(out), reference, videos=other, num_clips=4)


def test_a_vae_is_scored_by_its_copies(reference, tmp_path, monkeypatch):
    folder = str(export_vae.export_vae(TINY_VAE, random_params(VAE, TINY_VAE)[1], tmp_path / "vae"))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes().items()}
    monkeypatch.setattr(LPIPS, "load", classmethod(lambda cls, path: cls.from_tensors(tensors)))
    monkeypatch.setattr(LPIPS, "__call__", lambda self, a, b, params=None: 0.25 + 0 * a[:, 0, 0, 0])
    settings = dict(run=folder, reconstruct=True, num_clips=3, lpips="weights.safetensors")
    scores = evaluate_videos(str(tmp_path / "report"), reference, **settings)
    assert list(scores["parts"]) == ["video/no-network", "video/paired"] and scores["kind"] == "vae"
    found = scores["parts"]["video/paired"]["rows"]["vae"]
    assert found["psnr"]["n"] == 3 and found["psnr"]["value"] < 30 and found["lpips"]["value"] == 0.25
    case = scores["parts"]["video/paired"]["cases"][0]
    assert case["truth"]["file"].startswith("samples/reference") and case["video"]["file"].startswith("samples/vae")
    with pytest.raises(UserError, match="add --reconstruct"):
        prepare(reference, run=folder)


def test_a_model_makes_a_video_of_each_caption_at_the_shape_of_the_reference(tiny_run, tmp_path):
    settings = dict(run=tiny_run, num_clips=3, seed=5, num_steps=1, guidance_scale=1.0)
    scores = evaluate_videos(str(tmp_path / "report"), "world", **settings)
    part = scores["parts"]["video/no-network"]
    assert list(part["rows"]) == ["reference", "vae", "model"] and scores["kind"] == "dit" and scores["step"] == 2
    assert list(scores["parts"]["video/paired"]["rows"]) == ["vae"]
    assert [case["seed"] for case in part["cases"]] == [5, 6, 7] and all(case["caption"] for case in part["cases"])
    case = part["cases"][1]
    with np.load(tmp_path / "report" / case["video"]["file"]) as model, \
            np.load(tmp_path / "report" / case["truth"]["file"]) as truth:  # fmt: skip
        assert model["videos"].shape == truth["videos"].shape == (3, 5, 32, 32, 3)
        assert (model["videos"] != truth["videos"]).mean() > 0.5
    assert verify_videos(str(tmp_path / "report"), count=3) == []


def test_distances_of_distributions_have_one_half_of_the_reference_against_the_other(tmp_path):
    """24 features: FVD needs 25 videos, and of the reference alone 50."""
    many = folder_of(tmp_path / "many", clips(0, 26, frames=1, height=16, width=16))
    others = folder_of(tmp_path / "others", clips(50, 26, frames=1, height=16, width=16))
    with pytest.raises(UserError, match=r"more than 24 videos .* there are 24 and 26: .*--no-fvd leaves it out"):
        few = folder_of(tmp_path / "few", clips(50, 24, frames=1, height=16, width=16))
        prepare(many, videos=few, features=NETWORKS["features"])
    scores = evaluate_videos(str(tmp_path / "report"), many, videos=others, features=NETWORKS["features"])
    part = scores["parts"]["video/fvd"]
    assert set(part["rows"]["reference"]) == {"mmd"} and set(part["rows"]["videos"]) == {"fvd", "mmd"}
    fvd = part["rows"]["videos"]["fvd"]
    assert fvd["n"] == 26 and 0 <= fvd["lo"] < fvd["value"] < fvd["hi"]
    assert part["rows"]["reference"]["mmd"]["n"] == 13 and not part["cases"]


def test_what_cannot_be_scored_is_refused_before_any_work(reference, other, tmp_path):
    def refused(message, *, of=reference, **settings):
        with pytest.raises(UserError, match=message):
            evaluate_videos(str(tmp_path / "report"), of, **settings)

    refused("one of them")
    refused("one of them", run="x", videos=other)
    refused("leave it out with --videos", videos=other, reconstruct=True)
    refused("--paired is of --videos", run=other, paired=True)
    refused("add --paired", videos=other, lpips="x")
    refused("is no folder", videos=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused("no videos in", videos=str(tmp_path / "empty"))
    refused(
        "4 of 4 videos of --videos have no prompt, which CLIP needs: w0.mp4, w1", videos=other, clip=NETWORKS["clip"]
    )
    refused(r"do not pair.*without an original: w0.*without a copy: v0", videos=other, paired=True)
    refused("holds no VideoMAE", videos=other, features=str(tmp_path / "empty"))
    refused("at least 4 videos", videos=other, num_clips=3, features=NETWORKS["features"], fvd=False)
    refused(r"did you mean config\.data\.max_frames", videos=other, overrides=["max_frame=5"])
    refused("0 clips", videos=other, num_clips=0)
    assert not (tmp_path / "report" / "scores.json").exists()


def test_files_that_cannot_be_read_are_listed_not_left_out(reference, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(reference, broken)
    damaged(broken / "v1.mp4", broken / "v1.mp4", keep=0.3)
    (broken / "v3.mp4").write_bytes(b"")
    (broken / "v5.mp4").unlink()
    with pytest.raises(UserError, match=r"3 of 6 files of --videos .*v1\.mp4 \(.*v3\.mp4 \(empty.*v5\.mp4 \(no such"):
        prepare(reference, videos=str(broken))
    short = folder_of(tmp_path / "short", clips(0, 2, frames=3))
    with pytest.raises(UserError, match=r"2 of 2 files of --videos .* cannot be used.*too short|no usable video"):
        prepare(reference, videos=short, overrides=["min_frames=5"])


def test_pairs_that_differ_in_size_or_name_two_files_alike_are_refused(reference, tmp_path):
    mixed = clips()
    mixed["v2"] = clip_of(2, height=48)
    mixed["v4"] = clip_of(4, frames=4)
    folder = folder_of(tmp_path / "mixed", mixed, captions=False)
    with pytest.raises(UserError, match=r"2 of 6 pairs differ .*v2 \(5 frames of 48x48, original 5 .* of 48x32\), v4"):
        prepare(reference, videos=folder, paired=True)
    assert prepare(reference, videos=folder).rows["videos"].shapes[2] == (5, 48, 48)  # else sizes may be mixed
    shutil.copy(tmp_path / "mixed" / "v0.mp4", tmp_path / "mixed" / "v0.mov")
    with pytest.raises(UserError, match="two files called v0"):
        prepare(reference, videos=folder, paired=True)


def test_only_as_many_videos_are_kept_as_fit_but_all_of_a_model(reference, other, monkeypatch):
    row = prepare(reference, videos=other).rows["videos"]
    assert row.kept == {0, 1, 2, 3}
    monkeypatch.setattr(video_units, "KEPT_BYTES", 2 * 3 * 5 * 32 * 48)
    again = prepare(reference, videos=other).rows["videos"]
    assert again.kept == {0, 3}
    again.__dict__["keep_all"] = True
    del again.__dict__["kept"]
    assert again.kept == {0, 1, 2, 3}


# --- VBench


def test_samples_are_laid_out_as_vbench_finds_them(tiny_run, tmp_path):
    from sorax.runs import load_run

    prompts = tmp_path / "prompts.txt"
    circle, stars = "a red circle, in super slow motion", "two blue stars-7"
    prompts.write_text(f"{circle}\n {stars} \n{circle}\n\n")
    out, run = tmp_path / "out", load_run(tiny_run)
    settings = dict(samples=2, num_steps=1, guidance_scale=1.0, shape=(1, 32, 32, 8.0))
    assert write_layout(run, str(prompts), str(out), **settings) == 4
    names = {f"{prompt}-{k}.mp4" for prompt in (circle, stars) for k in (0, 1)}
    assert {file.name for file in (out / "samples").iterdir()} == names
    seeds = json.loads((out / "seeds.json").read_text())
    assert sorted(entry["seed"] for entry in seeds.values()) == [0, 1, 2, 3] and seeds.keys() == names
    before = (out / "samples" / "two blue stars-7-1.mp4").read_bytes()
    (out / "samples" / "two blue stars-7-1.mp4").unlink()
    assert write_layout(run, str(prompts), str(out), **settings) == 1
    assert (out / "samples" / "two blue stars-7-1.mp4").read_bytes() == before
    with pytest.raises(UserError, match="something else"):
        write_layout(run, str(prompts), str(out), **settings | dict(samples=3))


def test_prompts_that_make_no_file_names_are_named_by_line(tmp_path):
    path, names = tmp_path / "prompts.txt", tmp_path / "names.txt"
    path.write_text(f"a\nb/c\n{'é' * 125}\n")
    with pytest.raises(UserError, match=r"line 2 has a slash.*line 3 makes a file name of 256 bytes.*--names"):
        read_prompts(str(path))
    names.write_text("a\nb\nlong\n")
    assert [(p.name, p.line) for p in read_prompts(str(path), str(names))] == [("a", 1), ("b", 2), ("long", 3)]
    names.write_text("a\na\nlong\n")
    with pytest.raises(UserError, match="line 2 has the name of line 1"):
        read_prompts(str(path), str(names))
    names.write_text("a\nb\n")
    with pytest.raises(UserError, match="2 lines"):
        read_prompts(str(path), str(names))
    path.write_text("a\n\nb")
    with pytest.raises(UserError, match="line 2 is empty"):
        read_prompts(str(path))
    path.write_text("\n \n")
    with pytest.raises(UserError, match="has no prompt"):
        read_prompts(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere.txt"))
