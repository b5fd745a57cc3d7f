"""A long video of a run, in windows: does memory grow with its length, and how fast is it made?

    python -m experiments.bench.long_video --run runs/modes [--seconds 10 60] [--steps 30] [--window 9]
    python -m experiments.bench.long_video --run runs/modes --curve 32 --seconds 60

Each length is a `sorax sample` in a process of its own, to an .mp4 file in a temporary folder. Printed are the peak of
its resident memory, CPU and wall time, and the ratio of the longest's memory to the shortest's: at most 1.1 is flat.

--curve makes so many videos of the longest length instead, of objects of the world's test split that bounce off the
walls, and prints by second the share of videos with a usable object: what is seen in that second is one object of the
colour and shape of the caption, and nothing abnormal happens to it. Its 95 % interval beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time


def one(settings):
    """Makes a video and prints its figures as JSON."""
    from sorax import cli

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        argv = ["sample", "--run", settings.run, "--prompt", settings.prompt, "--seconds", str(settings.seconds[0]),
                "--steps", str(settings.steps), "--out", os.path.join(folder, "long.mp4")]  # fmt: skip
        argv += ["--window", str(settings.window)] if settings.window else []
        code = cli.main(argv)
        size = os.path.getsize(os.path.join(folder, "long.mp4")) if not code else 0
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = dict(code=code, mib=used.ru_maxrss / 1024, cpu=used.ru_utime + used.ru_stime, bytes=size,
                   wall=time.monotonic() - began)  # fmt: skip
    print(json.dumps(figures))


def curve(settings):
    """Prints the share of videos with a usable object, by second."""
    import dataclasses

    import numpy as np

    from data_pipelines.world import World
    from sorax import modes
    from sorax.abnormal import abnormal_events
    from sorax.metrics import wilson_interval
    from sorax.parser import parse_clip
    from sorax.runs import load_run
    from sorax.windows import Job, make
    from sorax.world_suite import open_world

    run = load_run(settings.run)
    generator, how = run.generator(), run.sampling() | dict(num_steps=settings.steps)
    config = dataclasses.replace(open_world(run).config, num_samples=settings.curve, motions=("bounce",),
                                 num_objects=(1, 1), captions="short")  # fmt: skip
    world, fps = World(config), config.fps
    frames = modes.frames_of_seconds(max(settings.seconds), fps)
    stride = run.networks.vae_config.temporal_stride
    frames -= (frames - 1) % stride
    jobs = [Job(modes.text(frames, *config.shapes[0][1:]), world.caption(i), seed=i) for i in range(settings.curve)]
    videos = make(generator, jobs, size=settings.window or run.longest(), **how)
    second = round(fps) + 1
    rights = []
    for i, video in enumerate(videos):
        thing, right = world.truth(i).objects[0], []
        for start in range(0, len(video) - second + 1, second - 1):
            part = video[start : start + second]
            tracks = parse_clip(part)
            right.append([(track.color, track.shape) for track in tracks] == [(thing.color, thing.shape)]
                         and not abnormal_events(part, tracks))  # fmt: skip
        rights.append(right)
    for s, column in enumerate(np.array(rights).T):
        low, high = wilson_interval(int(column.sum()), len(column))
        print(f"second {s:3d}: {100 * column.mean():3.0f} % [{100 * low:.0f}, {100 * high:.0f}]", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--curve", type=int, default=0, metavar="VIDEOS")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.here:
        one(settings)
        return
    if settings.curve:
        from sorax import backend

        backend.configure()
        curve(settings)
        return
    peaks = []
    for seconds in sorted(settings.seconds):
        argv = [a for name in ("run", "steps", "window", "prompt") for a in (f"--{name}", str(getattr(settings, name)))]
        argv = [sys.executable, "-m", "experiments.bench.long_video", *argv, "--seconds", str(seconds), "--here"]
        lines = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        found = json.loads(lines[-1])
        if found["code"]:
            raise SystemExit(f"sorax sample failed for {seconds:g} s")
        peaks.append(found["mib"])
        print(f"{seconds:g} s: peak {found['mib']:.0f} MiB, {found['cpu']:.0f} s of CPU, {found['wall']:.0f} s, "
              f"{found['bytes']} bytes", flush=True)  # fmt: skip
    print(f"memory of the longest over that of the shortest: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
