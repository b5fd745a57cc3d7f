"""A student learns its teacher's way through each segment of noise levels; its run is sampled in as few steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from sorax import distill, sampler
from sorax.errors import UserError
from sorax.runs import load_run
from sorax.train import train

SHIFT = 3.0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_levels_lie_in_their_segments_and_lead_down_to_their_ends(steps):
    bounds = sampler.make_solver("ddim", steps, SHIFT).sigmas
    sigma = np.asarray(distill.draw_levels(jax.random.key(0), (4000,), bounds, SHIFT))
    before, end = (np.asarray(x) for x in distill.before_and_end(jnp.asarray(sigma), bounds, SHIFT, 16))
    assert sigma.max() <= bounds[0] + 1e-6 and sigma.min() >= 0
    inside = np.searchsorted(-bounds, -sigma, side="left")  # bounds fall
    shares = np.bincount(inside, minlength=steps + 1)[1:] / len(sigma)
    np.testing.assert_allclose(shares, 1 / steps, atol=0.04)  # four standard errors
    np.testing.assert_allclose(end, bounds[np.minimum(inside, steps)], atol=1e-6)
    assert np.all(end <= before) and np.all(before < sigma) and (before == end).any() and (before > end).any() == (
        steps < 16
    )
    # One step of the teacher's is a sixteenth of the way, before the shift.
    free = before > end
    places = sigma[free] / (SHIFT - (SHIFT - 1) * sigma[free]), before[free] / (SHIFT - (SHIFT - 1) * before[free])
    np.testing.assert_allclose(places[0] - places[1], 1 / 16, atol=1e-5)


def test_mean_velocities_along_the_teachers_flow_are_what_the_student_is_taught():
    """The flow dx / dsigma = x has x(s) = x * exp(s - sigma): with fine steps that student has hardly an error, the
    teacher's own velocity has one."""
    bounds = np.float32([1, 0.5, 0])
    sigma = jnp.asarray([[0.0, 0.9, 0.3]])
    index = jnp.asarray([[0, 1, 1, 2]])
    before, end = distill.before_and_end(sigma, bounds, 1.0, 1000)
    before, end = before.at[:, 0].set(0), end.at[:, 0].set(0)
    x0, noise = (jax.random.normal(jax.random.key(k), (1, 4, 3)) for k in range(2))

    def student(x, levels):
        at = jnp.take_along_axis(levels, index, axis=1)[..., None]
        to = jnp.take_along_axis(end, index, axis=1)[..., None]
        return x * (1 - jnp.exp(to - at)) / jnp.maximum(at - to, 1e-9)

    def teacher(x, levels):
        return x

    velocity, target = distill.consistency_error(student, teacher, x0, noise, index, sigma, before, end)
    np.testing.assert_allclose(velocity[:, 1:], target[:, 1:], atol=5e-3)
    _, other = distill.consistency_error(teacher, teacher, x0, noise, index, sigma, before, end)
    assert np.abs(other - noise)[:, 1:].max() > 0.1 and np.all(target[:, 0] == 0)


def test_a_student_is_a_run_of_few_steps_like_any_other(tiny_run, tmp_path, quick_compiler):
    workdir = str(tmp_path / "student")

    def student(**changed):
        config = tiny_config(f"vae.path={tiny_run}")
        config.init, config.distill = tiny_run, dict(steps=2, teacher_steps=8, guidance=2.0)
        config.train.freeze = ("text",)
        config.eval.update(num_steps=2, solver="ddim", guidance_scale=1.0)
        config.update(changed)
        return config

    train(student(), workdir)
    run, teacher = load_run(workdir), load_run(tiny_run)
    assert run.sampling() | dict(shift=0) == dict(num_steps=2, solver="ddim", guidance_scale=1.0, shift=0)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), run.networks.text, teacher.networks.text)
    assert all(jax.tree.leaves(same))
    kernels = [np.asarray(r.networks.dit["patch_embed"]["kernel"]) for r in (run, teacher)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.5
    for changed, message in ((dict(eval=dict(num_steps=4)), "set config.eval.solver"),
                             (dict(train=dict(freeze=())), "config.train.freeze to")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            train(student(**changed), str(tmp_path / "wrong"))
