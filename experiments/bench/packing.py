"""How full rows are and how equal the ranks' work: the pack plan beside padding, buckets and grain's packers.

    python -m experiments.bench.packing
    python -m experiments.bench.packing --scale 10000000    # time and memory of a plan of so many samples

The manifest, made from a fixed seed: 20,000 samples, 30 % images of any size from 256 to 720 pixels on the short side
and the aspect ratios of photographs, 70 % clips of 17 to 121 frames (log-uniform: short ones are more common), 256p,
360p, 480p, 540p or 720p, mostly 16:9; captions of 20 to 200 tokens. Tokens are those of a VAE of stride 4 x 8 x 8 and
patches of 1 x 2 x 2.

What is compared, on the same lengths:
  plan      `data_pipelines.packing`: rows of a fixed number of tokens.
  grain     its first-fit and best-fit packers with 64 bins, given arrays of one byte a token (which they copy: so much
            of their time).
  buckets   a batch holds samples of one bucket (short side class, orientation, 16 frames), as many as fit in a row,
            padded to the largest of its bucket; the last batch of a bucket is padded with empty samples.
  padding   a batch holds 4 samples, padded to the longest.

fill: tokens of samples / tokens computed. imbalance: time of all steps if each lasts as long as its slowest rank / if
ranks had equal work; cost of a row as in Wan's 1.3B; "256 x 4" is 256 ranks that read 4 rows (or batches) a step, else
they read one. bound: no packer can fill rows better (Martello and Toth's L2; none is known for buckets and padding).
us: microseconds of CPU time a sample.
"""

import argparse
import functools
import resource
import time

import numpy as np

from data_pipelines.fit import fit_size
from data_pipelines.packing import COST_A, COST_B, PackPlan, plan_epoch

COUNT = 20_000
ROWS = (8192, 16384, 32768)
BINS = 64
MACHINES = ((8, 1), (256, 1), (256, 4))  # ranks, rows that each reads at a step
PATCH = 16  # pixels


def manifest(count=COUNT, seed=0):
    """Latent frames, height and width in pixels, text tokens of each sample: int64 [n] each."""
    rng = np.random.default_rng(seed)
    image = rng.permutation(count) < 0.3 * count
    frames = np.exp(rng.uniform(np.log(17), np.log(122), count)).astype(int)
    frames = np.where(image, 1, (frames - 1) // 4 * 4 + 1)
    photo = rng.choice(
        [3 / 2, 4 / 3, 16 / 9, 1, 2 / 3, 3 / 4, 9 / 16], count, p=[0.22, 0.22, 0.14, 0.14, 0.13, 0.1, 0.05]
    )
    photo = photo * np.exp(rng.normal(0, 0.05, count))  # cropped by hand
    film = rng.choice([16 / 9, 4 / 3, 9 / 16, 1, 1.85, 2.39], count, p=[0.62, 0.12, 0.14, 0.06, 0.04, 0.02])
    aspect = np.where(image, photo, film)
    side = rng.choice([256, 360, 480, 540, 720], count, p=[0.35, 0.25, 0.2, 0.1, 0.1])
    side = np.where(image, np.exp(rng.uniform(np.log(256), np.log(720), count)), side)
    height = np.where(aspect >= 1, side, side / aspect).astype(int)
    width = np.where(aspect >= 1, side * aspect, side).astype(int)
    return (frames - 1) // 4 + 1, height, width, rng.integers(20, 201, count)


def per_frame(height, width):
    """Tokens of a latent frame."""
    return (height // PATCH) * (width // PATCH)


def scaled(frames, height, width, budget):
    """Tokens of each sample, those over the budget made smaller as a folder's are."""
    fit = functools.lru_cache(None)(fit_size)
    sizes = [fit(h, w, budget // t, PATCH) for t, h, w in zip(frames.tolist(), height.tolist(), width.tolist())]
    return frames * per_frame(*np.array(sizes).T)


def bound(video, row_tokens):
    """The best fill that any packing could have, from Martello and Toth's L2 bound on the number of rows."""
    video = np.sort(video)
    sums = np.concatenate([[0], video.cumsum()])
    rows = 0
    for least in [0, *np.unique(video[video <= row_tokens // 2])]:
        # Samples too large for any of `least` need a row each; those above half a row do not share one.
        alone, half, small = np.searchsorted(video, [row_tokens - least + 1, row_tokens // 2 + 1, least])
        room = (alone - half) * row_tokens - (sums[alone] - sums[half])
        rest = max(0, -((room - (sums[half] - sums[small])) // row_tokens))
        rows = max(rows, len(video) - half + rest)
    return video.sum() / (rows * row_tokens)


def imbalance(cost, ranks, rows):
    """Of rows (or batches) of these costs in this order; the last step, if not full, is left out."""
    steps = cost[: len(cost) // (ranks * rows) * ranks * rows].reshape(-1, ranks, rows).sum(axis=2)
    return steps.max(axis=1).sum() / steps.mean(axis=1).sum()


def cost_of(lengths):
    return COST_A * lengths + COST_B * lengths.astype(float) ** 2


def planned(video, text, row_tokens):
    """(fill, imbalances, microseconds a sample) of the plan."""
    plans, times = [], []
    for ranks, rows in MACHINES:
        start = time.process_time()
        room = dict(row_tokens=row_tokens, row_text=row_tokens // 4)
        plan = plan_epoch(video, text + 1, **room, seed=0, epoch=0, ranks=ranks, rows_per_rank_step=rows)
        assert len(plan) * row_tokens >= video.sum()  # planned here
        plans.append(plan)
        times.append(time.process_time() - start)
    return plans[0].fill, [plan.imbalance for plan in plans], 1e6 * np.median(times) / len(video)


def with_grain(video, text, row_tokens, packer):
    """The same of one of grain's packers."""
    import grain

    order = np.random.default_rng(0).permutation(len(video))
    pairs = [(int(video[i]), int(text[i]) + 1) for i in order]
    dataset = grain.MapDataset.source(pairs).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = dataset.map(lambda pair: dict(video=np.zeros(pair[0], np.uint8), text=np.zeros(pair[1], np.uint8)))
    room = dict(video=row_tokens, text=row_tokens // 4)
    start = time.process_time()
    rows = list(packer(dataset, length_struct=room, num_packing_bins=BINS, shuffle_bins=False, seed=0).map(_lengths))
    taken = time.process_time() - start
    cost = np.array([cost_of(lengths).sum() for lengths in rows])
    return (
        video.sum() / (len(rows) * row_tokens),
        [imbalance(cost, *machine) for machine in MACHINES],
        1e6 * taken / len(video),
    )


def _lengths(row):
    return np.bincount(row["video_segment_ids"])[1:]


def in_batches(groups, sizes, video, rng):
    """The same of padded batches: groups of samples, and how many of each make a batch."""
    computed, cost = 0, []
    for members, size in zip(groups, sizes):
        for start in range(0, len(members), size):
            longest = int(video[members[start : start + size]].max())
            computed += size * longest
            cost.append(size * cost_of(np.array(longest)))
    cost = rng.permutation(np.array(cost, float))
    return video.sum() / computed, [imbalance(cost, *machine) for machine in MACHINES], None


def padded(video, rng):
    return in_batches([rng.permutation(len(video))], [4], video, rng)


def bucketed(video, frames, height, width, row_tokens, rng):
    side = np.digitize(np.minimum(height, width), (320, 420, 510, 630))
    shape = np.digitize(np.log(width / height), (-0.15, 0.15))
    key = (side * 3 + shape) * 100 + np.where(frames == 1, 0, 1 + frames // 4)
    groups = [rng.permutation(np.flatnonzero(key == k)) for k in np.unique(key)]
    longest = [video[members].max() for members in groups]
    # All batches of a bucket have its largest shape.
    video = video.copy()
    sizes = [max(1, int(row_tokens // most)) for most in longest]
    shapes = np.zeros(len(video), int)
    for members, most in zip(groups, longest):
        shapes[members] = most
    computed, imbalances, _ = in_batches(groups, sizes, shapes, rng)
    return computed * video.sum() / shapes.sum(), imbalances, None


def show(name, result, best=None):
    fill, imbalances, taken = result
    cells = [f"{fill:8.4f}", f"{best:8.4f}" if best else " " * 8, *(f"{x:9.4f}" for x in imbalances)]
    print(f"  {name:32}" + "".join(cells) + (f"{taken:8.2f}" if taken else ""), flush=True)


def table():
    from grain.experimental import BestFitPackIterDataset, FirstFitPackIterDataset

    frames, height, width, text = manifest()
    full = frames * per_frame(height, width)
    sizes = f"median {np.median(full):.0f}, mean {full.mean():.0f}, largest {full.max()}"
    print(f"{COUNT} samples, {(frames == 1).mean():.0%} of them images; tokens: {sizes}")
    for row_tokens in ROWS:
        rng = np.random.default_rng(0)
        over, half = full > row_tokens, scaled(frames, height, width, row_tokens // 2)
        kept = np.minimum(frames, row_tokens // per_frame(height, width)) * per_frame(height, width)
        print(
            f"\nrows of {row_tokens} tokens, {row_tokens // 4} text slots: {over.sum()} samples are larger than a row"
        )
        print(f"  {'':32}{'fill':>8}{'bound':>8}{'8 ranks':>9}{'256':>9}{'256 x 4':>9}{'us':>8}")
        print(f"  {(half < full).sum()} samples scaled down to half a row, none left out:")
        best = bound(half, row_tokens)
        show("plan", planned(half, text, row_tokens), best)
        show("grain, first-fit", with_grain(half, text, row_tokens, FirstFitPackIterDataset), best)
        show("grain, best-fit", with_grain(half, text, row_tokens, BestFitPackIterDataset), best)
        show("buckets", bucketed(half, frames, height, width, row_tokens, rng))
        show("padding", padded(half, rng))
        print("  other policies:")
        fits = ~over
        show(f"plan, {over.sum()} refused", planned(full[fits], text[fits], row_tokens), bound(full[fits], row_tokens))
        show(f"plan, {over.sum()} trimmed in time", planned(kept, text, row_tokens), bound(kept, row_tokens))


def scale(count):
    """Time and memory of planning one epoch of so many samples, drawn from the manifest, at 256 ranks."""
    frames, height, width, text = manifest()
    video = scaled(frames, height, width, 8192).astype(np.int32)
    which = np.random.default_rng(1).integers(0, COUNT, count, np.int32)
    video, text = video[which], text.astype(np.int32)[which] + 1
    del which
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, start = time.perf_counter(), time.process_time()
    plans = PackPlan(video, text, row_tokens=16384, row_text=4096, seed=0, ranks=256)
    print(f"identity {plans.identity} after {time.process_time() - start:.1f} s")
    plans.row(0)
    print(f"first row after {time.process_time() - start:.1f} s")
    plan = plans.epoch(0)
    rows = len(plan)
    taken, wall = time.process_time() - start, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    each = 1e6 * taken / count
    print(f"{count} samples in {rows} rows: {taken:.0f} s of CPU time ({wall:.0f} s), {each:.2f} us a sample")
    print(f"fill {plan.fill:.4f}, imbalance {plan.imbalance:.4f} at 256 ranks, {plan.repeated} rows repeated")
    print(f"peak memory {peak:.2f} GiB; before planning {before:.2f}, of which lengths {8 * count / 2**30:.2f}")
    start = time.process_time()
    plan.row(rows // 2)
    print(f"a row in the middle: {time.process_time() - start:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=0, help="plan so many samples, and say time and memory")
    count = parser.parse_args().scale
    scale(count) if count else table()
