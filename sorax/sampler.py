"""ODE solvers and guidance over any velocity function. Arrays and functions only."""

import jax
import jax.numpy as jnp
import numpy as np

from sorax.flow import shift_sigma

TRAIN_TIMESTEPS = 1000


def sigma_schedule(num_steps: int, shift: float) -> np.ndarray:
    """Noise levels `[num_steps + 1]` from 1 down to 0, spaced as diffusers' FlowMatchEulerDiscreteScheduler has them.

    That scheduler spaces evenly down to the shifted smallest training level, then shifts.
    """
    smallest = shift_sigma(1 / TRAIN_TIMESTEPS, shift)
    sigmas = shift_sigma(np.linspace(1.0, smallest, num_steps), shift)
    return np.append(sigmas, 0.0).astype(np.float32)


def guide(conditional, unconditional, scale):
    """Classifier-free guidance (Ho & Salimans 2022); a scale of 1 is off."""
    return unconditional + scale * (conditional - unconditional)


def euler(velocity_fn, x, sigmas):
    """Integrates dx / dsigma = velocity from sigmas[0] to sigmas[-1] with Euler steps.

    Args:
        velocity_fn: `(x, sigma) -> velocity`, sigma a scalar.
        x: start, any shape; noise where sigmas[0] = 1.
        sigmas: `[num_steps + 1]`.

    Returns:
        x at sigmas[-1].
    """

    def step(x, pair):
        sigma, following = pair
        return x + (following - sigma) * velocity_fn(x, sigma), None

    x, _ = jax.lax.scan(step, x, (jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:])))
    return x
