"""A long video of a run, in windows: does memory grow with its length, and how fast is it made?

    python -m experiments.bench.long_video --run runs/quickstart [--seconds 10 60] [--steps 30] [--window 9]

Each length is a `sorax sample` in a process of its own, to an .mp4 file in a temporary folder. Printed are the peak of
its resident memory, CPU and wall time, and the ratio of the longest's memory to the shortest's: at most 1.1 is flat.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.here:
        one(settings)
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
