"""Peak memory of a video that streams through the VAE and back, at several lengths: it must not depend on the length.

    python -m experiments.bench.vae_memory [--seconds 10 60] [--size 256] [--chunk 16] [--base-width 8]

Each length runs in a process of its own. Frames are made one by one, latents are decoded as they come, and what comes
out is summed up and dropped: nothing holds the whole video. Printed are the peak of the resident memory above what the
process holds before the first frame (programs, libraries and parameters), and the ratio of the longest to the shortest.
"""

import argparse
import json
import subprocess
import sys
import time

FPS = 16


def memory(field):
    """Resident memory in MB: VmRSS (now) or VmHWM (the most so far)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def frames(count, size):
    """A bar that moves over a gradient, uint8 [1, size, size, 3] at a time."""
    import numpy as np

    y, x = np.mgrid[:size, :size]
    for i in range(count):
        bar = 255 * ((x + 3 * i) // 32 % 2)
        yield np.stack([x * 255 // size, y * 255 // size, bar], axis=-1).astype(np.uint8)[None]


def one(seconds, settings):
    """Prints the figures of one length as JSON."""
    from sorax.backend import configure

    configure()
    import jax

    from sorax.functional import init
    from sorax.stream import DecodeStream, EncodeStream
    from sorax.vae import VAE, VAEConfig

    config = VAEConfig(base_width=settings.base_width)
    params = jax.block_until_ready(jax.jit(lambda: init(VAE, config, jax.random.key(0, impl="rbg")))())
    encoder = EncodeStream(config, params, settings.chunk)
    decoder = DecodeStream(config, params, settings.chunk)
    count, shown, total = int(seconds * FPS) // 4 * 4 + 1, 0, 0
    before, began = memory("VmRSS"), time.time()

    def consume(videos):
        nonlocal shown, total
        for video in videos:
            shown, total = shown + len(video), total + int(video.sum())

    for frame in frames(count, settings.size):
        for latents in encoder.push(frame):
            consume(decoder.push(latents))
    for latents in encoder.finish():
        consume(decoder.push(latents))
    consume(decoder.finish())
    assert shown == count and total > 0
    print(json.dumps(dict(frames=count, peak=memory("VmHWM") - before, before=before, seconds=time.time() - began)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60], help=f"lengths, at {FPS} frames a second")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--chunk", type=int, default=16, help="frames that go through at a time")
    parser.add_argument("--base-width", type=int, default=8, help="of the VAE; Wan's is 96")
    parser.add_argument("--here", action="store_true", help="run the one length in this process")
    settings = parser.parse_args()
    if settings.here:
        return one(settings.seconds[0], settings)
    peaks = []
    for seconds in settings.seconds:
        command = [sys.executable, "-m", "experiments.bench.vae_memory", "--here", "--seconds", str(seconds)]
        for name in ("size", "chunk", "base_width"):
            command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        peaks.append(figures["peak"])
        print(f"{seconds:g} s, {figures['frames']} frames of {settings.size} pixels: peak {peaks[-1]:.0f} MB "
              f"above {figures['before']:.0f} MB, {figures['seconds']:.0f} s", flush=True)  # fmt: skip
    print(f"ratio of the longest to the shortest: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
