"""The data report: its numbers are those of training, everything left out is named, and hostile data stays data."""

import csv
import dataclasses
import html.parser
import json
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import numbered, write

from data_pipelines import report, report_fit, report_pictures
from data_pipelines.curate_records import clip_row, file_row, write_outputs
from data_pipelines.fit import CHANGES, Fit, Unfit, fit_sample, tokens
from data_pipelines.index import COLUMNS, Index, SourceRecords, build_index
from data_pipelines.report_curation import read_curation
from data_pipelines.report_fit import Settings, fit_columns, text_lengths
from data_pipelines.report_numbers import analyse
from data_pipelines.report_page import escape
from data_pipelines.report_warnings import find_warnings
from data_pipelines.text_tokens import Tokenizer
from data_pipelines.world import World, WorldConfig
from sorax import cli
from sorax.errors import UserError

HOSTILE = """<script>alert(1)</script>'"><img src=x onerror=alert(2)> & &lt;b&gt; </title></style>"""


def make_index(rows, source=("folder", "/nowhere"), **limits):
    """An index of rows given as dicts; what a row does not say is that of a good clip of 2 s."""
    usual = dict(kind="video", num_frames=16, height=64, width=96, fps=8.0, rotation=0, codec="h264", container="mp4",
                 bytes=1000, mtime_ns=0, reason="")  # fmt: skip
    made = []
    for i, row in enumerate(rows):
        row = usual | dict(key=f"{i:05d}.mp4", caption=f"clip number {i} of many", sha256=f"{i:064x}") | row
        row["span"] = row.get("span", (row["num_frames"] - 1) / row["fps"])
        duration = 0.0 if row["kind"] == "image" else row["span"] + 1 / row["fps"]
        made.append(dict(duration=duration, caption_length=len(row["caption"])) | row)
    table = pa.Table.from_pylist(made, COLUMNS)
    settings = dict(source=dict(kind=source[0], path=source[1]), identity="0123", limits=limits)
    return Index(table.combine_chunks(), settings)


def mixed(count=200, seed=0):
    """Rows of images and clips of several sizes, lengths and rates; some are unusable, some too small or too short."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        height, width = ((32, 32), (64, 96), (100, 60), (8, 200))[rng.choice(4, p=(0.3, 0.4, 0.25, 0.05))]
        row = dict(height=height, width=width, num_frames=int(rng.integers(5, 80)), fps=float(rng.choice((8, 12, 24))))
        if rng.random() < 0.3:
            row |= dict(kind="image", num_frames=1, fps=1.0)
        if rng.random() < 0.1:
            reason = ("no caption: it is empty", "cut")[i % 2]
            row |= dict(kind="", num_frames=0, height=0, width=0, fps=1.0, reason=reason)
        rows.append(row)
    return rows


@pytest.fixture
def no_plots(monkeypatch):
    """For tests of other things: matplotlib takes seconds."""
    monkeypatch.setattr(report, "make_plots", lambda analysis, settings: ({}, {}))


SETTINGS = Settings(Fit(max_tokens=48, fps=8.0, max_frames=17), row_tokens=128, row_text=256, max_segments=8, batch=4,
                    tokenizer="bpe", vocab_size=300, steps=50)  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: tags with attributes, and the text of the elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        self.texts.append((self.inside, data))


# --- What becomes of the samples


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fitting_columns_equals_fitting_each_sample(data):
    fit = Fit(max_tokens=data.draw(st.sampled_from((2, 12, 60))), any_length=data.draw(st.booleans()),
              fps=data.draw(st.sampled_from((None, 8.0, 24.0))),
              max_frames=data.draw(st.sampled_from((5, 9, 33))), min_frames=data.draw(st.sampled_from((1, 5))),
              oversize=data.draw(st.sampled_from(("scale", "trim", "refuse"))))  # fmt: skip
    sides, rates = st.integers(8, 200), st.sampled_from((7.99, 8.0, 8.004, 23.976, 24.0, 60.0))
    samples = data.draw(st.lists(st.tuples(st.booleans(), sides, sides, rates, st.floats(0, 9), st.floats(0, 9)),
                                 min_size=1, max_size=8))  # fmt: skip
    image, height, width, fps, span, longer = (np.array(column) for column in zip(*samples))
    duration = np.where(image, 0.0, span + longer)
    found = fit_columns(image, height, width, fps, span, duration, fit)
    for i in range(len(samples)):
        info = SimpleNamespace(height=int(height[i]), width=int(width[i]), fps=float(fps[i]), span=float(span[i]),
                               duration=float(duration[i]), is_image=bool(image[i]))  # fmt: skip
        try:
            expected = fit_sample(info, fit)
        except Unfit as error:
            assert found.reasons[i] == error.reason
            continue
        assert found.reasons[i] == ""
        assert (found.num_frames[i], found.height[i], found.width[i], found.fps[i]) == expected[:4]
        assert {c for bit, c in enumerate(CHANGES) if found.changes[i] >> bit & 1} == set(expected.changes)
        assert found.tokens(fit)[i] == tokens(expected)


def test_every_sample_is_kept_or_rejected_with_a_reason_once():
    index = make_index(mixed())
    numbers = analyse(index, SETTINGS).numbers
    totals = numbers["totals"]
    assert totals["samples"] == 200 and 0 < totals["rejected"] < 100
    assert totals["kept"] + totals["rejected"] == 200
    assert sum(entry["samples"] for entry in numbers["rejected"]) == totals["rejected"]
    stages = {entry["stage"] for entry in numbers["rejected"]}
    assert stages == {"index", "fit"}
    outcome = {line["what"]: line["samples"] for line in numbers["outcome"]}
    assert outcome["kept"] == totals["kept"] >= max(outcome[change] for change in CHANGES)
    changed = [fit_sample(_info(index, row), SETTINGS.fit).changes for row in analyse(index, SETTINGS).arrays.rows]
    assert {c: sum(c in some for some in changed) for c in CHANGES} == {c: outcome[c] for c in CHANGES}


def _info(index, row):
    names = ("height", "width", "fps", "span", "duration")
    return SimpleNamespace(**{name: index.columns[name][row].item() for name in names},
                           is_image=index.columns["kind"][row] == "image")  # fmt: skip


def test_reasons_are_counted_without_their_figures_and_named_up_to_a_hundred(tmp_path, no_plots):
    rows = [dict(reason=f"truncated: {i} of 300 frames are there") for i in range(250)] + [{}]
    index = make_index(rows)
    (entry,) = analyse(index, SETTINGS).numbers["rejected"]
    assert entry["samples"] == 250 and len(entry["names"]) == 100
    report.make_report(index, tmp_path, SETTINGS, processes=0)
    with open(tmp_path / report.REJECTED, newline="") as f:
        lines = list(csv.DictReader(f))
    assert [line["file"] for line in lines] == [f"{i:05d}.mp4" for i in range(250)]
    assert lines[7]["reason"] == "truncated: 7 of 300 frames are there"


def test_samples_that_fit_in_no_row_are_a_problem_and_named():
    settings_ = dataclasses.replace(SETTINGS, row_tokens=20)
    analysis = analyse(make_index([dict(height=32, width=32), dict(height=64, width=64)]), settings_)
    assert analysis.numbers["refused_by_training"] == 1
    assert [(row, stage) for row, stage, _ in analysis.rejected] == [(1, "row")]
    assert "data.row_tokens" in analysis.rejected[0][2]


# --- Text and packing


@pytest.mark.parametrize("wanted", ["", "bpe"])
def test_text_lengths_are_those_of_the_tokenizer_that_training_takes(wanted):
    captions = [f"a {c} dog runs {k} times" for c in ("red", "blue", "green") for k in range(20)]
    settings_ = dataclasses.replace(SETTINGS, tokenizer=wanted, vocab_size=400)
    lengths, encoded, different = text_lengths(pa.array(captions * 2), settings_)
    tokenizer = Tokenizer.train(captions * 2, 400) if wanted else Tokenizer.of_bytes()
    assert lengths.tolist() == 2 * [len(tokenizer.encode(caption)) for caption in captions]
    assert encoded == different == 60


def test_estimated_text_lengths_keep_the_distribution(monkeypatch):
    rng = np.random.default_rng(0)
    words = ["a", "the", "red", "blue", "extraordinarily", "small", "dog", "runs", "through", "under", "river"]
    captions = pa.array([" ".join(rng.choice(words, rng.integers(2, 30))) for _ in range(3000)])
    exact, _, _ = text_lengths(captions, SETTINGS)
    monkeypatch.setattr(report_fit, "MOST_ENCODED", 500)
    estimated, encoded, different = text_lengths(captions, SETTINGS)
    assert encoded == 500 < different
    # The others follow from their number of characters; what is left is the chance of which 500 are known.
    assert abs(estimated.mean() / exact.mean() - 1) < 0.03
    assert abs(estimated.std() / exact.std() - 1) < 0.06
    assert np.corrcoef(estimated, exact)[0, 1] > 0.75


def test_packing_is_that_of_training():
    from data_pipelines.rows import RowSource

    index = make_index(mixed())
    analysis = analyse(index, SETTINGS, ranks=2)
    arrays, packing = analysis.arrays, analysis.numbers["packing"]

    class Examples:
        shapes = np.stack([arrays.num_frames // 4 + 1, arrays.height // 16, arrays.width // 16], 1).astype(np.int32)
        text_lengths = arrays.text.astype(np.int32)

        def __len__(self):
            return len(self.shapes)

    rows = RowSource(Examples(), row_tokens=128, row_text=256, max_segments=8, batch_size=4, ranks=2, seed=0,
                     patch_size=(1, 1, 1), cost_a=SETTINGS.cost_a, cost_b=SETTINGS.cost_b)  # fmt: skip
    plan = rows.plan(0)
    assert (packing["rows"], packing["fill"], packing["identity"]) == (len(plan), plan.fill, plan.identity)
    planned = next(line for line in packing["by_ranks"] if line["ranks"] == 2)
    assert planned["batch"] == 4 and planned["imbalance"] == pytest.approx(plan.imbalance)
    assert planned["epochs"] == SETTINGS.steps / plan.num_steps
    assert [line["ranks"] for line in packing["by_ranks"]] == [1, 2, 8, 64, 256]


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="multiple of --ranks"):
        analyse(make_index([{}]), SETTINGS, ranks=3)


def test_a_vae_has_no_rows():
    analysis = analyse(make_index(mixed()), dataclasses.replace(SETTINGS, rows=False, row_tokens=1))
    assert analysis.numbers["packing"] is None and analysis.numbers["refused_by_training"] == 0


# --- Warnings


def warn(rows, settings_=SETTINGS, **limits):
    index = make_index(rows, **limits)
    analysis = analyse(index, settings_)
    numbers = analysis.numbers | dict(source=dict(limits=limits))
    return " ".join(warning["text"] for warning in find_warnings(numbers, analysis.arrays))


GOOD = [dict(height=32 + 16 * (i % 3), width=48, num_frames=17) for i in range(60)]
BAD = {
    "are rejected": [dict(reason="cut")] * 6,
    "equal bytes": [dict(sha256="a" * 64)] * 5,
    "share their caption": [dict(caption="the same words again")] * 10,
    "fewer than 12 characters": [dict(caption=f"cat {i}") for i in range(10)],
    "frames are repeated": [dict(fps=4.0, num_frames=40)] * 9,
    "is never seen": [dict(num_frames=2000)] * 9,
    "One shape has": [dict(height=64, width=64)] * 900,
}


def test_good_data_gives_no_warning():
    assert not re.search("|".join(BAD), warn(GOOD, dataclasses.replace(SETTINGS, row_text=64)))


@pytest.mark.parametrize("words", BAD)
def test_each_fault_is_said(words):
    assert words in warn(GOOD + BAD[words])


def test_an_index_that_looks_less_far_than_training_is_said():
    assert "index again" in warn(GOOD, max_seconds=1.0)
    assert "index again" not in warn(GOOD, max_seconds=2.0)


def test_an_index_without_a_usable_sample_gives_a_report(tmp_path):
    numbers = report.make_report(make_index([dict(reason="cut")]), tmp_path, SETTINGS, processes=0)
    assert "No sample is left" in numbers["warnings"][0]["text"]
    assert json.loads((tmp_path / report.NUMBERS).read_text())["packing"] is None


# --- The page


def make_folder(tmp_path):
    """A folder with a clip and a picture of hostile names and captions, and a file that is no video."""
    folder = tmp_path / "clips"
    folder.mkdir()
    lines = []
    for name, make in ((f"<img src=x onerror=alert(3)>'\"{1}.mp4", lambda p: write(p, numbered(17, 48, 64))),
                       ("photo &amp; co.png", lambda p: Image.fromarray(numbered(1, 50, 70)[0]).save(p)),
                       ("no<script>.mp4", lambda p: p.write_text("not a video" * 50))):  # fmt: skip
        make(folder / name)
        lines.append(json.dumps(dict(file=name, caption=f"{HOSTILE} \u202e reversed {name}")))
    write(folder / "plain.mp4", numbered(9, 48, 64))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("made")
    index = build_index(make_folder(tmp_path), processes=0)
    numbers = report.make_report(index, tmp_path / "out", SETTINGS, processes=0)
    return numbers, (tmp_path / "out" / report.PAGE).read_text()


def test_names_and_captions_cannot_become_markup(made):
    numbers, text = made
    page = Page(text)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}]  # ours alone
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [tag for tag, _ in page.tags if tag in ("img", "b>", "iframe")]
    shown = " ".join(data for tag, data in page.texts)
    assert HOSTILE in shown  # as text, every character of it
    assert "\u202e" not in text  # it would turn what follows around
    assert numbers["shown"]["kept"] == ["<img src=x onerror=alert(3)>'\"1.mp4", "photo &amp; co.png"]


def test_the_page_asks_nothing_of_any_network(made):
    _, text = made
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(([^)]*)\)", text))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_kept_and_rejected_samples_have_pictures_and_bad_files_a_reason(made):
    numbers, text = made
    assert sum(numbers["histograms"]["frames"]["as trained"]) == numbers["totals"]["kept"] == 2
    assert text.count("data:image/jpeg;base64,") == 3  # clip, photograph, and the clip without a caption
    assert numbers["shown"]["rejected"] == ["no<script>.mp4", "plain.mp4"]
    assert "not a video" in text


def test_equal_indexes_give_equal_reports(tmp_path):
    index = build_index(make_folder(tmp_path), processes=0)
    for out in ("a", "b"):
        report.make_report(index, tmp_path / out, SETTINGS, processes=0)
    for name in (report.PAGE, report.NUMBERS, report.REJECTED, report.DUPLICATES):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_control_characters_do_not_reach_the_page():
    assert escape("a\x00b\x1b[31m\nc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[31m c"
    assert escape("x" * 1000, 10) == "xxxxxxxxxx ... (1,000 characters)"
    assert escape("\udcff") == "?"


def test_a_file_that_became_bad_is_shown_as_such(tmp_path, no_plots):
    folder = make_folder(tmp_path)
    index = build_index(folder, processes=0)
    (folder / "photo &amp; co.png").write_bytes(b"gone")
    numbers = report.make_report(index, tmp_path / "out", SETTINGS, processes=1)  # in a worker, as users have it
    assert numbers["totals"]["kept"] == 2
    text = (tmp_path / "out" / report.PAGE).read_text()
    assert text.count("<div class=none>") == 2 and text.count("data:image/jpeg;base64,") == 2


def test_files_outside_of_the_folder_are_not_shown(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    write(tmp_path / "secret.mp4", numbered(9, 48, 64))
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    for key in ("../secret.mp4", "link.mp4", str(tmp_path / "secret.mp4")):
        clip = report_pictures.Clip(str(folder), key, 1, 0, 0)
        ((_, outcome),) = report_pictures.draw_all(report_pictures.draw_clip, [clip], processes=0)
        assert "outside" in outcome.reason


def test_a_source_without_files_has_pictures_too(tmp_path, no_plots):
    world = World(WorldConfig(num_samples=5, shapes=((9, 32, 32), (1, 32, 48))))
    index = build_index(SourceRecords(world, "world"), processes=0)
    numbers = report.make_report(index, tmp_path, SETTINGS, source=world, processes=0)
    assert numbers["totals"]["kept"] == 5 and len(numbers["shown"]["kept"]) == 5
    assert (tmp_path / report.PAGE).read_text().count("data:image/jpeg;base64,") == 5


def test_duplicates_are_listed_in_groups(tmp_path):
    rows = [dict(sha256=str(i % 4) * 64) for i in range(8)] + [dict(sha256=""), dict(sha256="")]
    analysis = analyse(make_index(rows), SETTINGS)
    assert analysis.duplicates == [[f"{i:05d}.mp4", f"{i + 4:05d}.mp4"] for i in range(4)]


# --- Curation and the command line


def make_curation(tmp_path):
    """Records of a curation of one raw file into three clips, of which one was kept."""
    raw, out = tmp_path / "raw", tmp_path / "curated"
    raw.mkdir()
    (out / "clips").mkdir(parents=True)
    write(raw / "long<b>.mp4", numbered(40, 48, 64))
    write(out / "clips" / "long-0000.mp4", numbered(9, 48, 64))
    found = dict(num_frames=40, height=48, width=64, fps=8.0, rotation=0, trimmed={})
    usual = dict(caption="a grey thing <i>", fps=8.0, height=48, width=64, bars=[0] * 4, file="long<b>.mp4", motion=0.1,
                 brightness=90.0, contrast=20.0, whole=False, path="clips/long-0000.mp4", bytes=100)  # fmt: skip
    first, second, third = (dict(usual, number=k, first=10 * k, end=10 * k + 9, start=1.25 * k, stop=1.25 * k + 1.125)
                            for k in range(3))  # fmt: skip
    rows = [
        file_row(dict(file="long<b>.mp4", caption="a grey thing"), found), clip_row(first),
        clip_row(second, "motion", "static: below --min-motion 0.002"),
        clip_row(third, "duplicate", "near-duplicate: of another", duplicate_of="clips/long-0000.mp4"),
        file_row(dict(file="text.mp4", caption="x"), {}, "probe", "not a video"),
    ]  # fmt: skip
    write_outputs(str(out), rows, settings={}, raw=str(raw))
    return out


def test_curation_is_found_and_its_dropped_clips_are_shown(tmp_path, no_plots):
    out = make_curation(tmp_path)
    index = build_index(out, processes=0)
    numbers = report.make_report(index, tmp_path / "report", SETTINGS, processes=0)
    curation = numbers["curation"]
    assert (curation["files"], curation["clips"], curation["kept"]) == (2, 3, 1)
    dropped = {stage["stage"]: stage["dropped"] for stage in curation["stages"] if stage["dropped"]}
    assert dropped == dict(probe=1, motion=1, duplicate=1)
    assert numbers["shown"]["dropped"] == ["long<b>.mp4", "long<b>.mp4"]
    page = Page((tmp_path / "report" / report.PAGE).read_text())
    assert not [tag for tag, _ in page.tags if tag == "i" and "class" not in dict(_)]
    assert "near-duplicate" in " ".join(text for _, text in page.texts)


def test_a_record_of_curation_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no curation"):
        read_curation(tmp_path)
    (tmp_path / "curation.json").write_text('{"counts": 3}')
    with pytest.raises(UserError, match="not the record"):
        read_curation(tmp_path)


def test_the_command_reports_what_an_experiment_would_train_on(tmp_path, capsys, no_plots):
    build_index(make_folder(tmp_path), tmp_path / "index", processes=0)
    config = pathlib.Path(__file__).parents[1] / "experiments" / "clips.py"
    command = ["data", "report", "--index", str(tmp_path / "index"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--config", str(config), "--config.data.max_frames=5", "--processes", "1"]) == 0
    assert "2 kept" in capsys.readouterr().out
    used = json.loads((tmp_path / "out" / report.NUMBERS).read_text())["settings"]
    assert (used["data.max_frames"], used["data.row_tokens"], used["grid.temporal_stride"]) == (5, 512, 2)
    assert cli.main([*command, "--config", str(config), "--ranks", "3"]) == 2
    assert "multiple of --ranks" in capsys.readouterr().err
