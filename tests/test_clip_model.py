"""CLIP against transformers with random weights (fixtures: tests/fixtures/make_vision_fixtures.py)."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sorax import clip_model
from sorax.clip_model import CLIP, CLIPConfig, CLIPScore, TextTowerConfig, VisionTowerConfig, clip_score
from sorax.errors import UserError
from sorax.functional import abstract, count

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
REFERENCE = {k.removeprefix("clip/"): v for k, v in np.load(FIXTURES / "vision.npz").items()}
CAPTIONS = ["a red circle moving right", "", "Two BLUE stars, both still!", "the café is closed \u2605",
            "it's 12 o'clock", "a very long caption " * 8]  # fmt: skip
PICTURE_SHAPES = ((40, 53), (47, 33), (16, 16))
TOLERANCE = 1e-4


def pictures():
    """Those of the fixtures."""
    made = []
    for k, (height, width) in enumerate(PICTURE_SHAPES):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (3 + c + k) + c) * np.cos(y / (4 + c)) for c in range(3)]
        made.append((127.5 + 127.5 * np.stack(waves, -1)).round().astype(np.uint8))
    return made


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def clip():
    return CLIPScore.load(FIXTURES / "clip")


def test_tokens_equal_transformers(clip):
    for caption, ids, mask in zip(CAPTIONS, REFERENCE["ids"], REFERENCE["mask"]):
        ours, cut = clip.tokens(caption)
        np.testing.assert_array_equal(ours, np.where(mask, ids, 0))  # nothing behind the end is looked at
        assert cut == (caption == CAPTIONS[-1])


def test_texts_equal_transformers(clip):
    np.testing.assert_allclose(clip.embed_texts(CAPTIONS), unit(REFERENCE["text"]), atol=TOLERANCE)


def test_pictures_equal_transformers_from_the_file_to_the_embedding(clip):
    for picture, pixels, embedding in zip(pictures(), REFERENCE["pixels"], REFERENCE["pictures"]):
        seen = clip_model.vit.pictures(picture[None], 24, clip_model.Image.Resampling.BICUBIC)[0] / np.float32(255)
        np.testing.assert_allclose((seen - clip.mean) / clip.std, np.moveaxis(pixels, 0, -1), atol=1e-5)
        np.testing.assert_allclose(clip.embed_frames(picture[None])[0], unit(embedding), atol=TOLERANCE)


def test_the_score_is_the_mean_cosine_over_frames(clip):
    text = clip.embed_texts(CAPTIONS[:1])[0]
    cosines = []
    for picture, row in zip(pictures(), REFERENCE["logits"]):
        frames = clip.embed_frames(picture[None])
        assert clip_score(frames, text) == pytest.approx(100 * row[0], abs=100 * TOLERANCE)
        cosines.append(row[0])
    every = np.concatenate([clip.embed_frames(picture[None]) for picture in pictures()])
    assert clip_score(every, text) == pytest.approx(100 * np.mean(cosines), abs=100 * TOLERANCE)


def test_frames_are_spread_over_a_long_video(clip):
    frames = np.arange(61, dtype=np.uint8)[:, None, None, None] * np.ones((1, 24, 24, 3), np.uint8)
    made = clip.embed_frames(frames)
    assert len(made) == clip_model.FRAMES
    np.testing.assert_allclose(made[[0, -1]], clip.embed_frames(frames[[0, 60]]), atol=1e-6)
    still = clip.embed_frames(frames[:1].repeat(3, 0))
    assert clip_model.frame_consistency(still) == pytest.approx(100)
    assert clip_model.frame_consistency(made) < 99.999
    assert clip_model.frame_consistency(made[:1]) is None


def test_published_sizes_have_their_number_of_parameters():
    """151.3 M of ViT-B/32, without the scale of its logits; at no memory."""
    text, vision = TextTowerConfig(512, 12, 8, 2048), VisionTowerConfig(768, 12, 12, 3072)
    assert count(abstract(CLIP, CLIPConfig(text, vision))[1]) == 151_277_313 - 1


def changed(tmp_path, tensors=None, drop=(), text=None, **settings):
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURES / "clip", folder)
    there = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in (there | (tensors or {})).items() if k not in drop}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text or {}
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_configs_from_before_ends_were_put_right_give_the_same(clip, tmp_path):
    """Their eos_token_id is 2, and the end is the token of the largest number; they have tables of positions too."""
    tables = {"text_model.embeddings.position_ids": np.arange(24)[None]}
    old = CLIPScore.load(changed(tmp_path, tables, text=dict(eos_token_id=2)))
    assert old.config.text.eos_id == 2
    np.testing.assert_allclose(old.embed_texts(CAPTIONS), clip.embed_texts(CAPTIONS), atol=1e-6)


def test_a_prompt_that_spells_the_end_is_text(clip):
    ids = clip.tokens("a <|endoftext|> b")[0]
    assert (ids == clip.config.text.eos_id).sum() == 1


def test_what_does_not_fit_is_named(tmp_path):
    name = "vision_model.pre_layrnorm.weight"
    cases = [
        (dict(drop=[name]), rf"lacks 1 tensor\(s\): {name}"),
        (dict(tensors={name: np.ones(3, np.float32)}), rf"{name} has shape \(3,\), the config asks for \(20,\)"),
        (dict(tensors={"classifier.weight": np.ones(3, np.float32)}), r"unexpected 1 tensor\(s\): classifier.weight"),
        (dict(model_type="siglip"), "'siglip' is not clip: download"),
        (dict(text=dict(eos_token_id=5)), "tokenizer.json is not this CLIP's tokenizer"),
        (dict(vision_config="x"), "vision_config holds no settings"),
        (dict(projection_dim=0), "projection_dim is 0: it must be above 0"),
    ]
    for i, (change, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            CLIPScore.load(changed(tmp_path / str(i), **change))


def test_a_folder_without_weights_or_tokenizer_says_what_to_put_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no CLIP .*download.*tokenizer.json"):
        CLIPScore.load(tmp_path)
    folder = changed(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        CLIPScore.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json: download"):
        CLIPScore.load(folder)


def test_weights_are_the_same_wherever_they_lie(clip, tmp_path):
    again = CLIPScore.load(changed(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.params, clip.params)
    assert again.identity == clip.identity
