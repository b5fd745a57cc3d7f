"""What compiled programs send: kind, mesh axes, bytes and how often, of programs of which all that is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sorax import hlo, sharding

ROWS, WIDTH, TRIPS = 16, 32, 5
ALL = PartitionSpec(("data", "fsdp"), ("context", "tensor"))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, context=2, tensor=1)


def compiled(body, mesh, out_specs=ALL):
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=ALL, out_specs=out_specs, check_vma=False))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, ALL))
    return program.lower(x).compile().as_text()


def scattered(x):
    part = jax.lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True)
    return jnp.concatenate([part, part])


def exchanged(x):
    return jax.lax.all_to_all(x, "context", 0, 1, tiled=True).reshape(x.shape)


HELD = ROWS * WIDTH * 4 / 8  # bytes of a device
CASES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), ("fsdp",), 2 * HELD / 2),
    "all-reduce of two axes": (lambda x: jax.lax.psum(x, ("data", "context")), ("data", "context"), 2 * HELD * 3 / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "data").sum(0), ("data",), HELD),
    "reduce-scatter": (scattered, ("data",), HELD / 2),
    "all-to-all": (exchanged, ("context",), HELD / 2),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "context", [(0, 1), (1, 0)]), ("context",), HELD),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_communication_is_found_with_its_axes_and_bytes(mesh, case):
    function, axes, sent = CASES[case]
    (found,) = hlo.collectives(compiled(function, mesh), dict(mesh.shape))
    assert (found.kind, found.axes, found.sent, found.times) == (case.split(" ")[0], axes, sent, 1)


def test_a_loop_communicates_as_often_as_it_runs(mesh):
    def body(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None), x, None, length=TRIPS)[0]

    text = compiled(body, mesh)
    (found,) = hlo.collectives(text, dict(mesh.shape))
    assert found.times == TRIPS and found.total == TRIPS * HELD
    assert [loop.trips for loop in hlo.loops(text)] == [TRIPS]
    assert hlo.by_kind_and_axes([found, found]) == {("all-reduce", ("fsdp",)): (2 * TRIPS, 2 * TRIPS * HELD)}


def test_nested_loops_multiply(mesh):
    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "data")), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0], None

    text = compiled(lambda x: jax.lax.scan(outer, x, None, length=TRIPS)[0], mesh)
    assert [c.times for c in hlo.collectives(text, dict(mesh.shape))] == [3 * TRIPS]


def test_a_program_without_communication_has_none(mesh):
    assert hlo.collectives(compiled(jnp.sin, mesh), dict(mesh.shape)) == []


# ruff: noqa: E501
# As libtpu writes it: layouts with tiles, tuples with comments, a loop whose length stands in its condition alone, a
# sum of which a part is kept in a fusion, groups as a transposed range, and a Pallas kernel, whose attributes take
# lines of their own.
TPU = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter (p: bf16[64,128]) -> bf16[32,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[32,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={32,128}
}

%body (arg: (s32[], bf16[64,128], bf16[4,32,128])) -> (s32[], bf16[64,128], bf16[4,32,128]) {
  %arg = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[4,32,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %kernel = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%x.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/while/body/splash"}
  %fusion.1 = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter
  %start = (bf16[32,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%fusion.1), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = bf16[64,128]{1,0} all-gather-done(%start)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[4,32,128]{2,1,0}) tuple(%arg, %done, %arg)
}

%condition (arg: (s32[], bf16[64,128], bf16[4,32,128])) -> pred[] {
  %length = s32[]{:T(128)} constant(4)
  %arg = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[4,32,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %length), direction=LT
}

ENTRY %main (a: (s32[], bf16[64,128], bf16[4,32,128])) -> bf16[64,128] {
  %a = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[4,32,128]{2,1,0}) parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[4,32,128]{2,1,0}) while(%a), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %out = bf16[64,128]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_what_the_compiler_of_tpus_writes_is_read():
    found = hlo.collectives(TPU, dict(data=2, fsdp=4))
    whole, part = 64 * 128 * 2, 32 * 128 * 2
    assert [(c.kind, c.axes, c.size, c.sent, c.times) for c in found] == [
        ("reduce-scatter", ("data",), 2, whole / 2, 4), ("all-gather", ("fsdp",), 4, part * 3, 4),
    ]  # fmt: skip
    (loop,) = hlo.loops(TPU)
    assert loop.trips == 4 and ("bf16", (4, 32, 128), 4 * 32 * 128 * 2) in loop.buffers


@pytest.mark.parametrize("text, expected", [
    ("f32[2,3]{1,0}", 24), ("(bf16[4]{0}, pred[8]{0})", 16), ("u32[]", 4), ("f8e4m3fn[16]{0}", 16), ("s4[8]{0}", 4),
])  # fmt: skip
def test_types_have_their_bytes(text, expected):
    assert sum(size for *_, size in hlo.parse_shapes(text)) == expected


def test_axes_of_a_group_are_those_that_its_devices_differ_in(mesh):
    axes = functools.partial(hlo._axes, shape=dict(data=2, fsdp=2, context=2))
    assert axes([[0, 1], [2, 3]]) == ("context",)
    assert axes([[0, 4], [1, 5]]) == ("data",)
    assert axes([[0, 1, 2, 3], [4, 5, 6, 7]]) == ("fsdp", "context")
    assert axes([[0], [1]]) == ()
