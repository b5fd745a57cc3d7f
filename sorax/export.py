"""Parameters -> folders that others read: a complete WanPipeline for diffusers, or our own names in safetensors.

A folder is written under a temporary name beside its final one and renamed when it is whole.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

import jax
import numpy as np

from data_pipelines.text_tokens import (
    BYTE_SENTINELS,
    MARKS,
    MAX_TOKENS,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    Tokenizer,
)
from sorax import convert
from sorax.convert import Networks
from sorax.dit import DiTConfig
from sorax.errors import UserError
from sorax.export_weights import MAX_SHARD_BYTES, stored_as, write_json, write_model
from sorax.sharding import path_string
from sorax.text import TextConfig
from sorax.vae import VAEConfig

DIFFUSERS_VERSION = "0.35.0"  # the oldest that the folder is meant for
IMAGE_PATCH = (1, 2, 2)  # of models that diffusers' WanImageToVideoPipeline gives a timestep per token


def export_diffusers(
    networks: Networks, tokenizer: Tokenizer, out_dir, *, shift: float, solver: str = "euler", dtype: str = "auto",
    metadata: dict | None = None, expand_timesteps: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> pathlib.Path:  # fmt: skip
    """Writes a folder that `diffusers.WanPipeline.from_pretrained` loads.

    Holds one network's largest stacked parameter and one shard of weights in memory beyond the parameters.

    Args:
        networks: configs and parameters.
        tokenizer: of the captions that the text encoder reads.
        out_dir: a new or empty folder.
        shift, solver: of sampling, see `sorax.sampler.make_solver`.
        dtype: "f32" or "bf16", of the weights; "auto": as they were read from a file, f32 where they were trained.
        metadata: for the model card and provenance.json, all optional: name, license, step, weights ("ema", "raw"),
            config (the experiment's, written as it is: see `config.published`), data (a sentence), data_plan (identity
            of the rows), given_frames (whether it was trained with them), scores (flat dict), hardware, and sample: a
            dict of prompt, height, width, num_frames, fps, num_steps, guidance_scale that is a good first call.
        expand_timesteps: the pipeline gives a timestep per token, 0 on given frames: the folder then loads as a
            `WanImageToVideoPipeline` too.
        max_shard_bytes: weights are split into files of at most this size.

    Returns:
        out_dir.

    Raises:
        UserError: out_dir is not empty or cannot be written, the dtype is unknown, a parameter is not finite, or the
            architecture has no form in diffusers.
    """
    metadata = dict(metadata or {})
    check_fits_diffusers(networks, expand_timesteps)
    with new_folder(out_dir) as folder:
        tensors = {
            "vae": write_model(
                folder / "vae", convert.WEIGHTS, convert.vae_names(networks.vae_config), networks.vae,
                vae_json(networks.vae_config, networks.vae), dtype, max_shard_bytes,
            ),
            "transformer": write_model(
                folder / "transformer", convert.WEIGHTS, convert.dit_names(networks.dit_config), networks.dit,
                dit_json(networks.dit_config), dtype, max_shard_bytes,
            ),
            "text_encoder": write_model(
                folder / "text_encoder", convert.TEXT_WEIGHTS, convert.text_names(networks.text_config),
                networks.text, text_json(networks.text_config), dtype, max_shard_bytes,
            ),
        }  # fmt: skip
        tokenizer.save(folder / "tokenizer")
        write_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_json(tokenizer))
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(solver, shift))
        write_json(folder / "model_index.json", index_json(networks.text_config, tokenizer, solver, expand_timesteps))
        write_provenance(folder, metadata, "diffusers", dtype, tensors)
        card = model_card(networks, metadata, "diffusers", dtype, out_dir, expand_timesteps)
        (folder / "README.md").write_text(card)
    return pathlib.Path(out_dir)


def export_safetensors(
    networks: Networks, tokenizer: Tokenizer, out_dir, *, shift: float, solver: str = "euler", dtype: str = "auto",
    metadata: dict | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> pathlib.Path:  # fmt: skip
    """Writes our own parameter names (paths with slashes, layers stacked): vae/, dit/, text/, each with config.json.

    The tokenizer is beside them, in tokenizer.json.
    Arguments, result and errors as `export_diffusers`.
    """
    metadata, tensors = dict(metadata or {}), {}
    with new_folder(out_dir) as folder:
        for part in ("vae", "dit", "text"):
            params, config = getattr(networks, part), getattr(networks, f"{part}_config")
            names, settings = own_names(params), dataclasses.asdict(config)
            tensors[part] = write_model(folder / part, part, names, params, settings, dtype, max_shard_bytes)
        tokenizer.save(folder)
        how = {"shift": shift, "solver": solver}
        write_json(folder / "config.json", {"format": "sorax", "code_version": code_version()} | how)
        write_provenance(folder, metadata, "safetensors", dtype, tensors)
        (folder / "README.md").write_text(model_card(networks, metadata, "safetensors", dtype, out_dir))
    return pathlib.Path(out_dir)


def check_fits_diffusers(networks: Networks, expand_timesteps: bool = False):
    """Raises UserError where diffusers' Wan classes cannot express the architecture."""
    vae, dit, text = networks.vae_config, networks.dit_config, networks.text_config
    problems = vae_problems(vae)
    if dit.rope_theta != 10000.0:
        problems.append(f"rope_theta {dit.rope_theta}: its transformer has 10000")
    if dit.in_channels != vae.latent_channels or dit.out_channels != vae.latent_channels:
        problems.append(f"{vae.latent_channels} latent channels into a transformer of {dit.in_channels}")
    if dit.text_dim != text.width:
        problems.append(f"a text encoder of width {text.width} into a transformer of text_dim {dit.text_dim}")
    if dit.patch_size[0] != 1:
        problems.append(f"patch_size {dit.patch_size}: its pipeline takes one latent frame a patch")
    if expand_timesteps and dit.patch_size != IMAGE_PATCH:
        problems.append(f"a timestep per token with patch_size {dit.patch_size}: its pipeline takes {IMAGE_PATCH}")
    if problems:
        raise UserError(f"diffusers' WanPipeline has no form for {'; nor for '.join(problems)}: "
                        "export with --format safetensors")  # fmt: skip


def vae_problems(config: VAEConfig) -> list[str]:
    """What of a VAE's architecture diffusers' `AutoencoderKLWan` cannot express."""
    if config.temporal_stride > 4:
        return [f"a temporal stride of {config.temporal_stride}: its VAE reads chunks of 4 frames"]
    return []


def own_names(params) -> list[convert.Name]:
    """The name table of our own format: every parameter under its path, as it is."""
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [convert.Name(path, path) for path in sorted(paths)]


def vae_json(config: VAEConfig, params) -> dict:
    """config.json of `AutoencoderKLWan`; the latent means and deviations go here."""
    channels = 3 * config.pixel_patch**2
    # The shortest decimals that read back as the same float32.
    stats = {
        key: [float(str(x)) for x in np.asarray(params[key], np.float32)] for key in ("latents_mean", "latents_std")
    }
    return {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": DIFFUSERS_VERSION,
        **_theirs(convert.VAE_FIELDS | convert.VAE_OPTIONAL, config), **convert.VAE_FIXED, "dropout": 0.0, **stats,
        "in_channels": channels, "out_channels": channels,
        "patch_size": config.pixel_patch if config.pixel_patch > 1 else None,
        "scale_factor_temporal": config.temporal_stride, "scale_factor_spatial": config.spatial_stride,
    }  # fmt: skip


def dit_json(config: DiTConfig) -> dict:
    """config.json of `WanTransformer3DModel`."""
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": DIFFUSERS_VERSION,
        **_theirs(convert.DIT_FIELDS, config), **convert.DIT_FIXED, "rope_max_seq_len": 1024,
    }  # fmt: skip


def text_json(config: TextConfig) -> dict:
    """config.json of `UMT5EncoderModel`, or of `T5EncoderModel` where the relative bias is shared."""
    return {
        "architectures": [_text_class(config)], "model_type": "t5" if config.shared_bias else "umt5",
        **_theirs(convert.TEXT_FIELDS, config), "num_decoder_layers": config.num_layers, **convert.TEXT_FIXED,
        "dense_act_fn": "gelu_new", "is_gated_act": True, "is_encoder_decoder": True, "use_cache": False,
        "dropout_rate": 0.0, "initializer_factor": 1.0, "tie_word_embeddings": True, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0,
        # transformers would else compute in the dtype of the file, diffusers' models in float32.
        "torch_dtype": "float32",
    }  # fmt: skip


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json, from which transformers makes the tokenizer, with its file beside it."""
    pad, eos, unk = MARKS
    common = {
        "tokenizer_class": tokenizer.hugging_face, "pad_token": pad, "eos_token": eos, "unk_token": unk,
        "model_max_length": MAX_TOKENS, "padding_side": "right", "clean_up_tokenization_spaces": False,
        # A caption that spells "</s>" is a caption, not an instruction to the tokenizer.
        "split_special_tokens": True,
    }  # fmt: skip
    if tokenizer.file == TOKENIZER_FILE:
        # transformers 4 would else switch it off in the tokenizer.json it reads.
        return common | {"add_prefix_space": True}
    return common | {"extra_ids": 0 if tokenizer.file == SENTENCEPIECE_FILE else BYTE_SENTINELS}


def scheduler_json(solver: str, shift: float) -> dict:
    """scheduler_config.json of the scheduler that is this solver."""
    own = {"shift": float(shift)}
    if solver in convert.ORDERS:
        own = {
            "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": float(shift),
            "solver_order": convert.ORDERS[solver],
        }  # fmt: skip
    return {
        "_class_name": convert.SCHEDULERS[solver], "_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000,
        **own, "use_dynamic_shifting": False,
    }  # fmt: skip


def index_json(text_config: TextConfig, tokenizer: Tokenizer, solver: str, expand_timesteps: bool) -> dict:
    """model_index.json of `WanPipeline`."""
    return {
        "_class_name": "WanPipeline", "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": None, "expand_timesteps": expand_timesteps,
        "scheduler": ["diffusers", convert.SCHEDULERS[solver]],
        "text_encoder": ["transformers", _text_class(text_config)],
        "tokenizer": ["transformers", tokenizer.hugging_face],
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }  # fmt: skip


CARD = """---
license: {license}
library_name: diffusers
pipeline_tag: text-to-video
tags: [{tags}, wan, sorax, jax, flax]
---

# {name}

A text-to-video diffusion transformer with the architecture of Wan 2.x, written by sorax (JAX and Flax).

| network | parameters |
|---|---|
| diffusion transformer | {dit:,} |
| video VAE | {vae:,} |
| text encoder | {text:,} |

Here: {which}, stored {dtype}.

## Run it

{run}

## Training data

{data}

## Scores

{scores}

`provenance.json` holds the configuration and a hash of every tensor.
"""

RUN_DIFFUSERS = """```python
from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained("path/to/this/folder")
frames = pipe(
    {prompt}, height={height}, width={width}, num_frames={num_frames},
    num_inference_steps={num_steps}, guidance_scale={guidance_scale},
).frames[0]
export_to_video(frames, "out.mp4", fps={fps})
```"""

RUN_IMAGE = """

From a first frame, with the same files:

```python
from diffusers import WanImageToVideoPipeline
from diffusers.utils import load_image

pipe = WanImageToVideoPipeline.from_pretrained("path/to/this/folder")
frames = pipe(
    load_image("first_frame.png").resize(({width}, {height})), {prompt}, height={height}, width={width},
    num_frames={num_frames}, num_inference_steps={num_steps}, guidance_scale={guidance_scale},
).frames[0]
```"""

NO_IMAGE = f"""

It was trained with given frames too, which diffusers cannot run: its pipeline gives timesteps to patches of
{IMAGE_PATCH}, and those of this model are {{patch_size}}. sorax runs them (`sorax.generate.given_frames`)."""

RUN_SAFETENSORS = """The tensors carry sorax's own parameter paths (layers stacked, channels last): one folder a
network, with its hyper-parameters in `config.json`, and `tokenizer.json` for the captions."""

SAMPLE = dict(
    prompt="a red circle moving right", height=64, width=64, num_frames=17, fps=8, num_steps=50, guidance_scale=5.0
)


def model_card(networks: Networks, metadata: dict, fmt: str, dtype: str, out_dir, from_image: bool = False) -> str:
    """README.md: front matter, what it is, how to run it, what it was trained on and how it scored."""
    sample = SAMPLE | (metadata.get("sample") or {})
    weights, step = metadata.get("weights") or "raw", metadata.get("step", "an unstated number of")
    run = RUN_SAFETENSORS
    if fmt == "diffusers":
        run = RUN_DIFFUSERS + (RUN_IMAGE if from_image else NO_IMAGE if metadata.get("given_frames") else "")
        prompt = json.dumps(sample["prompt"], ensure_ascii=False)
        run = run.format(**sample | {"prompt": prompt}, patch_size=networks.dit_config.patch_size)
    return CARD.format(
        license=metadata.get("license") or "other",
        name=metadata.get("name") or pathlib.Path(out_dir).resolve().name,
        **{part: sum(x.size for x in jax.tree.leaves(getattr(networks, part))) for part in ("dit", "vae", "text")},
        which=f"{weights} weights after {step} training steps" if step else "weights as they were imported",
        tags="text-to-video, image-to-video" if from_image else "text-to-video",
        dtype=f"in {stored_as((networks.vae, networks.dit, networks.text), dtype)}",
        run=run,
        data=metadata.get("data") or "Not stated.",
        scores=score_table(metadata),
    )


def score_table(metadata: dict) -> str:
    """The part of a model card that holds `scores` and `hardware` of its metadata."""
    scores = [f"| {key} | {value} |" for key, value in (metadata.get("scores") or {}).items()]
    if metadata.get("hardware"):
        scores.append(f"| trained on | {metadata['hardware']} |")
    return "\n".join(["| score | value |", "|---|---|", *scores]) if scores else "Not evaluated."


def code_version() -> str:
    """Version of sorax that is running; from a git checkout its commit too, and whether that was changed."""
    try:
        version = importlib.metadata.version("sorax")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    root = pathlib.Path(__file__).parents[1]
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that it does not read
        return version
    return f"{version}+{commit}"


def _theirs(fields, config) -> dict:
    values = {theirs: getattr(config, ours) for theirs, ours in fields.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _text_class(config: TextConfig) -> str:
    return "T5EncoderModel" if config.shared_bias else "UMT5EncoderModel"


def write_provenance(folder, metadata, fmt, dtype, tensors):
    """Writes provenance.json: the metadata, and the hash of every tensor, network by network."""
    record = {"code_version": code_version(), "format": fmt, "dtype": dtype, **metadata, "sha256": tensors}
    write_json(folder / "provenance.json", record)


def check_is_free(out_dir):
    """Raises UserError where something stands that a new folder would replace."""
    out = pathlib.Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out_dir} exists and is not an empty folder: name another one, nothing was written")


@contextlib.contextmanager
def new_folder(out_dir):
    """A temporary folder that becomes `out_dir` if the body succeeds, and is removed if not."""
    check_is_free(out_dir)
    out = pathlib.Path(out_dir).resolve()
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out_dir} cannot be written ({reason}): free space or name another folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
