"""The world suite: right about what is right, the same at any time and on any number of devices."""

import json
import pathlib

import numpy as np
import pytest

from sorax import cli, evaluate_suite
from sorax.errors import UserError
from sorax.runs import load_run
from sorax.world_suite import Counts, frames_of, position_error

COUNTS = Counts(clips=2, prompts=2, samples=4)
SOME = ("prompts/test/short", "reliability")


@pytest.fixture(scope="module")
def report(tiny_run, tmp_path_factory):
    """(scores as returned, report folder) of the tiny run, made on one device: a program of eight compiles slowly."""
    out = tmp_path_factory.mktemp("suite") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_suite.sharding, "local_mesh", lambda: None)
        return evaluate_suite.evaluate_world(load_run(tiny_run), str(out), counts=COUNTS), out


def test_what_is_true_is_right_in_everything(report):
    parts = report[0]["parts"]
    assert len(parts) >= 10 and {"reliability", "length/4x", "prompts/heldout/detailed"} <= parts.keys()
    for name, part in parts.items():
        for metric, cell in part["rows"].get("ground_truth", {}).items():
            if cell["kind"] == "rate":
                assert cell["k"] == cell["n"], (name, metric)
    assert parts["modes/first"]["rows"]["ground_truth"]["given_psnr"]["value"] == 99
    assert parts["modes/ends"]["rows"]["ground_truth"]["position_error"]["value"] < 0.01


def test_untrained_models_are_usable_never(report):
    for part in report[0]["parts"].values():
        if "untrained" in part["rows"]:
            assert part["rows"]["untrained"]["usable"]["k"] == 0


def test_failures_stay_in_the_denominator(report):
    part = report[0]["parts"]["reliability"]
    assert part["rows"]["model"]["usable"]["n"] == COUNTS.prompts * COUNTS.samples == len(part["cases"])
    assert part["rows"]["model"]["pass@4"]["n"] == COUNTS.prompts


def test_reports_are_whole(report):
    scores, out = report
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    text = (out / "scores.md").read_text()
    assert all(part["title"] in text for part in scores["parts"].values())
    assert (out / "index.html").stat().st_size > 10_000
    for part in scores["parts"].values():
        for case in part["cases"]:
            with np.load(out / case["video"]["file"]) as file:
                assert file["videos"][case["video"]["index"]].shape[1:] == (32, 32, 3)
    assert all(reason for reason in scores["not_scored"].values())


def test_numbers_are_the_same_on_one_device_as_on_eight(tiny_run, report, tmp_path):
    run = load_run(tiny_run)
    again = evaluate_suite.evaluate_world(run, str(tmp_path), counts=COUNTS, only=SOME[:1])
    assert again["parts"] == {SOME[0]: report[0]["parts"][SOME[0]]}
    for path in (tmp_path / "samples").iterdir():
        with np.load(report[1] / "samples" / path.name) as there, np.load(path) as here:
            assert np.array_equal(there["videos"], here["videos"]), path.name
    with pytest.raises(UserError, match=r"no part 'persistence' \(the run is not trained on"):
        evaluate_suite.evaluate_world(run, str(tmp_path / "other"), only=["persistence"])


def test_a_report_is_verified_or_what_differs_is_said(tiny_run, report, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_suite.sharding, "local_mesh", lambda: None)
    options = ["evaluate", "--run", tiny_run, "--verify", str(report[1]), "--units", "2"]
    assert cli.main(options) == 0 and "every pixel and judgement is the same" in capsys.readouterr().out
    assert cli.main([*options, "--weights", "raw"]) == 2
    assert "was made by something else (checkpoint" in capsys.readouterr().err


def test_runs_on_other_data_are_refused(tiny_run, tmp_path):
    run = load_run(tiny_run)
    run.config.data.path = str(tmp_path)
    with pytest.raises(UserError, match="trained on other data"):
        evaluate_suite.evaluate_world(run, str(tmp_path / "out"))
    assert not pathlib.Path(tmp_path / "out").exists()
    with pytest.raises(UserError, match="at least 1"):
        Counts(clips=0)


def test_given_latent_frames_stand_for_their_frames():
    assert frames_of([0, 2], 2) == [0, 3, 4] and frames_of([0, 1], 4) == [0, 1, 2, 3, 4]


def test_position_errors_are_those_of_the_track_of_the_right_color():
    from data_pipelines.world import World, WorldConfig
    from sorax.parser import parse_clip

    world = World(WorldConfig(shapes=((9, 64, 64),), num_objects=(1, 1), motions=("straight",), num_samples=20))
    for i in range(20):
        truth, tracks = world.truth(i), parse_clip(world[i]["video"])
        assert position_error(tracks, truth, [0]) < 0.01
        for track in tracks:
            track.positions = track.positions + np.array([0.06, 0.08])
        assert position_error(tracks, truth, [0]) == pytest.approx(0.1, abs=0.01)
        assert position_error([], truth, [0]) is None
