"""The training loop: one for the VAE and the DiT, which differ by their objective (`sorax/objectives.py`)."""

import contextlib
import dataclasses
import os
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sorax import backend, processes, sharding
from sorax import config as config_lib
from sorax.checkpoint import Checkpoints
from sorax.devices import peak_flops
from sorax.dit import REMAT
from sorax.errors import UserError
from sorax.optim import evaluation_params, learning_rate, make_tx, update_ema
from sorax.runlog import Progress, RunLog, Trace


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` section."""

    steps: int = 1000
    seed: int = 0
    log_every: int = 50
    accumulate: int = 1  # micro-batches a step; the batch is split, the result is that of the whole batch
    dtype: str = "auto"  # of the forward pass: float32, bfloat16, or auto (float32 on CPU, bfloat16 elsewhere)
    freeze: tuple[str, ...] = ()  # networks that keep the weights of config.init: text (or dit)
    remat: str = "none"  # what the backward pass recomputes, see `DiT.__call__`
    unroll: bool = False  # a loop over the layers in place of a scan: faster on a CPU, slower to compile

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}: use one of {', '.join(REMAT)}")
        for name in ("steps", "log_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it is at least 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` section."""

    every: int = 1000
    keep: int = 2

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it is at least 1")


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    rng: jax.Array  # key data of the run; step k draws from fold_in(rng, k)


def compute_dtype(name: str, platform: str):
    """dtype of the forward pass from `train.dtype` and the devices' platform ("cpu", "tpu", ...)."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"config.train.dtype is {name!r}: use float32, bfloat16 or auto")
    return jnp.dtype(name)


def check_micro_batches(batch: int, accumulate: int, mesh):
    """Raises UserError where the rows of a batch, or its clips, cannot be cut into so many equal micro-batches."""
    ranks = sharding.batch_parts(mesh)
    if batch % (ranks * accumulate):
        raise UserError(f"config.train.accumulate is {accumulate}, which does not divide the {batch // ranks} rows of "
                        f"each of {ranks} data-parallel ranks: set another, or make config.data.batch a multiple of "
                        f"{ranks * accumulate}")  # fmt: skip


def make_init(objective, tx):
    """Function key -> TrainState."""

    def init(key):
        # The hardware generator: threefry takes XLA's CPU compiler half a second a parameter.
        params = objective.init(jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg"))
        rng = jax.random.key_data(jax.random.fold_in(key, 1))
        return TrainState(jnp.int32(0), params, _copy(objective.averaged(params)), tx.init(params), rng)

    return init


def _copy(params):
    """For the EMA: other buffers, since both are donated to the step."""
    return jax.tree.map(jnp.copy, params)


def make_step(objective, tx, ema_decay: float, accumulate: int):
    """Function (state, batch, constants) -> (state, {name: (sum, weight)}), to be jitted with shardings."""

    def step(state, batch, constants):
        def total_loss(params, batch, key):
            sums = objective.loss(params, batch, key, state.step, constants)
            return sums["loss"][0], sums

        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        # Gradients of the *sum* are accumulated, then divided by the weight of the whole batch: a micro-batch with
        # more to predict counts for more, and accumulation changes nothing.
        grad_fn = jax.grad(total_loss, has_aux=True)
        if accumulate == 1:
            grads, sums = grad_fn(state.params, batch, key)
        else:
            # Each device cuts up its own rows: a micro-batch of neighbouring rows would sit on some devices alone.
            parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
            keys = jax.random.split(key, accumulate)

            def add(total, part):
                return jax.tree.map(jnp.add, total, grad_fn(state.params, *part)), None

            first = jax.tree.map(lambda x: x[0], (parts, keys))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, state.params, *first))
            (grads, sums), _ = jax.lax.scan(add, zeros, (parts, keys))
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["loss"][1], 1e-8), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        averaged = objective.averaged(evaluation_params(params, opt_state))
        ema_params = update_ema(state.ema_params, averaged, state.step, ema_decay)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        sums = dict(sums, grad_norm=(norm, jnp.float32(1)))
        return TrainState(state.step + 1, params, ema_params, opt_state, state.rng), sums

    return step


def abstract_state(objective, tx, mesh):
    """TrainState of shapes and types, with the sharding of each array."""
    abstract = jax.eval_shape(make_init(objective, tx), jax.random.key(0))
    shardings = sharding.shardings_for(abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def compiled_step(objective, tx, settings: TrainConfig, abstract, mesh):
    """`make_step`, jitted for a mesh: the state is split as `abstract` says and given up, the batch by its rows."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    optim = next(iter(objective.optims.values()))  # of the network that the run is about
    return jax.jit(
        make_step(objective, tx, optim.average_decay, settings.accumulate),
        in_shardings=(shardings, sharding.batch_sharding(mesh), None),  # constants are where their objective put them
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def train(config, workdir: str, *, title: str | None = None, profile: tuple[int, int] | None = None):
    """Trains what a config describes in a run folder, from where the folder stands.

    Args:
        config: ConfigDict of an experiment (`experiments/`).
        workdir: run folder; created, or continued if it holds a run of the same config.
        profile: (start, stop): a trace of these steps, counted from where the run goes on, into `workdir/profile`.

    Raises:
        UserError: the folder holds a run of another config or architecture, the data cannot be used, the disk is full.
    """
    from sorax.objectives import complete, keep_ranks, make_objective

    # --- Config, mesh
    config = config.copy_and_resolve_references()
    complete(config)
    settings = config_lib.build(TrainConfig, config.train, "train")
    keeping = config_lib.build(CheckpointConfig, config.checkpoint, "checkpoint")
    backend.keep_programs()
    mesh = sharding.make_mesh(**config.mesh)
    if settings.accumulate > 1:
        for part in (config.data, *config.data.get("stages", ())):
            check_micro_batches(part.get("batch", config.data.batch), settings.accumulate, mesh)
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise UserError(f"run folder {workdir!r} cannot be made ({error.strerror}): name another --workdir") from error
    config = keep_ranks(config, workdir, mesh)
    config_lib.save_config(config, workdir, complete, write=processes.is_first())

    # --- Data, model
    objective = make_objective(config, workdir, mesh)
    title = title or f"train {objective.name}"

    # --- Shard
    tx = make_tx(objective.optims, settings.steps, objective.lr_factor)
    abstract = abstract_state(objective, tx, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    step_fn = compiled_step(objective, tx, settings, abstract, mesh)

    # --- Resume
    checkpoints = Checkpoints(workdir, keep=keeping.keep)
    step = checkpoints.latest_step() or 0
    if step:
        items, info = checkpoints.restore(_items(abstract), step)
        if info["data"] != objective.identity:
            raise UserError(f"the data of {workdir!r} has changed since step {step} ({info['data']} then, "
                            f"{objective.identity} now): put it back, or train in another workdir")  # fmt: skip
        state = _state(items, step)
    else:
        state = jax.jit(make_init(objective, tx), out_shardings=shardings)(jax.random.key(settings.seed))
        params = objective.start(state.params)
        if params is not state.params:
            opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)  # it may hold the parameters
            state = state.replace(params=params, ema_params=_copy(objective.averaged(params)), opt_state=opt_state)

    # --- Loop
    if step >= settings.steps:
        print(f"{title}: already at step {step} of {settings.steps} in {workdir}")
        checkpoints.close()
        return
    log = RunLog(workdir, step, write=processes.is_first())
    schedule = learning_rate(next(iter(objective.optims.values())), settings.steps)
    _, same = sharding.row_shares(mesh)
    peak = mesh.size * (peak_flops(mesh.devices.flat[0].device_kind) or 0)
    eval_every = config.eval.get("every", 0)
    if step == 0 and eval_every:
        _evaluate(objective, state, 0, log, workdir)
    batches = objective.batches(step)
    trace = Trace(workdir, profile, step)
    pending, work, since, met = [], [], time.perf_counter(), set()
    with checkpoints.finishing(), Progress(title, settings.steps, step) as progress, trace:
        while step < settings.steps:
            trace.at(step, state)
            batch = next(batches)
            work.append(objective.work(batch))
            shape = "x".join(map(str, next(iter(batch.values())).shape))  # one of each kind of batch there is
            with contextlib.nullcontext() if shape in met else progress.pause(f"compiling for batches of {shape}"):
                state, sums = step_fn(state, sharding.put_batch(batch, mesh), objective.constants)
            met.add(shape)
            pending.append(sums)
            step += 1
            if step % settings.log_every == 0 or step == settings.steps:
                metrics = _mean(pending)
                if not np.isfinite(metrics["loss"]):
                    raise UserError(f"{title}: the loss is {metrics['loss']} at step {step}: lower config.optim.lr; "
                                    f"the last good checkpoint is of step {checkpoints.latest_step()}")  # fmt: skip
                seconds = time.perf_counter() - since
                metrics |= _rates(work, seconds, peak, same) | {"lr": float(schedule(step - 1))}
                log.write(step, metrics)
                progress.advance(step, f"loss {metrics['loss']:.4f}")
                pending, work, since = [], [], time.perf_counter()
            last = step == settings.steps
            if last:
                # What is measured once training ends (the VAE's latent statistics) belongs to the last checkpoint.
                params, ema_params = objective.finish(state.params), objective.finish(state.ema_params)
                state = state.replace(params=params, ema_params=ema_params)
            if step % keeping.every == 0 or last:
                checkpoints.save(step, _items(state), {"data": objective.identity})
            if eval_every and (step % eval_every == 0 or last):
                _evaluate(objective, state, step, log, workdir)
                since = time.perf_counter()
    checkpoints.wait()
    checkpoints.close()
    log.close()


def _items(state):
    return dict(params=state.params, ema_params=state.ema_params, opt_state=state.opt_state, rng={"rng": state.rng})


def _state(items, step):
    return TrainState(jnp.int32(step), items["params"], items["ema_params"], items["opt_state"], items["rng"]["rng"])


def _mean(pending):
    """Means over the steps since the last log line, from their sums and weights."""
    total = jax.tree.map(lambda *x: np.sum(jax.device_get(x), axis=0, dtype=np.float64), *pending)
    return {name: float(s / w) for name, (s, w) in total.items() if w > 0}


def _rates(work, seconds, peak: float, same: int = 1):
    """Speed over the steps since the last log line.

    Args:
        work: counts of each step's batch, of this process's share (`Objective.work`).
        seconds: that they took.
        peak: FLOP/s of all devices of the run; 0 where nobody knows: there is no MFU then.
        same: processes that have the same share.
    """
    total = processes.total({name: sum(w[name] for w in work) for name in work[0]})
    total = {name: count / same for name, count in total.items()}
    rates = {f"{name}_per_s": count / seconds for name, count in total.items()}
    if "useful_tokens" in total:
        rates["useful_fraction"] = total["useful_tokens"] / total["tokens"]
    if peak and "model_flops" in total:
        rates["mfu"] = total["model_flops"] / seconds / peak
    return rates | {"step_seconds": seconds / len(work)}


def _evaluate(objective, state, step, log, workdir):
    metrics, videos, fps = objective.evaluate(state, step, os.path.join(workdir, "samples"))
    log.write(step, metrics)
    for name, video in videos.items():
        log.video(step, name, video, fps)
