"""Words one after the other from a function that gives the chances of the next one: greedy, by nucleus, by beams.

Legend: X captions written together, V vocabulary, T most tokens, W beams.
"""

import dataclasses

import jax
import jax.numpy as jnp

PAD_ID, EOS_ID = 0, 1
HOW = ("greedy", "nucleus", "beam")
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How captions are written.

    how: greedy, the likeliest token each time; nucleus, a draw from the likeliest tokens that have `top_p` of the
    chances together (Holtzman et al. 2020), at `temperature`; beam, the likeliest of `beams` captions, their
    log-likelihood divided by ((5 + length) / 6) ** length_penalty (Wu et al. 2016).
    """

    how: str = "greedy"
    max_tokens: int = 200
    temperature: float = 1.0
    top_p: float = 0.9
    beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self):
        if self.how not in HOW:
            raise ValueError(f"how is {self.how!r}: use one of {', '.join(HOW)}")
        if self.max_tokens < 1 or self.beams < 1:
            raise ValueError(f"max_tokens {self.max_tokens} and beams {self.beams} must be at least 1")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError(f"temperature {self.temperature} must be above 0, and top_p {self.top_p} above 0 and at "
                             "most 1")  # fmt: skip
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty is {self.length_penalty}: it is not negative")

    @property
    def width(self) -> int:
        """Captions that are written for one that is asked for."""
        return self.beams if self.how == "beam" else 1


def write(step, cache, start, active, keys, config: DecodingConfig):
    """Token ids int32 `[X, T]`, the end mark last, then padding.

    Args:
        step: (cache, tokens int32 `[X * W]`, position) -> (logits `[X * W, V]`, cache): the next token of each from the
            last one, W of a caption one after the other.
        cache: pytree of arrays `[X * W, ...]`. start: int32 `[X]`, the first of the last tokens.
        active: bool `[X]`; nothing is written of the others.
        keys: JAX keys `[X]`, of each caption's own draws: it does not depend on what is written beside it.
    """
    if config.how == "beam":
        return _beam(step, cache, start, active, config)
    X, T = len(start), config.max_tokens

    def choose(logits, position):
        if config.how == "greedy":
            return jnp.argmax(logits, axis=-1)
        kept = jnp.where(nucleus(logits / config.temperature, config.top_p), logits / config.temperature, NEVER)
        return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row))(keys, kept)

    def body(state):
        position, tokens, last, done, cache = state
        logits, cache = step(cache, last, position)
        new = jnp.where(done, PAD_ID, choose(logits, position)).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], position, axis=1)
        return position + 1, tokens, new, done | (new == EOS_ID), cache

    def goes_on(state):
        return (state[0] < T) & ~jnp.all(state[3])

    start_state = jnp.int32(0), jnp.full((X, T), PAD_ID, jnp.int32), start.astype(jnp.int32), ~active, cache
    return jax.lax.while_loop(goes_on, body, start_state)[1]


def nucleus(logits, top_p: float):
    """Which tokens, bool `[..., V]`, are the fewest that have at least top_p of the chances together."""
    order = jnp.argsort(-logits, axis=-1)
    chances = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    within = jnp.cumsum(chances, axis=-1) - chances < top_p  # what those before it leave
    return jnp.take_along_axis(within, jnp.argsort(order, axis=-1), axis=-1)


def _beam(step, cache, start, active, config):
    X, T, W = len(start), config.max_tokens, config.beams

    def penalty(length):
        return ((5.0 + length) / 6.0) ** config.length_penalty

    def body(state):
        position, tokens, last, scores, ended, ended_scores, cache = state
        logits, cache = step(cache, last.reshape(-1), position)
        V = logits.shape[-1]
        chances = scores[:, :, None] + jax.nn.log_softmax(logits).reshape(X, W, V)
        # The end mark is no way to go on; 2 W candidates leave W of the others in any case.
        best, index = jax.lax.top_k(chances.reshape(X, -1), min(2 * W, W * V))
        beam, token = index // V, (index % V).astype(jnp.int32)
        grown = jnp.take_along_axis(tokens, beam[:, :, None], axis=1).at[:, :, position].set(token)
        is_end = token == EOS_ID

        finished = jnp.where(is_end, best / penalty(position + 1.0), NEVER)
        ended_scores, kept = jax.lax.top_k(jnp.concatenate([ended_scores, finished], axis=1), W)
        ended = jnp.take_along_axis(jnp.concatenate([ended, grown], axis=1), kept[:, :, None], axis=1)

        scores, kept = jax.lax.top_k(jnp.where(is_end, NEVER, best), W)
        tokens = jnp.take_along_axis(grown, kept[:, :, None], axis=1)
        last, beam = (jnp.take_along_axis(x, kept, axis=1) for x in (token, beam))
        rows = (jnp.arange(X)[:, None] * W + beam).reshape(-1)
        return position + 1, tokens, last, scores, ended, ended_scores, jax.tree.map(lambda x: x[rows], cache)

    def goes_on(state):
        position, _, _, scores, _, ended_scores, _ = state
        # What goes on can only lose chances; its division by the longest length is the most that it can gain.
        hope = scores[:, 0] / penalty(jnp.where(config.length_penalty > 0, float(T), 1.0))
        return (position < T) & jnp.any(active & (hope > ended_scores[:, -1]))

    first = jnp.where(jnp.arange(W) == 0, 0.0, NEVER)
    empty = jnp.full((X, W, T), PAD_ID, jnp.int32)
    state = (jnp.int32(0), empty, jnp.broadcast_to(start[:, None], (X, W)).astype(jnp.int32),
             jnp.broadcast_to(first, (X, W)), empty, jnp.full((X, W), NEVER), cache)  # fmt: skip
    _, tokens, _, _, ended, ended_scores, _ = jax.lax.while_loop(goes_on, body, state)
    # Where none has ended in time, the likeliest of those that go on.
    chosen = jnp.where((ended_scores[:, 0] > NEVER / 2)[:, None], ended[:, 0], tokens[:, 0])
    return jnp.where(active[:, None], chosen, PAD_ID)
