"""How fast real clips become packed rows, and in how much memory, beside a bare PyAV loop on the same clips.

    python -m experiments.bench.pipeline --clips FOLDER [--parallel 2] [--rounds 5] [--fps 16]
    python -m experiments.bench.pipeline --clips FOLDER --minutes 10    # memory while the loader's workers run so long

FOLDER is one of captioned videos. Clips are brought to at most 81 frames and 4,096 latent tokens (at 16 frames/s
unless --fps says other, 0 for their own), decoded, scaled, cut into patches of 1 x 16 x 16 pixels and packed in rows of
16,384, two rows a batch: folder -> index -> rows -> loader. With N = --parallel:

  threads   the loader with no worker: N threads of one process.
  workers   the loader with N worker processes, which send their batches through shared memory.
  bare      N processes, each of which opens a clip with PyAV on one thread, decodes as many frames, scales those that
            are wanted to the same size with the same filter and stacks them to a clip: no checks, no rotation, no rows.
            The clip is dropped: nothing is sent.
  dropped   the same, but each frame is dropped at once.

frames/s counts frames decoded from the files, also those between two that are kept; all sides decode and scale the same
clips equally often. The clock starts when the loader runs and what it has read ahead is used up. CPU time is that of
all processes of a side, and depends less on what else the machine does. Rounds are interleaved; medians are shown.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.loader import make_loader
from data_pipelines.rows import PixelExamples, RowSource

BATCH, ROW_TOKENS, PATCH = 2, 16384, (1, 16, 16)
PREFETCH = 2  # batches, of each worker
SIDES = ("threads", "workers", "bare", "dropped")
TICKS = os.sysconf("SC_CLK_TCK")


def encode_text(caption):
    """Stands in for a tokenizer: a number a word."""
    return np.array([len(word) for word in caption.split()], np.int32)


def bare(path, num_frames, height, width, fps, keep):
    """Decodes and scales the beginning of a clip, as plainly as PyAV can. Returns how many frames it decoded."""
    clip, done = [], 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        reformatter, decoded, first = VideoReformatter(), 0, None
        for frame in container.decode(stream):
            decoded += 1
            first = frame.time if first is None else first
            if (frame.time - first) * fps < done - 0.5:
                continue
            h, w = (width, height) if frame.rotation % 180 else (height, width)
            how = Interpolation.AREA if h <= frame.height and w <= frame.width else Interpolation.BICUBIC
            pixels = reformatter.reformat(frame, w, h, "rgb24", interpolation=how).to_ndarray()
            done += 1
            if keep:
                clip.append(pixels)
            if done == num_frames:
                break
    if keep:
        np.stack(clip)
    return decoded


def cpu_seconds(processes):
    """CPU time so far of the processes of these ids."""
    total = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def family():
    """Ids of this process and its children."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]


def time_loader(rows, start_step, steps, **options):
    """(seconds, CPU seconds, samples read) of some steps, once the loader runs evenly."""
    loader = make_loader(rows, start_step=start_step, **options)
    warm = max(1, options.get("num_workers", 0)) * (options["prefetch"] + 2)
    for _ in range(warm):
        next(loader)
    processes = family() if "num_workers" in options else [os.getpid()]
    wall, cpu = time.perf_counter(), cpu_seconds(processes)
    for _ in range(steps):
        next(loader)
    wall, cpu = time.perf_counter() - wall, cpu_seconds(processes) - cpu
    loader.close()
    read = range((start_step + warm) * BATCH, (start_step + warm + steps) * BATCH)
    return wall, cpu, [sample for row in read for sample in rows.samples(row).tolist()]


def time_bare(pool, source, samples, keep):
    """(seconds, CPU seconds, frames decoded) of the bare loop on some samples."""
    specs = [source.spec(i) for i in samples]
    tasks = [(str(source.path / spec.key), spec.num_frames, spec.height, spec.width, spec.fps, keep) for spec in specs]
    processes = [child.pid for child in pool._pool]
    wall, cpu = time.perf_counter(), cpu_seconds(processes)
    frames = sum(pool.starmap(bare, tasks, chunksize=1))
    return time.perf_counter() - wall, cpu_seconds(processes) - cpu, frames


def compare(rows, source, parallel, rounds, steps):
    """Prints frames/s of all sides and the ratios of the loader's to the others', by wall and by CPU time."""
    results = []
    for k in range(rounds):
        sides = []
        for options in (dict(prefetch=parallel), dict(num_workers=parallel, prefetch=PREFETCH)):
            *taken, samples = time_loader(rows, k * steps, steps, **options)
            sides.append((taken, samples))
        with multiprocessing.get_context("spawn").Pool(parallel) as pool:
            time_bare(pool, source, list(range(len(source))) * 2, True)  # until all processes run
            # Each side of the loader reads its own steps; the bare loops get those of the workers.
            frames = [time_bare(pool, source, samples, True)[2] for _, samples in sides]
            sides = [(*taken, count) for (taken, _), count in zip(sides, frames)]
            sides += [time_bare(pool, source, samples, keep) for keep in (True, False)]
        results.append([(count / wall, count / cpu) for wall, cpu, count in sides])
        print(f"  round {k}, {frames[-1]} frames, load {os.getloadavg()[0]:.1f}: {show(results[-1])}", flush=True)
    print(f"median of {rounds} rounds, {parallel} in parallel: {show(np.median(results, axis=0))}")
    results = np.array(results)  # [rounds, sides, wall and CPU]
    for i in (0, 1):
        for j in (2, 3):
            wall, cpu = np.median(results[:, i] / results[:, j], axis=0)
            print(f"{SIDES[i]:>8} / {SIDES[j]:8} {wall:.3f} by wall time, {cpu:.3f} by CPU time")


def show(sides):
    """(frames a second, frames a CPU second) of each side, in words."""
    shown = [f"{name} {wall:.0f} ({cpu:.0f})" for name, (wall, cpu) in zip(SIDES, sides)]
    return "frames/s (a CPU second): " + ", ".join(shown)


def memory(processes):
    """MiB of some processes: (their own and what they share with each other, the same and their part of libraries)."""
    own = everything = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        size = {name.rstrip(":"): int(rest[0]) for name, *rest in map(str.split, lines[1:])}
        own += size["Pss_Anon"] + size["Pss_Shmem"]
        everything += size["Pss"]  # pages of libraries are divided by how many processes of the machine have them
    return own / 1024, everything / 1024


def queued():
    """MiB of shared memory; some of it may be on its way between processes and in nobody's memory yet."""
    total = 0
    for path in (*Path("/dev/shm").glob("psm_*"), *Path("/dev/shm").glob("sorax-reading-*/*")):
        with contextlib.suppress(FileNotFoundError):  # it has arrived
            total += path.stat().st_size
    return total / 2**20


def watch(rows, parallel, minutes):
    """Prints the memory of the loader's processes over some minutes of reading as fast as it can."""
    loader, values, shared, steps = make_loader(rows, num_workers=parallel, prefetch=PREFETCH), [], [], 0
    before, start = queued(), time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        next(loader)
        steps += 1
        if time.monotonic() - start > 2 * (len(values) + 1):
            values.append(memory(family()))
            shared.append(max(0, queued() - before))
            if len(values) % 30 == 0:
                print(f"  {len(values) * 2:4} s, step {steps}: {values[-1][0]:.0f} MiB", flush=True)
    loader.close()
    own, everything = np.array(values[len(values) // 20 :]).T  # without the start
    drift = np.median(own[-len(own) // 3 :]) / np.median(own[: len(own) // 3])
    print(f"{minutes:g} minutes, {steps} steps, {parallel} workers: median {np.median(own):.0f} MiB, largest "
          f"{own.max():.0f}; last third / first third {drift:.3f}; with libraries, largest {everything.max():.0f} "
          f"MiB; shared memory, in part the same: largest {max(shared):.0f} MiB")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", required=True, help="folder of captioned videos")
    parser.add_argument("--parallel", type=int, default=2, help="threads, workers and processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--fps", type=float, default=16.0, help="of the rows, 0 for each clip's own")
    parser.add_argument("--minutes", type=float, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        source = FolderSource(options.clips, fit=Fit(max_tokens=4096, max_frames=81, fps=options.fps), cache=cache)
        rows = RowSource(PixelExamples(source, encode_text), row_tokens=ROW_TOKENS, row_text=1024, batch_size=BATCH,
                         seed=0, patch_size=PATCH, order="out")  # fmt: skip
        sizes = sorted({(s.num_frames, s.height, s.width) for s in map(source.spec, range(len(source)))})
        print(f"{len(source)} clips; frames x height x width: {sizes}; fill {rows.plan(0).fill:.3f}")
        if options.minutes:
            watch(rows, options.parallel, options.minutes)
        else:
            compare(rows, source, options.parallel, options.rounds, options.steps)


if __name__ == "__main__":
    main()
