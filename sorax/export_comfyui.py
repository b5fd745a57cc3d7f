"""A text-to-video model -> single files under the names of Wan's own checkpoints, as ComfyUI keeps them."""

import pathlib

from data_pipelines.text_tokens import Tokenizer
from sorax import convert, export, original_names
from sorax.convert import Networks
from sorax.errors import UserError
from sorax.export_weights import stored_as, write_model

CARD = """---
license: {license}
tags: [text-to-video, video, dit, wan, comfyui, sorax]
---

# {name}

{step}Stored as {dtype}, one file a network, under the tensor names of Wan's own checkpoints. Copy each folder's file
into the folder of that name in ComfyUI's `models/`. Sampling: `{solver}`, shift {shift:g}.

ComfyUI's own text nodes use the tokenizer of UMT5; a model that was trained with another one (`tokenizer/` here) needs
prompts that were tokenised with that.

## Training data

{data}

## Scores

{scores}

`provenance.json` holds the configuration and a hash of every tensor.
"""


def export_comfyui(
    networks: Networks, tokenizer: Tokenizer, out_dir, *, shift: float, solver: str = "euler", dtype: str = "auto",
    metadata: dict | None = None, max_shard_bytes: int = 0,
) -> pathlib.Path:  # fmt: skip
    """Writes diffusion_models/, vae/ and text_encoders/, each with one safetensors file.

    Arguments, result and errors as `export.export_diffusers`; files are not split, whatever max_shard_bytes says.
    """
    metadata = dict(metadata or {})
    export.check_fits_diffusers(networks)
    if networks.dit_config.patch_size != (1, 2, 2):
        raise UserError(f"ComfyUI takes Wan models of patch_size (1, 2, 2), this one has "
                        f"{networks.dit_config.patch_size}: export with --format diffusers")  # fmt: skip
    name = metadata.get("name") or pathlib.Path(out_dir).resolve().name
    parts = dict(
        dit=("diffusion_models", name, original_names.dit_names(networks.dit_config), networks.dit,
             export.dit_json(networks.dit_config)),
        vae=("vae", f"{name}_vae", original_names.vae_names(networks.vae_config), networks.vae,
             export.vae_json(networks.vae_config, networks.vae)),
        # Of the text encoder ComfyUI has the names of transformers.
        text=("text_encoders", f"{name}_text", convert.text_names(networks.text_config), networks.text,
              export.text_json(networks.text_config)),
    )  # fmt: skip
    tensors = {}
    with export.new_folder(out_dir) as folder:
        for part, (where, stem, *what) in parts.items():
            tensors[part] = write_model(folder / where, stem, *what, dtype, float("inf"))
        tokenizer.save(folder / "tokenizer")
        how = {"sampling": dict(solver=solver, shift=shift)}  # which single files have no place for
        export.write_provenance(folder, metadata | how, "comfyui", dtype, tensors)
        step = f"After {metadata['step']} training steps. " if "step" in metadata else ""
        stored = stored_as((networks.vae, networks.dit, networks.text), dtype)
        (folder / "README.md").write_text(CARD.format(
            license=metadata.get("license") or "other", name=name, step=step, dtype=stored, solver=solver, shift=shift,
            data=metadata.get("data") or "Not stated.", scores=export.score_table(metadata),
        ))  # fmt: skip
    return pathlib.Path(out_dir)
