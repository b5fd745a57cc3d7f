"""Videos that look like something, for the tests of curation: textures that a camera pans over."""

import numpy as np
from scipy.ndimage import gaussian_filter


def texture(seed, height, width):
    """uint8 [H, W, 3]: soft coloured spots, other ones for every seed."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(height, width, 3)), (6, 6, 0), mode="wrap")
    return np.clip(127 + 55 * noise / noise.std(), 0, 255).astype(np.uint8)


def panning(seed, num_frames, height=96, width=128, speed=2):
    """uint8 [T, H, W, 3]: a texture that moves to the left by `speed` pixels a frame."""
    scene = texture(seed, height, width + speed * num_frames)
    return np.stack([scene[:, speed * k : speed * k + width] for k in range(num_frames)])


def fade_in(video, num_frames):
    """The video, its first frames brought up from black."""
    gain = np.minimum(1, np.arange(len(video)) / num_frames)
    return (video * gain[:, None, None, None]).astype(np.uint8)


def letterboxed(video, bar):
    """The video with black bars of so many pixels instead of its top and bottom lines."""
    video = video.copy()
    video[:, :bar] = video[:, -bar:] = 0
    return video
