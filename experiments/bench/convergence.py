"""What makes a DiT learn faster: validation loss of variants of the quickstart's at equal compute, several seeds each.

    python -m experiments.bench.convergence --vae runs/quickstart/vae --out runs/convergence [--steps 400] [--seeds 3]
        [--variants base,uniform,...] [--score]

--vae is a finished VAE run; the world's latents are encoded with it once, into --out. First the CPU time of a training
step of each variant is measured, all in turns; each is then trained for as many steps as take the CPU time of --steps
steps of `base` (or of the variant that it stands beside in its group). Validation is the same for all: the velocity
error of the averaged parameters at five fixed noise levels, on clips that nobody trains on. --score adds the share of
64 prompts that `sorax evaluate` finds jointly right, in distribution and held out.

Every result is a line of OUT/results.jsonl; what is there already is not done again, so that the same command goes on
after an interruption, and with more seeds or variants.
"""

import argparse
import json
import os
import shutil

import numpy as np

from sorax.backend import configure

configure()

from experiments.bench.variants import Results  # noqa: E402
from sorax.config import load_config  # noqa: E402
from sorax.dit_data import encode_experiment  # noqa: E402
from sorax.evaluate import evaluate_run  # noqa: E402
from sorax.objectives import complete  # noqa: E402
from sorax.runs import load_run  # noqa: E402
from sorax.train import train  # noqa: E402

QUICKSTART = os.path.join(os.path.dirname(__file__), "..", "quickstart.py")
ADAMW = ("optim.optimizer=adamw", "optim.lr=1.5e-3", "optim.vector_lr=0.0")
WIDE = (*ADAMW, "model.num_heads=8", "model.ffn_dim=1024")
# Groups: the first variant of each is what the others are compared with, and whose compute they get.
GROUPS = dict(
    noise=dict(
        base=(),  # the quickstart: Muon, logit-normal, shift 3
        uniform=("flow.sigma=uniform",),
        mode=("flow.sigma=mode",),
        no_shift=("flow.train_shift=1.0",),
        shift_by_tokens=("flow.shift_tokens=12",),  # of the shape that three quarters of the clips have
    ),
    routing=dict(
        base=(),
        tread=("flow.skip_share=0.5",),
        tread_quarter=("flow.skip_share=0.25",),
    ),
    optimizer=dict(
        base=(),
        adamw=ADAMW,
        schedule_free=("optim.optimizer=schedule_free", "optim.schedule=constant", "optim.lr=2.5e-3",
                       "optim.vector_lr=0.0"),
        wsd=("optim.schedule=wsd",),
        clip_sigmas=("optim.clip_sigmas=3.0",),
    ),
    width=dict(
        wide=WIDE,  # at the learning rate that suits the width of 128
        wide_mup=(*WIDE, "model.mup_base_width=128"),
    ),
)  # fmt: skip
VARIANTS = {name: overrides for group in GROUPS.values() for name, overrides in group.items()}


def experiment(name, options, *, seed=0, steps=None):
    """Config of one run."""
    steps = steps or options.steps
    return load_config(
        QUICKSTART,
        [f"vae.path={options.vae}", f"data.path=shards:{os.path.join(options.out, 'latents')}", f"train.seed={seed}",
         f"train.steps={steps}", f"eval.every={steps}", "eval.num_videos=1", "eval.num_steps=1",
         f"checkpoint.every={steps}", *VARIANTS[name]],
        complete,
    )  # fmt: skip


def run(name, seed, steps, options) -> dict:
    """Trains one variant and gives its validation losses (and scores)."""
    folder = os.path.join(options.out, f"{name}_{seed}_{steps}")
    train(experiment(name, options, seed=seed, steps=steps), folder, title=f"{name}, seed {seed}")
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        last = [row for row in map(json.loads, f) if "val_loss" in row][-1]
    found = {key: value for key, value in last.items() if key.startswith("val_loss")}
    if options.score:
        scores = evaluate_run(load_run(folder, "ema"), os.path.join(folder, "report"), num_steps=30)
        for split, entry in scores["splits"].items():
            found[f"joint_{split}"] = entry["prompts"]["model"]["joint"]["rate"]
    shutil.rmtree(folder)  # a result is a line; checkpoints would fill the disk
    return found


def table(results, options):
    """Means and standard deviations over seeds, by group."""
    for group, variants in GROUPS.items():
        base = next(iter(variants))
        of = lambda name: {r["seed"]: r for r in results.rows if r.get("variant") == name and  # noqa: E731
                           r["budget"] == options.steps}  # fmt: skip
        reference = of(base)
        for name in variants:
            rows = of(name)
            if not rows:
                continue
            loss = [r["val_loss"] for r in rows.values()]
            pairs = [rows[s]["val_loss"] / reference[s]["val_loss"] - 1 for s in rows if s in reference]
            scored = [r for r in rows.values() if "joint_test" in r]
            shown = [f"{key} {np.mean([r[key] for r in scored]):.2f} ({len(scored)} seeds)"
                     for key in (scored[0] if scored else ()) if key.startswith("joint")]  # fmt: skip
            if pairs:
                low, mean, high = (100 * f(pairs) for f in (np.min, np.mean, np.max))
                shown.insert(0, f"against {base}: {mean:+.1f} % [{low:+.1f}, {high:+.1f}]")
            print(f"{group:10} {name:16} steps {next(iter(rows.values()))['steps']:5}  val_loss {np.mean(loss):.4f} "
                  f"+- {np.std(loss):.4f} ({len(loss)} seeds)  {'  '.join(shown)}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", required=True, help="folder of a finished VAE run, such as runs/quickstart/vae")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=400, help="of the first variant of each group")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--score", action="store_true")
    options = parser.parse_args()
    names = options.variants.split(",")
    unknown = set(names) - set(VARIANTS)
    if unknown:
        parser.error(f"unknown variants {', '.join(sorted(unknown))}: known are {', '.join(VARIANTS)}")
    latents = os.path.join(options.out, "latents")
    if not os.path.exists(os.path.join(latents, "val.json")):
        encode_experiment(load_config(QUICKSTART, [], complete), options.vae, latents)
    results = Results(options.out)
    first = {name: next(iter(group)) for group in GROUPS.values() for name in group}
    together = sorted({*names, *(first[name] for name in names)})
    cost = results.costs({name: experiment(name, options) for name in together})
    for seed in range(options.seeds):
        for name in names:
            key = dict(variant=name, seed=seed, budget=options.steps)
            if results.find(**key) and not (options.score and "joint_test" not in results.find(**key)):
                continue
            steps = round(options.steps * cost[first[name]] / cost[name])
            results.add(**key, steps=steps, **run(name, seed, steps, options))
    table(results, options)


if __name__ == "__main__":
    main()
