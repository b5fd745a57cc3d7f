"""Captions that were embedded beforehand train the DiT as a frozen text encoder on the fly does."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.latent_records import EMPTY_CAPTION
from data_pipelines.latent_shards import LatentShards, verify
from data_pipelines.text_tokens import Tokenizer
from sorax import sharding
from sorax.cli import main
from sorax.config import load_config
from sorax.errors import UserError
from sorax.import_wan import import_run
from sorax.objectives import complete, make_objective
from sorax.runs import load_run
from sorax.text_embeds import FrozenText
from sorax.train import train

WAN = pathlib.Path(__file__).parent / "fixtures" / "wan"
SMALL = ("data.path=world", "data.batch=8", "data.row_tokens=64", "data.row_text=128", "data.val_samples=4",
         "train.remat=none", "train.steps=2", "flow.caption_dropout=0.4", "eval.num_steps=1", "eval.num_videos=1",
         "eval.every=2", "mesh.data=4", "mesh.fsdp=2")  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Folder of a run of imported weights, whose text encoder is frozen; its tokenizer is that of bytes."""
    folder = tmp_path_factory.mktemp("imported")
    shutil.copytree(WAN, folder / "wan")
    shutil.rmtree(folder / "wan" / "tokenizer")
    Tokenizer.of_bytes().save(folder / "wan" / "tokenizer")
    run = import_run(folder / "wan", folder / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["world"] = dict(num_samples=8, shapes=((5, 32, 32),), fps=8.0)
    (run / "config.json").write_text(json.dumps(config))
    return run


def config_of(run, *overrides):
    return load_config(f"{run}/config.json", SMALL + overrides, complete)


@pytest.fixture(scope="module")
def objectives(imported, tmp_path_factory):
    """The objective with the encoder on the fly, and with embeddings that were kept."""
    made = []
    for stored in ("false", "true"):
        run = tmp_path_factory.mktemp("runs") / "run"
        shutil.copytree(imported, run)
        config = config_of(run, f"data.text_embeds={stored}")
        made.append(make_objective(config, str(run), sharding.make_mesh(data=4, fsdp=2)))
    return made


def test_stored_embeddings_give_the_loss_and_gradient_of_the_frozen_encoder(objectives):
    """Some captions are dropped. To 2e-3: what is stored is rounded to bfloat16, whose steps are 2^-8."""
    made, mesh = [], sharding.make_mesh(data=4, fsdp=2)
    for objective in objectives:
        places = sharding.shardings_for(jax.eval_shape(objective.init, jax.random.key(0)), mesh)
        params = objective.start(jax.jit(objective.init, out_shardings=places)(jax.random.key(0)))
        batch = sharding.put_batch(next(objective.batches(0)), mesh)

        def total(params, batch, constants, loss=objective.loss):
            return loss(params, batch, jax.random.key(1), 0, constants)["loss"][0]

        made.append(jax.jit(jax.value_and_grad(total))(params, batch, objective.constants))
    (loss, grads), (stored_loss, stored_grads) = made
    np.testing.assert_allclose(stored_loss, loss, rtol=2e-3)
    for a, b in zip(jax.tree.leaves(stored_grads), jax.tree.leaves(grads), strict=True):
        assert np.abs(a - b).max() <= 2e-2 * max(np.abs(b).max(), 1e-3)
    text = stored_grads["dit"]["text_in"]["kernel"]
    assert np.abs(text).max() > 1e-3  # the captions are read


def test_the_encoder_is_not_there_in_training(objectives):
    on_the_fly, stored = objectives
    assert set(on_the_fly.constants) == {"text"} and set(stored.constants) == {"empty_caption"}
    batches = [next(objective.batches(0)) for objective in objectives]
    assert set(batches[1]) - set(batches[0]) == {"text_embeds"}
    np.testing.assert_array_equal(batches[0]["text_tokens"], batches[1]["text_tokens"])
    empty = batches[1]["text_tokens"] == 0
    assert not batches[1]["text_embeds"][empty].any() and batches[1]["text_embeds"][~empty].any(-1).all()


def test_what_sorax_encode_stores_trains_and_is_refused_with_another_encoder(imported, tmp_path):
    run, latents = tmp_path / "run", tmp_path / "latents"
    shutil.copytree(imported, run)
    flags = [f"--config.{x}" for x in (*SMALL, "data.text_embeds=true")]
    assert main(["encode", "--config", f"{run}/config.json", "--out", str(latents), *flags]) == 0
    shards = LatentShards(latents, text_embeds=True)
    text = FrozenText(config_of(run), str(run))
    assert shards.text_width == text.config.width and shards.metadata["text"]["identity"] == text.identity
    sample = shards[0]
    embed = text.embedder()
    np.testing.assert_array_equal(embed([sample["text_tokens"]])[0], sample["text_embeds"])
    assert not verify(latents) and "text_embeds" not in LatentShards(latents)[0]

    overrides = (f"data.path=shards:{latents}", "data.text_embeds=true")
    train(config_of(run, *overrides), str(run))
    assert load_run(str(run)).step == 2

    other = tmp_path / "other"
    shutil.copytree(imported, other)
    file = next((other / "imported" / "text_encoder").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["shared.weight"] = tensors["shared.weight"] * 2
    file.unlink()  # a link to the original
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"embeddings of the text encoder .* but that of config\.init is"):
        train(config_of(other, *overrides), str(other))
    (latents / EMPTY_CAPTION).write_bytes(b"x")
    assert any(EMPTY_CAPTION in problem for problem in verify(latents))


def test_latents_without_embeddings_are_refused_where_they_are_asked_for(imported, tmp_path):
    run, latents = tmp_path / "run", tmp_path / "latents"
    shutil.copytree(imported, run)
    flags = [f"--config.{x}" for x in SMALL]
    assert main(["encode", "--config", f"{run}/config.json", "--out", str(latents), *flags]) == 0
    with pytest.raises(UserError, match=r"holds no embeddings of captions, which config\.data\.text_embeds asks for"):
        train(config_of(run, f"data.path=shards:{latents}", "data.text_embeds=true"), str(run))
    with pytest.raises(UserError, match=r"so it cannot be trained: set config\.train\.freeze"):
        train(config_of(run, "data.text_embeds=true", "train.freeze=[]"), str(run))
