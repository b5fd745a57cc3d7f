"""Optimizer, learning-rate schedule, gradient clipping and averaged parameters from the `optim` section of a config."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sorax.errors import UserError
from sorax.sharding import path_string

# Measured on the data, not learned: the optimizer leaves them alone.
FROZEN = r"(^|/)latents_(mean|std)$"
MATRIX = r"(kernel|lora_[ab])$"  # what muon orthogonalises
OPTIMIZERS = ("adamw", "muon", "schedule_free")
SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
CLIP_DECAY, CLIP_AFTER = 0.99, 20  # memory of gradient norms in steps, and how many are seen before one is clipped


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning rate, gradient clipping and the averaged parameters that evaluation and sampling use.

    optimizer: adamw, the default; muon, orthogonalised momentum for kernels and adapters (Jordan 2024) and Adam for
        the rest; or schedule_free, AdamW whose own average of the parameters replaces the decay of the learning rate
        and the EMA (Defazio et al. 2024).
    schedule: after a linear warm-up, down to `final_lr` at the last step by a cosine or a line (linear), or over the
        last `decay_fraction` of the steps only (wsd: warm-up, stable, decay; Hu et al. 2024); constant; or with the
        square root of the step (inverse_sqrt; Vaswani et al. 2017), for which the number of steps does not matter.
    """

    optimizer: str = "adamw"
    lr: float = 1e-4
    vector_lr: float = 0.0  # muon: the learning rate of what is left to Adam; 0: that of the kernels
    schedule: str = "cosine"
    warmup_steps: int = 1000
    final_lr: float = 0.0  # as a fraction of lr
    decay_fraction: float = 0.2  # wsd
    b1: float = 0.9  # of schedule_free: the share of the average in the point where gradients are taken
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices and kernels; biases, norms and modulations are left alone
    clip_norm: float = 1.0  # of the gradient of all parameters together; 0: not clipped
    # Clips a gradient whose norm is over the mean of late ones by so many standard deviations; 0: does not; 3 is usual.
    clip_sigmas: float = 0.0
    ema_decay: float = 0.9999  # reached gradually: min(ema_decay, (1 + step) / (10 + step)); not of schedule_free

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}: use one of {', '.join(SCHEDULES)}")
        if self.optimizer == "schedule_free" and self.schedule != "constant":
            raise ValueError(f"schedule is {self.schedule!r}, but schedule_free takes its learning rate constant: set "
                             "schedule to constant")  # fmt: skip
        if self.optimizer == "schedule_free" and not 0 < self.b1 < 1:
            raise ValueError(f"b1 is {self.b1}: schedule_free takes it between 0 and 1")
        for name in ("lr", "vector_lr", "warmup_steps", "final_lr", "weight_decay", "clip_norm", "clip_sigmas"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it is not negative")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: it is from 0 (no average) to below 1")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}: it is a part of the steps, above 0 and up to 1")

    @property
    def average_decay(self) -> float:
        """Decay of the EMA; 0 where the optimizer averages itself, see `evaluation_params`."""
        return 0.0 if self.optimizer == "schedule_free" else self.ema_decay


def learning_rate(config: OptimConfig, num_steps: int):
    """Schedule: step -> learning rate."""
    lr, last, warmup = config.lr, max(num_steps, 1), min(config.warmup_steps, max(num_steps - 1, 0))
    first, end = lr / max(warmup, 1), lr * config.final_lr
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first, peak_value=lr, warmup_steps=warmup, decay_steps=last, end_value=end
        )
    if config.schedule == "constant":
        after, begin = optax.constant_schedule(lr), warmup
    elif config.schedule == "inverse_sqrt":
        after, begin = lambda step: lr * (1 + jnp.maximum(step, 0) / max(warmup, 1)) ** -0.5, warmup
    else:  # a line down, from the end of the warm-up on or later
        share = config.decay_fraction if config.schedule == "wsd" else 1.0
        begin = max(warmup, last - round(share * last))
        after = optax.linear_schedule(lr, end, max(last - begin, 1))
    parts = [optax.linear_schedule(first, lr, max(warmup, 1)), optax.constant_schedule(lr), after]
    return optax.join_schedules(parts, [warmup, begin])


class NormStatistics(NamedTuple):
    """Exponential averages of gradient norms and of their squares, and of how many steps."""

    count: jax.Array
    mean: jax.Array
    square: jax.Array


def clip_by_deviation(sigmas: float) -> optax.GradientTransformation:
    """Scales a gradient down to (mean + sigmas * deviation) of the norms before it (Open-Sora-Plan's EMA 3-sigma).

    What is clipped counts with its clipped norm, so that the limit follows a lasting change in a while and an outlier
    not at all. A gradient that is not finite is replaced by zero and does not count.
    """

    def init(params):
        return NormStatistics(jnp.int32(0), jnp.float32(0), jnp.float32(0))

    def update(gradients, state, params=None):
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm)
        share = jnp.maximum(1 - CLIP_DECAY ** state.count.astype(jnp.float32), 1e-8)
        mean, square = state.mean / share, state.square / share
        limit = mean + sigmas * jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
        limit = jnp.where(state.count < CLIP_AFTER, jnp.inf, limit)
        seen = jnp.minimum(norm, limit)
        scale = seen / jnp.maximum(norm, 1e-30)
        gradients = jax.tree.map(lambda g: jnp.where(finite, g * scale.astype(g.dtype), 0), gradients)
        keep = lambda old, new: jnp.where(finite, CLIP_DECAY * old + (1 - CLIP_DECAY) * new, old)  # noqa: E731
        state = NormStatistics(state.count + finite, keep(state.mean, seen), keep(state.square, seen**2))
        return gradients, state

    return optax.GradientTransformation(init, update)


def make_tx(configs: dict[str, OptimConfig], num_steps: int, lr_factor=None) -> optax.GradientTransformation:
    """The optax transformation of parameters dict(name=tree): each tree has its own optimizer, and clipping.

    Args:
        configs: by the names of the trees, or {"": config} for parameters of any form with one optimizer.
        lr_factor: (path, shape) of a parameter -> factor on its learning rate (muP; see `sorax.dit.mup_lr_factor`),
            under one optimizer that is not muon, whose updates transfer over widths as they are.

    Returns:
        a transformation whose state mirrors the parameters, path by path.
    """
    if list(configs) == [""]:
        return _make_tx(configs[""], num_steps, lr_factor)
    each = {name: _make_tx(config, num_steps) for name, config in configs.items()}

    def init(params):
        return {name: tx.init(params[name]) for name, tx in each.items()}

    def update(gradients, state, params):
        updates = {name: tx.update(gradients[name], state[name], params[name]) for name, tx in each.items()}
        return {name: u for name, (u, _) in updates.items()}, {name: s for name, (_, s) in updates.items()}

    return optax.GradientTransformation(init, update)


def _make_tx(config, num_steps, lr_factor=None):

    def decayed(params):
        def rule(path, p):
            return p.ndim >= 2 and re.search(rf"{MATRIX}|embedding$", path_string(path)) is not None

        return jax.tree_util.tree_map_with_path(rule, params)

    schedule = learning_rate(config, num_steps)
    if config.optimizer == "muon":
        if config.vector_lr and not config.lr:
            raise UserError("config.optim.lr is 0 and vector_lr is not: one schedule scales both, set both to 0")
        ratio = config.vector_lr / config.lr if config.vector_lr else 1.0
        core = optax.contrib.muon(
            schedule, adam_learning_rate=lambda step: ratio * schedule(step), adam_b1=config.b1, adam_b2=config.b2,
            weight_decay=config.weight_decay, weight_decay_mask=decayed,
            muon_weight_dimension_numbers=muon_dimensions,
        )  # fmt: skip
    else:
        own = config.optimizer == "schedule_free"  # its interpolation stands in the place of momentum
        parts = [optax.scale_by_adam(0.0 if own else config.b1, config.b2, config.eps)]
        if lr_factor is not None:  # before the decay, which is the same for all widths
            parts.append(_scale_by(lr_factor))
        parts += [
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(schedule),
        ]
        core = optax.chain(*parts)
        if own:
            core = optax.contrib.schedule_free(core, schedule, b1=config.b1)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.clip_sigmas:
        clip = optax.chain(clip_by_deviation(config.clip_sigmas), clip)
    return optax.chain(clip, core, optax.masked(optax.set_to_zero(), _frozen))


def _frozen(params):
    return jax.tree_util.tree_map_with_path(lambda path, p: bool(re.search(FROZEN, path_string(path))), params)


def _scale_by(lr_factor):
    def scale(updates, params=None):
        return jax.tree_util.tree_map_with_path(lambda path, u: u * lr_factor(path_string(path), u.shape), updates)

    return optax.stateless(scale)


def muon_dimensions(params):
    """Which axes of each matrix are inputs and outputs; a leading axis of stacked layers is neither. None: Adam.

    A kernel has 2 axes, of a convolution 4 or 5: those of 3 are matrices `[L, n, m]`, wherever they are.
    """

    def rule(path, p):
        path = path_string(path)
        if not re.search(MATRIX, path):
            return None
        first = 1 if p.ndim == 3 else 0
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, p.ndim - 1)), (p.ndim - 1,))

    return jax.tree_util.tree_map_with_path(rule, params)


def update_ema(ema_params, params, step, decay: float):
    """Exponential moving average of the parameters, with a shorter memory at the start."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - rate) * (p - e), ema_params, params)


def evaluation_params(params, opt_state):
    """What is evaluated and sampled from: the average that schedule_free keeps, elsewhere the parameters themselves.

    params, opt_state: of `make_tx`, one tree or a dict of them.
    """
    if isinstance(opt_state, dict):
        return {name: evaluation_params(params[name], state) for name, state in opt_state.items()}

    def is_state(x):
        return isinstance(x, optax.contrib.ScheduleFreeState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    if not found:
        return params
    average = optax.contrib.schedule_free_eval_params(found[0], params)
    return jax.tree.map(lambda frozen, p, a: p if frozen else a, _frozen(params), params, average)
