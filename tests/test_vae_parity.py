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
from sorax.errors import UserError
from sorax.functional import abstract, count
from sorax.sharding import path_string
from sorax.vae import VAE, VAEConfig

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from make_vae_fixtures import CONFIGS, FRAMES, STATS, draw_weight, inputs  # noqa: E402

TOLERANCE = 1e-4  # of the largest value
REFERENCE = np.load(FIXTURES / "vae.npz")


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
    leaves = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract(VAE, ours)[1])}
    tensors = {n.theirs: draw_weight(n.theirs, n.shape(leaves)) for n in convert.vae_names(ours)}
    save_file(tensors, folder / f"{convert.WEIGHTS}.safetensors")
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_vae_equals_the_reference_in_both_generations(tmp_path, name):
    """In chunks of a latent frame, for which two programs do whatever the length; the longest of some also whole."""
    write_folder(tmp_path / "vae", CONFIGS[name])
    config, params = convert.read_vae(tmp_path / "vae")
    graphdef, _ = abstract(VAE, config)

    @jax.jit
    def whole(params, video, z):
        vae = nnx.merge(graphdef, params)
        return (*vae.encode(video), vae.decode(z))

    @jax.jit
    def chunk(params, video, z, video_frames, z_frames):
        vae = nnx.merge(graphdef, params)
        mean, logvar, video_frames = vae.encode_chunk(video, video_frames)
        decoded, z_frames = vae.decode_chunk(z, z_frames)
        return (mean, logvar, decoded), (video_frames, z_frames)

    def in_chunks(params, video, z):
        """Chunk k has the 4 frames (at first: 1) of latent k."""
        results, frames = [], (None, None)
        for k in range(z.shape[1]):
            result, frames = chunk(params, video[:, max(0, 4 * k - 3) : 4 * k + 1], z[:, k : k + 1], *frames)
            results.append(result)
        return [np.concatenate(parts, axis=1) for parts in zip(*results)]

    for frames in FRAMES:
        video, z = (np.moveaxis(x, 1, -1) for x in inputs(name, CONFIGS[name], frames))
        at_once = frames == max(FRAMES) and name.endswith("early")
        mean, logvar, decoded = (whole if at_once else in_chunks)(params, video, z)
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


def test_tensors_that_are_missing_extra_or_misshapen_are_all_listed(tmp_path):
    folder = tmp_path / "vae"
    tensors = write_folder(folder, CONFIGS["second_early"])
    del tensors["encoder.conv_in.bias"]
    tensors |= {"strange": np.ones(1, np.float32), "quant_conv.bias": np.ones(3, np.float32)}
    save_file(tensors, folder / f"{convert.WEIGHTS}.safetensors")
    with pytest.raises(UserError) as caught:
        convert.read_vae(folder)
    for part in ("lacks 1 tensor(s): encoder.conv_in.bias", "unexpected 1 tensor(s): strange",
                 "1 tensor(s) of another shape: quant_conv.bias has shape (3,), the config asks for (8,)"):  # fmt: skip
        assert part in str(caught.value)


def export_tensors(config, params):
    leaves = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    return [(n, n.to_theirs(leaves[n.ours])) for n in convert.vae_names(config)]


PUBLISHED = {  # configuration, parameters
    "2.1": (VAEConfig(), 126_892_531),
    # Wan-AI/Wan2.2-TI2V-5B: what its vae/config.json says.
    "2.2": (VAEConfig(base_width=160, decoder_base_width=256, latent_channels=48, pixel_patch=2, shortcuts=True),
            704_688_668),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_names_and_shapes_of_the_published_tensors(name):
    config, parameters = PUBLISHED[name]
    shapes = abstract(VAE, config)[1]
    leaves = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(shapes)}
    ours = {n.theirs: list(n.shape(leaves)) for n in convert.vae_names(config)}
    assert ours == json.loads((FIXTURES / "vae_tensors.json").read_text())[name]
    assert count(shapes) - 2 * config.latent_channels == parameters


def test_unread_widths_of_shortcuts_are_refused():
    with pytest.raises(ValueError, match="shortcuts cannot lead from width 8 to 16"):
        VAEConfig(base_width=4, width_multipliers=(1, 2, 2, 4), shortcuts=True)
