"""What a VAE run learns: to reconstruct clips and images from latents close to a normal distribution.

The loss is that of Esser et al., "Taming Transformers" (2021), for videos: errors of pixels, of a pyramid or of wavelet
details, of LPIPS features, a KL term, and an opponent, a patch discriminator that joins late.

Legend: B batch, T frames, H height, W width.
"""

import dataclasses
import difflib
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.clips import check_crop
from data_pipelines.loader import make_clip_loader
from data_pipelines.sources import open_source
from data_pipelines.survey import source_identity
from sorax import config as config_lib
from sorax import functional, media, processes, runlog, sharding
from sorax.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from sorax.dit_data import held_out_source
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.flops import vae_work
from sorax.inflate import inflate
from sorax.lpips import LPIPS
from sorax.metrics import psnr
from sorax.objectives import (
    DataConfig,
    EvalConfig,
    Objective,
    VAELossConfig,
    check_path,
    loader_options,
    write_samples,
)
from sorax.optim import OptimConfig
from sorax.runs import open_vae
from sorax.vae import VAE, VAEConfig
from sorax.vae_losses import kl_divergence, multiscale_error, wavelet_error

STATISTICS_SAMPLES = 256
_SAME_INDEX = {"batch", "crop", "max_tokens", "oversize", "min_frames"}  # keys of a stage that need no index of its own


def vae_objective(config, workdir: str, mesh) -> Objective:
    """Reconstruction of dense clips; see `VAELossConfig`. Parameters: dict(vae=, discriminator= where there is one)."""
    from sorax.train import TrainConfig, compute_dtype

    model = config_lib.build(VAEConfig, config.model, "model")
    data = config_lib.build(DataConfig, config.data, "data")
    weights = config_lib.build(VAELossConfig, config.loss, "loss")
    settings = config_lib.build(TrainConfig, config.train, "train")
    evaluation = config_lib.build(EvalConfig, config.eval, "eval")
    opponent = config_lib.build(DiscriminatorConfig, config.get("discriminator", {}), "discriminator")
    check_path(data)
    dtype = compute_dtype(settings.dtype, mesh.devices.flat[0].platform)
    grid = dict(spatial_multiple=model.spatial_stride, temporal_stride=model.temporal_stride,
                index_cache=os.path.join(workdir, "index"), index_progress=runlog.reporter("index"))  # fmt: skip
    with processes.first_before_others("VAE: data"):  # an index is made once
        stages = _stages(config.data, data, settings.steps, grid)
        held_out = held_out_source(config.data, **grid)
    source = stages[-1].source
    weights, lpips = _perceptual(weights)
    networks = dict(vae=(VAE, model))
    optims = dict(vae=config_lib.build(OptimConfig, config.optim, "optim"))
    if weights.adversarial:
        networks["discriminator"] = (Discriminator, opponent)
        optims["discriminator"] = config_lib.build(OptimConfig, config.discriminator_optim, "discriminator_optim")

    def init(key):
        keys = jax.random.split(key, len(networks))
        return {name: functional.init(*network, key) for (name, network), key in zip(networks.items(), keys)}

    def evaluate(state, step, folder):
        codec = Codec(model, processes.whole(state.ema_params["vae"]))
        originals = [held_out[i]["video"] for i in range(min(evaluation.num_videos, len(held_out)))]
        copies = codec.decode(codec.encode(originals))
        scores = [psnr(a, b) for a, b in zip(originals, copies)]
        pairs = [media.side_by_side(a, b) for a, b in zip(originals, copies)]
        write_samples(folder, step, pairs, ["original, then reconstruction"] * len(pairs))
        videos = {f"reconstruction/{i}": pair for i, pair in enumerate(pairs)}
        return {"val_psnr": float(np.mean(scores))}, videos, held_out.spec(0).fps

    def finish(params):
        indices = np.linspace(0, len(source) - 1, min(STATISTICS_SAMPLES, len(source))).astype(int)
        codec = Codec(model, processes.whole(params["vae"]))
        mean, std = processes.of_first(codec.statistics([source[int(i)]["video"] for i in indices]))
        stats = dict(latents_mean=mean, latents_std=std)
        place = {name: jax.device_put(value, params["vae"][name].sharding) for name, value in stats.items()}
        return params | dict(vae=params["vae"] | place)

    def batches(step):
        for stage in stages:
            if step < stage.end:
                options = loader_options(mesh) | dict(start_step=step, seed=settings.seed, num_workers=data.workers)
                loader = make_clip_loader(stage.source, batch_size=stage.batch, crop=stage.crop,
                                          temporal_stride=model.temporal_stride, **options)  # fmt: skip
                yield from itertools.islice(loader, stage.end - step)
                loader.close()
                step = stage.end

    def start(params):
        if not config.get("init"):
            return params
        return params | dict(vae=inflate(params["vae"], open_vae(config.init)[1], f"config.init {config.init!r}"))

    before = [(stage.end, stage.batch, stage.crop, source_identity(stage.source)) for stage in stages[:-1]]
    order = before, stages[-1].batch, stages[-1].crop, settings.seed  # not its end: a run may go on for longer
    return Objective(
        name="VAE",
        identity=source_identity(source, repr(order)),
        init=init,
        loss=_make_loss(networks, weights, lpips, dtype, settings.remat != "none"),
        batches=batches,
        work=lambda batch: vae_work(model, batch["video"].shape),
        evaluate=evaluate,
        finish=finish,
        start=start,
        optims=optims,
        averaged=lambda params: dict(vae=params["vae"]),
        constants=jax.device_put(lpips.params, sharding.replicated(mesh)) if lpips else {},
    )  # fmt: skip


# --- Stages


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Steps up to `end` (not included) see batches of `batch` clips of a source, cropped."""

    end: int
    batch: int
    crop: tuple[int, int, int] | None
    source: object


def _stages(section, data, steps, grid):
    """The stages of a `data` section: those of `data.stages`, then its own settings for the rest of the run."""
    stages, end, sources = [], 0, {}
    for number, settings in enumerate((*data.stages, {})):
        where = f"config.data.stages[{number}]"
        if not hasattr(settings, "items"):
            raise UserError(f"{where} is {settings!r}: a stage is a dict of `steps` and of keys of config.data")
        settings, rest = dict(settings), number == len(data.stages)
        place = "config.data" if rest else where
        count = settings.pop("steps", None)
        if not rest and (not isinstance(count, int) or count < 1):
            found = "no `steps`" if count is None else f"steps={count!r}"
            raise UserError(f"{where} has {found}: say for how many steps it lasts")
        for name in settings:
            if name not in section or name in ("stages", "workers"):
                near = difflib.get_close_matches(name, [key for key in section if key != "stages"], n=1)
                hint = f"did you mean {near[0]!r}?" if near else "a stage takes `steps` and other keys of config.data"
                raise UserError(f"{where} sets {name!r}: {hint}")
        own = section.to_dict()
        for name, value in settings.items():
            own[name] = own[name] | dict(value) if isinstance(own[name], dict) else value
        if not isinstance(own["batch"], int) or own["batch"] < 1:
            raise UserError(f"{place}: batch is {own['batch']!r}: a step takes at least 1 clip")
        end = max(steps, end) if rest else end + count
        # Stages of one data set differ in their crops and batches, and share the source.
        key = repr(sorted((name, value) for name, value in own.items() if name not in ("batch", "crop", "stages")))
        if key not in sources:
            cache = grid["index_cache"] if set(settings) <= _SAME_INDEX else f"{grid['index_cache']}_{number}"
            sources[key] = open_source(own, **grid | dict(index_cache=cache))
        crop = own.get("crop") or data.crop
        try:
            check_crop(crop, grid["temporal_stride"], grid["spatial_multiple"])
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        stages.append(_Stage(end, own["batch"], tuple(crop) if crop else None, sources[key]))
    return stages


# --- Loss


def _perceptual(weights):
    """(loss settings, LPIPS or None): without weights for it, the multi-scale term stands in."""
    if not weights.perceptual:
        return weights, None
    if weights.lpips:
        return weights, LPIPS.load(weights.lpips)
    print(f"config.loss.lpips names no weights: the multi-scale term takes the perceptual term's place, with its "
          f"weight of {weights.perceptual:g}")  # fmt: skip
    return dataclasses.replace(weights, perceptual=0.0, multiscale=weights.multiscale + weights.perceptual), None


def _make_loss(networks, weights, lpips, dtype, remat):
    """The `loss` of an `Objective`. Errors are means a value, the KL term is a mean a latent position."""
    graphs = {name: functional.abstract(*network)[0] for name, network in networks.items()}

    def fidelity(copy, video, key, constants):
        """Scalar loss of a reconstruction, and its parts."""
        error = copy - video
        terms = dict(l1=jnp.mean(jnp.abs(error)), mse=jnp.mean(jnp.square(error)))
        total = weights.l1 * terms["l1"] + weights.l2 * terms["mse"]
        for name, function in (("multiscale", multiscale_error), ("wavelet", wavelet_error)):
            if getattr(weights, name):
                terms[name] = function(error)
                total = total + getattr(weights, name) * terms[name]
        if lpips is not None:
            T = video.shape[1]
            frames = jax.random.permutation(key, T)[: weights.perceptual_frames or T]
            shown, wanted = (x[:, frames].reshape(-1, *x.shape[2:]) for x in (copy, video))
            terms["lpips"] = jnp.mean(lpips(shown, wanted, constants))
            total = total + weights.perceptual * terms["lpips"]
        return total, terms

    def loss(params, batch, key, step, constants):
        noise_key, frame_key = jax.random.split(key)
        vae = nnx.merge(graphs["vae"], functional.cast(params["vae"], dtype))
        video = batch["video"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = vae.encode(video.astype(dtype), remat=remat)
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(noise_key, mean.shape)
        features = vae.decode_features(z.astype(dtype), remat=remat)
        copy = vae.show(features).astype(jnp.float32)
        kl = jnp.mean(jnp.sum(kl_divergence(mean, logvar), axis=-1))
        if "discriminator" in graphs:
            total, terms = against(params, vae, features, copy, video, frame_key, step, constants)
        else:
            total, terms = fidelity(copy, video, frame_key, constants)
        values, places = jnp.float32(video.size), jnp.float32(mean.size / mean.shape[-1])
        sums = {name: (term * values, values) for name, term in terms.items()}
        return sums | dict(loss=((total + weights.kl * kl) * values, values), kl=(kl * places, places))

    def against(params, vae, features, copy, video, key, step, constants):
        """`fidelity` with the opponent: both networks learn from this one scalar.

        Both gradients at the reconstruction are found first. So their forces at the VAE's last layer can be compared,
        and the way back through the VAE is taken once.
        """
        here = jax.lax.stop_gradient(copy)
        (total, terms), pull = jax.value_and_grad(fidelity, has_aux=True)(here, video, key, constants)

        def play(critic):
            critic = functional.cast(critic, dtype)
            fixed = nnx.merge(graphs["discriminator"], jax.lax.stop_gradient(critic))
            value, push = jax.value_and_grad(lambda x: generator_loss(fixed(x.astype(dtype)).astype(jnp.float32)))(here)
            ratio = adaptive_weight(vae.last_gradient(features, pull), vae.last_gradient(features, push))
            critic = nnx.merge(graphs["discriminator"], critic)
            real, fake = (critic(x.astype(dtype)).astype(jnp.float32) for x in (video, here))
            opponent = discriminator_loss(real, fake)
            scores = dict(adversarial=value, discriminator=opponent, real=jnp.mean(real), fake=jnp.mean(fake))
            return opponent, weights.adversarial * ratio * push, scores | dict(adversarial_weight=ratio)

        def wait(_):
            zero = jnp.float32(0)
            names = ("adversarial", "discriminator", "real", "fake", "adversarial_weight")
            return zero, jnp.zeros_like(here), dict.fromkeys(names, zero)

        opponent, push, scores = jax.lax.cond(
            step >= weights.adversarial_start, play, wait, params["discriminator"]
        )
        gradient = jax.lax.stop_gradient(pull + push)
        # Both are worth nothing, and have the gradients of the two networks.
        force = jnp.sum(gradient * (copy - here)) + opponent - jax.lax.stop_gradient(opponent)
        return jax.lax.stop_gradient(total) + force, terms | scores

    return loss
