"""What a training would take on TPUs that are not here: its real programs, compiled for their topology by libtpu.

Memory and communication are the compiler's; operations are counted (`sorax.flops`); times are estimates
(`sorax.roofline`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from sorax import config as config_lib
from sorax import flops, functional, roofline, sharding
from sorax.dit_task import check_networks, check_rows, dit_task
from sorax.encode import DECODE, ENCODE
from sorax.errors import UserError
from sorax.objectives import DataConfig, complete
from sorax.patchify import num_tokens
from sorax.plan_programs import Program, Recipe, Rows, params_of, sample_program, train_program, vae_program
from sorax.runs import open_vae_config
from sorax.text import MAX_SLOTS
from sorax.topology import Topology
from sorax.vae import VAEConfig

PROGRAMS = ("train", "sample", "encode", "decode")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Programs of an experiment on a topology, and what a training step there is estimated to take.

    Numbers are of all devices unless they say other. step: None where the step was not compiled or does not fit.
    """

    topology: Topology
    mesh: dict[str, int]
    remat: str
    batch: int
    row_tokens: int
    accumulate: int
    parameters: dict[str, int]
    rows: Rows
    model_flops: float
    programs: tuple[Program, ...]
    step: roofline.Estimate | None
    sample_seconds: float | None
    peak: float

    @property
    def useful_tokens(self) -> int:
        """Of a step."""
        return self.batch * self.rows.samples * self.rows.tokens

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step.step / self.peak

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)


def read(config) -> Recipe:
    """The sections of a DiT experiment; its data and its VAE's weights need not exist.

    Raises:
        UserError: it is of another kind, or its networks do not fit together.
    """
    from sorax.train import TrainConfig

    if config.get("kind") != "dit":
        raise UserError(f"config.kind is {config.get('kind')!r}: a plan is made of a DiT experiment (a VAE's memory on "
                        "TPUs: experiments/bench/vae_tpu.py)")  # fmt: skip
    config = config.copy_and_resolve_references()
    complete(config)
    data = config_lib.build(DataConfig, config.data, "data")
    settings = config_lib.build(TrainConfig, config.train, "train")
    if config.vae.get("path"):
        vae = open_vae_config(config.vae.path)
    else:
        vae = config_lib.build(VAEConfig, config.vae.model, "vae.model")
    return Recipe(config, data, settings, vae)


def usual_rows(recipe: Recipe, model, video=None) -> Rows:
    """What rows are taken to hold: as many as fit of one video, the largest of 16:9 that `data` lets through.

    Args:
        video: (frames, height, width) to take in its place.

    Raises:
        UserError: the video is off the grid, or no row holds it.
    """
    data, vae = recipe.data, recipe.vae
    if video is None:
        shapes = list((data.world or {}).get("shapes", ())) if data.path == "world" else []
        video = max(shapes, key=shapes.count) if shapes else _largest(data, vae, model.patch_size)
    try:
        latents = vae.latent_shape(*video)
    except ValueError as error:
        raise UserError(f"a video of {'x'.join(map(str, video))}: {error}") from error
    if any(size % p for size, p in zip(latents, model.patch_size)):
        grid = [vae.spatial_stride * p for p in model.patch_size[1:]]
        raise UserError(f"a video of {'x'.join(map(str, video))} is not whole patches: make its height and width "
                        f"multiples of {grid[0]} and {grid[1]}")  # fmt: skip
    tokens, shown = num_tokens(latents, model.patch_size), "x".join(map(str, video))
    samples = min(data.row_tokens // tokens, data.max_segments)
    if not samples:
        raise UserError(f"a video of {shown} is {tokens} tokens, and a row holds {data.row_tokens}: "
                        "set config.data.row_tokens, or another --video")  # fmt: skip
    return Rows(tuple(video), tokens, min(data.row_text // samples, MAX_SLOTS + 1), samples)


def _largest(data, vae, patch_size):
    """(frames, height, width) of 16:9 with the most tokens that fit data.max_tokens and a row."""
    pt, grid = patch_size[0], [vae.spatial_stride * p for p in patch_size[1:]]
    most = min(data.max_tokens, data.row_tokens)
    frames = max(1, 1 + (data.max_frames - 1) // vae.temporal_stride)
    frames = max(1, min(frames // pt, most)) * pt
    best = (1, 1)
    for h in range(1, most + 1):
        ideal = -(-16 * h * grid[0] // (9 * grid[1]))
        w = min(ideal, most // (frames // pt * h))
        if w < 0.9 * ideal:  # no longer near 16:9, nor will it be when it is higher
            break
        best = max(best, (h, w), key=math.prod)
    return 1 + (frames - 1) * vae.temporal_stride, best[0] * grid[0], best[1] * grid[1]


def make_plan(
    config, topology: Topology, *, names=PROGRAMS, video=None, report: Callable = lambda name, program: None
) -> Plan:
    """Compiles an experiment's programs for a topology.

    Args:
        config: of a DiT experiment. names: which of PROGRAMS. video: see `usual_rows`.
        report: called with each program's name and None before it is compiled, and with the program after.

    Raises:
        UserError: the mesh, the batch or the heads cannot be laid over the topology; see also `read`.
    """
    from sorax.train import check_micro_batches

    recipe = read(config)
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
    task = dit_task(recipe.config, recipe.data, recipe.settings, mesh)
    check_networks(task.model, task.text_model, recipe.vae)
    check_rows(recipe.data, task.model, mesh)
    check_micro_batches(recipe.data.batch, recipe.settings.accumulate, mesh)
    rows = usual_rows(recipe, task.model, video)
    lengths, texts = ([n] * rows.samples * recipe.data.batch for n in (rows.tokens, rows.text))
    makers = dict(train=train_program, sample=sample_program, encode=functools.partial(vae_program, ENCODE),
                  decode=functools.partial(vae_program, DECODE))  # fmt: skip
    made = []
    for name in names:
        report(name, None)
        made.append(makers[name](recipe, task, mesh, topology, rows))
        report(name, made[-1])
    by_name = {program.name: program for program in made}
    work = _work(recipe, task, mesh, rows, by_name.get("train"))
    return Plan(
        topology=topology, mesh=dict(mesh.shape), remat=recipe.settings.remat, batch=recipe.data.batch,
        row_tokens=recipe.data.row_tokens, accumulate=recipe.settings.accumulate,
        parameters={name: functional.count(tree) for name, tree in params_of(task).items()}, rows=rows,
        model_flops=flops.train_rows(task.model, task.text_model, lengths, texts, recipe.data.batch,
                                     frozen=tuple(task.frozen), **task.routing),
        programs=tuple(made), step=_step_estimate(by_name.get("train"), work, recipe, mesh, topology),
        sample_seconds=_sample_estimate(by_name.get("sample"), task, rows, mesh, topology),
        peak=topology.device.flops * mesh.size,
    )  # fmt: skip


# --- Estimates


def _work(recipe, task, mesh, rows, program):
    """`roofline.Work` of a training step; None where it was not compiled."""
    if program is None:
        return None
    model, data = task.model, recipe.data
    per_row = [rows.tokens] * rows.samples, [rows.text] * rows.samples
    attention = data.batch * flops.dit_attention(model, *per_row, **task.routing)
    # Every place of a row goes through the affine layers, and each row's table of noise levels has all its places.
    affine = data.batch * affine_of_rows(recipe, task)
    level_table = 2 * 8 * model.width * (data.max_segments + 1) * data.row_tokens * model.num_layers * data.batch
    text = data.batch * flops.text_forward(task.text_model, per_row[1])
    count, memory = sum(map(functional.count, params_of(task).values())), program.memory
    return roofline.Work(
        affine=affine + level_table + text, attention=attention,
        places=data.batch * data.row_tokens, width=model.width, layers=model.num_layers, head_dim=model.head_dim,
        state=3 * memory.ema + memory.moments,  # the parameters that are trained, and gradients, are as the EMA
        weights=2 * count / mesh.shape["tensor"], passes=recipe.settings.accumulate,
        backward=1.0 if "dit" in task.frozen else 2.0,
    )  # fmt: skip


def affine_of_rows(recipe, task, row_tokens: int = 0) -> float:
    """Forward operations of the DiT's affine layers on all places of one row, of the experiment's length or another."""
    row = [row_tokens or recipe.data.row_tokens], [recipe.data.row_text]
    forward = flops.dit_forward(task.model, *row, levels=recipe.data.max_segments + 1, **task.routing)
    return forward - flops.dit_attention(task.model, *row, **task.routing)


def _step_estimate(program, work, recipe, mesh, topology):
    if program is None or program.error or not program.readable:
        return None
    sent = roofline.traffic(program.collectives, mesh, topology.device, topology.dims)
    return roofline.estimate(work, recipe.settings.remat, topology.device, mesh.size, sent)


def _sample_estimate(program, task, rows, mesh, topology):
    """Seconds of one guided step, with the assumptions of the training step."""
    if program is None or program.error or not program.readable:
        return None
    count = 2 * sharding.batch_parts(mesh) * rows.samples
    attention = flops.dit_attention(task.model, [rows.tokens] * count, [rows.text] * count)
    sent = roofline.traffic(program.collectives, mesh, topology.device, topology.dims)
    return sum(sent.values()) + roofline.compute_seconds(
        program.flops - attention, attention, task.model.head_dim, topology.device, mesh.size
    )
