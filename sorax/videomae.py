"""VideoMAE, a vision transformer of videos, whose features distances between sets of videos are measured in.

Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training"
(NeurIPS 2022). Features of self-supervised transformers follow distortions in time, which those of I3D hardly do (Ge et
al. 2024, arXiv 2404.12391). Any size, read from the folder of transformers' `VideoMAEModel`, `VideoMAEForPreTraining`
or `VideoMAEForVideoClassification`.

Legend: B videos, T frames, H height, W width, N tokens, D width.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from sorax import vit
from sorax.convert import TEXT_WEIGHTS, Name, check_depth
from sorax.errors import UserError
from sorax.functional import abstract
from sorax.linear import Linear
from sorax.read_weights import load, open_params, read_json, tensor_files

REMEDY = ("download `config.json` and `model.safetensors` (and `preprocessor_config.json`) of a VideoMAE, such as "
          "MCG-NJU/videomae-base-finetuned-kinetics on huggingface.co, into one folder and name it")  # fmt: skip
BATCH = 4  # videos at a time
MAX_TOKENS = 1 << 16  # of a video: published models have 1568
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as published models have them
# What checkpoints for other tasks hold besides the encoder.
HEADS = ("decoder.", "encoder_to_decoder.", "classifier.", "mask_token")
NAMES = dict(image_size="image_size", patch_size="patch_size", num_frames="num_frames", tubelet_size="tubelet_size",
             hidden_size="width", num_hidden_layers="num_layers", num_attention_heads="num_heads",
             intermediate_size="ffn_dim", hidden_act="activation", layer_norm_eps="eps", qv_bias="qv_bias",
             use_mean_pooling="mean_pooling")  # fmt: skip
DEFAULTS = dict(image_size=224, patch_size=16, num_frames=16, tubelet_size=2, hidden_size=768, num_hidden_layers=12,
                num_attention_heads=12, intermediate_size=3072, hidden_act="gelu", layer_norm_eps=1e-12, qv_bias=True,
                use_mean_pooling=True)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Hyper-parameters; the names of transformers' `VideoMAEConfig` are in NAMES.

    mean_pooling: there is no norm after the last block. pooled_norm: there is one after the mean over tokens, which the
    classifier of a fine-tuned model is behind.
    """

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    qv_bias: bool = True
    mean_pooling: bool = True
    pooled_norm: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_frames // self.tubelet_size * (self.image_size // self.patch_size) ** 2


def position_table(length: int, width: int) -> np.ndarray:
    """Fixed position table float32 `[length, width]`: sines at even places, cosines at odd (Vaswani et al. 2017)."""
    angles = np.arange(length)[:, None] / 10000.0 ** (2 * (np.arange(width) // 2) / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


class VideoMAE(nnx.Module):
    """The encoder. Layers are stacked: parameters lead with [L]."""

    def __init__(self, config: VideoMAEConfig, rngs: nnx.Rngs):
        self.config = config
        D = config.width
        self.patch_embed = Linear(3 * config.tubelet_size * config.patch_size**2, D, rngs=rngs)
        bias = config.qv_bias
        self.blocks = vit.stack(config.num_layers, rngs, width=D, num_heads=config.num_heads, ffn_dim=config.ffn_dim,
                                activation=config.activation, eps=config.eps, qkv_bias=(bias, False, bias))  # fmt: skip
        if not config.mean_pooling:
            self.norm = vit.layer_norm(D, config.eps, rngs)
        if config.pooled_norm:
            self.pooled_norm = vit.layer_norm(D, 1e-5, rngs)

    def __call__(self, video):
        """Encodes normalised videos.

        Args:
            video: `[B, T, H, W, 3]`, of the config's size.

        Returns:
            tokens `[B, N, D]`, in order of time, height and width; features `[B, D]`: their mean, normalised where the
            network was fine-tuned.
        """
        config = self.config
        patches = einops.rearrange(video, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=config.tubelet_size,
                                   ph=config.patch_size, pw=config.patch_size)  # fmt: skip
        x = self.patch_embed(patches)
        x = vit.run(self.blocks, x + jnp.asarray(position_table(config.num_tokens, config.width), x.dtype))
        if not config.mean_pooling:
            x = self.norm(x)
        pooled = jnp.mean(x, axis=1)
        return x, self.pooled_norm(pooled) if config.pooled_norm else pooled


def names(config: VideoMAEConfig, prefix: str, qv_names: tuple[str, str]) -> list[Name]:
    """The tensors of the encoder; prefix: of their names; qv_names: what biases of queries and values are called."""
    axes = tuple(zip(("c", "pt", "ph", "pw"), (3, config.tubelet_size, *[config.patch_size] * 2)))
    embed = f"{prefix}embeddings.patch_embeddings.projection"
    made = [Name(f"{embed}.weight", "patch_embed/kernel", "(pt ph pw c) d -> d c pt ph pw", axes=axes),
            Name(f"{embed}.bias", "patch_embed/bias")]  # fmt: skip
    for i in range(config.num_layers):
        layer = f"{prefix}encoder.layer.{i}"
        attention = f"{layer}.attention.attention"
        for part, ours, bias in (("query", "q", qv_names[0]), ("key", "k", ""), ("value", "v", qv_names[1])):
            made += vit.linear_names(f"{attention}.{part}", f"blocks/{ours}", i, bias=None)
            if bias and config.qv_bias:
                made.append(Name(f"{attention}.{bias}", f"blocks/{ours}/bias", layer=i))
        made += vit.linear_names(f"{layer}.attention.output.dense", "blocks/o", i)
        made += vit.linear_names(f"{layer}.intermediate.dense", "blocks/mlp_in", i)
        made += vit.linear_names(f"{layer}.output.dense", "blocks/mlp_out", i)
        made += vit.norm_names(f"{layer}.layernorm_before", "blocks/norm1", i)
        made += vit.norm_names(f"{layer}.layernorm_after", "blocks/norm2", i)
    made += [] if config.mean_pooling else vit.norm_names(f"{prefix}layernorm", "norm")
    return made + (vit.norm_names("fc_norm", "pooled_norm") if config.pooled_norm else [])


def read_config(path, pooled_norm: bool) -> VideoMAEConfig:
    """Config of a VideoMAE from its config.json. Raises UserError where it is of something else."""
    there = read_json(path)
    if there.get("model_type") != "videomae":
        raise UserError(f"{path}: model_type {there.get('model_type')!r} is not videomae: {REMEDY}")
    if there.get("num_channels", 3) != 3:
        raise UserError(f"{path}: num_channels is {there['num_channels']!r}: videos have 3")
    config = VideoMAEConfig(**vit.fields(path, there, NAMES, DEFAULTS), pooled_norm=pooled_norm)
    vit.check_sizes(path, width=config.width, num_heads=config.num_heads, hidden_act=config.activation,
                    image_size=config.image_size, patch_size=config.patch_size)  # fmt: skip
    if config.num_frames % config.tubelet_size:
        raise UserError(f"{path}: num_frames {config.num_frames} is no multiple of tubelet_size {config.tubelet_size}")
    if config.num_tokens > MAX_TOKENS:
        raise UserError(f"{path}: {config.num_tokens} tokens a video, more than {MAX_TOKENS}: the file is damaged")
    return config


@dataclasses.dataclass(frozen=True)
class VideoFeatures:
    """A feature network with its weights: videos of any size and length -> vectors.

    Attributes:
        config; params: nested dict. mean, std: that pictures in [0, 1] are normalised with. identity: hash of all.
    """

    config: VideoMAEConfig
    params: dict
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def load(cls, path):
        """From a local folder.

        Raises:
            UserError: there is none, it is of another model, or its tensors do not fit its config; no pickle is opened.
        """
        folder = vit.folder_of(path, "VideoMAE", REMEDY)
        files = {key: file for key, file in tensor_files(folder, TEXT_WEIGHTS).items() if not key.startswith(HEADS)}
        config = read_config(folder / "config.json", "fc_norm.weight" in files)
        check_depth(folder, config.num_layers, files)
        prefix = "videomae." if any(key.startswith("videomae.") for key in files) else ""
        old = f"{prefix}encoder.layer.0.attention.attention.q_bias" in files  # up to transformers 4
        table = names(config, prefix, ("q_bias", "v_bias") if old else ("query.bias", "value.bias"))
        params = load(open_params(folder, files, table, abstract(VideoMAE, config)[1]))
        return cls(config, params, *vit.normalization(folder, MEAN, STD))

    @property
    def dim(self) -> int:
        return self.config.width

    @functools.cached_property
    def identity(self) -> str:
        return vit.weights_hash((self.config, self.mean.tolist(), self.std.tolist()), self.params)

    def inputs(self, video) -> np.ndarray:
        """What the network sees of a video uint8 `[T, H, W, 3]`: uint8 `[num_frames, side, side, 3]`.

        Frames are spread evenly from the first to the last (some twice where there are fewer), scaled, and cut to their
        middle square.
        """
        frames = vit.spread_frames(video, self.config.num_frames)
        return vit.pictures(frames, self.config.image_size, Image.Resampling.BILINEAR)

    def __call__(self, videos) -> np.ndarray:
        """Features float32 `[n, D]` of videos uint8 `[T, H, W, 3]`, each of its own shape."""
        seen, made = [self.inputs(video) for video in videos], []
        for batch, count in vit.batches(seen, min(BATCH, len(seen))):
            made.append(np.asarray(self._encode(self.params, batch))[:count])
        return np.concatenate(made) if made else np.empty((0, self.dim), np.float32)

    @functools.cached_property
    def _encode(self):
        graphdef = abstract(VideoMAE, self.config)[0]
        return jax.jit(lambda params, x: nnx.merge(graphdef, params)(vit.normalized(x, self.mean, self.std))[1])
