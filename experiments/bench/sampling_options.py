"""What reuse of layers, an interval of guidance and its rescaling cost and save, on a run of the world.

    python -m experiments.bench.sampling_options --run runs/quickstart [--clips 64] [--reuse 0.05 0.1 0.2]

The same prompts, seeds and noise each time. Error: root mean square distance of the final latents from those of the
plain settings, over their own deviation. Right: the share of clips that show all that their caption says, with its 95 %
interval. Runs: steps in which all layers ran, on one branch without guidance and on two with it; in the others the
first one alone did.
"""

import argparse


def asked(run, count: int):
    """(clips of the world that the run was not trained on, a request for each)."""
    from sorax.generate import Request
    from sorax.held_out import load_splits

    vae, patch_size = run.networks.vae_config, run.networks.dit_config.patch_size
    clips = load_splits(run.config.data.to_dict(), vae, count, vae.spatial_stride * patch_size[1])["test"]
    return clips, [Request(caption, *video.shape[:3], seed=i)
                   for i, (caption, video) in enumerate(zip(clips.captions, clips.videos))]  # fmt: skip


def share_right(videos, truths) -> str:
    """How many of videos show all that their captions say, in words."""
    from sorax.judging import judge
    from sorax.metrics import wilson_interval

    right = sum(bool(judge(video, truth)["joint"]) for video, truth in zip(videos, truths))
    rate, low, high = (100 * x for x in (right / len(truths), *wilson_interval(right, len(truths))))
    return f"right {rate:.0f} % [{low:.0f}, {high:.0f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--reuse", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3])
    settings = parser.parse_args()

    from sorax import backend

    backend.configure()
    import numpy as np

    from sorax.runs import load_run

    run = load_run(settings.run)
    generator, how = run.generator(), run.sampling()
    how |= dict(num_steps=settings.steps) if settings.steps else {}
    clips, requests = asked(run, settings.clips)
    tries = [("plain", {})] + [(f"reuse {x:g}", dict(reuse=x)) for x in settings.reuse]
    tries += [
        ("guidance at sigma 0.3 to 1", dict(guidance_interval=(0.3, 1.0))),
        ("guidance rescaled by 0.7", dict(guidance_rescale=0.7)), ("no guidance", dict(guidance_scale=1.0)),
    ]  # fmt: skip
    plain = None
    for name, changed in tries:
        latents = generator.latents(requests, **how | changed)
        flat = np.concatenate([z.ravel() for z in latents])
        plain = flat if plain is None else plain
        error = np.sqrt(np.mean(np.square(flat - plain))) / plain.std()
        print(f"{name:28s} runs {generator.runs}; error {error:.3f}; "
              f"{share_right(generator.codec.decode(latents), clips.truths)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
