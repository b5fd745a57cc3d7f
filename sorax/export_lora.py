"""The LoRA of a run -> a folder with its adapters alone, for diffusers or under Wan's own names for ComfyUI."""

import json
import pathlib

import numpy as np
from flax.traverse_util import flatten_dict

from sorax import export, lora_files
from sorax import lora as lora_lib
from sorax.dit import DiTConfig
from sorax.errors import UserError
from sorax.export_weights import AUTO, DTYPES, write_safetensors
from sorax.lora import LoRAConfig

CARD = """---
license: {license}
tags: [text-to-video, wan, lora, sorax]
---

# {name}

A LoRA of rank {rank} and alpha {alpha:g} for {layers} of every block of a Wan-like transformer ({config}).
{step}The weights that it was trained on: `{base}`.

## Use it

{run}

## Training data

{data}

## Scores

{scores}

`provenance.json` holds the configuration and a hash of every tensor.
"""

RUN_DIFFUSERS = """```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/to/the/base")
pipe.load_lora_weights("path/to/this/folder")
```"""
RUN_COMFYUI = "Copy the file in `loras/` into the folder of that name in ComfyUI's `models/`."


def export_lora(
    adapters, lora: LoRAConfig, config: DiTConfig, out_dir, *, form: str = "diffusers", dtype: str = AUTO,
    metadata: dict | None = None,
) -> pathlib.Path:  # fmt: skip
    """Writes the adapters of a LoRA, its alpha with them, so that `pipe.load_lora_weights(out_dir)` reads them.

    Args:
        adapters: tree of arrays, as `lora.adapted_dit` has their shapes. lora, config: what they are of.
        out_dir: a new or empty folder.
        form: "diffusers", or "comfyui" for loras/NAME.safetensors under Wan's own names.
        dtype: "f32" or "bf16"; "auto" is f32.
        metadata: as `export.export_diffusers` takes it.

    Raises:
        UserError: out_dir is not empty or cannot be written, the form has no adapters, or one is not finite.
    """
    if form not in ("diffusers", "comfyui"):
        raise UserError(f"--format {form} has no adapters alone: export them with --format diffusers or comfyui")
    metadata = dict(metadata or {})
    kept = DTYPES["f32" if dtype == AUTO else dtype]
    tensors = {
        key: (value.shape, kept if value.ndim else DTYPES["f32"], [value])
        for key, value in _tensors(adapters, lora, config, form).items()
    }
    layers, paths = lora_lib.linear_layers(config), lora_lib.adapted_layers(config, lora.targets)
    kinds = [lora_lib.kind(name) for name, (ours, block) in layers.items() if ours in paths and block == 0]
    alpha, name = lora.scale * lora.rank, metadata.get("name") or pathlib.Path(out_dir).resolve().name
    settings = dict(r=lora.rank, lora_alpha=alpha, target_modules=kinds)
    with export.new_folder(out_dir) as folder:
        file = folder / (lora_files.FILE if form == "diffusers" else f"loras/{name}.safetensors")
        file.parent.mkdir(exist_ok=True)
        header = {lora_files.METADATA: json.dumps({lora_files.PREFIX + key: value for key, value in settings.items()})}
        hashes = write_safetensors(file, tensors, header if form == "diffusers" else {})
        export.write_provenance(folder, metadata, f"{form} LoRA", dtype, dict(lora=hashes))
        step = f"After {metadata['step']} training steps. " if "step" in metadata else ""
        (folder / "README.md").write_text(CARD.format(
            license=metadata.get("license") or "other", name=name, rank=lora.rank, alpha=alpha, layers=", ".join(kinds),
            config=f"{config.num_layers} blocks of width {config.width}", step=step,
            base=(metadata.get("config") or {}).get("init") or "not stated",
            run=RUN_DIFFUSERS if form == "diffusers" else RUN_COMFYUI, data=metadata.get("data") or "Not stated.",
            scores=export.score_table(metadata),
        ))  # fmt: skip
    return pathlib.Path(out_dir)


def _tensors(adapters, lora, config, form):
    """Tensors of a file by their names there: two a layer and, where no metadata says it, alpha."""
    flat, originals = flatten_dict(adapters, sep="/"), lora_files.original_layer_names(config)
    tensors = {}
    for name, (ours, block) in lora_lib.linear_layers(config).items():
        if f"{ours}/lora_a" not in flat:
            continue
        stem = lora_files.PREFIX + name if form == "diffusers" else lora_files.ORIGINAL_PREFIX + originals[name]
        for part, letter in zip(lora_lib.LEAVES, "AB"):
            value = np.asarray(flat[f"{ours}/{part}"][block], np.float32).T
            if not np.isfinite(value).all():
                raise UserError(f"adapter {ours}/{part} holds NaN or infinite values: export an earlier checkpoint")
            tensors[f"{stem}.lora_{letter}.weight"] = value
        if form == "comfyui":
            tensors[f"{stem}.alpha"] = np.float32(lora.scale * lora.rank)
    return tensors
