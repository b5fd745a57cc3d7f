"""A VAE alone -> a folder that `diffusers.AutoencoderKLWan` loads, or our own names in safetensors."""

import dataclasses
import os
import pathlib

from sorax import config as config_lib
from sorax import convert, export, processes
from sorax.errors import UserError
from sorax.export_weights import MAX_SHARD_BYTES, stored_as, write_model
from sorax.functional import count
from sorax.runs import kind_of, open_vae, report_splits, stored_vae
from sorax.vae import VAEConfig

SCORES = (("psnr", "PSNR in dB", ".2f"), ("ssim", "SSIM", ".4f"), ("lpips", "LPIPS", ".4f"),
          ("flicker", "flicker in 8-bit levels", ".3f"))  # fmt: skip

CARD = """---
license: {license}
library_name: diffusers
tags: [video, autoencoder, vae, wan, sorax, jax, flax]
---

# {name}

A causal video VAE with the architecture of Wan {generation}'s, written by sorax (JAX and Flax): {frames} frames of
{side} x {side} pixels become one latent position of {channels} channels; the first frame has positions of its own.

{parameters:,} parameters{step}, stored as {dtype}.

## Use it

{use}

## Training data

{data}

## Scores

{scores}

`provenance.json` holds the configuration and a hash of every tensor.
"""

USE_DIFFUSERS = """```python
import torch
from diffusers import AutoencoderKLWan

vae = AutoencoderKLWan.from_pretrained("path/to/this/folder")
video = torch.rand(1, 3, {frames}, {height}, {width}) * 2 - 1  # frames: {stride}n + 1; sides: multiples of {side}
latents = vae.encode(video).latent_dist.mode()  # normalised: (latents - latents_mean) / latents_std of config.json
copy = vae.decode(latents).sample
```"""

USE_SAFETENSORS = """The tensors of `vae.safetensors` carry sorax's own parameter paths, channels last; `config.json`
holds the hyper-parameters."""


def export_vae_folder(path: str, out_dir, *, license: str = "other", **settings) -> pathlib.Path:
    """Exports the VAE that a folder holds, a finished run or what else `open_vae` takes; settings as `export_vae`'s.

    Of several processes, which all call it, the first one writes. Paths in the config of a run are published with their
    last part alone.
    """
    identity = open_vae(path)[2]
    vae_config, params = stored_vae(path)
    metadata = dict(name=os.path.basename(os.path.abspath(path)), identity=identity, license=license)
    if kind_of(path) == "vae":
        config = config_lib.read_config(path)
        step = config.train.steps
        config = config_lib.published(config.to_dict())
        metadata |= dict(step=step, weights="ema", config=config, data=f"data.path = {config['data']['path']!r}",
                         scores=_scores(path, step))  # fmt: skip
    if processes.is_first():
        export_vae(vae_config, params, out_dir, metadata=metadata, **settings)
    processes.wait("export VAE")
    return pathlib.Path(out_dir)


def export_vae(
    config: VAEConfig, params, out_dir, *, form: str = "diffusers", dtype: str = "auto", metadata: dict | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> pathlib.Path:  # fmt: skip
    """Writes config.json, weights, provenance.json and a model card of a VAE.

    Args:
        out_dir: a new or empty folder.
        form: "diffusers" for a folder that `AutoencoderKLWan.from_pretrained` and `open_vae` load, "safetensors" for
            our own parameter names.
        dtype: "f32" or "bf16", of the weights; "auto": as they were read from a file, f32 where they were trained.
        metadata: for the model card and provenance.json, all optional: name, license, step, config, data (a sentence),
            scores (flat dict).
        max_shard_bytes: weights are split into files of at most this size.

    Returns:
        out_dir.

    Raises:
        UserError: out_dir is not empty or cannot be written, the dtype is unknown, a parameter is not finite, or the
            architecture has no form in diffusers.
    """
    metadata = dict(metadata or {})
    if form == "comfyui":
        raise UserError("of a VAE alone there is no ComfyUI form: export the run of a text-to-video model, or the VAE "
                        "with --format diffusers")  # fmt: skip
    if form == "diffusers":
        if problems := export.vae_problems(config):
            raise UserError(f"diffusers' AutoencoderKLWan has no form for {'; nor for '.join(problems)}: export with "
                            "--format safetensors")  # fmt: skip
        layout = convert.WEIGHTS, convert.vae_names(config), params, export.vae_json(config, params)
    else:
        layout = "vae", export.own_names(params), params, dataclasses.asdict(config)
    with export.new_folder(out_dir) as folder:
        tensors = {"vae": write_model(folder, *layout, dtype, max_shard_bytes)}
        export.write_provenance(folder, metadata, form, dtype, tensors)
        (folder / "README.md").write_text(model_card(config, params, metadata, form, dtype, out_dir))
    return pathlib.Path(out_dir)


def model_card(config: VAEConfig, params, metadata: dict, form: str, dtype: str, out_dir) -> str:
    """README.md: front matter, what it is, how to use it, what it was trained on and how it scored."""
    stride, side = config.temporal_stride, config.spatial_stride
    use = USE_SAFETENSORS
    if form == "diffusers":
        use = USE_DIFFUSERS.format(frames=4 * stride + 1, height=8 * side, width=8 * side, stride=stride, side=side)
    return CARD.format(
        license=metadata.get("license") or "other",
        name=metadata.get("name") or pathlib.Path(out_dir).resolve().name,
        generation="2.2" if config.shortcuts else "2.1", frames=stride, side=side, channels=config.latent_channels,
        parameters=count(params) - 2 * config.latent_channels,
        step=f" after {metadata['step']} training steps" if "step" in metadata else "",
        dtype=stored_as(params, dtype), use=use, data=metadata.get("data") or "Not stated.",
        scores=export.score_table(metadata),
    )  # fmt: skip


def _scores(path: str, step: int) -> dict[str, str]:
    """The main scores of the run's `report/`, in words."""
    scores = {}
    for split, found in report_splits(path, step).items():
        vae = found["vae"]
        for key, name, form in SCORES:
            if vae.get(key) is not None:
                scores[f"{name}, {split}"] = f"{vae[key]:{form}} over {vae['n']} clips"
    return scores
