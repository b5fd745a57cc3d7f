"""What is given stays as it is and is all that a request sees of it; requests do not know what they are packed with."""

import numpy as np
import pytest
from random_params import random_params

from data_pipelines.text_tokens import Tokenizer
from sorax.dit import DiT, DiTConfig
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.generate import Generator, Request, given_frames
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig

VAE_CONFIG = VAEConfig(4, (1, 2), 1, 3, (True,), pixel_patch=2)  # 2 x 4 x 4
DIT_CONFIG = DiTConfig(
    in_channels=3, out_channels=3, patch_size=(1, 2, 2), num_layers=2, num_heads=2, head_dim=12, ffn_dim=32,
    text_dim=16, freq_dim=16,
)  # fmt: skip
TEXT_CONFIG = TextConfig(vocab_size=384, width=16, num_layers=1, num_heads=2, head_dim=8, ffn_dim=32)
SHAPE = (5, 16, 24)
SETTINGS = dict(num_steps=3, guidance_scale=2.0, solver="unipc")


@pytest.fixture(scope="module")
def generator():
    (dit, text, vae) = (random_params(cls, config)[1] for cls, config in
                        ((DiT, DIT_CONFIG), (TextEncoder, TEXT_CONFIG), (VAE, VAE_CONFIG)))  # fmt: skip
    return Generator(DIT_CONFIG, dit, TEXT_CONFIG, text, Tokenizer.of_bytes(), Codec(VAE_CONFIG, vae))


def clip(num_frames=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *SHAPE[1:], 3), dtype=np.uint8)


def test_what_is_given_is_in_the_result_bit_for_bit(generator):
    mask, latents = given_frames(generator.codec, {0: clip(), 2: clip(seed=1)}, *SHAPE)
    assert mask.any((1, 2)).tolist() == [True, False, True]
    request = Request("a red circle", *SHAPE, given=(mask, latents))
    made = generator.latents([request], **SETTINGS)[0]
    np.testing.assert_array_equal(made[mask], latents[mask])
    np.testing.assert_array_equal(latents[0], generator.codec.encode([clip()])[0][0])


def test_what_is_given_moves_the_rest_and_what_lies_under_the_mask_does_not(generator):
    mask, latents = given_frames(generator.codec, {0: clip()}, *SHAPE)
    elsewhere = np.where(mask[..., None], latents, 7.0)
    others = np.where(mask[..., None], latents + 1, 0.0)
    made = [generator.latents([Request("x", *SHAPE, given=(mask, given))], **SETTINGS)[0]
            for given in (latents, elsewhere, others)]  # fmt: skip
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2])[~mask].max() > 1e-3
    noise = np.asarray(made[0]) * 0  # nor does the noise where something is given
    two = [generator.latents([Request("x", *SHAPE, given=(mask, latents), noise=n)], **SETTINGS)[0]
           for n in (noise, np.where(mask[..., None], 3.0, noise))]  # fmt: skip
    np.testing.assert_array_equal(*two)


def test_requests_with_and_without_something_given_are_packed_as_if_alone(generator):
    """To 1e-5 of the largest: rows of other lengths sum in another order."""
    patch = np.zeros((3, 4, 6), bool)
    patch[:, :2, 2:4] = True  # in space, through time
    requests = [
        Request("a", *SHAPE, seed=1), Request("a long prompt", 1, 16, 16, seed=2),
        Request("b", *SHAPE, seed=3, given=given_frames(generator.codec, {0: clip(3)}, *SHAPE)),
        Request("c", *SHAPE, seed=4, given=(patch, generator.codec.encode([clip(5)])[0])),
    ]  # fmt: skip
    together = generator.latents(requests, **SETTINGS)
    for request, made in zip(requests, together):
        alone = generator.latents([request], **SETTINGS)[0]
        np.testing.assert_allclose(made, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_what_cannot_be_given_is_refused(generator):
    codec = generator.codec
    with pytest.raises(UserError, match="24x16 pixels, the video 16x16: scale it"):
        given_frames(codec, {0: clip()}, 5, 16, 16)
    with pytest.raises(UserError, match="latent frames 2 to 3 of 3, which are not there"):
        given_frames(codec, {2: clip(3)}, *SHAPE)
    with pytest.raises(UserError, match="given twice"):
        given_frames(codec, {0: clip(3), 1: clip()}, *SHAPE)
    mask, latents = given_frames(codec, {0: clip()}, *SHAPE)
    part = mask.copy()
    part[1, 0, 0] = True
    for given, message in (
        ((mask[:1], latents), "make the mask"), ((mask, latents[..., :1]), "make the mask"),
        ((mask, latents * np.nan), "NaN"), ((part, latents), "a patch of .* is given in part"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            generator.latents([Request("x", *SHAPE, given=given)], **SETTINGS)
