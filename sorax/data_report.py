"""The settings of an experiment in the words of a data report; see `data_pipelines.report`."""

from data_pipelines.fit import Fit
from data_pipelines.packing import token_costs
from data_pipelines.report_fit import Settings
from data_pipelines.survey import MAX_CAPTIONS
from sorax import config as config_lib
from sorax.dit import DiTConfig
from sorax.dit_data import grid
from sorax.errors import UserError
from sorax.objectives import DataConfig
from sorax.runs import open_vae_config, start_tokenizer
from sorax.text import TextConfig
from sorax.vae import VAEConfig

ENDLESS = 1 << 40  # tokens: the world and other sources without a budget are taken as they are


def report_settings(config, origin: str, is_folder: bool = True) -> Settings:
    """What a report needs of an experiment, a DiT's or a VAE's.

    Args: origin: where it comes from, in words. is_folder: whether the indexed samples are files, which need a budget.
    Raises: UserError where a section is wrong or data.max_tokens is missing.
    """
    kind = config.get("kind")
    if kind not in ("dit", "vae"):
        raise UserError(f"config.kind is {kind!r}: a report is of the data of a dit or a vae")
    if "max_tokens" not in config.data and is_folder:
        raise UserError("config.data has no max_tokens, which training on files needs: add it to the experiment")
    data = config_lib.build(DataConfig, config.data, "data")
    vae = _vae_config(config)
    if kind == "vae":
        limits = dict(spatial_multiple=vae.spatial_stride, temporal_stride=vae.temporal_stride)
    else:
        model = config_lib.build(DiTConfig, config.model, "model")
        limits = grid(vae, model.patch_size)
    max_tokens = data.max_tokens if "max_tokens" in config.data else ENDLESS
    fit = Fit(max_tokens=max_tokens, fps=data.fps, max_frames=data.max_frames, min_frames=data.min_frames,
              oversize=data.oversize, **limits)  # fmt: skip
    train = config.get("train", {})
    settings = dict(fit=fit, batch=data.batch, steps=train.get("steps", 1000), seed=train.get("seed", 0),
                    tokenizer_captions=MAX_CAPTIONS, origin=origin)  # fmt: skip
    if kind == "vae":
        return Settings(rows=False, **settings)
    cost_a, cost_b = token_costs(model.width, model.ffn_dim)
    vocab_size = config_lib.build(TextConfig, config.text, "text").vocab_size
    return Settings(row_tokens=data.row_tokens, row_text=data.row_text, max_segments=data.max_segments,
                    tokenizer=start_tokenizer(config, ""), vocab_size=vocab_size, cost_a=cost_a, cost_b=cost_b,
                    **settings)  # fmt: skip


def _vae_config(config):
    """Of a VAE experiment, or of the VAE that a DiT experiment names or describes."""
    if config.kind == "vae":
        return config_lib.build(VAEConfig, config.model, "model")
    if config.vae.get("path"):
        return open_vae_config(config.vae.path)
    return config_lib.build(VAEConfig, config.vae.model, "vae.model")
