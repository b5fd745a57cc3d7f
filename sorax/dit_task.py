"""What a DiT learns from packed rows, as functions of arrays: parameters, loss, shapes of a batch. It reads no data.

Legend: B rows, N tokens of a row, M text slots of a row, P patch size flattened, S samples of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sorax import config as config_lib
from sorax import distill, flow, functional, mup, routing, sharding
from sorax import lora as lora_lib
from sorax.attention import attention
from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError
from sorax.optim import OptimConfig
from sorax.sampler import guide, make_solver
from sorax.text import TextConfig, TextEncoder, drop_captions, drop_embeds, slot_bias
from sorax.vae import VAEConfig

SIGMA_BINS = 4
RISING_LEVELS = 32  # that noise levels which rise along time are rounded to


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The `flow` section of a DiT experiment: how rows are noised, what is given, which tokens skip layers."""

    sigma: str = "logit_normal"  # distribution of noise levels: logit_normal, uniform or mode, see `flow.draw_sigma`
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    mode_scale: float = 1.29
    train_shift: float = 1.0
    shift_tokens: int = 0  # samples of so many tokens have train_shift, others by the square root; 0: all have it
    skip_share: float = 0.0  # of each sample's tokens, which skip layers in training (TREAD)
    skip_layers: tuple[int, int] = (1, -1)  # the first layer that they skip, and the first that they do not
    rising: float = 0.0  # share of the clips whose noise rises along time, see `flow.draw_rising`
    sample_shift: float = 3.0
    caption_dropout: float = 0.1
    # weights of `flow.GIVEN_MODES`: nothing given, first latent frame, last, both ends, first k, last k, both ends with
    # k each, keyframes, all around a box; those that are left out are 0
    given: tuple[float, ...] = (0.6, 0.15, 0.05, 0.1, 0.1)
    # the least and the most of the k of first and last ones; 0: as many as leave one to generate
    first_k: tuple[int, int] = (1, 0)

    def __post_init__(self):
        if self.sigma not in flow.SIGMA_KINDS:
            raise ValueError(f"sigma is {self.sigma!r}: use one of {', '.join(flow.SIGMA_KINDS)}")
        if not 1 <= len(self.given) <= len(flow.GIVEN_MODES) or min(self.given) < 0 or not sum(self.given) > 0:
            raise ValueError(f"given is {self.given}: give up to {len(flow.GIVEN_MODES)} weights of at least 0, of "
                             f"{', '.join(flow.GIVEN_MODES)}")  # fmt: skip
        if not 0 <= self.rising <= 1:
            raise ValueError(f"rising is {self.rising}: it is a share of the clips, from 0 to 1")
        if not 0 <= self.skip_share < 1:
            raise ValueError(f"skip_share is {self.skip_share}: it is a share of the tokens, from 0 to below 1")
        least, most = self.first_k
        if least < 0 or (most and not 0 < least <= most):
            raise ValueError(f"first_k is {self.first_k}: give the least and the most of the first latent frames, or "
                             "0 for as many as leave one to generate")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DiTTask:
    """Networks and loss of a DiT experiment.

    What the training step needs of an `Objective` has the same name here.

    init: key -> params of what is trained: dict(dit=, text=) or one of them, or dict(lora=).
    loss: (params, batch, key, step, constants) -> {name: (sum, weight)}, as an `Objective` has it.
    validation: (params, batch, sigma, key, constants) -> (summed error, tokens) at one noise level, nothing given.
    frozen: shapes, types and places of the networks that are not trained.
    constants: likewise of what the loss takes: `frozen` or, where captions were embedded before, the embedding of the
        empty one, "empty_caption", in place of the text encoder; and the DiT "teacher" of what is distilled.
    networks: params | constants -> dict(dit=, text=), the DiT's for `dit_graph`, its graph definition: with a LoRA
        both have its adapters.
    batch_shapes: shapes and types of the arrays of a step's batch, of all processes together.
    routing: which tokens skip layers in training, in the words of `flops.dit_forward`.
    """

    model: DiTConfig
    text_model: TextConfig
    flow: FlowConfig
    init: Callable
    loss: Callable
    validation: Callable
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    optims: dict[str, OptimConfig]
    lr_factor: Callable | None
    frozen: dict
    constants: dict
    networks: Callable
    dit_graph: Any
    routing: dict[str, Any]
    averaged: Callable = lambda params: params


def check_rows(data, model: DiTConfig, mesh):
    """Raises UserError where a mesh cannot share the rows of a batch, their tokens or the heads equally."""
    here = sharding.batch_parts(mesh)
    if data.batch % here:
        raise UserError(f"config.data.batch is {data.batch} rows, which {here} data-parallel ranks cannot share "
                        "equally: make it a multiple, or set mesh.data x mesh.fsdp to a divisor of it")  # fmt: skip
    sharding.check_rows(mesh, model.num_heads, data.row_tokens)


def check_networks(model: DiTConfig, text_model: TextConfig, vae: VAEConfig):
    """Raises UserError where the widths of the networks do not fit together."""
    if model.in_channels != vae.latent_channels or text_model.width != model.text_dim:
        raise UserError(
            f"config.model takes {model.in_channels} latent channels and text of width {model.text_dim}, but the VAE "
            f"makes {vae.latent_channels} and config.text {text_model.width}: make them equal"
        )


def mesh_options(mesh) -> dict:
    """What `DiT.__call__` takes to run on a mesh."""
    attend, attend_text = sharding.attention_on(mesh, attention)
    return dict(constrain=sharding.activation_constraint(mesh), attend=attend, attend_text=attend_text)


def dit_task(config, data, settings, mesh) -> DiTTask:
    """Rectified flow over packed latent rows, with the text encoder trained along, kept as it is, or left out; or its
    distillation (`sorax.distill`).

    Args:
        config: of a DiT experiment. data: its `DataConfig`. settings: its `TrainConfig`.
        mesh: what it runs on; its devices need not be here.
    """
    from sorax.train import compute_dtype

    model = config_lib.build(DiTConfig, config.model, "model")
    text_model = config_lib.build(TextConfig, config.text, "text")
    flow_config = config_lib.build(FlowConfig, config.flow, "flow")
    dtype = compute_dtype(settings.dtype, mesh.devices.flat[0].platform)
    lora = lora_lib.read(config)
    dit_graph, adapters = lora_lib.adapted_dit(model, lora) if lora.rank else functional.abstract(DiT, model)
    text_graph, _ = functional.abstract(TextEncoder, text_model)
    S = data.max_segments
    on_mesh = mesh_options(mesh)
    constrain, run_options = on_mesh["constrain"], dict(on_mesh, remat=settings.remat, unroll=settings.unroll)

    if flow_config.skip_share and not range(model.num_layers)[slice(*flow_config.skip_layers)]:
        raise UserError(f"config.flow.skip_layers {flow_config.skip_layers} names none of {model.num_layers} layers: "
                        "give the first that tokens skip and the first that they do not")  # fmt: skip

    networks = dict(dit=(DiT, model), text=(TextEncoder, text_model))
    kept = lora_lib.frozen_networks(config)
    if set(settings.freeze) - networks.keys() or (len(set(kept)) == len(networks) and not lora.rank):
        raise UserError(f"config.train.freeze is {settings.freeze}: name one of the networks {', '.join(networks)}")
    if kept and not config.get("init"):
        key = "lora.rank" if lora.rank else "train.freeze"
        raise UserError(f"config.{key} keeps the weights of {' and '.join(kept)}, but config.init names none: set it "
                        "to a WanPipeline folder or a run")  # fmt: skip

    if data.text_embeds and "text" not in kept:
        raise UserError("config.data.text_embeds keeps what the text encoder says of captions, so it cannot be "
                        "trained: set config.train.freeze to ('text',) and config.init to its weights")  # fmt: skip

    def init(key):
        if lora.rank:
            return dict(lora=lora_lib.init(adapters, key))
        keys = dict(zip(networks, jax.random.split(key)))
        made = {name: functional.init(*networks[name], keys[name]) for name in networks if name not in kept}
        return made | (dict(dit=mup.rescale(made["dit"], model)) if "dit" in made else {})

    frozen = {name: functional.abstract(*networks[name])[1] for name in kept}
    frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), frozen,
                          sharding.shardings_for(frozen, mesh))  # fmt: skip
    constants = dict(frozen)
    if data.text_embeds:
        del constants["text"]
        place = sharding.replicated(mesh)
        constants["empty_caption"] = jax.ShapeDtypeStruct((text_model.width,), dtype, sharding=place)

    distilled = config_lib.build(distill.DistillConfig, config.get("distill") or {}, "distill")
    if distilled.steps:
        if "text" not in kept or lora.rank or "dit" in kept or flow_config.rising or flow_config.skip_share:
            raise UserError("config.distill.steps makes a student of the DiT of config.init, with its text encoder: "
                            "set config.train.freeze to ('text',), and neither lora nor flow.rising nor "
                            "flow.skip_share")  # fmt: skip
        constants["teacher"] = functional.abstract(*networks["dit"])[1]
        constants["teacher"] = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), constants["teacher"],
            sharding.shardings_for(constants["teacher"], mesh),
        )  # fmt: skip
        bounds = make_solver("ddim", distilled.steps, flow_config.sample_shift).sigmas

    def text_of(params, batch, text_tokens):
        """[B, M, D] of captions, some of which were dropped since the batch was made."""
        if not data.text_embeds:
            return nnx.merge(text_graph, params["text"])(text_tokens, batch["text_segment_ids"])
        embeds = jax.lax.bitcast_convert_type(batch["text_embeds"], jnp.bfloat16).astype(dtype)
        return drop_embeds(embeds, batch["text_tokens"], text_tokens, params["empty_caption"])

    def join(params):
        if not lora.rank:
            return params
        # The frozen kernels have the dtype that is computed in, and its adapters get it.
        rest = {name: x for name, x in params.items() if name != "lora"}
        return rest | dict(dit=lora_lib.join(params["dit"], functional.cast(params["lora"], dtype)))

    def velocity_error(params, batch, text_tokens, generated, level_index, levels, noise_key, route=None):
        """[B, N]; level_index: `[B, N]`, which of levels `[B, S]` each token has."""
        params = functional.cast(join(params), dtype)
        ids, text_ids = batch["segment_ids"], batch["text_segment_ids"]

        def network(dit, text_tokens):
            """(noisy tokens, levels) -> velocity, with these captions."""
            text, bias = text_of(params, batch, text_tokens), slot_bias(text_tokens, text_ids, S)
            run = nnx.merge(dit_graph, dit)
            return lambda x, levels: run(
                x.astype(dtype), batch["positions"], ids, levels, level_index, text, text_ids, bias, route=route,
                route_layers=flow_config.skip_layers, **run_options,
            )  # fmt: skip

        student = network(params["dit"], text_tokens)
        if not distilled.steps:
            noisy, target = flow.noise_rows(noise_key, batch["tokens"], level_index, levels)
            return flow.token_loss(student(noisy, levels), target, generated)[1]
        teacher = network(params["teacher"], text_tokens)
        if distilled.guidance != 1:
            empty = drop_captions(noise_key, batch["text_tokens"], text_ids, S, 1.0)
            told, untold = teacher, network(params["teacher"], empty)
            teacher = lambda x, levels: guide(told(x, levels), untold(x, levels), distilled.guidance)  # noqa: E731
        noise = jax.random.normal(noise_key, batch["tokens"].shape, batch["tokens"].dtype)
        before, end = distill.before_and_end(levels, bounds, flow_config.sample_shift, distilled.teacher_steps)
        error = distill.consistency_error(student, teacher, batch["tokens"], noise, level_index, levels, before, end)
        return flow.token_loss(*error, generated)[1]

    def loss(params, batch, key, step, constants):
        sigma_key, given_key, drop_key, noise_key = jax.random.split(key, 4)
        batch = batch | {name: constrain(batch[name]) for name in ("tokens", "positions", "segment_ids")}
        ids = batch["segment_ids"]
        shift = flow_config.train_shift
        if flow_config.shift_tokens:
            shift = flow.shift_for_length(ids, S, shift, flow_config.shift_tokens)
        if distilled.steps:
            levels = distill.draw_levels(sigma_key, (ids.shape[0], S), bounds, flow_config.sample_shift)
        else:
            levels = flow.draw_sigma(
                sigma_key, (ids.shape[0], S), kind=flow_config.sigma, mean=flow_config.sigma_mean,
                std=flow_config.sigma_std, mode_scale=flow_config.mode_scale, shift=shift,
            )  # fmt: skip
        levels = jnp.pad(levels, ((0, 0), (1, 0)))  # the first is the clean one
        given = flow.draw_given(given_key, batch["positions"], ids, S, flow_config.given, flow_config.first_k)
        level_index = ids
        if flow_config.rising:
            more, rising = flow.draw_rising(jax.random.fold_in(sigma_key, 1), batch["positions"], ids, S,
                                            flow_config.rising, shift, RISING_LEVELS)  # fmt: skip
            given = given | (rising == 0)
            level_index = jnp.where(rising > 0, S + rising, ids)
            levels = jnp.concatenate([levels, more], axis=1)
        generated, level_index = (ids != 0) & ~given, jnp.where(given, 0, level_index)
        text = drop_captions(drop_key, batch["text_tokens"], batch["text_segment_ids"], S, flow_config.caption_dropout)
        route = None
        if flow_config.skip_share:
            route = routing.choose(jax.random.fold_in(key, 4), ids, S, flow_config.skip_share)
        error = velocity_error(params | constants, batch, text, generated, level_index, levels, noise_key, route)
        sums = dict(loss=(jnp.sum(error), jnp.sum(generated, dtype=jnp.float32)))
        sigma = jnp.take_along_axis(levels, level_index, axis=1)
        for k in range(SIGMA_BINS):
            low, high = k / SIGMA_BINS, (k + 1) / SIGMA_BINS
            inside = generated & (sigma >= low) & (sigma <= high if k == SIGMA_BINS - 1 else sigma < high)
            sums[f"loss_sigma_{low:g}_{high:g}"] = (jnp.sum(error * inside), jnp.sum(inside, dtype=jnp.float32))
        return sums

    @jax.jit
    def validation(params, batch, sigma, key, constants):
        ids = batch["segment_ids"]
        levels = jnp.full((ids.shape[0], S + 1), sigma).at[:, 0].set(0.0)
        generated = ids != 0
        error = velocity_error(params | constants, batch, batch["text_tokens"], generated, ids, levels, key)
        return jnp.sum(error), jnp.sum(generated)

    return DiTTask(
        model=model, text_model=text_model, flow=flow_config, init=init, loss=loss, validation=validation,
        batch_shapes=row_shapes(data.batch, data.row_tokens, data.row_text, model.patch_dim,
                                text_model.width if data.text_embeds else 0),
        optims={"": config_lib.build(OptimConfig, config.optim, "optim")}, lr_factor=mup.lr_factor(model),
        frozen=frozen, constants=constants, networks=join, dit_graph=dit_graph,
        routing=dict(share=flow_config.skip_share, route_layers=flow_config.skip_layers),
    )  # fmt: skip


def row_shapes(B: int, N: int, M: int, P: int, D: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch of packed rows, as `data_pipelines.rows` makes them; D: of embeddings of captions."""
    fields = dict(tokens=(N, P), positions=(N, 3), segment_ids=(N,), text_tokens=(M,), text_segment_ids=(M,))
    fields |= dict(text_embeds=(M, D)) if D else {}
    types = dict.fromkeys(fields, jnp.int32) | dict(tokens=jnp.float32, text_embeds=jnp.uint16)
    return {name: jax.ShapeDtypeStruct((B, *shape), types[name]) for name, shape in fields.items()}
