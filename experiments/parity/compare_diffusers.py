"""Does an exported folder give in diffusers the video that sorax makes? (extra `parity`)

    sorax export --run runs/quickstart --format diffusers --out /tmp/wan
    python -m experiments.parity.compare_diffusers /tmp/wan --run runs/quickstart --size 32x32 --size 48x32
    sorax export --run runs/lora --lora adapter --out /tmp/lora
    python -m experiments.parity.compare_diffusers runs/wan/imported --run runs/lora --lora /tmp/lora

Both samplers start from the same noise, prompt, steps and guidance, in float32. Without --run the folder is compared
with itself, read back by sorax; with --lora diffusers and peft put adapters beside the folder's weights. Prints one
line a size and exits 1 beyond the limits: latents within 1e-3 of their largest value, pixels within 2 of 255.
"""

import argparse
import pathlib
import sys

import diffusers
import numpy as np
import torch

from data_pipelines.text_tokens import Tokenizer
from sorax import convert
from sorax.encode import Codec
from sorax.generate import Generator, Request, legal_shape
from sorax.runs import load_run

LATENT_LIMIT, PIXEL_LIMIT = 1e-3, 2


def in_diffusers(pipe, request, num_steps, guidance_scale):
    """(latents `[t, h, w, C]`, uint8 video `[T, H, W, 3]`) of a request through WanPipeline."""
    noise = torch.from_numpy(np.moveaxis(request.noise, -1, 0)[None].copy())
    settings = dict(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_frames=request.num_frames, num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=noise,
    )  # fmt: skip
    latents = pipe(**settings, output_type="latent").frames.numpy()[0]
    video = np.asarray(pipe(**settings, output_type="np").frames)[0]
    return np.moveaxis(latents, 0, -1), np.round(255 * video).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what `sorax export --format diffusers` wrote")
    parser.add_argument("--run", help="the run it was exported from")
    parser.add_argument("--lora", help="what `sorax export --lora adapter` wrote of the run")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--size", action="append", help="WxH, may be repeated (default 32x32 and 48x32)")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = diffusers.WanPipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    if args.run:
        run = load_run(args.run)
        networks, tokenizer = run.networks, run.tokenizer
    else:
        networks = convert.read_diffusers(args.folder)
        tokenizer = Tokenizer.load(pathlib.Path(args.folder, "tokenizer"))
    codec = Codec(networks.vae_config, networks.vae)
    generator = Generator(networks.dit_config, networks.dit, networks.text_config, networks.text, tokenizer, codec)

    good = True
    for size in args.size or ["32x32", "48x32"]:
        width, height = (int(x) for x in size.split("x"))
        shape = legal_shape(networks.vae_config, networks.dit_config.patch_size, args.frames, height, width)
        latent_shape = (*networks.vae_config.latent_shape(*shape), networks.vae_config.latent_channels)
        noise = np.random.default_rng(args.seed).standard_normal(latent_shape, np.float32)
        request = Request(args.prompt, *shape, negative_prompt=args.negative_prompt, noise=noise)
        ours = generator.latents(
            [request], num_steps=args.steps, guidance_scale=args.guidance, shift=pipe.scheduler.config.shift
        )[0]
        theirs, their_video = in_diffusers(pipe, request, args.steps, args.guidance)
        latent_error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        pixel_error = np.abs(codec.decode([ours])[0].astype(int) - their_video).max()
        good &= latent_error <= LATENT_LIMIT and pixel_error <= PIXEL_LIMIT
        T, H, W = shape
        print(f"{W}x{H}, {T} frames, {args.steps} steps: latents differ by {latent_error:.1e}, pixels by {pixel_error}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
