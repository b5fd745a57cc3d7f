"""Does an exported folder give in diffusers the video that sorax makes? (extra `parity`)

    sorax export --run runs/quickstart --format diffusers --out /tmp/wan
    python -m experiments.parity.compare_diffusers /tmp/wan --run runs/quickstart --size 32x32 --size 48x32
    sorax export --run runs/lora --lora adapter --out /tmp/lora
    python -m experiments.parity.compare_diffusers runs/wan/imported --run runs/lora --lora /tmp/lora

Both samplers start from the same noise, prompt, steps and guidance, in float32, with each solver (euler, unipc). A
folder that makes videos of an image too (of a run that was trained with given frames) is also compared in that, from
the first frame of the video that was made. Without --run the folder is compared with itself, read back by sorax; with
--lora diffusers and peft put adapters beside the folder's weights. Prints a line a comparison and exits 1 beyond the
limits: latents within 1e-3 of their largest value, pixels within 2 of 255.
"""

import argparse
import dataclasses
import pathlib
import sys

import diffusers
import numpy as np
import torch
from PIL import Image

from data_pipelines.text_tokens import Tokenizer
from sorax import convert, export
from sorax.encode import Codec
from sorax.generate import Generator, Request, given_frames, legal_shape
from sorax.runs import load_run

LATENT_LIMIT, PIXEL_LIMIT = 1e-3, 2


def in_diffusers(pipe, request, num_steps, guidance_scale, **image):
    """(latents `[t, h, w, C]`, uint8 video `[T, H, W, 3]`) of a request through a pipeline."""
    noise = torch.from_numpy(np.moveaxis(request.noise, -1, 0)[None].copy())
    settings = dict(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_frames=request.num_frames, num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=noise,
        **image,
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
    parser.add_argument("--solver", action="append", help="may be repeated (default euler and unipc)")
    args = parser.parse_args()

    pipes = {"text": diffusers.WanPipeline.from_pretrained(args.folder, torch_dtype=torch.float32)}
    scheduler = pipes["text"].scheduler.config
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if pipes["text"].config.expand_timesteps:
        pipes["image"] = diffusers.WanImageToVideoPipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    for pipe in pipes.values():
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

    def compare(pipe, request, solver, **image):
        settings = export.scheduler_json(solver, shift)
        pipe.scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
        pipe.set_progress_bar_config(disable=True)
        how = dict(guidance_scale=args.guidance, shift=shift, solver=solver)
        ours = generator.latents([request], num_steps=args.steps, **how)[0]
        theirs, their_video = in_diffusers(pipe, request, args.steps, args.guidance, **image)
        video = codec.decode([ours])[0]
        pixel_error = np.abs(video.astype(int) - their_video).max()
        return np.abs(ours - theirs).max() / np.abs(theirs).max(), pixel_error, video[0]

    good = True
    for size in args.size or ["32x32", "48x32"]:
        width, height = (int(x) for x in size.split("x"))
        shape = legal_shape(networks.vae_config, networks.dit_config.patch_size, args.frames, height, width)
        latent_shape = (*networks.vae_config.latent_shape(*shape), networks.vae_config.latent_channels)
        noise = np.random.default_rng(args.seed).standard_normal(latent_shape, np.float32)
        for solver in args.solver or ["euler", "unipc"]:
            request = Request(args.prompt, *shape, negative_prompt=args.negative_prompt, noise=noise)
            image, frame = {}, None
            for start, pipe in pipes.items():
                if start == "image":  # the first frame of what was made of the text
                    given = given_frames(codec, {0: frame[None]}, *shape)
                    request, image = dataclasses.replace(request, given=given), dict(image=Image.fromarray(frame))
                latent_error, pixel_error, frame = compare(pipe, request, solver, **image)
                good &= latent_error <= LATENT_LIMIT and pixel_error <= PIXEL_LIMIT
                T, H, W = shape
                print(f"{start} to {W}x{H}, {T} frames, {args.steps} steps of {solver}: latents differ by "
                      f"{latent_error:.1e}, pixels by {pixel_error}", flush=True)  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
