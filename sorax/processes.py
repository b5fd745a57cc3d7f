"""Several processes as one program: how they find each other, wait, add up numbers, and end together."""

import contextlib
import importlib.util
import os
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from sorax.errors import UserError

# A process that is not heard of for so long is dead, and the others end: it takes no longer for a run to fail.
HEARTBEAT_SECONDS = 60
START_SECONDS = 300  # in which all have to be there
# Environment variables of launchers that JAX reads: how many processes they started.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def start(coordinator: str = "", processes: int = 0, process: int = -1):
    """Joins this process with the others of a run; call it before anything else of JAX.

    Without arguments the others are found from the environment: the tasks of Slurm's `srun` or of Open MPI, the workers
    of a TPU pod. Alone, nothing happens. Only the first process prints; all write errors.

    Args:
        coordinator: HOST:PORT of process 0, free there. processes: how many there are; 1 never looks for others.
        process: number of this one, from 0.

    Raises:
        UserError: arguments that do not fit, or the others did not come in time.
    """
    given = (bool(coordinator), processes > 1, process >= 0)
    if any(given) and not all(given) and not (processes == 1 and process in (-1, 0)):
        raise UserError("several processes need --coordinator HOST:PORT, --processes and --process together")
    if all(given) and process >= processes:
        raise UserError(f"--process {process} of --processes {processes}: they are numbered from 0")
    if processes == 1 or not (all(given) or _launched()):
        return
    # The service would take SIGTERM for itself; here it ends the process, and so the run.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = (coordinator, processes, process) if all(given) else ()
    try:
        jax.distributed.initialize(
            *where, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not find each other ({error}): start all of them within "
                        f"{START_SECONDS} s, with --coordinator, --processes and --process; --processes 1 runs "
                        "alone") from error  # fmt: skip
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)


def _launched():
    if any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS):
        return True
    # A TPU machine may be one worker of a pod: JAX asks the machine.
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    there = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" in wanted and there and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this process writes what is written once: the config, metrics, samples."""
    return jax.process_index() == 0


def count() -> int:
    """How many processes work together."""
    return jax.process_count()


def wait(name: str):
    """Returns when all processes have called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str):
    """The first process runs the body alone, then the others: they find what it has made."""
    if not is_first():
        wait(name)
    yield
    if is_first():
        wait(name)


def total(counts: dict) -> dict:
    """Sums of numbers over processes, all of which call it with the same names."""
    if jax.process_count() == 1:
        return counts
    parts = multihost_utils.process_allgather(exact(np.array([counts[name] for name in sorted(counts)], np.float64)))
    return dict(zip(sorted(counts), np.asarray(parts).sum(axis=(0, 2), dtype=np.float64).tolist()))


def exact(values):
    """float32 `[..., 2]` whose sums are float64 values (to 48 bits), since JAX passes no float64 between processes."""
    high = values.astype(np.float32)
    return np.stack([high, (values - high).astype(np.float32)], axis=-1)


def whole(tree):
    """Every array of a tree as numpy, gathered from all processes, which all call it."""

    def gather(x):
        local = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if local else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)


def of_first(tree):
    """The first process's arrays (numpy) of a tree: what each has measured need not be equal to the last bit."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def leave(code: int):
    """Ends this process at once, after an error, with an exit code.

    The usual way out waits for the others, who wait for this one. They end when its connections break, or at the latest
    after HEARTBEAT_SECONDS.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
