"""For how many ranks rows are balanced is a property of the run: another mesh goes on with the same rows."""

import numpy as np
import pytest
from conftest import tiny_config
from labelled_examples import Examples
from random_params import random_params

from sorax import config as config_lib
from sorax import objectives, sharding
from sorax.errors import UserError
from sorax.vae import VAE, VAEConfig


def started(workdir, config, **mesh):
    """The config of a run as it starts, or goes on, on a mesh."""
    config = config.copy_and_resolve_references()
    objectives.complete(config)
    config = objectives.keep_ranks(config, str(workdir), sharding.make_mesh(**mesh))
    config_lib.save_config(config, str(workdir), objectives.complete)
    return config


def test_ranks_are_those_of_the_mesh_that_the_run_started_on(tmp_path):
    config = tiny_config("data.batch=8")
    assert started(tmp_path, config, data=4, fsdp=2).data.ranks == 8
    for mesh in (dict(data=2, tensor=4), dict(data=1, context=8), dict(data=8)):
        assert started(tmp_path, config, **mesh).data.ranks == 8
    assert config_lib.read_config(str(tmp_path)).data.ranks == 8
    assert "ranks" not in config.data or not config.data.ranks  # the caller's own is left alone


def test_ranks_that_are_given_are_kept_and_cannot_change(tmp_path):
    assert started(tmp_path / "a", tiny_config("data.batch=8"), data=8).data.ranks == 8
    wanted = tiny_config("data.batch=8")
    with wanted.data.unlocked():
        wanted.data.ranks = 4
    assert started(tmp_path / "b", wanted, data=8).data.ranks == 4
    (tmp_path / "a" / "checkpoints" / "100").mkdir(parents=True)
    with pytest.raises(UserError, match=r"another config .*ranks"):
        started(tmp_path / "a", wanted, data=8)


def test_a_batch_that_the_mesh_cannot_share_is_refused(tmp_path):
    config = tiny_config("data.batch=8")
    with config.data.unlocked():
        config.data.batch, config.data.ranks = 4, 2
    with pytest.raises(UserError, match="batch is 4 rows, which 8 data-parallel ranks cannot share"):
        objectives.dit_objective(config, str(tmp_path), sharding.make_mesh(data=8))


def test_another_mesh_has_the_same_data(tmp_path, monkeypatch, capsys):
    config = tiny_config("data.batch=8", "data.row_tokens=64", "data.row_text=64", "model.patch_size=(1, 2, 2)")
    vae_config = config_lib.build(VAEConfig, config.vae.model, "model")
    vae = vae_config, random_params(VAE, vae_config)[1], "none"
    examples = Examples(40)
    examples.identity = "these"
    monkeypatch.setattr(objectives, "prepare_vae", lambda *_: vae)
    monkeypatch.setattr(objectives, "prepare_data", lambda *_: (None, examples, examples))
    made = {}
    for name, mesh in (("8", dict(data=8)), ("2", dict(data=2, tensor=4)), ("fresh 2", dict(data=2, tensor=4))):
        here = sharding.make_mesh(**mesh)
        folder = tmp_path / name.split()[0] if name == "fresh 2" else tmp_path / "run"
        made[name] = objectives.dit_objective(started(folder, config, **mesh), str(folder), here)
    assert "balanced for 8 data-parallel ranks, as when the run began; here are 2" in capsys.readouterr().out
    assert made["8"].identity == made["2"].identity != made["fresh 2"].identity
    batches = [next(iter(made[name].batches(3))) for name in ("8", "2")]
    np.testing.assert_array_equal(batches[0]["tokens"], batches[1]["tokens"])
