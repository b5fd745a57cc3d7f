"""VideoMAE against transformers with random weights (fixtures: tests/fixtures/make_vision_fixtures.py).

1e-4 of the largest value of the reference is the limit set for float32 networks whose sums run in another order.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from sorax.errors import UserError
from sorax.functional import abstract, count
from sorax.videomae import VideoFeatures, VideoMAE, VideoMAEConfig, position_table

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
REFERENCE = dict(np.load(FIXTURES / "vision.npz"))
TOLERANCE = 1e-4
WEIGHTS = "model.safetensors"


def close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def video(shape=(11, 21, 30, 3)):
    """That of the fixtures."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module", params=["videomae", "videomae_tuned"])
def network(request):
    return request.param, VideoFeatures.load(FIXTURES / request.param)


def test_hidden_states_and_features_equal_transformers(network):
    name, features = network
    graphdef = abstract(VideoMAE, features.config)[0]
    pixels = jnp.asarray(np.moveaxis(REFERENCE["videomae/pixels"], 2, -1))
    hidden, pooled = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(features.params, pixels)
    close(np.asarray(hidden), REFERENCE[f"{name}/hidden"])
    close(np.asarray(pooled), REFERENCE[f"{name}/features"])


def test_a_video_of_any_shape_is_seen_as_their_processor_shows_it(network):
    name, features = network
    pixels = features.inputs(video()) / np.float32(255)
    theirs = np.moveaxis(REFERENCE["videomae/pixels"], 2, -1)[0]
    np.testing.assert_allclose((pixels - features.mean) / features.std, theirs, atol=1e-5)
    close(features([video()]), REFERENCE[f"{name}/features"])


def test_features_of_a_video_do_not_depend_on_the_others(network):
    _, features = network
    videos = [video(), video((1, 16, 16, 3)), video((30, 40, 17, 3)), video((8, 16, 20, 3)), video((9, 33, 33, 3))]
    together = features(videos)
    for one, made in zip(videos, together):
        np.testing.assert_allclose(features([one])[0], made, rtol=1e-5, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_the_position_table_is_that_of_the_paper():
    angles = 7 / 10000 ** (np.arange(3) / 3)
    wanted = np.stack([np.sin(angles), np.cos(angles)], axis=1).ravel()
    np.testing.assert_allclose(position_table(50, 6)[7], wanted, rtol=1e-6)


def test_published_sizes_have_their_number_of_parameters():
    """86.2 M of ViT-B with 16 x 16 x 2 patches, 303.9 M of ViT-L; at no memory."""
    base = count(abstract(VideoMAE, VideoMAEConfig())[1])
    large = count(abstract(VideoMAE, VideoMAEConfig(width=1024, num_layers=24, num_heads=16, ffn_dim=4096))[1])
    assert (round(base / 1e6, 1), round(large / 1e6, 1)) == (86.2, 303.9)


def changed(tmp_path, tensors=None, drop=(), **settings):
    """A copy of the fixture with other tensors or settings."""
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURES / "videomae", folder)
    there = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in (there | (tensors or {})).items() if k not in drop}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_the_encoder_of_a_pretraining_checkpoint_and_new_names_of_biases_are_read(tmp_path):
    there = load_file(FIXTURES / "videomae" / WEIGHTS)
    renamed = {f"videomae.{k}".replace("attention.q_bias", "attention.query.bias").replace(
        "attention.v_bias", "attention.value.bias"): v for k, v in there.items()}  # fmt: skip
    extra = {"mask_token": np.zeros((1, 1, 8), np.float32), "decoder.norm.weight": np.ones(8, np.float32),
             "encoder_to_decoder.weight": np.zeros((8, 24), np.float32)}  # fmt: skip
    folder = changed(tmp_path, renamed | extra, drop=there)
    ours, theirs = VideoFeatures.load(folder), VideoFeatures.load(FIXTURES / "videomae")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.identity == theirs.identity != VideoFeatures.load(FIXTURES / "videomae_tuned").identity


def test_what_does_not_fit_is_named(tmp_path):
    bias = "encoder.layer.1.output.dense.bias"
    cases = [
        (dict(drop=[bias]), rf"lacks 1 tensor\(s\): {bias}"),
        (dict(tensors={"strange": np.zeros(2, np.float32)}), r"unexpected 1 tensor\(s\): strange"),
        (dict(tensors={bias: np.zeros(5, np.float32)}), rf"{bias} has shape \(5,\), the config asks for \(24,\)"),
        (dict(tensors={bias: np.full(24, np.nan, np.float32)}), "NaN"),
        (dict(model_type="vivit"), "'vivit' is not videomae: download"),
        (dict(num_hidden_layers=10**9), "asks for 1000000000 blocks"),
        (dict(hidden_size="24"), "hidden_size is '24'"),
        (dict(hidden_act="relu"), "hidden_act 'relu' is not supported"),
        (dict(num_attention_heads=5), "no multiple of the 5 heads"),
    ]  # fmt: skip
    for i, (change, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            VideoFeatures.load(changed(tmp_path / str(i), **change))


def test_a_folder_without_weights_says_what_to_put_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no VideoMAE .*config.json is missing.*download.*model.safetensors"):
        VideoFeatures.load(tmp_path)
    folder = changed(tmp_path)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which sorax does not open"):
        VideoFeatures.load(folder)
