"""Scores of a VAE: what each number means, of which clips, and that a diffusers folder does in place of a run."""

import json
import pathlib

import av
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from random_params import random_params
from safetensors.numpy import load_file
from video_files import numbered, write

from sorax import cli, convert, export_vae
from sorax.config import read_config
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.evaluate import evaluate_folder
from sorax.evaluate_vae import (
    LatentStatistics,
    clip_scores,
    evaluate_vae,
    frame_distance,
    mean_scores,
)
from sorax.lpips import LPIPS, tensor_shapes
from sorax.metrics import flicker
from sorax.runs import kind_of, load_run, open_vae, open_vae_config
from sorax.vae import VAE, VAEConfig

TINY = VAEConfig(base_width=4, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=4,
                 temporal_downsample=(True,), pixel_patch=2)  # fmt: skip
SECOND = VAEConfig(base_width=4, width_multipliers=(2, 2), num_res_blocks=1, latent_channels=4,
                   temporal_downsample=(True,), pixel_patch=2, decoder_base_width=8, shortcuts=True)  # fmt: skip
SHAPES = [(1, 32, 32), (5, 32, 32), (9, 32, 48)]


@pytest.fixture(scope="module")
def params():
    return random_params(VAE, TINY)[1]


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    """A diffusers folder of the tiny VAE."""
    return str(export_vae.export_vae(TINY, params, tmp_path_factory.mktemp("vae") / "tiny"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of videos of three shapes, two of the last."""
    path = tmp_path_factory.mktemp("clips")
    Image.fromarray(numbered(1, 32, 32)[0]).save(path / "0.png")
    for i, (frames, height, width) in enumerate([*SHAPES[1:], SHAPES[2]], start=1):
        write(path / f"{i}.mp4", numbered(frames, height, width))
    for file in sorted(path.iterdir()):
        (path / f"{file.stem}.txt").write_text(f"grey number {file.stem}")
    return str(path)


@pytest.fixture(scope="module")
def report(folder, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return evaluate_vae(folder, str(out), data=clips), out


def test_flicker_is_the_mean_error_of_frame_differences():
    a = np.zeros((3, 1, 2, 3), np.uint8)
    a[:, 0, 0], a[:, 0, 1] = np.array([[10], [20], [40]]), 7
    b = a.copy()
    b[:, 0, 0] = np.array([[15], [22], [32]])
    # Pixel 0: differences 10, 20 of the one and 7, 10 of the other: errors 3 and 10. Pixel 1: none.
    assert flicker(a, b) == pytest.approx((3 + 10) / 4)
    assert flicker(a, a + np.uint8(9)) == 0 and flicker(a[:1], b[:1]) is None
    extremes = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, -1)
    assert flicker(extremes, extremes[::-1].copy()) == 510


def test_means_leave_out_what_a_clip_does_not_have():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    one, exact, still = clip_scores(a, b), clip_scores(a, a), clip_scores(a[:1, :8], b[:1, :8])
    assert still["flicker"] is None and still["ssim"] is None and "lpips" not in one
    mean = mean_scores([one, exact, still])
    assert mean["psnr"] == pytest.approx((one["psnr"] + still["psnr"]) / 2) and (mean["n"], mean["exact"]) == (3, 1)
    assert mean["flicker"] == pytest.approx(one["flicker"] / 2)
    assert mean_scores([exact])["psnr"] is None


def test_latent_statistics_are_those_of_all_positions_at_once():
    rng = np.random.default_rng(0)
    sizes, C = [(1, 2, 3), (3, 4, 2)], 3
    mean = [rng.normal(1.0, 2.0, (*s, C)).astype(np.float32) for s in sizes]
    variance = [np.exp(rng.normal(-2.0, 0.5, (*s, C))).astype(np.float32) for s in sizes]
    for m, v in zip(mean, variance):
        m[..., 2], v[..., 2] = 0.05, 1.0  # almost the prior: not used
    statistics = LatentStatistics(C)
    for m, v in zip(mean, variance):
        statistics.add(np.concatenate([m, v], axis=-1))
    m, v = (np.concatenate([x.reshape(-1, C) for x in part]).astype(np.float64) for part in (mean, variance))
    draws = m + np.sqrt(v) * rng.standard_normal((20000, *m.shape))
    found = statistics.summary(np.full(C, 0.5), np.full(C, 2.0))
    np.testing.assert_allclose(found["mean"], (m.mean(0) - 0.5) / 2)
    np.testing.assert_allclose(found["std"], draws.std((0, 1)) / 2, rtol=0.02)  # of 600,000 draws
    np.testing.assert_allclose(found["posterior_std"], np.sqrt(v).mean(0))
    np.testing.assert_allclose(found["kl"], 0.5 * (m**2 + v - 1 - np.log(v)).mean(0), atol=1e-12)
    assert found["unused_channels"] == 1 and found["positions"] == 30
    assert found["kl_per_position"] == pytest.approx(sum(found["kl"]))


def test_statistics_measured_by_the_codec_normalise_the_same_clips(params):
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES[:2]]
    codec, statistics = Codec(TINY, params), LatentStatistics(4)
    for posterior in codec.posteriors(videos):
        statistics.add(posterior)
    found = statistics.summary(*codec.statistics(videos))
    np.testing.assert_allclose(found["mean"], 0, atol=1e-5)
    np.testing.assert_allclose(found["std"], 1, atol=1e-5)


def test_every_shape_has_its_own_scores(report):
    entry = report[0]["splits"]["folder"]
    assert [tuple(found["shape"]) for found in entry["shapes"]] == SHAPES
    assert [found["n"] for found in entry["shapes"]] == [1, 1, 2] and entry["vae"]["n"] == 4
    assert [found["flicker"] is None for found in entry["shapes"]] == [True, False, False]
    for key in ("psnr", "ssim"):
        weighted = sum(found["n"] * found[key] for found in entry["shapes"]) / 4
        assert entry["vae"][key] == pytest.approx(weighted)
    assert entry["latents"]["positions"] == 8 * 8 + 3 * 8 * 8 + 2 * 5 * 8 * 12


def test_the_report_has_tables_and_clips_beside_their_copies(report):
    scores, out = report
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    text = (out / "scores.md").read_text()
    assert "| clips of the folder | 9 | 48 x 32 |" in text and "| channel | mean | std |" in text
    assert "LPIPS" not in text and "training data" not in text
    Image.open(out / "reconstructions.png").verify()
    videos = {path.name for path in (out / "reconstructions").iterdir()}
    assert videos == {"folder-000.png", "folder-001.mp4", "folder-002.mp4", "folder-003.mp4"}
    with av.open(str(out / "reconstructions" / "folder-002.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.shape(frames) == (9, 32, 48 + 4 + 48, 3)  # a white line between them
    left = np.stack(frames)[:, :, :48].astype(float)
    assert np.abs(left - numbered(9, 32, 48)).mean() < 8  # twice through H.264


def test_an_older_report_leaves_no_video(folder, clips, tmp_path):
    (tmp_path / "reconstructions").mkdir()
    for name in ("heldout-005.mp4", "mine.mp4"):
        (tmp_path / "reconstructions" / name).write_text("x")
    evaluate_vae(folder, str(tmp_path), data=clips, num_clips=1)
    assert {path.name for path in (tmp_path / "reconstructions").iterdir()} == {"mine.mp4", "folder-000.png"}


def test_settings_of_the_data_can_be_overridden(folder, clips, tmp_path):
    scores = evaluate_vae(folder, str(tmp_path), data=clips, overrides=["max_frames=5"], num_clips=2)
    assert {found["shape"][0] for found in scores["splits"]["folder"]["shapes"]} == {1, 5}
    with pytest.raises(UserError, match="did you mean"):
        evaluate_vae(folder, str(tmp_path), data=clips, overrides=["max_frame=5"])


def test_a_diffusers_folder_needs_data(folder, tmp_path, capsys):
    assert cli.main(["evaluate", "--run", folder, "--out", str(tmp_path / "out")]) == 2
    assert "add --data FOLDER" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nowhere"):
        evaluate_folder(folder, str(tmp_path / "out"), data=str(tmp_path / "nowhere"))


def test_folders_that_hold_no_vae_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        kind_of(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(UserError, match="is a file: name the folder that it is in"):
        kind_of(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="neither a run nor a diffusers folder"):
        open_vae(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="AutoencoderKL: as a VAE sorax reads AutoencoderKLWan alone"):
        open_vae(str(tmp_path))


# --- LPIPS


def test_lpips_of_a_video_is_the_mean_of_its_frames_however_they_are_split(monkeypatch):
    metric = LPIPS({})
    monkeypatch.setattr(LPIPS, "__call__", lambda self, a, b, params=None: abs(a - b).mean((1, 2, 3)) / 2 * 255)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    wanted = np.abs(a.astype(float) - b).mean()
    for frames in (1, 3, 7, 100):
        monkeypatch.setattr("sorax.evaluate_vae.LPIPS_PIXELS", frames * 256)
        assert frame_distance(metric)(a, b) == pytest.approx(wanted, rel=1e-5)


def test_lpips_is_reported_where_its_weights_are_given(folder, clips, tmp_path, monkeypatch):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes().items()}
    monkeypatch.setattr(LPIPS, "load", classmethod(lambda cls, path: cls.from_tensors(tensors)))
    monkeypatch.setattr(LPIPS, "__call__", lambda self, a, b, params=None: 0.25 + 0 * a[:, 0, 0, 0])
    scores = evaluate_vae(folder, str(tmp_path), data=clips, num_clips=1, lpips="weights.safetensors")
    entry = scores["splits"]["folder"]
    assert entry["vae"]["lpips"] == 0.25 and all(found["lpips"] == 0.25 for found in entry["shapes"])
    assert "LPIPS" in (tmp_path / "scores.md").read_text()


def test_lpips_weights_that_lack_tensors_are_refused_before_any_work(folder, clips, tmp_path):
    weights = tmp_path / "lpips.safetensors"
    weights.write_bytes(pathlib.Path(folder, f"{convert.WEIGHTS}.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"features.0.weight is missing"):
        evaluate_vae(folder, str(tmp_path / "out"), data=clips, lpips=str(weights))
    assert not (tmp_path / "out").exists()


# --- Weights in and out


@pytest.mark.parametrize("config", [TINY, SECOND], ids=["first", "second"])
def test_an_exported_vae_reads_back_the_same_in_both_generations(config, tmp_path):
    params = random_params(VAE, config)[1]
    out = export_vae.export_vae(config, params, tmp_path / "out", metadata=dict(step=7))
    there, back, identity = open_vae(str(out))
    assert there == config == open_vae_config(str(out)) and kind_of(str(out)) == "diffusers"
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {path.name for path in out.iterdir()} == {"config.json", f"{convert.WEIGHTS}.safetensors",
                                                     "provenance.json", "README.md"}  # fmt: skip
    card = (out / "README.md").read_text()
    assert "7 training steps, stored as f32." in card and ("Wan 2.2" in card) == config.shortcuts
    again = export_vae.export_vae_folder(str(out), tmp_path / "own", form="safetensors")
    np.testing.assert_array_equal(load_file(again / "vae.safetensors")["quant_conv/bias"], params["quant_conv"]["bias"])
    assert json.loads((again / "provenance.json").read_text())["identity"] == identity


def test_a_vae_without_a_form_in_diffusers_is_refused(tmp_path):
    config = VAEConfig(base_width=4, temporal_downsample=(True, True, True), latent_channels=4)
    with pytest.raises(UserError, match=r"temporal stride of 8.*--format safetensors"):
        export_vae.export_vae(config, {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [VAEConfig(4, (1, 2, 2), 1, 4, (True, True)), VAEConfig(4, (2, 2, 1), 1, 4, (True, True), 2, 8, True)],
    ids=["first", "second"],
)
def test_diffusers_reconstructs_the_same_from_an_exported_folder(config, tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    params = random_params(VAE, config)[1]
    theirs = diffusers.AutoencoderKLWan.from_pretrained(export_vae.export_vae(config, params, tmp_path / "out"))
    side = config.spatial_stride
    video = np.tanh(np.random.default_rng(0).standard_normal((1, 9, 2 * side, 4 * side, 3))).astype(np.float32)
    graphdef, _ = random_params(VAE, config)
    ours = jax.jit(lambda p, x: (vae := nnx.merge(graphdef, p)).decode(vae.encode(x)[0]))(params, video)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 1).copy())).latent_dist.mode()
        copy = np.moveaxis(theirs.decode(mean).sample.numpy(), 1, -1)
    np.testing.assert_allclose(np.clip(ours, -1, 1), copy, atol=1e-4)  # theirs clips


# --- A run


def test_a_vae_run_is_scored_and_exported_as_it_is_read(tiny_run, tmp_path, capsys):
    run = str(pathlib.Path(tiny_run) / "vae")
    scores = evaluate_folder(run, str(tmp_path / "report"), num_clips=2)
    assert list(scores["splits"]) == ["test", "heldout"] and scores["step"] == read_config(run).train.steps
    out = str(tmp_path / "out")
    assert cli.main(["export", "--run", run, "--out", out, "--weights", "raw"]) == 2
    assert "EMA" in capsys.readouterr().err
    assert cli.main(["export", "--run", run, "--out", out]) == 0
    (config, params, identity), back = open_vae(run), open_vae(out)
    assert back[0] == config and back[2] == identity == open_vae(tiny_run)[2] == scores["vae"]
    jax.tree.map(np.testing.assert_array_equal, back[1], params)


def test_a_dit_run_takes_an_exported_vae(tiny_run, tmp_path, monkeypatch):
    out = str(tmp_path / "vae")
    export_vae.export_vae_folder(str(pathlib.Path(tiny_run) / "vae"), out)
    wanted = load_run(tiny_run).networks
    monkeypatch.setattr("sorax.runs.vae_folder", lambda config, workdir: out)
    found = load_run(tiny_run).networks
    assert found.vae_config == wanted.vae_config
    jax.tree.map(np.testing.assert_array_equal, found.vae, wanted.vae)
    with pytest.raises(UserError, match="scored on its own data: --data is for a VAE"):
        evaluate_folder(tiny_run, str(tmp_path / "report"), data="world")
