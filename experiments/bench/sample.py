"""CPU time and seconds from prompts to latents, against diffusers' WanPipeline with the same weights.

    python -m experiments.bench.sample [--rounds 3] [--steps 4] [--threads 1] [--python OTHER/bin/python]

A Wan-shaped pipeline with weights drawn at random (a DiT of 8 layers and width 384) is exported once, and both sides
read that folder: float32, the same noise, prompts, Euler steps and threads, without guidance and with it. A process
each, one at work at a time, in turns; CPU seconds are those of the whole process. The final latents of both are
compared first: it is the same work. Decoding is left out, `experiments/bench/vae.py` measures that. diffusers needs the
extra `parity` (--python names an interpreter that has it).

  clip    one clip of 33 frames of 256x256: 2,304 tokens.
  mixed   eight images and clips of seven shapes with captions of 10 to 400 bytes, 4,252 tokens. diffusers has no mask
          for latents: one by one ("single"), or those of equal shape in one batch ("bucket"). Its best counts.
  small   the same of twenty images and clips of 80 to 128 pixels a side, as a model's first stage makes them, in
          sixteen shapes: 1,404 tokens.

What ours takes to compile is stated, and not counted.
"""

import argparse
import os
import sys
import tempfile

import numpy as np

from experiments.bench import sides

DIT = dict(num_layers=8, num_heads=6, head_dim=64, ffn_dim=1536, text_dim=256, in_channels=16, out_channels=16)
TEXT = dict(vocab_size=384, width=256, num_layers=2, num_heads=4, head_dim=64, ffn_dim=512)
VAE_WIDTH = 8
SHIFT, GUIDANCE, LIMIT = 3.0, 5.0, 1e-3
# (frames, height, width, bytes of the prompt)
CLIP = [(33, 256, 256, 90)]
MIXED = [(17, 256, 256, 400), (17, 160, 256, 60), (9, 256, 256, 120), (9, 192, 192, 30), (1, 256, 256, 10),
         (1, 256, 256, 200), (1, 192, 320, 80), (1, 320, 176, 50)]  # fmt: skip
SMALL = [(9, 96, 128, 60), (9, 128, 96, 120), *[(1, 128, 128, 40)] * 3, (1, 112, 144, 80), (1, 144, 112, 30),
         *[(1, 96, 160, 100)] * 2, *[(1, 160, 96, 50)] * 2, (1, 96, 176, 70), (1, 176, 96, 20), (1, 80, 192, 90),
         (1, 192, 80, 110), (1, 112, 160, 60), (1, 160, 112, 35), (1, 112, 128, 45), (1, 128, 112, 75),
         (1, 96, 144, 25)]  # fmt: skip
BATCHES = dict(clip=CLIP, mixed=MIXED, small=SMALL)
GUIDED = {"": 1.0, "_guided": GUIDANCE}


def requests(shapes):
    """(prompt, frames, height, width, noise `[t, h, w, C]`) of each."""
    rng, words = np.random.default_rng(0), "a red circle moves to the right of the small blue square and "

    def request(frames, height, width, length):
        noise = rng.standard_normal((1 + frames // 4, height // 8, width // 8, DIT["in_channels"]), np.float32)
        return (words * (1 + length // len(words)))[:length].strip(), frames, height, width, noise

    return [request(*shape) for shape in shapes]


# --- The two programs: name of a task -> a function that runs it once and gives its latents


def ours(options):
    from sorax.backend import configure

    configure()
    from data_pipelines.text_tokens import Tokenizer
    from sorax import convert
    from sorax.encode import Codec
    from sorax.generate import Generator, Request

    there = convert.read_diffusers(options.folder)
    generator = Generator(there.dit_config, there.dit, there.text_config, there.text,
                          Tokenizer.load(os.path.join(options.folder, "tokenizer")),
                          Codec(there.vae_config, there.vae))  # fmt: skip

    def task(shapes, scale):
        asked = [Request(*request[:4], noise=request[4]) for request in requests(shapes)]

        def run():
            made = generator.latents(asked, num_steps=options.steps, guidance_scale=scale, shift=SHIFT)
            return {str(i): latents for i, latents in enumerate(made)}

        return run

    return {name + end: task(shapes, scale) for name, shapes in BATCHES.items() for end, scale in GUIDED.items()}


def theirs(options):
    import torch
    from diffusers import WanPipeline

    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(options.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def task(shapes, scale, way):
        asked, alike = requests(shapes), {}
        for i, request in enumerate(asked):
            alike.setdefault(request[1:4] if way == "bucket" else i, []).append(i)

        def run():
            made = {}
            for members in alike.values():
                (_, frames, height, width, _), noise = asked[members[0]], [asked[i][4] for i in members]
                noise = torch.from_numpy(np.moveaxis(np.stack(noise), -1, 1).copy())
                prompts = [asked[i][0] for i in members]
                latents = pipe(
                    prompt=prompts, negative_prompt=[""] * len(prompts), num_frames=frames, height=height, width=width,
                    num_inference_steps=options.steps, guidance_scale=scale, latents=noise, output_type="latent",
                ).frames.numpy()  # fmt: skip
                made |= {str(i): np.moveaxis(z, 0, -1) for i, z in zip(members, latents)}
            return made

        return run

    return {f"{name}{end}{way}": task(shapes, scale, way) for name, shapes in BATCHES.items()
            for end, scale in GUIDED.items() for way in ways(name)}  # fmt: skip


def ways(name):
    return ("single", "bucket") if len(BATCHES[name]) > 1 else ("single",)


def write_folder(folder):
    """A WanPipeline folder of networks with weights drawn at random, none of them trivial."""
    import jax

    from data_pipelines.text_tokens import Tokenizer
    from sorax import export, functional
    from sorax.convert import Networks
    from sorax.dit import DiT, DiTConfig
    from sorax.text import TextConfig, TextEncoder
    from sorax.vae import VAE, VAEConfig

    configs = dict(dit=(DiT, DiTConfig(**DIT)), text=(TextEncoder, TextConfig(**TEXT)),
                   vae=(VAE, VAEConfig(base_width=VAE_WIDTH)))  # fmt: skip
    made = {}
    for name, (cls, config) in configs.items():
        made |= {name: functional.init(cls, config, jax.random.key(0)), f"{name}_config": config}
    out = made["dit"]["proj_out"]["kernel"]  # zero in a network that is not trained
    made["dit"]["proj_out"]["kernel"] = jax.random.normal(jax.random.key(1), out.shape) * out.shape[0] ** -0.5
    export.export_diffusers(Networks(**made), Tokenizer.of_bytes(), folder, shift=SHIFT)
    return functional.count(made["dit"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="cores that each side may use")
    parser.add_argument("--python", default=sys.executable, help="interpreter with diffusers and PyTorch")
    parser.add_argument("--only", choices=BATCHES, help="one of the batches")
    parser.add_argument("--side", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])  # XLA takes all that it may
        return sides.serve((ours if options.side == "ours" else theirs)(options), options.prefix)

    with tempfile.TemporaryDirectory() as temporary:
        options.folder = os.path.join(temporary, "wan")
        parameters = write_folder(options.folder)
        both = sides.start("experiments.bench.sample", ("ours", "diffusers"), temporary,
                           dict(diffusers=options.python),
                           ["--folder", options.folder, "--threads", str(options.threads), "--steps",
                            str(options.steps)])  # fmt: skip
        print(f"DiT of {parameters:,} parameters, fp32, {options.steps} steps, threads: {options.threads}, load "
              f"{os.getloadavg()[0]:.1f}; medians of {options.rounds} rounds", flush=True)  # fmt: skip
        for name in [options.only] if options.only else BATCHES:
            for end in GUIDED:
                compare(both, name, end, options.rounds)
        for side in both.values():
            side.close()


def compare(both, name, end, rounds):
    pairs = [(both["ours"], name + end), *((both["diffusers"], name + end + way) for way in ways(name))]
    first = [side.run(task) for side, task in pairs]
    here = both["ours"].result(name + end)
    for _, task in pairs[1:]:
        there = both["diffusers"].result(task)
        errors = [np.abs(here[i] - there[i]).max() / np.abs(there[i]).max() for i in there]
        assert max(errors) <= LIMIT, f"{task}: latents differ by {max(errors):.1e} of the largest: not the same work"
    cpu, wall = sides.median_times(pairs, rounds).T
    shown = ", ".join(f"{task} {c:.2f} s (wall {w:.2f})" for task, c, w in
                      zip(["ours", *(f"diffusers {way}" for way in ways(name))], cpu, wall))  # fmt: skip
    best = 1 + np.argmin(cpu[1:])
    print(f"{name}{end}: CPU time {shown}; their best / ours: CPU {cpu[best] / cpu[0]:.2f}, wall "
          f"{wall[1:].min() / wall[0]:.2f}; latents differ by {max(errors):.1e}; compiled in "
          f"{max(0, first[0][1] - wall[0]):.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
