"""The page of an evaluation: all numbers are on it, videos are exact, hostile text stays text, a browser shows it."""

import base64
import copy
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from fake_scores import HOSTILE, Page, make_report
from PIL import Image

from sorax import report_html
from sorax.curves import training_curves
from sorax.errors import UserError
from sorax.report_clips import choose, ranked, read_videos, sprite
from sorax.report_html import write_report
from sorax.report_svg import curves, log_ticks, nice_ticks


def page_of(folder, scores, **options):
    return Page(open(write_report(str(folder), scores, **options)).read())


def pixels(style):
    """The sprite sheet of a stage: uint8 [H, W, 3]."""
    data = re.search(r"url\(data:image/webp;base64,([^)]*)\)", style)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "r"
    return folder, make_report(folder)


def test_the_page_has_every_number_with_its_interval_and_stands_alone(report):
    folder, scores = report
    page = page_of(folder, scores)
    assert page.open == []
    text = " ".join(page.text)
    for part in scores["parts"].values():
        assert part["title"] in text and part["about"] in text
        for cells in part["rows"].values():
            for cell in cells.values():
                if cell["kind"] == "rate" and cell["value"] is not None:
                    assert f"[{100 * cell['lo']:.1f}, {100 * cell['hi']:.1f}]" in text
                    assert f"{cell['k']} of {cell['n']}" in text and f"{100 * cell['value']:.1f} %" in text
    error = scores["parts"]["physics"]["rows"]["model"]["error"]["value"]
    assert f"{error:.3f}" in text and "none asked" in text
    for value in (scores["checkpoint"], scores["config"], scores["code"], "guidance_scale"):
        assert value in text
    for _, attributes in page.tags:
        for name in ("src", "href", "data-src", "action"):
            assert attributes.get(name, "#")[0] == "#"
        assert not re.search(r"url\((?!data:)", attributes.get("style") or "")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_cases_stand_from_worst_to_best_and_how_many_are_shown_is_said(report):
    folder, scores = report
    page = page_of(folder, scores)
    assert len(page.of_class("case")) == 2 * 24
    assert "24 of 30 cases, from worst to best: the 12 worst, 6 from the middle, the 6 best." in " ".join(page.text)
    shown = [float(t.removeprefix("score ")) for t in page.text if t.startswith("score ")][:24]
    every = sorted(case["score"] for case in scores["parts"]["prompts/test"]["cases"])
    assert shown == pytest.approx(every[:12] + every[12:18] + every[-6:], abs=0.005)
    less = page_of(folder, scores, most_bytes=20_000)
    assert 2 <= len(less.of_class("case")) < 2 * 24  # at least one of each part
    assert len("".join(a["style"] for a in less.of_class("stage"))) < 25_000


def test_the_choice_has_every_case_of_few_and_none_twice():
    for count in (1, 23, 24, 25, 30, 1000):
        ranks = [rank for group in choose(count) for rank in group]
        assert ranks == sorted(set(ranks)) and len(ranks) == min(count, 24)
        assert ranks[0] == 0 and ranks[-1] == count - 1


def test_videos_on_the_page_are_those_of_the_report(report):
    folder, scores = report
    page = page_of(folder, scores)
    cases = ranked(scores["parts"]["prompts/test"]["cases"])
    stages = page.of_class("stage")
    for case, stage in zip(cases[:12], stages[:24:2]):
        assert (pixels(stage["style"]) == 2 * case["video"]["index"]).all()
        assert ("wrong" in stage["class"]) == bool(case["failed"])


@pytest.mark.parametrize("shape", [(5, 16, 24), (1, 8, 8), (70, 128, 128), (7, 300, 200)])
def test_a_sprite_sheet_holds_the_frames_in_order(shape):
    rng = np.random.default_rng(0)
    video = np.repeat(rng.integers(0, 256, (shape[0], 1, 1, 3), np.uint8), shape[1] * shape[2], 1).reshape(*shape, 3)
    uri, columns, rows = sprite(video)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
    H, W = sheet.shape[0] // rows, sheet.shape[1] // columns
    assert max(H, W) == min(max(shape[1:]), 160) and max(sheet.shape) <= 16383
    for t in range(shape[0]):
        row, column = divmod(t, columns)
        assert (sheet[row * H : (row + 1) * H, column * W : (column + 1) * W] == video[t, 0, 0]).all()


def test_marks_are_on_their_frame_and_place(report):
    folder, scores = report
    page = page_of(folder, scores)
    events = [case["events"] for case in ranked(scores["parts"]["physics"]["cases"])][:12]
    marked = [a for tag, a in page.tags if tag == "g" and "data-frame" in a]
    rings = [a for tag, a in page.tags if tag == "circle" and a.get("r") != "3.2" and a.get("cx") == "0.400"]
    assert len(marked) == len(rings) > 4 and all(ring["cy"] == "0.500" for ring in rings)
    assert all("hidden" not in a for a in marked)  # each case shows the frame of its event first
    assert {str(e["frame"]) for some in events for e in some} <= {a["data-frame"] for a in marked}


def test_hostile_text_stays_text(tmp_path):
    scores = make_report(tmp_path / "r", caption=HOSTILE, n=3)
    scores |= dict(run=HOSTILE, checkpoint=HOSTILE)
    part = scores["parts"]["physics"]
    part |= dict(title=HOSTILE, about=HOSTILE, data=HOSTILE, metrics={k: HOSTILE for k in part["metrics"]})
    part["rows"][HOSTILE] = part["rows"].pop("ground_truth")
    part["series"][0] |= dict(title=HOSTILE, x_label=HOSTILE, lines={HOSTILE: part["series"][0]["lines"]["model"]})
    part["cases"][0] |= dict(failed=[HOSTILE], events=[dict(kind=HOSTILE, frame=0, x=0.0, y=9.0)])
    page = page_of(tmp_path / "r", scores)
    assert page.open == []
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.text).count("document.title='broken'") > 5


def test_a_suite_with_other_rows_or_without_videos_has_a_page(tmp_path):
    scores = make_report(tmp_path / "r", n=3)
    part = scores["parts"]["physics"]
    part["rows"] = {"videos": {"joint": part["rows"]["model"]["joint"], "error": part["rows"]["untrained"]["error"]}}
    for case in part["cases"]:
        case |= dict(video=None, truth=None)
    del scores["curves"], scores["sampling"]
    scores["step"] = None
    page = page_of(tmp_path / "r", scores)
    assert len(page.of_class("case")) == 3 and "Training" not in page.text


def test_cases_without_checks_are_ranked_by_their_value_and_called_neither_right_nor_wrong(tmp_path):
    scores = make_report(tmp_path / "r", n=5, parts=("physics",))
    part = scores["parts"]["physics"]
    part["headline"] = "error"
    for case in part["cases"]:
        case |= dict(checks={}, failed=[], score=0.0, events=[])
    page = page_of(tmp_path / "r", scores)
    shown = [float(text.removeprefix("error ")) for text in page.text if re.fullmatch(r"error [\d.]+", text)]
    errors = sorted((case["values"]["error"] for case in part["cases"]), reverse=True)
    assert shown == pytest.approx(errors, rel=0.01)
    assert not page.of_class("right") and not page.of_class("wrong") and "all checks passed" not in " ".join(page.text)


@pytest.mark.parametrize("broken", ["missing", "cut", "number", "outside"])
def test_a_video_that_is_not_there_is_an_error_that_names_it(tmp_path, broken):
    scores = make_report(tmp_path / "r", n=2, parts=("a",))
    path, place = tmp_path / "r" / "samples" / "a_model.npz", scores["parts"]["a"]["cases"][0]["video"]
    if broken == "missing":
        path.unlink()
    elif broken == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        place |= dict(index=7) if broken == "number" else dict(file="../other.npz")
    with pytest.raises(UserError, match="other.npz" if broken == "outside" else "a_model.npz"):
        read_videos(str(tmp_path / "r"), [place])


def test_ticks_are_round_and_inside():
    for lo, hi in ((0, 1), (-0.37, 0.21), (1e-7, 3e-7), (12, 47_000), (5, 5)):
        ticks = nice_ticks(lo, hi)
        assert 1 <= len(ticks) <= 7 and all(lo - 1e-9 <= tick <= hi + 1e-9 for tick in ticks)
    for lo, hi in ((1e-4, 3), (2, 9), (1.1, 1.4), (1e-12, 1e9)):
        ticks = log_ticks(lo, hi)
        assert 1 <= len(ticks) <= 12 and all(lo <= tick <= hi for tick in ticks)


def test_curves_of_one_point_a_gap_or_nothing_are_drawn():
    one = dict(x=[5], y=[0.0], lo=None, hi=None)
    assert "<circle" in curves("t", "x", "y", dict(model=one))
    assert "No points" in curves("t", "x", "y", dict(model=dict(x=[1, 2], y=[None, None], lo=None, hi=None)))
    long = dict(x=list(range(100_000)), y=[float(i % 7) for i in range(100_000)], lo=None, hi=None)
    assert len(curves("t", "x", "y", dict(model=long))) < 20_000


def test_curves_of_a_run_survive_a_kill_and_a_resume(tmp_path):
    rows = [dict(step=0, val_loss=2.0, loss=3.0), dict(step=10, val_loss=1.5), dict(step=10, val_loss=1.0),
            {"step": 10, "eval/prompts/joint": 0.5, "eval/prompts/joint_lo": 0.4, "eval/prompts/joint_hi": 0.6},
            {"step": 10, "val_loss_sigma_0.5": 0.7}, {"step": 20, "val_loss": float("nan")}, "no row"]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 30, "val_lo')
    loss, prompts, sigma = training_curves(str(tmp_path))
    assert loss["title"] == "Validation loss" and loss["lines"]["model"]["y"] == [2.0, 1.0]
    assert prompts["title"] == "prompts" and prompts["lines"] == {"joint": dict(x=[10], y=[0.5], lo=[0.4], hi=[0.6])}
    assert list(sigma["lines"]) == ["noise level 0.5"]
    assert training_curves(str(tmp_path / "nowhere")) == []


def test_the_numbers_of_an_interval_have_the_digits_of_their_value():
    cell = dict(kind="mean", n=5, value=0.606, lo=0.6, hi=0.65, unit="")
    assert report_html.interval_text(cell) == "[0.600, 0.650]"
    assert report_html.value_text(cell | dict(value=1234567.0)) == "1,234,567"
    assert report_html.value_text(cell | dict(value=3e-7)) == "3e-07"
    assert report_html.value_text(cell | dict(unit="share")) == "60.6 %"
    assert report_html.value_text(cell | dict(value=0.0, lo=-0.0012)) == "0.000"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROBE = """
addEventListener('load', () => document.querySelector('.case').scrollIntoView({behavior: 'instant'}));
addEventListener('load', () => {
  const all = what => [...document.querySelectorAll(what)], change = new Event('change'), seen = el => el.offsetParent;
  const [part, check] = all('select'), slider = document.querySelector('input[type=range]'), said = {};
  said.title = document.title; said.few = all('#part-0 .case').filter(seen).length;
  all('.chips button')[0].click(); said.jump = all('.case:has(.chips button) .at span')[0].textContent;
  slider.value = 3; slider.dispatchEvent(new Event('input'));
  const stage = all('.stage')[0]; said.position = stage.style.backgroundPosition;
  said.marks = all('#part-0 .case:nth-child(1) .marks g').map(g => [+g.dataset.frame, !g.hasAttribute('hidden')]);
  part.value = 'part-1'; part.dispatchEvent(change); said.parts = all('section.part').filter(seen).length;
  part.value = ''; part.dispatchEvent(change);
  check.selectedIndex = check.options.length - 1; check.dispatchEvent(change);
  said.filtered = all('#part-0 .case').filter(seen).length; said.found = all('.found')[0].textContent;
  said.width = document.documentElement.scrollWidth <= innerWidth;
  document.body.setAttribute('data-said', JSON.stringify(said));
});
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine: apt install chromium")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_browser_steps_through_marks_and_filters(tmp_path, monkeypatch, size):
    """The page's own script, with a probe behind it that uses the page and writes down what it then shows."""
    monkeypatch.setattr(report_html, "SCRIPT", report_html.SCRIPT + PROBE)
    scores = make_report(tmp_path / "r", caption=HOSTILE)
    cases = ranked(copy.deepcopy(scores["parts"]["prompts/test"]["cases"]))
    page = write_report(str(tmp_path / "r"), scores)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={size}", "--virtual-time-budget=10000", "--dump-dom", f"file://{page}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    page = Page(done.stdout)
    said = json.loads(next(a["data-said"] for tag, a in page.tags if tag == "body"))
    first = next(case["events"][0]["frame"] for case in cases if case["events"])
    assert said["title"].startswith("Evaluation: small") and said["width"]
    assert said["few"] == 6 and said["jump"] == str(first)
    assert said["position"] == "75% 0%"  # frame 3 of 0 to 4, in one row
    assert said["marks"] == [[e["frame"], e["frame"] == 3] for e in cases[0]["events"]]
    shown = [cases[i] for group in choose(len(cases)) for i in group]
    count = sum(any(e["kind"] == "vanish" for e in case["events"]) for case in shown)
    assert said["parts"] == 1 and said["filtered"] == count and said["found"] == f" {count} of these match."
