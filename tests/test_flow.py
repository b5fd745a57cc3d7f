"""Algebra of rectified flow, noise levels, given masks and solvers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from sorax import flow, sampler
from sorax.patchify import positions

numbers = st.floats(-100, 100, width=32)
levels = st.floats(0, 1)
shifts = st.floats(0.2, 20)


# Plain numbers are double precision, so only rounding separates the two sides.
@for_all(numbers, numbers, levels)
def test_velocity_gives_back_the_clean_sample_and_the_noise(x0, noise, sigma):
    x, velocity = flow.add_noise(x0, noise, sigma), flow.velocity_target(x0, noise)
    assert flow.denoised(x, velocity, sigma) == pytest.approx(x0, abs=1e-10)
    assert flow.implied_noise(x, velocity, sigma) == pytest.approx(noise, abs=1e-10)


@for_all(numbers, numbers, levels, st.floats(-1, 1))
def test_velocity_is_the_derivative_of_the_noised_sample(x0, noise, sigma, step):
    moved = flow.add_noise(x0, noise, sigma + step) - flow.add_noise(x0, noise, sigma)
    assert moved == pytest.approx(step * flow.velocity_target(x0, noise), abs=1e-10)


@for_all(levels, shifts)
def test_unshift_undoes_shift_within_the_unit_interval(sigma, shift):
    shifted = flow.shift_sigma(sigma, shift)
    assert 0 <= shifted <= 1 + 1e-12
    assert flow.unshift_sigma(shifted, shift) == pytest.approx(sigma, abs=1e-9)
    assert shifted >= sigma - 1e-12 if shift >= 1 else shifted <= sigma + 1e-12  # more than 1: towards noise


def test_sigma_is_logit_normal_then_shifted():
    sigma = flow.draw_sigma(jax.random.key(0), (20000,), mean=0.5, std=1.5, shift=3.0)
    logits = jax.scipy.special.logit(flow.unshift_sigma(sigma, 3.0))
    assert sigma.min() > 0 and sigma.max() < 1
    assert abs(logits.mean() - 0.5) < 0.05 and abs(logits.std() - 1.5) < 0.05  # four standard errors are 0.04 and 0.03


def test_noise_levels_of_other_kinds():
    uniform = flow.draw_sigma(jax.random.key(0), (20000,), kind="uniform")
    np.testing.assert_allclose(np.quantile(uniform, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02)
    same = flow.draw_sigma(jax.random.key(0), (20000,), kind="mode", mode_scale=0.0)
    np.testing.assert_allclose(same, 1 - uniform, atol=1e-6)
    # The density at u is 1 / |d sigma / du|: at the middle of the scale 1.29 prefers it by 1 / (1 - 1.29 (pi / 2 - 1)).
    middle = flow.draw_sigma(jax.random.key(0), (200000,), kind="mode", mode_scale=1.29)
    assert middle.min() >= 0 and middle.max() <= 1
    share = np.mean(np.abs(middle - 0.5) < 0.02) / 0.04
    assert abs(share * (1 - 1.29 * (np.pi / 2 - 1)) - 1) < 0.08  # two standard errors of 20,000 draws and the slope
    with pytest.raises(ValueError, match="logit_normal, uniform"):
        flow.draw_sigma(jax.random.key(0), (2,), kind="cosine")


def test_shift_follows_the_root_of_a_samples_tokens():
    ids = jnp.asarray([[1] * 4 + [2] * 16 + [0] * 2, [1] * 22])
    shift = flow.shift_for_length(ids, 2, 3.0, 4)
    np.testing.assert_allclose(shift[0], [3.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(shift[1, 0], 3.0 * np.sqrt(22 / 4), rtol=1e-6)
    sigma = flow.draw_sigma(jax.random.key(0), (2, 2), kind="uniform", shift=shift)
    plain = flow.draw_sigma(jax.random.key(0), (2, 2), kind="uniform")
    np.testing.assert_allclose(sigma, flow.shift_sigma(plain, shift), rtol=1e-6)


# --- Given masks

SHAPES = ((5, 2, 2), (1, 4, 2), (2, 2, 4), (3, 2, 2))  # latents: a long clip, an image, short clips; one patch is 1x2x2
ROWS = 64


@pytest.fixture(scope="module")
def rows():
    """Many equal rows of four samples and padding, so that one call draws many masks."""
    where = np.concatenate([positions(*shape) for shape in SHAPES] + [np.zeros((3, 3), np.int32)])
    lengths = [int(np.prod(shape)) // 4 for shape in SHAPES]
    ids = np.pad(np.repeat(np.arange(1, 5), lengths), (0, 3))
    return tuple(jnp.asarray(np.repeat(x[None], ROWS, axis=0)) for x in (where, ids))


@functools.partial(jax.jit, static_argnames="num_samples")
def draw(seed, where, ids, probabilities, num_samples=len(SHAPES)):
    return flow.draw_given(jax.random.key(seed), where, ids, num_samples, probabilities)


def frames_given(mask, rows, segment):
    """bool [ROWS, frames] of one sample; a frame is given as a whole or not at all."""
    where, ids = (np.asarray(x) for x in rows)
    here = ids[0] == segment
    time, mask = where[0, here, 0], np.asarray(mask)[:, here]
    by_frame = [mask[:, time == t] for t in range(time.max() + 1)]
    for frame in by_frame:
        assert np.all(frame == frame[:, :1])
    return np.stack([frame[:, 0] for frame in by_frame], axis=1)


@settings(max_examples=25, deadline=None)
@for_all(st.integers(0, 2**31 - 1), st.tuples(*[st.integers(0, 3)] * 8).filter(any))
def test_something_is_always_generated_and_frames_are_given_as_a_whole(rows, seed, weights):
    mask = draw(seed, *rows, jnp.array([*weights, 0], jnp.float32))
    for segment, (frames, *_) in enumerate(SHAPES, start=1):
        given = frames_given(mask, rows, segment)
        assert not np.any(np.all(given, axis=1))
        if frames == 1:
            assert not np.any(given)
    assert not np.any(np.asarray(mask)[np.asarray(rows[1]) == 0])


@pytest.mark.parametrize(
    "mode, of_five, of_two",
    [("none", "00000", "00"), ("first", "10000", "10"), ("last", "00001", "01"), ("both", "10001", "10")],
)
def test_modes_give_what_they_say(rows, mode, of_five, of_two):
    """Both ends of two latent frames would leave nothing to generate: there it is the first."""
    weights = jnp.array([float(name == mode) for name in flow.GIVEN_MODES])
    mask = draw(0, *rows, weights)
    for segment, expected in ((1, of_five), (3, of_two)):
        np.testing.assert_array_equal(frames_given(mask, rows, segment), [[c == "1" for c in expected]] * ROWS)


def test_first_k_gives_every_number_of_first_frames(rows):
    weights = jnp.array([float(name == "first_k") for name in flow.GIVEN_MODES])
    for segment, frames in ((1, 5), (3, 2)):
        given = np.concatenate([frames_given(draw(seed, *rows, weights), rows, segment) for seed in range(3)])
        k = given.sum(axis=1)
        np.testing.assert_array_equal(given, np.arange(frames) < k[:, None])
        assert set(k) == set(range(1, frames))


@pytest.mark.parametrize("bounds, of_five", [((2, 2), {2}), ((2, 3), {2, 3}), ((3, 0), {3, 4}), ((1, 9), {1, 2, 3, 4})])
def test_first_k_stays_within_its_bounds_and_leaves_a_frame(rows, bounds, of_five):
    weights = jnp.array([float(name == "first_k") for name in flow.GIVEN_MODES[:5]])  # the rest takes long to compile
    drawn = jax.jit(functools.partial(flow.draw_given, first_k=bounds), static_argnums=3)
    mask = drawn(jax.random.key(0), *rows, len(SHAPES), weights)
    assert set(frames_given(mask, rows, 1).sum(axis=1)) == of_five
    assert set(frames_given(mask, rows, 3).sum(axis=1)) == {1}  # two latent frames


def only(mode):
    return jnp.array([float(name == mode) for name in flow.GIVEN_MODES])


def test_last_k_and_both_k_and_keyframes_give_every_set_of_frames_that_they_may(rows):
    """All but a gap of 1 to 3 of 5 frames behind the first: 3 + 2 + 1 sets; of keyframes any set but that of all."""
    wanted = dict(last_k=4, both_k=6, keyframes=31)
    for mode, sets in wanted.items():
        drawn = np.concatenate([frames_given(draw(seed, *rows, only(mode)), rows, 1) for seed in range(8)])
        found = {"".join("01"[int(x)] for x in row) for row in drawn}
        assert len(found) == sets
        if mode == "last_k":
            assert all(row == "0" * row.count("0") + "1" * row.count("1") for row in found)
        if mode == "both_k":
            assert all(row[0] + row[-1] == "11" and len(row.strip("1")) == row.count("0") for row in found)
        shorter = frames_given(draw(0, *rows, only(mode)), rows, 3)
        assert not shorter.all(axis=1).any()
    assert np.all(frames_given(draw(0, *rows, only("both_k")), rows, 3) == [True, False])  # of two: the first


def test_boxes_leave_something_to_generate_of_images_too(rows):
    """What is generated is a box or, in about a quarter of the draws, all but a box; every extent is drawn."""
    ids = np.asarray(rows[1])
    mask = np.concatenate([draw(seed, *rows, only("box")) for seed in range(4)])
    for segment, shape in enumerate(SHAPES, start=1):
        here = ids[0] == segment
        generated = ~mask[:, here].reshape(-1, shape[0], shape[1] // 2, shape[2] // 2)
        assert generated.any((1, 2, 3)).all() and not mask[:, ids[0] == 0].any()
        turned = 0
        for one in generated:
            box = np.ix_(*(one.any(tuple({0, 1, 2} - {axis})) for axis in range(3)))
            turned += not one[box].all()
        assert turned / len(generated) < 0.25
        assert len({one.tobytes() for one in generated}) > (3 if segment == 1 else 1)


def test_weights_that_are_left_out_are_zero(rows):
    """Configs of before there were more modes draw what they drew."""
    few, all_of_them = (0.2, 0.2, 0.2, 0.2, 0.2), (0.2, 0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0)
    assert not np.array_equal(draw(0, *rows, jnp.array(few)), np.zeros_like(rows[1], bool))
    for segment in (1, 3):
        a, b = (np.mean([frames_given(draw(seed, *rows, jnp.array(p)), rows, segment).mean(0) for seed in range(6)], 0)
                for p in (few, all_of_them))  # fmt: skip
        np.testing.assert_allclose(a, b, atol=0.15)  # four standard errors of 384 draws


def test_samples_of_a_row_draw_their_own_mode(rows):
    weights = jnp.array([0.5, 0.5, 0, 0, 0])
    mask = draw(0, *rows, weights)
    first, other = (frames_given(mask, rows, segment)[:, 0] for segment in (1, 4))
    assert {(bool(a), bool(b)) for a, b in zip(first, other)} == {(a, b) for a in (True, False) for b in (True, False)}


def test_given_tokens_stay_clean_and_others_have_their_samples_level(rows):
    _, ids = rows
    mask = draw(0, *rows, jnp.array([0.2] * 5))
    table = jax.random.uniform(jax.random.key(1), (ROWS, len(SHAPES) + 1)).at[:, 0].set(0.0)
    tokens = jax.random.normal(jax.random.key(2), (*ids.shape, 8))
    index = jnp.where(mask, 0, ids)
    noisy, target = flow.noise_rows(jax.random.key(3), tokens, index, table)
    sigma = jnp.take_along_axis(table, index, axis=1)
    clean = np.asarray(mask | (ids == 0))
    assert clean.any() and not clean.all()
    np.testing.assert_array_equal(np.asarray(noisy)[clean], np.asarray(tokens)[clean])
    np.testing.assert_array_equal(
        np.asarray(sigma)[~clean], np.asarray(jnp.take_along_axis(table, ids, axis=1))[~clean]
    )
    np.testing.assert_allclose(flow.denoised(noisy, target, sigma[..., None]), tokens, atol=1e-5, rtol=0)


def test_rising_noise_rises_along_time_and_covers_what_a_sampler_passes_through(rows):
    where, ids = rows
    levels, index = flow.draw_rising(jax.random.key(0), where, ids, len(SHAPES), 0.7, 3.0, 16)
    ids, index, levels = (np.asarray(x) for x in (ids, index, levels))
    assert levels.shape == (ROWS, 16) and np.all(np.diff(levels) > 0) and levels.min() > 0 and levels.max() <= 1
    assert np.all(index[(ids == 0) | (ids == 2)] == -1)  # padding and images
    clip = index[:, ids[0] == 1].reshape(ROWS, 5, -1)
    assert np.all(clip == clip[..., :1])
    clip = clip[..., 0]
    chosen = clip[:, 0] >= 0
    assert 0.5 < chosen.mean() < 0.9 and np.all(clip[~chosen] == -1)
    assert np.all(np.diff(clip[chosen]) >= 0)
    spread = clip[chosen][:, -1] - clip[chosen][:, 0]
    assert spread.min() <= 2 and spread.max() >= 12
    assert (clip[chosen] == 0).any() and (clip[chosen] == 16).any()


def test_loss_is_the_mean_over_generated_tokens_alone(rows):
    _, ids = rows
    generated = np.asarray((ids != 0) & ~draw(0, *rows, jnp.array([0.2] * 5)))
    velocity, target = (np.random.default_rng(i).standard_normal((*ids.shape, 8)).astype(np.float32) for i in range(2))
    loss, error = flow.token_loss(velocity, target, generated)
    np.testing.assert_allclose(loss, np.mean((velocity - target)[generated] ** 2), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(error)[~generated], 0.0)
    junk = np.where(generated[..., None], velocity, 1e3)
    np.testing.assert_array_equal(flow.token_loss(junk, target, generated)[0], loss)
    assert flow.token_loss(velocity, target, np.zeros_like(generated))[0] == 0


# --- Sampling


@settings(max_examples=30, deadline=None)
@for_all(st.integers(1, 100), shifts)
def test_schedule_falls_from_noise_to_clean(num_steps, shift):
    sigmas = sampler.sigma_schedule(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == np.float32
    assert sigmas[0] == pytest.approx(1, abs=1e-6) and sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


each_solver = pytest.mark.parametrize("name, order", [("euler", 1), *itertools.product(("unipc", "dpm++"), (1, 2, 3))])


@each_solver
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_solvers_follow_a_straight_flow_exactly(name, order, num_steps):
    """Towards one known sample the flow is a line, x = x0 + sigma * (noise - x0): any number of steps ends in x0."""
    x0, noise = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(2))
    solver = sampler.make_solver(name, num_steps, 3.0, order)
    sigmas = iter(solver.sigmas)
    with jax.disable_jit():  # the network is told a rounded sigma, this one needs the exact one
        made = sampler.integrate(lambda x, _: (x - x0) / next(sigmas), noise, solver)
    np.testing.assert_allclose(made, x0, atol=1e-5, rtol=0)


@each_solver
def test_a_solver_that_starts_partway_goes_on_from_there(name, order):
    """On a line to x0: from x0 with a part of the noise to x0, over levels that fall from that part."""
    x0, noise = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(2))
    solver = sampler.make_solver(name, 5, 3.0, order, start=0.4)
    assert solver.sigmas[0] == pytest.approx(flow.shift_sigma(0.4, 3.0), rel=0.01)
    assert np.all(np.diff(solver.sigmas) < 0)
    sigmas = iter(solver.sigmas)
    begin = flow.add_noise(x0, noise, solver.sigmas[0])
    with jax.disable_jit():
        made = sampler.integrate(lambda x, _: (x - x0) / next(sigmas), begin, solver)
    np.testing.assert_allclose(made, x0, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="starts between"):
        sampler.make_solver(name, 5, 3.0, order, start=0.0)


@each_solver
def test_stacked_solvers_are_each_of_them(name, order):
    solvers = [sampler.make_solver(name, 6, shift, order, start) for shift, start in ((3.0, 1.0), (5.0, 0.7))]
    x = jax.random.normal(jax.random.key(0), (2, 4))
    together = sampler.integrate(lambda x, sigma: jnp.sin(x) * (1 + sigma[:, None]), x, sampler.stack_solvers(solvers),
                                 lambda weight: weight[:, None])  # fmt: skip
    for k, solver in enumerate(solvers):
        alone = sampler.integrate(lambda x, sigma: jnp.sin(x) * (1 + sigma), x[k], solver)
        np.testing.assert_allclose(together[k], alone, rtol=1e-5, atol=1e-6)


@each_solver
def test_a_solver_that_waits_makes_what_it_makes_without(name, order):
    plain = sampler.make_solver(name, 5, 3.0, order)
    waiting = [sampler.wait(plain, before, 9) for before in (0, 2, 4)]
    x = jax.random.normal(jax.random.key(0), (3, 4))
    made = sampler.integrate(lambda x, sigma: jnp.sin(x) * (1 + sigma[:, None]), x, sampler.stack_solvers(waiting),
                             lambda weight: weight[:, None])  # fmt: skip
    alone = sampler.integrate(lambda x, sigma: jnp.sin(x) * (1 + sigma), x, plain)
    np.testing.assert_allclose(made, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no part of 9"):
        sampler.wait(plain, 5, 9)


def test_reused_layers_save_runs_and_little_changes():
    """On a gently curved flow; with a threshold of 0 every step runs them, and the numbers are the same."""
    x, solver = jax.random.normal(jax.random.key(0), (64,)), sampler.make_solver("euler", 40, 1.0)

    def first(x, sigma):
        return x + 0.3 * sigma * jnp.cos(x)

    def others(x):
        return 2 * jnp.sin(x)

    def change(now, before):
        return jnp.mean(jnp.abs(now - before)) / jnp.mean(jnp.abs(before))

    exact = sampler.integrate(lambda x, sigma: others(first(x, sigma)), x, solver)
    runs, errors = [], []
    for threshold in (0.0, 0.05, 0.2):
        def velocity(x, sigma, kept, threshold=threshold):
            return sampler.reuse_layers(x, first(x, sigma), others, kept=kept, threshold=threshold, change=change)

        made, kept = sampler.integrate(velocity, x, solver, memory=sampler.Kept.nothing(x.shape, x.dtype))
        runs.append(int(kept.runs))
        errors.append(float(jnp.abs(made - exact).max()))
    assert runs[0] == 40 and errors[0] < 1e-5
    assert 40 > runs[1] > runs[2] >= 3 and errors[1] < errors[2] < 0.3


@each_solver
def test_solvers_are_of_their_order_on_a_curved_flow(name, order):
    """dx / dsigma = x has the end e^-1 * x. Twice the steps, half of the error, or a third where the order is above 1.

    Not a quarter or less: the first and the last steps are of lower orders.
    """

    def error(num_steps):
        solver = sampler.make_solver(name, num_steps, 1.0, order)
        with jax.enable_x64(True):
            x = sampler.integrate(lambda x, _: x, jnp.float64(1.0), solver)
        return abs(float(x) - np.exp(-float(solver.sigmas[0])))

    assert error(80) / error(160) >= (1.9 if order == 1 else 2.9)


@pytest.mark.parametrize(
    "settings, message",
    [(("heun", 4, 3.0), "not one of euler, ddim, unipc, dpm"), (("unipc", 0, 3.0), "at least 1 step"),
     (("unipc", 4, 0.0), "positive shift"), (("dpm++", 4, 3.0, 4), "order of 1 to 3")],
)  # fmt: skip
def test_a_solver_that_there_is_not_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler.make_solver(*settings)


def test_rescaled_guidance_has_the_contrast_of_the_conditional_velocity():
    conditional, guided = jnp.array([1.0, -1.0, 2.0]), jnp.array([3.0, -5.0, 9.0])
    whole = sampler.rescale_guidance(guided, conditional, 1.0, jnp.std)
    assert float(jnp.std(whole)) == pytest.approx(float(jnp.std(conditional)), rel=1e-6)
    np.testing.assert_allclose(sampler.rescale_guidance(guided, conditional, 0.0, jnp.std), guided)


def test_guidance_of_one_is_off():
    conditional, unconditional = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_allclose(sampler.guide(conditional, unconditional, 1.0), conditional)
    np.testing.assert_allclose(sampler.guide(conditional, unconditional, 0.0), unconditional)
    np.testing.assert_allclose(sampler.guide(conditional, unconditional, 3.0), [2.0, -12.0])
