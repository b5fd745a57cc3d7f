"""A report folder as a suite leaves it, with scores and videos of an imaginary run; and a reader of pages."""

import html.parser
import json

import numpy as np

from sorax.metrics import wilson_interval

TITLES = {"joint": "joint", "color": "colour", "direction": "direction"}


HOSTILE = """<script>document.title='broken'</script>'"><img src=x onerror=alert(2)> & &lt;b&gt; </title></style>"""
VOID = {"meta", "input", "img", "br"}


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements with attributes, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)

    def of_class(self, name):
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def rate(values):
    """The cell of a rate; None among the values is not asked."""
    asked = [bool(value) for value in values if value is not None]
    k, n = sum(asked), len(asked)
    lo, hi = wilson_interval(k, n)
    return dict(kind="rate", k=k, n=n, value=k / n if n else None, lo=lo, hi=hi, better="high")


def mean(values, unit="units/s", better="low"):
    """The cell of a mean, with an interval of the normal distribution."""
    values = np.array([value for value in values if value is not None], float)
    if not len(values):
        return dict(kind="mean", n=0, value=None, lo=None, hi=None, unit=unit, better=better)
    middle, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return dict(kind="mean", n=len(values), value=middle, lo=middle - half, hi=middle + half, unit=unit, better=better)


def make_part(folder, name, n, skill, rng, caption="a red circle moving right", shape=(5, 16, 24), unit="units/s"):
    """A part of n cases of which about `skill` are right; the video of case i has the value 2 i in all pixels."""
    slug, T = name.replace("/", "_"), shape[0]
    videos = np.broadcast_to(2 * np.arange(n, dtype=np.uint8)[:, None, None, None, None], (n, *shape, 3))
    for row in ("model", "ground_truth"):
        np.savez_compressed(folder / "samples" / f"{slug}_{row}.npz", videos=videos, fps=8.0)
    cases = []
    for i in range(n):
        checks = dict(color=bool(rng.random() < skill), direction=None if i % 3 == 0 else bool(rng.random() < skill))
        asked = [value for value in checks.values() if value is not None]
        checks = dict(joint=all(asked)) | checks
        events = [] if checks["color"] else [dict(kind="vanish", frame=i % T, x=0.4, y=0.5)]
        cases.append(
            dict(id=f"{name}/{i}", caption=f"{caption} ({i})", seed=i, score=float(np.mean(asked)), checks=checks,
                 values=dict(error=float(rng.exponential(0.1 / skill))), events=events,
                 failed=[TITLES[key] for key, value in checks.items() if value is False and key != "joint"],
                 video=dict(file=f"samples/{slug}_model.npz", index=i),
                 truth=dict(file=f"samples/{slug}_ground_truth.npz", index=i))
        )  # fmt: skip
    rows = dict(
        ground_truth={key: rate([True] * n) for key in TITLES} | dict(error=mean([0.001, 0.002], unit)),
        model={key: rate(case["checks"][key] for case in cases) for key in TITLES}
        | dict(error=mean([case["values"]["error"] for case in cases], unit)),
        untrained={key: rate([]) for key in TITLES} | dict(error=mean([], unit)),
    )
    band = dict(x=[9, 17, 33], y=[0.9, None, 0.5], lo=[0.8, None, 0.4], hi=[1.0, None, 0.6])
    series = [dict(title="Over length", x_label="frames", y_label="share of clips", lines=dict(model=band))]
    return dict(title=f"Part {name}", about=f"{n} cases.", data="d0", rows=rows, metrics=TITLES | dict(error="error"),
                headline="joint", series=series, cases=cases)  # fmt: skip


def make_report(folder, *, run="small", skill=0.6, n=30, parts=("prompts/test", "physics"), seed=0, **options):
    """Writes scores.json and the videos of a report, and returns the scores."""
    (folder / "samples").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    made = {name: make_part(folder, name, n, skill, rng, **options) for name in parts}
    line = dict(x=[0, 100, 200], y=[1.5, 0.7, 0.5], lo=None, hi=None)
    curves = [dict(title="Validation loss", x_label="step", y_label="loss", lines=dict(model=line))]
    scores = dict(suite="world", version=1, run=run, kind="dit", step=2000, config="c0", code_version="0.1", code="k0",
                  checkpoint=f"p{seed}", sampling=dict(num_steps=30, guidance_scale=3.0), seed=0, parts=made,
                  curves=curves)  # fmt: skip
    write_scores(folder, scores)
    return scores


def write_scores(folder, scores):
    """Writes scores.json."""
    (folder / "scores.json").write_text(json.dumps(scores))
