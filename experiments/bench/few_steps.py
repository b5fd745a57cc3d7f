"""Scorecard of few-step distillation on the world: a teacher, its students, and the teacher in as few steps.

    python -m experiments.bench.few_steps --teacher runs/quickstart --student runs/distill [--clips 64]

The same prompts, seeds and noise each time. Right: the share of clips that show all that their caption says, with its
95 % interval. Evaluations of the network are counted for one branch. A student is sampled as its config says.
"""

import argparse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="run folder")
    parser.add_argument("--student", nargs="+", default=[], help="run folders")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4], help="of the teacher, besides its own")
    settings = parser.parse_args()

    from sorax import backend

    backend.configure()
    from experiments.bench.sampling_options import asked, share_right
    from sorax.runs import load_run

    teacher = load_run(settings.teacher)
    clips, requests = asked(teacher, settings.clips)
    tries = [("teacher", teacher, {})]
    tries += [("student", load_run(path), {}) for path in settings.student]
    tries += [("teacher", teacher, dict(num_steps=steps, solver=solver)) for steps in settings.steps
              for solver in (("ddim",) if steps == 1 else ("ddim", "unipc"))]  # fmt: skip
    for name, run, changed in tries:
        how = run.sampling() | changed
        generator = run.generator()
        videos = generator.videos(requests, **how)
        evaluations = how["num_steps"] * (1 if how["guidance_scale"] == 1 else 2)
        print(f"{name}: {how['num_steps']} steps of {how['solver']}, guidance {how['guidance_scale']:g}: "
              f"{evaluations} evaluations; {share_right(videos, clips.truths)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
