"""The VAE against diffusers' AutoencoderKLWan, both generations (fixtures: tests/fixtures/make_vae_fixtures.py)."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close
from safetensors.numpy import save_file

from sorax import convert, export
from sorax.functional import abstract, count
from sorax.vae import VAE, VAEConfig

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from make_vae_fixtures import CONFIGS, FRAMES, STATS, draw_weight, inputs  # noqa: E402

TOLERANCE = 1e-4  # of the largest value
REFERENCE = np.load(FIXTURES / "vae.npz")
# Wan-AI/Wan2.2-TI2V-5B: what its vae/config.json says.
WAN_22 = VAEConfig(base_width=160, decoder_base_width=256, latent_channels=48, pixel_patch=2, shortcuts=True)


def to_theirs(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def write_folder(folder, config):
    """A diffusers folder of that configuration, its weights drawn by name as those of the references were."""
    folder.mkdir()
    there = dict(_class_name="AutoencoderKLWan", **config, **STATS)
    (folder / "config.json").write_text(json.dumps(there))
    patch = config.get("patch_size", 1)
    ours = VAEConfig(
        config["base_dim"], tuple(config["dim_mult"]), config["num_res_blocks"], config["z_dim"],
        tuple(config["temperal_downsample"]), patch, config.get("decoder_base_dim"), config.get("is_residual", False),
    )  # fmt: skip
    leaves = {convert.path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract(VAE, ours)[1])}
    tensors = {n.theirs: draw_weight(n.theirs, n.shape(leaves)) for n in convert.vae_names(ours)}
    save_file(tensors, folder / f"{convert.WEIGHTS}.safetensors")
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_vae_equals_the_reference_in_both_generations(tmp_path, name):
    write_folder(tmp_path / "vae", CONFIGS[name])
    config, params = convert.read_vae(tmp_path / "vae")
    graphdef, _ = abstract(VAE, config)

    @jax.jit
    def both(params, video, z):
        vae = nnx.merge(graphdef, params)
        return (*vae.encode(video), vae.decode(z))

    for frames in FRAMES:
        video, z = inputs(name, CONFIGS[name], frames)
        mean, logvar, decoded = both(params, np.moveaxis(video, 1, -1), np.moveaxis(z, 1, -1))
        ours = dict(mean=mean, logvar=logvar, decoded=np.clip(decoded, -1, 1))  # theirs clips
        for what, value in ours.items():
            assert_close(to_theirs(value), REFERENCE[f"{name}/{frames}/{what}"], TOLERANCE)


@pytest.mark.parametrize("name", ["first_patch", "second_deep"])
def test_what_is_read_is_written_back_bit_for_bit(tmp_path, name):
    tensors = write_folder(tmp_path / "vae", CONFIGS[name])
    config, params = convert.read_vae(tmp_path / "vae")
    back = {n.theirs: v for n, v in export_tensors(config, params)}
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    there = export.vae_json(config, params)
    wanted = {k: v for k, v in CONFIGS[name].items()}
    assert {k: there[k] for k in wanted} == wanted
    for key, value in STATS.items():
        assert there[key] == value


def export_tensors(config, params):
    leaves = {convert.path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    return [(n, n.to_theirs(leaves[n.ours])) for n in convert.vae_names(config)]


def test_published_sizes_of_both_generations():
    """Names and shapes as in the published folders, of which these are the counts."""
    for config, parameters, tensors in ((VAEConfig(), 126_892_531, 194), (WAN_22, 704_688_668, 196)):
        shapes = abstract(VAE, config)[1]
        leaves = {convert.path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(shapes)}
        names = convert.vae_names(config)
        assert len(names) == tensors
        assert sum(int(np.prod(n.shape(leaves))) for n in names) == parameters
        assert count(shapes) - 2 * config.latent_channels == parameters


def test_unread_widths_of_shortcuts_are_refused():
    with pytest.raises(ValueError, match="shortcuts cannot lead from width 8 to 16"):
        VAEConfig(base_width=4, width_multipliers=(1, 2, 2, 4), shortcuts=True)
