"""Suites: a unit is made once and kept, shared between processes, and made again to the bit."""

import numpy as np
import pytest

from sorax import suite
from sorax.errors import UserError


def part(made, shift=0, count=10):
    """A part of grey clips of brightness i; `made` gets the cases that are made."""

    def make(cases):
        made.extend(cases)
        return [np.full((2, 4, 4, 3), i + shift, np.uint8) for i in cases]

    def judge(video, i):
        right = int(video[0, 0, 0, 0]) % 2 == 0
        return dict(checks=dict(even=right, asked=None), values=dict(level=float(video.mean())), events=[])

    return suite.Part(
        name="greys/all", title="Greys", about="Even ones are right.", count=count, chunk=4,
        make=dict(ground_truth=make, model=make), judge=judge, caption=lambda i: f"grey {i}", seed=lambda i: i,
        metrics=dict(even="even", asked="never asked", level="level", odd="odd"), units=dict(level="of 255"), fps=8.0,
        data="none", tables=lambda js: dict(odd=suite.rate_cell([not j["checks"]["even"] for j in js])),
    )  # fmt: skip


def evaluate(out, made, **changes):
    one = part(made, **changes)
    identity = suite.begin(str(out), dict(suite="test", checkpoint="a"))
    suite.make_units([one], str(out), identity)
    return suite.collect([one], str(out), identity)["greys/all"]


def test_cells_and_cases_are_those_of_the_judgements(tmp_path):
    found = evaluate(tmp_path, [])
    model = found["rows"]["model"]
    assert (model["even"]["k"], model["even"]["n"]) == (5, 10) and model["asked"]["n"] == 0
    assert model["level"]["value"] == 4.5 and model["odd"]["value"] == 0.5 and found["headline"] == "even"
    case = found["cases"][5]
    assert case["failed"] == ["even"] and case["score"] == 0 and case["caption"] == "grey 5"
    with np.load(tmp_path / case["video"]["file"]) as file:
        assert (file["videos"][case["video"]["index"]] == 5).all() and file["fps"] == 8


def test_units_are_made_once_and_an_interrupted_evaluation_goes_on(tmp_path):
    class Stop(Exception):
        pass

    class Made(list):
        def extend(self, cases):
            if len(self) >= 8:
                raise Stop
            super().extend(cases)

    first, second = Made(), []
    with pytest.raises(Stop):
        evaluate(tmp_path, first)
    assert evaluate(tmp_path, second) == evaluate(tmp_path / "whole", [])
    assert len(first) + len(second) == 20 and not list(tmp_path.glob("samples/*.partial"))


def test_processes_share_the_units_and_leave_none(tmp_path):
    one, made = part([]), [[], []]
    identity = suite.begin(str(tmp_path), dict(suite="test"))
    for rank in range(2):
        suite.make_units([part(made[rank])], str(tmp_path), identity, rank=rank, ranks=2)
    assert sorted(made[0] + made[1]) == sorted([*range(10), *range(10)]) and all(made)
    assert suite.collect([one], str(tmp_path), identity)["greys/all"] == evaluate(tmp_path / "alone", [])


def test_what_cannot_be_made_again_is_found(tmp_path):
    evaluate(tmp_path, [])
    identity = suite.identity_of(dict(suite="test", checkpoint="a"))
    assert suite.verify_units([part([])], str(tmp_path), identity, 99, seed=1) == []
    problems = suite.verify_units([part([], shift=1)], str(tmp_path), identity, 6, seed=1)
    assert len(problems) == 12 and "videos differ" in problems[0] and "judgements differ" in problems[1]


def test_reports_of_something_else_and_damaged_ones_are_refused(tmp_path):
    evaluate(tmp_path, [])
    with pytest.raises(UserError, match="checkpoint: 'a' there, 'b' here"):
        suite.begin(str(tmp_path), dict(suite="test", checkpoint="b"))
    unit = next(tmp_path.glob("samples/*model_4.npz"))
    unit.write_bytes(unit.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{unit.name} is damaged"):
        evaluate(tmp_path, [])
    with pytest.raises(UserError, match="holds no report"):
        suite.read_described(str(tmp_path / "nowhere"))
    unit.unlink()
    made = []
    evaluate(tmp_path, made)
    assert made == [4, 5, 6, 7]
