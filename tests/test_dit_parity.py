"""The DiT against diffusers' WanTransformer3DModel, forward and backward (tests/fixtures/make_dit_fixtures.py).

Tolerance: 1e-4 of the largest value, the limit set for float32 sums in another order. Measured: 6e-5 for gradients of
key biases and of timesteps, in which large terms cancel (a shift of all keys is nothing to a softmax), 3e-5 for others.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close
from safetensors.numpy import save_file

from sorax import convert, export, read_weights
from sorax.dit import DiT, DiTConfig
from sorax.functional import abstract, count
from sorax.patchify import patchify, positions, unpatchify
from sorax.sharding import path_string
from sorax.text import MAX_SLOTS, slot_bias

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from make_dit_fixtures import CONFIGS, SAMPLES, draw_weight, inputs  # noqa: E402

TOLERANCE = 1e-4
REFERENCE = np.load(FIXTURES / "dit.npz")
PUBLISHED = json.loads((FIXTURES / "wan_tensors.json").read_text())


def write_folder(folder, name):
    """A diffusers folder of that configuration, its weights drawn by name as those of the references were."""
    folder.mkdir()
    config = dict(patch_size=(1, 2, 2), eps=1e-6) | CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(dict(_class_name="WanTransformer3DModel", **config)))
    ours = DiTConfig(**{convert.DIT_FIELDS[key]: value for key, value in config.items()})
    leaves = leaves_of(abstract(DiT, ours)[1])
    tensors = {n.theirs: draw_weight(n.theirs, n.shape(leaves)) for n in convert.dit_names(ours)}
    save_file(tensors, folder / f"{convert.WEIGHTS}.safetensors")
    return tensors


def leaves_of(params):
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def to_theirs(config, params):
    """Parameters (or gradients of them) under their names and in their layout."""
    leaves = leaves_of(params)
    layer = lambda n: leaves[n.ours] if n.layer is None else leaves[n.ours][n.layer]  # noqa: E731
    return {n.theirs: n.to_theirs(np.asarray(layer(n))) for n in convert.dit_names(config)}


def row_of(name, samples, config, like=None):
    """Fields of one row, and (latent shape, first token, first slot, level of each token) of each of its samples.

    like: a row whose lengths this one is padded to.
    """
    row = {key: [] for key in ("tokens", "positions", "segment_ids", "level_index", "weights", "text", "used")}
    text_ids, levels, places = [], [0.0], []
    for segment, sample in enumerate(samples, start=1):
        case = inputs(name, sample)
        latents, weights = (np.moveaxis(case[key][0], 0, -1) for key in ("latents", "weights"))
        tokens, caption = patchify(latents, config.patch_size), case["caption"][0]
        timesteps, index = np.unique(case["timestep"], return_inverse=True)
        unused = len(caption) < MAX_SLOTS  # one slot stands for all that the caption leaves
        place = (latents.shape[:3], sum(map(len, row["tokens"])), len(text_ids),
                 np.broadcast_to(len(levels) + index.ravel(), len(tokens)))  # fmt: skip
        places.append(place)
        row["level_index"].append(place[-1])
        levels += list(timesteps / 1000)
        row["tokens"].append(tokens)
        row["weights"].append(patchify(weights, config.patch_size))
        row["positions"].append(positions(*place[0], config.patch_size))
        row["segment_ids"].append(np.full(len(tokens), segment))
        row["text"].append(np.pad(caption, ((0, unused), (0, 0))))
        row["used"].append((np.arange(len(caption) + unused) < len(caption)).astype(np.int32))
        text_ids += [segment] * (len(caption) + unused)
    row = {key: np.concatenate(value) for key, value in row.items()}
    row = {k: v[None] for k, v in (row | dict(text_ids=np.array(text_ids), levels=np.float32(levels))).items()}
    for key, there in (like or {}).items():
        space = there.shape[1] - row[key].shape[1]
        row[key] = np.pad(row[key], ((0, 0), (0, space), *((0, 0),) * (row[key].ndim - 2)))
    return row, places


def compare(name, samples, run, params, row, places, patch_size):
    """Checks velocities and gradients of inputs of one row; returns the gradient of the parameters."""
    learned = ("tokens", "text", "levels")
    (of_params, of_arrays), velocity = run(params, {key: row[key] for key in learned}, row)
    for sample, (shape, first, slot, level) in zip(samples, places):
        there = {key: REFERENCE[f"{name}/{sample}/{key}"][0] for key in ("velocity", "latents", "caption", "timestep")}
        here = slice(first, first + len(level))
        for key, value in dict(velocity=velocity, latents=of_arrays["tokens"]).items():
            value = unpatchify(np.asarray(value[0, here]), shape, patch_size)
            assert_close(np.moveaxis(value, -1, 0), there[key], TOLERANCE)
        assert_close(of_arrays["text"][0, slot : slot + len(there["caption"])], there["caption"], TOLERANCE)
        # The tokens of a level share its gradient, and sigma is a thousandth of the timestep.
        used = np.unique(level)
        of_timestep = np.broadcast_to(there["timestep"] / (1 if there["timestep"].ndim else len(level)), len(level))
        of_levels = np.array([np.sum(of_timestep[level == k]) for k in used])
        assert_close(of_arrays["levels"][0, used] / 1000, of_levels, TOLERANCE)
    return of_params


@pytest.mark.parametrize("name", CONFIGS)
def test_dit_equals_the_reference_forward_and_backward(tmp_path, name):
    """Each sample alone, and all in one packed row: velocity, gradients of inputs and of parameters."""
    write_folder(tmp_path / "dit", name)
    config, params = convert.open_dit(tmp_path / "dit")
    params = read_weights.load(params)
    graphdef, _ = abstract(DiT, config)

    @jax.jit
    def run(params, arrays, row):
        def total(params, arrays):
            bias = slot_bias(row["used"], row["text_ids"], len(SAMPLES))
            out = nnx.merge(graphdef, params)(
                arrays["tokens"], row["positions"], row["segment_ids"], arrays["levels"], row["level_index"],
                arrays["text"], row["text_ids"], bias,
            )  # fmt: skip
            return jnp.sum(out * row["weights"]), out

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, arrays)

    row, places = row_of(name, SAMPLES, config)
    expected = {n.theirs: REFERENCE[f"{name}/params/{n.theirs}"] for n in convert.dit_names(config)}
    packed = compare(name, SAMPLES, run, params, row, places, config.patch_size)
    assert_close(to_theirs(config, packed), expected, TOLERANCE)
    alone = [compare(name, [s], run, params, *row_of(name, [s], config, row), config.patch_size) for s in SAMPLES]
    assert_close(to_theirs(config, jax.tree.map(lambda *g: sum(g), *alone)), expected, TOLERANCE)


def test_the_references_tell_timesteps_per_token_from_one_a_sample():
    for sample, spec in SAMPLES.items():
        tokens = np.prod(spec["grid"])
        assert inputs("first", sample)["timestep"].shape == (1,)
        timestep = inputs("second", sample)["timestep"]
        assert timestep.shape == (1, tokens) and np.any(timestep == 0) == bool(spec["given"])


@pytest.mark.parametrize("name", ["first_cube", "second"])
def test_what_is_read_is_written_back_bit_for_bit(tmp_path, name):
    tensors = write_folder(tmp_path / "dit", name)
    config, params = convert.open_dit(tmp_path / "dit")
    params = read_weights.load(params)
    back = to_theirs(config, params)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    there = export.dit_json(config)
    assert {key: tuple(there[key]) if key == "patch_size" else there[key] for key in CONFIGS[name]} == CONFIGS[name]


@pytest.mark.parametrize("size, number", [("1.3B", 1_418_996_800), ("14B", 14_288_491_584), ("5B", 4_999_787_712)])
def test_full_sizes_have_the_published_names_and_shapes(size, number):
    """Every tensor of diffusers' model of that size, at no memory; the counts are those of the published weights."""
    published = PUBLISHED[size]
    config = DiTConfig(**{convert.DIT_FIELDS[key]: value for key, value in published["config"].items()})
    shapes = abstract(DiT, config)[1]
    leaves = leaves_of(shapes)
    ours = {n.theirs: list(n.shape(leaves)) for n in convert.dit_names(config)}
    theirs = {}
    for key, shape in published["tensors"].items():
        layers = range(config.num_layers) if "*" in key else (0,)
        theirs |= {key.replace("*", str(layer)): shape for layer in layers}
    assert ours == theirs and len(ours) == published["number"]
    assert count(shapes) == published["count"] == number
