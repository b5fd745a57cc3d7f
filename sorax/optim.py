"""Optimizer, learning-rate schedule and EMA from the `optim` section of a config."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from sorax.sharding import path_string

# Measured on the data, not learned: the optimizer leaves them alone.
FROZEN = r"(^|/)latents_(mean|std)$"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW or Muon with linear warm-up, cosine decay, global-norm clipping and an EMA of the parameters."""

    optimizer: str = "adamw"  # adamw, or muon: orthogonalised momentum for kernels (Jordan 2024), Adam for the rest
    lr: float = 1e-4
    vector_lr: float = 0.0  # muon: the learning rate of what is left to Adam; 0: that of the kernels
    warmup_steps: int = 1000
    final_lr: float = 0.0  # at the last step, as a fraction of lr
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices and kernels; biases, norms and modulations are left alone
    clip_norm: float = 1.0  # of the gradient of all parameters together
    ema_decay: float = 0.9999  # reached gradually: min(ema_decay, (1 + step) / (10 + step))


    def __post_init__(self):
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {self.optimizer!r}: use adamw or muon")


def learning_rate(config: OptimConfig, num_steps: int):
    """Schedule: step -> learning rate."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / max(warmup, 1), peak_value=config.lr, warmup_steps=warmup,
        decay_steps=max(num_steps, 1), end_value=config.lr * config.final_lr,
    )  # fmt: skip


def make_tx(configs: dict[str, OptimConfig], num_steps: int) -> optax.GradientTransformation:
    """The optax transformation of parameters dict(name=tree): each tree has its own optimizer, and clipping.

    configs: by the names of the trees, or {"": config} for parameters of any form with one optimizer. The state mirrors
    the parameters, path by path.
    """
    if list(configs) == [""]:
        return _make_tx(configs[""], num_steps)
    each = {name: _make_tx(config, num_steps) for name, config in configs.items()}

    def init(params):
        return {name: tx.init(params[name]) for name, tx in each.items()}

    def update(gradients, state, params):
        updates = {name: tx.update(gradients[name], state[name], params[name]) for name, tx in each.items()}
        return {name: u for name, (u, _) in updates.items()}, {name: s for name, (_, s) in updates.items()}

    return optax.GradientTransformation(init, update)


def _make_tx(config, num_steps):

    def decayed(params):
        def rule(path, p):
            return p.ndim >= 2 and re.search(r"(kernel|embedding)$", path_string(path)) is not None

        return jax.tree_util.tree_map_with_path(rule, params)

    def frozen(params):
        return jax.tree_util.tree_map_with_path(lambda path, p: bool(re.search(FROZEN, path_string(path))), params)

    schedule = learning_rate(config, num_steps)
    if config.optimizer == "muon":
        ratio = config.vector_lr / config.lr if config.vector_lr else 1.0
        core = optax.contrib.muon(
            schedule, adam_learning_rate=lambda step: ratio * schedule(step), adam_b1=config.b1, adam_b2=config.b2,
            weight_decay=config.weight_decay, weight_decay_mask=decayed,
            muon_weight_dimension_numbers=muon_dimensions,
        )  # fmt: skip
    else:
        core = optax.chain(
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core, optax.masked(optax.set_to_zero(), frozen))


def muon_dimensions(params):
    """Which axes of each kernel are inputs and outputs; a leading axis of stacked layers is neither. None: Adam."""

    def rule(path, p):
        path = path_string(path)
        if not path.endswith("kernel"):
            return None
        first = 1 if re.search(r"(^|/)blocks/(?!\d)", path) else 0  # blocks/0/... is a list, blocks/q/... is stacked
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, p.ndim - 1)), (p.ndim - 1,))

    return jax.tree_util.tree_map_with_path(rule, params)


def update_ema(ema_params, params, step, decay: float):
    """Exponential moving average of the parameters, with a shorter memory at the start."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - rate) * (p - e), ema_params, params)
