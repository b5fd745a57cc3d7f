"""What a video's latents are scaled by; and whole data sets as latent shards, however and wherever they are made."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICKSTART, TINY, tiny_config, xla_flags
from flax import nnx
from random_params import random_params
from video_files import numbered, write

from data_pipelines.latent_shards import LatentShards, verify
from data_pipelines.rows import RowSource
from data_pipelines.survey import survey
from data_pipelines.text_tokens import Tokenizer
from data_pipelines.world import World, WorldConfig
from sorax import encode
from sorax.cli import main
from sorax.dit_data import encode_experiment, prepare_data
from sorax.encode import Codec, encode_source
from sorax.errors import UserError
from sorax.evaluate import load_splits
from sorax.objectives import complete
from sorax.runs import load_run, load_vae
from sorax.sharding import local_mesh, video_sharding
from sorax.stream import programs
from sorax.vae import VAE, VAEConfig

CONFIG = VAEConfig(base_width=4, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=3,
                   temporal_downsample=(True,))  # fmt: skip
GRAPH, PARAMS = random_params(VAE, CONFIG)


def videos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for shape in ((5, 8, 8, 3), (1, 8, 12, 3), (5, 8, 8, 3))]


def test_statistics_are_those_of_latents_drawn_from_the_posterior():
    mean, std = Codec(CONFIG, PARAMS).statistics(videos())
    encode = jax.jit(lambda video: nnx.merge(GRAPH, PARAMS).encode(video))
    draws = []
    for i, video in enumerate(videos()):
        m, logvar = encode(jnp.asarray(video, jnp.float32)[None] / 127.5 - 1.0)
        noise = jax.random.normal(jax.random.key(i), (500, *m.shape[1:]))
        draws.append(np.asarray(m + jnp.exp(0.5 * logvar) * noise).reshape(-1, 3))
    draws = np.concatenate(draws)
    np.testing.assert_allclose(mean, draws.mean(0), atol=0.02 * draws.std())
    np.testing.assert_allclose(std, draws.std(0), rtol=0.02)


def test_a_channel_that_the_vae_leaves_unused_is_not_scaled_up():
    quant = jax.tree.map(jnp.copy, PARAMS["quant_conv"])
    # Channel 1: means of a thousandth, draws of variance 1.
    kernel = quant["kernel"].at[..., 1].multiply(1e-3).at[..., 4].set(0.0)
    bias = quant["bias"].at[jnp.array([1, 4])].set(0.0)
    params = dict(PARAMS, quant_conv=dict(kernel=kernel, bias=bias))
    mean, std = Codec(CONFIG, params).statistics(videos())
    np.testing.assert_allclose(std[1], 1.0, atol=1e-2)
    latents = Codec(CONFIG, dict(params, latents_mean=mean, latents_std=std)).encode(videos())
    assert all(np.abs(z[..., 1]).max() < 0.05 for z in latents)


# --- Latent shards

SHAPES = ((5, 8, 8), (5, 8, 8), (1, 8, 12))
TOKENIZER = Tokenizer.train(["a red circle moving right", "a blue square, still"], 300)


def world(count=20, **settings):
    return World(WorldConfig(num_samples=count, shapes=SHAPES, **settings))


def encoded(folder, source=None, num_shards=3, **options):
    options = dict(num_shards=num_shards, **options)
    return encode_source(Codec(CONFIG, PARAMS), source or world(), TOKENIZER, str(folder), "train", "vae", **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    encoded(folder)
    return folder


def test_latents_keep_captions_of_all_kinds_and_rows_draw_from_them(tmp_path):
    source = world(kinds=("short", "detailed"))
    examples = encoded(tmp_path, source)
    assert verify(tmp_path) == [] and examples.caption_kinds == ("short", "detailed")
    record, captions = examples.record(3), source.captions(3)
    assert {kind: record[f"caption_{kind}"] for kind in captions} == captions
    rows = RowSource(examples, row_tokens=512, row_text=8192, batch_size=1, seed=0, patch_size=(1, 1, 1),
                     mix={"detailed": 0.5, "caption": 0.5})  # fmt: skip
    row, seen = rows[0], set()
    for place, i in enumerate(rows.samples(0).tolist(), 1):
        text = TOKENIZER.decode(row["text_tokens"][row["text_segment_ids"] == place])
        seen.add(text == source.captions(i)["detailed"])
        assert text in (source.spec(i).caption, source.captions(i)["detailed"])
    assert seen == {True, False}


def test_shards_hold_the_latents_captions_and_shapes_of_the_source(shards):
    source, examples = world(), LatentShards(shards)
    assert verify(shards) == [] and len(examples) == len(source)
    text = (shards / "tokenizer.json").read_text()
    (shards / "tokenizer.json").write_text("broken")
    assert any("tokenizer.json is no tokenizer" in problem for problem in verify(shards))
    (shards / "tokenizer.json").write_text(text)
    expected = Codec(CONFIG, PARAMS).encode([source[i]["video"] for i in range(len(source))])
    for i, latents in enumerate(expected):
        spec, record = source.spec(i), examples.record(i)
        # bfloat16 has 8 bits: a rounding is at most 2^-8 of the mean that was rounded.
        size = np.abs(latents * PARAMS["latents_std"] + PARAMS["latents_mean"]) / PARAMS["latents_std"]
        assert (np.abs(examples[i]["latents"] - latents) <= 2.0**-8 * size + 1e-5).all()
        assert tuple(examples.shapes[i]) == latents.shape[:3]
        assert tuple(examples.video_shapes[i]) == (spec.num_frames, spec.height, spec.width)
        assert (record["caption"], record["key"], record["fps"]) == (spec.caption, spec.key, spec.fps)
        np.testing.assert_array_equal(examples[i]["text_tokens"], TOKENIZER.encode(spec.caption))
    assert Tokenizer.load(shards).identity == TOKENIZER.identity == examples.metadata["tokenizer"]


def test_every_shape_is_compiled_once_for_all_data_sets(shards, tmp_path):
    program = programs(CONFIG, video_sharding(local_mesh(), 4, 4))[encode.ENCODE]
    size = program._cache_size()  # `shards` has been encoded before
    encoded(tmp_path / "a", world(3), num_shards=1)
    assert program._cache_size() == size == len(set(SHAPES))


def test_samples_too_long_for_a_batch_are_encoded_in_chunks(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIXELS_A_BATCH", 8 * 8 * 3)
    encoded(tmp_path / "a", world(3), num_shards=1)
    for whole, chunked in zip(LatentShards(shards), LatentShards(tmp_path / "a")):
        np.testing.assert_allclose(chunked["latents"], whole["latents"], atol=2.0**-7 * np.abs(whole["latents"]).max())


class Failing:
    """A source that cannot be read from some sample on, and that remembers what was read."""

    def __init__(self, source, ends):
        self.source, self.ends, self.read = source, ends, []

    def __len__(self):
        return len(self.source)

    def spec(self, i):
        return self.source.spec(i)

    def __getitem__(self, i):
        if i >= self.ends:
            raise UserError(f"sample {i} is gone")
        self.read.append(i)
        return self.source[i]


def test_what_was_stopped_goes_on_and_what_is_there_is_not_made_again(shards, tmp_path):
    with pytest.raises(UserError, match="is gone"):
        encoded(tmp_path, Failing(world(), ends=13))
    again = Failing(world(), ends=100)
    encoded(tmp_path, again)
    assert sorted(again.read) == list(range(13, 20))  # the third shard of 20 samples
    assert contents(tmp_path) == contents(shards)
    encoded(tmp_path, Failing(world(), ends=0))


def test_latents_of_other_data_are_replaced_only_if_asked(shards, tmp_path):
    encoded(tmp_path)
    with pytest.raises(UserError, match="delete it first"):
        encoded(tmp_path, world(seed=1))
    assert contents(tmp_path) == contents(shards)
    examples = encoded(tmp_path, world(seed=1), replace=True)
    assert examples.caption(0) == world(seed=1).spec(0).caption and verify(tmp_path) == []


def test_videos_and_captions_that_do_not_fit_are_named_before_any_is_encoded(tmp_path):
    class Odd(Failing):
        def spec(self, i):
            return self.change(self.source.spec(i), i)

    odd = Odd(world(), ends=0)
    odd.change = lambda spec, i: type(spec)(**{**vars(spec), "height": 9 if i == 7 else spec.height})
    with pytest.raises(UserError, match=f"{world().spec(7).key} cannot be encoded: .*multiples of 2"):
        encoded(tmp_path, odd)
    odd.change = lambda spec, i: type(spec)(**{**vars(spec), "caption": "red " * 600 if i == 5 else spec.caption})
    with pytest.raises(UserError, match=f"the caption of {world().spec(5).key} has"):
        encoded(tmp_path, odd)
    assert not list(tmp_path.iterdir())


def test_the_identity_is_that_of_everything_the_records_depend_on(shards, tmp_path):
    class Weighted(Failing):
        weights = np.full(20, 2.0)

    made = [
        LatentShards(shards).identity,
        encoded(tmp_path / "data", world(seed=1)).identity,
        encode_source(Codec(CONFIG, PARAMS), world(), TOKENIZER, str(tmp_path / "vae"), "train", "other").identity,
        (weighted := encoded(tmp_path / "weights", Weighted(world(), ends=20))).identity,
    ]
    assert len(set(made)) == 4 and weighted.weights.tolist() == [2.0] * 20
    assert survey(world()).identity == survey(world()).identity


# Run by each of several processes: argv is folder, coordinator, number of processes, process.
ONE_OF_SEVERAL = """
import sys
import jax
folder, coordinator, processes, process = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if processes > 1:
    jax.distributed.initialize(coordinator, processes, process)
from test_encode import encoded
examples = encoded(folder)
assert len(examples) == 20 and jax.process_count() == processes
"""


def run_processes(folder, count):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    tests = pathlib.Path(__file__).parent
    environment = dict(os.environ, XLA_FLAGS=xla_flags(8), PYTHONPATH=f"{tests.parent}{os.pathsep}{tests}")
    command = [sys.executable, "-c", ONE_OF_SEVERAL, str(folder), address, str(count)]
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [subprocess.Popen([*command, str(k)], **options) for k in range(count)]
    for process in running:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out


def test_two_processes_write_the_bytes_of_one(tmp_path):
    run_processes(tmp_path / "one", 1)
    run_processes(tmp_path / "two", 2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert verify(tmp_path / "two") == []


# --- Training from them


@pytest.fixture(scope="module")
def from_shards(tiny_run, tmp_path_factory):
    """Latents of the tiny run's data, made by the command line with its VAE."""
    out = str(tmp_path_factory.mktemp("encoded") / "latents")
    overrides = [f"--config.{setting}" for setting in TINY]
    assert main(["encode", "--config", str(QUICKSTART), "--vae", tiny_run, "--out", out, *overrides]) == 0
    return out


def prepared(workdir, tiny_run, *overrides):
    config = tiny_config(f"vae.path={tiny_run}/vae", *overrides)
    complete(config)  # as the command line and training do
    vae_config, params, identity = load_vae(config.vae.path)
    os.makedirs(workdir, exist_ok=True)
    return prepare_data(config, str(workdir), Codec(vae_config, params), identity)


def test_rows_of_shards_are_those_of_encoding_in_process(tiny_run, from_shards, tmp_path):
    (tokenizer, *now), (other, *before) = (
        prepared(tmp_path / "now", tiny_run), prepared(tmp_path / "before", tiny_run, f"data.path=shards:{from_shards}")
    )  # fmt: skip
    assert tokenizer.identity == other.identity == Tokenizer.load(tmp_path / "before").identity
    for a, b in zip(now, before):
        assert a.identity == b.identity
        rows = [RowSource(x, row_tokens=48, row_text=48, max_segments=8, batch_size=8, patch_size=(1, 4, 4), seed=3)
                for x in (a, b)]  # fmt: skip
        for r in range(12):
            one, two = rows[0][r], rows[1][r]
            assert all(np.array_equal(one[name], two[name]) for name in one)
    assert contents(tmp_path / "now" / "latents") == contents(from_shards)
    assert not (tmp_path / "before" / "latents").exists()


def test_a_run_from_shards_is_sampled_and_evaluated_like_one_that_encodes(tiny_run, from_shards, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir, ignore=shutil.ignore_patterns("latents"))
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = f"shards:{from_shards}"
    (workdir / "config.json").write_text(json.dumps(config))
    made, here = load_run(str(workdir)), load_run(tiny_run)
    assert made.usual_shape() == here.usual_shape() == (5, 32, 32, 6.0)
    # What is evaluated are the videos that the latents were made of.
    found, expected = (load_splits(run.config.data, run.networks.vae_config, 2, 16) for run in (made, here))
    assert {name: clips.identity for name, clips in found.items()} == {n: c.identity for n, c in expected.items()}


def test_shards_of_another_vae_are_refused(tiny_run, from_shards, tmp_path):
    config = tiny_config(f"vae.path={tiny_run}/vae", f"data.path=shards:{from_shards}")
    with pytest.raises(UserError, match=r"holds latents of the VAE .* but config.vae is other: set config\.vae\.path"):
        prepare_data(config, str(tmp_path), Codec(CONFIG, PARAMS), "other")


def test_shards_without_a_vae_to_decode_with_are_refused(from_shards, tmp_path, capsys):
    overrides = [f"--config.{setting}" for setting in (*TINY, f"data.path=shards:{from_shards}")]
    assert main(["train", "--config", str(QUICKSTART), "--workdir", str(tmp_path), *overrides]) == 2
    assert "config.vae.path is empty" in capsys.readouterr().err


def test_a_run_keeps_the_tokenizer_of_its_latents(tiny_run, from_shards, tmp_path):
    TOKENIZER.save(tmp_path)
    with pytest.raises(UserError, match=r"another tokenizer\.json than the latents"):
        prepared(tmp_path, tiny_run, f"data.path=shards:{from_shards}")


def test_validation_looks_where_the_config_says(tiny_run, from_shards, tmp_path):
    """At the split "val" of latents; where there is none, at the first training samples; or at `val_path`."""
    assert len(LatentShards(from_shards, "val")) == 32
    val = prepared(tmp_path / "a", tiny_run, f"data.path=shards:{from_shards}", "data.val_samples=7")[2]
    assert (len(val), val.split) == (7, "val")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name, data in contents(from_shards).items():
        if not name.startswith(("val.", "latents-val")):
            (alone / name).write_bytes(data)
    val = prepared(tmp_path / "b", tiny_run, f"data.path=shards:{alone}", "data.val_samples=5")[2]
    assert (len(val), val.split) == (5, "train")

    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(3):
        write(clips / f"{i}.mp4", numbered(5, 32, 32))
        (clips / f"{i}.txt").write_text(f"clip {i}")
    config = tiny_config(f"vae.path={tiny_run}/vae", f"data.path=shards:{alone}", "data.val_samples=2")
    with config.unlocked():
        config.data.update(val_path=str(clips), max_tokens=100)
    vae_config, params, identity = load_vae(f"{tiny_run}/vae")
    val = prepare_data(config, str(tmp_path / "b"), Codec(vae_config, params), identity)[2]
    assert [val.caption(i) for i in range(len(val))] == ["clip 0", "clip 1"]
    assert val.path == tmp_path / "b" / "latents"


def test_latents_are_made_with_the_tokenizer_that_is_named_so_that_they_can_be_mixed(tiny_run, from_shards, tmp_path):
    config = tiny_config(f"vae.path={tiny_run}/vae", "data.world.fps=3.0", "data.world.num_samples=6")
    encode_experiment(config, "", str(tmp_path / "same"), num_shards=2, tokenizer=from_shards)
    encode_experiment(config, "", str(tmp_path / "other"))

    def mixed(folder, workdir):
        config = tiny_config(f"vae.path={tiny_run}/vae")
        with config.unlocked():
            config.data.mixture = [dict(path=f"shards:{from_shards}"), dict(path=f"shards:{folder}", weight=0.5)]
        vae_config, params, identity = load_vae(f"{tiny_run}/vae")
        os.makedirs(workdir)
        return prepare_data(config, str(workdir), Codec(vae_config, params), identity)

    tokenizer, examples, val = mixed(tmp_path / "same", tmp_path / "a")
    assert tokenizer.identity == Tokenizer.load(from_shards).identity
    assert (len(examples), len(val)) == (32 + 6, 32) and examples.weights.tolist() == [1.0] * 32 + [0.5] * 6
    with pytest.raises(UserError, match=f"encoded with another tokenizer .* --tokenizer {from_shards}"):
        mixed(tmp_path / "other", tmp_path / "b")


def test_the_command_line_checks_latents(from_shards, tmp_path, capsys):
    assert main(["encode", "--verify", from_shards]) == 0
    assert "every shard and record is as it was written" in capsys.readouterr().out
    for name, data in contents(from_shards).items():
        (tmp_path / name).write_bytes(data)
    shard = next(tmp_path.glob("latents-train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["encode", "--verify", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"{shard.name}: has" in printed.out and "delete the files named there" in printed.err
    assert main(["encode", "--out", str(tmp_path)]) == 2
    assert "needs --config and --out" in capsys.readouterr().err
