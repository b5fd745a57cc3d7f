"""Run folders read back: which networks a finished run holds, with their parameters."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from data_pipelines.latent_shards import LatentShards, is_shards, shards_folder
from data_pipelines.latent_writer import splits
from data_pipelines.sources import open_source
from data_pipelines.text_tokens import BPE, Tokenizer
from sorax import config as config_lib
from sorax import convert, functional, lora_files, read_weights, sharding
from sorax import lora as lora_lib
from sorax.checkpoint import Checkpoints
from sorax.convert import Networks
from sorax.dit import DiT, DiTConfig
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.generate import Generator
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig

WEIGHTS = {"ema": "ema_params", "raw": "params"}
WAN_SHAPE = (81, 480, 832, 16.0)  # frames, height, width, fps


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained text-to-video model: its folder, config and step, its networks with their parameters, its tokenizer.

    adapters: of a run with a LoRA, a tree of numpy arrays, which the DiT's parameters have in them; else None.
    """

    workdir: str
    config: object
    step: int
    networks: Networks
    tokenizer: Tokenizer
    adapters: dict | None = None

    @property
    def codec(self) -> Codec:
        return Codec(self.networks.vae_config, self.networks.vae)

    def generator(self, mesh=None) -> Generator:
        """Sampler of this run's networks, in float32; over the devices of a mesh of this process's own."""
        n = self.networks
        codec = Codec(n.vae_config, n.vae, mesh=mesh)
        dit, text = n.dit, n.text
        if mesh is not None:
            params = dict(dit=dit, text=text)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params)
            places = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like,
                sharding.shardings_for(like, mesh)
            )  # fmt: skip
            params = read_weights.place(params, places)
            dit, text = params["dit"], params["text"]
        return Generator(n.dit_config, dit, n.text_config, text, self.tokenizer, codec, mesh)

    def sampling(self) -> dict:
        """How this run's videos are made: num_steps, solver, guidance_scale and shift."""
        from sorax.objectives import EvalConfig, FlowConfig

        settings = config_lib.build(EvalConfig, self.config.eval, "eval")
        shift = config_lib.build(FlowConfig, self.config.flow, "flow").sample_shift
        return dict(num_steps=settings.num_steps, solver=settings.solver, guidance_scale=settings.guidance_scale,
                    shift=shift)  # fmt: skip

    @functools.cached_property
    def identity(self) -> str:
        """Hash of all parameters of the networks."""
        from sorax.score_report import params_hash

        return params_hash(dict(dit=self.networks.dit, text=self.networks.text, vae=self.networks.vae))

    @property
    def given(self) -> tuple[float, ...]:
        """How often training drew each of `sorax.flow.GIVEN_MODES`; the last of them may be missing, and are 0 then."""
        from sorax.dit_task import FlowConfig

        return config_lib.build(FlowConfig, self.config.flow, "flow").given

    @property
    def rising(self) -> float:
        """The share of the clips that had noise rising along time in training."""
        from sorax.dit_task import FlowConfig

        return config_lib.build(FlowConfig, self.config.flow, "flow").rising

    @property
    def gives_frames(self) -> bool:
        """Whether it is trained with given frames, and so makes videos from an image too."""
        return any(self.given[1:])

    @property
    def data_plan(self) -> str:
        """Identity of the rows that the run was trained on; "" where it was not trained."""
        if not self.step:
            return ""
        checkpoints = Checkpoints(self.workdir)
        try:
            return checkpoints.info(self.step)["data"]
        finally:
            checkpoints.close()

    def usual_shape(self) -> tuple[int, int, int, float]:
        """(frames, height, width, fps) that the run saw most among its first validation samples; of imported weights
        that have no data Wan's own, 480p."""
        return collections.Counter(self._shapes()).most_common(1)[0][0]

    def longest(self) -> int:
        """Frames of the longest of those samples."""
        return max(shape[0] for shape in self._shapes())

    def _shapes(self):
        data = self.config.data
        paths = [part["path"] for part in data.get("mixture") or ()] or [data.path]
        if not any(paths):
            return [WAN_SHAPE]
        for folder in (os.path.join(self.workdir, "latents"), *map(shards_folder, filter(is_shards, paths))):
            if there := splits(folder):
                shards = LatentShards(folder, "val" if "val" in there else "train", first=64)
                return [(*shape, fps) for shape, fps in zip(shards.video_shapes.tolist(), shards.fps.tolist())]
        # The latents were deleted.
        vae, patch_size = self.networks.vae_config, self.networks.dit_config.patch_size
        source = open_source(data, split="test", spatial_multiple=vae.spatial_stride * patch_size[1],
                             temporal_stride=vae.temporal_stride)  # fmt: skip
        specs = [source.spec(i) for i in range(min(len(source), 64))]
        return [(s.num_frames, s.height, s.width, s.fps) for s in specs]

    def metadata(self, weights: str) -> dict:
        """What a model card and provenance.json say of the run, of paths the last part alone; its scores, if this step
        was evaluated into the folder's `report/`."""
        frames, height, width, fps = self.usual_shape()
        how = self.sampling()
        sample = dict(prompt="a red circle moving right", height=height, width=width, num_frames=frames, fps=fps,
                      num_steps=how["num_steps"], guidance_scale=how["guidance_scale"])  # fmt: skip
        data = self.config.data
        paths = [part["path"] for part in data.get("mixture") or ()] or [data.path]
        paths = [config_lib.published(path) for path in paths if path]
        sentence = ", ".join(f"`{path}`" for path in paths) or "Unknown: these are imported weights."
        return dict(name=os.path.basename(os.path.abspath(self.workdir)), step=self.step, weights=weights,
                    config=config_lib.published(self.config.to_dict()), data=sentence, data_plan=self.data_plan,
                    sample=sample, given_frames=self.gives_frames, scores=self.scores())  # fmt: skip

    def scores(self) -> dict[str, str]:
        """The main scores of `report/scores.json` in words; empty where it is missing or of another step."""
        scores = {}
        for split, found in report_splits(self.workdir, self.step).items():
            joint = found.get("prompts", {}).get("model", {}).get("joint")
            if joint:
                low, high = 100 * joint["lo"], 100 * joint["hi"]
                share = f"{100 * joint['rate']:.1f} % [{low:.1f}, {high:.1f}] of {joint['n']} clips"
                scores[f"prompts followed in every attribute, {split}"] = share
            if found["vae"]["psnr"] is not None:  # else every clip was copied exactly
                scores[f"VAE PSNR, {split}"] = f"{found['vae']['psnr']:.2f} dB"
        return scores


def report_splits(workdir: str, step: int) -> dict:
    """Split -> scores, of a run's `report/scores.json`; empty where it is missing or of another step."""
    path = os.path.join(workdir, "report", "scores.json")
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        report = json.load(f)
    return report["splits"] if report["step"] == step else {}


def load_run(workdir: str, weights: str = "ema", *, stored: bool = False) -> Run:
    """The latest checkpoint of a run that `sorax train` wrote, or the weights that `sorax import` put there.

    stored: parameters of DiT and text encoder stay on the disk (`checkpoint.StoredArray`, `read_weights.StoredParam`).

    Raises:
        UserError: no run there, none of the needed kind, neither checkpoint nor imported weights, or of another
            architecture; a tokenizer that is missing, broken or too large.
    """
    config = config_lib.read_config(workdir)
    if config.kind != "dit":
        raise UserError(f"{workdir!r} is the run of a {config.kind}, not of a text-to-video model: name the folder of "
                        "a DiT experiment")  # fmt: skip
    vae_config, vae_params = (stored_vae if stored else open_vae)(vae_folder(config, workdir))[:2]
    dit_config = config_lib.build(DiTConfig, config.model, "model")
    text_config = config_lib.build(TextConfig, config.text, "text")
    tokenizer = Tokenizer.load(workdir, text_config.vocab_size)
    shapes = dict(dit=functional.abstract(DiT, dit_config)[1], text=functional.abstract(TextEncoder, text_config)[1])
    kept, lora = lora_lib.frozen_networks(config), lora_lib.read(config)
    trained = {name: shape for name, shape in shapes.items() if name not in kept}
    if lora.rank:
        trained["lora"] = lora_lib.adapted_dit(dit_config, lora)[1]
    params, step, adapters = {}, 0, None
    if not config.get("init") or Checkpoints(workdir).latest_step() is not None:
        params, step = load_params(workdir, trained, weights, stored=stored)
    elif lora.init:
        params["lora"] = start_adapters(config, workdir)
    if "lora" in params:
        adapters = read_weights.load(params["lora"])
    if missing := shapes.keys() - params.keys():
        params = start_params(config, workdir, missing, stored=stored, adapters=adapters) | params
    networks = Networks(vae_config=vae_config, vae=vae_params, dit_config=dit_config, dit=params["dit"],
                        text_config=text_config, text=params["text"])  # fmt: skip
    return Run(workdir, config, step, networks, tokenizer, adapters)


def start_params(config, workdir: str, names, *, stored: bool = False, places=None, adapters=None) -> dict:
    """Parameters of networks ("dit", "text") from where `config.init` of a DiT run says that they start.

    config.init is a WanPipeline folder or a DiT run (its EMA weights), as a path or inside the run folder.

    Args:
        stored: leave them on the disk.
        places: dict of trees, by network, of arrays (or their shapes) whose dtype and sharding they get; without it
            they go to this process's first device in float32.
        adapters: of a LoRA, which the DiT's parameters get in them.

    Raises:
        UserError: there is no such folder, or its networks are not those of the config: what differs is named.
    """
    folder = _inside(workdir, config.init)
    if os.path.isfile(os.path.join(folder, "model_index.json")):
        there = convert.open_diffusers(folder)
    else:
        there = load_run(folder, stored=True).networks
    made = {}
    for name in sorted(names):
        cls, section = dict(dit=(DiTConfig, "model"), text=(TextConfig, "text"))[name]
        wanted, found = config_lib.build(cls, config[section], section), getattr(there, f"{name}_config")
        differ = [
            f"{section}.{field.name}: {getattr(found, field.name)!r} there, {getattr(wanted, field.name)!r} here"
            for field in dataclasses.fields(found) if getattr(found, field.name) != getattr(wanted, field.name)
        ]  # fmt: skip
        if differ:
            raise UserError(f"config.init {config.init!r} is of another architecture ({'; '.join(differ[:3])}): make "
                            "the config the same, or start from other weights")  # fmt: skip
        made[name] = getattr(there, name)
        if name == "dit" and adapters is not None:
            made[name] = lora_lib.merge(made[name], adapters, lora_lib.read(config).scale)
        if not stored:
            made[name] = read_weights.place(made[name], places[name] if places else _first_device(made[name]))
    return made


def start_adapters(config, workdir: str):
    """Adapters of a DiT run from where `config.lora.init` says that they start, see `lora_files.start_of`."""
    lora, dit_config = lora_lib.read(config), config_lib.build(DiTConfig, config.model, "model")
    return lora_files.start_of(lora, _inside(workdir, lora.init), dit_config)


def start_tokenizer(config, workdir: str) -> str:
    """The tokenizer that a run is to have, in the words of `Tokenizer.wanted`: `config.data.tokenizer` or, where that
    is "" or "bpe", the one that the text encoder of `config.init` was trained with, if there is one."""
    wanted = config.data.get("tokenizer") or ""
    if not config.get("init") or wanted not in ("", BPE):
        return wanted
    folder = _inside(workdir, config.init)
    is_pipeline = os.path.isfile(os.path.join(folder, "model_index.json"))
    return os.path.join(folder, "tokenizer") if is_pipeline else folder


def _first_device(tree):
    place = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=place), tree)


def _inside(workdir: str, path: str) -> str:
    """A path that is taken from the run folder if it is there, and else as it is."""
    return inside if os.path.exists(inside := os.path.join(workdir, path)) else path


def anchored(config, path: str):
    """A config that was loaded from `path` with networks that are found from anywhere: the config.json of a run may
    name what is inside its folder."""
    config, home = config.copy_and_resolve_references(), os.path.dirname(os.path.abspath(path))
    with config.unlocked():
        for section, key in ((config, "init"), (config.get("vae", {}), "path")):
            if path.endswith(".json") and section.get(key):
                section[key] = _inside(home, section[key])
    return config


def vae_folder(config, workdir: str) -> str:
    """Where the VAE of a DiT run is: the folder that its config names, or the run inside its own."""
    path = config.vae.get("path")
    return _inside(workdir, path) if path else os.path.join(workdir, "vae")


def kind_of(path: str) -> str:
    """What a folder holds: "dit", "vae" or "captioner", a run of that kind, or "diffusers", an `AutoencoderKLWan` or a
    pipeline with one.

    Raises:
        UserError: it is missing, or neither.
    """
    if _diffusers_vae(path) is not None:
        return "diffusers"
    kind = config_lib.read_config(path).get("kind")
    if kind not in ("dit", "vae", "captioner"):
        raise UserError(f"{path!r} is neither a run nor a diffusers folder: its {config_lib.CONFIG_FILE} has no `kind` "
                        "of a run and no `_class_name` AutoencoderKLWan")  # fmt: skip
    return kind


def _diffusers_vae(path) -> pathlib.Path | None:
    """The `AutoencoderKLWan` folder that a path is or, being a pipeline, has; None if it is something else."""
    folder = pathlib.Path(path)
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    elif not (folder / config_lib.CONFIG_FILE).is_file():
        return None
    there = convert.read_json(folder / "config.json")
    if "kind" in there or not {"_class_name", "z_dim"} & there.keys():
        return None
    name = there.get("_class_name", "AutoencoderKLWan")
    if name != "AutoencoderKLWan":
        raise UserError(f"{folder} holds a {name}: as a VAE sorax reads AutoencoderKLWan alone")
    return folder


def open_vae(path: str):
    """Config, parameters and identity of a VAE, from wherever one is.

    path: the folder of a finished VAE run (its EMA weights), of a DiT run (the VAE it uses), of an `AutoencoderKLWan`
    of diffusers, or of a pipeline that has one. The identity is a hash of all parameters: a VAE that is exported in
    float32 and read back keeps its own, and so the latents that were encoded with it stay usable.

    Raises:
        UserError: none of these is there, the run is not finished, or config and weights do not fit each other.
    """
    kind = kind_of(path)
    if kind == "dit":
        return open_vae(vae_folder(config_lib.read_config(path), path))
    if kind == "vae":
        return load_vae(path)
    vae_config, params = convert.read_vae(_diffusers_vae(path))
    identity = _identity(params)
    return vae_config, jax.device_put(params, jax.local_devices()[0]), identity


def stored_vae(path: str):
    """Config and parameters of what `open_vae` opens; those in a diffusers folder stay on the disk, as they are."""
    folder = _diffusers_vae(path)
    return convert.open_vae(folder) if folder is not None else open_vae(path)[:2]


def open_vae_config(path: str) -> VAEConfig:
    """The config alone of the VAE that `open_vae` opens; its run need not be finished."""
    kind = kind_of(path)
    if kind == "dit":
        config = config_lib.read_config(path)
        if not config.vae.get("path"):
            return config_lib.build(VAEConfig, config.vae.model, "vae.model")
        return open_vae_config(vae_folder(config, path))
    if kind == "diffusers":
        return convert.read_vae_config(_diffusers_vae(path))[0]
    return config_lib.build(VAEConfig, config_lib.read_config(path).model, "model")


def load_vae(workdir: str):
    """Config, EMA parameters and identity of a finished VAE run.

    Raises:
        UserError: no run there, not of a VAE, or not finished: the latent statistics are measured at the end.
    """
    config = config_lib.read_config(workdir)
    if config.kind != "vae":
        raise UserError(f"{workdir!r} is the run of a {config.kind}, not of a VAE: set config.vae.path to a VAE run")
    vae_config = config_lib.build(VAEConfig, config.model, "model")
    params, step = load_params(workdir, dict(vae=functional.abstract(VAE, vae_config)[1]), "ema")
    params = params["vae"]
    if step < config.train.steps:
        raise UserError(f"the VAE in {workdir!r} is at step {step} of {config.train.steps}: finish it first, with "
                        f"`sorax train --workdir {workdir}` and its config")  # fmt: skip
    if not np.any(params["latents_mean"]):  # zeros until they are measured
        raise UserError(f"the VAE in {workdir!r} is at step {step}, but was to go on from there, so the statistics of "
                        "its latents were not measured: call `sorax train` with its config and "
                        f"--config.train.steps={step + 1}")  # fmt: skip
    return vae_config, params, _identity(params)


def _identity(params) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(params)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


def load_params(workdir: str, shapes, weights: str, *, stored: bool = False):
    """(parameters, step) of a run's latest checkpoint, on the first device; or left on the disk."""
    place = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    checkpoints = Checkpoints(workdir)
    try:
        if stored:
            return checkpoints.stored(abstract, WEIGHTS[weights])
        step = checkpoints.latest_step()
        items, _ = checkpoints.restore({WEIGHTS[weights]: abstract}, step)
    finally:
        checkpoints.close()
    return items[WEIGHTS[weights]], step
