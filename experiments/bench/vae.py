"""CPU time of the VAE against diffusers' and against the plain 3-D convolution: encode, decode and a training step.

    python -m experiments.bench.vae [--base-width 96] [--clip 9x64x64] [--rounds 3] [--python OTHER/bin/python]

The Wan 2.1 architecture with random weights, the same for all: ours, diffusers' `AutoencoderKLWan` (needs the extra
`parity` and PyTorch; --python names an interpreter that has them) and ours with every causal convolution as one XLA 3-D
convolution. A process each, as many threads each, one at work at a time, in turns. A training step is the L1 loss of a
reconstruction from the posterior mean, its gradient and an AdamW update. CPU seconds are those of the whole process;
the largest difference of results is printed too.
"""

import argparse
import os
import sys
import tempfile

import numpy as np

from experiments.bench import sides

TASKS = ("encode", "decode", "train")
SIDES = ("ours", "diffusers", "plain")


def settings(base_width):
    """`VAEConfig` of the benchmark, as a dict."""
    return dict(base_width=base_width, width_multipliers=(1, 2, 4, 4), num_res_blocks=2, latent_channels=16,
                temporal_downsample=(False, True, True))  # fmt: skip


# --- The two programs: name of a task -> a function that runs it once and gives its result


def ours(options, arrays, plain):
    from sorax.backend import configure

    configure()
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from sorax import conv, functional
    from sorax.vae import VAE, VAEConfig

    if plain:

        def whole(x, kernel, before=None):
            kt = kernel.shape[0]
            return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), ((kt - 1, 0), (1, 1), (1, 1)),
                                                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))  # fmt: skip

        spatial = conv.conv_causal
        conv.conv_causal = lambda x, k, before=None: (whole if k.shape[1] == 3 else spatial)(x, k, before)
    config = VAEConfig(**settings(options.base_width))
    graphdef, _ = functional.abstract(VAE, config)
    params = jax.tree.map(jnp.asarray, draw(config))
    video, latents = jnp.asarray(arrays["video"]), jnp.asarray(arrays["latents"])
    tx = optax.adamw(1e-4)
    encode = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode(x)[0])
    decode = jax.jit(lambda p, z: jnp.clip(nnx.merge(graphdef, p).decode(z), -1.0, 1.0))  # clipped as theirs is

    def step(p, state, x):
        def loss(p):
            vae = nnx.merge(graphdef, p)
            return jnp.mean(jnp.abs(jnp.clip(vae.decode(vae.encode(x)[0]), -1.0, 1.0) - x))

        value, gradients = jax.value_and_grad(loss)(p)
        updates, state = tx.update(gradients, state, p)
        return value, optax.apply_updates(p, updates), state

    trained = [jax.tree.map(jnp.copy, params), tx.init(params)]
    step = jax.jit(step, donate_argnums=(0, 1))

    def train():
        value, *trained[:] = step(*trained, video)
        jax.block_until_ready(trained)
        return np.asarray(value)

    return dict(encode=lambda: np.asarray(encode(params, video)), decode=lambda: np.asarray(decode(params, latents)),
                train=train)  # fmt: skip


def theirs(options, arrays):
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(os.cpu_count())
    size = settings(options.base_width)
    vae = AutoencoderKLWan(base_dim=size["base_width"], dim_mult=list(size["width_multipliers"]), z_dim=16,
                           num_res_blocks=2, temperal_downsample=list(size["temporal_downsample"]))  # fmt: skip
    with np.load(options.weights) as weights:
        vae.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    video, latents = (torch.from_numpy(arrays[k]).permute(0, 4, 1, 2, 3).contiguous() for k in ("video", "latents"))
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-4)

    def back(x):
        return x.detach().permute(0, 2, 3, 4, 1).numpy()

    def forward(function):
        with torch.no_grad():
            return back(function())

    def train():
        optimizer.zero_grad()
        copy = vae.decode(vae.encode(video).latent_dist.mode()).sample
        loss = torch.nn.functional.l1_loss(copy, video)
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    return dict(encode=lambda: forward(lambda: vae.encode(video).latent_dist.mode()),
                decode=lambda: forward(lambda: vae.decode(latents).sample), train=train)  # fmt: skip


# --- Weights and inputs, the same for all


def draw(config):
    """Parameters with kernels of unit gain, drawn with numpy."""
    import jax

    from sorax import functional
    from sorax.sharding import path_string
    from sorax.vae import VAE

    rng = np.random.default_rng(0)

    def leaf(path, x):
        if path_string(path).endswith("kernel"):
            return rng.standard_normal(x.shape, np.float32) / np.float32(np.sqrt(np.prod(x.shape[:-1])))
        return np.full(x.shape, path_string(path).endswith(("gamma", "latents_std")), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, functional.abstract(VAE, config)[1])


def write_weights(path, base_width):
    """The same parameters under diffusers' names."""
    import jax

    from sorax import convert
    from sorax.sharding import path_string
    from sorax.vae import VAEConfig

    config = VAEConfig(**settings(base_width))
    leaves = {path_string(p): x for p, x in jax.tree_util.tree_flatten_with_path(draw(config))[0]}
    np.savez(path, **{name.theirs: name.to_theirs(leaves[name.ours]) for name in convert.vae_names(config)})


def inputs(clip):
    """A video and latents for it."""
    T, H, W = clip
    rng = np.random.default_rng(1)
    video = rng.uniform(-1, 1, (1, T, H, W, 3)).astype(np.float32)
    return dict(video=video, latents=rng.standard_normal((1, 1 + (T - 1) // 4, H // 8, W // 8, 16)).astype(np.float32))


# --- Processes


def serve(options):
    """A side's process."""
    arrays = inputs(options.clip)
    tasks = theirs(options, arrays) if options.side == "diffusers" else ours(options, arrays, options.side == "plain")
    sides.serve({name: lambda run=run: dict(result=run()) for name, run in tasks.items()}, options.prefix)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-width", type=int, default=96)
    parser.add_argument("--clip", type=lambda text: tuple(map(int, text.split("x"))), default=(9, 64, 64))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="interpreter with diffusers and PyTorch")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve(options)
    with tempfile.TemporaryDirectory() as folder:
        options.weights = os.path.join(folder, "weights.npz")
        write_weights(options.weights, options.base_width)
        shown = "x".join(map(str, options.clip))
        arguments = ["--weights", options.weights, "--clip", shown, "--base-width", str(options.base_width)]
        all_sides = sides.start("experiments.bench.vae", SIDES, folder, dict(diffusers=options.python), arguments)
        print(f"base width {options.base_width}, a clip of {shown}, fp32, {os.cpu_count()} threads, load "
              f"{os.getloadavg()[0]:.1f}; medians of {options.rounds} rounds")  # fmt: skip
        for task in TASKS:
            for side in all_sides.values():
                side.run(task)  # compiles; and later losses would differ by what rounding does to the weights
            results = {name: side.result(task)["result"] for name, side in all_sides.items()}
            cpu, wall = sides.median_times([(side, task) for side in all_sides.values()], options.rounds).T
            each = ", ".join(f"{name} {c:.2f} ({w:.2f})" for name, c, w in zip(SIDES, cpu, wall))
            scale = np.abs(results["diffusers"]).max()
            off = max(np.abs(results[name] - results["diffusers"]).max() for name in SIDES) / scale
            print(f"{task:>7}: CPU seconds (seconds) {each}; diffusers / ours {cpu[1] / cpu[0]:.2f}, plain / ours "
                  f"{cpu[2] / cpu[0]:.2f}; results within {off:.1e}", flush=True)  # fmt: skip
        for side in all_sides.values():
            side.close()


if __name__ == "__main__":
    main()
