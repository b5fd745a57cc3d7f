"""Causal 3-D convolutional video VAE with the architecture of Wan 2.1's, at any size.

Time is compressed causally: the first frame stands alone, every later latent frame covers `temporal_stride` frames
and sees only what came before. This is the whole-clip form, which needs no cache.

Legend: B batch, T frames, H height, W width, C channels; lower case t, h, w, c for latents.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Hyper-parameters; `AutoencoderKLWan` of diffusers has the same, under the names in brackets."""

    base_width: int = 96  # [base_dim]
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # [dim_mult]
    num_res_blocks: int = 2  # [num_res_blocks]
    latent_channels: int = 16  # [z_dim]
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # [temperal_downsample], one a spatial halving
    pixel_patch: int = 1  # [patch_size]; pixels folded into channels before the first convolution

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.width_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample needs one entry for each of the {len(self.width_multipliers) - 1} "
                f"halvings between width_multipliers, got {len(self.temporal_downsample)}"
            )

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        return self.pixel_patch * 2 ** len(self.temporal_downsample)

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


def conv_causal(x, kernel):
    """3-D convolution of x `[B, T, H, W, C]` by kernel `[kt, kh, kw, C, C_out]`: causal in time, SAME in space.

    XLA's CPU backend runs a 3-D convolution several times slower than the 2-D convolutions of its time taps, so
    there it is a sum of those, none of which reads padding; accelerators take it whole (`experiments/bench/conv.py`).
    """
    T = x.shape[1]
    kernel = kernel[-T:]  # taps further back than the clip is long see padding alone

    def whole(x, kernel):
        kt, kh, kw = kernel.shape[:3]
        padding = ((kt - 1, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2))
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def by_taps(x, kernel):
        out = conv_space(x, kernel[-1])
        for back in range(1, kernel.shape[0]):
            past = conv_space(x[:, : T - back], kernel[-1 - back])
            out = out + jnp.pad(past, ((0, 0), (back, 0), (0, 0), (0, 0), (0, 0)))
        return out

    return jax.lax.platform_dependent(x, kernel, cpu=by_taps, default=whole)


def conv_space(x, kernel, *, stride: int = 1, padding="SAME"):
    """2-D convolution of every frame of `[B, T, H, W, C]`; kernel `[kh, kw, C, C_out]`."""
    B = x.shape[0]
    frames = einops.rearrange(x, "b t h w c -> (b t) h w c")
    out = jax.lax.conv_general_dilated(
        frames, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return einops.rearrange(out, "(b t) h w c -> b t h w c", b=B)


class Conv(nnx.Module):
    """Convolution with kernel (kt, kh, kw), causal in time: only past frames are padded, with zeros.

    It starts as the convolution of each frame alone (past taps are zero), so that what is learned from images holds
    for every frame of a clip from the start: an inflated image network.
    """

    def __init__(self, n_in, n_out, kernel_size, rngs, *, std_scale=1.0):
        kt, kh, kw = kernel_size
        std = std_scale * (n_in * kh * kw) ** -0.5
        now = std * jax.random.normal(rngs.params(), (1, kh, kw, n_in, n_out))
        self.kernel = nnx.Param(jnp.pad(now, ((kt - 1, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
        self.bias = nnx.Param(jnp.zeros(n_out))

    def __call__(self, x):
        kernel = self.kernel[...]
        if kernel.shape[:3] == (1, 1, 1):
            return x @ kernel[0, 0, 0] + self.bias[...]
        return conv_causal(x, kernel) + self.bias[...]


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

    def __call__(self, x):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """One head of self-attention inside each frame."""

    def __init__(self, width, rngs):
        self.norm = Norm(width)
        self.qkv = Conv(width, 3 * width, (1, 1, 1), rngs)
        self.proj = Conv(width, width, (1, 1, 1), rngs, std_scale=0.1)

    def __call__(self, x):
        B, T, H, W, C = x.shape
        qkv = einops.rearrange(self.qkv(self.norm(x)), "b t h w c -> (b t) (h w) 1 c")
        q, k, v = jnp.split(qkv, 3, axis=-1)
        out = jax.nn.dot_product_attention(q, k, v)
        return x + self.proj(out.reshape(B, T, H, W, C))


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width, rngs):
        self.block1 = ResBlock(width, width, rngs)
        self.attention = FrameAttention(width, rngs)
        self.block2 = ResBlock(width, width, rngs)

    def __call__(self, x):
        return self.block2(self.attention(self.block1(x)))


class Downsample(nnx.Module):
    """Halves space and, if asked, time: the first frame is kept, the clip is convolved with stride 2 behind it."""

    def __init__(self, width, temporal, rngs):
        self.conv = Conv(width, width, (1, 3, 3), rngs)
        self.time_conv = Conv(width, width, (3, 1, 1), rngs) if temporal else None
        if temporal:  # starts by keeping the middle one of each window of three frames
            self.time_conv.kernel[...] = jnp.zeros((3, 1, 1, width, width)).at[1, 0, 0].set(jnp.eye(width))

    def __call__(self, x):
        x = conv_space(x, self.conv.kernel[...][0], stride=2, padding=((0, 1), (0, 1))) + self.conv.bias[...]
        if self.time_conv is None or x.shape[1] == 1:
            return x
        # Stride 2 over three frames at a time, the first of them shared with the window before: products by tap.
        kernel, n = self.time_conv.kernel[...][:, 0, 0], (x.shape[1] - 1) // 2
        later = sum(x[:, tap : tap + 2 * n : 2] @ kernel[tap] for tap in range(3)) + self.time_conv.bias[...]
        return jnp.concatenate([x[:, :1], later], axis=1)


class Upsample(nnx.Module):
    """Doubles space (nearest, then a convolution that halves the width) and, if asked, time behind the first frame.

    The first latent frame is not context of the rest: Wan's streaming form starts its cache after it.
    """

    def __init__(self, width, temporal, rngs):
        self.conv = Conv(width, width // 2, (1, 3, 3), rngs)
        self.time_conv = Conv(width, 2 * width, (3, 1, 1), rngs) if temporal else None
        if temporal:  # starts by showing every frame twice
            twice = jnp.tile(jnp.eye(width), (1, 2))
            self.time_conv.kernel[...] = jnp.zeros((3, 1, 1, width, 2 * width)).at[2, 0, 0].set(twice)

    def __call__(self, x):
        if self.time_conv is not None and x.shape[1] > 1:
            rest = einops.rearrange(self.time_conv(x[:, 1:]), "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([x[:, :1], rest], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x)


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, rngs):
        widths = [config.base_width * m for m in (1, *config.width_multipliers)]
        self.conv_in = Conv(3 * config.pixel_patch**2, widths[0], (3, 3, 3), rngs)
        blocks = []
        for stage, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:])):
            for i in range(config.num_res_blocks):
                blocks.append(ResBlock(n_in if i == 0 else n_out, n_out, rngs))
            if stage < len(config.temporal_downsample):
                blocks.append(Downsample(n_out, config.temporal_downsample[stage], rngs))
        self.blocks = nnx.List(blocks)
        self.middle = Middle(widths[-1], rngs)
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, (3, 3, 3), rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, rngs):
        widths = [config.base_width * m for m in (config.width_multipliers[-1], *config.width_multipliers[::-1])]
        self.conv_in = Conv(config.latent_channels, widths[0], (3, 3, 3), rngs)
        self.middle = Middle(widths[0], rngs)
        blocks = []
        upsample = config.temporal_downsample[::-1]
        for stage, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:])):
            n_in = n_in // 2 if stage > 0 else n_in  # the upsampling before it has halved the width
            for i in range(config.num_res_blocks + 1):
                blocks.append(ResBlock(n_in if i == 0 else n_out, n_out, rngs))
            if stage < len(upsample):
                blocks.append(Upsample(n_out, upsample[stage], rngs))
        self.blocks = nnx.List(blocks)
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv(widths[-1], 3 * config.pixel_patch**2, (3, 3, 3), rngs)

    def __call__(self, x):
        x = self.middle(self.conv_in(x))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


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

    def encode(self, video):
        """Posterior of a video.

        Args:
            video: `[B, T, H, W, 3]` float in [-1, 1].

        Returns:
            mean and log-variance, each `[B, t, h, w, C]`, not normalised.

        Raises:
            ValueError: the shape is off the VAE's grid.
        """
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"the VAE takes videos [B, T, H, W, 3] (channels last), got {video.shape}")
        self.config.latent_shape(*video.shape[1:4])
        p = self.config.pixel_patch
        x = einops.rearrange(video, "b t (h ph) (w pw) c -> b t h w (c pw ph)", ph=p, pw=p)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z):
        """Video `[B, T, H, W, 3]` of latents z `[B, t, h, w, C]` that are not normalised; not clipped to [-1, 1]."""
        p = self.config.pixel_patch
        x = self.decoder(self.post_quant_conv(z))
        return einops.rearrange(x, "b t h w (c pw ph) -> b t (h ph) (w pw) c", ph=p, pw=p)

    def normalize(self, z):
        """Raw latents -> normalised latents, what the DiT is trained on."""
        return (z - self.latents_mean[...]) / self.latents_std[...]

    def denormalize(self, latents):
        """Normalised latents -> raw latents, what `decode` takes."""
        return latents * self.latents_std[...] + self.latents_mean[...]
