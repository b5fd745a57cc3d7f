"""diffusers folders <-> parameters: the tables of names and hyper-parameters, and the reader.

A weight of theirs is a weight of ours under another name and with its axes in another order, which an einops pattern
states; read backwards, the pattern is the way back. `sorax/export.py` writes with the same tables.
"""

import dataclasses
import pathlib

import einops
import jax
import numpy as np

from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError
from sorax.functional import abstract
from sorax.read_weights import SAME, load, open_params, read_json, tensor_files
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig

MATRIX, ROW = "i o -> o i", "n d -> 1 n d"
CONV_2D, CONV_3D = "1 h w i o -> o i h w", "t h w i o -> o i t h w"
GAMMA_2D, GAMMA_3D = "c -> c 1 1", "c -> c 1 1 1"
WEIGHTS = "diffusion_pytorch_model"  # stem of the weight files of a diffusers model
TEXT_WEIGHTS = "model"  # and of a transformers model


@dataclasses.dataclass(frozen=True)
class Name:
    """One tensor of theirs: where ours is, which layer of a stacked parameter, and how the axes move."""

    theirs: str
    ours: str  # path with slashes
    pattern: str = SAME  # einops, ours -> theirs
    layer: int | None = None  # index into the leading [L] axis of ours
    axes: tuple[tuple[str, int], ...] = ()

    def to_theirs(self, x):
        return einops.rearrange(x, self.pattern, **dict(self.axes))

    def to_ours(self, x):
        left, right = self.pattern.split(" -> ")
        return einops.rearrange(x, f"{right} -> {left}", **dict(self.axes))

    def shape(self, shapes) -> tuple[int, ...]:
        """Shape of theirs, given the shapes of ours."""
        shape = shapes[self.ours].shape[0 if self.layer is None else 1 :]
        return jax.eval_shape(self.to_theirs, jax.ShapeDtypeStruct(shape, np.float32)).shape


def _linear(theirs, ours, layer=None, pattern=MATRIX, axes=(), bias=True):
    names = [Name(f"{theirs}.weight", f"{ours}/kernel", pattern, layer, axes)]
    return names + ([Name(f"{theirs}.bias", f"{ours}/bias", SAME, layer)] if bias else [])


def dit_names(config: DiTConfig) -> list[Name]:
    """The tensors of `WanTransformer3DModel`."""
    axes = tuple(zip(("c", "pt", "ph", "pw"), (config.in_channels, *config.patch_size)))
    names = _linear("patch_embedding", "patch_embed", None, "(c pt ph pw) d -> d c pt ph pw", axes)
    for theirs, ours in (
        ("condition_embedder.time_embedder.linear_1", "time_in"),
        ("condition_embedder.time_embedder.linear_2", "time_out"),
        ("condition_embedder.time_proj", "time_proj"),
        ("condition_embedder.text_embedder.linear_1", "text_in"),
        ("condition_embedder.text_embedder.linear_2", "text_out"),
    ):
        names += _linear(theirs, ours)
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        for theirs, ours in (("attn1", "blocks/self_attention"), ("attn2", "blocks/cross_attention")):
            for part, letter in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                names += _linear(f"{block}.{theirs}.{part}", f"{ours}/{letter}", layer)
            names += [
                Name(f"{block}.{theirs}.norm_q.weight", f"{ours}/norm_q", layer=layer),
                Name(f"{block}.{theirs}.norm_k.weight", f"{ours}/norm_k", layer=layer),
            ]
        names += _linear(f"{block}.ffn.net.0.proj", "blocks/mlp_in", layer)
        names += _linear(f"{block}.ffn.net.2", "blocks/mlp_out", layer)
        names += [
            Name(f"{block}.norm2.weight", "blocks/norm_scale", layer=layer),
            Name(f"{block}.norm2.bias", "blocks/norm_bias", layer=layer),
            Name(f"{block}.scale_shift_table", "blocks/modulation", ROW, layer),
        ]
    return names + _linear("proj_out", "proj_out") + [Name("scale_shift_table", "modulation", ROW)]


def vae_names(config: VAEConfig) -> list[Name]:
    """The tensors of `AutoencoderKLWan` (latent means and deviations are in its config, not among its tensors)."""

    def conv(theirs, ours, pattern=CONV_3D):
        return _linear(theirs, ours, pattern=pattern)

    def res_block(theirs, ours, shortcut):
        names = conv(f"{theirs}.conv1", f"{ours}/conv1") + conv(f"{theirs}.conv2", f"{ours}/conv2")
        names += [Name(f"{theirs}.{norm}.gamma", f"{ours}/{norm}/gamma", GAMMA_3D) for norm in ("norm1", "norm2")]
        return names + (conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut") if shortcut else [])

    def resample(theirs, ours, temporal):
        names = conv(f"{theirs}.resample.1", f"{ours}/conv", CONV_2D)
        return names + (conv(f"{theirs}.time_conv", f"{ours}/time_conv") if temporal else [])

    names = conv("quant_conv", "quant_conv") + conv("post_quant_conv", "post_quant_conv")
    for side in ("encoder", "decoder"):
        middle, attention = f"{side}/middle", f"{side}.mid_block.attentions.0"
        names += conv(f"{side}.conv_in", f"{side}/conv_in") + conv(f"{side}.conv_out", f"{side}/conv_out")
        names += res_block(f"{side}.mid_block.resnets.0", f"{middle}/block1", False)
        names += res_block(f"{side}.mid_block.resnets.1", f"{middle}/block2", False)
        names += conv(f"{attention}.to_qkv", f"{middle}/attention/qkv", CONV_2D)
        names += conv(f"{attention}.proj", f"{middle}/attention/proj", CONV_2D)
        names.append(Name(f"{attention}.norm.gamma", f"{middle}/attention/norm/gamma", GAMMA_2D))
        names.append(Name(f"{side}.norm_out.gamma", f"{side}/norm_out/gamma", GAMMA_3D))

    # Our blocks stand by stages on both sides; theirs in the decoder and, in the second generation, in the encoder.
    place = 0
    for stage, (n_in, n_out, down, temporal) in enumerate(config.stages(decoder=False)):
        for i in range(config.num_res_blocks):
            theirs = f"{stage}.resnets.{i}" if config.shortcuts else place
            where = (f"encoder.down_blocks.{theirs}", f"encoder/stages/{stage}/blocks/{i}")
            names += res_block(*where, shortcut=i == 0 and n_in != n_out)
            place += 1
        if down:
            theirs = f"{stage}.downsampler" if config.shortcuts else place
            names += resample(f"encoder.down_blocks.{theirs}", f"encoder/stages/{stage}/resample", temporal)
            place += 1
    upsampler = "upsampler" if config.shortcuts else "upsamplers.0"
    for stage, (n_in, n_out, up, temporal) in enumerate(config.stages(decoder=True)):
        for i in range(config.num_res_blocks + 1):
            where = (f"decoder.up_blocks.{stage}.resnets.{i}", f"decoder/stages/{stage}/blocks/{i}")
            names += res_block(*where, shortcut=i == 0 and n_in != n_out)
        if up:
            theirs = f"decoder.up_blocks.{stage}.{upsampler}"
            names += resample(theirs, f"decoder/stages/{stage}/resample", temporal)
    return names


def text_names(config: TextConfig) -> list[Name]:
    """The tensors of `UMT5EncoderModel` or, with a shared bias, `T5EncoderModel`."""
    names = [Name("shared.weight", "embedding"), Name("encoder.final_layer_norm.weight", "norm/scale")]
    for i in range(config.num_layers):
        attention, mlp, ours = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1", f"layers/{i}"
        for letter in "qkvo":
            names += _linear(f"{attention}.SelfAttention.{letter}", f"{ours}/{letter}", bias=False)
        for theirs, mine in (("wi_0", "wi_gate"), ("wi_1", "wi"), ("wo", "wo")):
            names += _linear(f"{mlp}.DenseReluDense.{theirs}", f"{ours}/{mine}", bias=False)
        names.append(Name(f"{attention}.layer_norm.weight", f"{ours}/norm_attention/scale"))
        names.append(Name(f"{mlp}.layer_norm.weight", f"{ours}/norm_mlp/scale"))
        if i == 0 or not config.shared_bias:
            names.append(Name(f"{attention}.SelfAttention.relative_attention_bias.weight", f"{ours}/bias"))
    return names


# Hyper-parameters: theirs -> ours. What is fixed in our architecture must have that value in a folder that is read.
DIT_FIELDS = dict(
    in_channels="in_channels", out_channels="out_channels", patch_size="patch_size", num_layers="num_layers",
    num_attention_heads="num_heads", attention_head_dim="head_dim", ffn_dim="ffn_dim", text_dim="text_dim",
    freq_dim="freq_dim", eps="eps",
)  # fmt: skip
DIT_FIXED = dict(
    cross_attn_norm=True, qk_norm="rms_norm_across_heads", image_dim=None, added_kv_proj_dim=None,
    pos_embed_seq_len=None,
)  # fmt: skip
VAE_FIELDS = dict(
    base_dim="base_width", dim_mult="width_multipliers", num_res_blocks="num_res_blocks", z_dim="latent_channels",
    temperal_downsample="temporal_downsample",
)  # fmt: skip
VAE_OPTIONAL = dict(decoder_base_dim="decoder_base_width", is_residual="shortcuts")  # absent in older folders
VAE_FIXED = dict(attn_scales=[])
TEXT_FIELDS = dict(
    vocab_size="vocab_size", d_model="width", num_layers="num_layers", num_heads="num_heads", d_kv="head_dim",
    d_ff="ffn_dim", relative_attention_num_buckets="num_buckets", relative_attention_max_distance="max_distance",
    layer_norm_epsilon="eps",
)  # fmt: skip
TEXT_FIXED = dict(feed_forward_proj="gated-gelu")
TEXT_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}  # the same table; some writers keep both names
# Solvers of `sorax.sampler`, and the schedulers that are the same; of two the order tells which it is.
SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler", "ddim": "DPMSolverMultistepScheduler",
}  # fmt: skip
ORDERS = {"unipc": 2, "dpm++": 2, "ddim": 1}
SCHEDULER_FIXED = dict(
    num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True,
    use_dynamic_shifting=False, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
    thresholding=False, predict_x0=True, lower_order_final=True, final_sigmas_type="zero", disable_corrector=[],
    euler_at_final=False, use_lu_lambdas=False, shift_terminal=None, stochastic_sampling=False,
)  # fmt: skip


def _config(cls, path, fields, fixed, **derived):
    """Builds one of our configs from a config.json of theirs; `derived` fields are given, the rest is looked up."""
    there = read_json(path)
    for key, value in fixed.items():
        if there.get(key, value) != value:
            raise UserError(f"{path}: {key} = {there[key]!r} is not supported, only {value!r}: use another model")
    missing = [key for key in fields if key not in there]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: not the config of a model that sorax can read")
    values = {ours: there[theirs] for theirs, ours in fields.items()}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    for theirs, ours in fields.items():
        count = {int: 1, tuple[int, int, int]: 3}.get(kinds[ours], 0)
        sizes = [there[theirs]] if count == 1 else there[theirs]
        is_list = isinstance(sizes, list) and len(sizes) == count
        if count and not (is_list and all(type(size) is int and size > 0 for size in sizes)):
            raise UserError(f"{path}: {theirs} is {there[theirs]!r}: it takes {count} whole number(s) of at least 1")
    try:
        return cls(**values, **derived), there
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Networks:
    """The three networks of a text-to-video model: each one's config and parameters (nested dict of arrays)."""

    vae_config: VAEConfig
    vae: dict
    dit_config: DiTConfig
    dit: dict
    text_config: TextConfig
    text: dict


@dataclasses.dataclass(frozen=True)
class Pipeline(Networks):
    """What a WanPipeline folder holds: networks and how it samples."""

    scheduler: dict  # scheduler_config.json
    expand_timesteps: bool  # a timestep per token, with given frames at 0 (Wan 2.2 TI2V)

    @property
    def shift(self) -> float:
        return float(self.scheduler.get("flow_shift", self.scheduler.get("shift", 1.0)))

    @property
    def solver(self) -> str:
        """Its scheduler, by its name in `sorax.sampler`."""
        return solver_of(self.scheduler)


def solver_of(scheduler: dict) -> str | None:
    """The solver of `sorax.sampler` that a scheduler is; None where there is none."""
    order = scheduler.get("solver_order", 2)
    same = (solver for solver, name in SCHEDULERS.items() if name == scheduler.get("_class_name")
            and ORDERS.get(solver, order) == order)  # fmt: skip
    return next(same, None)


def read_diffusers(folder) -> Pipeline:
    """As `open_diffusers`, with all parameters read: float32 numpy. Raises UserError for values that are not finite."""
    pipeline = open_diffusers(folder)
    return dataclasses.replace(pipeline, **{name: load(getattr(pipeline, name)) for name in ("vae", "dit", "text")})


def open_diffusers(folder) -> Pipeline:
    """A WanPipeline folder with safetensors weights; its parameters are `read_weights.StoredParam`, not read yet.

    Raises:
        UserError: not such a folder, an architecture or scheduler that sorax does not have, or tensors that are
            missing, not expected, of another shape, or in a damaged file; it names the file and the tensors.
    """
    folder = pathlib.Path(folder)
    index = read_json(folder / "model_index.json")
    kind, expand = index.get("_class_name"), bool(index.get("expand_timesteps"))
    if kind != "WanPipeline" and not (kind == "WanImageToVideoPipeline" and expand):
        if kind == "WanImageToVideoPipeline":
            raise UserError(f"{folder} is an image-to-video model that takes the image as more latent channels (in Wan "
                            "2.1 through an image encoder too), which sorax does not have: use a text-to-video model, "
                            "or Wan 2.2's TI2V, which is given the first frame itself")  # fmt: skip
        raise UserError(f"{folder}: a {kind} is not supported, only WanPipeline: choose a Wan text-to-video model")
    if (index.get("transformer_2") or [None])[0] or index.get("boundary_ratio") is not None:
        raise UserError(f"{folder}: two transformers (a mixture by noise level) are not supported: use Wan 2.1 or TI2V")
    vae_config, vae = open_vae(folder / "vae")
    dit_config, dit = open_dit(folder / "transformer")
    text_config, text = open_text(folder / "text_encoder")
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path)
    if scheduler.get("_class_name") not in SCHEDULERS.values():
        raise UserError(f"{path}: a {scheduler.get('_class_name')} is not supported, only "
                        f"{', '.join(dict.fromkeys(SCHEDULERS.values()))}")  # fmt: skip
    if solver_of(scheduler) is None:
        raise UserError(f"{path}: solver_order = {scheduler['solver_order']!r} is not supported, only 2")
    for key, value in SCHEDULER_FIXED.items():
        # These two are off unless a multistep scheduler says otherwise; Euler's is never otherwise.
        needed = key in ("prediction_type", "use_flow_sigmas") and scheduler["_class_name"] != SCHEDULERS["euler"]
        if (found := scheduler.get(key, None if needed else value)) != value:
            raise UserError(f"{path}: {key} = {found!r} is not supported, only {value!r}")
    return Pipeline(vae_config, vae, dit_config, dit, text_config, text, scheduler, expand)


def check_depth(where, depth: int, tensors):
    """Raises UserError where a network's config has more blocks than its files have tensors: the tables of names that
    tell what is missing would fill the memory first, if a damaged or hostile config asks for 10^9 blocks."""
    if not (isinstance(depth, int) and 0 < depth <= len(tensors)):
        raise UserError(f"{where}: config.json asks for {depth} blocks, and the files have {len(tensors)} tensors. Do "
                        "config and weights belong together?")  # fmt: skip


def read_dit_config(path) -> DiTConfig:
    """Config of a `WanTransformer3DModel` from its config.json. Raises UserError as `open_diffusers` does."""
    return _config(DiTConfig, path, DIT_FIELDS, DIT_FIXED)[0]


def open_dit(folder):
    """Config and parameters (`read_weights.StoredParam`) of a `WanTransformer3DModel` folder.

    Raises UserError as `open_diffusers` does.
    """
    config, files = read_dit_config(folder / "config.json"), tensor_files(folder, WEIGHTS)
    check_depth(folder, config.num_layers, files)
    return config, open_params(folder, files, dit_names(config), abstract(DiT, config)[1])


def read_vae_config(folder):
    """Config and latent statistics of an `AutoencoderKLWan` folder. Raises UserError as `open_diffusers` does."""
    path = folder / "config.json"
    raw = read_json(path)
    patch = raw.get("patch_size") or 1
    optional = {ours: raw[theirs] for theirs, ours in VAE_OPTIONAL.items() if theirs in raw}
    config, there = _config(VAEConfig, path, VAE_FIELDS, VAE_FIXED, pixel_patch=patch, **optional)
    for key in ("in_channels", "out_channels"):
        if there.get(key, 3) != 3 * patch**2:
            raise UserError(f"{path}: {key} = {there[key]} does not fit RGB with patch_size {patch}: use another model")
    stats = {}
    for key in ("latents_mean", "latents_std"):
        try:
            stats[key] = np.asarray(there.get(key, []), np.float32)
        except (TypeError, ValueError):  # words, or a list of lists
            stats[key] = np.empty(0)
        if stats[key].shape != (config.latent_channels,) or not np.isfinite(stats[key]).all():
            raise UserError(f"{path}: {key} must hold {config.latent_channels} finite numbers, one a latent channel")
    if not (stats["latents_std"] > 0).all():
        raise UserError(f"{path}: latents_std = {there['latents_std']} holds numbers that are not positive, and "
                        "latents are divided by them: copy the file again")  # fmt: skip
    return config, stats


def open_vae(folder):
    """Config and parameters of an `AutoencoderKLWan` folder, as `open_dit`."""
    (config, stats), files = read_vae_config(folder), tensor_files(folder, WEIGHTS)
    check_depth(folder, config.num_res_blocks * len(config.width_multipliers), files)
    return config, open_params(folder, files, vae_names(config), abstract(VAE, config)[1], stats)


def read_text_config(path) -> TextConfig:
    """Config of a UMT5 or T5 encoder from its config.json. Raises UserError as `open_diffusers` does."""
    kind = read_json(path).get("model_type")
    if kind not in ("umt5", "t5"):
        raise UserError(f"{path}: model_type {kind!r} is not supported, only umt5 and t5: use another text encoder")
    return _config(TextConfig, path, TEXT_FIELDS, TEXT_FIXED, shared_bias=kind == "t5")[0]


def open_text(folder):
    """Config and parameters of a UMT5 or T5 encoder folder, as `open_dit`."""
    config, files = read_text_config(folder / "config.json"), tensor_files(folder, TEXT_WEIGHTS)
    check_depth(folder, config.num_layers, files)
    return config, open_params(folder, files, text_names(config), abstract(TextEncoder, config)[1], None, TEXT_ALIASES)


def read_vae(folder):
    """Config and parameters (float32 numpy) of an `AutoencoderKLWan` folder."""
    config, params = open_vae(pathlib.Path(folder))
    return config, load(params)
