"""Time and memory of a data report over a made-up index: seconds of CPU a million samples, and the peak.

    python experiments/bench/report.py [--samples 1000000]

30 % images, clips of 17 to 900 frames in 11 sizes, every third cropped by some pixels, 7 rates, a tenth of them
variable; captions of 6 to 23 words; 3 % rejected. Thumbnails are left out, for there are no files.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather

from data_pipelines.fit import Fit
from data_pipelines.index import COLUMNS, Index
from data_pipelines.report import make_report
from data_pipelines.report_fit import Settings

SIZES = ((256, 256), (256, 455), (360, 480), (360, 640), (480, 720), (540, 960), (720, 1280), (1280, 720), (1080, 1920),
         (640, 360), (426, 240))  # fmt: skip
WORDS = """a the red blue green small large dog cat woman man child walks runs jumps over through under river road field
tree house car boat slowly quickly at night in sun rain snow while camera moves closer light falls on old new"""


def make_table(n, seed=0):
    """An index of n samples that were never seen."""
    rng = np.random.default_rng(seed)
    cropped = rng.integers(0, 40, (n, 2)) * (rng.random((n, 1)) < 1 / 3)
    height, width = (np.array(SIZES)[rng.integers(len(SIZES), size=n)] - cropped).T
    image, variable = rng.random(n) < 0.3, rng.random(n) < 0.1
    fps = rng.choice([15, 23.976, 24, 25, 29.97, 30, 60], n) * np.where(variable, rng.uniform(0.8, 1, n), 1)
    frames = np.where(image, 1, rng.integers(17, 900, n))
    span = (frames - 1) / fps
    counts = rng.integers(6, 24, n)
    ends = counts.cumsum()
    words = np.array(WORDS.split())[rng.integers(len(WORDS.split()), size=ends[-1])].tolist()
    captions = [" ".join(words[end - count : end]) for count, end in zip(counts.tolist(), ends.tolist())]
    reasons = [f"truncated: {i % 90} of 90 frames are there" if bad else ""
               for i, bad in enumerate(rng.random(n) < 0.03)]  # fmt: skip
    columns = dict(
        key=[f"{i:08d}.mp4" for i in range(n)], kind=np.where(image, "image", "video"), num_frames=frames,
        height=height, width=width, fps=fps, rotation=np.zeros(n, int),
        duration=np.where(image, 0, span + 1 / fps), span=span,
        codec=["h264"] * n, container=["mp4"] * n, bytes=rng.integers(1e5, 1e7, n), mtime_ns=np.zeros(n, int),
        sha256=[f"{i - i % 1000 // 999:064x}" for i in range(n)], caption=captions,
        caption_length=[len(caption) for caption in captions], reason=reasons,
    )  # fmt: skip
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in COLUMNS], schema=COLUMNS)


def write_table(n, path):
    feather.write_feather(make_table(n), path, compression="uncompressed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    n = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as name:
        # In a process of its own, so that the peak of this one is the report's.
        process = multiprocessing.get_context("spawn").Process(target=write_table, args=(n, f"{name}/table"))
        process.start()
        process.join()
        table = feather.read_table(f"{name}/table", memory_map=False)
        index = Index(table, dict(source=dict(kind="source", path="made up"), identity="0"))
        settings = Settings(Fit(max_tokens=16384), tokenizer="bpe", vocab_size=8192, steps=100_000)
        began, cpu = time.perf_counter(), time.process_time()
        numbers = make_report(index, f"{name}/report", settings)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{n:,} samples, {numbers['totals']['kept']:,} kept, fill {numbers['packing']['fill']:.4f}")
    print(f"report: {cpu:.1f} s of CPU ({1e6 * cpu / n:.1f} us a sample), {wall:.1f} s, peak {peak:.2f} GiB, of which "
          f"the index {table.nbytes / 2**30:.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
