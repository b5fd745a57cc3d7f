"""What recaptioning is worth: DiTs trained on several kinds of captions at equal compute, asked in kinds of prompts.

    python -m experiments.bench.captions --vae runs/quickstart/vae --captions captioned --expander runs/expander
        --out runs/captions [--steps 1000] [--seeds 0,1,2] [--clips 128]

The table of DALL-E 3 (Betker et al. 2023), exact: the world is its own judge. --captions is what `sorax caption` wrote
for the world of `experiments/captions_world.py`, --expander a run of `experiments/expander_world.py` on that world; its
docstring has both commands. `original` are the captions that the clips came with, which are short. All variants train
on the CPU time of --steps steps of `original`: long captions take more time a step, and get fewer steps.

Prompts are the short and the detailed captions of clips that nobody trains on, and the short ones expanded. Asked of
all, `said`: colour, shape, count, direction, motion, as short captions say them. Of detailed ones also `all`: size and
speed too. Each is also scored by itself. The same noise everywhere; intervals are bootstraps over prompts, of all
seeds together, beside each seed's mean. Every result is a line of OUT/results.jsonl, done once.
"""

import argparse
import dataclasses
import os
import shutil

import numpy as np

from sorax.backend import configure

configure()

from data_pipelines.sources import open_source  # noqa: E402
from data_pipelines.world import World  # noqa: E402
from experiments.bench.variants import Results  # noqa: E402
from sorax.caption_writer import load_captioner  # noqa: E402
from sorax.config import load_config  # noqa: E402
from sorax.dit_data import encode_experiment  # noqa: E402
from sorax.expand import RunExpander, expand  # noqa: E402
from sorax.generate import Request  # noqa: E402
from sorax.judging import DETAILED, SHORT, judge  # noqa: E402
from sorax.objectives import complete  # noqa: E402
from sorax.runs import load_run  # noqa: E402
from sorax.statistics import mean_cell  # noqa: E402
from sorax.train import train  # noqa: E402

EXPERIMENT = os.path.join(os.path.dirname(__file__), "..", "captions_world.py")
# Room for eight short captions where all are short: less text, more steps.
VARIANTS = dict(
    original=("data.caption_mix=original:1", "data.row_text=72"),
    short=("data.caption_mix=short:1", "data.row_text=72"),
    detailed=("data.caption_mix=detailed:1",),
    blend_95=("data.caption_mix=detailed:0.95,original:0.05",),
    blend_50=("data.caption_mix=detailed:0.5,original:0.5",),
)


def experiment(name, options, seed=0, steps=None):
    steps = steps or options.steps
    return load_config(
        EXPERIMENT,
        [f"vae.path={options.vae}", f"data.path=shards:{os.path.join(options.out, 'latents')}", f"train.seed={seed}",
         f"train.steps={steps}", f"checkpoint.every={steps}", *VARIANTS[name]],
        complete,
    )  # fmt: skip


def prompts(world, expander):
    """Prompts by kind."""
    count = world.config.num_samples
    found = {style: [World(dataclasses.replace(world.config, captions=style)).caption(i) for i in range(count)]
             for style in ("short", "detailed")}  # fmt: skip
    found["expanded"] = [made.text for made in expand(found["short"], expander)]
    return found


def score(folder, world, asked) -> dict:
    """Whether clips show what is asked, 1 or 0 of each, by kind of prompt."""
    run = load_run(folder, "ema")
    generator, how, found = run.generator(), run.sampling(), {}
    truths = [world.truth(i) for i in range(world.config.num_samples)]
    for kind, texts in asked.items():
        requests = [Request(text, *world.config.shapes[0], seed=i) for i, text in enumerate(texts)]
        videos = generator.videos(requests, **how)
        # What expanded prompts say beyond the short ones is their own: no clip's truth has it.
        spoken = [name for name in DETAILED if name != "relation" and (kind == "detailed" or name in SHORT)]
        judged = [judge(video, truth, asked=spoken) for video, truth in zip(videos, truths)]
        sets = {name: (name,) for name in spoken} | dict(said=SHORT) | (dict(all=spoken) if kind == "detailed" else {})
        for what, names in sets.items():
            found[f"{what}_{kind}"] = [int(all(j[name] is not False for name in names)) for j in judged]
    return found


def table(results, options):
    for name in VARIANTS:
        rows = [r for r in results.rows if r.get("variant") == name and r["budget"] == options.steps]
        for key in [key for key, values in (rows[0] if rows else {}).items() if isinstance(values, list)]:
            cell = mean_cell([x for row in rows for x in row[key]], groups=[*range(len(rows[0][key]))] * len(rows))
            mean, low, high, *seeds = (100 * x for x in (cell["value"], cell["lo"], cell["hi"],
                                                         *sorted(np.mean(row[key]) for row in rows)))  # fmt: skip
            print(f"{name:9} {rows[0]['steps']:5} steps  {key:18} {mean:3.0f} % [{low:.0f}, {high:.0f}]  "
                  f"seeds {', '.join(f'{x:.0f}' for x in seeds)}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--expander", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of `original`")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--variants", default="original,detailed,blend_95")
    options = parser.parse_args()
    names = options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}: known are {', '.join(VARIANTS)}")
    latents = os.path.join(options.out, "latents")
    if not os.path.exists(os.path.join(latents, "val.json")):
        path = f"data.path=captions:{options.captions}"
        encode_experiment(load_config(EXPERIMENT, [path], complete), options.vae, latents)
    results = Results(options.out)
    cost = results.costs({name: experiment(name, options) for name in {"original", *names}})
    asked = world = None
    for seed in options.seeds:
        for name in names:
            key = dict(variant=name, seed=seed, budget=options.steps)
            if results.find(**key):
                continue
            steps = round(options.steps * cost["original"] / cost[name])
            folder = os.path.join(options.out, f"{name}_{seed}_{steps}")
            train(experiment(name, options, seed, steps), folder, title=f"{name}, seed {seed}")
            if asked is None:
                own = open_source(load_config(EXPERIMENT, [], complete).data.to_dict(), split="test").config
                world = World(dataclasses.replace(own, captions="short", num_samples=options.clips))
                asked = prompts(world, RunExpander(load_captioner(options.expander, reads="text")))
            results.add(**key, steps=steps, **score(folder, world, asked))
            shutil.rmtree(folder)  # a result is a line; checkpoints would fill the disk
    table(results, options)


if __name__ == "__main__":
    main()
