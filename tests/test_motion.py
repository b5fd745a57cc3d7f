"""Velocity error and drift: zero where motion is right, as large as what is wrong, and failures that are said."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.phyworld import GRAVITY, PhyWorld, PhyWorldConfig
from data_pipelines.world import World, WorldConfig
from sorax.motion import drift, match_by_start, velocity_error
from sorax.parser import parse_clip
from sorax.tracks import Track


def phyworld(motion, **settings):
    return PhyWorld(PhyWorldConfig(split="test", size=64, motions=(motion,), **settings))


def perfect_tracks(truth, shift=0.0):
    """Tracks that are exactly where the objects are, `shift` `[T, 2]` away; seen where they are wholly in view."""
    tracks = []
    for position, radius, visible in zip(truth.position, truth.radius, truth.visible):
        seen = visible > 0.999
        places = np.where(seen[:, None], position + shift, np.nan)
        no = np.zeros(len(seen), bool)
        tracks.append(Track("red", "circle", np.zeros(3), places, np.pi * radius**2, seen, ~seen, {}, ~seen, no, no,
                            np.zeros((len(seen), 3)), np.zeros((len(seen), 0))))  # fmt: skip
    return tracks


@pytest.mark.parametrize("motion", ["uniform", "parabola", "collision"])
def test_true_clips_have_almost_no_error_and_no_drift(motion):
    """Bounds: a fifth of PhyWorld's floors, half of it for collisions, which are short; drift within 2 %."""
    source = phyworld(motion)
    errors, drifts = [], []
    for i in range(8):
        tracks, truth = parse_clip(source[i]["video"]), source.truth(i)
        errors.append(velocity_error(tracks, truth, 3, axes=(0,)))
        drifts.append(drift(tracks, 10.0, gravity=GRAVITY if motion == "parabola" else 0.0))
    assert all(error.tracked for error in errors) and all(d.tracked for d in drifts)
    assert np.mean([error.code for error in errors]) < (0.01 if motion == "collision" else 0.002)
    assert max(d.energy for d in drifts) < 0.02 and max(d.momentum for d in drifts) < 0.02
    assert all((error.before is None) == (motion != "collision") for error in errors)


def test_a_wrong_speed_is_the_error_of_both_formulas():
    truth = phyworld("uniform").truth(1)
    away = np.zeros((32, 2))
    away[:, 0] = 0.3 / 10 * np.maximum(truth.times - 0.2, 0)  # 0.3 units / s too fast from the third frame on
    error = velocity_error(perfect_tracks(truth, away), truth, 3)
    assert error.code == pytest.approx(0.3, abs=1e-9) and error.printed == pytest.approx(0.3, abs=1e-9)


def test_jitter_costs_the_printed_formula_and_hardly_the_code():
    truth = phyworld("uniform").truth(1)
    away = np.zeros((32, 2))
    away[3:, 0] = 0.001 * (-1.0) ** np.arange(29)
    error = velocity_error(perfect_tracks(truth, away), truth, 3)
    assert error.printed == pytest.approx(0.2, rel=1e-6) and error.code < 0.01


def test_code_looks_at_its_axes_and_printed_at_both():
    truth = phyworld("parabola").truth(0)
    away = np.zeros((32, 2))
    away[:, 1] = 0.05 * truth.times**2
    error = velocity_error(perfect_tracks(truth, away), truth, 3, axes=(0,))
    assert error.code == pytest.approx(0, abs=1e-9) and error.printed > 0.5


def test_an_error_after_the_collision_is_found_after_it():
    truth = phyworld("collision").truth(0)
    (time, *_) = truth.contacts[0]
    away = np.zeros((32, 2))
    away[:, 0] = 0.02 * np.maximum(truth.times - time, 0)
    error = velocity_error(perfect_tracks(truth, away), truth, 3, axes=(0,))
    assert error.before == pytest.approx(0, abs=1e-9) and error.after == pytest.approx(0.2, abs=1e-9)
    assert error.code == pytest.approx(0.1, abs=1e-9)


def test_what_cannot_be_tracked_is_a_failure_and_what_is_out_of_view_is_not_asked():
    truth = phyworld("uniform").truth(1)
    (track,) = perfect_tracks(truth)
    gone = dataclasses.replace(track, seen=track.seen & (np.arange(32) < 12))
    elsewhere = dataclasses.replace(track, positions=track.positions + 0.4)
    for tracks, why in (([], "start"), ([gone], "lost"), ([elsewhere], "start")):
        error = velocity_error(tracks, truth, 3)
        assert error.tracked is False and error.code is None and error.printed is None and why in error.why
    hidden = dataclasses.replace(truth, visible=np.where(np.arange(32) < 4, 1.0, 0.0)[None])
    assert velocity_error([track], hidden, 3).tracked is None
    assert drift([], 10.0).tracked is False and drift([gone], 10.0, start=3, window=5).tracked


def test_objects_are_matched_by_where_they_start():
    truth = phyworld("collision").truth(0)
    first, second = perfect_tracks(truth)
    assert match_by_start([second, first], truth, 3) == [first, second]
    assert velocity_error([second, first], truth, 3) == velocity_error([first, second], truth, 3)


def test_drift_sees_lost_energy_wrong_gravity_and_lost_momentum():
    truth = phyworld("uniform").truth(1)
    slowing = np.zeros((32, 2))
    slowing[:, 0] = -0.5 * (truth.velocity[0, 0, 0] / 6) * truth.times**2  # half of the speed is lost in 3 s
    lost = drift(perfect_tracks(truth, slowing), 10.0)
    assert lost.momentum == pytest.approx(0.4, abs=0.1) and lost.energy > 0.5
    falling = perfect_tracks(phyworld("parabola").truth(0))
    assert drift(falling, 10.0, gravity=GRAVITY).energy < 1e-9 < 0.1 < drift(falling, 10.0, gravity=0.0).energy
    assert drift(falling, 10.0, gravity=GRAVITY).momentum < 1e-9


@pytest.mark.parametrize("motion, count", [("straight", 1), ("throw", 1), ("collide", 2)])
def test_the_embedded_worlds_own_motions_can_be_measured(motion, count):
    settings = dict(split="test", shapes=((17, 64, 64),), motions=(motion,), num_objects=(count, count))
    source = World(WorldConfig(**settings, backgrounds=("plain",)))
    errors = [velocity_error(parse_clip(source[i]["video"]), source.truth(i), 3) for i in range(6)]
    asked = [error for error in errors if error.tracked is not None]
    assert len(asked) >= 5 and all(error.tracked for error in asked)
    assert np.mean([error.code for error in asked if error.code is not None]) < 0.02
