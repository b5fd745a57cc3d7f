"""Attention that skips blocks, on every backend that runs or can be interpreted here, against the dense reference.

1e-5: float32 sums in another order; measured errors are around 1e-6.
"""

import functools
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tpu_environment
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sorax import attention_cpu, attention_cudnn, attention_gpu, attention_tpu
from sorax.attention import SMALL, attention

KERNELS = ("blocked", "splash", "triton")
B, N, M, K, A = 2, 330, 270, 2, 16
# Of two rows: a sample of one token, one without keys (the fourth), padding; one sample alone.
LENGTHS, TEXT_LENGTHS = ((130, 1, 60, 40, 50), (300,)), ((90, 30, 50, 0, 40), (260,))
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks so small that a row has many. Nothing else has these shapes, so nothing else is compiled with them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(attention_cpu, "BLOCK", 32)
    patch.setattr(attention_tpu, "BLOCK", 128)
    patch.setattr(attention_gpu, "BLOCK", 32)
    yield
    patch.undo()


def ids_of(lengths, total):
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray(np.stack([np.pad(row, (0, total - len(row))) for row in rows]), jnp.int32)


@functools.cache
def arrays(length=M):
    """q, k, v, key_bias and a weighting of the output."""
    key = functools.partial(jax.random.fold_in, jax.random.key(0))
    shapes = (B, N, K, A), (B, length, K, A), (B, length, K, A), (B, length), (B, N, K, A)
    return tuple(jax.random.normal(key(i), shape) for i, shape in enumerate(shapes))


@functools.partial(jax.jit, static_argnames=("implementation", "biased"))
def gradients(q, k, v, bias, weights, q_ids, kv_ids, implementation, biased=True):
    """(output, gradients for q, k, v and, if biased, key_bias)."""

    def weighted(q, k, v, bias):
        out = attention(q, k, v, q_ids, kv_ids, key_bias=bias if biased else None, implementation=implementation)
        return jnp.sum(jnp.where(weights == 0, 0, out * weights)), out

    grads, out = jax.grad(weighted, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    return out, grads


def assert_same(actual, expected, atol=TOLERANCE):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), actual, expected)


CROSS = ids_of(LENGTHS, N), ids_of(TEXT_LENGTHS, M)


@pytest.mark.parametrize("implementation", (*KERNELS, "auto"))
def test_a_kernel_gives_dense_cross_attention_and_its_gradient(implementation):
    assert_same(gradients(*arrays(), *CROSS, implementation), gradients(*arrays(), *CROSS, "dense"))


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_gives_dense_self_attention_in_any_order_of_segments(implementation):
    def check(ids):
        expected = gradients(*arrays(N), ids, ids, "dense", biased=False)
        assert_same(gradients(*arrays(N), ids, ids, implementation, biased=False), expected)

    rng = np.random.default_rng(0)
    check(ids_of(LENGTHS, N))
    for most in (2, 8, 100, 330):  # contiguous and ascending, of some lengths, in rows that are full or not
        cuts = [np.diff(np.unique([0, *rng.integers(1, N + 1, most)])) for _ in range(B)]
        check(ids_of(cuts, N))
    for blocks in (N, 11):  # shuffled tokens, shuffled runs of 30
        ids = rng.integers(0, 5, (B, blocks)).repeat(N // blocks, axis=1)
        check(jnp.asarray(ids, jnp.int32))


@pytest.mark.parametrize("implementation", KERNELS)
def test_nothing_leaks_between_segments(implementation):
    """Replacing one segment's queries, keys and values by huge ones moves no bit of any other segment."""
    q_ids, kv_ids = CROSS
    q, k, v, bias, weights = arrays()
    changed = [jnp.where((ids == 3)[..., None, None], 1e4 * (x + 1), x)
               for x, ids in ((q, q_ids), (k, kv_ids), (v, kv_ids))]  # fmt: skip
    out, grads = gradients(q, k, v, bias, weights, q_ids, kv_ids, implementation)
    out2, grads2 = gradients(*changed, bias, weights, q_ids, kv_ids, implementation)
    for before, after, ids in zip((out, *grads), (out2, *grads2), (q_ids, q_ids, kv_ids, kv_ids, kv_ids)):
        other = np.asarray(ids != 3)
        np.testing.assert_array_equal(before[other], after[other])
    assert not np.array_equal(out, out2)


@pytest.mark.parametrize("implementation", KERNELS)
def test_blocks_of_other_segments_and_of_padding_are_not_computed(implementation):
    """NaN in all of their queries, keys and values, which no mask after a product would hide, does not come out."""
    ids = ids_of(((128, 128, 30), (128, 128)), N)
    q, k, v, _, weights = arrays(N)
    bad = (ids != 1)[..., None, None]
    q, k, v = (jnp.where(bad, jnp.nan, x) for x in (q, k, v))
    # Weight 0: the loss does not look at what comes of the NaN.
    weights = jnp.where(bad, 0, weights)
    out, grads = gradients(q, k, v, jnp.zeros((B, N)), weights, ids, ids, implementation, biased=False)
    for x in (out, *grads[:3]):
        assert np.all(np.isfinite(x[:, :128])) and np.all(np.abs(x[:, :128]).max(axis=(2, 3)) > 0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_padding_gives_zeros(implementation):
    q_ids, kv_ids = (ids.at[1].set(0) for ids in CROSS)  # a row of nothing else
    out, (dq, dk, dv, dbias) = gradients(*arrays(), q_ids, kv_ids, implementation)
    blind = np.asarray((q_ids == 0) | (q_ids == 4))  # there is no key of the fourth segment
    for x in (out, dq):
        np.testing.assert_array_equal(x[blind], 0)
        assert np.all(np.abs(x[(q_ids != 0) & ~blind & (q_ids != 2)]).max(axis=(1, 2)) > 0)
    for x in (dk, dv, dbias):
        np.testing.assert_array_equal(x[np.asarray(kv_ids == 0)], 0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_log_n_on_a_key_counts_as_n_equal_keys(implementation):
    q, k, v, _, weights = arrays()
    few, n = 40, M - 40 + 1  # n of the last
    once = jnp.where(jnp.arange(M) < few, 1, 0)[None].repeat(B, 0)
    bias = jnp.zeros((B, M)).at[:, few - 1].set(np.log(n))
    many = [jnp.concatenate([x[:, : few - 1], x[:, few - 1 : few].repeat(n, axis=1)], axis=1) for x in (k, v)]
    q_ids, ones = jnp.ones((B, N), jnp.int32), jnp.ones((B, M), jnp.int32)
    out, _ = gradients(q, k, v, bias, weights, q_ids, once, implementation)
    expected, _ = gradients(q, *many, jnp.zeros((B, M)), weights, q_ids, ones, "dense")
    assert_same(out, expected)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16_is_as_exact_as_it_can_be(implementation):
    """Two times the spacing of bfloat16 at the largest value; as far off as dense attention in bfloat16."""
    exact = gradients(*arrays(), *CROSS, "dense")
    q, k, v, bias, weights = arrays()
    rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, grads = gradients(*rounded, bias, weights, *CROSS, implementation)
    assert out.dtype == jnp.bfloat16 and [g.dtype for g in grads] == [jnp.bfloat16] * 3 + [jnp.float32]
    for actual, expected in zip((out, *grads), (exact[0], *exact[1])):
        assert np.abs(actual.astype(jnp.float32) - expected).max() <= 2 * 2**-7 * np.abs(expected).max()


def test_it_works_in_a_scan_under_remat_and_split_over_rows_and_heads():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    rows, heads = P("rows"), P("rows", None, "heads")
    q, k, v, bias, weights = arrays()

    def loss(implementation, q, k, v, bias):
        def attend(q, k, v, bias, q_ids, kv_ids):
            return attention(q, k, v, q_ids, kv_ids, key_bias=bias, implementation=implementation)

        if implementation != "dense":
            specs = (heads, heads, heads, rows, rows, rows)
            attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
        body = jax.checkpoint(lambda x, _: (x + attend(x, k, v, bias, *CROSS), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, q, None, length=2)[0] * weights)

    grads = [jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3)))(q, k, v, bias)
             for name in ("auto", "dense")]  # fmt: skip
    assert_same(*grads)


# --- What a program is made of


def lowered(platform, implementation="auto", dtype=jnp.bfloat16, length=N, text_length=M, biased=True):
    """StableHLO of the gradient, for a platform that need not be this one."""
    shapes = (B, length, K, 64), (B, text_length, K, 64), (B, text_length, K, 64)
    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    q_ids, kv_ids = (jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (length, text_length))
    bias = jax.ShapeDtypeStruct((B, text_length), jnp.float32) if biased else None

    def loss(q, k, v, q_ids, kv_ids, bias):
        out = attention(q, k, v, q_ids, kv_ids, key_bias=bias, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, q_ids, kv_ids, bias)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_auto_takes_the_kernel_of_the_platform_that_is_compiled_for():
    calls = {p: [lowered(p).count(name) for name in ("@tpu_custom_call", "gpu.triton")] for p in ("cpu", "tpu", "cuda")}
    assert calls == dict(cpu=[0, 0], tpu=[3, 0], cuda=[0, 3])
    assert "custom_call" not in lowered("tpu", length=16, text_length=SMALL // 16)  # there is little to skip


def test_nothing_as_large_as_the_logits_is_kept_in_memory():
    def loss(q, ids):
        return jnp.sum(attention(q, q, q, ids, ids) ** 2)

    shapes = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 / 4


def test_what_cannot_be_done_is_refused():
    q, k, v, bias, _ = arrays()
    for match, settings in {
        "must be one of": dict(implementation="flash"),
        "takes no bias": dict(implementation="blocked", bias=bias[:, None, None]),
        "no key_bias": dict(implementation="cudnn", key_bias=bias),
        "not on a GPU": dict(implementation="cudnn"),
    }.items():
        with pytest.raises(ValueError, match=match):
            attention(q, k, v, *CROSS, **settings)


# --- cuDNN, which only runs on its GPUs


def test_cudnn_gets_places_and_lengths_of_segments_with_queries_and_keys():
    got = attention_cudnn.layout(*CROSS)
    for name, expected in dict(q_offsets=[[0, 130, 131, -1, 231], [0, -1, -1, -1, -1]],
                               q_seqlen=[[130, 1, 60, -1, 50], [300, -1, -1, -1, -1]],
                               kv_offsets=[[0, 90, 120, -1, 170], [0, -1, -1, -1, -1]],
                               kv_seqlen=[[90, 30, 50, -1, 40], [260, -1, -1, -1, -1]]).items():  # fmt: skip
        np.testing.assert_array_equal(got[name][:, :5], expected)
        assert np.all(got[name][:, 5:] == -1) and got[name].dtype == jnp.int32
    assert got["q_offsets"].shape[1] == got["q_seqlen"].shape[1] + 1 == attention_cudnn.MAX_SEGMENTS + 1


def test_cudnn_knows_the_rows_that_it_cannot_do():
    rows = dict(yes=[1, 1, 2, 0], full=[1, 2, 3, 3], empty=[0, 0, 0, 0], gap=[1, 0, 2, 2], back=[2, 2, 1, 0],
                twice=[1, 2, 1, 1], many=[1, 2, 3, attention_cudnn.MAX_SEGMENTS + 1])  # fmt: skip
    known = attention_cudnn.in_order(jnp.asarray(list(rows.values())))
    assert dict(zip(rows, known.tolist())) == dict(yes=1, full=1, empty=1, gap=0, back=0, twice=0, many=0)


def test_auto_takes_cudnn_where_there_is_a_gpu_for_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name, value in dict(check_cudnn_version=91000, check_compute_capability=True,
                            is_cuda_compute_capability_equal=False).items():  # fmt: skip
        monkeypatch.setattr(attention_cudnn.cudnn, name, lambda *_, value=value: value)
    text = lowered("cuda", biased=False)
    assert "@__cudnn$fmhaSoftmax(" in text and "@__cudnn$fmhaSoftmaxBackward(" in text and "triton" not in text
    for settings in (dict(), dict(biased=False, dtype=jnp.float32)):
        assert "gpu.triton" in lowered("cuda", **settings) and "cudnn" not in lowered("cuda", **settings)


# --- TPU compiler


TPU_PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from sorax.attention import attention

def loss(q, k, v, ids):
    return jnp.sum(attention(q, k, v, ids, ids).astype(jnp.float32))

for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    here = jax.sharding.SingleDeviceSharding(devices[0])
    q = jax.ShapeDtypeStruct((1, 65536, 1, 128), jnp.bfloat16, sharding=here)
    ids = jax.ShapeDtypeStruct((1, 65536), jnp.int32, sharding=here)
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q, ids).compile()
    print(name, program.as_text().count("tpu_custom_call"))
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install 'sorax[tpu]'")
def test_rows_of_65536_tokens_compile_for_tpus():
    environment = tpu_environment() | dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1",
                                           ALLOW_MULTIPLE_LIBTPU_LOAD="true")  # fmt: skip
    command = [sys.executable, "-c", TPU_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # its own process: libtpu stays
    assert done.stdout.splitlines() == ["v5e:2x2 3", "v5p:2x2x1 3", "v6e:2x2 3"], done.stderr
