"""Every mesh of eight devices computes what one does, communicates what it should, and holds its share of the model."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import assert_close, random_params

from sorax import sharding
from sorax.attention import attention
from sorax.dit import REMAT, DiT, DiTConfig
from sorax.errors import UserError
from sorax.optim import OptimConfig, make_tx

SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(s) == 8]
CONFIG = DiTConfig(4, 4, (1, 1, 1), num_layers=2, num_heads=8, head_dim=8, ffn_dim=128, text_dim=32, freq_dim=32)
GRAPH, PARAMS = random_params(DiT, CONFIG)
B, N, M, D = 8, 48, 16, CONFIG.width
each_mesh = pytest.mark.parametrize("sizes", SHAPES, ids=lambda s: "x".join(map(str, s)))


def batch():
    """Rows of three samples with padding behind, no two rows alike."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(4, N - 4, (B, 3)), axis=1)
    ids = 1 + (np.arange(N) >= cuts[:, :1]) + (np.arange(N) >= cuts[:, 1:2])
    ids = np.where(np.arange(N) >= cuts[:, 2:], 0, ids).astype(np.int32)
    return dict(
        tokens=rng.standard_normal((B, N, 4)).astype(np.float32), positions=rng.integers(0, 5, (B, N, 3)), ids=ids,
        levels=rng.random((B, 4)).astype(np.float32), text=rng.standard_normal((B, M, 32)).astype(np.float32),
        text_ids=np.repeat([[1] * 5 + [2] * 5 + [3] * 5 + [0]], B, axis=0),
        bias=rng.standard_normal((B, M)).astype(np.float32),
    )  # fmt: skip


def loss_on(mesh, attention=attention, **options):
    attend, attend_text = sharding.attention_on(mesh, attention)
    options |= dict(constrain=sharding.activation_constraint(mesh), attend=attend, attend_text=attend_text)

    def loss(params, b):
        velocity = nnx.merge(GRAPH, params)(b["tokens"], b["positions"], b["ids"], b["levels"], b["ids"], b["text"],
                                            b["text_ids"], b["bias"], **options)  # fmt: skip
        return jnp.mean(jnp.square(velocity) * (b["ids"] != 0)[..., None])

    return loss


@functools.cache
def compiled(sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    places = sharding.shardings_for(PARAMS, mesh)
    program = jax.jit(jax.value_and_grad(loss_on(mesh)), in_shardings=(places, sharding.batch_sharding(mesh)),
                      out_shardings=(sharding.replicated(mesh), places))  # fmt: skip
    return program.lower(PARAMS, batch()).compile(), (places, sharding.batch_sharding(mesh))


@functools.cache
def result(sizes):
    program, places = compiled(sizes)
    return jax.device_get(program(*(jax.device_put(x, place) for x, place in zip((PARAMS, batch()), places))))


def gathered(text):
    """Shapes of the results of all-gathers."""
    return [tuple(map(int, s.split(","))) for s in re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)]


@each_mesh
def test_every_mesh_of_eight_has_the_loss_and_gradients_of_one(sizes):
    """<= 1e-5 of the largest value of each gradient."""
    assert_close(result(sizes), result((1, 1, 1, 1)))


@each_mesh
def test_activations_are_exchanged_and_summed_but_never_gathered(sizes):
    data, fsdp, context, tensor = sizes
    text = compiled(sizes)[0].as_text()
    assert not [s for s in gathered(text) if N // context in s[:-1] and s[-1] % D == 0]
    rows, heads = B // data // fsdp, CONFIG.num_heads // tensor // context
    exchanged, sums = ([line for line in text.splitlines() if re.search(rf" {name}(-start)?\(", line)]
                       for name in ("all-to-all", "all-reduce"))  # fmt: skip
    exchanged = [line for line in exchanged if "all_to_all" in line]
    if context > 1:
        # q, k, v and the result, forward and backward
        assert len(exchanged) == 8
        assert all(re.search(rf"f32\[{rows},({N}|{N // context}),{heads}", line) for line in exchanged)
    else:
        assert not exchanged
    if tensor > 1:  # the sums behind attention and MLP, and the one that RMSNorm over the whole width needs
        for shape in (rf"{rows},{N // context},{D}", rf"{rows},{N // context}(,1)?"):
            assert re.search(rf"f32\[{shape}\]", " ".join(sums))
    if fsdp > 1:  # one layer's kernels at a time: never of all layers
        kernels = [s for s in gathered(text) if s[-2:] in ((D, 128 // tensor), (128 // tensor, D))]
        assert kernels and all(np.prod(s) == D * 128 // tensor for s in kernels)


@functools.cache
def training_state():
    """Shapes of parameters and optimizer."""
    tx = make_tx({"": OptimConfig()}, 10)
    return jax.eval_shape(lambda p: (p, tx.init(p)), PARAMS)


@each_mesh
def test_parameters_and_optimizer_shrink_with_fsdp_context_and_tensor(sizes):
    _, fsdp, context, tensor = sizes
    mesh, state = sharding.make_mesh(*sizes), training_state()
    places = jax.tree.leaves(sharding.shardings_for(state, mesh))
    for (path, x), place in zip(jax.tree_util.tree_flatten_with_path(state)[0], places):
        path, held = sharding.path_string(path), np.prod(place.shard_shape(x.shape))
        parts = fsdp * context * (1 if re.search("(patch_embed|proj_out)/kernel", path) else tensor)
        if path.endswith("kernel"):
            assert held * parts == x.size, path
        else:
            assert held == x.size < 2000, path


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 2, 2, 2), (2, 2, 1, 2)], ids=str)
def test_no_device_holds_what_another_could(sizes):
    """Arguments and results are the shares; what a step needs besides is well below what one needs."""
    program, _ = compiled(sizes)
    memory, one = program.memory_analysis(), compiled((1, 1, 1, 1))[0].memory_analysis()
    vectors = sum(x.size * 4 for x in jax.tree.leaves(PARAMS) if x.ndim < 3)
    assert memory.argument_size_in_bytes <= one.argument_size_in_bytes / np.prod(sizes[1:]) + vectors + 4096 * 8
    assert memory.temp_size_in_bytes < one.temp_size_in_bytes / 2


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_what_is_recomputed_changes_nothing(remat):
    mesh = sharding.make_mesh(1, 2, 2, 2)
    places = sharding.shardings_for(PARAMS, mesh)
    program = jax.jit(jax.value_and_grad(loss_on(mesh, remat=remat)), out_shardings=(None, places),
                      in_shardings=(places, sharding.batch_sharding(mesh)))  # fmt: skip
    assert_close(jax.device_get(program(PARAMS, batch())), result((1, 1, 1, 1)))


@pytest.mark.parametrize("slices, sizes", [(2, (2, 2, 2, 1)), (4, (2, 4, 1, 1)), (2, (1, 4, 1, 2)), (8, (8, 1, 1, 1))])
def test_slices_are_joined_by_data_then_fsdp_alone(slices, sizes):
    """Devices of one slice are contiguous here: along context and tensor none of another is met."""
    mesh = sharding.make_mesh(*sizes, slices=slices)
    slice_of = np.vectorize(lambda device: device.id * slices // 8)(mesh.devices)
    assert dict(mesh.shape) == dict(zip(sharding.AXES, sizes)) and len(set(slice_of.flat)) == slices
    assert (slice_of == slice_of[:, :, :1, :1]).all()
    over_data = len({tuple(part.flat) for part in slice_of})
    assert over_data == min(slices, sizes[0])


def test_a_mesh_is_one_of_the_devices_that_are_named():
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[2:6])
    assert dict(mesh.shape) == dict(data=2, fsdp=1, context=1, tensor=2)
    assert [device.id for device in mesh.devices.flat] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sharding.make_mesh(data=1, tensor=8, slices=2), "cannot be laid over 2 slices: make config.mesh.data"),
        (lambda: sharding.make_mesh(slices=3), "slices is 3, which 8 devices cannot be cut into"),
        (lambda: sharding.check_rows(sharding.make_mesh(1, 1, 2, 4), 12, 64), "12 heads .*context=2 x tensor=4"),
        (lambda: sharding.check_rows(sharding.make_mesh(1, 1, 8, 1), 8, 60), "rows of 60 tokens .*context=8"),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(call, message):
    with pytest.raises(UserError, match=message):
        call()
