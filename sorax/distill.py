"""Few-step distillation: a network that does in a few steps what its teacher does in many, guidance included.

Multistep consistency distillation (Heek et al. 2024, arXiv:2403.06807) in the velocities of rectified flow. The noise
levels between 1 and 0 are cut into as many segments as the student has steps. Along the teacher's flow every point of a
segment leads to the same point at its lower end, s; the student's velocity at sigma is the mean velocity on the way
there, v = (x_sigma - x_s) / (sigma - s). What it is taught is that of the point a little further on,

    x_before = x_sigma - (sigma - before) * teacher(x_sigma),    target = (x_sigma - x_s) / (sigma - s),
    x_s = x_before - (before - s) * student(x_before) without its gradient, which at before = s is x_before itself.

Sampling is one step of Euler's (DDIM) from each segment's upper end to its lower end, without guidance. One segment is
a consistency model (Song et al. 2023), very many are the teacher.

Legend: B rows, N tokens, P patch size flattened, S noise levels of a row (entry 0 is the clean one).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sorax.flow import shift_sigma, unshift_sigma


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The `distill` section of a DiT experiment; the teacher is what `config.init` names.

    steps: of the student; 0: nothing is distilled.
    teacher_steps: steps of the teacher's that the whole way from noise would take.
    guidance: the teacher's scale, which the student needs none of any more; 1: none.
    """

    steps: int = 0
    teacher_steps: int = 64
    guidance: float = 3.0

    def __post_init__(self):
        if self.steps < 0 or self.teacher_steps < self.steps:
            raise ValueError(f"steps is {self.steps} and teacher_steps {self.teacher_steps}: give 0 for none, or as "
                             "many steps of the teacher at least")  # fmt: skip


def draw_levels(key, shape, bounds, shift: float):
    """Noise levels: a segment, each as likely, and a place in it that is uniform before the shift of the schedule.

    bounds: `[K + 1]` noise levels between which the segments are, falling from noise to 0.
    """
    places = unshift_sigma(np.asarray(bounds, np.float32), shift)
    segment_key, place_key = jax.random.split(key)
    segment = jax.random.randint(segment_key, shape, 0, len(places) - 1)
    high, low = jnp.asarray(places[:-1])[segment], jnp.asarray(places[1:])[segment]
    return shift_sigma(high - (high - low) * jax.random.uniform(place_key, shape), shift)


def before_and_end(sigma, bounds, shift: float, teacher_steps: int):
    """Where one step of the teacher's leads from sigma, and the lower end of its segment, at which that stops."""
    bounds = jnp.asarray(bounds, jnp.float32)
    count = len(bounds) - 1
    end = bounds[1:][jnp.clip(jnp.sum(sigma[..., None] <= bounds[:-1], axis=-1) - 1, 0, count - 1)]
    places = unshift_sigma(sigma, shift) - 1 / teacher_steps
    return jnp.maximum(shift_sigma(jnp.maximum(places, 0), shift), end), end


def consistency_error(student, teacher, x0, noise, level_index, sigma, before, end):
    """(velocity of the student, its target), both `[B, N, P]`; the target has no gradient.

    Args:
        student, teacher: `(x [B, N, P], levels [B, S]) -> velocity`, each token's level being that of level_index.
        x0, noise: `[B, N, P]`. level_index: `[B, N]` int.
        sigma, before, end: `[B, S]` of each level, falling; all 0 at the clean one, entry 0.
    """
    at, at_before, at_end = (jnp.take_along_axis(x, level_index, axis=1)[..., None] for x in (sigma, before, end))
    x = (1 - at) * x0 + at * noise
    x_before = x - (at - at_before) * teacher(x, sigma)
    x_end = x_before - (at_before - at_end) * student(x_before, before)
    target = (x - x_end) / jnp.maximum(at - at_end, 1e-6)
    return student(x, sigma), jax.lax.stop_gradient(target)
