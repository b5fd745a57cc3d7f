"""Useful tokens per CPU second of a DiT training step, against diffusers' WanTransformer3DModel with PyTorch's AdamW.

    python -m experiments.bench.dit_train [--rounds 5] [--threads N] [--python OTHER/bin/python]

The same weights (those of a Wan-shaped network of 5 M parameters, drawn at random), samples, noise, loss, threads and
float32 for both; diffusers needs the extra `parity` and PyTorch (--python names an interpreter that has them). A
process each, one at work at a time, in turns; CPU seconds are those of the whole process. A step is the velocity error
over all tokens of the samples, its gradient, and an AdamW update; it follows another one, as in training. Where other
programs run beside, a thread waits for another that is kept from its core, and may burn time meanwhile: compare with
--threads 1 then.

Three batches:
  uniform   clips of one shape, as one batch on both sides. Loss and all gradients are compared first: the same work.
  mixed     images and clips of several shapes, each at its own. Ours: packed rows. Theirs, which has no mask, in
            three ways: all padded to the largest ("pad"), those of equal shape in one batch, gradients accumulated
            ("bucket"), and each sample for itself ("single"). Their best counts.
  small     the same, of small images and clips in their native shapes, as the first stage of training has them.

Captions are attended as Wan has it, to 512 slots: theirs computes them all, ours the caption's own and one that stands
for the unused ones.
"""

import argparse
import os
import sys
import tempfile

import numpy as np

from experiments.bench import sides

MODEL = dict(num_layers=4, num_heads=4, head_dim=64, ffn_dim=1024, text_dim=512, in_channels=16, out_channels=16,
             freq_dim=256)  # fmt: skip
PATCH, SLOTS = (1, 2, 2), 512
# Patches (t, h, w) behind a VAE of stride 4 x 8 x 8: clips of 9 or 17 frames, images, 128 to 320 pixels a side.
UNIFORM = [(5, 8, 16)] * 4
MIXED = [(5, 12, 16), (3, 16, 12), *[(1, 16, 16)] * 3, *[(1, 12, 20)] * 2, *[(1, 20, 12)] * 2, (1, 14, 18)]
# Native sizes: no two images need have the same shape.
SMALL = [(3, 6, 8), (3, 8, 6), *[(1, 8, 8)] * 3, (1, 7, 9), (1, 9, 7), *[(1, 6, 10)] * 2, *[(1, 10, 6)] * 2, (1, 6, 11),
         (1, 11, 6), (1, 5, 12), (1, 12, 5), (1, 7, 10), (1, 10, 7), (1, 7, 8), (1, 8, 7), (1, 6, 9)]  # fmt: skip
BATCHES = dict(uniform=UNIFORM, mixed=MIXED, small=SMALL)
MULTIPLE = 64  # of the length of the packed row
LEARNING_RATE, BETAS, EPS, DECAY = 1e-4, (0.9, 0.99), 1e-8, 1e-2


def samples(shapes):
    """Latents `[T, H, W, C]`, noise, caption `[L, text_dim]` and noise level of each sample."""
    rng = np.random.default_rng(1)

    def sample(shape):
        latent = (*np.multiply(shape, PATCH), MODEL["in_channels"])
        draw = lambda *s: rng.standard_normal(s, np.float32)  # noqa: E731
        return dict(latents=draw(*latent), noise=draw(*latent), caption=draw(rng.integers(20, 120), MODEL["text_dim"]),
                    sigma=np.float32(rng.uniform(0.1, 0.9)))  # fmt: skip

    return [sample(shape) for shape in shapes]


# --- The two programs: name of a task -> a function that runs it once and gives its results


def ours(options):
    from sorax.backend import configure

    configure()
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from sorax import functional
    from sorax.dit import DiT, DiTConfig
    from sorax.optim import OptimConfig, make_tx
    from sorax.text import slot_bias

    config = DiTConfig(**MODEL)
    graphdef, _ = functional.abstract(DiT, config)
    params = jax.tree.map(jnp.asarray, draw_params(config))
    tx = make_tx({"": OptimConfig(lr=LEARNING_RATE, schedule="constant", warmup_steps=0, b1=BETAS[0], b2=BETAS[1],
                                  eps=EPS, weight_decay=DECAY, clip_norm=0.0)}, 1)  # fmt: skip

    def gradient(params, row):
        def loss(params):
            bias = slot_bias(row["text_tokens"], row["text_segment_ids"], row["levels"].shape[1] - 1)
            velocity = nnx.merge(graphdef, params)(
                row["tokens"], row["positions"], row["segment_ids"], row["levels"], row["segment_ids"], row["text"],
                row["text_segment_ids"], bias, unroll=True,
            )  # fmt: skip
            error = jnp.mean(jnp.square(velocity - row["target"]), axis=-1) * (row["segment_ids"] != 0)
            return jnp.sum(error) / jnp.sum(row["segment_ids"] != 0)

        return jax.value_and_grad(loss)(params)

    @jax.jit
    def compare(row):
        return gradient(params, row)

    def step(params, state, row):
        value, gradients = gradient(params, row)
        updates, state = tx.update(gradients, state, params)
        return value, jax.tree.map(jnp.add, params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    tasks = {}
    for name, shapes in BATCHES.items():
        row = jax.tree.map(jnp.asarray, rows(samples(shapes), uniform=len(set(shapes)) == 1))
        trained = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]

        def train(row=row, trained=trained):
            value, *trained[:] = step(*trained, row)
            jax.block_until_ready(trained)
            return dict(loss=np.asarray(value))

        tasks[name] = train
        if name == "uniform":

            def gradients(row=row):
                value, found = compare(row)
                return dict(to_theirs(config, found), loss=np.asarray(value))

            tasks["gradients"] = gradients
    return tasks


def rows(batch, uniform):
    """Packed rows of samples: one a row where all have one shape, else one row of all."""
    from sorax.patchify import patchify, positions

    lengths = [int(np.prod(s["latents"].shape[:3]) // np.prod(PATCH)) for s in batch]
    text_lengths = [len(s["caption"]) + 1 for s in batch]
    if uniform:
        members, N, M = [[i] for i in range(len(batch))], lengths[0], max(text_lengths)
    else:
        N, M = (-(-sum(n) // MULTIPLE) * MULTIPLE for n in (lengths, text_lengths))
        members = [list(range(len(batch)))]
    S = max(map(len, members))
    shapes = dict(tokens=(N, MODEL["in_channels"] * 4), target=(N, MODEL["in_channels"] * 4), positions=(N, 3),
                  segment_ids=(N,), text=(M, MODEL["text_dim"]), text_tokens=(M,), text_segment_ids=(M,),
                  levels=(S + 1,))  # fmt: skip
    whole = ("positions", "segment_ids", "text_tokens", "text_segment_ids")
    out = {k: np.zeros((len(members), *s), np.int32 if k in whole else np.float32) for k, s in shapes.items()}
    for r, row in enumerate(members):
        n = m = 0
        for segment, i in enumerate(row, start=1):
            sample, L = batch[i], len(batch[i]["caption"])
            x0, noise = (patchify(sample[key], PATCH) for key in ("latents", "noise"))
            tokens, text = slice(n, n + lengths[i]), slice(m, m + L + 1)
            out["tokens"][r, tokens] = (1 - sample["sigma"]) * x0 + sample["sigma"] * noise
            out["target"][r, tokens] = noise - x0
            out["positions"][r, tokens] = positions(*sample["latents"].shape[:3], PATCH)
            out["segment_ids"][r, tokens], out["text_segment_ids"][r, text] = segment, segment
            out["text"][r, m : m + L], out["text_tokens"][r, m : m + L] = sample["caption"], 1
            out["levels"][r, segment] = sample["sigma"]
            n, m = n + lengths[i], m + L + 1
    return out


def theirs(options):
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(options.threads)
    sizes = dict(MODEL, patch_size=PATCH)
    sizes |= dict(num_attention_heads=sizes.pop("num_heads"), attention_head_dim=sizes.pop("head_dim"))
    model = WanTransformer3DModel(**sizes)
    with np.load(options.weights) as weights:
        start = {name: torch.from_numpy(weights[name]) for name in weights.files}
    vectors = [p for name, p in model.named_parameters() if p.ndim < 2 or "scale_shift_table" in name]
    matrices = [p for p in model.parameters() if not any(p is v for v in vectors)]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]

    def stack(batch, largest=None):
        """One batch: noisy latents, target, mask of real elements, text, timesteps."""
        shape = largest or batch[0]["latents"].shape[:3]
        pad = lambda x: np.pad(x, [*((0, n - k) for n, k in zip(shape, x.shape)), (0, 0)])  # noqa: E731
        x0, noise, mask = (
            torch.from_numpy(np.stack([pad(x) for x in xs])).permute(0, 4, 1, 2, 3).contiguous()
            for xs in ([s["latents"] for s in batch], [s["noise"] for s in batch],
                       [np.ones((*s["latents"].shape[:3], 1), np.float32) for s in batch])
        )  # fmt: skip
        text = np.stack([np.pad(s["caption"], ((0, SLOTS - len(s["caption"])), (0, 0))) for s in batch])
        sigma = torch.tensor([s["sigma"] for s in batch])
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * x0 + level * noise
        return noisy, noise - x0, None if mask.all() else mask, torch.from_numpy(text), 1000 * sigma

    def batches(all_samples, way):
        if way == "pad":
            return [stack(all_samples, tuple(np.max([s["latents"].shape[:3] for s in all_samples], axis=0)))]
        if way == "single":
            return [stack([s]) for s in all_samples]
        alike = {}
        for s in all_samples:
            alike.setdefault(s["latents"].shape, []).append(s)
        return [stack(members) for members in alike.values()]

    def gradient(parts, elements):
        total = 0.0
        for noisy, target, mask, text, timestep in parts:
            error = torch.square(model(noisy, timestep, text).sample - target)
            loss = (error if mask is None else error * mask).sum() / elements
            loss.backward()
            total += loss.item()
        return total

    def fresh():
        model.load_state_dict(start)
        return torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPS, fused=True)

    tasks = {}
    for name, shapes in BATCHES.items():
        batch = samples(shapes)
        elements = sum(s["latents"].size for s in batch)
        for way in ("bucket",) if name == "uniform" else ("pad", "bucket", "single"):
            parts, optimizer = batches(batch, way), []

            def train(parts=parts, optimizer=optimizer, elements=elements):
                if not optimizer:
                    optimizer.append(fresh())
                optimizer[0].zero_grad()
                value = gradient(parts, elements)
                optimizer[0].step()
                return dict(loss=np.float32(value))

            tasks[name if name == "uniform" else f"{name}_{way}"] = train
        if name == "uniform":

            def gradients(parts=parts, elements=elements):
                model.load_state_dict(start)
                model.zero_grad()
                value = gradient(parts, elements)
                found = {key: p.grad.numpy().copy() for key, p in model.named_parameters()}
                return dict(found, loss=np.float32(value))

            tasks["gradients"] = gradients
    return tasks


# --- Weights, the same for both


def draw_params(config):
    """Parameters with kernels of unit gain and nothing trivial, drawn with numpy."""
    import jax

    from sorax import functional
    from sorax.dit import DiT
    from sorax.sharding import path_string

    rng = np.random.default_rng(0)

    def leaf(path, x):
        path, noise = path_string(path), rng.standard_normal(x.shape, np.float32)
        if path.endswith("kernel"):
            return noise * np.float32(x.shape[-2] ** -0.5)
        return np.float32("norm_" in path and not path.endswith("bias")) + np.float32(0.1) * noise

    return jax.tree_util.tree_map_with_path(leaf, functional.abstract(DiT, config)[1])


def to_theirs(config, params):
    """Arrays under diffusers' names, in its layout."""
    import jax

    from sorax import convert
    from sorax.sharding import path_string

    leaves = {path_string(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    layer = lambda n: leaves[n.ours] if n.layer is None else leaves[n.ours][n.layer]  # noqa: E731
    return {n.theirs: n.to_theirs(layer(n)) for n in convert.dit_names(config)}


def tokens_of(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores that each side may use")
    parser.add_argument("--python", default=sys.executable, help="interpreter with diffusers and PyTorch")
    parser.add_argument("--side", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # XLA takes all that it may
        return sides.serve((ours if options.side == "ours" else theirs)(options), options.prefix)
    from sorax.dit import DiTConfig

    with tempfile.TemporaryDirectory() as folder:
        options.weights = os.path.join(folder, "weights.npz")
        config = DiTConfig(**MODEL)
        weights = to_theirs(config, draw_params(config))
        np.savez(options.weights, **weights)
        both = sides.start("experiments.bench.dit_train", ("ours", "diffusers"), folder,
                           dict(diffusers=options.python),
                           ["--weights", options.weights, "--threads", str(options.threads)])  # fmt: skip
        print(f"{sum(x.size for x in weights.values()):,} parameters, fp32, {options.threads} threads, load "
              f"{os.getloadavg()[0]:.1f}; medians of {options.rounds} rounds")  # fmt: skip
        for side in both.values():
            side.run("gradients")
        here, there = (both[name].result("gradients") for name in ("ours", "diffusers"))
        errors = {key: np.abs(here[key] - there[key]).max() / np.abs(there[key]).max() for key in there}
        worst = max(errors, key=errors.get)
        print(f"uniform: loss {there['loss']:.6f}, ours off by {errors['loss']:.1e}; gradients of {len(errors) - 1} "
              f"tensors off by at most {errors[worst]:.1e} of the largest value ({worst})", flush=True)  # fmt: skip
        for name, shapes in BATCHES.items():
            ways = [name] if name == "uniform" else [f"{name}_{way}" for way in ("pad", "bucket", "single")]
            pairs = [(both["ours"], name), *((both["diffusers"], way) for way in ways)]
            for side, task in pairs:
                side.run(task)
            cpu, wall = sides.median_times(pairs, options.rounds, goes_on=True).T
            count = tokens_of(shapes)
            shown = ", ".join(f"{way} {count / c:.0f} ({c:.2f} s, wall {w:.2f} s)"
                              for way, c, w in zip(["ours", *ways], cpu, wall))  # fmt: skip
            print(f"{name}: {count} tokens in {len(shapes)} samples; useful tokens per CPU second: {shown}; ours / "
                  f"their best {cpu[1:].min() / cpu[0]:.2f}", flush=True)  # fmt: skip
        for side in both.values():
            side.close()


if __name__ == "__main__":
    main()
