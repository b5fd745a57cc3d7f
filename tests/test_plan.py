"""A plan: topologies in words, memory and speed of the real programs, and refusals that say what to change."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from sorax import cli, flops, hlo, plan, plan_programs, plan_report, plan_search, roofline, sharding, topology
from sorax import config as config_lib
from sorax.devices import DEVICES, GIB, device_of, peak_flops
from sorax.dit import DiTConfig
from sorax.dit_task import dit_task
from sorax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
QUICK = str(ROOT / "experiments" / "quickstart.py")
SMALL = (
    "model.num_layers=3", "model.num_heads=4", "model.ffn_dim=256", "text.num_layers=1", "data.batch=8",
    "data.row_tokens=64", "data.row_text=16", "data.max_segments=4", "optim.optimizer=adamw", "train.unroll=false",
    "train.remat=full",
)  # fmt: skip
V5E, V5P = (next(d for d in DEVICES if d.name == name) for name in ("v5e", "v5p"))
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def small(*overrides):
    return config_lib.load_config(QUICK, SMALL + overrides, plan.complete)


def here():
    """The eight CPU devices, taken for a topology: for what is counted, not compiled."""
    return topology.Topology("v5e:2x4", V5E, (2, 4), 1, tuple(jax.devices()))


# --- Topologies and devices


def test_names_of_accelerators_are_their_topologies():
    """v5p counts tensor cores, two a chip; v6e counts chips."""
    assert topology.parse("v5p-128") == topology.parse("v5p:4x4x4") == ("v5p", (4, 4, 4))
    assert topology.parse("v6e-256") == topology.parse("v6e:16x16") == ("v6e", (16, 16))
    assert topology.parse("v5e-16") == ("v5e", (4, 4))


@pytest.mark.parametrize("text, message", [
    ("v9:4x4", "unknown TPU 'v9'; known are v4, v5e, v5p, v6e, tpu7x"),
    ("h100", "unknown TPU 'h100'"),
    ("v5p:4x4", "a v5p has 3 sides, such as v5p:4x4x4"),
    ("v5e:4x4x4", "a v5e has 2 sides"),
    ("v5e:four", "chips along each side"),
    ("v5p-100", "or a name: .*v5p-128"),
    ("v5e:0x4", "has 2 sides"),
])  # fmt: skip
def test_an_impossible_topology_is_explained(text, message):
    with pytest.raises(UserError, match=message):
        topology.parse(text)


def test_without_libtpu_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sorax\[tpu\]'"):
        topology.open_topology.__wrapped__("v5e:2x2")


def test_devices_are_known_by_what_jax_calls_them():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4", "TPU7x": "tpu7x",
             "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H200": "H200",
             "NVIDIA A100-SXM4-80GB": "A100"}  # fmt: skip
    assert {kind: device_of(kind).name for kind in kinds} == kinds
    assert peak_flops("TPU v5") == 459e12 and peak_flops("cpu") is None


# --- Counting


def test_rows_hold_the_largest_video_that_fits():
    recipe = plan.read(config_lib.load_config(str(ROOT / "experiments" / "wan_14b.py")))
    task = dit_task(recipe.config, recipe.data, recipe.settings, sharding.make_mesh(data=8))
    rows = plan.usual_rows(recipe, task.model)
    assert rows == plan_programs.Rows((81, 720, 1280), 75_600, 513, 1)
    for name, video in (("wan_1_3b", (81, 480, 832)), ("wan_5b", (121, 704, 1280))):
        other = plan.read(config_lib.load_config(str(ROOT / "experiments" / f"{name}.py")))
        assert plan.usual_rows(other, task.model).video == video
    assert plan.usual_rows(recipe, task.model, (1, 720, 1280)).samples == 75_776 // 3_600
    with pytest.raises(UserError, match=r"4n \+ 1 frames, got 80"):
        plan.usual_rows(recipe, task.model, (80, 720, 1280))
    with pytest.raises(UserError, match="multiples of 16"):
        plan.usual_rows(recipe, task.model, (81, 728, 1280))
    with pytest.raises(UserError, match="a row holds 75776"):
        plan.usual_rows(recipe, task.model, (121, 720, 1280))


def test_the_world_fills_rows_with_its_own_shape():
    config = small()
    rows = plan.usual_rows(plan.read(config), dit_task(config, plan.read(config).data, plan.read(config).settings,
                                                       sharding.make_mesh(data=8)).model)  # fmt: skip
    assert rows.video == (5, 32, 32) and rows.tokens == 12 and rows.samples == 4


def fake_mesh(dims, sizes, slices=1):
    """A mesh of TPU-like devices in the order of their coordinates."""
    places = [types.SimpleNamespace(coords=list(np.unravel_index(i, dims[::-1]))[::-1], slice_index=s)
              for s in range(slices) for i in range(int(np.prod(dims)))]  # fmt: skip
    devices = np.empty(len(places), object)
    devices[:] = places
    names = tuple(sizes)
    return types.SimpleNamespace(devices=devices.reshape(tuple(sizes.values())), shape=sizes, axis_names=names)


def test_an_axis_has_the_links_of_the_sides_that_it_lies_on():
    """One side that is open: one link. Closed to a ring: both directions. Two sides: both of them. Every second chip:
    half of it."""
    mesh = fake_mesh((4, 4, 8), dict(data=8, fsdp=4, context=2, tensor=2))
    dims, link = (4, 4, 8), V5P.link_bandwidth
    speed = lambda *axes: roofline.axis_bandwidth(mesh, axes, V5P, dims)[0] / link  # noqa: E731
    assert speed("data") == 2 and speed("fsdp") == 2  # whole sides of 8 and 4, closed
    assert speed("tensor") == 1  # two neighbours
    assert speed("context") == 0.5  # two chips with one between
    assert speed("context", "tensor") == 2 and speed("data", "fsdp") == 4
    flat = fake_mesh((2, 4), dict(data=4, fsdp=2))
    assert roofline.axis_bandwidth(flat, ("data",), V5E, (2, 4)) == (V5E.link_bandwidth, 0)


def test_between_slices_goes_what_is_left_of_a_slice():
    mesh = fake_mesh((2, 2), dict(data=4, fsdp=2), slices=2)
    found = hlo.Collective("all-reduce", ("data",), 4, sent=1e9, times=3)
    (seconds,) = roofline.traffic([found], mesh, V5E, (2, 2)).values()
    inside, outside = roofline.axis_bandwidth(mesh, ("data",), V5E, (2, 2))
    assert outside == V5E.slice_bandwidth and seconds == pytest.approx(3e9 / inside + 3e9 / 2 / outside)


def test_an_estimate_by_hand():
    work = roofline.Work(affine=1e15, attention=2e15, places=1000, width=100, layers=10, head_dim=128, state=1e9,
                         weights=1e8, passes=2)  # fmt: skip
    sent = {("fsdp",): 0.3, ("fsdp", "context"): 0.2, ("context",): 0.15, ("context", "tensor"): 0.1}
    found = roofline.estimate(work, "full", V5P, 4, sent)
    peak = 4 * V5P.flops
    assert found.compute == pytest.approx(4e15 / peak / 0.7 + 2e15 * 5.5 / peak / 0.5)
    assert found.memory == pytest.approx((2e9 + 2 * 3 * 1e8) / V5P.memory_bandwidth)
    assert found.exposed == pytest.approx(0.25) and found.hidden == pytest.approx(0.5)
    assert found.step == pytest.approx(found.compute + found.elementwise + found.memory + 0.25)
    again = {remat: roofline.estimate(work, remat, V5P, 4, sent).compute for remat in ("none", "dots", "full")}
    assert again["none"] < again["dots"] < again["full"]


def test_heads_that_are_narrower_than_the_matrix_unit_waste_its_rest():
    v6e = next(d for d in DEVICES if d.name == "v6e")
    seconds = lambda device, head_dim: roofline.compute_seconds(0, device.flops, head_dim, device, 1)  # noqa: E731
    assert seconds(V5P, 128) == seconds(v6e, 256) == seconds(v6e, 512) == pytest.approx(1 / 0.5)
    assert seconds(V5P, 64) == seconds(v6e, 128) == pytest.approx(2 / 0.5)


def test_estimates_are_near_the_published_times_of_wan_14b():
    """MaxDiffusion, 720p x 81 frames: a training step with full recomputation on 4 chips of v5p, 36.0 s; a guided
    sampling step on 8 chips of v6e, 6.3 s. Within a tenth, and what is not counted here makes them longer."""
    model = plan.read(config_lib.load_config(str(ROOT / "experiments" / "wan_14b.py"))).config.model
    model = config_lib.build(DiTConfig, model, "model")
    attention = flops.dit_attention(model, [75_600], [513])
    affine = flops.dit_forward(model, [75_600], [513]) - attention
    v6e = next(d for d in DEVICES if d.name == "v6e")
    train = roofline.compute_seconds(4 * affine, 5.5 * attention, 128, V5P, 4)
    assert 0.9 * 36.0 < train < 36.0
    assert 0.9 * 6.3 < roofline.compute_seconds(2 * affine, 2 * attention, 128, v6e, 8) < 6.3


@pytest.mark.parametrize("message, wanted", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds "
     "available HBM (15.75G).", (32 * GIB, 15.75 * GIB)),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.00G of "
     "15.75G hbm. Exceeded hbm capacity by 4.25G.", (18 * GIB, 15.75 * GIB)),
])  # fmt: skip
def test_a_program_that_is_too_large_says_by_how_much(message, wanted):
    memory = plan_programs.Memory(1 * GIB, params=2 * GIB)
    assert plan_programs._wanted(message, memory) == wanted


def test_what_a_loop_keeps_is_not_its_parameters():
    """[L, ...] of parameters, whole or split, and of their gradients stand beside the activations."""
    buffers = (("bf16", (3, 64, 128), 7), ("f32", (3, 32, 128), 7), ("bf16", (3, 2, 40, 128), 100), ("s32", (), 4),
               ("bf16", (2, 40, 128), 5), ("f32", (3, 6, 128), 7))  # fmt: skip
    loops = [hlo.Loop(3, buffers), hlo.Loop(3, buffers[:1]), hlo.Loop(8, (("bf16", (8, 9, 9), 1000),))]
    assert plan_programs._kept(loops, 3, [(64, 128), (6, 128)]) == 100


def test_a_search_tries_what_is_possible_and_the_fastest_first():
    found = plan_search.candidates(small(), here())
    assert len({(c.axes, c.remat, c.row_tokens) for c in found}) == len(found) > 20
    for c in found:
        assert np.prod(c.axes) == 8 and c.batch % (c.axes[0] * c.axes[1]) == 0
        assert 4 % (c.axes[2] * c.axes[3]) == 0 and c.row_tokens % c.axes[2] == 0
        assert c.batch * c.row_tokens == 8 * 64
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)  # all of them fit
    assert {c.remat for c in found} >= {"none", "dots", "full"}


def test_a_search_keeps_the_videos_and_the_tokens_of_a_step():
    """One row of one video: half of it does not hold the video, and there is no row of two."""
    config = config_lib.load_config(str(ROOT / "experiments" / "wan_14b.py"), ["data.batch=1"], plan.complete)
    place = dataclasses.replace(here(), device=V5P)
    assert {(c.batch, c.row_tokens) for c in plan_search.candidates(config, place)} == {(1, 75_776)}


def test_a_search_puts_what_cannot_fit_behind():
    config = config_lib.load_config(str(ROOT / "experiments" / "wan_14b.py"), ["data.batch=4"], plan.complete)
    place = dataclasses.replace(here(), device=V5P)
    found = plan_search.candidates(config, place, video=(1, 720, 1280))
    fits = [c.memory <= V5P.memory for c in found]
    assert any(fits) and not all(fits) and fits == sorted(fits, reverse=True)
    split = {np.prod(c.axes[1:]) for c, fit in zip(found, fits) if fit}
    assert min(split) >= 4  # 14B parameters with their optimizer need at least three devices


# --- Refusals


@pytest.mark.parametrize("overrides, message", [
    (["mesh.data=3"], "product"),
    (["mesh.data=1", "mesh.tensor=8"], "4 heads .* context=1 x tensor=8"),
    (["data.batch=12"], "12 rows, which 8 data-parallel ranks cannot share"),
    (["train.accumulate=3"], "accumulate is 3"),
])  # fmt: skip
def test_an_impossible_mesh_is_explained(overrides, message):
    with pytest.raises(UserError, match=message):
        plan.make_plan(small(*overrides), here(), names=())


def fails(capsys, *argv):
    assert cli.main(["plan", "--config", QUICK, *argv]) == 2
    return capsys.readouterr().err


def test_bad_arguments_are_named(capsys):
    assert "known are v4" in fails(capsys, "--topology", "v3:2x2")
    if importlib.util.find_spec("libtpu"):
        assert "such as 1e12" in fails(capsys, "--topology", "v5e:2x2", "--tokens", "-5")
        assert "try v5e:1x1, v5e:2x2, v5e:2x4" in fails(capsys, "--topology", "v5e:3x5")
        assert "81x720x1280" in fails(capsys, "--topology", "v5e:2x2", "--video", "big")
        assert "train,sample,encode,decode" in fails(capsys, "--topology", "v5e:2x2", "--programs", "all")


def test_the_plan_of_a_vae_says_where_to_look():
    with pytest.raises(UserError, match="vae_tpu"):
        plan.read(config_lib.load_config(str(ROOT / "experiments" / "vae_world.py")))


def test_a_lora_has_few_parameters_and_no_gradients_of_kernels():
    """Two of three passes through affine layers, three through attention; the base need not be there."""
    lora, whole = (plan.make_plan(small(*o), here(), names=()) for o in (("lora.rank=4", "init=runs/base"), ()))
    assert {name: lora.parameters[name] for name in whole.parameters} == whole.parameters
    assert lora.parameters["lora"] == 3 * (8 * 4 * (128 + 128) + 2 * 4 * (128 + 256))  # L, r, width, ffn_dim
    assert 2 / 3 * 0.99 < lora.model_flops / whole.model_flops < 0.75


# --- The whole, compiled by libtpu


COMPILED = """
from sorax import topology
topology.prepare()
import sys
sys.path.insert(0, "tests")
from test_plan import small, check_plan
check_plan(small("mesh.data=1", "mesh.fsdp=2", "mesh.context=2"), topology.open_topology("v5e:2x2"))
"""


@needs_libtpu
def test_a_training_step_is_compiled_for_a_topology():
    """In a process of its own: libtpu reads its environment when it is loaded."""
    from conftest import tpu_environment  # here: that process imports this file, and is to keep its environment

    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env=tpu_environment())  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def check_plan(config, place):
    made = plan.make_plan(config, place, names=("train",))
    (train,) = made.programs
    memory, count = train.memory, sum(made.parameters.values())
    assert made.fits and made.mesh == dict(data=1, fsdp=2, context=2, tensor=1)
    # Vectors and what does not divide are copied on every device.
    assert 4 * count / 4 <= memory.params == memory.ema < 4 * count and 2 * memory.params <= memory.moments
    B, N, D, L = 4, 32, 128, 3  # rows and tokens of a device, width, layers
    assert memory.activations == L * B * N * D * 2  # remat=full: a layer's input, in bfloat16
    assert 0 < memory.total < memory.limit
    sent = hlo.by_kind_and_axes(train.collectives)
    assert any(kind == "all-to-all" and axes == ("context",) for kind, axes in sent)
    assert any(kind == "all-gather" and "fsdp" in axes for kind, axes in sent)
    # Four exchanges forward, again when recomputed, and backward, in every layer.
    exchanged = sum(times for (kind, _), (times, _) in sent.items() if kind == "all-to-all")
    assert exchanged >= 8 * L
    assert 0 < made.mfu < 1 and made.step.step >= made.step.best > 0
    text = "\n".join(plan_report.lines(made, 1e9))
    for part in ("fits", "activations", "all-to-all", "MFU", "chip-hours", "assumed", "useful tokens a day"):
        assert part in text, text
