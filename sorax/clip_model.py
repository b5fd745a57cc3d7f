"""CLIP, which knows how well a picture goes with a text: for the score of generated frames and their prompts.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), any size, read from the
folder of transformers' `CLIPModel` with its `tokenizer.json`.

Legend: B batch, N patches, M text tokens, D width, P width of the space that both share.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from PIL import Image

from sorax import vit
from sorax.convert import MATRIX, TEXT_WEIGHTS, Name, check_depth
from sorax.errors import UserError
from sorax.functional import abstract
from sorax.linear import Linear
from sorax.read_weights import load, open_params, read_json, tensor_files

REMEDY = ("download `config.json`, `model.safetensors`, `tokenizer.json` and `preprocessor_config.json` of a CLIP, "
          "such as openai/clip-vit-base-patch32 on huggingface.co, into one folder and name it")  # fmt: skip
BATCH = 16  # pictures at a time
FRAMES = 16  # of a video that are looked at, at most
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the published models
# Tables of 0 .. n - 1 and the scale of training's logits, which cosines do not need.
UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "logit_scale")
SHARED = dict(hidden_size="width", num_hidden_layers="num_layers", num_attention_heads="num_heads",
              intermediate_size="ffn_dim", hidden_act="activation", layer_norm_eps="eps")  # fmt: skip
TEXT_NAMES = SHARED | dict(vocab_size="vocab_size", max_position_embeddings="length", eos_token_id="eos_id")
VISION_NAMES = SHARED | dict(image_size="image_size", patch_size="patch_size")
SHARED_DEFAULTS = dict(num_hidden_layers=12, hidden_act="quick_gelu", layer_norm_eps=1e-5)
TEXT_DEFAULTS = SHARED_DEFAULTS | dict(hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=49408,
                                       max_position_embeddings=77, eos_token_id=49407)  # fmt: skip
VISION_DEFAULTS = SHARED_DEFAULTS | dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072,
                                         image_size=224, patch_size=32)  # fmt: skip
OLD_EOS = 2  # what configs said before it was put right: the end is then the token of the largest number


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Hyper-parameters of the blocks of a tower; the names of transformers are in SHARED."""

    width: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    activation: str = "quick_gelu"
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TowerConfig):
    vocab_size: int = 49408
    length: int = 77
    eos_id: int = 49407


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig(TowerConfig):
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Of both towers, and the width of the space that they share."""

    text: TextTowerConfig
    vision: VisionTowerConfig
    projection: int = 512


def _blocks(config: TowerConfig, rngs):
    return vit.stack(config.num_layers, rngs, width=config.width, num_heads=config.num_heads, ffn_dim=config.ffn_dim,
                     activation=config.activation, eps=config.eps, qkv_bias=(True, True, True))  # fmt: skip


class TextTower(nnx.Module):
    """Causal transformer of tokens; the end's state is the text's."""

    def __init__(self, config: TextTowerConfig, projection: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.width)))
        self.positions = nnx.Param(init(rngs.params(), (config.length, config.width)))
        self.blocks = _blocks(config, rngs)
        self.norm = vit.layer_norm(config.width, config.eps, rngs)
        self.project = Linear(config.width, projection, use_bias=False, rngs=rngs)
        self.eos_id = config.eos_id

    def __call__(self, tokens):
        """tokens `[B, M]` int, M at most the config's length -> embeddings `[B, P]`."""
        x = self.embedding[...][tokens] + self.positions[...][: tokens.shape[1]]
        x = self.norm(vit.run(self.blocks, x, causal=True))
        end = jnp.argmax(tokens if self.eos_id == OLD_EOS else tokens == self.eos_id, axis=1)  # the first of them
        return self.project(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class VisionTower(nnx.Module):
    """Transformer of patches behind a class token, whose state is the picture's."""

    def __init__(self, config: VisionTowerConfig, projection: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        D, patches = config.width, (config.image_size // config.patch_size) ** 2
        self.patch_embed = Linear(3 * config.patch_size**2, D, use_bias=False, rngs=rngs)
        self.class_embedding = nnx.Param(init(rngs.params(), (D,)))
        self.positions = nnx.Param(init(rngs.params(), (1 + patches, D)))
        self.norm_in, self.norm_out = (vit.layer_norm(D, config.eps, rngs) for _ in range(2))
        self.blocks = _blocks(config, rngs)
        self.project = Linear(D, projection, use_bias=False, rngs=rngs)
        self.patch_size = config.patch_size

    def __call__(self, pictures):
        """Normalised pictures `[B, H, W, 3]`, of the config's size -> embeddings `[B, P]`."""
        p = self.patch_size
        x = self.patch_embed(einops.rearrange(pictures, "b (h ph) (w pw) c -> b (h w) (ph pw c)", ph=p, pw=p))
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        x = self.norm_in(jnp.concatenate([first, x], axis=1) + self.positions[...])
        return self.project(self.norm_out(vit.run(self.blocks, x)[:, 0]))


class CLIP(nnx.Module):
    """Both towers."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.text = TextTower(config.text, config.projection, rngs)
        self.vision = VisionTower(config.vision, config.projection, rngs)


def names(config: CLIPConfig) -> list[Name]:
    """The tensors of `CLIPModel`; `pre_layrnorm` is spelt as they spell it."""
    p = config.vision.patch_size
    made = [
        Name("text_model.embeddings.token_embedding.weight", "text/embedding"),
        Name("text_model.embeddings.position_embedding.weight", "text/positions"),
        Name("text_projection.weight", "text/project/kernel", MATRIX),
        Name("vision_model.embeddings.class_embedding", "vision/class_embedding"),
        Name("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        Name("vision_model.embeddings.patch_embedding.weight", "vision/patch_embed/kernel",
             "(ph pw c) d -> d c ph pw", axes=(("ph", p), ("pw", p), ("c", 3))),
        Name("visual_projection.weight", "vision/project/kernel", MATRIX),
    ]  # fmt: skip
    made += vit.norm_names("text_model.final_layer_norm", "text/norm")
    made += vit.norm_names("vision_model.pre_layrnorm", "vision/norm_in")
    made += vit.norm_names("vision_model.post_layernorm", "vision/norm_out")
    for tower, depth in (("text", config.text.num_layers), ("vision", config.vision.num_layers)):
        for i in range(depth):
            layer, ours = f"{tower}_model.encoder.layers.{i}", f"{tower}/blocks"
            for part, letter in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
                made += vit.linear_names(f"{layer}.self_attn.{part}", f"{ours}/{letter}", i)
            made += vit.linear_names(f"{layer}.mlp.fc1", f"{ours}/mlp_in", i)
            made += vit.linear_names(f"{layer}.mlp.fc2", f"{ours}/mlp_out", i)
            made += vit.norm_names(f"{layer}.layer_norm1", f"{ours}/norm1", i)
            made += vit.norm_names(f"{layer}.layer_norm2", f"{ours}/norm2", i)
    return made


def read_config(path) -> CLIPConfig:
    """Config of a CLIP from its config.json. Raises UserError where it is of something else."""
    there = read_json(path)
    if there.get("model_type") != "clip":
        raise UserError(f"{path}: model_type {there.get('model_type')!r} is not clip: {REMEDY}")
    towers = []
    for part, cls, table, defaults in (("text", TextTowerConfig, TEXT_NAMES, TEXT_DEFAULTS),
                                       ("vision", VisionTowerConfig, VISION_NAMES, VISION_DEFAULTS)):  # fmt: skip
        section, older = (there.get(f"{part}_config{end}") or {} for end in ("", "_dict"))
        if not isinstance(section, dict) or not isinstance(older, dict):
            raise UserError(f"{path}: {part}_config holds no settings: not the config of a CLIP")
        section |= older  # of files from before transformers 4.27, which says it twice
        config = cls(**vit.fields(f"{path}, {part}_config", section, table, defaults))
        vit.check_sizes(f"{path}, {part}_config", width=config.width, num_heads=config.num_heads,
                        hidden_act=config.activation, image_size=getattr(config, "image_size", 1),
                        patch_size=getattr(config, "patch_size", 1))  # fmt: skip
        towers.append(config)
    return CLIPConfig(*towers, **vit.fields(path, there, dict(projection_dim="projection"), dict(projection_dim=512)))


@dataclasses.dataclass(frozen=True)
class CLIPScore:
    """The score with its weights.

    Attributes:
        config; params: nested dict. tokenizer: of `tokenizers`. mean, std: that pictures in [0, 1] are normalised with.
        identity: hash of all.
    """

    config: CLIPConfig
    params: dict
    tokenizer: tokenizers.Tokenizer
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def load(cls, path):
        """From a local folder.

        Raises:
            UserError: there is none, it is of another model, its tensors do not fit its config or its tokenizer is
                missing or another model's; no pickle is opened.
        """
        folder = vit.folder_of(path, "CLIP", REMEDY)
        files = {key: file for key, file in tensor_files(folder, TEXT_WEIGHTS).items() if key not in UNUSED}
        config = read_config(folder / "config.json")
        check_depth(folder, config.text.num_layers + config.vision.num_layers, files)
        params = load(open_params(folder, files, names(config), abstract(CLIP, config)[1]))
        return cls(config, params, _tokenizer(folder, config.text), *vit.normalization(folder, MEAN, STD))

    @functools.cached_property
    def identity(self) -> str:
        described = self.config, self.mean.tolist(), self.std.tolist(), self.tokenizer.to_str()
        return vit.weights_hash(described, self.params)

    def tokens(self, caption: str) -> tuple[np.ndarray, bool]:
        """Numbers of a caption, int32 `[M]`, padded with 0; and whether it was too long and is cut, before its end."""
        ids, length = self.tokenizer.encode(caption).ids, self.config.text.length
        cut = [*ids[: length - 1], ids[-1]] if len(ids) > length else ids
        return np.pad(np.array(cut, np.int32), (0, length - len(cut))), len(ids) > length

    def embed_texts(self, captions) -> np.ndarray:
        """Unit vectors float32 `[n, P]` of captions."""
        rows = [self.tokens(caption)[0] for caption in captions]
        return self._embed(rows, self._text)

    def embed_frames(self, video) -> np.ndarray:
        """Unit vectors float32 `[F, P]` of frames of a video uint8 `[T, H, W, 3]`: FRAMES of them, spread evenly, or
        all; scaled, and cut to their middle square."""
        frames = video if len(video) <= FRAMES else vit.spread_frames(video, FRAMES)
        return self._embed(vit.pictures(frames, self.config.vision.image_size, Image.Resampling.BICUBIC), self._vision)

    def _embed(self, items, network):
        if not len(items):
            return np.empty((0, self.config.projection), np.float32)
        made = [np.asarray(network(self.params, batch))[:count] for batch, count in
                vit.batches(items, min(BATCH, len(items)))]  # fmt: skip
        made = np.concatenate(made)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    @functools.cached_property
    def _text(self):
        graphdef = abstract(CLIP, self.config)[0]
        return jax.jit(lambda params, tokens: nnx.merge(graphdef, params).text(tokens))

    @functools.cached_property
    def _vision(self):
        graphdef = abstract(CLIP, self.config)[0]
        return jax.jit(lambda params, x: nnx.merge(graphdef, params).vision(vit.normalized(x, self.mean, self.std)))


def clip_score(frames, text) -> float:
    """100 x mean cosine of a video's frames and its prompt (Hessel et al. 2021, without its factor and its floor).

    frames: unit vectors `[F, P]`; text: unit vector `[P]`.
    """
    return float(100 * np.mean(frames @ text, dtype=np.float64))


def frame_consistency(frames) -> float | None:
    """100 x mean cosine of neighbouring frames, unit vectors `[F, P]`; None for one frame."""
    return float(100 * np.mean(np.sum(frames[1:] * frames[:-1], axis=1), dtype=np.float64)) if len(frames) > 1 else None


def _tokenizer(folder, config: TextTowerConfig):
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json: download it from where the model is, or write it with "
                        "transformers' CLIPTokenizerFast.from_pretrained(...).save_pretrained(...)")  # fmt: skip
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{path} is no tokenizer ({' '.join(str(error).split())}): copy it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a prompt that spells "<|endoftext|>" is text, not an end
    ids = tokenizer.encode("").ids
    end = tokenizer.get_vocab_size() - 1 if config.eos_id == OLD_EOS else config.eos_id
    if tokenizer.get_vocab_size() > config.vocab_size or len(ids) != 2 or ids[-1] != end:
        raise UserError(f"{path} is not this CLIP's tokenizer: its {tokenizer.get_vocab_size()} tokens and the "
                        f"marks {ids} of an empty text do not fit {config.vocab_size} embeddings and the end "
                        f"{end}")  # fmt: skip
    return tokenizer
