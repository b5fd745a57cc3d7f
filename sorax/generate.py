"""Prompts to videos: requests of any size packed in rows, denoised together, decoded."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from data_pipelines.rows import RowSource
from data_pipelines.text_tokens import Tokenizer
from sorax import functional, sharding
from sorax.attention import attention
from sorax.dit import DiT, DiTConfig
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.flow import add_noise
from sorax.patchify import num_tokens, patchify, unpatchify
from sorax.sampler import guide, integrate, make_solver, rescale_guidance, reuse_velocity, stack_solvers
from sorax.text import PAD_ID, TextConfig, TextEncoder, slot_bias

ROW_TOKENS = 512  # rows are this long, or as long as the longest request
TOKENS_A_DEVICE = 8192  # at a time, where rows are short
ROWS_A_DEVICE = 16


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


class _RequestExamples:
    """Requests as the loader's examples: noise for latents, and captions padded to what both branches need."""

    def __init__(self, noises, tokens, lengths):
        self.noises, self.tokens = noises, tokens
        self.shapes, self.text_lengths = np.array([z.shape[:3] for z in noises], np.int32), np.array(lengths, np.int32)

    def __len__(self):
        return len(self.noises)

    def key(self, i):
        return f"request {i}"

    def __getitem__(self, i):
        padding = self.text_lengths[i] - len(self.tokens[i])
        return dict(latents=self.noises[i], text_tokens=np.pad(self.tokens[i], (0, padding), constant_values=PAD_ID))


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
        self._sample = jax.jit(functools.partial(sample_rows, networks, **options), out_shardings=place,
                               static_argnames=("num_samples", "on_step"))  # fmt: skip
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
                on_batch=lambda done: None, on_step=None) -> list[np.ndarray]:  # fmt: skip
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
            reuse: threshold of `reuse_velocity`; 0 is off.
            on_batch: called with the number of finished requests.
            on_step: called, from another thread, with the number of each step of a batch as it begins, from 1 on. What
                it raises ends sampling, and is raised here. It costs a call to the host each step, and none if None.

        Raises:
            UserError: a prompt that is too long, noise of the wrong shape, or settings out of range.
        """
        guidance = _guidance(guidance_scale, guidance_interval, guidance_rescale)
        if not 0 <= reuse < 1 or shift_tokens < 0:
            raise UserError(f"sampling: reuse is {reuse:g} and shift_tokens {shift_tokens}: the first is a relative "
                            "change from 0 to below 1, the second a number of tokens")  # fmt: skip
        noises = [self._noise(request) for request in requests]
        counts = [num_tokens(noise.shape[:3], self.dit_config.patch_size) for noise in noises]
        shifts = [shift * math.sqrt(n / shift_tokens) if shift_tokens else shift for n in counts]
        schedules = [(s, 1.0 if r.edit is None else r.edit[1]) for s, r in zip(shifts, requests)]
        different = sorted(set(schedules)) or [(shift, 1.0)]
        try:
            solvers = [make_solver(solver, num_steps, s, start=start) for s, start in different]
        except ValueError as error:
            raise UserError(f"sampling: {error}") from error
        self.runs = 0
        if not requests:
            return []
        numbers = [different.index(schedule) for schedule in schedules]
        starts = [self._start(*x, solvers[k].sigmas[0]) for *x, k in zip(requests, noises, numbers)]
        prompts = [self.tokenizer.encode(r.prompt, "the prompt") for r in requests]
        negatives = [self.tokenizer.encode(r.negative_prompt, "the negative prompt") for r in requests]
        lengths = [max(len(p), len(n) if guidance else 0) for p, n in zip(prompts, negatives)]
        rows, negative_rows = (self._rows(starts, tokens, lengths) for tokens in (prompts, negatives))
        extra = {}
        if any(request.given for request in requests):
            given = [self._given(request, noise) for request, noise in zip(requests, noises)]
            masks, clean = zip(*given)
            extra = dict(given=self._rows(masks, prompts, lengths), clean=self._rows(clean, prompts, lengths))
        if len(solvers) > 1:
            which = [np.full_like(noise, k) for noise, k in zip(noises, numbers)]
            extra["schedule"] = self._rows(which, prompts, lengths)
        steps = solvers[0] if len(solvers) == 1 else stack_solvers(solvers)

        results, count = [None] * len(requests), len(rows.plan(0))
        parts = 1 if self.mesh is None else sharding.batch_parts(self.mesh)
        # As many a device however many there are: the same program, and so the same numbers to the bit.
        size = parts * min(max(1, TOKENS_A_DEVICE // rows.row_tokens), ROWS_A_DEVICE, count)
        for start in range(0, count, size):
            indices = [min(i, count - 1) for i in range(start, start + size)]  # the last batch repeats its last row
            batch = _stack([rows[i] for i in indices])
            negative = _stack([negative_rows[i] for i in indices])["text_tokens"]
            batch |= {name: _stack([source[i] for i in indices])["tokens"] for name, source in extra.items()}
            if self.mesh is not None:
                batch, negative = sharding.put_rows((batch, negative), self.mesh)
            num_samples = max(len(row) for row in (rows.samples(i) for i in range(count)))
            with self._hook.calling(on_step):
                final, runs = self._sample(self.params, batch, negative, steps, guidance, reuse or None,
                                           num_samples=num_samples, on_step=self._hook if on_step else None)
                self.runs += int(runs)
            for row, i in zip(np.asarray(final), indices):
                offset = 0
                for sample in rows.samples(i):
                    shape = noises[sample].shape
                    n = num_tokens(shape[:3], self.dit_config.patch_size)
                    results[sample] = unpatchify(row[offset : offset + n], shape[:3], self.dit_config.patch_size)
                    offset += n
            on_batch(sum(r is not None for r in results))
        return results

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

    def _given(self, request, noise):
        """(1 where given, else 0; given latents), both `[t, h, w, C]`."""
        if request.given is None:
            return np.zeros_like(noise), np.zeros_like(noise)
        mask, latents = (np.asarray(x) for x in request.given)
        if mask.shape != noise.shape[:3] or latents.shape != noise.shape:
            raise UserError(f"what is given has shapes {mask.shape} and {latents.shape}, the video's latents "
                            f"{noise.shape}: make the mask [t, h, w] and the latents [t, h, w, C] of that")  # fmt: skip
        if not np.isfinite(latents[mask]).all():
            raise UserError("what is given holds NaN or infinite values")
        patches = patchify(mask[..., None], self.dit_config.patch_size)
        if not (patches.all(-1) | ~patches.any(-1)).all():
            raise UserError(f"a patch of {self.dit_config.patch_size} is given in part: round the mask to whole "
                            "patches")  # fmt: skip
        wide = np.broadcast_to(mask[..., None], noise.shape).astype(np.float32)
        return wide, np.where(mask[..., None], latents, 0).astype(np.float32)

    def _rows(self, noises, tokens, lengths):
        patch_size = self.dit_config.patch_size
        counts = [num_tokens(noise.shape[:3], patch_size) for noise in noises]
        # Lengths are rounded up, so that sets of requests that differ a little share a compiled program.
        context = 1 if self.mesh is None else self.mesh.shape["context"]
        row_tokens = _round_up(min(max(ROW_TOKENS, max(counts)), sum(counts)), math.lcm(16, context))
        share = max((n + 1) / c for n, c in zip(lengths, counts))
        row_text = _round_up(int(min(share * row_tokens, sum(lengths) + len(lengths))) + max(lengths) + 1, 64)
        return RowSource(_RequestExamples(noises, tokens, lengths), row_tokens=row_tokens, row_text=row_text,
                         batch_size=1, seed=0, patch_size=patch_size)  # fmt: skip


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


def sample_rows(networks, params, rows, negative_tokens, solver, guidance=None, reuse=None, *, num_samples,
                on_step=None, **run_options):  # fmt: skip
    """Packed rows `[B, N, P]` denoised over the noise levels of a solver; the networks run in their parameters' dtype.

    Args:
        networks: graph definitions of the DiT and the text encoder. params: dict(dit=, text=).
        rows: batch of packed rows (`data_pipelines.rows`) whose tokens are noise; where something is given, also
            `given` and `clean`, `[B, N, P]`: 1 at what is given, and what is there. Given tokens have the clean level.
            Where there are several schedules, also `schedule` `[B, N, P]`, the number of each token's.
        negative_tokens: `[B, M]` int, what guidance leads away from, packed as the captions are.
        solver: of one schedule, or several of them stacked.
        guidance: None, or dict of scale and, as they are wanted, interval and rescale (see `Generator.latents`).
        reuse: None, or the threshold of `reuse_velocity`.
        num_samples: most samples of a row. on_step: see `integrate`. run_options: of `DiT.__call__`.

    Returns:
        rows `[B, N, P]`, and how often the network ran.
    """
    dit, encoder = (nnx.merge(graph, params[name]) for graph, name in zip(networks, ("dit", "text")))
    dtype = params["dit"]["patch_embed"]["kernel"].dtype
    # Both branches of guidance are rows of one batch: the second half has the negative prompts.
    texts = [rows["text_tokens"], negative_tokens] if guidance else [rows["text_tokens"]]
    both = lambda x: jnp.concatenate([x] * len(texts))  # noqa: E731
    text_tokens, text_ids = jnp.concatenate(texts), both(rows["text_segment_ids"])
    text, bias = encoder(text_tokens, text_ids), slot_bias(text_tokens, text_ids, num_samples)

    B, ids = rows["tokens"].shape[0], rows["segment_ids"]
    given = rows["given"] != 0 if "given" in rows else None
    schedules = solver.levels.shape[1] if solver.levels.ndim > 1 else 1
    level_index = rows["schedule"][..., 0].astype(jnp.int32) if schedules > 1 else jnp.zeros(ids.shape, jnp.int32)

    def spread(weight):
        return jnp.take(weight, level_index)[..., None] if schedules > 1 else weight

    token_levels = level_index if given is None else jnp.where(given[..., 0], schedules, level_index)

    def put(x):
        return x if given is None else jnp.where(given, rows["clean"], x)

    def network(x, sigma, branches):
        repeat = lambda a: jnp.concatenate([a] * branches)  # noqa: E731
        levels = jnp.append(jnp.atleast_1d(sigma), 0.0)  # as noisy as the schedules have them, and clean
        levels = jnp.broadcast_to(levels, (branches * B, schedules + 1))
        return dit(
            repeat(x).astype(dtype), repeat(rows["positions"]), repeat(ids), levels, repeat(token_levels),
            *(a[: branches * B] for a in (text, text_ids, bias)), **run_options,
        )  # fmt: skip

    generated = (ids != 0) if given is None else (ids != 0) & ~given[..., 0]

    def guided(x, sigma):
        conditional, unconditional = jnp.split(network(x, sigma, 2), 2)
        scale = guidance["scale"]
        if "interval" in guidance:
            scale = spread(jnp.where(_inside(sigma, guidance["interval"]), scale, 1.0))
        velocity = guide(conditional, unconditional, scale)
        if "rescale" in guidance:
            deviation = functools.partial(_sample_deviation, ids=ids, counted=generated, num_samples=num_samples)
            velocity = rescale_guidance(velocity, conditional, guidance["rescale"], deviation)
        return velocity

    def velocity(x, sigma):
        x = put(x)
        if guidance is None:
            return network(x, sigma, 1)
        if "interval" not in guidance:
            return guided(x, sigma)
        some = jnp.any(_inside(sigma, guidance["interval"]))
        return jax.lax.cond(some, lambda: guided(x, sigma), lambda: network(x, sigma, 1))

    steps = solver.levels.shape[0]
    if reuse is None:
        return put(integrate(velocity, rows["tokens"], solver, spread, on_step=on_step)), steps

    def mean(x):
        return jnp.sum(x * generated[..., None]) / jnp.maximum(jnp.sum(generated) * x.shape[-1], 1)

    run, begin = reuse_velocity(velocity, steps, reuse, mean)
    x, memory = integrate(run, rows["tokens"], solver, spread, begin(rows["tokens"]), on_step)
    return put(x), memory.runs


def _inside(sigma, interval):
    return (interval[0] <= sigma) & (sigma <= interval[1])


def _sample_deviation(x, ids, counted, num_samples):
    """Standard deviation `[B, N, 1]` of the values of x `[B, N, P]` over the counted tokens of each token's sample."""
    member = jax.nn.one_hot(ids, num_samples + 1) * counted[..., None]  # [B, N, S + 1]
    count = jnp.maximum(jnp.sum(member, axis=1), 1) * x.shape[-1]
    mean = jnp.einsum("bns,bnp->bs", member, x) / count
    centred = x - jnp.einsum("bns,bs->bn", member, mean)[..., None]
    variance = jnp.einsum("bns,bnp->bs", member, jnp.square(centred)) / count
    return jnp.take_along_axis(jnp.sqrt(variance), ids, axis=1)[..., None]


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
