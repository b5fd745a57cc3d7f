"""What the parser and the judges of clips get right on ground truth, and which injected defects they catch.

    python -m experiments.bench.parser                        # 2,000 clips of 64 to 256 px, about 8 CPU minutes
    python -m experiments.bench.parser --clips 500 --vae runs/x/vae --shape 5 32 32 --extent 5 --fps 6

A clip is of all motions, one to three objects, in turn of the splits test (3 of 4), heldout and ood. A position counts
where the object is whole: visible > 0.995, and not touching the frame's edge, the bar or another object. With --vae,
the same clips are read again after that VAE has copied them: the ceiling of whatever is generated through it.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import multiprocessing
import time

import numpy as np

from data_pipelines.world import MOTIONS, World, WorldConfig
from data_pipelines.world_render import coverage, view
from experiments.bench.defects import KINDS, inject
from sorax.abnormal import abnormal_events, persistence, speed_drift
from sorax.judging import DETAILED, SHORT, judge
from sorax.metrics import wilson_interval
from sorax.parser import parse_clip

SHAPES = ((17, 64, 64), 0.5), ((17, 96, 96), 0.25), ((17, 128, 128), 0.17), ((9, 256, 256), 0.08)
FLOOR = 0.002  # of the frame
DRIFT = 0.025  # a speed that is farther off than this is wrong


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int
    shapes: tuple  # (shape, share)
    extent: float
    fps: float

    def world(self, index):
        place = index * 0.6180339887 % 1  # every run of items has its share of each shape
        for shape, share in self.shapes:  # noqa: B007
            if place < share:
                break
            place -= share
        split = ("heldout", "ood")[index // 4 % 2] if index % 4 == 3 else "test"
        return World(WorldConfig(split=split, seed=self.seed, num_samples=10**6, shapes=(shape,), fps=self.fps,
                                 extent=max(self.extent, 7.0) if split == "ood" else self.extent))  # fmt: skip


def whole_frames(scene, truth, size):
    """[K, T] bool: all of an object is visible, and no pixel of it is beside the edge, the bar or another object."""
    num_frames, height, width = size
    short, zero = min(height, width), np.zeros((num_frames, 2))
    masks = [coverage(body.shape, truth.position[k] * short, truth.radius[k] * short, zero, height, width) > 1e-6
             for k, body in enumerate(scene.bodies)]  # fmt: skip
    taken = np.zeros((num_frames, height + 2, width + 2), bool)
    taken[:, [0, -1]] = taken[:, :, [0, -1]] = True  # outside the frame
    if scene.bar is not None:
        scale, *offset = view(scene, height, width)
        low, high = (edge * scale + offset[scene.bar.axis] for edge in (scene.bar.low, scene.bar.high))
        bar = slice(max(int(low), 0) + 1, max(int(np.ceil(high)), 0) + 1)
        if scene.bar.axis == 0:
            taken[:, :, bar] = True
        else:
            taken[:, bar] = True
    whole = np.asarray(truth.visible) > 0.995
    for k, mask in enumerate(masks):
        around = taken.copy()
        for j, other in enumerate(masks):
            if j != k:
                around[:, 1:-1, 1:-1] |= other
        grown = np.zeros_like(around)
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):
                grown[:, dy : dy + height, dx : dx + width] |= mask
        whole[k] &= ~(grown & around).any((1, 2))
    return whole


def own_tracks(tracks, truth):
    """Tracks of each object, by place and colour, and how many belong to none."""
    own, extra = [[] for _ in truth.objects], 0
    for track in tracks:
        apart = [np.nanmedian(np.linalg.norm(track.positions - truth.position[k], axis=-1))
                 - 0.1 * (track.color == thing.color) for k, thing in enumerate(truth.objects)]  # fmt: skip
        k = int(np.argmin(apart))
        if apart[k] < 0.12:
            own[k].append(track)
        else:
            extra += 1
    return own, extra


def read(video, world, index):
    """What is measured of one clip."""
    scene, truth = world.scene(index), world.truth(index)
    tracks = parse_clip(video)
    own, extra = own_tracks(tracks, truth)
    whole = whole_frames(scene, truth, video.shape[:3])
    frame = np.array(video.shape[2:0:-1]) / min(video.shape[1:3])
    objects = []
    for k, thing in enumerate(truth.objects):
        shown = truth.visible[k] > 0.5
        entry = dict(motion=thing.motion, whole=int(whole[k].sum()), unbroken=len(own[k]) == 1 or not shown.any())
        if own[k]:
            track = max(own[k], key=lambda track: track.seen.sum())
            entry["unbroken"] &= bool(track.seen[shown].all())
            entry["errors"] = np.linalg.norm(track.positions - truth.position[k], axis=-1)[whole[k]]
            entry["size"] = (track.radius / truth.radius[k])[whole[k]]
            drift = speed_drift(track, truth.position[k], frame)
            entry["drift"] = None if drift is None else abs(drift) > DRIFT
        for name in ("color", "shape"):
            said = getattr(track, name) if own[k] else None
            entry[name] = None if said is None else said == getattr(thing, name)
        objects.append(entry)
    verdict = judge(video, truth, tracks=tracks, asked=DETAILED)
    events = abnormal_events(video, tracks)
    kept = persistence(video, tracks)
    return dict(objects=objects, extra=extra, pixels=min(video.shape[1:3]), verdict=verdict, kept=kept,
                events=[event.kind for event in events], item=(world.config.split, index))  # fmt: skip


def spoiled(world, index):
    """What the judges say of the item with a defect: dict, or None where none fits. Each kind in its turn."""
    draw = np.random.default_rng((world.config.seed, index))
    names = list(KINDS)
    names = names[index % len(names) :] + names[: index % len(names)]
    if names[0] == "delete while hidden":  # that takes a bar, and time to come out from behind it
        world = World(
            dataclasses.replace(world.config, motions=("occlude",), num_objects=(1, 1), shapes=((25, 64, 96),))
        )
    for name in names:
        made = inject(name, world, index, draw)
        if made is None:
            continue
        video, k, _ = made
        truth, tracks = world.truth(index), parse_clip(video)
        own, _ = own_tracks(tracks, truth)
        drifts = [speed_drift(track, truth.position[k]) for track in own[k]]
        verdict = judge(video, truth, tracks=tracks, asked=DETAILED)
        caught = dict(
            judged=not verdict["joint"], abnormal=bool(abnormal_events(video, tracks)),
            drift=any(d is not None and abs(d) > DRIFT for d in drifts),
        )  # fmt: skip
        return dict(kind=name, item=(world.config.split, index), **caught)
    return None


def work(task):
    settings, index, video, defects = task
    world = settings.world(index)
    begin = time.process_time()
    result = read(world[index]["video"] if video is None else video, world, index)
    result["defect"] = spoiled(world, index) if defects else None
    return result | dict(seconds=time.process_time() - begin)


# the tables ------------------------------------------------------------------------------------------------------


def rate(values):
    values = list(values)
    if not values:
        return "-"
    k, n = sum(map(bool, values)), len(values)
    low, high = wilson_interval(k, n)
    return f"{100 * k / n:.2f} % ({k} of {n}) [{100 * low:.2f}, {100 * high:.2f}]"


def line(title, clips, objects):
    seen = [o for o in objects if o["whole"]]
    errors = np.concatenate([o["errors"] for o in seen if "errors" in o] or [np.zeros(0)])
    missed, errors = np.isnan(errors).sum(), errors[~np.isnan(errors)]
    good = [o for o in seen if "errors" in o and (np.nan_to_num(o["errors"], nan=1.0) <= FLOOR).all()]
    numbers = [np.median(errors), np.quantile(errors, 0.99), errors.max()] if len(errors) else [np.nan] * 3
    sizes = np.concatenate([o["size"] for o in seen if "size" in o] or [np.ones(1)])
    cells = [f"{title:14}", f"{len(seen):6}", *(f"{v:9.5f}" for v in numbers)]
    cells += [f"{100 * len(good) / max(len(seen), 1):8.2f}", f"{missed:6}"]
    cells.append(f"{100 * np.nanquantile(np.abs(sizes - 1), 0.99):8.2f}")
    for name in ("color", "shape"):
        said = [o[name] for o in seen]
        right, wrong = sum(v is True for v in said), sum(v is False for v in said)
        cells += [f"{100 * right / max(len(said), 1):8.2f}", f"{wrong:6}"]
    cells.append(f"{100 * np.mean([o['unbroken'] for o in objects]):8.2f}" if objects else "-")
    return " ".join(cells)


HEADER = (f"{'':14} {'n':>6} {'median':>9} {'p99':>9} {'largest':>9} {'<= .002%':>8} {'unseen':>6} {'size p99%':>8} "
          f"{'colour%':>8} {'wrong':>6} {'shape%':>8} {'wrong':>6} {'track%':>8}")  # fmt: skip


def report(title, results):
    print(f"\n{title}: {len(results)} clips, {np.mean([r['seconds'] for r in results]):.3f} CPU s each\n")
    objects = [o for r in results for o in r["objects"]]
    print("objects; position errors in fractions of the frame, where the object is whole; wrong: a wrong name was said")
    print(HEADER)
    print(line("all", results, objects))
    for pixels in sorted({r["pixels"] for r in results}):
        of = [r for r in results if r["pixels"] == pixels]
        print(line(f"{pixels} px", of, [o for r in of for o in r["objects"]]))
    for motion in MOTIONS:
        print(line(motion, results, [o for o in objects if o["motion"] == motion]))
    never = [o for o in objects if not o["whole"]]
    names = [o[name] is False for o in never for name in ("color", "shape")]
    print(f"of {len(never)} objects that are never whole, wrong names: {sum(names)}")
    floors = [all((np.nan_to_num(o.get("errors", np.full(o["whole"], np.nan)), nan=1) <= FLOOR).all()
                  for o in r["objects"]) for r in results]  # fmt: skip
    print(f"clips with every position within {FLOOR}: {rate(floors)}")
    print(f"clips with unbroken tracks, one each: "
          f"{rate(r['extra'] == 0 and all(o['unbroken'] for o in r['objects']) for r in results)}")  # fmt: skip
    print(f"clips called abnormal: {rate(r['events'] for r in results)} "
          f"{dict(collections.Counter(kind for r in results for kind in r['events']))}")  # fmt: skip
    print(f"objects called {100 * DRIFT:g} % too fast or slow: "
          f"{rate(o['drift'] for o in objects if o.get('drift') is not None)}")  # fmt: skip
    occluded = [r["kept"] for r in results if r["kept"]["occlusions"]]
    print("clips with occlusions in which all of them kept:")
    for name in ("same_object", "color", "size", "shape"):
        print(f"  {name:12} {rate(kept[name] for kept in occluded)}")
    print("\njudged right, of the clips that are asked it")
    for name in (*DETAILED, "joint"):
        print(f"{name:12} {rate(r['verdict'][name] for r in results if r['verdict'][name] is not None)}")
    print(f"{'joint, short':12} "
          f"{rate(all(r['verdict'][name] is not False for name in SHORT) for r in results)}")  # fmt: skip
    wrong = [r["item"] for r in results if not r["verdict"]["joint"] or r["events"]]
    print(f"wrong or abnormal: {wrong[:20]}")


def report_defects(results):
    found = [r["defect"] for r in results if r["defect"]]
    print(f"\ndefects in {len(found)} clips: caught by any; % caught by the caption's judge, as abnormal, as drift\n")
    for kind in KINDS:
        of = [d for d in found if d["kind"] == kind]
        any_ = [d["judged"] or d["abnormal"] or d["drift"] for d in of]
        each = (100 * np.mean([d[name] for d in of] or [np.nan]) for name in ("judged", "abnormal", "drift"))
        alone = " ".join(f"{value:7.1f}" for value in each)
        print(f"{kind:20} {rate(any_):44} {alone}   missed {[d['item'] for d, a in zip(of, any_) if not a][:6]}")


def copies(folder, videos):
    """Videos as a VAE copies them."""
    from sorax.encode import Codec
    from sorax.runs import open_vae

    config, params, _ = open_vae(folder)
    codec = Codec(config, params)
    return [copy for start in range(0, len(videos), 64)
            for copy in codec.decode(codec.encode(videos[start : start + 64]))]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vae", default="")
    parser.add_argument("--shape", type=int, nargs=3, action="append", help="frames height width")
    parser.add_argument("--extent", type=float, default=10.0)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--no-defects", action="store_true")
    args = parser.parse_args()
    shapes = tuple((tuple(shape), 1 / len(args.shape)) for shape in args.shape) if args.shape else SHAPES
    settings = Settings(args.seed, shapes, args.extent, args.fps)
    indices = range(args.first, args.first + args.clips)
    with concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(work, [(settings, i, None, not args.no_defects) for i in indices], chunksize=8))
        report("ground truth", results)
        if not args.no_defects:
            report_defects(results)
        if args.vae:
            videos = copies(args.vae, [settings.world(i)[i]["video"] for i in indices])
            tasks = [(settings, i, video, False) for i, video in zip(indices, videos)]
            report(f"copies of {args.vae}", list(pool.map(work, tasks, chunksize=8)))


if __name__ == "__main__":
    main()
