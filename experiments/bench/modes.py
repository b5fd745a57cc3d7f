"""Every mode of generation on the embedded world, scored by pixels: is what is given kept, does the rest go on from it?

    python -m experiments.bench.modes --run runs/modes [--clips 64] [--frames 13] [--sheet modes.png]

Clips of the world's test split; the caption is given too. Of each mode, over the same scenes:

    kept        PSNR in dB of the frames that are given, against the truth; copy: that of the VAE's copies of them
    position    mean distance of the object from where it truly is, in all other frames, in shares of the frame
    velocity    mean error of its step between what is given and what is made, likewise
    seam        of a loop: how far the object jumps from the last frame to the first, over its largest step elsewhere
    color, shape, count, direction, joint    shares of clips, with 95 % intervals

The first five are medians.
"""

import argparse


def canvases(video, stride, height, width):
    """Mode -> (canvas, frames that are given) for one clip of T frames."""
    import numpy as np

    from sorax import modes

    T = len(video)
    half, third = (T // 2) // stride * stride, (T // 3) // stride * stride
    hole = np.broadcast_to(np.arange(width) >= width // 2, (T, height, width))
    new = T - 1 - half
    ends = [*range(third + 1), *range(T - third, T)]
    return {
        "text": (modes.text(T, height, width), []),
        "image": (modes.keyframes({0: video[:1]}, T, stride), [0]),
        "extend forward": (modes.extend(video[: half + 1], new, stride), list(range(half + 1))),
        "extend backward": (modes.extend(video[half + 1 :], half, stride, backward=True), list(range(half + 1, T))),
        "connect": (modes.connect(video[: third + 1], video[T - third :], T - 2 * third - 1, stride), ends),
        "keyframes": (modes.keyframes({k: video[k : k + 1] for k in (0, half, T - 1)}, T, stride), [0, half, T - 1]),
        "inpaint the right half": (modes.edit(video, stride, holes=hole), []),
        "edit, strength 0.5": (modes.edit(video, stride, strength=0.5), []),
        "loop of a clip": (modes.loop(video[: half + 1], new, stride), list(range(half + 1))),
        "loop of text": (modes.loop_of_text(T, height, width, stride, half), []),
    }  # fmt: skip


def score(video, truth, given, copy, original, is_loop):
    """Measurements of one clip; None where there is nothing to measure."""
    import numpy as np

    from sorax.judging import judge
    from sorax.metrics import psnr
    from sorax.parser import parse_clip
    from sorax.world_suite import position_error

    tracks = parse_clip(video)
    found = {name: bool(right) for name, right in judge(video, truth, tracks=tracks).items() if right is not None}
    made = dict(kept=None, copy=None, position=None, velocity=None, seam=None)
    if given:
        made["kept"], made["copy"] = (min(99.0, psnr(some[given], original[given])) for some in (video, copy))
    if not is_loop:
        made["position"] = position_error(tracks, truth, given)
    track = tracks[0] if tracks else None
    if track is None or not track.seen.all():
        return found, made
    steps = np.diff(track.positions, axis=0)
    if is_loop:
        made["seam"] = np.linalg.norm(track.positions[0] - track.positions[-1]) / np.linalg.norm(steps, axis=1).max()
    else:
        true = np.diff(truth.position[0], axis=0)
        at = [k for k in range(len(video) - 1) if (k in given) != (k + 1 in given)]
        if at:
            made["velocity"] = float(np.linalg.norm(steps[at] - true[at], axis=1).mean())
    return found, made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--modes", nargs="+", help="these alone, such as image connect")
    parser.add_argument("--sheet", default="", help="PNG with the first clip of each mode")
    settings = parser.parse_args()

    from sorax import backend

    backend.configure()
    import dataclasses

    import numpy as np

    from data_pipelines.world import World
    from sorax import media
    from sorax.metrics import wilson_interval
    from sorax.modes import untrained
    from sorax.runs import load_run
    from sorax.windows import Job, make
    from sorax.world_suite import open_world

    run = load_run(settings.run)
    generator, how, stride = run.generator(), run.sampling(), run.networks.vae_config.temporal_stride
    how |= dict(num_steps=settings.steps) if settings.steps else {}
    config = open_world(run).config
    _, height, width = config.shapes[0]
    world = World(dataclasses.replace(config, shapes=((settings.frames, height, width),), num_samples=settings.clips,
                                      num_objects=(1, 1), captions="short"))  # fmt: skip
    originals = [world[i]["video"] for i in range(settings.clips)]
    truths = [world.truth(i) for i in range(settings.clips)]
    copies = generator.codec.decode(generator.codec.encode(originals))
    asked = [canvases(video, stride, height, width) for video in originals]
    shown, warned = [originals[0]], set()
    for mode in settings.modes or asked[0]:
        jobs = [Job(some[mode][0], world.caption(i), seed=i) for i, some in enumerate(asked)]

        def look(number, request, mode=mode):
            if request.given and (text := untrained(request.given[0], run.given)) and mode not in warned:
                warned.add(mode)
                print(f"{mode}: {text}")

        videos = make(generator, jobs, size=run.longest(), on_request=look, **how)
        shown.append(videos[0])
        scores = [score(video, truths[i], asked[i][mode][1], copies[i], originals[i], "loop" in mode)
                  for i, video in enumerate(videos)]  # fmt: skip
        words = []
        for name, form in dict(kept=".1f", copy=".1f", position=".3f", velocity=".3f", seam=".2f").items():
            values = [made[name] for _, made in scores if made[name] is not None]
            words.append(f"{name} {np.median(values):{form}} (n {len(values)})" if values else f"{name} -")
        for name in ("color", "shape", "count", "direction", "joint"):
            right = [found[name] for found, _ in scores if name in found]
            low, high = wilson_interval(sum(right), len(right))
            words.append(f"{name} {100 * np.mean(right):.0f} % [{100 * low:.0f}, {100 * high:.0f}]" if right else "")
        print(f"{mode:24s} {'; '.join(words)}", flush=True)
    if settings.sheet:
        labels = ["truth", *(settings.modes or asked[0])]
        media.write_sheet(settings.sheet, shown, labels, columns=settings.frames, cell=48)


if __name__ == "__main__":
    main()
