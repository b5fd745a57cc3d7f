"""Terms of the VAE's loss that compare a reconstruction with its original.

Legend: B batch, T frames, H height, W width. Videos are float `[B, T, H, W, 3]` in [-1, 1].
"""

import itertools

import einops
import jax.numpy as jnp


def laplacian_pyramid(video, levels: int = 4):
    """Bands of a Laplacian pyramid over space, fine to coarse: `levels` arrays, of half the sides each time.

    Means over 2 x 2 pixels take the place of Burt and Adelson's filter (1983). It ends early where a side is odd.
    """
    bands = []
    for _ in range(levels - 1):
        if min(video.shape[2:4]) < 2 or video.shape[2] % 2 or video.shape[3] % 2:
            break
        coarse = einops.reduce(video, "b t (h p) (w q) c -> b t h w c", "mean", p=2, q=2)
        bands.append(video - jnp.repeat(jnp.repeat(coarse, 2, axis=2), 2, axis=3))
        video = coarse
    return [*bands, video]


def multiscale_error(error, levels: int = 4):
    """Mean over the bands of `laplacian_pyramid` of an error video of their mean absolute values: a scalar.

    Coarse bands weigh as much as fine ones, so that a wrong colour of a whole region counts beside wrong edges: the
    Lap1 loss of Bojanowski et al., "Optimizing the Latent Space of Generative Networks" (2018).
    """
    bands = laplacian_pyramid(error, levels)
    return sum(jnp.mean(jnp.abs(band)) for band in bands) / len(bands)


def haar_details(video):
    """Detail bands of one level of the orthonormal Haar transform over time and space: `[bands, B, t, h, w, 3]`.

    Of an image, or where T is odd, the first frame is transformed as if it stood twice, as the VAE's causal time has
    it; an odd last row or column is left out.
    """
    _, T, H, W, _ = video.shape
    if T % 2:
        video = jnp.concatenate([video[:, :1], video], axis=1)
    video = video[:, :, : H - H % 2, : W - W % 2]
    blocks = einops.rearrange(video, "b (t i) (h j) (w k) c -> i j k b t h w c", i=2, j=2, k=2)
    bands = []
    for signs in list(itertools.product((1, -1), repeat=3))[1:]:  # not the mean
        band = sum(
            (signs[0] ** i * signs[1] ** j * signs[2] ** k) * blocks[i, j, k]
            for i, j, k in itertools.product((0, 1), repeat=3)
        )
        bands.append(band / 8**0.5)
    return jnp.stack(bands)


def wavelet_error(error):
    """Mean absolute value of the Haar details of an error video: edges and motion, not smooth regions; a scalar.

    The transform is linear, so that this is the distance of the two videos' details.
    """
    return jnp.mean(jnp.abs(haar_details(error)))


def kl_divergence(mean, logvar):
    """KL divergence in nats of the posterior from a standard normal distribution, of each value of the latents."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
