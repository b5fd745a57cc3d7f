"""ODE solvers and guidance over any velocity function. Arrays and functions only.

Every solver here is linear in what it has seen: the next sample is a sum of the last one and of the denoised samples
of the last few steps, with weights that depend on the noise levels alone. So a solver is a table of weights
(`Solver`), made once in float64, and one loop (`integrate`) runs them all.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sorax.flow import shift_sigma

TRAIN_TIMESTEPS = 1000
SOLVERS = ("euler", "ddim", "unipc", "dpm++")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solver:
    """Weights of S steps that look back on O denoised samples, the newest first.

    Step i, with x0[i] = x[i] - sigmas[i] * velocity(x[i], levels[i]):
        y[i]     = corrector[i] . (x[i], y[i - 1], x0[i], x0[i - 1], ...)     (y = x where corrector is None)
        x[i + 1] = predictor[i] . (y[i], x0[i], x0[i - 1], ...)

    The tables of K schedules at once have a last axis more, see `stack_solvers`.
    """

    levels: np.ndarray  # [S] sigma that the network is told
    sigmas: np.ndarray  # [S + 1] noise levels of x
    predictor: np.ndarray  # [S, 1 + O]
    corrector: np.ndarray | None  # [S, 2 + O]


def make_solver(name: str, num_steps: int, shift: float, order: int = 2, start: float = 1.0) -> Solver:
    """The solvers of Wan's pipelines, step for step as diffusers has them.

    Args:
        name: "euler" (FlowMatchEulerDiscreteScheduler), "unipc" (UniPCMultistepScheduler; Zhao et al. 2023) or "dpm++"
            (DPMSolverMultistepScheduler, the multistep form; Lu et al. 2022); the latter two with `use_flow_sigmas`.
            "ddim" is dpm++ of order 1, which is Euler's step on its evenly spaced levels.
        num_steps: evaluations of the network. shift: of the noise schedule. order: of unipc and dpm++, 1 to 3.
        start: where on the schedule it begins, before the shift: 1 is noise, less is a sample with that much noise, to
            be added by the caller at the first of `sigmas` (SDEdit; Meng et al. 2022).

    Raises:
        ValueError: an unknown name, or settings out of range.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} is not one of {', '.join(SOLVERS)}")
    if num_steps < 1 or not 1 <= order <= 3 or not shift > 0:
        raise ValueError(f"a solver takes at least 1 step, an order of 1 to 3 and a positive shift, got {num_steps}, "
                         f"{order} and {shift:g}")  # fmt: skip
    if not 0.01 <= start <= 1:
        raise ValueError(f"a solver starts between 0.01 and 1 (noise) of its schedule, got {start:g}")
    if name == "euler":
        sigmas = sigma_schedule(num_steps, shift, start)
        ratio = sigmas[1:].astype(np.float64) / sigmas[:-1]
        return _solver(sigmas[:-1], sigmas, np.stack([ratio, 1 - ratio], axis=1), None)
    # Their levels are whole timesteps, though their sigmas are not; the two differ in where the sigmas begin.
    even = np.linspace(1, 1 / TRAIN_TIMESTEPS, num_steps + 1)
    even = even[:-1] if name == "unipc" else 1 - even[:0:-1]
    sigmas = shift_sigma(start * even, shift)
    if name == "unipc":
        sigmas[0] = min(sigmas[0], 1 - 1e-6)  # the logarithm of 1 - sigma is taken
    levels = np.floor(TRAIN_TIMESTEPS * sigmas) / TRAIN_TIMESTEPS
    sigmas = np.append(sigmas, 0).astype(np.float32)
    make = _unipc if name == "unipc" else _dpm
    return _solver(levels, sigmas, *make(sigmas, 1 if name == "ddim" else order))


def _solver(levels, sigmas, predictor, corrector):
    tables = (levels, sigmas, predictor, corrector)
    return Solver(*(None if x is None else np.asarray(x, np.float32) for x in tables))


def stack_solvers(solvers) -> Solver:
    """Solvers of one kind and one number of steps as one: its tables have them along a last axis `[..., K]`."""
    return jax.tree.map(lambda *tables: np.stack(tables, axis=-1), *solvers)


def wait(solver: Solver, before: int, num_steps: int) -> Solver:
    """A solver whose steps come after `before` steps that change nothing, with such steps behind them up to a number.

    Stacked, such solvers let parts of a sample lag behind others.
    """
    after = num_steps - before - len(solver.levels)
    if before < 0 or after < 0:
        raise ValueError(f"{len(solver.levels)} steps behind {before} are no part of {num_steps} steps")

    def pad(table, first, last):
        return np.concatenate([np.repeat(first[None], before, axis=0), table, np.repeat(last[None], after, axis=0)])

    def still(table):
        return None if table is None else pad(table, *[np.eye(1, table.shape[1], dtype=np.float32)[0]] * 2)

    return Solver(pad(solver.levels, solver.levels[0], np.zeros_like(solver.levels[0])),
                  pad(solver.sigmas, solver.sigmas[0], solver.sigmas[-1]), still(solver.predictor),
                  still(solver.corrector))  # fmt: skip


def sigma_schedule(num_steps: int, shift: float, start: float = 1.0) -> np.ndarray:
    """Noise levels `[num_steps + 1]` from 1 down to 0, spaced as diffusers' FlowMatchEulerDiscreteScheduler has them.

    That scheduler spaces evenly down to the shifted smallest training level, then shifts. start: see `make_solver`.
    """
    smallest = shift_sigma(1 / TRAIN_TIMESTEPS, shift)
    sigmas = shift_sigma(start * np.linspace(1.0, smallest, num_steps), shift)
    return np.append(sigmas, 0.0).astype(np.float32)


def _log_snr(sigmas):
    """Half the log signal-to-noise ratio, with 1 - sigma rounded to float32 as diffusers has it; infinite at 0."""
    with np.errstate(divide="ignore"):
        return np.log((1 - sigmas).astype(np.float64)) - np.log(sigmas.astype(np.float64))


def _unipc(sigmas, order):
    """Predictor and corrector weights of UniPC-bh2 on the denoised sample (Zhao et al. 2023, algorithms 5 to 8)."""
    S, lambdas = len(sigmas) - 1, _log_snr(sigmas)
    predictor, corrector = np.zeros((S, 2 + order)), np.zeros((S, 3 + order))  # which look back on one more
    corrector[0, 0] = 1
    for i in range(S):
        k = min(order, S - i, i + 1)  # fewer steps to look back on at the start, and fewer are safe at the end
        # Weights of the denoised samples' differences from the newest, D_j = (x0[i - j] - x0[i]) / r_j.
        h = lambdas[i + 1] - lambdas[i]
        r = [(lambdas[i - j] - lambdas[i]) / h for j in range(1, k)]
        matrix, right, b = _bh2(h, r)
        solved = np.array([0.5]) if k == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
        alpha = 1 - float(sigmas[i + 1])
        ratio = float(sigmas[i + 1]) / float(sigmas[i])
        predictor[i, :2] = ratio, -alpha * b
        for j, (rho, rj) in enumerate(zip(solved, r), start=1):
            predictor[i, 1 + j] -= alpha * b * rho / rj
            predictor[i, 1] += alpha * b * rho / rj
        # The corrector of the next step repeats this one with what the network says at its end.
        if i + 1 < S:
            solved = np.array([0.5]) if k == 1 else np.linalg.solve(matrix, right)
            row = corrector[i + 1]  # x, y before, x0 there, x0 of this step, ...
            row[1:4] = ratio, -alpha * b * solved[-1], -alpha * b * (1 - solved[-1])
            for j, (rho, rj) in enumerate(zip(solved[:-1], r), start=1):
                row[3 + j] -= alpha * b * rho / rj
                row[3] += alpha * b * rho / rj
    return predictor, corrector


def _bh2(h, r):
    """The linear system of order len(r) + 1, and B(h) = exp(-h) - 1, of UniPC in the data prediction form."""
    nodes, b = np.array([*r, 1.0]), np.expm1(-h)
    phi, factorial, right = b / -h - 1, 1, []
    for i in range(1, len(nodes) + 1):
        right.append(phi * factorial / b)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    return np.stack([nodes**i for i in range(len(nodes))]), np.array(right), b


def _dpm(sigmas, order):
    """Predictor weights of multistep DPM-Solver++ on the denoised sample (Lu et al. 2022); the last step is Euler's."""
    S, lambdas = len(sigmas) - 1, _log_snr(sigmas)
    predictor = np.zeros((S, 1 + order))
    for i in range(S):
        k = min(order, i + 1)
        if S < 15:
            k = min(k, S - i)
        if i == S - 1:
            k = 1
        h = lambdas[i + 1] - lambdas[i]
        alpha, b = 1 - float(sigmas[i + 1]), np.expm1(-h)
        predictor[i, :2] = float(sigmas[i + 1]) / float(sigmas[i]), -alpha * b
        newest, before, oldest = np.eye(3)[:, :order]  # weights of x0[i], x0[i - 1] and x0[i - 2]
        if k == 2:
            first = (newest - before) * h / (lambdas[i] - lambdas[i - 1])
            predictor[i, 1:] -= 0.5 * alpha * b * first
        elif k == 3:
            r0, r1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
            near, far = (newest - before) / r0, (before - oldest) / r1
            second = (near - far) / (r0 + r1)
            first = near + r0 * second
            predictor[i, 1:] += alpha * ((b / h + 1) * first - ((b + h) / h**2 - 0.5) * second)
    return predictor, None


def guide(conditional, unconditional, scale):
    """Classifier-free guidance (Ho & Salimans 2022); a scale of 1 is off."""
    return unconditional + scale * (conditional - unconditional)


def rescale_guidance(guided, conditional, factor, deviation):
    """Guided velocity with its contrast brought back, by a factor in [0, 1], to that of the conditional one.

    Guidance makes samples too strong; see Lin et al. 2024, "Common diffusion noise schedules and sample steps are
    flawed", equations 15 and 16. deviation: array -> its standard deviation over each sample, to broadcast with it.
    """
    same_contrast = guided * deviation(conditional) / jnp.maximum(deviation(guided), 1e-12)
    return factor * same_contrast + (1 - factor) * guided


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What `reuse_layers` keeps of when all layers ran: what the first one and what the others added to x."""

    first: jax.Array
    others: jax.Array
    runs: jax.Array  # how often they did

    @classmethod
    def nothing(cls, shape, dtype):
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def reuse_layers(x, after_first, others, *, kept: Kept, threshold, change):
    """x after all layers of a network, of which all but the first are left out where the first one adds what it did.

    What they added when they ran last is added again (first-block caching, as ParaAttention and diffusers have it;
    after TeaCache, Liu et al. 2024). All of a batch runs, or nothing of it.

    Args:
        x, after_first: before and after the first layer. others: function of `after_first`, the other layers.
        threshold: largest relative change that is too small to matter: 0 reuses nothing; 0.05 to 0.2 is usual.
        change: (what the first layer adds, what it added when all ran last) -> that relative change, a scalar.

    Returns:
        x after all layers, and what is kept now.
    """
    first = after_first - x
    again = (kept.runs > 0) & (change(first, kept.first) < threshold)

    def fresh():
        end = others(after_first)
        return end, Kept(first, end - after_first, kept.runs + 1)

    return jax.lax.cond(again, lambda: (after_first + kept.others, kept), fresh)


def integrate(velocity_fn, x, solver: Solver, spread=lambda weight: weight, memory=None, on_step=None):
    """Integrates dx / dsigma = velocity over the noise levels of a solver.

    Args:
        velocity_fn: `(x, sigma) -> velocity`, sigma a scalar, or `[K]` of stacked solvers.
        x: start, any shape; noise where the first sigma is 1.
        spread: of stacked solvers: a number for each, `[K]` -> what broadcasts with x.
        memory: of a velocity function that has one: `(x, sigma, memory) -> (velocity, memory)`; a pytree.
        on_step: called on the host as each step begins; None: the program has no such call.

    Returns:
        x at the last sigma; with a memory (x, memory).
    """
    order = solver.predictor.shape[1] - 1

    def step(carry, row):
        x, before, seen, memory = carry
        level, sigma, predict, correct = row
        if on_step is not None:
            jax.debug.callback(on_step)
        if memory is None:
            velocity = velocity_fn(x, level)
        else:
            velocity, memory = velocity_fn(x, level, memory)
        seen = [x - spread(sigma) * velocity, *seen[:-1]]
        if correct is not None:
            x = before = _combine(correct, [x, before, *seen], spread)
        return (_combine(predict, [x, *seen], spread), before, seen, memory), None

    rows = jax.tree.map(jnp.asarray, (solver.levels, solver.sigmas[:-1], solver.predictor, solver.corrector))
    seen = [jnp.zeros_like(x)] * order
    before = None if solver.corrector is None else jnp.zeros_like(x)
    (x, _, _, memory), _ = jax.lax.scan(step, (x, before, seen, memory), rows)
    return x if memory is None else (x, memory)


def _combine(weights, parts, spread):
    return sum(spread(weights[i]) * part for i, part in enumerate(parts))
