"""What a run learns: its data, model, loss and evaluation in the form `sorax.train` runs; the DiT's are here."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from data_pipelines.caption_kinds import parse_mix
from data_pipelines.loader import make_loader
from data_pipelines.packing import token_costs
from data_pipelines.rows import RowSource
from sorax import config as config_lib
from sorax import flops, media, processes, read_weights, sharding
from sorax import lora as lora_lib
from sorax.captioner import CaptionerConfig
from sorax.discriminator import DiscriminatorConfig
from sorax.distill import DistillConfig
from sorax.dit import DiTConfig
from sorax.dit_data import prepare_data, prepare_vae
from sorax.dit_task import FlowConfig, check_networks, check_rows, dit_task
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.generate import Generator, Request
from sorax.optim import OptimConfig
from sorax.runs import start_adapters, start_params
from sorax.text import TextConfig
from sorax.vae import VAEConfig
from sorax.watch import watched_prompts

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A task for the training loop.

    Fields are functions:
        init: key -> params, compiled.
        start: params -> params, before the first step: what is read from elsewhere.
        loss: (params, batch, key, step, constants) -> {name: (sum, weight)}; sum / weight of "loss" is minimised.
        batches: first step -> iterator of this process's numpy batches.
        work: batch -> host-side counts of it: tokens (places), useful_tokens, frames, model_flops, ...
        evaluate: (state, step, folder) -> (metrics, {name: uint8 video}, fps).
        averaged: params -> those of which an EMA is kept.
        finish: params (or their EMA) -> the same, when training ends.
        lr_factor: (path, shape) of a parameter -> factor on its learning rate; or None.
    `identity` says which data in which order; a checkpoint of another does not go on. `optims` has the optimizer of
    each network, by its name in the parameters, or of all of them under "". `constants`: arrays that the loss needs
    and nobody learns.
    """

    name: str
    identity: str
    init: Callable
    loss: Callable
    batches: Callable
    work: Callable
    evaluate: Callable
    optims: dict[str, OptimConfig]
    start: Callable = lambda params: params
    averaged: Callable = lambda params: params
    finish: Callable = lambda params: params
    lr_factor: Callable | None = None
    constants: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section. `path`: see `open_source`; for a DiT's VAE "" means the DiT's own; for a DiT "shards:FOLDER"
    are latents that `sorax encode` has written.

    max_tokens, max_frames, fps: videos are cut and scaled to these; see `Fit`.
    val_path, val_split: what validation looks at, read like path and split. Where both are "", it is the world's own
    test split, the split "val" of latent shards that have one, and else the first val_samples training samples.
    tokenizer (DiT): "bytes" (ByT5's), "bpe" (trained on the captions, of at most text.vocab_size tokens) or a folder
    with one. "" is bytes; where config.init has a tokenizer, "" and "bpe" are that.
    """

    path: str = "world"
    world: Any = dataclasses.field(default_factory=dict)
    phyworld: Any = dataclasses.field(default_factory=dict)
    mixture: tuple = ()  # in place of path: dicts of a path, a weight and what else that path needs
    split: str = ""  # TFDS only, as are the next three
    data_dir: str = ""
    video_key: str = ""
    caption_key: str = ""
    val_path: str = ""
    val_split: str = ""
    fps: float = 0.0  # 0: each file's own
    max_frames: int = 81
    min_frames: int = 1
    max_tokens: int = 4096
    oversize: str = "scale"  # of a video over max_tokens: scale, trim (in time; latents over a row too) or refuse
    index: str = ""  # of a folder, made by `sorax data index`; "": the folder is indexed when the run starts
    workers: int = 0
    batch: int = 8  # clips a step (VAE), rows a step (DiT)
    # VAE only
    crop: tuple[int, int, int] | None = None  # (frames, height, width), 0 as it is: larger clips are cut to it
    # What comes before, such as images and then small clips: dicts of `steps` and of the keys above (or `world`) that
    # differ. Of a captioner: of `steps`, a `caption_mix` and a `row_text`.
    stages: tuple = ()
    # DiT only
    row_tokens: int = 16384
    row_text: int = 4096
    max_segments: int = 64
    val_samples: int = 64
    ranks: int = 0  # shares of a batch that have equal cost; 0: as many as the mesh has when the run starts
    tokenizer: str = ""
    text_embeds: bool = False  # keep captions' embeddings beside the latents, and train without the frozen text encoder
    posterior: str = "mean"  # of latents: "mean", or "sample" for a new draw each time that a sample comes
    # Which of a sample's captions is read, drawn each time that it comes: kinds and shares such as
    # "detailed:0.95,original:0.05", see `data_pipelines.caption_kinds`; "": its own.
    caption_mix: Any = ""
    reads: str = "short"  # of a captioner that reads text: the kind of caption that it reads


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """The `loss` section of a VAE experiment: the weights of its terms, see `sorax.vae_objective`."""

    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6
    multiscale: float = 0.0
    wavelet: float = 0.0
    perceptual: float = 0.0
    lpips: str = ""  # file of the perceptual term's weights, see `sorax.lpips`; "": the multi-scale term in its place
    perceptual_frames: int = 4  # of each clip, drawn at random; 0: all
    adversarial: float = 0.0  # 0: there is no discriminator
    adversarial_start: int = 0  # the step from which on both networks play


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The `eval` section: every so many steps, validation loss and samples (0: only at the end)."""

    every: int = 0
    num_videos: int = 4
    num_steps: int = 30
    solver: str = "euler"  # or unipc, dpm++
    guidance_scale: float = 3.0
    num_clips: int = 64  # of each split, for `sorax evaluate`
    num_prompts: int = 16  # of the world: test prompts whose clips are judged with the validation loss, as curves


# Adam as GANs use it: a short memory of gradients whose target moves.
DISCRIMINATOR_OPTIM = dict(lr=1e-4, b1=0.5, b2=0.9, warmup_steps=0)


def make_objective(config, workdir: str, mesh) -> Objective:
    """The objective that `config.kind` names; a DiT's VAE is trained first if it is not there."""
    from sorax.captioner_objective import captioner_objective
    from sorax.vae_objective import vae_objective

    makers = {"vae": vae_objective, "dit": dit_objective, "captioner": captioner_objective}
    if config.get("kind") not in makers:
        raise UserError(f"config.kind is {config.get('kind')!r}: use one of {', '.join(makers)}")
    own = dict(vae=("loss", "discriminator", "discriminator_optim"), dit=("vae", "text", "flow", "lora", "distill"),
               captioner=("vae",))  # fmt: skip
    known = (*own[config.kind], "kind", "init", "model", "data", "optim", "train", "checkpoint", "mesh", "eval", "path")
    for section in config:
        if section not in known:
            raise UserError(f"unknown config section {section!r} in a {config.kind} experiment: known are {known}")
    return makers[config.kind](config, workdir, mesh)


def complete(config):
    """Adds to an experiment what it leaves to its defaults."""
    from sorax.train import CheckpointConfig, TrainConfig

    sections = dict(data=DataConfig, optim=OptimConfig, train=TrainConfig, checkpoint=CheckpointConfig, eval=EvalConfig,
                    loss=VAELossConfig, flow=FlowConfig, lora=lora_lib.LoRAConfig, distill=DistillConfig,
                    discriminator=DiscriminatorConfig, discriminator_optim=OptimConfig,
                    mesh=sharding.MeshConfig)  # fmt: skip
    networks = dict(vae=dict(model=VAEConfig), dit=dict(model=DiTConfig, text=TextConfig),
                    captioner=dict(model=CaptionerConfig))  # fmt: skip
    sections |= networks.get(config.get("kind"), {})
    own = dict(vae=dict(init="", discriminator={}, discriminator_optim=DISCRIMINATOR_OPTIM),
               dit=dict(init="", lora={}, distill={}), captioner=dict(init="", vae=dict(path="")))  # fmt: skip
    with config.unlocked():
        for name, value in own.get(config.get("kind"), {}).items():
            if name not in config:
                config[name] = value
    for name, cls in sections.items():
        if name in config:
            config_lib.add_defaults(config[name], cls)
    if "vae" in config and "kind" in config.vae:
        complete(config.vae)


def keep_ranks(config, workdir: str, mesh):
    """Config of a run on packed rows that says for how many data-parallel ranks they are balanced: those of the mesh
    that it started on. So a run that goes on elsewhere meets the same rows in the same order."""
    if config.get("kind") not in ("dit", "captioner") or config.data.get("ranks"):
        return config
    ranks = mesh.shape["data"] * mesh.shape["fsdp"]
    if os.path.exists(os.path.join(workdir, config_lib.CONFIG_FILE)):
        ranks = config_lib.read_config(workdir).data.get("ranks") or ranks
    config = config.copy_and_resolve_references()
    with config.data.unlocked():
        config.data.ranks = ranks
    return config


def check_path(data):
    if not data.path and not data.mixture:
        raise UserError("config.data.path is empty: set --config.data.path=FOLDER (videos with captions), or =world")


def loader_options(mesh):
    """Which rows of a batch this process reads: those that its devices hold."""
    return dict(process_index=sharding.row_shares(mesh)[0], process_count=sharding.batch_parts(mesh))


def write_samples(folder, step, videos, captions):
    """A contact sheet of a step's videos in the run folder, by the first process."""
    if not processes.is_first():
        return
    os.makedirs(folder, exist_ok=True)
    media.write_sheet(os.path.join(folder, f"step_{step:07d}.png"), videos, captions)


def dit_objective(config, workdir: str, mesh) -> Objective:
    """Rectified flow over packed latent rows, with the text encoder trained along or kept as it is."""
    from sorax.train import TrainConfig

    data = config_lib.build(DataConfig, config.data, "data")
    settings = config_lib.build(TrainConfig, config.train, "train")
    evaluation = config_lib.build(EvalConfig, config.eval, "eval")
    task = dit_task(config, data, settings, mesh)
    model, text_model = task.model, task.text_model

    # --- Data: latents of every sample, made once
    check_path(data)
    if "dit" in task.frozen and not config.vae.get("path"):
        raise UserError("config.vae.path is empty, but the DiT is kept as it is: set it to where its VAE is, such as "
                        f"{config.init} of config.init")  # fmt: skip
    check_rows(data, model, mesh)
    here = sharding.batch_parts(mesh)
    ranks = data.ranks or here
    if ranks != here:
        print(f"rows are balanced for {ranks} data-parallel ranks, as when the run began; here are {here}: the batches "
              "are the same, but not every rank has equal work")  # fmt: skip
    vae_config, vae_params, vae_identity = prepare_vae(config, workdir)
    check_networks(model, text_model, vae_config)
    codec = Codec(vae_config, vae_params)
    tokenizer, examples, val_examples = prepare_data(config, workdir, codec, vae_identity)
    cost_a, cost_b = token_costs(model.width, model.ffn_dim)
    row_options = dict(row_tokens=data.row_tokens, row_text=data.row_text, max_segments=data.max_segments,
                       patch_size=model.patch_size, batch_size=data.batch, ranks=ranks,
                       oversize="trim" if data.oversize == "trim" else "refuse")  # fmt: skip
    rows = RowSource(examples, seed=settings.seed, posterior=data.posterior, cost_a=cost_a, cost_b=cost_b,
                     mix=parse_mix(data.caption_mix), **row_options)  # fmt: skip
    val_rows = RowSource(val_examples, seed=0, **row_options)

    # --- What is read: networks that start from other weights, and those that keep them
    if (steps := config.get("distill", {}).get("steps")) and (
        (evaluation.solver, evaluation.num_steps, evaluation.guidance_scale) != ("ddim", steps, 1.0)
    ):
        raise UserError(f"config.distill makes a network of {steps} steps without guidance: set config.eval.solver to "
                        f"ddim, config.eval.num_steps to {steps} and config.eval.guidance_scale to 1.0")  # fmt: skip
    kept = task.frozen.keys() & task.constants.keys()
    constants = start_params(config, workdir, kept, places=task.frozen) if kept else {}
    if "teacher" in task.constants:
        teacher = start_params(config, workdir, ["dit"], places=dict(dit=task.constants["teacher"]))
        constants["teacher"] = teacher["dit"]
    if data.text_embeds:
        empty = task.constants["empty_caption"]
        constants["empty_caption"] = jax.device_put(examples.empty_caption.astype(empty.dtype), empty.sharding)

    def start(params):
        if not config.get("init"):
            return params
        made = start_params(config, workdir, params.keys() - {"lora"}, places=params)
        if "lora" in params and config.lora.init:
            made["lora"] = read_weights.place(start_adapters(config, workdir), params["lora"])
        return params | made

    watched = watched_prompts(data, vae_config, model.patch_size, evaluation.num_prompts)

    def evaluate(state, step, folder):
        params, metrics = state.ema_params, {}
        batch = sharding.put_batch(next(make_loader(val_rows, **loader_options(mesh))), mesh)
        for i, sigma in enumerate(VALIDATION_SIGMAS):
            total, count = task.validation(params, batch, sigma, jax.random.key(i), constants)
            metrics[f"val_loss_sigma_{sigma:g}"] = float(total / count)
        metrics["val_loss"] = float(np.mean(list(metrics.values())))
        networks = task.networks(params | constants)
        if data.text_embeds:  # prompts need the encoder: it is here for as long as they are sampled
            networks |= start_params(config, workdir, ["text"], places=task.frozen)
        generator = Generator(model, networks["dit"], text_model, networks["text"], tokenizer, codec, mesh,
                              dit_graph=task.dit_graph)  # fmt: skip
        some = range(min(evaluation.num_videos, len(val_examples)))
        shapes = val_examples.video_shapes.tolist()
        requests = [Request(val_examples.caption(i), *shapes[i], seed=i) for i in some]
        asked = watched.requests() if watched else []
        latents = generator.latents(
            requests + asked, num_steps=evaluation.num_steps, solver=evaluation.solver,
            guidance_scale=evaluation.guidance_scale, shift=task.flow.sample_shift,
        )  # fmt: skip
        made = codec.decode(latents) if processes.is_first() else []  # who writes them down
        if made and watched:
            metrics |= watched.rates(made[len(some) :])
        made = made[: len(some)]
        write_samples(folder, step, made, [r.prompt for r in requests])
        videos = {f"sample/{i}": video for i, video in enumerate(made)}
        return metrics, videos, float(val_examples.fps[0])

    return Objective(
        name="DiT",
        identity=f"{rows.identity}-{examples.identity}",
        init=task.init,
        loss=task.loss,
        batches=lambda step: make_loader(rows, start_step=step, num_workers=data.workers, **loader_options(mesh)),
        work=lambda batch: flops.rows_work(model, None if data.text_embeds else text_model, batch,
                                           frozen=tuple(task.frozen), **task.routing),
        evaluate=evaluate,
        start=start,
        constants=constants,
        optims=task.optims,
        lr_factor=task.lr_factor,
    )
