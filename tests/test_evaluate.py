"""The suite of scores: its ceilings and its floor are where they must be, and it says the same twice."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from video_files import numbered, write

from sorax import convert, evaluate, lora
from sorax.config import apply_overrides, read_config
from sorax.errors import UserError
from sorax.evaluate_vae import fidelity
from sorax.export_lora import export_lora
from sorax.held_out import load_splits
from sorax.import_wan import import_run
from sorax.lora import LoRAConfig
from sorax.runs import load_run
from sorax.score_report import without_nan

WAN = pathlib.Path(__file__).parent / "fixtures" / "wan"


@pytest.fixture(scope="module")
def report(tiny_run, tmp_path_factory):
    """(scores as returned, report folder) of the tiny run."""
    out = tmp_path_factory.mktemp("report") / "of" / "tiny"
    return evaluate.evaluate_folder(tiny_run, str(out)), out


def test_true_videos_are_all_right_and_untrained_models_all_wrong(report):
    for entry in report[0]["splits"].values():
        for cell in entry["prompts"]["ground_truth"].values():
            assert cell["rate"] == 1 and cell["k"] == cell["n"] == 4
        assert entry["prompts"]["untrained"]["joint"]["rate"] == 0


def test_splits_are_single_objects_in_the_commonest_moving_shape(tiny_run):
    run = load_run(tiny_run)
    data = apply_overrides(run.config.copy_and_resolve_references(), ["data.world.num_objects=(1, 3)"]).data
    data.world.shapes = [[1, 32, 32]] * 3 + [[5, 32, 48]] * 2 + [[9, 32, 32]]
    splits = load_splits(data, run.networks.vae_config, 6, 16)
    assert list(splits) == ["test", "heldout"]
    for clips in splits.values():
        assert {video.shape for video in clips.videos} == {(5, 32, 48, 3)} and len(clips.videos) == 6
        assert all(truth.num_objects == 1 for truth in clips.truths)
    assert not set(splits["test"].captions) & set(splits["heldout"].captions)


def test_report_holds_what_was_generated_and_judged(report):
    scores, out = report
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert not list(out.glob("*.partial"))
    for name, picture in (("test", "samples.png"), ("heldout", "heldout.png")):
        Image.open(out / picture).verify()
        clips = scores["splits"][name]["clips"]
        stored = np.load(out / f"{name}.npz")
        assert stored["videos"].shape == (4, 5, 32, 32, 3) and stored["videos"].dtype == np.uint8
        assert list(stored["captions"]) == [clip["caption"] for clip in clips]
        assert list(stored["seeds"]) == [0, 1, 2, 3]
        table = scores["splits"][name]["prompts"]["model"]
        assert all(table[column]["k"] == sum(clip[column] for clip in clips) for column in evaluate.COLUMNS)
    Image.open(out / "reconstructions.png").verify()
    text = (out / "scores.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ground truth |")]
    assert len(rows) == 2 and all(row.count("100.0 % [51.0, 100.0]") == 6 for row in rows)
    assert any("ground truth 100.0 %" in line for line in evaluate.summary_lines(scores))


def test_a_model_card_has_the_scores_of_its_own_step_alone(tiny_run, report, tmp_path):
    shutil.copytree(report[1], tmp_path / "report")
    run = dataclasses.replace(load_run(tiny_run), workdir=str(tmp_path))
    joint = report[0]["splits"]["test"]["prompts"]["model"]["joint"]["rate"]
    assert run.scores()["prompts followed in every attribute, test"].startswith(f"{100 * joint:.1f} %")
    assert dataclasses.replace(run, step=run.step + 1).scores() == {}
    assert load_run(tiny_run).scores() == {}


def test_two_evaluations_differ_in_their_speed_alone(tiny_run, report, tmp_path):
    scores = evaluate.evaluate_run(load_run(tiny_run), str(tmp_path), num_clips=4)
    first, second = ({k: v for k, v in s.items() if k != "speed"} for s in (report[0], scores))
    assert first == second
    assert (np.load(tmp_path / "test.npz")["videos"] == np.load(report[1] / "test.npz")["videos"]).all()


def test_vae_runs_are_scored_by_their_copies_alone(tiny_run, report, tmp_path):
    scores = evaluate.evaluate_folder(str(pathlib.Path(tiny_run) / "vae"), str(tmp_path), num_clips=4)
    for name, entry in scores["splits"].items():
        # The same clips: this world has one shape, and one object a clip. Two programs may round a pixel differently.
        assert entry["vae"] == pytest.approx(report[0]["splits"][name]["vae"], rel=1e-4) and "prompts" not in entry
    names = {"scores.json", "scores.md", "reconstructions.png", "reconstructions"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_folders_of_videos_have_scores_of_the_vae_only(tiny_run, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(3):
        write(folder / f"{i}.mp4", numbered(9 + 4 * i))
        (folder / f"{i}.txt").write_text(f"grey number {i}")
    run = load_run(tiny_run)
    run.config.data.path = str(folder)
    run.config.data.max_tokens = 256
    scores = evaluate.evaluate_run(run, str(tmp_path / "out"), num_clips=2)
    assert scores["splits"]["folder"]["vae"]["n"] == 2 and "speed" not in scores
    assert "need the world" in (tmp_path / "out" / "scores.md").read_text()
    run.config.data.path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        evaluate.evaluate_run(run, str(tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()


def test_imported_weights_are_scored_on_the_world_and_with_a_lora(tmp_path):
    """What their own config leaves out is told: which clips. Other weights make other videos; the VAE is the same."""
    settings = LoRAConfig(rank=2, targets=("to_v", "ffn.net.2"))
    dit_config = convert.read_dit_config(WAN / "transformer" / "config.json")
    rng, shapes = np.random.default_rng(0), lora.adapted_dit(dit_config, settings)[1]
    adapters = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    export_lora(adapters, settings, dit_config, tmp_path / "adapters")
    how = dict(data="world", overrides=["world.shapes=((5, 32, 32),)"], num_clips=1, num_steps=2)
    found = {}
    for name, extra in (("base", {}), ("lora", dict(lora=str(tmp_path / "adapters")))):
        run, out = str(import_run(WAN, tmp_path / name, **extra)), tmp_path / f"{name}_report"
        scores = evaluate.evaluate_folder(run, str(out), **how)
        assert scores["step"] == 0 and list(scores["splits"]) == ["test", "heldout"]
        assert all(entry["prompts"]["ground_truth"]["joint"]["rate"] == 1 for entry in scores["splits"].values())
        found[name] = scores["splits"]["test"]["vae"], np.load(out / "test.npz")["videos"]
    assert found["base"][0] == found["lora"][0] and (found["base"][1] != found["lora"][1]).any()


def test_exact_copies_leave_the_mean_finite():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    mixed, alone = fidelity([a, b], [a, a]), fidelity([b], [a])
    assert mixed["psnr"] == alone["psnr"] and (mixed["exact"], mixed["n"]) == (1, 2)
    assert fidelity([a], [a]) == dict(psnr=None, ssim=pytest.approx(1), flicker=0, n=1, exact=1)
    assert fidelity([a[:, :8]], [b[:, :8]])["ssim"] is None


def test_what_no_caption_asks_is_null_and_said(report, tmp_path):
    scores = json.loads(json.dumps(report[0]))
    for table in scores["splits"]["test"]["prompts"].values():
        table["direction"] = dict(rate=float("nan"), k=0, n=0, lo=0.0, hi=1.0)
    assert "none asked" in evaluate.markdown(scores)
    assert without_nan(scores)["splits"]["test"]["prompts"]["vae"]["direction"]["rate"] is None


def test_report_folders_that_cannot_be_made_are_named(tiny_run, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken"):
        evaluate.evaluate_folder(tiny_run, str(tmp_path / "taken" / "report"))
    assert read_config(tiny_run).kind == "dit" and (tmp_path / "taken").read_text() == "a file"
