"""The parts of physics: what is asked of a model, how clips are judged, what is left out and why."""

import dataclasses
import types

import numpy as np
import pytest

from data_pipelines.phyworld import PhyWorld, PhyWorldConfig
from data_pipelines.world import World, WorldConfig
from sorax.errors import UserError
from sorax.physics_suite import METRICS, open_phyworld, world_physics_parts
from sorax.runs import load_run
from sorax.suite import units_of
from sorax.world_suite import Makers


@pytest.fixture(scope="module")
def makers(tiny_run):
    run = load_run(tiny_run)
    return Makers(run.generator(), run.networks, run.sampling() | dict(num_steps=2))


def parts_of(world, makers, count=2, **options):
    parts, left = world_physics_parts(world, makers, count, **options)
    return {part.name: part for part in parts}, left


def phyworld(**settings):
    return PhyWorld(PhyWorldConfig(**dict(num_frames=9, size=32) | settings))


def test_a_model_is_given_three_frames_and_continues_them(makers):
    asked = []
    recorder = types.SimpleNamespace(
        generator=makers.generator, truth=makers.truth, chunk=makers.chunk,
        model=lambda requests: dict(model=lambda cases: asked.extend(requests(cases)) or asked),
    )  # fmt: skip
    parts, left = parts_of(phyworld(), recorder)
    assert set(parts) == {f"physics/{m}/{s}" for m in ("uniform", "parabola", "collision") for s in ("test", "ood")}
    assert not left
    part = parts["physics/collision/ood"]
    part.make["model"]([1])
    (request,) = asked
    mask, latents = request.given
    np.testing.assert_array_equal(mask.any((1, 2)), [True, True, False, False, False])
    original = part.make["ground_truth"]([1])[0]
    codec = makers.generator.codec
    np.testing.assert_allclose(latents[:2], codec.encode([original])[0][:2], atol=1e-4)  # causal: of 3 frames or of 9
    assert (request.num_frames, request.seed) == (9, 1) and request.prompt == part.caption(1)


def test_truth_has_no_error_and_a_model_that_knows_nothing_is_a_failure_that_counts(makers):
    parts, _ = parts_of(phyworld(num_frames=33, size=64), makers)
    part = parts["physics/uniform/test"]
    (truth,) = part.make["ground_truth"]([1])
    judged = part.judge(truth, 1)
    assert judged["checks"] == dict(tracked=True, normal=True) and not judged["events"]
    assert judged["values"]["velocity_error"] < 0.01 and judged["values"]["energy"] < 0.05
    assert set(part.metrics) == set(METRICS) - {"before", "after"}
    still = np.repeat(truth[:1], len(truth), axis=0)
    frozen = part.judge(still, 1)
    assert frozen["values"]["velocity_error"] > 0.5 and frozen["score"] < judged["score"]
    empty = part.judge(np.full_like(truth, 12), 1)
    assert empty["checks"]["tracked"] is False and empty["values"]["velocity_error"] is None
    assert empty["score"] < judged["score"]


def test_units_of_a_run_are_made_and_judged(makers):
    world = World(WorldConfig(shapes=((7, 32, 32),), motions=("straight", "still"), extent=5.0, fps=6.0))
    parts, left = parts_of(world, makers, floor=True)
    assert set(parts) == {"physics/straight/test"}
    assert set(left) == {"physics/throw", "physics/collide", "physics/straight/ood"}
    assert "7 units" in left["physics/straight/ood"]
    units = {unit.row: unit for unit in units_of([parts["physics/straight/test"]])}
    assert set(units) == {"ground_truth", "vae", "model", "untrained"}
    videos, judgements = units["model"].make()
    assert [video.shape for video in videos] == [(7, 32, 32, 3)] * 2
    assert all({"tracked", "normal"} == set(j["checks"]) for j in judgements)


def test_what_cannot_be_asked_is_left_out_with_its_reason(makers):
    assert world_physics_parts(phyworld(num_frames=5), makers, 2)[0] == []
    codec = types.SimpleNamespace(config=dataclasses.replace(makers.generator.codec.config, width_multipliers=(1, 1, 1),
                                                             temporal_downsample=(True, True)))  # fmt: skip
    coarse = types.SimpleNamespace(generator=types.SimpleNamespace(codec=codec))
    parts, left = world_physics_parts(phyworld(), coarse, 2)
    assert parts == [] and "4" in left["physics"]


def test_phyworld_is_opened_for_its_runs_alone(tiny_run):
    run = load_run(tiny_run)
    with pytest.raises(UserError, match="not trained on PhyWorld"):
        open_phyworld(run)
