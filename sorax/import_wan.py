"""Open weights -> a run folder that trains, samples, evaluates and exports, as one that was trained here.

The weights stay files: `RUN/imported` is a WanPipeline folder whose files are linked to the originals where the disk
allows. They are read from there until the run has a checkpoint of its own, and from then on those of the networks that
are not trained. Nothing is converted, so what is exported untouched has the bytes it came with.
"""

import dataclasses
import os
import pathlib
import shutil

import jax
import numpy as np

from data_pipelines.text_tokens import Tokenizer
from sorax import convert, export, lora_files, original_names, read_weights
from sorax.config import IMPORTED
from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError
from sorax.export_weights import AUTO, MAX_SHARD_BYTES, write_json, write_model
from sorax.functional import abstract
from sorax.runlog import Progress
from sorax.text import TextEncoder
from sorax.vae import VAE

LORA = "lora"  # folder of a run
PARTS = ("transformer", "vae", "text_encoder")
PREFIX = "model.diffusion_model."  # that some single files put before every name


def import_run(
    source: str, workdir: str, *, vae: str = "", text: str = "", tokenizer: str = "", lora: str = ""
) -> pathlib.Path:
    """Makes a run folder of a text-to-video model.

    Args:
        source: a WanPipeline folder of diffusers (Wan 2.1 T2V, Wan 2.2 TI2V, or exported by sorax), a folder that
            `sorax export --format comfyui` wrote, or one safetensors file of a transformer with Wan's own names.
        workdir: a new or empty folder.
        vae, text, tokenizer: with a transformer's file: safetensors file or AutoencoderKLWan folder; UMT5 or T5 folder;
            folder with tokenizer.json or spiece.model ("" for that of `text`).
        lora: file or folder of a LoRA of the transformer, which the run then has and trains, see `lora_files`.

    Raises:
        UserError: an architecture that sorax does not have, files that are missing or damaged, pickles, tensors that
            are missing, unexpected, misshapen or not finite. Nothing is left in workdir then.
    """
    path = pathlib.Path(source)
    if not path.exists():
        raise UserError(f"{source} does not exist: name a folder of weights, or a safetensors file")
    with export.new_folder(workdir) as run:
        folder = there = run / IMPORTED
        if (path / "model_index.json").is_file():
            if vae or text or tokenizer:
                raise UserError(f"{source} is a whole pipeline: --vae, --text and --tokenizer are for a transformer's "
                                "file")  # fmt: skip
            there = path  # so that what is refused is not copied first, and is called what the user calls it
        else:
            _rename(path, folder, *_parts(path, vae, text, tokenizer))
        pipeline = convert.open_diffusers(there)
        loaded = Tokenizer.load(there / "tokenizer", pipeline.text_config.vocab_size)
        config = experiment(pipeline)
        if lora:
            config |= _lora(lora, run / LORA, pipeline.dit_config)
        _check_values(pipeline)  # last, as it reads all of the weights
        if there is path:
            _link(path, folder)
        loaded.save(run)
        write_json(run / "config.json", config)
    return pathlib.Path(workdir)


def experiment(pipeline: convert.Pipeline) -> dict:
    """Config of an imported run: its networks, how they sample, and a fine-tuning of the transformer alone."""
    return dict(
        kind="dit", init=IMPORTED, model=dataclasses.asdict(pipeline.dit_config),
        text=dataclasses.asdict(pipeline.text_config), vae=dict(path=IMPORTED),
        # Its own modes: text to video alone, or from a first frame as well.
        flow=dict(sample_shift=pipeline.shift, train_shift=pipeline.shift,
                  given=(0.5, 0.5, 0.0, 0.0, 0.0) if pipeline.expand_timesteps else (1.0, 0.0, 0.0, 0.0, 0.0)),
        # The world as `sorax evaluate --data world` shows it: large enough for Wan, on the grid of all its VAEs.
        data=dict(path="", fps=16.0, batch=1, row_tokens=16384, row_text=2048, max_tokens=16384,
                  world=dict(num_samples=10_000, shapes=((17, 256, 448),), fps=16.0)),
        optim=dict(optimizer="adamw", lr=1e-5, warmup_steps=100),
        train=dict(steps=1000, remat="full", freeze=["text"]), checkpoint=dict(every=500, keep=2),
        mesh=dict(data=1, fsdp=-1, context=1, tensor=1),
        eval=dict(num_steps=50, solver=pipeline.solver, guidance_scale=5.0),
    )  # fmt: skip


def _lora(path, folder, dit_config) -> dict:
    """What a LoRA changes in the config of a run; its files are copied into a folder of it."""
    there, params = lora_files.open_lora(path, dit_config)
    lora_files.check_values(params)
    lora_files.copy_files(path, folder)
    lora = dict(dataclasses.asdict(there), init=LORA)
    return dict(lora=lora, optim=dict(optimizer="adamw", lr=1e-4, warmup_steps=100))


def _link(source, folder):
    """The files of a pipeline that sorax reads: hard links where source and folder share a disk, else copies."""
    wanted = ["model_index.json", "scheduler/scheduler_config.json"]
    for part in PARTS:
        stem = convert.TEXT_WEIGHTS if part == "text_encoder" else convert.WEIGHTS
        index = source / part / f"{stem}.safetensors.index.json"
        files = {path.name for path in read_weights.tensor_files(source / part, stem).values()}
        files |= {"config.json"} | ({index.name} if index.exists() else set())
        wanted += [f"{part}/{name}" for name in sorted(files)]
    there = source / "tokenizer"
    wanted += [f"tokenizer/{path.name}" for path in sorted(there.iterdir()) if path.is_file()] if there.is_dir() else []
    for name in wanted:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        original = os.path.realpath(source / name)  # hubs keep links to files with other names
        if not os.path.isfile(original):
            raise UserError(f"{source / name} is missing: not a complete pipeline")
        try:
            os.link(original, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(original, target)


def _parts(source, vae, text, tokenizer):
    """Where the parts of a model with Wan's own names are: (transformer, VAE, text encoder, tokenizer)."""
    if source.is_file():
        if source.suffix != ".safetensors":
            read_weights.refuse_pickle(source)
        missing = [name for name, value in dict(vae=vae, text=text).items() if not value]
        if missing:
            options = " and ".join(f"--{name}" for name in missing)
            raise UserError(f"{source} holds a transformer alone: name {options} too")
        return source, pathlib.Path(vae), pathlib.Path(text), pathlib.Path(tokenizer or text)
    files = [sorted((source / name).glob("*.safetensors")) for name in ("diffusion_models", "vae", "text_encoders")]
    if all(len(found) == 1 for found in files):
        return *(found[0] for found in files), source / "tokenizer"
    read_weights.refuse_pickle(source)
    if (source / "dit" / "config.json").is_file():
        raise UserError(f"{source} has sorax's own names (`sorax export --format safetensors`), which are for other "
                        "programs: import what --format diffusers or comfyui writes")  # fmt: skip
    raise UserError(f"{source} is neither a WanPipeline folder (no model_index.json) nor one with diffusion_models/, "
                    "vae/ and text_encoders/ of one safetensors file each: name one, or a transformer's file")


def _rename(source, folder, transformer, vae, text, tokenizer):
    """Writes a pipeline folder from files with Wan's own names, in the dtypes they have."""
    dit_config, dit = _open_transformer(transformer)
    vae_config, vae_params = _open_vae(vae)
    text_config, text_params = _open_text(text)
    layouts = (
        ("transformer", convert.WEIGHTS, convert.dit_names(dit_config), dit, export.dit_json(dit_config)),
        ("vae", convert.WEIGHTS, convert.vae_names(vae_config), vae_params, export.vae_json(vae_config, vae_params)),
        ("text_encoder", convert.TEXT_WEIGHTS, convert.text_names(text_config), text_params,
         export.text_json(text_config)),
    )  # fmt: skip
    for part, stem, names, params, config in layouts:
        write_model(folder / part, stem, names, params, config, AUTO, MAX_SHARD_BYTES)
    loaded, how = Tokenizer.load(tokenizer), _sampling(source)
    loaded.save(folder / "tokenizer")
    write_json(folder / "tokenizer" / "tokenizer_config.json", export.tokenizer_json(loaded))
    write_json(folder / "scheduler" / "scheduler_config.json", export.scheduler_json(**how))
    expand = dit_config.in_channels == 48  # Wan 2.2's TI2V
    write_json(folder / "model_index.json", export.index_json(text_config, loaded, how["solver"], expand))


def _sampling(source):
    """How a model samples: as its provenance.json says, else as Wan does at 480p."""
    path = source / "provenance.json" if source.is_dir() else source.with_name("provenance.json")
    there = read_weights.read_json(path).get("sampling") if path.is_file() else None
    return there or dict(solver="unipc", shift=3.0)


def _open_transformer(path):
    tensors = read_weights.tensor_shapes(path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    beside = path.with_name("config.json")
    if beside.is_file() and "num_attention_heads" in read_weights.read_json(beside):
        config = convert.read_dit_config(beside)
    else:
        config = _dit_config({name.removeprefix(prefix): shape for name, shape in tensors.items()}, path)
    convert.check_depth(path, config.num_layers, tensors)
    names = [dataclasses.replace(n, theirs=prefix + n.theirs) for n in original_names.dit_names(config)]
    return config, read_weights.open_params(path, dict.fromkeys(tensors, path), names, abstract(DiT, config)[1])


def _dit_config(shapes, path) -> DiTConfig:
    """Hyper-parameters that the shapes of a transformer's tensors imply; heads are of 128, as all of Wan's."""
    needed = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight",
              "head.head.weight")  # fmt: skip
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: not a transformer with Wan's own names")
    if any("img_emb" in name or ".k_img." in name for name in shapes):
        raise UserError(f"{path} is of an image-to-video model with an image encoder, which sorax does not have: use a "
                        "text-to-video model, or Wan 2.2's TI2V")  # fmt: skip
    width, channels, *patch = shapes["patch_embedding.weight"]
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if width % 128:
        raise UserError(f"{path}: a width of {width} is no multiple of 128, so its heads are unknown: put the model's "
                        "config.json of diffusers beside it")  # fmt: skip
    return DiTConfig(
        in_channels=channels, out_channels=shapes["head.head.weight"][0] // int(np.prod(patch)),
        patch_size=tuple(patch), num_layers=layers, num_heads=width // 128, ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        text_dim=shapes["text_embedding.0.weight"][1], freq_dim=shapes["time_embedding.0.weight"][1],
    )  # fmt: skip


def _open_vae(path):
    """A VAE, from a diffusers folder or from a file with Wan's own names and diffusers' config.json beside it."""
    if path.is_dir():
        return convert.open_vae(path)
    read_weights.refuse_pickle(path)
    beside = path.with_name("config.json")
    if not beside.is_file():
        raise UserError(f"{path} has no config.json of an AutoencoderKLWan beside it, which has the latents' means and "
                        "deviations: put it there, or name the folder of a diffusers VAE")  # fmt: skip
    config, stats = convert.read_vae_config(path.parent)
    tensors = read_weights.tensor_shapes(path)
    convert.check_depth(path, config.num_res_blocks * len(config.width_multipliers), tensors)
    params = read_weights.open_params(path, dict.fromkeys(tensors, path), original_names.vae_names(config),
                                      abstract(VAE, config)[1], stats)  # fmt: skip
    return config, params


def _open_text(path):
    """A text encoder, from a folder or from a file with config.json of transformers beside it."""
    if path.is_dir():
        return convert.open_text(path)
    read_weights.refuse_pickle(path)
    config, tensors = convert.read_text_config(path.with_name("config.json")), read_weights.tensor_shapes(path)
    convert.check_depth(path, config.num_layers, tensors)
    return config, read_weights.open_params(path, dict.fromkeys(tensors, path), convert.text_names(config),
                                            abstract(TextEncoder, config)[1], aliases=convert.TEXT_ALIASES)  # fmt: skip


def _check_values(pipeline):
    """Reads every tensor once: all must be finite."""
    leaves = [leaf for tree in (pipeline.dit, pipeline.vae, pipeline.text) for leaf in jax.tree.leaves(tree)]
    done = 0
    with Progress("check", sum(leaf.size for leaf in leaves), unit="values") as progress:
        for leaf in leaves:
            for _ in read_weights.blocks(leaf):  # which are checked as they are read
                pass
            done += leaf.size
            progress.advance(done)
