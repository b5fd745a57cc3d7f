"""Rectified flow over packed rows: noising, noise levels, given masks and the loss. Pure functions of arrays.

    x_sigma = (1 - sigma) * x0 + sigma * noise,    velocity = d x_sigma / d sigma = noise - x0

(Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022.) sigma = 0 is clean, 1 is noise; the network is given
timestep = 1000 * sigma. Legend: B rows, N tokens, P patch size flattened, S samples of a row.
"""

import jax
import jax.numpy as jnp

GIVEN_MODES = ("none", "first", "last", "both", "first_k", "last_k", "both_k", "keyframes", "box")
SIGMA_KINDS = ("logit_normal", "uniform", "mode")


def add_noise(x0, noise, sigma):
    """x_sigma; all broadcast together."""
    return (1 - sigma) * x0 + sigma * noise


def velocity_target(x0, noise):
    """The velocity that carries x0 to noise as sigma goes from 0 to 1."""
    return noise - x0


def denoised(x, velocity, sigma):
    """x0 implied by a velocity at x = x_sigma."""
    return x - sigma * velocity


def implied_noise(x, velocity, sigma):
    """noise implied by a velocity at x = x_sigma."""
    return x + (1 - sigma) * velocity


def shift_sigma(sigma, shift):
    """Moves noise levels towards noise (shift > 1), as larger samples need (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma, shift):
    """Inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def shift_for_length(segment_ids, num_samples: int, shift: float, base_tokens: int):
    """Shift `[B, S]` of each sample by its number of tokens n: shift * sqrt(n / base_tokens).

    More tokens of one scene need more noise to hide it (Esser et al. 2024, eq. 23).
    segment_ids: `[B, N]` int in 0..num_samples.
    """
    counts = jnp.sum(segment_ids[:, :, None] == jnp.arange(1, num_samples + 1), axis=1)
    return shift * jnp.sqrt(jnp.maximum(counts, 1) / base_tokens)


def draw_sigma(key, shape, *, kind="logit_normal", mean=0.0, std=1.0, mode_scale=1.29, shift=1.0):
    """Training noise levels (Esser et al. 2024, section 3.1), then shifted.

    Args:
        kind: "logit_normal", sigmoid of a normal draw with mean and std; "uniform"; or "mode", which prefers the
            middle (or, below 0, the ends) by mode_scale in [-1, 1.75].
        shift: a number, or an array that broadcasts to `shape`.
    """
    if kind == "logit_normal":
        sigma = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
    elif kind in SIGMA_KINDS:
        u = jax.random.uniform(key, shape)
        sigma = u if kind == "uniform" else 1 - u - mode_scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)
    else:
        raise ValueError(f"noise levels of kind {kind!r}: use one of {', '.join(SIGMA_KINDS)}")
    return shift_sigma(sigma, shift)


def draw_given(key, positions, segment_ids, num_samples: int, probabilities, first_k=(1, 0)):
    """Random conditions: which patches of each sample are given rather than generated.

    Args:
        positions: `[B, N, 3]` int (t, h, w); segment_ids: `[B, N]` int in 0..num_samples.
        probabilities: weight of each of `GIVEN_MODES`, the rest 0 where there are fewer: nothing; the first latent
            frame; the last; both ends; the first k, k uniform; the last k likewise; all but a gap between the first and
            the last, its length and place uniform; each frame but one with a chance of its own for each sample; all but
            (or, for one in four, nothing but) a box in space and time, whose extent along each axis is the whole for
            every second one and else uniform.
        first_k: the least and the most of that k, as far as they leave a frame to generate; 0: what leaves one.

    Returns:
        `[B, N]` bool. Of images nothing is given but outside of boxes. Something of every sample is generated.
    """
    mode_key, k_key = jax.random.split(key)
    B, time = positions.shape[0], positions[..., 0]
    member = segment_ids[:, :, None] == jnp.arange(num_samples + 1)  # [B, N, S + 1]
    frames = 1 + jnp.max(jnp.where(member, time[:, :, None], 0), axis=1)  # [B, S + 1]
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    mode = jax.random.categorical(mode_key, logits, shape=(B, num_samples + 1))
    least, most = (jnp.minimum(n or frames - 1, frames - 1) for n in first_k)
    k = least + jnp.floor(jax.random.uniform(k_key, frames.shape) * (most - least + 1)).astype(jnp.int32)

    def of_token(table):
        return jnp.take_along_axis(table, segment_ids, axis=1)

    frames_of, mode, k = of_token(frames), of_token(mode), of_token(k)
    first, last = time == 0, time == frames_of - 1
    given = ((mode == 1) | (mode == 3)) & first
    given |= (mode == 2) & last
    given |= (mode == 3) & last & (frames_of > 2)
    given |= (mode == 4) & (time < k)
    given |= (mode == 5) & (time >= frames_of - k)
    given &= frames_of > 1
    if len(probabilities) > 6:
        keys = jax.random.split(k_key, 4)
        given |= (mode == 6) & (frames_of > 1) & _around_a_gap(keys[0], time, frames, of_token)
        given |= (mode == 7) & _keyframes(keys[1], time, frames, of_token)
        given |= (mode == 8) & _around_a_box(keys[2], positions, member, of_token)
    return given & (segment_ids != 0)


def _up_to(key, most):
    """Whole numbers, uniform in 1..most; most: int array, at least 1."""
    return 1 + jnp.minimum(jnp.floor(jax.random.uniform(key, most.shape) * most).astype(jnp.int32), most - 1)


def _around_a_gap(key, time, frames, of_token):
    """All frames but a gap behind the first; it leaves the last one too where there are three or more."""
    length_key, start_key = jax.random.split(key)
    length = _up_to(length_key, jnp.maximum(frames - 2, 1))
    start = _up_to(start_key, jnp.maximum(frames - 1 - length, 1))
    return (time < of_token(start)) | (time >= of_token(start + length))


def _keyframes(key, time, frames, of_token):
    """Each frame with a chance that is drawn for its sample, but one that is always generated."""
    chance_key, one_key, hash_key = jax.random.split(key, 3)
    chance = of_token(jax.random.uniform(chance_key, frames.shape))
    one = of_token(_up_to(one_key, frames)) - 1
    # A number for each (sample, frame), the same for all tokens of it: a mix of bits (the end of MurmurHash3; Appleby).
    bits = of_token(jax.random.bits(hash_key, frames.shape)) + time.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return ((bits >> 8) * jnp.float32(2**-24) < chance) & (time != one)


def _around_a_box(key, positions, member, of_token):
    """Outside of a box in (t, h, w), or, for one in four that do not fill the sample, inside of it."""
    inside, fills = True, True
    for axis, axis_key in enumerate(jax.random.split(key, 3)):
        place = positions[..., axis]
        size = 1 + jnp.max(jnp.where(member, place[:, :, None], 0), axis=1)  # [B, S + 1]
        length_key, start_key, whole_key = jax.random.split(axis_key, 3)
        length = jnp.where(jax.random.bernoulli(whole_key, 0.5, size.shape), size, _up_to(length_key, size))
        start = _up_to(start_key, size - length + 1) - 1
        inside &= (of_token(start) <= place) & (place < of_token(start + length))
        fills &= length == size
    turned = jax.random.bernoulli(jax.random.fold_in(key, 3), 0.25, fills.shape) & ~fills
    return inside == of_token(turned)


def draw_rising(key, positions, segment_ids, num_samples: int, probability: float, shift, num_levels: int):
    """Noise levels that rise along time, as a sampler that lets later frames lag behind passes through them.

    A frame's place on the schedule, from 0 (clean) to 1 (noise), is w + r * f, clipped, f from 0 at the first frame to
    1 at the last: r, how far the last lags behind, is uniform in 0..1, w in -r..1. (After diffusion forcing, whose
    levels are independent; Chen et al. 2024; and rolling diffusion; Ruhe et al. 2024.)

    Args:
        positions: `[B, N, 3]` int (t, h, w); segment_ids: `[B, N]` int in 0..num_samples.
        probability: that a sample of two frames or more has such levels. shift: of the schedule, or one a sample
            `[B, S]`.
        num_levels: levels are rounded to so many; where the rounded ones lie is drawn for each row.

    Returns:
        the levels `[B, num_levels]`; and `[B, N]` int: which of them each token has, from 1, 0 for clean ones, and -1
        for tokens of the samples that have no such levels.
    """
    chosen_key, lag_key, place_key, grid_key = jax.random.split(key, 4)
    B, time = positions.shape[0], positions[..., 0]
    member = segment_ids[:, :, None] == jnp.arange(num_samples + 1)
    last = jnp.max(jnp.where(member, time[:, :, None], 0), axis=1)  # [B, S + 1]
    lag = jax.random.uniform(lag_key, last.shape)
    first = (1 + lag) * jax.random.uniform(place_key, last.shape) - lag
    chosen = jax.random.bernoulli(chosen_key, probability, last.shape) & (last > 0)
    shift = jnp.pad(jnp.broadcast_to(shift, (B, num_samples)), ((0, 0), (1, 0)), constant_values=1.0)
    first, lag, last, chosen, shift = (jnp.take_along_axis(x, segment_ids, axis=1)
                                       for x in (first, lag, last, chosen, shift))  # fmt: skip
    place = jnp.clip(first + lag * time / jnp.maximum(last, 1), 0, 1)
    index = jnp.ceil(num_levels * shift_sigma(place, shift)).astype(jnp.int32)
    levels = (jnp.arange(1, num_levels + 1) - jax.random.uniform(grid_key, (B, 1))) / num_levels
    return levels, jnp.where(chosen, jnp.minimum(index, num_levels), -1)


def noise_rows(key, tokens, level_index, levels):
    """Noises tokens, each at its own level.

    Args:
        tokens: `[B, N, P]` clean patches. levels: `[B, S]` sigmas. level_index: `[B, N]` int, which is each token's.

    Returns:
        noisy tokens and velocity target `[B, N, P]`.
    """
    sigma = jnp.take_along_axis(levels, level_index, axis=1)[..., None]
    noise = jax.random.normal(key, tokens.shape, tokens.dtype)
    return add_noise(tokens, noise, sigma), velocity_target(tokens, noise)


def token_loss(velocity, target, generated):
    """Mean squared error over generated tokens.

    Args:
        velocity, target: `[B, N, P]`; generated: `[B, N]` bool.

    Returns:
        the mean over all generated tokens and channels, and the per-token error `[B, N]` (0 where not generated).
    """
    error = jnp.mean(jnp.square(velocity - target), axis=-1) * generated
    return jnp.sum(error) / jnp.maximum(jnp.sum(generated), 1), error
