"""Exported folders in diffusers and transformers themselves (needs the extra `parity`)."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.text_tokens import Tokenizer
from sorax import convert, export
from sorax.encode import Codec
from sorax.generate import Generator, Request, given_frames

WAN = pathlib.Path(__file__).parent / "fixtures" / "wan"
TOKENIZER = Tokenizer.train(["a red circle moving right", "two blue stars, both standing still"], 300)
TOKENIZERS = dict(bpe=TOKENIZER, bytes=Tokenizer.of_bytes())
CAPTIONS = (
    "a red circle moving right", "A green squirrel, déjà vu", "красный круг 🔴 赤い円 👩‍👩‍👧", "", "</s>",
    "a <pad></s>b <unk>", "  two  blue\tstars\n", "&quot;a&quot; &amp;amp; b", "red " * 30,
)  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    p = convert.read_diffusers(WAN)
    return export.Networks(p.vae_config, p.vae, p.dit_config, p.dit, p.text_config, p.text)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_exported_tokenizer_gives_our_ids(tokenizers_there, caption):
    """Called as WanPipeline calls it, on what it has cleaned."""
    tokenizer, theirs = tokenizers_there
    pipeline_wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    batch = theirs(
        [pipeline_wan.prompt_clean(caption)], padding="max_length", max_length=512, truncation=True,
        add_special_tokens=True, return_attention_mask=True, return_tensors="np",
    )  # fmt: skip
    ids = tokenizer.encode(caption)
    np.testing.assert_array_equal(batch.input_ids[0], np.pad(ids, (0, 512 - len(ids))))
    assert batch.attention_mask.sum() == len(ids)
    assert theirs.decode(ids, skip_special_tokens=True).strip() == tokenizer.decode(ids)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers_there(request, networks, tmp_path_factory):
    """One of ours, and the tokenizer of an exported folder, in transformers."""
    transformers, tokenizer = pytest.importorskip("transformers"), TOKENIZERS[request.param]
    out = export.export_diffusers(networks, tokenizer, tmp_path_factory.mktemp("tokenizer") / "out", shift=3.0)
    theirs = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 512
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert isinstance(theirs, getattr(transformers, tokenizer.hugging_face))
    return tokenizer, theirs


def generator_of(n, tokenizer=TOKENIZER):
    return Generator(n.dit_config, n.dit, n.text_config, n.text, tokenizer, Codec(n.vae_config, n.vae))


@pytest.mark.parametrize("solver, kind", [("euler", "bytes"), ("unipc", "bpe"), ("dpm++", "bpe"), ("ddim", "bytes")])
@pytest.mark.parametrize("shape", [(5, 32, 48), (1, 48, 32)], ids=str)
def test_the_exported_folder_runs_in_diffusers(networks, tmp_path, solver, kind, shape):
    """Prompt to pixels through WanPipeline as in our sampler, with a negative prompt: latents to 1e-4 of the largest,
    float32 sums in another order, pixels within 1 of 255."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    out = export.export_diffusers(networks, TOKENIZERS[kind], tmp_path / "out", shift=3.0, solver=solver)
    pipe = diffusers.WanPipeline.from_pretrained(out)
    (T, H, W), generator = shape, generator_of(networks, TOKENIZERS[kind])
    noise = np.random.default_rng(0).standard_normal((1 + (T - 1) // 4, H // 8, W // 8, 4), np.float32)
    prompt, settings = "a red circle moving right </s>", dict(guidance_scale=3.0)
    their_noise = torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy())
    options = dict(num_frames=T, height=H, width=W, num_inference_steps=4, latents=their_noise, **settings,
                   negative_prompt="blur")  # fmt: skip
    theirs = np.moveaxis(pipe(prompt, output_type="latent", **options).frames.numpy()[0], 0, -1)
    request = Request(prompt, *shape, noise=noise, negative_prompt="blur")
    ours = generator.latents([request], num_steps=4, shift=3.0, solver=solver, **settings)[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    pixels = np.asarray(pipe(prompt, output_type="np", **options).frames[0]) * 255
    assert np.abs(generator.codec.decode([ours])[0] - pixels).max() <= 1


@pytest.mark.parametrize("solver, shape", [("euler", (9, 32, 48)), ("unipc", (5, 48, 32))], ids=str)
def test_a_first_frame_is_given_as_in_diffusers(networks, tmp_path, solver, shape):
    """Image to video through WanImageToVideoPipeline, whose timesteps are per token and 0 on the given frame; the same
    folder is text to video in WanPipeline. Latents to 1e-4 of the largest, pixels within 1 of 255."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    how = dict(shift=3.0, solver=solver)
    out = export.export_diffusers(networks, TOKENIZER, tmp_path / "out", expand_timesteps=True, **how)
    assert "WanImageToVideoPipeline.from_pretrained" in (out / "README.md").read_text()
    (T, H, W), generator = shape, generator_of(networks)
    noise = np.random.default_rng(0).standard_normal((1 + (T - 1) // 4, H // 8, W // 8, 4), np.float32)
    image = np.random.default_rng(1).integers(0, 256, (H, W, 3), dtype=np.uint8)
    options = dict(prompt="a red circle", num_frames=T, height=H, width=W, num_inference_steps=4, guidance_scale=3.0,
                   latents=torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy()))  # fmt: skip
    given = given_frames(generator.codec, {0: image[None]}, *shape)
    for kind, extra, shown in (("WanImageToVideoPipeline", dict(image=Image.fromarray(image)), given),
                               ("WanPipeline", {}, None)):  # fmt: skip
        pipe = getattr(diffusers, kind).from_pretrained(out)
        theirs = np.moveaxis(pipe(**options, **extra, output_type="latent").frames.numpy()[0], 0, -1)
        request = Request("a red circle", *shape, noise=noise, given=shown)
        ours = generator.latents([request], num_steps=4, guidance_scale=3.0, **how)[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
        pixels = np.asarray(pipe(**options, **extra, output_type="np").frames[0]) * 255
        assert np.abs(generator.codec.decode([ours])[0] - pixels).max() <= 1
