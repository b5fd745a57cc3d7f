"""The programs of a training, compiled for TPUs that are not here: their memory and their communication."""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from sorax import flops, functional, hlo, sharding
from sorax.devices import GIB
from sorax.dit import DiT
from sorax.dit_task import mesh_options
from sorax.encode import CLIPS_A_BATCH, ENCODE, PIXELS_A_BATCH, chunk_frames
from sorax.generate import sample_groups
from sorax.objectives import DataConfig
from sorax.optim import make_tx
from sorax.sampler import make_solver
from sorax.stream import programs
from sorax.text import TextEncoder
from sorax.vae import VAE, VAEConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device: arguments (params, ema, moments, batch), temporaries (activations kept for the backward pass,
    and the rest), results that are not written over arguments, and what is kept in the host's memory.

    A program that is too large has no results; its temporaries are what the compiler wanted.
    """

    limit: float
    params: float = 0
    ema: float = 0
    moments: float = 0
    other_arguments: float = 0
    activations: float = 0
    other_temporaries: float = 0
    results: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        """Of the device."""
        return (self.params + self.ema + self.moments + self.other_arguments + self.activations
                + self.other_temporaries + self.results)  # fmt: skip

    @property
    def left(self) -> float:
        """Of the device; negative where the program does not fit."""
        return self.limit - self.total


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its memory, communication, forward operations (of all devices), and how long XLA took.

    what: of its inputs, in words. error: why it was not compiled, "" if it was. readable: whether the compiler gave
    the text that the communication and the activations are read from.
    """

    name: str
    what: str
    devices: int
    memory: Memory
    flops: float
    seconds: float
    collectives: tuple[hlo.Collective, ...] = ()
    error: str = ""
    readable: bool = True

    @property
    def fits(self) -> bool:
        return not self.error and self.memory.left >= 0


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the rows are taken to hold: `samples` videos of one shape each, and their captions.

    video: (frames, height, width). tokens, text: of a sample.
    """

    video: tuple[int, int, int]
    tokens: int
    text: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An experiment, read: the sections that a plan needs."""

    config: object
    data: DataConfig
    settings: object
    vae: VAEConfig


def params_of(task):
    """Shapes of a task's parameters, of what is frozen too."""
    return jax.eval_shape(task.init, jax.random.key(0)) | task.frozen


def train_program(recipe, task, mesh, topology, rows) -> Program:
    """The training step of `sorax.train`."""
    from sorax.train import abstract_state, compiled_step

    tx = make_tx(task.optims, recipe.settings.steps, task.lr_factor)
    state = abstract_state(task, tx, mesh)
    place = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for k, x in task.batch_shapes.items()}
    program = compiled_step(task, tx, recipe.settings, state, mesh)
    memory = Memory(topology.device.memory, params=held(state.params) + held(task.constants),
                    ema=held(state.ema_params), moments=held(state.opt_state))  # fmt: skip
    trees = params_of(task)
    layers = [x.shape[1:] for name in ("dit", "lora") if name in trees for x in jax.tree.leaves(trees[name]["blocks"])]
    data, shape = recipe.data, "x".join(map(str, rows.video))
    lengths, texts = ([n] * rows.samples * data.batch for n in (rows.tokens, rows.text))
    work = flops.train_rows(task.model, task.text_model, lengths, texts, data.batch, **task.routing) / 3
    what = (f"{data.batch} rows of {data.row_tokens:,} tokens and {data.row_text:,} text slots, each with "
            f"{rows.samples} of {shape} ({rows.tokens:,} tokens)")  # fmt: skip
    return _compile("train", what, lambda: program.lower(state, batch, task.constants), mesh, memory, work,
                    (task.model.num_layers, layers))  # fmt: skip


def sample_program(recipe, task, mesh, topology, rows) -> Program:
    """One guided step of `sorax.generate`: a row's videos for every data-parallel rank, in the dtype of training."""
    from sorax.train import compute_dtype

    dtype = compute_dtype(recipe.settings.dtype, "tpu")
    params = {name: params_of(task)[name] for name in ("dit", "text")}  # a LoRA is merged then
    places = sharding.shardings_for(params, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), params, places)
    G, N = sharding.batch_parts(mesh), recipe.data.row_tokens  # a group for every rank: two rows, one a branch
    fields = {name: x.shape[1:] for name, x in task.batch_shapes.items()}
    two = {name: (2 * G, *fields[name]) for name in ("positions", "segment_ids", "text_tokens", "text_segment_ids")}
    shapes = dict(tokens=(G, *fields["tokens"]), requests=(G, N), two=two | dict(source=(G, 2 * N), places=(G, 2, N)))
    whole = sharding.batch_sharding(mesh)
    batch = jax.tree.map_with_path(
        lambda path, shape: jax.ShapeDtypeStruct(shape, jnp.float32 if path[0].key == "tokens" else jnp.int32,
                                                 sharding=whole), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )  # fmt: skip
    networks = functional.abstract(DiT, task.model)[0], functional.abstract(TextEncoder, task.text_model)[0]
    sample = functools.partial(sample_groups, networks, segments=rows.samples, **mesh_options(mesh))
    solver = make_solver("euler", 1, task.flow.sample_shift)
    memory = Memory(topology.device.memory, params=held(params), other_arguments=held(batch))
    lengths, texts = ([n] * rows.samples * G * 2 for n in (rows.tokens, rows.text))
    work = flops.dit_forward(task.model, lengths, texts) + flops.text_forward(task.text_model, texts)
    what = f"one guided step for {2 * G} rows, {rows.samples * G} videos"
    return _compile("sample", what, lambda: jax.jit(sample).lower(params, batch, solver, dict(scale=5.0)), mesh,
                    memory, work)  # fmt: skip


def vae_program(way, recipe, task, mesh, topology, rows) -> Program:
    """A chunk behind the first, of as many clips as `Codec` takes, on the devices of one process."""
    config, (T, H, W) = recipe.vae, rows.video
    _, h, w = config.latent_shape(T, H, W)
    own = [d for d in topology.devices if d.process_index == topology.devices[0].process_index]
    mesh = Mesh(np.array(own).reshape(-1, 1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    place, whole = sharding.video_sharding(mesh, h, w), sharding.replicated(mesh)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                          functional.abstract(VAE, config)[1])  # fmt: skip
    clips = mesh.size * max(1, min(CLIPS_A_BATCH, PIXELS_A_BATCH // (T * H * W)))
    later = chunk_frames(config, (T, H, W))
    program, stride = programs(config, place)[way], config.temporal_stride

    def chunk(frames):
        if way == ENCODE:
            return jax.ShapeDtypeStruct((clips, frames, H, W, 3), jnp.uint8, sharding=place)
        latents = (clips, -(-frames // stride), h, w, config.latent_channels)
        return jax.ShapeDtypeStruct(latents, jnp.float32, sharding=place)

    def lower():
        if later >= T - 1:
            return program.lower(params, chunk(T), None, True)
        _, kept = program.eval_shape(params, chunk(later + 1), None, False)
        kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), kept)
        return program.lower(params, chunk(later), kept, False)

    memory = Memory(topology.device.memory, params=held(params))
    work = flops.vae_forward(config, T, H, W)[way]
    name = ("encode", "decode")[way]
    what = f"{clips} videos of {T}x{H}x{W} on the {mesh.size} devices of a host, {min(later + 1, T)} frames at a time"
    return _compile(name, what, lower, mesh, memory, work * clips)


def held(tree) -> float:
    """Bytes that a device holds of a tree of ShapeDtypeStruct with shardings."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _compile(name, what, lower, mesh, memory, work, layers=None):
    """Program of a function that lowers it. layers: (number, shapes of the parameters of one), to find what a scan
    over them keeps."""
    program = functools.partial(Program, name, what, mesh.size, flops=work)
    began = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        temporaries, limit = _wanted(str(error), memory)
        memory = dataclasses.replace(memory, other_temporaries=temporaries, limit=limit)
        return program(memory=memory, seconds=time.monotonic() - began, error=str(error).splitlines()[0])
    sizes = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # tpu7x with libtpu 0.0.42
        text = None
    kept = _kept(hlo.loops(text), *layers) if layers and text else 0.0
    named = memory.params + memory.ema + memory.moments
    memory = dataclasses.replace(
        memory, other_arguments=max(sizes.argument_size_in_bytes - named, 0), activations=kept,
        other_temporaries=max(sizes.temp_size_in_bytes - kept, 0),
        results=max(sizes.output_size_in_bytes - sizes.alias_size_in_bytes, 0), host=sizes.host_temp_size_in_bytes,
    )  # fmt: skip
    found = tuple(hlo.collectives(text, dict(mesh.shape))) if text else ()
    return program(memory=memory, seconds=time.monotonic() - began, collectives=found, readable=text is not None)


def _wanted(message, memory):
    """(bytes of temporaries, limit) of the compiler's message that a program is too large."""
    units = dict(K=1 << 10, M=1 << 20, G=GIB, T=1 << 40)

    def size(match):
        return float(match[1]) * units.get(match[2], 1)

    limit = re.search(r"available HBM \(([\d.]+)([KMGT]?)\)|of ([\d.]+)([KMGT]?) hbm", message)
    limit = size([None, *(g for g in limit.groups() if g is not None)]) if limit else memory.limit
    temporaries = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
    if temporaries:
        return size(temporaries), limit
    used = re.search(r"Used ([\d.]+)([KMGT]?) of", message)  # of all of it
    return max(size(used) - memory.total, 0) if used else math.inf, limit


def _kept(loops, count, params) -> float:
    """Bytes of activations that the loop over the layers keeps for the backward pass: what it carries of [L, ...] that
    is no parameter's (nor a share of one's, nor its gradient's)."""

    def is_parameter(shape):
        return any(len(shape) == len(p) and all(size and p_size % size == 0 for size, p_size in zip(sorted(shape),
                   sorted(p))) for p in params)  # fmt: skip

    def kept(loop):
        return sum(size for _, shape, size in loop.buffers
                   if len(shape) > 1 and shape[0] == count and not is_parameter(shape[1:]))  # fmt: skip

    return float(max((kept(loop) for loop in loops if loop.trips == count), default=0))
