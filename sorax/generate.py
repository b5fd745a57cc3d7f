"""Prompts to videos: requests of any size packed in rows, denoised together, decoded."""

import contextlib
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from data_pipelines.text_tokens import Tokenizer
from sorax import functional, sharding
from sorax.attention import attention
from sorax.backend import forward_options
from sorax.dit import DiT, DiTConfig
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.flow import add_noise
from sorax.patchify import grid, num_tokens, patchify, unpatchify
from sorax.request_rows import Item, Rows, groups_of
from sorax.sampler import Kept, guide, integrate, make_solver, rescale_guidance, reuse_layers, stack_solvers, wait
from sorax.text import TextConfig, TextEncoder, slot_bias


@dataclasses.dataclass(frozen=True)
class Request:
    """One video to make.

    noise: where it starts: float `[t, h, w, C]`, in the normalised latent space; None: drawn from the seed.
    given: what of it is given rather than generated: bool `[t, h, w]`, the same within a patch, and the latents
        `[t, h, w, C]` that it shows there (any finite value elsewhere). See `sorax.modes`.
    edit: latents `[t, h, w, C]` that it is made of, and how much of the noise schedule they go back, from 0.01 to 1
        (SDEdit; Meng et al. 2022): 1 leaves nothing of them. None: it is made of noise.
    """

    prompt: str
    num_frames: int
    height: int
    width: int
    seed: int = 0
    negative_prompt: str = ""
    noise: np.ndarray | None = None
    given: tuple[np.ndarray, np.ndarray] | None = None
    edit: tuple[np.ndarray, float] | None = None


def given_frames(codec: Codec, pieces: dict[int, np.ndarray], num_frames: int, height: int, width: int):
    """`Request.given` of pieces of video, each encoded by itself, such as a first frame. (A piece that begins later is
    not what training shows there: see `sorax.modes.given_of`.)

    Args:
        pieces: latent frame at which a piece begins -> uint8 `[T, H, W, 3]`, T = 4n + 1 (for a temporal stride of 4).
        num_frames, height, width: of the request.

    Raises:
        UserError: a piece of another size, or one that does not fit in time or overlaps another.
    """
    shape = codec.config.latent_shape(num_frames, height, width)
    mask, latents = np.zeros(shape, bool), np.zeros((*shape, codec.config.latent_channels), np.float32)
    for start, piece in pieces.items():
        if piece.shape[1:3] != (height, width):
            raise UserError(f"what is given has {piece.shape[2]}x{piece.shape[1]} pixels, the video {width}x{height}: "
                            "scale it to that")  # fmt: skip
        made = codec.encode([piece])[0]
        end = start + len(made)
        if start < 0 or end > shape[0] or mask[start:end].any():
            raise UserError(f"what is given fills latent frames {start} to {end - 1} of {shape[0]}, which are not "
                            "there or given twice")  # fmt: skip
        mask[start:end], latents[start:end] = True, made
    return mask, latents


def legal_shape(vae, patch_size, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Nearest (frames, height, width) that the VAE and the patches can make; at least one of each."""
    ts, grid = vae.temporal_stride, [vae.spatial_stride * p for p in patch_size[1:]]
    frames = 1 + ts * patch_size[0] * max(0, round((num_frames - 1) / (ts * patch_size[0])))
    return frames, *(g * max(1, int(x / g + 0.5)) for x, g in zip((height, width), grid))


class _StepHook:
    """What a compiled program calls as a step begins: one object for all calls, so that it is compiled once."""

    def __init__(self):
        self._function, self._error, self._steps = None, None, 0

    @contextlib.contextmanager
    def calling(self, function):
        """Calls a function with the number of each step; raises what it raised, not what the program made of it."""
        self._function, self._error, self._steps = function, None, 0
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def __call__(self):
        self._steps += 1
        try:
            self._function(self._steps)
        except BaseException as error:
            self._error = error
            raise


class Generator:
    """Text-to-video sampling with a DiT, its text encoder and tokenizer, and a VAE codec.

    With a mesh the networks' parameters lie on it as in training, and all its processes call `latents` alike.
    dit_graph: graph definition of the DiT that its parameters are of, where that is not `DiT`'s own.
    """

    def __init__(self, dit_config: DiTConfig, dit, text_config: TextConfig, text, tokenizer: Tokenizer, codec: Codec,
                 mesh: Mesh | None = None, dit_graph=None):  # fmt: skip
        self.dit_config, self.tokenizer, self.codec = dit_config, tokenizer, codec
        self.params = dict(dit=dit, text=text)
        dit_graph = functional.abstract(DiT, dit_config)[0] if dit_graph is None else dit_graph
        networks = dit_graph, functional.abstract(TextEncoder, text_config)[0]
        self.mesh, options, place = mesh, {}, None
        if mesh is not None:
            attend, attend_text = sharding.attention_on(mesh, attention)
            options = dict(constrain=sharding.activation_constraint(mesh), attend=attend, attend_text=attend_text)
            place = sharding.replicated(mesh)
        self._sample = jax.jit(functools.partial(sample_groups, networks, **options), out_shardings=place,
                               static_argnames=("segments", "on_step"),
                               compiler_options=forward_options())  # fmt: skip
        self._hook = _StepHook()
        self.runs = 0  # of the network, in the last call of `latents`: each is a batch of rows, of all its branches

    def placed(self, params: dict) -> dict:
        """Other parameters of the same networks, on the devices that these are on: what `params` may be set to."""
        if self.mesh is None:
            return params
        return jax.device_put(params, sharding.shardings_for(params, self.mesh))

    def videos(self, requests, **settings) -> list[np.ndarray]:
        """Videos uint8 `[T, H, W, 3]` of requests; settings as `latents` takes them."""
        return self.codec.decode(self.latents(requests, **settings))

    def latents(self, requests, *, num_steps: int, guidance_scale: float = 1.0, shift: float = 3.0,
                solver: str = "euler", guidance_interval: tuple[float, float] | None = None,
                guidance_rescale: float = 0.0, shift_tokens: int = 0, reuse: float = 0.0,
                rising: float = 0.0, on_batch=lambda done: None, on_step=None) -> list[np.ndarray]:  # fmt: skip
        """Final normalised latents `[t, h, w, C]` of requests.

        A request's result depends on its own prompt, shape and seed alone, not on what it is packed with; with `reuse`
        that holds to within the error that it makes.

        Args:
            requests: list of `Request`, of legal shapes (`legal_shape`).
            num_steps: of the solver, also of an edit. shift: of the noise schedule. solver: see `make_solver`.
            guidance_scale: 1 is off. guidance_interval: noise levels in [0, 1] between which there is guidance
                (Kynkaanniemi et al. 2024); the other steps cost half. guidance_rescale: see `rescale_guidance`.
            shift_tokens: requests of so many tokens have that shift, others by the square root of theirs
                (`flow.shift_for_length`); 0: all have it.
            reuse: threshold of `reuse_layers`; 0 is off.
            rising: share of num_steps by which the last frame lags behind the first that is generated, from 0 to 1:
                noise rises along time, and there are so many steps more. For networks that were trained with that
                (`flow.draw_rising`).
            on_batch: called with the number of finished requests.
            on_step: called, from another thread, with the number of each step of a batch as it begins, from 1 on. What
                it raises ends sampling, and is raised here. It costs a call to the host each step, and none if None.

        Raises:
            UserError: a prompt that is too long, noise of the wrong shape, or settings out of range.
        """
        guidance = _guidance(guidance_scale, guidance_interval, guidance_rescale)
        if not 0 <= reuse < 1 or not 0 <= rising <= 1 or shift_tokens < 0:
            raise UserError(f"sampling: reuse is {reuse:g}, rising {rising:g} and shift_tokens {shift_tokens}: the "
                            "first is a relative change from 0 to below 1, the second a share of the steps from 0 to "
                            "1, the third a number of tokens")  # fmt: skip
        noises = [self._noise(request) for request in requests]
        counts = [num_tokens(noise.shape[:3], self.dit_config.patch_size) for noise in noises]
        fields = {}
        if any(request.given for request in requests):
            given = [self._given(request, noise) for request, noise in zip(requests, noises)]
            fields |= dict(zip(("given", "clean"), zip(*given)))
        lag, delays = round(rising * num_steps), [np.zeros(n, int) for n in counts]
        if lag:
            delays = [self._delays(lag, z, g) for z, g in zip(noises, fields.get("given", [None] * len(noises)))]
        shifts = [shift * math.sqrt(n / shift_tokens) if shift_tokens else shift for n in counts]
        begins = [1.0 if request.edit is None else request.edit[1] for request in requests]
        different, numbers = _schedules(shifts, begins, delays)
        try:
            solvers = [wait(make_solver(solver, num_steps, s, start=start), delay, num_steps + lag)
                       for s, start, delay in different or [(shift, 1.0, 0)]]  # fmt: skip
        except ValueError as error:
            raise UserError(f"sampling: {error}") from error
        self.runs = 0
        if not requests:
            return []
        starts = [self._start(*x, solvers[k[0]].sigmas[0]) for *x, k in zip(requests, noises, numbers)]
        fields["tokens"] = [self._patches(start) for start in starts]
        if len(solvers) > 1:
            fields["schedule"] = numbers
        steps = solvers[0] if len(solvers) == 1 else stack_solvers(solvers)

        items = [self._item(request, noise, bool(guidance)) for request, noise in zip(requests, noises)]
        groups, results = groups_of(counts), [None] * len(requests)
        multiple = math.lcm(16, 1 if self.mesh is None else self.mesh.shape["context"])
        rows = {}  # where the network runs on both branches, and where on one alone
        if guidance is None or "interval" in guidance:
            rows["one"] = Rows(items, groups, (0,), multiple)
        if guidance is not None:
            rows["two"] = Rows(items, groups, (0, 1), multiple)
        some = next(iter(rows.values()))
        # A group a device however many there are: the same program, and so the same numbers to the bit.
        size = 1 if self.mesh is None else sharding.batch_parts(self.mesh)
        for start in range(0, len(groups), size):
            indices = [min(i, len(groups) - 1) for i in range(start, start + size)]  # the last ones repeat the last
            batch = {name: x.arrays(indices) for name, x in rows.items()}
            batch |= _end_to_end(fields, some, indices)
            if self.mesh is not None:
                batch = sharding.put_rows(batch, self.mesh)
            segments = max(x.segments for x in rows.values())
            with self._hook.calling(on_step):
                final, runs = self._sample(self.params, batch, steps, guidance, reuse or None, segments=segments,
                                           on_step=self._hook if on_step else None)  # fmt: skip
                self.runs += int(runs)
            for tokens, index in zip(np.asarray(final), indices):
                for i, at in some.starts(index).items():
                    shape = noises[i].shape[:3]
                    results[i] = unpatchify(tokens[at : at + counts[i]], shape, self.dit_config.patch_size)
            on_batch(sum(r is not None for r in results))
        return results

    def _item(self, request, noise, guided):
        """How a request is packed; what guidance leads away from is its second caption."""
        captions = [self.tokenizer.encode(request.prompt, "the prompt")]
        if guided:
            captions.append(self.tokenizer.encode(request.negative_prompt, "the negative prompt"))
        return Item(grid(noise.shape[:3], self.dit_config.patch_size), tuple(captions))

    def _patches(self, latents):
        return patchify(latents, self.dit_config.patch_size)

    def _noise(self, request):
        t, h, w = self.codec.config.latent_shape(request.num_frames, request.height, request.width)
        shape = (t, h, w, self.codec.config.latent_channels)
        if request.noise is None:
            return np.asarray(jax.random.normal(jax.random.key(request.seed), shape))
        if request.noise.shape != shape:
            raise UserError(f"the given noise has shape {request.noise.shape}, but {request.num_frames} frames of "
                            f"{request.width}x{request.height} need {shape} (t, h, w, C)")  # fmt: skip
        return np.asarray(request.noise, np.float32)

    def _start(self, request, noise, sigma):
        """Where sampling starts: noise, or what is edited with noise of level sigma."""
        if request.edit is None:
            return noise
        latents = np.asarray(request.edit[0], np.float32)
        if latents.shape != noise.shape or not np.isfinite(latents).all():
            raise UserError(f"what is edited has latents {latents.shape} and the video {noise.shape}: make both the "
                            "same, of finite numbers")  # fmt: skip
        return add_noise(latents, noise, sigma)

    def _delays(self, lag, noise, given):
        """Steps int [n] after which each patch begins: more along time, from the first frame on that has to be made."""
        t, h, w = grid(noise.shape[:3], self.dit_config.patch_size)
        made = np.ones(t, bool) if given is None else ~given.reshape(t, -1).all(axis=1)
        frame = np.maximum(np.arange(t) - np.argmax(made), 0)
        return np.repeat(np.round(lag * frame / max(1, frame[-1])).astype(int), h * w)

    def _given(self, request, noise):
        """(bool [n], which of its n patches are given; given patches [n, P])."""
        if request.given is None:
            nothing = self._patches(np.zeros_like(noise))
            return np.zeros(len(nothing), bool), nothing
        mask, latents = (np.asarray(x) for x in request.given)
        if mask.shape != noise.shape[:3] or latents.shape != noise.shape:
            raise UserError(f"what is given has shapes {mask.shape} and {latents.shape}, the video's latents "
                            f"{noise.shape}: make the mask [t, h, w] and the latents [t, h, w, C] of that")  # fmt: skip
        if not np.isfinite(latents[mask]).all():
            raise UserError("what is given holds NaN or infinite values")
        patches = self._patches(mask[..., None])
        if not (patches.all(-1) | ~patches.any(-1)).all():
            raise UserError(f"a patch of {self.dit_config.patch_size} is given in part: round the mask to whole "
                            "patches")  # fmt: skip
        return patches.all(-1), self._patches(np.where(mask[..., None], latents, 0).astype(np.float32))


def _schedules(shifts, begins, delays):
    """The different (shift, beginning, delay) of requests, and int [n] for each: which of them each patch has.

    delays: int [n] of each, of its patches.
    """
    late = [np.unique(delay, return_inverse=True) for delay in delays]
    schedules = [[(*both, delay) for delay in some.tolist()] for *both, (some, _) in zip(shifts, begins, late)]
    different = sorted(set(itertools.chain(*schedules)))
    numbers = [np.array([different.index(one) for one in some], np.int32) for some in schedules]
    return different, [some[which] for some, (_, which) in zip(numbers, late)]


def _end_to_end(fields, rows, groups):
    """Arrays `[G, T, ...]` of lists of arrays `[n, ...]`, one a request, and `requests` int `[G, T]`: whose each token
    is, 0 where there is none."""
    out = {name: np.zeros((len(groups), rows.T, *values[0].shape[1:]), values[0].dtype)
           for name, values in fields.items()}  # fmt: skip
    out["requests"] = np.zeros((len(groups), rows.T), np.int32)
    for g, group in enumerate(groups):
        for number, (i, at) in enumerate(rows.starts(group).items(), start=1):
            here = slice(at, at + rows.items[i].tokens)
            out["requests"][g, here] = number
            for name, values in fields.items():
                out[name][g, here] = values[i]
    return out


def _guidance(scale, interval, rescale):
    """What `sample_rows` takes of guidance: its keys decide the program, its values do not."""
    if not 0 <= rescale <= 1:
        raise UserError(f"sampling: guidance_rescale is {rescale:g}: give a share from 0 to 1")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"sampling: guidance_interval is {interval[0]:g} to {interval[1]:g}: give two noise levels "
                        "from 0 to 1, the lower one first")  # fmt: skip
    if scale == 1.0:
        return None
    guidance = dict(scale=scale)
    if interval is not None and tuple(interval) != (0, 1):
        guidance["interval"] = tuple(interval)
    return guidance | (dict(rescale=rescale) if rescale else {})


def sample_groups(networks, params, batch, solver, guidance=None, reuse=None, *, segments, on_step=None,
                  **run_options):
    """Tokens `[G, T, P]` of groups of requests, denoised over the noise levels of a solver.

    A request's tokens are kept once; the network sees them in packed rows (`sorax.request_rows`), twice where there is
    guidance. It runs in its parameters' dtype.

    Args:
        networks: graph definitions of the DiT and the text encoder. params: dict(dit=, text=).
        batch: tokens `[G, T, P]`, noise; requests `[G, T]`, whose they are; where something is given, given bool
            `[G, T]` and clean `[G, T, P]`, what is there: given tokens have the clean level. Where there are several
            schedules, schedule int `[G, T]`, the number of each token's. And the rows' arrays (`Rows.arrays`): "two" of
            both branches where there is guidance, "one" of the first where there is none, or not at all steps.
        solver: of one schedule, or several of them stacked.
        guidance: None, or dict of scale and, as they are wanted, interval and rescale (see `Generator.latents`).
        reuse: None, or the threshold of `reuse_layers`.
        segments: most segments of a row. on_step: see `integrate`. run_options: of `DiT.__call__`.

    Returns:
        `[G, T, P]`, and how often the network ran (with `reuse`, all of it).
    """
    dit, encoder = (nnx.merge(graph, params[name]) for graph, name in zip(networks, ("dit", "text")))
    dtype = params["dit"]["patch_embed"]["kernel"].dtype
    texts = {}
    for name in sorted({"one", "two"} & batch.keys()):
        tokens, ids = batch[name]["text_tokens"], batch[name]["text_segment_ids"]
        texts[name] = encoder(tokens, ids), ids, slot_bias(tokens, ids, segments)

    requests, given = batch["requests"], batch.get("given")
    schedules = solver.levels.shape[1] if solver.levels.ndim > 1 else 1
    level_index = batch["schedule"] if schedules > 1 else jnp.zeros(requests.shape, jnp.int32)

    def spread(weight):
        return jnp.take(weight, level_index)[..., None] if schedules > 1 else weight

    token_levels = level_index if given is None else jnp.where(given, schedules, level_index)

    def put(x):
        return x if given is None else jnp.where(given[..., None], batch["clean"], x)

    def network(x, sigma, name, memory):
        """Velocities `[G, T, P]` of each branch in the rows of that name, and the memory that `reuse` has."""
        rows = batch[name]
        levels = jnp.append(jnp.atleast_1d(sigma), 0.0)  # as noisy as the schedules have them, and clean
        (B, N), options = rows["segment_ids"].shape, run_options
        if reuse is not None:
            change = functools.partial(_largest_change, ids=rows["segment_ids"], segments=segments)
            remember = functools.partial(reuse_layers, kept=memory[name], threshold=reuse, change=change)
            options = options | dict(remember=remember)
        velocity = dit(
            _take(x, rows["source"]).reshape(B, N, -1).astype(dtype), rows["positions"], rows["segment_ids"],
            jnp.broadcast_to(levels, (B, schedules + 1)), _take(token_levels, rows["source"]).reshape(B, N),
            *texts[name], **options,
        )  # fmt: skip
        if reuse is not None:
            velocity, kept = velocity
            memory = memory | {name: kept}
        velocity = velocity.reshape(len(x), -1, x.shape[-1])
        return [_take(velocity, places) for places in jnp.moveaxis(rows["places"], 1, 0)], memory

    counted = (requests != 0) if given is None else (requests != 0) & ~given

    def plain(x, sigma, memory):
        (velocity,), memory = network(x, sigma, "one", memory)
        return velocity, memory

    def guided(x, sigma, memory):
        (conditional, unconditional), memory = network(x, sigma, "two", memory)
        scale = guidance["scale"]
        if "interval" in guidance:
            scale = spread(jnp.where(_inside(sigma, guidance["interval"]), scale, 1.0))
        velocity = guide(conditional, unconditional, scale)
        if "rescale" in guidance:
            deviation = functools.partial(_deviation, requests=requests, counted=counted)
            velocity = rescale_guidance(velocity, conditional, guidance["rescale"], deviation)
        return velocity, memory

    def velocity(x, sigma, memory):
        x = put(x)
        if guidance is None or "interval" not in guidance:
            return (plain if guidance is None else guided)(x, sigma, memory)
        some = jnp.any(_inside(sigma, guidance["interval"]))
        return jax.lax.cond(some, guided, plain, x, sigma, memory)

    memory, width = {}, params["dit"]["patch_embed"]["kernel"].shape[1]
    if reuse is not None:
        memory = {name: Kept.nothing((*batch[name]["segment_ids"].shape, width), dtype) for name in texts}
    x, memory = integrate(velocity, batch["tokens"], solver, spread, memory, on_step)
    return put(x), sum(kept.runs for kept in memory.values()) if memory else solver.levels.shape[0]


def _inside(sigma, interval):
    return (interval[0] <= sigma) & (sigma <= interval[1])


def _largest_change(now, before, ids, segments):
    """How much arrays `[B, N, D]` of rows differ, relative to what was before, in the segment that differs most."""
    total = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=segments + 1))
    moved, size = (total(jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=-1), ids) for x in (now - before, before))
    return jnp.max((moved / jnp.maximum(size, 1e-12))[:, 1:])


def _take(x, places):
    """x `[G, n, ...]` at places int `[G, m]`: `[G, m, ...]`."""
    return jax.vmap(lambda x, places: x[places])(x, places)


def _deviation(x, requests, counted):
    """Standard deviation `[G, T, 1]` of the values of x `[G, T, P]` over the counted tokens of each token's request."""

    def of_group(x, requests, counted):
        total = functools.partial(jax.ops.segment_sum, segment_ids=requests, num_segments=len(x) + 1)
        count = jnp.maximum(total(counted.astype(x.dtype)), 1)[:, None] * x.shape[-1]
        counted = counted[:, None]
        mean = jnp.sum(total(x * counted), axis=-1, keepdims=True) / count
        centred = jnp.square(x - mean[requests]) * counted
        return jnp.sqrt(jnp.sum(total(centred), axis=-1, keepdims=True) / count)[requests]

    return jax.vmap(of_group)(x, requests, counted)
