"""One device and eight compute the same, and what is said to be split is split."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from random_params import assert_close, random_params

from sorax import config as config_lib
from sorax import objectives, sharding
from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError
from sorax.functional import abstract
from sorax.optim import OptimConfig, make_tx
from sorax.text import TextConfig, TextEncoder
from sorax.train import TrainState, make_step
from sorax.vae import VAE, VAEConfig

QUICKSTART = str(pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py")
TINY = (
    "model.num_layers=2", "model.num_heads=4", "model.head_dim=6", "model.ffn_dim=32", "model.text_dim=16",
    "model.freq_dim=16", "text.width=16", "text.num_layers=1", "text.num_heads=2", "text.head_dim=8", "text.ffn_dim=32",
    "vae.model.base_width=4", "data.world.num_samples=32", "data.val_samples=2", "data.batch=8", "data.max_segments=4",
    "train.unroll=False",
)  # fmt: skip
MESHES = (dict(data=2, fsdp=4), dict(data=1, fsdp=8), dict(data=1, fsdp=2, context=2, tensor=2))
# Adam divides by the size of the gradient: a large eps keeps it from blowing up the rounding of a gradient near zero.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-3, clip_norm=1.0)
STEPS = 2


def one_device():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def run_steps(objective, params, batch, mesh):
    """(sums of each step, state) after a few optimizer steps on a mesh, placed as `sorax.train` places them."""
    tx = make_tx({"": OPTIM}, 10)
    state = TrainState(np.int32(0), params, params, tx.init(params), jax.random.key_data(jax.random.key(1)))
    places = sharding.shardings_for(state, mesh)
    state = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), state, places)
    step = jax.jit(make_step(objective, tx, 0.9, 1), in_shardings=(places, sharding.batch_sharding(mesh), None),
                   out_shardings=(places, sharding.replicated(mesh)))  # fmt: skip
    history = []
    for _ in range(STEPS):
        state, sums = step(state, sharding.put_batch(batch, mesh), {})
        history.append(jax.device_get(sums))
    return history, state


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """mesh -> the real objective of a tiny DiT; its parameters, one batch of 8 rows, and the result on one device."""
    config = config_lib.load_config(QUICKSTART, TINY)
    config.data.world.shapes = ((9, 32, 32), (1, 32, 32))
    vae_config = config_lib.build(VAEConfig, config.vae.model, "model")
    vae = vae_config, random_params(VAE, vae_config)[1], "random"
    folder = str(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:  # sharding asks nothing of a trained VAE
        patch.setattr(objectives, "prepare_vae", lambda *_: vae)
        meshes = [one_device(), *(sharding.make_mesh(**sizes) for sizes in MESHES)]
        made = [objectives.dit_objective(config, folder, mesh) for mesh in meshes]
    batch = next(made[1].batches(0))
    shapes = jax.eval_shape(made[0].init, jax.random.key(0))
    model = config_lib.build(DiTConfig, config.model, "model")
    text = config_lib.build(TextConfig, config.text, "text")
    params = dict(dit=random_params(DiT, model)[1], text=random_params(TextEncoder, text)[1])
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    on = dict(zip(("one", *(tuple(sizes.items()) for sizes in MESHES)), zip(made, meshes)))
    return functools.cache(lambda name: run_steps(on[name][0], params, batch, on[name][1]))


each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))


@each_mesh
def test_eight_devices_equal_one(task, sizes):
    """Loss, its bins and gradient norm of each step, and all of the state: <= 1e-5 of the largest value."""
    (expected, state_one), (found, state) = task("one"), task(tuple(sizes.items()))
    assert expected[1]["loss"][0] != expected[0]["loss"][0]
    for a, b in zip(found, expected):
        assert_close(a, b)
    assert_close(state.params, state_one.params)
    assert_close(state.ema_params, state_one.ema_params)
    # A moment that is nearly zero everywhere has no size of its own to compare with: take that of all together.
    moments, moments_one = (jax.tree.leaves(jax.device_get(s.opt_state)) for s in (state, state_one))
    largest = max(np.abs(x).max() for x in moments_one if x.dtype == np.float32)
    assert all(np.abs(a - b).max() <= 1e-5 * largest for a, b in zip(moments, moments_one))


@each_mesh
def test_parameters_and_optimizer_are_really_split(task, sizes):
    _, state = task(tuple(sizes.items()))
    f, t = sizes["fsdp"] * sizes.get("context", 1), sizes.get("tensor", 1)
    L, D, F, V = 2, 24, 32, 16  # layers, width, MLP, text width
    P = 16 * config_lib.load_config(QUICKSTART).model.in_channels  # a patch of 4 x 4
    expected = {
        "dit/blocks/self_attention/q/kernel": (L, D // f, D // t),
        "dit/blocks/self_attention/o/kernel": (L, D // t, D // f),
        "dit/blocks/mlp_in/kernel": (L, D // f, F // t),
        "dit/blocks/mlp_out/kernel": (L, F // t, D // f),
        "dit/patch_embed/kernel": (P, D // f),
        "dit/proj_out/kernel": (D // f, P),
        "dit/blocks/norm_scale": (L, D),
        "text/embedding": (512, V // f // t),
    }

    def shards(tree):
        """Path -> shape that the first device holds."""
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {sharding.path_string(path): x.addressable_shards[0].data.shape for path, x in leaves}

    held = shards(state)
    for path, shape in expected.items():
        copies = {name: found for name, found in held.items() if name.endswith(path)}
        assert len(copies) == 4, f"{path}: parameters, EMA and Adam's two moments, found {sorted(copies)}"
        assert set(copies.values()) == {shape}, copies


def size_on_a_device(tree, mesh):
    places = sharding.shardings_for(tree, mesh)
    return sum(np.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(places)))


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
@pytest.mark.parametrize(
    "cls, config",
    [(DiT, DiTConfig(num_layers=40, num_heads=40, ffn_dim=13824)), (VAE, VAEConfig())],
    ids=["dit", "vae"],
)
def test_a_published_model_is_an_eighth_on_each_of_eight_devices(cls, config, sizes):
    """But for vectors, which are copied: at most 2 % of it; convolutions are split over fsdp alone."""
    shapes = abstract(cls, config)[1]
    total = sum(x.size for x in jax.tree.leaves(shapes))
    parts = sizes["fsdp"] if cls is VAE else 8
    assert size_on_a_device(shapes, sharding.make_mesh(**dict(data=-1) | sizes)) < total / parts * 1.02


def test_a_dimension_that_does_not_divide_is_left_whole():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    assert tuple(sharding.spec_for("dit/blocks/self_attention/q/kernel", (2, 24, 25), mesh)) == (None, "fsdp", None)


def test_rows_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
    batch = sharding.put_batch(dict(tokens=np.arange(8 * 6).reshape(8, 6)), mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 6)
    np.testing.assert_array_equal(batch["tokens"], np.arange(8 * 6).reshape(8, 6))


def test_one_axis_may_take_what_the_others_leave():
    assert dict(sharding.make_mesh(data=-1, fsdp=2).shape) == dict(data=4, fsdp=2, context=1, tensor=1)
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == dict(data=2, fsdp=2, context=1, tensor=2)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), r"data=3 .* does not cover the 8 device\(s\)"),
        (dict(data=-1, fsdp=3), "fsdp=3 .* does not cover"),
        (dict(data=16), "does not cover"),
        (dict(data=-1, fsdp=16), "does not cover"),
        (dict(data=-1, fsdp=-1), "at most one is -1"),
        (dict(data=0), "positive"),
        (dict(data=8, tensor=-2), "positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_words(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**sizes)
