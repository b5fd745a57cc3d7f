"""Error of spatial tiling: reconstructions in tiles against those of whole frames, for several overlaps.

    python -m experiments.bench.vae_tiling --clips FOLDER [--run VAE_RUN | --vae DIFFUSERS_FOLDER]
        [--tile 128] [--overlaps 0 16 32 64] [--frames 17] [--size 256] [--count 8]

Without --run or --vae the VAE has random parameters: only good to see that the program runs. Printed for each overlap:
PSNR between the two reconstructions (encoding tiled, decoding tiled, both), over all clips and for the worst one; the
largest difference in levels of a byte; PSNR of the tiled reconstruction against the clip; pixels computed a pixel.
"""

import argparse
import pathlib

from sorax.backend import configure

configure()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from data_pipelines.decode import decode  # noqa: E402
from sorax.convert import read_vae  # noqa: E402
from sorax.encode import Codec  # noqa: E402
from sorax.functional import init  # noqa: E402
from sorax.runs import load_vae  # noqa: E402
from sorax.stream import tiles  # noqa: E402
from sorax.vae import VAE, VAEConfig  # noqa: E402

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")


def open_vae(settings):
    if settings.run:
        return load_vae(settings.run)[:2]
    if settings.vae:
        return read_vae(pathlib.Path(settings.vae))
    print("random parameters: the figures say nothing about a trained VAE")
    config = VAEConfig(base_width=8, latent_channels=8)
    return config, jax.jit(lambda: init(VAE, config, jax.random.key(0, impl="rbg")))()


def read_clips(settings):
    paths = sorted(path for path in pathlib.Path(settings.clips).rglob("*") if path.suffix.lower() in SUFFIXES)
    return [decode(path, settings.frames, settings.size, settings.size, fps=8) for path in paths[: settings.count]]


def errors(videos, references):
    return np.array([np.mean((np.float32(a) - b) ** 2) for a, b in zip(videos, references)])


def psnr(mse):
    return 10 * np.log10(255**2 / max(float(mse), 1e-10))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished VAE run")
    parser.add_argument("--vae", help="folder of a diffusers AutoencoderKLWan")
    parser.add_argument("--clips", required=True, help="folder of videos")
    parser.add_argument("--tile", type=int, default=128, help="pixels")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 16, 32, 64], help="pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256, help="clips are scaled and cropped to this, in pixels")
    parser.add_argument("--count", type=int, default=8, help="of clips, in the order of their names")
    settings = parser.parse_args()
    config, params = open_vae(settings)
    clips, whole = read_clips(settings), Codec(config, params)
    latents = whole.encode(clips)
    shown = whole.decode(latents)
    print(f"{len(clips)} clips of {settings.frames} x {settings.size} x {settings.size}, tiles of {settings.tile}; "
          f"untiled PSNR {psnr(errors(shown, clips).mean()):.2f} dB")  # fmt: skip
    for overlap in settings.overlaps:
        tiled = Codec(config, params, tile=settings.tile, overlap=overlap)
        their = tiled.encode(clips)
        said = []
        for name, videos in (("encode", whole.decode(their)), ("decode", tiled.decode(latents)),
                             ("both", tiled.decode(their))):  # fmt: skip
            mse = errors(videos, shown)
            said.append(f"{name} {psnr(mse.mean()):.1f} dB (worst {psnr(mse.max()):.1f})")
        most = max(np.abs(np.int16(a) - np.int16(b)).max() for a, b in zip(videos, shown))
        size = settings.size // config.spatial_stride
        tile, step = (pixels // config.spatial_stride for pixels in (settings.tile, overlap))
        work = (len(tiles(size, tile, step)) * min(tile, size) / size) ** 2
        print(f"overlap {overlap}: {', '.join(said)}; largest difference {most} levels; against the clips "
              f"{psnr(errors(videos, clips).mean()):.2f} dB; {work:.2f} times the pixels", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
