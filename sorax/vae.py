"""Causal 3-D convolutional video VAE with the architectures of Wan 2.1's and Wan 2.2's, at any size.

Time is compressed causally: the first frame stands alone, every later latent frame covers `temporal_stride` frames
and sees only what came before. So a video can go through whole, or in chunks that hand each layer's last frames on
(`sorax.conv.Past`); both give the same numbers.

Legend: B batch, T frames, H height, W width, C channels; lower case t, h, w, c for latents.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from sorax.conv import Conv, Past, conv_causal, conv_space

SCORES_AT_ONCE = 1 << 28  # of attention, a gigabyte in float32; more are made a frame at a time


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Hyper-parameters; `AutoencoderKLWan` of diffusers has the same, under the names in brackets."""

    base_width: int = 96  # [base_dim]
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # [dim_mult]
    num_res_blocks: int = 2  # [num_res_blocks]
    latent_channels: int = 16  # [z_dim]
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # [temperal_downsample], one a spatial halving
    pixel_patch: int = 1  # [patch_size]; pixels folded into channels before the first convolution
    decoder_base_width: int | None = None  # [decoder_base_dim]; None: base_width
    shortcuts: bool = False  # [is_residual]; Wan 2.2: averages past each stage of the encoder, copies in the decoder

    def __post_init__(self):
        for name in ("base_width", "width_multipliers", "num_res_blocks", "latent_channels", "pixel_patch",
                     "decoder_base_width"):  # fmt: skip
            value = getattr(self, name)
            if name == "decoder_base_width" and value is None:
                continue
            sizes = value if isinstance(value, tuple | list) else (value,)
            if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
                raise ValueError(f"{name} is {value!r}: it takes whole numbers of at least 1")
        if len(self.temporal_downsample) != len(self.width_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample needs one entry for each of the {len(self.width_multipliers) - 1} "
                f"halvings between width_multipliers, got {len(self.temporal_downsample)}"
            )
        for decoder in (False, True) if self.shortcuts else ():
            for n_in, n_out, resized, temporal in self.stages(decoder):
                values = (1 + temporal) * (4 if resized else 1)
                many, few = (n_out, n_in) if decoder else (n_in, n_out)
                if (resized or not decoder) and many * values % few:
                    raise ValueError(
                        f"shortcuts cannot lead from width {n_in} to {n_out} at {values} values a place: "
                        "choose width_multipliers that divide each other"
                    )

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        return self.pixel_patch * 2 ** len(self.temporal_downsample)

    def stages(self, decoder: bool) -> list[tuple[int, int, bool, bool]]:
        """(width in, width out, changes the size, changes the rate) of each stage of the encoder or the decoder."""
        base = (self.decoder_base_width or self.base_width) if decoder else self.base_width
        widths = [base * m for m in self.width_multipliers]
        times = [*self.temporal_downsample, False]
        if decoder:
            widths, times = widths[::-1], [*self.temporal_downsample[::-1], False]
            # In the first generation upsampling halves the width before the next stage.
            inputs = [widths[0], *(w if self.shortcuts else w // 2 for w in widths[:-1])]
        else:
            inputs = [base, *widths[:-1]]
        last = len(widths) - 1
        return [(n_in, n_out, i < last, times[i]) for i, (n_in, n_out) in enumerate(zip(inputs, widths))]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latents of a video.

        Raises:
            ValueError: the video is off the grid: T = 4n+1 (for a temporal stride of 4), H and W multiples of the
                spatial stride.
        """
        ts, ss = self.temporal_stride, self.spatial_stride
        if num_frames < 1 or (num_frames - 1) % ts:
            raise ValueError(f"the VAE takes {ts}n + 1 frames, got {num_frames}")
        if height < ss or width < ss or height % ss or width % ss:
            raise ValueError(f"the VAE takes heights and widths in multiples of {ss}, got {height} x {width} (h x w)")
        return 1 + (num_frames - 1) // ts, height // ss, width // ss


class Norm(nnx.Module):
    """x / ||x|| over channels * sqrt(C) * gamma, in float32."""

    def __init__(self, width):
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(y), axis=-1, keepdims=True), 1e-24))
        return (y * inverse * x.shape[-1] ** 0.5 * self.gamma[...]).astype(x.dtype)


class ResBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus a shortcut."""

    def __init__(self, n_in, n_out, rngs):
        self.norm1 = Norm(n_in)
        self.conv1 = Conv(n_in, n_out, (3, 3, 3), rngs)
        self.norm2 = Norm(n_out)
        self.conv2 = Conv(n_out, n_out, (3, 3, 3), rngs, std_scale=0.1)
        self.shortcut = Conv(n_in, n_out, (1, 1, 1), rngs) if n_in != n_out else None

    def __call__(self, x, past=None):
        h = self.conv1(jax.nn.silu(self.norm1(x)), past)
        h = self.conv2(jax.nn.silu(self.norm2(h)), past)
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """One head of self-attention inside each frame."""

    def __init__(self, width, rngs):
        self.norm = Norm(width)
        self.qkv = Conv(width, 3 * width, (1, 1, 1), rngs)
        self.proj = Conv(width, width, (1, 1, 1), rngs, std_scale=0.1)

    def __call__(self, x):
        qkv = self.qkv(self.norm(x))
        B, T, H, W, _ = qkv.shape
        if B * T * (H * W) ** 2 <= SCORES_AT_ONCE:
            return x + self.proj(attend(*jnp.split(qkv, 3, axis=-1)))
        frames = einops.rearrange(qkv, "b t h w c -> t b 1 h w c")
        out = jax.lax.map(lambda frame: attend(*jnp.split(frame, 3, axis=-1)), frames)
        return x + self.proj(einops.rearrange(out, "t b 1 h w c -> b t h w c"))


def attend(q, k, v):
    """Attention of each place of a frame to all of them; `[B, T, H, W, C]` all.

    The places of queries stay rows and columns: where either is split over devices, so are the scores.
    """
    k, v = (einops.rearrange(x, "b t h w c -> b t (h w) c") for x in (k, v))
    scores = jnp.einsum("bthwc,btkc->bthwk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bthwk,btkc->bthwc", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width, rngs):
        self.block1 = ResBlock(width, width, rngs)
        self.attention = FrameAttention(width, rngs)
        self.block2 = ResBlock(width, width, rngs)

    def __call__(self, x, past=None):
        return self.block2(self.attention(self.block1(x, past)), past)


class Downsample(nnx.Module):
    """Halves space and, if asked, time: the first frame is kept, the clip is convolved with stride 2 behind it."""

    def __init__(self, width, temporal, rngs):
        self.conv = Conv(width, width, (1, 3, 3), rngs)
        self.time_conv = Conv(width, width, (3, 1, 1), rngs) if temporal else None
        if temporal:  # starts by keeping the middle one of each window of three frames
            self.time_conv.kernel[...] = jnp.zeros((3, 1, 1, width, width)).at[1, 0, 0].set(jnp.eye(width))

    def __call__(self, x, past=None):
        x = conv_space(x, self.conv.kernel[...][0], stride=(2, 2), padding=((0, 1), (0, 1))) + self.conv.bias[...]
        if self.time_conv is None:
            return x
        before = None
        if past is not None:
            before = past.take()
            past.leave(x[:, -1:])
            if before is not None:
                x = jnp.concatenate([before, x], axis=1)
        # Stride 2 over three frames at a time, the first of them shared with the window before: products by tap.
        kernel, n = self.time_conv.kernel[...][:, 0, 0], (x.shape[1] - 1) // 2
        later = sum(x[:, tap : tap + 2 * n : 2] @ kernel[tap] for tap in range(3)) + self.time_conv.bias[...]
        return later if before is not None else jnp.concatenate([x[:, :1], later], axis=1)


class Upsample(nnx.Module):
    """Doubles space (nearest, then a convolution to n_out) and, if asked, time behind the first frame.

    The first latent frame is not context of the rest: Wan's streaming form starts its cache after it.
    """

    def __init__(self, width, n_out, temporal, rngs):
        self.conv = Conv(width, n_out, (1, 3, 3), rngs)
        self.time_conv = Conv(width, 2 * width, (3, 1, 1), rngs) if temporal else None
        if temporal:  # starts by showing every frame twice
            twice = jnp.tile(jnp.eye(width), (1, 2))
            self.time_conv.kernel[...] = jnp.zeros((3, 1, 1, width, 2 * width)).at[2, 0, 0].set(twice)

    def __call__(self, x, past=None):
        if self.time_conv is not None:
            first = past is None or past.first
            alone, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            rest = einops.rearrange(self.time_conv(rest, past), "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([alone, rest], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x)


def average_down(x, n_out, time, space, first):
    """Means over blocks of time x space x space values and over groups of channels, to n_out channels.

    In the first chunk of a video the first frame is joined by frames of zeros before it.
    """
    if first:
        x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    x = einops.rearrange(x, "b (t a) (h p) (w q) c -> b t h w (c a p q)", a=time, p=space, q=space)
    return einops.reduce(x, "b t h w (c g) -> b t h w c", "mean", c=n_out)


def copy_up(x, n_out, time, space, first):
    """Copies of channels laid out as blocks of time x space x space values of n_out channels: undoes `average_down`.

    In the first chunk of a video the first frame becomes one frame.
    """
    x = jnp.repeat(x, n_out * time * space**2 // x.shape[-1], axis=-1)
    x = einops.rearrange(x, "b t h w (c a p q) -> b (t a) (h p) (w q) c", a=time, p=space, q=space)
    return x[:, time - 1 :] if first else x


class Stage(nnx.Module):
    """Residual blocks at one size, then the change to the next; `shortcut` (Wan 2.2) leads past both."""

    def __init__(self, blocks, resample, shortcut):
        self.blocks = nnx.List(blocks)
        self.resample = resample
        self.shortcut = shortcut

    def __call__(self, x, past=None, remat=False):
        y = x
        for block in self.blocks:
            # What a chunk leaves for the next cannot leave a rematerialised function: streams are not differentiated.
            y = jax.checkpoint(block)(y) if remat and past is None else block(y, past)
        if self.resample is not None:
            y = self.resample(y, past)
        if self.shortcut is None:
            return y
        function, n_out, time, space = self.shortcut
        return y + function(x, n_out, time, space, past is None or past.first)


def _blocks(n_in, n_out, count, rngs):
    return [ResBlock(n_in if i == 0 else n_out, n_out, rngs) for i in range(count)]


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, rngs):
        plan = config.stages(decoder=False)
        self.conv_in = Conv(3 * config.pixel_patch**2, plan[0][0], (3, 3, 3), rngs)
        stages = []
        for n_in, n_out, down, temporal in plan:
            blocks = _blocks(n_in, n_out, config.num_res_blocks, rngs)
            resample = Downsample(n_out, temporal, rngs) if down else None
            shortcut = (average_down, n_out, 1 + temporal, 1 + down) if config.shortcuts else None
            stages.append(Stage(blocks, resample, shortcut))
        self.stages = nnx.List(stages)
        self.middle = Middle(n_out, rngs)
        self.norm_out = Norm(n_out)
        self.conv_out = Conv(n_out, 2 * config.latent_channels, (3, 3, 3), rngs)

    def __call__(self, x, past=None, remat=False):
        x = self.conv_in(x, past)
        for stage in self.stages:
            x = stage(x, past, remat)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x, past))), past)


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, rngs):
        plan = config.stages(decoder=True)
        self.conv_in = Conv(config.latent_channels, plan[0][0], (3, 3, 3), rngs)
        self.middle = Middle(plan[0][0], rngs)
        stages = []
        for n_in, n_out, up, temporal in plan:
            blocks = _blocks(n_in, n_out, config.num_res_blocks + 1, rngs)
            resample = Upsample(n_out, n_out if config.shortcuts else n_out // 2, temporal, rngs) if up else None
            shortcut = (copy_up, n_out, 1 + temporal, 2) if config.shortcuts and up else None
            stages.append(Stage(blocks, resample, shortcut))
        self.stages = nnx.List(stages)
        self.norm_out = Norm(n_out)
        self.conv_out = Conv(n_out, 3 * config.pixel_patch**2, (3, 3, 3), rngs)

    def features(self, x, past=None, remat=False):
        """What the last convolution turns into pixels."""
        x = self.middle(self.conv_in(x, past), past)
        for stage in self.stages:
            x = stage(x, past, remat)
        return jax.nn.silu(self.norm_out(x))

    def __call__(self, x, past=None, remat=False):
        return self.conv_out(self.features(x, past, remat), past)


class VAE(nnx.Module):
    """Video <-> latents. `latents_mean` and `latents_std` are measured on the data after training, not trained."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config, rngs)
        self.quant_conv = Conv(2 * c, 2 * c, (1, 1, 1), rngs)
        # A posterior that starts narrow: with one as wide as its means, training first fights its own noise.
        self.quant_conv.bias[...] = jnp.concatenate([jnp.zeros(c), jnp.full(c, -6.0)])
        self.post_quant_conv = Conv(c, c, (1, 1, 1), rngs)
        self.decoder = Decoder(config, rngs)
        self.latents_mean = nnx.Param(jnp.zeros(c))
        self.latents_std = nnx.Param(jnp.ones(c))

    def encode(self, video, *, remat: bool = False):
        """Posterior of whole videos.

        Args:
            video: `[B, T, H, W, 3]` float in [-1, 1], T = 4n + 1 (for a temporal stride of 4).
            remat: recompute the blocks in the backward pass.

        Returns:
            mean and log-variance, each `[B, t, h, w, C]`, not normalised.

        Raises:
            ValueError: the shape is off the VAE's grid, or integers are given.
        """
        self._check_video(video)
        self.config.latent_shape(*video.shape[1:4])
        return self._moments(self.encoder(self._fold(video), remat=remat))

    def encode_chunk(self, video, frames=None):
        """Posterior of the next chunk of videos, given what the chunk before left; as exact as `encode` of all.

        Args:
            video: `[B, T, H, W, 3]` as in `encode`; T = 4n + 1 in the first chunk, 4n in later ones.
            frames: the third result of the chunk before, None for the first.

        Returns:
            mean, log-variance, and what the next chunk needs (a pytree whose size does not depend on T).
        """
        self._check_video(video)
        self.config.latent_shape(video.shape[1] + (frames is not None), *video.shape[2:4])
        past = Past(frames)
        mean, logvar = self._moments(self.encoder(self._fold(video), past))
        return mean, logvar, past.frames

    def decode(self, z, *, remat: bool = False):
        """Video `[B, T, H, W, 3]` of latents z `[B, t, h, w, C]` that are not normalised; not clipped to [-1, 1].

        Raises:
            ValueError: z has another number of channels, or integers are given.
        """
        return self.show(self.decode_features(z, remat=remat))

    def decode_features(self, z, *, remat: bool = False):
        """`decode` up to its last convolution, which is `show`: `[B, T, H', W', C]`."""
        self._check_latents(z)
        return self.decoder.features(self.post_quant_conv(z), remat=remat)

    def show(self, features):
        """Video `[B, T, H, W, 3]` of `decode_features`."""
        return self._unfold(self.decoder.conv_out(features))

    def last_gradient(self, features, gradient):
        """Gradient of the kernel of `show`, for one at its video: how strongly a term of a loss pulls."""
        last = self.decoder.conv_out

        def show(kernel):
            return self._unfold(conv_causal(features, kernel) + last.bias[...])

        return jax.vjp(show, last.kernel[...])[1](gradient.astype(features.dtype))[0]

    def decode_chunk(self, z, frames=None):
        """The next frames of videos, from the next latents (any number) and what the chunk before left.

        Returns:
            video `[B, T, H, W, 3]`, T = 4t - 3 in the first chunk (frames None), 4t in later ones; and what the next
            chunk needs.
        """
        self._check_latents(z)
        past = Past(frames)
        return self._unfold(self.decoder(self.post_quant_conv(z), past)), past.frames

    def _check_video(self, video):
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"the VAE takes videos [B, T, H, W, 3] (channels last), got {video.shape}")
        if not jnp.issubdtype(video.dtype, jnp.floating):
            raise ValueError(f"the VAE takes floats in [-1, 1], got {video.dtype}: divide by 127.5, subtract 1")

    def _check_latents(self, z):
        if z.ndim != 5 or z.shape[-1] != self.config.latent_channels:
            channels = self.config.latent_channels
            raise ValueError(f"the VAE takes latents [B, t, h, w, {channels}] (channels last), got {z.shape}")
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"the VAE takes latents that are floats, got {z.dtype}: pass what encoding returned")

    def _moments(self, x):
        mean, logvar = jnp.split(self.quant_conv(x), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def _fold(self, video):
        p = self.config.pixel_patch
        return einops.rearrange(video, "b t (h ph) (w pw) c -> b t h w (c pw ph)", ph=p, pw=p)

    def _unfold(self, x):
        p = self.config.pixel_patch
        return einops.rearrange(x, "b t h w (c pw ph) -> b t (h ph) (w pw) c", ph=p, pw=p)

    def normalize(self, z):
        """Raw latents -> normalised latents, what the DiT is trained on."""
        return (z - self.latents_mean[...]) / self.latents_std[...]

    def denormalize(self, latents):
        """Normalised latents -> raw latents, what `decode` takes."""
        return latents * self.latents_std[...] + self.latents_mean[...]
