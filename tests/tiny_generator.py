"""A generator of tiny networks with random parameters: 2 x 4 x 4, patches of 8 x 8 pixels; made once for all tests."""

import functools

from random_params import random_params

from data_pipelines.text_tokens import Tokenizer
from sorax.dit import DiT, DiTConfig
from sorax.encode import Codec
from sorax.generate import Generator
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig

VAE_CONFIG = VAEConfig(4, (1, 2), 1, 3, (True,), pixel_patch=2)
DIT_CONFIG = DiTConfig(
    in_channels=3, out_channels=3, patch_size=(1, 2, 2), num_layers=2, num_heads=2, head_dim=12, ffn_dim=32,
    text_dim=16, freq_dim=16,
)  # fmt: skip
TEXT_CONFIG = TextConfig(vocab_size=384, width=16, num_layers=1, num_heads=2, head_dim=8, ffn_dim=32)


@functools.cache
def tiny_generator():
    dit, text, vae = (random_params(cls, config)[1] for cls, config in
                      ((DiT, DIT_CONFIG), (TextEncoder, TEXT_CONFIG), (VAE, VAE_CONFIG)))  # fmt: skip
    return Generator(DIT_CONFIG, dit, TEXT_CONFIG, text, Tokenizer.of_bytes(), Codec(VAE_CONFIG, vae))
