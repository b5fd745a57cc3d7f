"""Several processes train as one does: the same rows, parameters and numbers; and none is left waiting for the dead."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import QUICKSTART, TINY, xla_flags
from jax.sharding import SingleDeviceSharding
from random_params import assert_close

from sorax import processes, sharding
from sorax.errors import UserError

STEPS, SAVED = 4, 2
SMALL = (
    *TINY, "model.num_layers=1", "data.world.num_samples=16", "data.val_samples=4", "data.batch=4", "data.ranks=2",
    "mesh.data=1", "mesh.fsdp=2", "mesh.context=2", f"train.steps={STEPS}", "train.log_every=1",
    f"checkpoint.every={SAVED}", "checkpoint.keep=2",
    # Adam divides by the size of the gradient: a large eps keeps it from blowing up the rounding of one near zero.
    "optim.eps=1e-3", "optim.lr=1e-2",
)  # fmt: skip


def start(workdir, count, devices, *overrides):
    """Popen of so many processes of `sorax train`, of so many devices each; their output goes to files."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = dict(os.environ, XLA_FLAGS=xla_flags(devices), PYTHONPATH=str(pathlib.Path(__file__).parents[1]))
    command = [sys.executable, "-m", "sorax.cli", "train", "--config", str(QUICKSTART), "--workdir", str(workdir)]
    command += [f"--config.{setting}" for setting in (*SMALL, *overrides)]
    running = []
    for k in range(count):
        several = ["--coordinator", address, "--processes", str(count), "--process", str(k)] if count > 1 else []
        with open(f"{workdir}.{k}.log", "w") as log:
            running.append(subprocess.Popen([*command, *several], env=environment, stdout=log, stderr=log))
    return running


def run(workdir, count, devices, *overrides):
    running = start(workdir, count, devices, *overrides)
    for k, process in enumerate(running):
        assert process.wait(timeout=560) == 0, pathlib.Path(f"{workdir}.{k}.log").read_text()[-4000:]
    return workdir


def parameters(workdir, step):
    folder, reader = os.path.join(workdir, "checkpoints", str(step), "params"), ocp.StandardCheckpointer()
    place = SingleDeviceSharding(jax.devices()[0])  # wherever they were
    there = reader.metadata(folder).item_metadata.tree
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), there)
    return jax.device_get(reader.restore(folder, shapes))


def metrics(workdir):
    """Lines of metrics.jsonl; in place of rates, which depend on time, what was counted in a step."""
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        seconds = row.pop("step_seconds", 0)  # evaluations have none
        row |= {name: value * seconds for name, value in row.items() if name.endswith("_per_s")}
    return rows


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """Function (processes, devices of each) -> the folder of a finished run; rows are over 2 devices, tokens over 2."""
    folder, done = tmp_path_factory.mktemp("processes"), {}

    def finished(count, devices):
        if count not in done:
            done[count] = run(folder / str(count), count, devices, f"vae.path={tiny_run}/vae")
        return done[count]

    return finished


@pytest.mark.parametrize("count, devices", [(2, 2), (4, 1)])
def test_processes_train_to_the_parameters_of_one(runs, count, devices):
    """Of two each has rows of its own; of four two and two share them. The numbers that are written are of all."""
    alone, together = runs(1, 4), runs(count, devices)
    assert_close(parameters(together, STEPS), parameters(alone, STEPS))
    assert [row["step"] for row in metrics(together)] == list(range(1, STEPS + 1))
    assert_close(metrics(together), metrics(alone))


def test_a_run_of_two_processes_goes_on_as_one(runs, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(runs(2, 2), workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    run(workdir, 1, 4, f"vae.path={tiny_run}/vae")
    assert_close(parameters(workdir, STEPS), parameters(runs(1, 4), STEPS))
    assert [row["step"] for row in metrics(workdir)] == list(range(1, STEPS + 1))


def test_two_processes_train_a_vae_encode_train_and_sample(tmp_path):
    """All that a run does, with evaluation on the way; only the first process writes and prints."""
    workdir = run(tmp_path / "run", 2, 1, "mesh.context=1", "train.steps=2", "eval.every=1", "eval.num_videos=1")
    assert {"val_loss", "val_loss_sigma_0.5"} < set(metrics(workdir)[0])
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == [f"step_000000{k}.png" for k in range(3)]
    assert "train DiT: 2/2" in pathlib.Path(f"{workdir}.0.log").read_text()
    assert "train DiT" not in pathlib.Path(f"{workdir}.1.log").read_text()


def test_when_one_process_ends_the_others_end(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    running = start(workdir, 2, 1, f"vae.path={tiny_run}/vae", "mesh.context=1", "train.steps=1000000")
    try:
        deadline = time.monotonic() + 200
        while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and all(process.poll() is None for process in running)
            time.sleep(0.2)
        running[1].send_signal(signal.SIGTERM)
        assert running[1].wait(timeout=60) == 130
        assert running[0].wait(timeout=2 * processes.HEARTBEAT_SECONDS) != 0
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(coordinator="localhost:1"), "--coordinator HOST:PORT, --processes and --process together"),
        (dict(processes=2), "together"),
        (dict(process=1, processes=1), "together"),
        (dict(coordinator="localhost:1", processes=2, process=2), "--process 2 of --processes 2: .* from 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        processes.start(**given)


def mesh_of(owners):
    """A mesh of the processes that own its devices."""
    devices = np.vectorize(lambda owner: types.SimpleNamespace(process_index=owner), otypes=[object])(owners)
    return types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, devices.shape)))


def test_a_process_reads_the_rows_of_its_devices_wherever_they_are():
    assert sharding.row_shares(mesh_of(np.array([0, 0, 1, 1]).reshape(2, 2, 1, 1))) == ((0, 1), 1)
    assert sharding.row_shares(mesh_of(np.array([1, 0, 1, 0]).reshape(2, 2, 1, 1))) == ((1, 3), 1)
    assert sharding.row_shares(mesh_of(np.array([0, 1, 2, 3]).reshape(1, 2, 2, 1))) == ((0,), 2)
    with pytest.raises(UserError, match="share some of their rows"):
        sharding.row_shares(mesh_of(np.array([0, 0, 1, 1, 1, 1]).reshape(1, 2, 3, 1)))
