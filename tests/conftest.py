"""Every test sees 8 CPU devices, so that sharding is tested wherever the suite runs; and a run to look at."""

import fcntl
import gc
import os
import pathlib
import signal

import pytest

from sorax.backend import knows_flags, large_pages

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is XLA's; what several tests (or runs of the suite) compile alike is compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Programs that compile faster and run slower, to the same numbers; those of the processes that tests start, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# For pytest-xdist's processes and those that tests start: this one has begun without.
os.environ.update(large_pages())
# What jax traces stays, and the collector would look at all of it again and again: a tenth of a test's time.
gc.set_threshold(50_000, 20, 50)
# A suite that runs in the background of a shell ignores interrupts, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def xla_flags(devices):
    """XLA_FLAGS of a process with so many CPU devices. Loops compile in half the time without the newer emitters, whose
    flag only the releases are told that are known to have it."""
    return f"--xla_force_host_platform_device_count={devices}" + " --xla_cpu_use_fusion_emitters=false" * knows_flags()


if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

# What takes longest goes first, so that no worker is alone with it at the end; pytest-xdist would go by the number of
# tests in a file, of which the slowest have few.
SLOW = (
    "test_train", "test_cli", "test_world_suite", "test_captioner_run", "test_processes", "test_lora", "test_mesh",
    "test_plan", "test_import", "test_video_suite", "test_evaluate_vae", "test_generate", "test_parity",
    "test_export_diffusers", "test_routing", "test_attention_kernels", "test_codec", "test_stream", "test_vae",
    "test_parser", "test_distill", "test_modes", "test_windows", "test_text_embeds", "test_exactly_once", "test_app",
    "test_structure",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sorts the tests by file, the slow ones first; a file's own order stays."""
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


def tpu_environment():
    """Environment of a process that compiles for TPUs: libtpu reads XLA_FLAGS too, and stops at what it knows not."""
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {name: value for name, value in os.environ.items() if name not in ours}


QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
TINY = (  # batches of 8, one for each device; one shape, for every shape is compiled
    "vae.model.base_width=8", "vae.optim.optimizer=adamw", "vae.data.stages=()", "vae.data.batch=8",
    "vae.data.world.num_samples=16", "vae.data.world.shapes=((5, 32, 32),)", "vae.train.steps=2",
    "model.num_layers=2", "model.ffn_dim=128", "text.num_layers=1", "optim.optimizer=adamw",
    "data.world.num_samples=32", "data.world.shapes=((5, 32, 32),)", "data.val_samples=32", "data.batch=8",
    "train.steps=2", "train.unroll=false", "eval.every=0", "eval.num_steps=2", "eval.num_clips=4",
)  # fmt: skip


def tiny_config(*overrides):
    """The quickstart experiment, as small as it gets: two steps of a small VAE, then two of a small DiT."""
    from sorax.config import load_config

    return load_config(str(QUICKSTART), TINY + overrides)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Folder of a finished run of `tiny_config()`, its VAE's in `vae`. Shared by all tests: copy it to change it.

    One for all workers of the suite: who comes first trains it, and another waits.
    """
    from sorax.train import train

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    workdir, done = shared / "tiny", shared / "tiny.done"
    with open(shared / "tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            train(tiny_config(), str(workdir))
            done.touch()
    return str(workdir)
