"""Variants of an experiment at equal compute: what a step of each costs, and results that are kept line by line."""

import json
import os
import tempfile
import time

import jax
import numpy as np

from sorax import sharding
from sorax.objectives import make_objective
from sorax.optim import make_tx
from sorax.train import make_init, make_step


def step_cost(configs: dict, rounds: int = 8) -> dict[str, float]:
    """Median CPU seconds of a training step of each experiment, in turns."""
    mesh, runs = sharding.make_mesh(), {}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            objective = make_objective(config, folder, mesh)
            batch = next(objective.batches(0))
        tx = make_tx(objective.optims, config.train.steps, objective.lr_factor)
        step = jax.jit(make_step(objective, tx, 0.99, 1), donate_argnums=0)
        state = jax.jit(make_init(objective, tx))(jax.random.key(0))
        state, _ = step(state, batch, objective.constants)
        runs[name] = [step, state, batch, objective.constants, []]
    for _ in range(rounds):
        for run in runs.values():
            step, state, batch, constants, taken = run
            began = time.process_time()
            run[1], _ = step(state, batch, constants)
            jax.block_until_ready(run[1])
            taken.append(time.process_time() - began)
    return {name: float(np.median(run[-1])) for name, run in runs.items()}


class Results:
    """Lines of FOLDER/results.jsonl."""

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "results.jsonl")
        self.rows = []
        if os.path.exists(self.path):
            with open(self.path) as f:
                self.rows = [json.loads(line) for line in f]

    def find(self, **values):
        return next((row for row in self.rows if all(row.get(k) == v for k, v in values.items())), None)

    def add(self, **row):
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def costs(self, configs: dict) -> dict[str, float]:
        """Median CPU seconds of a step of each experiment; all are measured together where one is not there."""
        if not all(self.find(cost_of=name) for name in configs):
            for name, seconds in step_cost(configs).items():
                if not self.find(cost_of=name):
                    self.add(cost_of=name, cpu_seconds=seconds)
                    print(f"{name}: {seconds:.3f} CPU seconds a step", flush=True)
        return {name: self.find(cost_of=name)["cpu_seconds"] for name in configs}
