"""Comparing evaluations: intervals and tests are those of the literature, pairing is used only where it is right."""

import copy
import json
import re

import numpy as np
import pytest
from fake_scores import HOSTILE, Page, make_report, mean, rate, write_scores
from scipy import stats

from sorax import significance
from sorax.comparison import compare, text_table
from sorax.errors import UserError
from sorax.report_compare import compare_reports


def outcomes(both, only_a, only_b, neither):
    a = [1] * (both + only_a) + [0] * (only_b + neither)
    return a, [1] * both + [0] * only_a + [1] * only_b + [0] * neither


def test_intervals_of_differences_are_newcombes():
    """The examples worked out in his two papers of 1998."""
    found = significance.unpaired_rates(48, 80, 56, 70)
    assert (found["lo"], found["hi"]) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    found = significance.paired_rates(*outcomes(36, 2, 12, 0))
    assert (found["lo"], found["hi"]) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_tests_are_those_of_scipy():
    a, b = outcomes(10, 2, 12, 5)
    assert significance.paired_rates(a, b)["p"] == pytest.approx(stats.binomtest(2, 14).pvalue)
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 20), rng.normal(0.5, 2, 20)
    found, wanted = significance.paired_means(x, y), stats.ttest_rel(y, x)
    assert found["p"] == pytest.approx(wanted.pvalue)
    assert (found["lo"], found["hi"]) == pytest.approx(tuple(wanted.confidence_interval()))
    sides = [(v.mean(), v.std(ddof=1) / len(v) ** 0.5, len(v)) for v in (x, y[:12])]
    found, wanted = significance.unpaired_means(*sides[0], *sides[1]), stats.ttest_ind(y[:12], x, equal_var=False)
    assert found["p"] == pytest.approx(wanted.pvalue)
    assert (found["lo"], found["hi"]) == pytest.approx(tuple(wanted.confidence_interval()))


@pytest.mark.parametrize("n", [12, 60])
def test_intervals_hold_the_truth_19_times_in_20(n):
    rng, hits = np.random.default_rng(n), {"paired": 0, "unpaired": 0, "grouped": 0}
    draws = 300
    for _ in range(draws):
        base = rng.random(n)
        a, b = base < 0.6, np.where(rng.random(n) < 0.7, base, rng.random(n)) < 0.8
        found = significance.paired_rates(a, b)
        hits["paired"] += found["lo"] <= 0.2 <= found["hi"]
        found = significance.unpaired_rates(rng.binomial(n, 0.6), n, rng.binomial(n, 0.8), n)
        hits["unpaired"] += found["lo"] <= 0.2 <= found["hi"]
        change = np.repeat(rng.normal(0.2, 1, n), 8) + rng.normal(0, 1, 8 * n)  # 8 samples of each prompt
        found = significance.paired_means(np.zeros(8 * n), change, np.repeat(np.arange(n), 8))
        hits["grouped"] += found["lo"] <= 0.2 <= found["hi"]
    assert all(0.92 <= count / draws <= 0.99 for count in hits.values()), hits


def test_groups_of_one_are_the_plain_test_and_copies_add_nothing():
    a, b = np.zeros(9), np.array([0.1, 0.4, -0.2, 0.3, 0.5, 0.2, 0.1, 0.6, 0.0])
    plain = significance.paired_means(a, b)
    copies = significance.paired_means(np.repeat(a, 16), np.repeat(b, 16), np.repeat(np.arange(9), 16))
    for key in ("difference", "lo", "hi", "p"):
        assert significance.paired_means(a, b, list("abcdefghi"))[key] == pytest.approx(plain[key])
        assert copies[key] == pytest.approx(plain[key])


def test_holm_is_in_order_and_leaves_out_what_was_not_tested():
    assert significance.holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0] and significance.holm([None]) == [None]


def test_too_few_data_have_no_test():
    assert significance.paired_means([1.0], [2.0])["p"] is None
    assert significance.unpaired_rates(0, 0, 3, 5)["difference"] is None
    assert significance.unpaired_means(1.0, None, 5, 2.0, 0.1, 5) == dict(
        difference=1.0, lo=None, hi=None, p=None, n=10
    )
    assert significance.paired_rates([], [])["n"] == 0


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    make_report(folder / "a", n=80, seed=1, skill=0.5)
    make_report(folder / "b", n=80, seed=2, skill=0.95, run="large")
    return folder


def test_the_same_cases_are_paired_and_say_how(reports, tmp_path):
    result = compare_reports([str(reports / "a"), str(reports / "b")], str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    assert result["tests"] == 8 and set(result["methods"]) == {"McNemar", "paired t"}
    a, b = (json.loads((reports / x / "scores.json").read_text())["parts"]["physics"] for x in "ab")
    joint = result["parts"]["physics"]["metrics"]["joint"]["differences"]["B"]
    values = [[case["checks"]["joint"] for case in part["cases"]] for part in (a, b)]
    wanted = significance.paired_rates(*values)
    assert {key: joint[key] for key in wanted} == wanted and joint["paired"] and joint["verdict"] == "better"
    assert joint["p_holm"] >= joint["p"]
    direction = result["parts"]["physics"]["metrics"]["direction"]["differences"]["B"]
    assert direction["n"] == a["rows"]["model"]["direction"]["n"] < 80  # where it was asked
    error = result["parts"]["physics"]["metrics"]["error"]["differences"]["B"]
    cells = [part["rows"]["model"]["error"]["value"] for part in (a, b)]
    assert error["difference"] == pytest.approx(cells[1] - cells[0]) and error["method"] == "paired t"
    assert error["verdict"] == "better" and error["difference"] < 0  # lower is better
    counts = result["parts"]["physics"]["cases"]["B"]
    assert sum(counts.values()) == 80 and counts["only_b"] > counts["only_a"]


def edited(reports, tmp_path, change):
    """Compares a with b, b being changed in one part; returns the differences of that part."""
    scores = json.loads((reports / "b" / "scores.json").read_text())
    change(scores["parts"]["physics"])
    (tmp_path / "b").mkdir()
    write_scores(tmp_path / "b", scores)
    result, _ = compare([str(reports / "a"), str(tmp_path / "b")])
    return {name: metric["differences"]["B"] for name, metric in result["parts"]["physics"]["metrics"].items()}


def other_seeds(part):
    part["cases"][3]["seed"] = 99


def other_captions(part):
    part["cases"][3]["caption"] = "a blue star"


def other_data(part):
    part["data"] = "d1"


def fewer_cases(part):
    part["cases"].pop()


def no_values(part):
    for case in part["cases"]:
        del case["checks"], case["values"]


def another_cell(part):
    part["rows"]["model"] |= dict(joint=rate([1, 0] * 40), color=rate([1, 0] * 40), direction=rate([1] * 52),
                                  error=mean(np.linspace(0, 1, 80)))  # fmt: skip


@pytest.mark.parametrize("change, why", [
    (other_seeds, "other seeds"), (other_captions, "other captions"), (other_data, "other data"),
    (fewer_cases, "other cases"), (no_values, "no value of each case"), (another_cell, "no value of each case"),
])  # fmt: skip
def test_what_is_not_the_same_is_not_paired_and_why_is_said(reports, tmp_path, change, why):
    differences = edited(reports, tmp_path, change)
    for name, entry in differences.items():
        assert not entry["paired"] and entry["why"] == why
        assert entry["method"] == ("Welch" if name == "error" else "Fisher") and entry["p"] is not None


def test_a_metric_measured_on_other_cases_is_not_paired(reports, tmp_path):
    def unseen(part):
        part["cases"][0]["values"]["error"] = None
        part["rows"]["model"]["error"] = mean([case["values"]["error"] for case in part["cases"]])

    found = edited(reports, tmp_path, unseen)
    assert found["error"]["why"] == "counted over other cases" and found["joint"]["paired"]


def test_samples_of_one_prompt_are_not_independent(reports, tmp_path):
    folders = []
    for name in "ab":
        scores = json.loads((reports / name / "scores.json").read_text())
        for i, case in enumerate(scores["parts"]["physics"]["cases"]):
            case["group"] = i // 16
        (tmp_path / name).mkdir()
        write_scores(tmp_path / name, scores)
        folders.append(str(tmp_path / name))
    result, _ = compare(folders)
    assert {m["differences"]["B"]["method"] for m in result["parts"]["physics"]["metrics"].values()} == {"grouped t"}


def test_a_run_is_no_better_than_itself_and_several_are_compared(reports, tmp_path):
    make_report(tmp_path / "c", n=80, seed=1, skill=0.5, run=HOSTILE)
    result = compare_reports([str(reports / "a"), str(tmp_path / "c"), str(reports / "b")], str(tmp_path / "out"))
    for part in result["parts"].values():
        for metric in part["metrics"].values():
            assert metric["differences"]["B"] | dict(difference=0.0, p=1.0) == metric["differences"]["B"]
    verdicts = {m["differences"]["B"]["verdict"] for p in result["parts"].values() for m in p["metrics"].values()}
    assert verdicts == {"no significant difference"} and any("same checkpoint" in note for note in result["notes"])
    assert result["tests"] == 16 and [run["label"] for run in result["runs"]] == ["A", "B", "C"]
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert page.open == [] and sum(tag == "script" for tag, _ in page.tags) == 1


def test_the_page_and_the_table_show_differences_and_cases_that_changed_sides(reports, tmp_path):
    result = compare_reports([str(reports / "a"), str(reports / "b")], str(tmp_path / "out"))
    text = (tmp_path / "out" / "compare.txt").read_text()
    assert text == text_table(result)
    page = Page((tmp_path / "out" / "compare.html").read_text())
    shown = " ".join(page.text)
    for part in result["parts"].values():
        entry = part["metrics"]["joint"]["differences"]["B"]
        for place in (text, shown):
            assert f"{100 * entry['difference']:+.1f} pp" in place
            assert f"[{100 * entry['lo']:+.1f}, {100 * entry['hi']:+.1f}]" in place
        counts = part["cases"]["B"]
        assert f"A alone in {counts['only_a']}, B alone in {counts['only_b']}" in shown
    cases = page.of_class("case")
    assert len(cases) == sum(
        min(p["cases"]["B"][k], 12) for p in result["parts"].values() for k in ("only_a", "only_b")
    )
    assert len(page.of_class("stage")) == 3 * len(cases)  # A, B and the ground truth
    assert len(page.of_class("wrong")) == len(page.of_class("right")) == len(cases)
    assert re.search(r"12 of \d+ such cases", shown)


def test_what_cannot_be_compared_is_an_error_that_says_why(reports, tmp_path):
    a, b = str(reports / "a"), str(reports / "b")

    def fails(match, *folders):
        with pytest.raises(UserError, match=match):
            compare_reports(list(folders), str(tmp_path / "out"))

    fails("two or more", a)
    fails("are one folder", a, b, str(reports / "b" / ".." / "a"))
    fails("no finished report", a, str(tmp_path))
    scores = json.loads((reports / "b" / "scores.json").read_text())
    folder = tmp_path / "x"
    folder.mkdir()
    for change, match in (
        (dict(version=2), "version 1.*version 2"), (dict(suite="video"), "suite 'world'.*'video'"),
        (dict(parts={"z": scores["parts"]["physics"]}), "no part in common"),
    ):  # fmt: skip
        write_scores(folder, copy.deepcopy(scores) | change)
        fails(match, a, str(folder))
    (folder / "scores.json").write_text(json.dumps(dict(run="old", splits={})))
    fails("no report of a suite", a, str(folder))
    (folder / "scores.json").write_text('{"suite": ')
    fails("damaged", a, str(folder))
    assert not (tmp_path / "out").exists()


def test_parts_that_not_all_have_are_named(reports, tmp_path):
    scores = json.loads((reports / "b" / "scores.json").read_text())
    scores["parts"]["more"] = scores["parts"].pop("physics")
    (tmp_path / "b").mkdir()
    write_scores(tmp_path / "b", scores | dict(sampling=dict(num_steps=50, guidance_scale=3.0)))
    result, _ = compare([str(reports / "a"), str(tmp_path / "b")])
    assert list(result["parts"]) == ["prompts/test"]
    notes = " ".join(result["notes"])
    assert "physics of A" in notes and "more of B" in notes and "num_steps 30 and 50" in notes
