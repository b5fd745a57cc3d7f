"""The training loop: what is interrupted and resumed is what would have been, and micro-batches are the whole batch."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import tiny_config

from sorax import cli, objectives, processes, sharding
from sorax import config as config_lib
from sorax.checkpoint import ITEMS
from sorax.errors import UserError
from sorax.optim import OptimConfig, make_tx
from sorax.runlog import RunLog, Trace
from sorax.runs import load_vae
from sorax.train import TrainConfig, TrainState, _rates, make_step, train

STEPS, SAVED, INTERRUPTED = 4, 2, 3  # the third step is lost, and done again
KEEPING = f"every={SAVED}", "keep=2"
TIMING = ("_per_s", "step_seconds", "mfu")  # the only metrics that may differ


def interrupt(workdir, config, monkeypatch):
    """Trains until Ctrl-C comes in the step after the lost one; the checkpoint before is on the disk then, even if it
    was still being written."""
    make = objectives.make_objective

    def interrupted_objective(*args):
        objective = make(*args)

        def batches(step):
            assert step == 0
            for done, batch in enumerate(objective.batches(step)):
                if done == INTERRUPTED:
                    raise KeyboardInterrupt
                yield batch

        return dataclasses.replace(objective, batches=batches)

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "make_objective", interrupted_objective)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)
    assert os.listdir(os.path.join(workdir, "checkpoints")) == [str(SAVED)]


def state_of(workdir, step=STEPS):
    """Every array of a checkpoint."""
    folder = os.path.join(workdir, "checkpoints", str(step))
    trees = {name: ocp.StandardCheckpointer().restore(os.path.join(folder, name)) for name in ITEMS}
    return jax.tree.map(np.asarray, trees)


def metrics_of(workdir):
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def assert_same_run(straight, resumed):
    a, b = state_of(straight), state_of(resumed)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    leaves = zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b))
    different = [jax.tree_util.keystr(path) for (path, x), y in leaves if x.tobytes() != y.tobytes()]
    assert not different
    assert any(np.any(x != y) for x, y in zip(*(jax.tree.leaves(t["params"]) for t in (a, state_of(resumed, SAVED)))))
    rows, resumed_rows = (
        [{k: v for k, v in row.items() if not k.endswith(TIMING)} for row in metrics_of(w)] for w in (straight, resumed)
    )
    assert rows == resumed_rows


def assert_metrics_are_complete(workdir):
    """One JSON object a line, each step once and in order, after an interruption too."""
    rows = metrics_of(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert {"loss", "grad_norm", "lr", "step_seconds"} < set(row)
        assert all(np.isfinite(value) for value in row.values())


@pytest.fixture(scope="module")
def vae_config():
    """One step on images, then steps on clips, the last two against a discriminator."""
    config = tiny_config(
        "vae.data.path=world", f"vae.train.steps={STEPS}", "vae.train.log_every=1",
        *[f"vae.checkpoint.{setting}" for setting in KEEPING],
        "vae.data.stages=({'steps': 1, 'batch': 8, 'crop': (1, 0, 0)},)",
    )  # fmt: skip
    config = config.vae.copy_and_resolve_references()
    config.loss.update(adversarial=0.5, adversarial_start=2)
    config.discriminator = dict(base_width=8, num_layers=2)
    return config


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory, vae_config):
    workdir = str(tmp_path_factory.mktemp("vae") / "straight")
    train(vae_config, workdir)
    return workdir


def test_an_interrupted_vae_run_resumes_bit_identical(vae_run, vae_config, tmp_path, monkeypatch):
    workdir = str(tmp_path / "resumed")
    interrupt(workdir, vae_config, monkeypatch)
    train(vae_config, workdir)
    assert_same_run(vae_run, workdir)
    assert_metrics_are_complete(workdir)
    statistics = state_of(workdir)["ema_params"]["vae"]
    assert np.all(statistics["latents_std"] != 1) and np.all(statistics["latents_mean"] != 0)  # measured at the end


def test_an_interrupted_dit_run_resumes_bit_identical(vae_run, tmp_path, monkeypatch):
    """With all that may be switched on: what has a state is checkpointed, what draws goes on where it was."""
    keeping = [f"checkpoint.{setting}" for setting in KEEPING]
    config = tiny_config(f"vae.path={vae_run}", f"train.steps={STEPS}", "train.log_every=1", *keeping)
    config.optim.update(optimizer="schedule_free", schedule="constant", clip_sigmas=3.0)
    config.flow.update(sigma="mode", shift_tokens=8, rising=0.5, skip_share=0.5, skip_layers=(0, 1))
    config.model.update(mup_base_width=64)
    straight, workdir = str(tmp_path / "straight"), str(tmp_path / "resumed")
    train(config, straight)
    interrupt(workdir, config, monkeypatch)
    train(config, workdir)
    assert_same_run(straight, workdir)
    assert_metrics_are_complete(workdir)


def test_a_finished_run_is_left_alone(vae_run, vae_config, capsys):
    before = metrics_of(vae_run)
    train(vae_config, vae_run)
    assert f"already at step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert metrics_of(vae_run) == before


def test_a_vae_that_stopped_before_its_end_has_no_latent_statistics_and_is_refused(vae_run, tmp_path):
    """Also where `train.steps` was lowered to where it stopped."""
    workdir = str(tmp_path / "stopped")
    shutil.copytree(vae_run, workdir)
    shutil.rmtree(os.path.join(workdir, "checkpoints", str(STEPS)))
    with pytest.raises(UserError, match=f"at step {SAVED} of {STEPS}: finish it first"):
        load_vae(workdir)
    config = json.loads((path := pathlib.Path(workdir, "config.json")).read_text())
    config["train"]["steps"] = SAVED
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"not measured: .*--config.train.steps={SAVED + 1}"):
        load_vae(workdir)


def weighted_regression(params, batch, key, step, constants):
    error = jnp.square(batch["x"] @ params["kernel"] - batch["y"]) * batch["weight"]
    return dict(loss=(jnp.sum(error), jnp.sum(batch["weight"])))


def regression(accumulate, batch_size=8):
    """Training step, first state and batch of a linear regression; weights from nothing to everything to predict."""
    rng = np.random.default_rng(0)
    weight = np.resize([0, 0, 1, 0, 5, 2, 1, 1], batch_size)
    batch = dict(x=rng.standard_normal((batch_size, 3)), y=rng.standard_normal(batch_size), weight=weight)
    tx, params = make_tx({"": OptimConfig(lr=0.1, warmup_steps=0)}, 10), dict(kernel=jnp.zeros(3))
    state = TrainState(jnp.int32(0), params, params, tx.init(params), jax.random.key_data(jax.random.key(0)))
    objective = types.SimpleNamespace(loss=weighted_regression, averaged=lambda params: params)
    step = make_step(objective, tx, 0.9, accumulate)
    return step, state, jax.tree.map(np.float32, batch)


def test_accumulated_micro_batches_are_the_whole_batch():
    """Micro-batches weigh what they hold to predict."""

    def run(accumulate):
        step, state, batch = regression(accumulate)
        for _ in range(3):
            state, sums = jax.jit(step)(state, batch, {})
        return state, sums

    whole = run(1)
    assert np.abs(whole[0].params["kernel"]).max() > 0.1
    for accumulate in (2, 4):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(accumulate), whole)


def test_micro_batches_stay_on_their_devices():
    """Rows are not moved between devices: all that is exchanged is the gradient."""
    mesh = sharding.make_mesh(data=8)
    step, state, batch = regression(accumulate=2, batch_size=16)
    places = sharding.shardings_for(state, mesh)
    program = jax.jit(step, in_shardings=(places, sharding.batch_sharding(mesh), None), out_shardings=(places, None))
    text = program.lower(state, batch, {}).compile().as_text()
    assert "all-reduce" in text
    assert not re.findall("all-gather|all-to-all|collective-permute", text)


def test_speed_is_what_was_done_over_the_time_it_took():
    work = [dict(tokens=100, useful_tokens=80, model_flops=3e12), dict(tokens=100, useful_tokens=70, model_flops=2e12)]
    rates = _rates(work, seconds=4.0, peak=10e12)
    assert rates == dict(tokens_per_s=50, useful_tokens_per_s=37.5, model_flops_per_s=1.25e12, useful_fraction=0.75,
                         mfu=0.125, step_seconds=2.0)  # fmt: skip
    assert "mfu" not in _rates(work, seconds=4.0, peak=0)  # of a CPU nobody knows the peak
    assert _rates([dict(frames=6)], seconds=2.0, peak=1.0) == dict(frames_per_s=3, step_seconds=2.0)


def test_speed_is_that_of_all_processes(monkeypatch):
    """Two processes with other rows, and two that share the same rows; sums are exact though float32 travels."""
    done = 123_456_789_012_345.0
    other = processes.exact(np.array([done, 7.0]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("sorax.processes.multihost_utils.process_allgather", lambda x: np.stack([x, other]))
    work = [dict(model_flops=done, tokens=5)]
    assert _rates(work, 1.0, 0)["tokens_per_s"] == 12
    assert _rates(work, 1.0, 0)["model_flops_per_s"] == pytest.approx(2 * done, rel=1e-12)
    assert _rates(work, 1.0, 0, same=2)["tokens_per_s"] == 6


def test_a_run_says_how_fast_it_is(vae_run, tiny_run):
    for row in metrics_of(vae_run):
        assert row["frames_per_s"] > 0 and row["model_flops_per_s"] > 0 and "mfu" not in row
    row = metrics_of(tiny_run)[-1]
    assert row["tokens_per_s"] >= row["useful_tokens_per_s"] > 0
    assert row["useful_fraction"] == pytest.approx(row["useful_tokens_per_s"] / row["tokens_per_s"])


def test_a_profile_is_a_trace_in_the_run_folder(tmp_path, monkeypatch):
    """Of the steps that are asked for, counted from where the run goes on."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stopped"))
    log = Trace(str(tmp_path), (2, 4), first=10)
    state, steps = jnp.zeros(2), {}
    with log:
        for step in range(10, 16):
            log.at(step, state)
            steps[step] = len(seen)
    assert steps == {10: 0, 11: 0, 12: 1, 13: 1, 14: 2, 15: 2} and seen == [str(tmp_path / "profile"), "stopped"]
    with pytest.raises(KeyboardInterrupt), Trace(str(tmp_path), (0, 9)) as log:
        log.at(0, state)
        raise KeyboardInterrupt
    assert len(seen) == 4  # a trace that is begun is ended


def test_tensorboard_is_told_every_value_at_once(tmp_path):
    """Without a thread, in which an interrupt could leave a lock that the process then waits for for ever."""
    (tmp_path / "other").mkdir()
    RunLog(str(tmp_path / "other")).close()  # which imports tensorboardX, without PyTorch
    from tensorboardX import event_file_writer
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    before, times = set(threading.enumerate()), iter(range(100, 200))
    for start, steps in ((0, (1, 2)), (1, (2, 3))):  # the second step was lost and is done again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(event_file_writer.time, "time", lambda: next(times))  # files are named by the second
            log = RunLog(str(tmp_path), start)
        for step in steps:
            log.write(step, dict(loss=step / 2, lr=0.5))
    log.video(3, "sample/0", np.zeros((2, 8, 8, 3), np.uint8), 6.0)
    assert set(threading.enumerate()) == before
    found = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data, events = path.read_bytes(), []
        while data:  # length, its CRC, event, its CRC
            size = 12 + int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12:size]))
            data = data[size + 4 :]
        assert events[0].file_version == "brain.Event:2" and events[1].session_log.status == SessionLog.START
        found.append([events[1].step, *((e.step, *(v.simple_value for v in e.summary.value)) for e in events[2:])])
    assert found == [[1, (1, 0.5, 0.5), (2, 1.0, 0.5)], [2, (2, 1.0, 0.5), (3, 1.5, 0.5), (3, 0.0)]]


PROFILED = """
import sys
import jax
from sorax.runlog import Trace
with Trace(sys.argv[1], (0, 1)) as trace:
    trace.at(0, jax.numpy.zeros(2))
    trace.at(1, jax.jit(jax.numpy.sin)(jax.numpy.zeros(2)))
"""


def test_a_profile_is_written(tmp_path):
    """In a process of its own: where libtpu is loaded (by tests of plans), JAX's profiler crashes on a CPU."""
    subprocess.run([sys.executable, "-c", PROFILED, str(tmp_path)], check=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("values, message", [
    (dict(remat="most"), "remat is 'most': use one of none, full, dots, offload"),
    (dict(accumulate=0), "accumulate is 0: it is at least 1"),
])  # fmt: skip
def test_a_train_section_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=f"config section 'train': {message}"):
        config_lib.build(TrainConfig, values, "train")


def test_rows_that_cannot_be_cut_into_micro_batches_are_refused(tmp_path):
    config = tiny_config("mesh.data=2", "mesh.fsdp=1", "mesh.context=4")
    with config.unlocked():
        config.train.accumulate = 3
    with pytest.raises(UserError, match="accumulate is 3, which does not divide the 4 rows of each of 2"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["5", "5:", "3:3", "9:2", "a:b", "-1:4"])
def test_steps_to_profile_are_a_range(text):
    with pytest.raises(UserError, match="10:13"):
        cli._steps(text)
    assert cli._steps("0:2") == (0, 2)
