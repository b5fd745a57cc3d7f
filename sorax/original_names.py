"""The names that tensors have in Wan's own repositories and in ComfyUI, from those of diffusers.

Shapes and values are the same in both; only the names differ.
"""

import dataclasses
import re

from sorax import convert
from sorax.dit import DiTConfig
from sorax.vae import VAEConfig

# diffusers -> Wan, whole parts of a dotted name. norm2 of a block is their norm3: cross-attention came later.
_DIT = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^proj_out\.", "head.head."),
)
_VAE = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
)
_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}  # fmt: skip


def dit_names(config: DiTConfig) -> list[convert.Name]:
    """`convert.dit_names` under the names of Wan's own checkpoints."""
    return [dataclasses.replace(name, theirs=_rename(name.theirs, _DIT)) for name in convert.dit_names(config)]


def vae_names(config: VAEConfig) -> list[convert.Name]:
    """`convert.vae_names` under the names of Wan's own checkpoints, of both generations."""
    return [dataclasses.replace(name, theirs=_vae(name.theirs, config)) for name in convert.vae_names(config)]


def _rename(name, table):
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def _vae(name, config):
    side, _, rest = name.partition(".")
    match = re.match(r"(?:down|up)_blocks\.(.*)$", rest)
    if not match:
        if ".mid_block.resnets." in name:
            name = _residual(name)
        return _rename(name, _VAE)
    blocks = "downsamples" if side == "encoder" else "upsamples"
    # Blocks of a stage and its resampling are one list; the first generation has one list for all stages.
    rest, resnets = match.group(1), config.num_res_blocks + (side == "decoder")
    if side == "encoder" and not config.shortcuts:
        return f"{side}.{blocks}.{_residual(rest)}"
    stage, kind, rest = rest.split(".", 2)
    if kind == "resnets":
        place, _, rest = rest.partition(".")
    else:
        place, rest = resnets, rest.removeprefix("0.") if kind == "upsamplers" else rest
    rest = _residual(f".{rest}")[1:]
    if config.shortcuts:
        return f"{side}.{blocks}.{stage}.{blocks}.{place}.{rest}"
    return f"{side}.{blocks}.{int(stage) * (resnets + 1) + int(place)}.{rest}"


def _residual(name):
    parts = "|".join(_RESIDUAL)
    return re.sub(rf"\.({parts})\.(?=weight$|bias$|gamma$)", lambda match: f".{_RESIDUAL[match.group(1)]}.", name)
