"""Bad input on the command line: one line that names cause and remedy, a non-zero exit, nothing overwritten."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from video_files import numbered, write

from data_pipelines.text_tokens import Tokenizer
from sorax import checkpoint, cli
from sorax.runs import open_vae_config

ROOT = pathlib.Path(__file__).parent.parent
QUICK = str(ROOT / "experiments" / "quickstart.py")
CLIPS = str(ROOT / "experiments" / "clips.py")


def fails(capsys, *argv):
    """Runs a command that must fail; returns its one line."""
    code = cli.main([str(a) for a in argv])
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("sorax: ") and "\n" not in error
    return error


def test_an_unknown_config_key_names_the_nearest(capsys, tmp_path):
    line = fails(capsys, "train", "--config", QUICK, "--workdir", tmp_path / "w", "--config.optim.lrr=1")
    assert "config.optim.lrr" in line and "config.optim.lr?" in line
    assert not (tmp_path / "w").exists()


def test_an_override_of_the_wrong_type_is_refused(capsys, tmp_path):
    line = fails(capsys, "train", "--config", QUICK, "--workdir", tmp_path / "w", "--config.train.steps=many")
    assert "train.steps" in line and "int" in line


def test_a_missing_config_is_named(capsys, tmp_path):
    assert "nowhere.py" in fails(capsys, "train", "--config", "nowhere.py", "--workdir", tmp_path)


def train_on(folder, tmp_path):
    """Arguments that train on a folder, on the eight devices that the tests have."""
    where = "--workdir", tmp_path / "w", f"--config.data.path={folder}"
    return "train", "--config", CLIPS, *where, "--config.data.batch=8"


def test_a_missing_folder_is_named(capsys, tmp_path):
    missing = tmp_path / "missing"
    line = fails(capsys, *train_on(missing, tmp_path))
    assert str(missing) in line


def test_an_experiment_that_needs_a_folder_asks_for_it(capsys, tmp_path):
    assert "data.path" in fails(capsys, "train", "--config", CLIPS, "--workdir", tmp_path / "w")


def test_an_empty_folder_is_named(capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    line = fails(capsys, *train_on(empty, tmp_path))
    assert str(empty) in line


def test_a_folder_of_corrupt_videos_names_file_and_reason(capsys, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"this is no video" * 100)
    (folder / "a.txt").write_text("a caption")
    line = fails(capsys, *train_on(folder, tmp_path))
    assert "a.mp4" in line


def test_a_missing_run_is_named(capsys, tmp_path):
    for verb, more in (("sample", ["--prompt", "x"]), ("evaluate", []), ("export", ["--out", tmp_path / "o"])):
        assert "nowhere" in fails(capsys, verb, "--run", tmp_path / "nowhere", *more)


def test_a_prompt_that_is_too_long_is_refused(capsys, tiny_run, tmp_path):
    out = tmp_path / "x.gif"
    line = fails(capsys, "sample", "--run", tiny_run, "--prompt", "red " * 600, "--out", out)
    assert " tokens " in line and "at most 511" in line and not out.exists()


def test_a_size_of_nothing_is_refused(capsys, tiny_run, tmp_path):
    assert "too small" in fails(capsys, "sample", "--run", tiny_run, "--prompt", "x", "--size", "0x32")
    assert "WxH" in fails(capsys, "sample", "--run", tiny_run, "--prompt", "x", "--size", "big")


def test_off_grid_sizes_are_rounded_and_said(capsys, tiny_run, tmp_path):
    out = tmp_path / "x.gif"
    argv = ["sample", "--run", str(tiny_run), "--prompt", "a red circle", "--size", "35x30", "--frames", "4"]
    assert cli.main([*argv, "--steps", "2", "--guidance", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "off the grid" in printed and "32x32" in printed and out.exists()


def test_noise_may_be_given_and_latents_kept(capsys, tiny_run, tmp_path):
    """Latents of the run's own noise, once drawn from a seed and once read from a file, are the same."""
    vae = open_vae_config(tiny_run)
    shape = (*vae.latent_shape(5, 32, 32), vae.latent_channels)
    noise = np.asarray(jax.random.normal(jax.random.key(3), shape))[None]
    np.save(tmp_path / "noise.npy", noise)
    argv = ["sample", "--run", str(tiny_run), "--prompt", "a red circle", "--size", "32x32", "--frames", "5"]
    argv += ["--steps", "2", "--solver", "unipc", "--out", str(tmp_path / "x.gif")]
    kept = []
    for name, more in (("a", ["--seed", "3"]), ("b", ["--noise", str(tmp_path / "noise.npy")])):
        assert cli.main([*argv, *more, "--save-latents", str(tmp_path / f"{name}.npy")]) == 0
        kept.append(np.load(tmp_path / f"{name}.npy"))
    assert kept[0].shape == noise.shape
    np.testing.assert_array_equal(*kept)
    capsys.readouterr()
    assert "[2, t, h, w, C], one noise a prompt" in fails(capsys, *argv, "--prompt", "x", "--noise", tmp_path / "a.npy")
    assert "written as .npy" in fails(capsys, *argv, "--save-latents", "x.bin")
    assert "not one of euler, ddim, unipc, dpm++" in fails(capsys, *argv, "--solver", "heun")


def test_a_run_that_made_nothing_may_start_again_with_another_config(capsys, tmp_path):
    argv = ["train", "--config", CLIPS, "--workdir", str(tmp_path / "w"), "--config.data.batch=8"]
    assert "no folder" in fails(capsys, *argv, f"--config.data.path={tmp_path / 'none'}")
    line = fails(capsys, *argv, f"--config.data.path={tmp_path}")
    assert "no videos" in line  # and not that the run has another config


def test_a_workdir_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = fails(capsys, "train", "--config", QUICK, "--workdir", str(tmp_path / "file" / "w"))
    assert "cannot be made" in line and "--workdir" in line


def test_encoding_asks_for_videos(capsys, tiny_run, tmp_path):
    line = fails(capsys, "encode", "--vae", tiny_run, "--config", CLIPS, "--out", str(tmp_path / "l"))
    assert "config.data.path is empty" in line


def test_the_workdir_of_another_config_is_left_alone(capsys, tiny_run):
    before = (pathlib.Path(tiny_run) / "config.json").read_text()
    line = fails(capsys, "train", "--config", QUICK, "--workdir", tiny_run, "--config.optim.lr=0.123")
    assert "another config" in line and "workdir" in line
    assert (pathlib.Path(tiny_run) / "config.json").read_text() == before


def test_a_checkpoint_of_another_architecture_is_named(capsys, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["ffn_dim"] *= 2
    (run / "config.json").write_text(json.dumps(config))
    line = fails(capsys, "export", "--run", run, "--out", tmp_path / "out")
    assert "another architecture" in line and "mlp_in" in line
    assert not (tmp_path / "out").exists()


def continued(run, tmp_path):
    """A config file that asks for one more step of a run."""
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] += 1
    again = tmp_path / "again.py"
    again.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config!r})\n")
    return again


def test_a_run_does_not_go_on_with_another_tokenizer(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    Tokenizer.train(["an other caption"], 300).save(run)
    line = fails(capsys, "train", "--config", continued(run, tmp_path), "--workdir", run)
    assert "data" in line and "has changed" in line


def test_a_run_from_before_bpe_had_a_name_goes_on(tiny_run, tmp_path, capsys):
    """`data.tokenizer` was "" where one was trained on the captions: the run folder keeps it."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["tokenizer"] == "bpe"
    config["data"]["tokenizer"] = ""
    (run / "config.json").write_text(json.dumps(config))
    argv = ["train", "--config", str(run / "config.json"), "--workdir", str(run)]
    line = fails(capsys, *argv, "--config.data.tokenizer=bytes")
    assert "data.tokenizer: '' there, 'bytes' here" in line
    assert cli.main([*argv, "--config.data.tokenizer=bpe"]) == 0
    assert "already at step 2 of 2" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["data"]["tokenizer"] == "bpe"


def test_a_spoilt_tokenizer_is_named(capsys, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    sample = ("sample", "--run", run, "--prompt", "x")
    config = json.loads((run / "config.json").read_text())
    config["text"]["vocab_size"] = 300
    (run / "config.json").write_text(json.dumps(config))
    line = fails(capsys, *sample)
    assert "tokenizer.json has" in line and "text.vocab_size is 300" in line
    (run / "tokenizer.json").write_text("{")
    assert "tokenizer.json is no tokenizer" in fails(capsys, *sample)
    (run / "tokenizer.json").unlink()
    assert "tokenizer.json cannot be read" in fails(capsys, *sample)


def test_a_full_disk_stops_before_writing(tiny_run, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    line = fails(capsys, "train", "--config", continued(run, tmp_path), "--workdir", run)
    assert "no space left" in line
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_export_does_not_write_into_a_folder_that_is_not_empty(capsys, tiny_run, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    assert str(tmp_path) in fails(capsys, "export", "--run", tiny_run, "--out", tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_real_videos_train_at_native_shapes(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, height, width in (("wide.mp4", 48, 80), ("tall.mp4", 64, 32)):
        write(folder / name, numbered(12, height, width), fps=8)
        (folder / name).with_suffix(".txt").write_text(f"a {name} clip")
    argv = ["train", "--config", CLIPS, "--workdir", str(tmp_path / "w"), f"--config.data.path={folder}"]
    small = ("vae.model.base_width=8", "vae.optim.optimizer=adamw", "vae.train.steps=2", "vae.data.stages=()",
             "vae.data.batch=8", "vae.data.max_frames=5", "vae.data.crop=(5,32,32)", "model.num_layers=1",
             "model.ffn_dim=128", "text.num_layers=1", "optim.optimizer=adamw", "train.steps=2", "train.unroll=False",
             "data.max_frames=5", "data.row_tokens=64", "data.row_text=64", "data.batch=8", "eval.every=0")  # fmt: skip
    assert cli.main(argv + [f"--config.{override}" for override in small]) == 0
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["loss"] > 0


@pytest.mark.parametrize("verb", ["quickstart", "train", "encode", "sample", "evaluate", "export"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([verb, "--help"])
    assert done.value.code == 0 and "usage" in capsys.readouterr().out
