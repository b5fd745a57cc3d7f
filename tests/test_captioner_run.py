"""Captioners and expanders as runs: trained by the loop, resumed to the bit, at work on data, scored."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from test_train import assert_same_run, interrupt
from video_files import numbered, write

from data_pipelines.caption_kinds import CAPTION
from data_pipelines.world import World, WorldConfig
from sorax import cli, config
from sorax.caption_scores import COLUMNS, SHORT, cells, judge_caption
from sorax.caption_writer import CaptionWriter, load_captioner
from sorax.captioner_objective import _stages
from sorax.decoding import DecodingConfig
from sorax.errors import UserError
from sorax.objectives import DataConfig, complete
from sorax.recaption import open_uncaptioned
from sorax.train import train

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
TINY = ("model.encoder_layers=1", "model.decoder_layers=1", "model.num_heads=1", "model.head_dim=8", "model.ffn_dim=16",
        "data.batch=8", "data.max_segments=2", "data.world.num_samples=24", "data.val_samples=4", "train.steps=4",
        "train.log_every=1", "train.unroll=false", "checkpoint.every=2", "checkpoint.keep=2", "eval.num_videos=2",
        "eval.num_prompts=2", "optim.warmup_steps=1")  # fmt: skip

QUICK = "optim.optimizer=adamw"  # in place of Muon, which takes long to compile


def tiny(name, *overrides):
    own = ("data.stages=({'steps': 1, 'caption_mix': 'short:1'},)", "model.patch_size=(3,32,32)", "data.row_tokens=16")
    own = own if name == "captioner_world" else ()
    return config.load_config(str(EXPERIMENTS / f"{name}.py"), (*TINY, *own, *overrides), complete)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("captioner") / "run")
    train(tiny("captioner_world", "eval.every=4"), workdir)
    return workdir


@pytest.fixture(scope="module")
def expander(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("expander") / "run")
    train(tiny("expander_world", "eval.every=4", QUICK), workdir)
    return workdir


def test_an_interrupted_captioner_resumes_bit_identical(captioner, tmp_path, monkeypatch):
    """Across a stage: its first step sees short captions, the others mostly detailed ones."""
    resumed, experiment = str(tmp_path / "resumed"), tiny("captioner_world", "eval.every=4")
    interrupt(resumed, experiment, monkeypatch)
    train(experiment, resumed)
    assert_same_run(captioner, resumed)


def test_what_is_measured_while_it_learns_is_written_down(captioner):
    rows = [json.loads(line) for line in pathlib.Path(captioner, "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert set(steps) == {1, 2, 3, 4} and "loss_detailed" not in steps[1] and "loss_detailed" in steps[4]
    assert steps[4]["accuracy"] <= 1 and steps[4]["text_tokens_per_s"] > 0
    last = [row for row in rows if "val_loss" in row][-1]
    assert {"val_loss_short", "val_loss_detailed", "short_joint", "detailed_joint"} <= set(last)
    assert list(pathlib.Path(captioner, "samples").glob("*.png"))


def test_captions_of_a_run_do_not_depend_on_what_is_captioned_beside(captioner):
    run, world = load_captioner(captioner, reads="video"), World(WorldConfig(num_samples=6, shapes=((9, 32, 32),)))
    videos = [world[i]["video"] for i in range(6)] + [np.zeros((4, 20, 50, 3), np.uint8)]  # padded to whole patches
    settings = DecodingConfig("nucleus", max_tokens=12)
    together = run.writer.captions(videos, "detailed", settings)
    assert together[2:4] == run.writer.captions(videos[2:4], "detailed", settings, seeds=[2, 3])
    assert together[6:] == run.writer.captions(videos[6:], "detailed", settings, seeds=[6])
    with pytest.raises(UserError, match="there is no 'long'"):
        run.writer.captions(videos, "long")


def test_a_run_captions_a_data_set_and_its_silence_is_no_caption(captioner, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["caption", "--data", "world", "--data.world.num_samples=5", "--run", captioner, "--out", str(out)]
    real = CaptionWriter.captions  # after four steps of training it may have nothing to say
    monkeypatch.setattr(CaptionWriter, "captions", lambda *args, **more: [text or "x" for text in real(*args, **more)])
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(set(row["captions"]) == {"short", "detailed"} for row in rows)
    monkeypatch.setattr("sorax.caption_writer.CaptionWriter.captions", None)  # nothing is left to be written
    assert cli.main(arguments) == 0
    monkeypatch.setattr("sorax.caption_writer.CaptionWriter.captions",
                        lambda self, videos, kind, *_, **__: [" " if kind == "short" else "x"] * len(videos))
    assert cli.main([*arguments[:-1], str(tmp_path / "silent")]) == 2
    assert "the captioner wrote nothing as 'short' caption" in capsys.readouterr().err


def test_a_captioner_of_pixels_sees_videos_whole_and_says_which_are_longer_than_any_it_knows(
    captioner, tmp_path, capsys
):
    raw = tmp_path / "raw"
    raw.mkdir()
    for frames in (8, 30):
        write(raw / f"{frames}.mp4", numbered(frames))
    grid = load_captioner(captioner).grid
    source = open_uncaptioned(dict(path=str(raw), max_tokens=4096), str(tmp_path / "index"), **grid)
    assert sorted(source.spec(i).num_frames for i in range(2)) == [8, 30]
    arguments = ["caption", "--data", str(raw), "--run", captioner, "--out"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 0
    spec = source.spec(1)
    count = 10 * (spec.height // 32) * (spec.width // 32)
    assert f"1 of 2 videos are of more tokens (up to {count}) than a row of" in capsys.readouterr().out
    assert cli.main([*arguments, str(tmp_path / "cut"), "--data.max_frames=6"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_captioner_is_scored_against_the_truth(captioner, tmp_path):
    assert cli.main(["evaluate", "--run", captioner, "--out", str(tmp_path), "--clips", "3"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["splits"]) == {"test", "heldout"}
    cells = scores["splits"]["test"]["kinds"]["detailed"]["cells"]
    assert cells["joint"]["n"] == 3 and set(cells) == set(COLUMNS)
    assert (tmp_path / "captions.png").exists() and "| colour |" in (tmp_path / "scores.md").read_text()


def test_an_expander_is_scored_and_loses_nothing(expander, tmp_path, capsys):
    assert cli.main(["evaluate", "--run", expander, "--out", str(tmp_path), "--clips", "4"]) == 0
    splits = json.loads((tmp_path / "scores.json").read_text())["splits"]
    assert splits["test"]["kept"]["value"] == splits["other styles"]["kept"]["value"] == 1
    assert cli.main(["expand", "a red circle moving right", "--run", expander, "--seed", "5"]) == 0
    assert "as it was" in capsys.readouterr().out  # four steps teach nothing


def test_a_run_of_something_else_is_refused(captioner, expander, tmp_path, capsys):
    assert cli.main(["expand", "a dog", "--run", captioner]) == 2
    assert "reads pixels" in capsys.readouterr().err
    assert cli.main(["caption", "--data", "world", "--run", expander, "--out", str(tmp_path / "o")]) == 2
    assert "reads text" in capsys.readouterr().err


def test_a_captioner_goes_on_from_another(captioner, tmp_path):
    experiment = tiny("captioner_world", "eval.every=0", f"init={captioner}", "train.steps=1", "optim.lr=0.0",
                      "optim.vector_lr=0.0", "data.stages=()", QUICK)  # fmt: skip
    train(experiment, str(tmp_path / "b"))
    there, here = (load_captioner(folder) for folder in (captioner, str(tmp_path / "b")))
    assert there.writer.tokenizer.identity == here.writer.tokenizer.identity
    kernel = [run.writer.params["encoder"]["mlp_in"]["kernel"] for run in (there, here)]
    np.testing.assert_allclose(*kernel, atol=1e-6)


@pytest.mark.parametrize("stages, words", [
    (({"caption_mix": "short:1"},), "give a dict of `steps`"), (({"steps": 5},), "a `caption_mix`"),
    (({"steps": 5, "caption_mix": "long:1"},), "config.model.kinds are short, detailed"),
])  # fmt: skip
def test_a_stage_that_cannot_be_meant_is_refused(stages, words):
    data = dataclasses.replace(DataConfig(caption_mix="short:1"), stages=stages)
    with pytest.raises(UserError, match=words):
        _stages(data, ("short", "detailed"), 10)
    data = DataConfig(row_text=64, stages=({"steps": 3, "caption_mix": "caption:1", "row_text": 32},))
    assert _stages(data, (CAPTION,), 7) == [(3, {CAPTION: 1.0}, 32), (7, {CAPTION: 1.0}, 64)]


# --- Scores


WORLD = World(WorldConfig(num_samples=120, shapes=((17, 32, 32),), kinds=("short", "detailed")))


@pytest.mark.parametrize("kind", ["short", "detailed"])
def test_true_captions_are_right_in_everything_in_any_order_of_their_objects(kind):
    table = cells([judge_caption(WORLD, i, WORLD.captions(i)[kind], kind) for i in range(len(WORLD))])
    assert all(cell["value"] == 1 for cell in table.values() if cell["n"])
    assert table["joint"]["n"] == len(WORLD) and bool(table["relation"]["n"]) == (kind == "detailed")
    found = judge_caption(WORLD, 0, "nothing", kind)
    assert found["joint"] is found["grammar"] is found["color"] is False and found["real"] == []


def test_every_wrong_word_is_found_where_it_is_wrong():
    i = next(i for i in range(len(WORLD)) if len(WORLD.scene(i).bodies) == 1
             and WORLD.scene(i).bodies[0].motion == "straight")  # fmt: skip
    true = WORLD.captions(i)["short"]
    body = WORLD.scene(i).bodies[0]
    other = next(c for c in ("red", "green") if c != body.color)
    swap = dict(color=true.replace(body.color, other), shape=true.replace(body.shape, "star" if body.shape != "star"
                else "circle"), motion=f"a {body.color} {body.shape} growing", count=f"{true} and a red star growing")
    for name, text in swap.items():
        found = judge_caption(WORLD, i, text, "short")
        assert found[name] is False and found["joint"] is False, text
        assert all(found[n] for n in SHORT if n != name and name == "color")
    assert judge_caption(WORLD, i, swap["count"], "short")["real"] == [True, False]
    assert judge_caption(WORLD, i, swap["color"], "short")["real"] == [False]


@pytest.mark.parametrize("kind", ["relation", "events"])
def test_what_is_said_of_an_object_is_judged_whatever_it_is_called_but_not_of_one_that_is_not_there(kind):
    i, pair = next((i, bodies) for i in range(len(WORLD)) if len(bodies := WORLD.scene(i).bodies) == 2 and
                   bodies[0].color != bodies[1].color and ("First" in WORLD.captions(i)["detailed"] or kind != "events")
                   )  # fmt: skip
    true, body = WORLD.captions(i)["detailed"], pair[0]
    name, wrong = f"{body.color} {body.shape}", f"{body.color} {'star' if body.shape != 'star' else 'circle'}"
    found = judge_caption(WORLD, i, true.replace(name, wrong), "detailed")
    assert found[kind] and found["color"] and found["shape"] is found["joint"] is False
    head, tail = true.split("At the start")
    for text in (f"{head}At the start{tail.replace(name, wrong)}", f"{head.replace(name, wrong)}At the start{tail}"):
        assert judge_caption(WORLD, i, text, "detailed")[kind] is False


PLACES = ("at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
          "at the bottom left", "at the bottom", "at the bottom right")  # fmt: skip


def test_a_place_is_right_within_half_a_pixel_of_it_and_no_further():
    world, found = World(WorldConfig(num_samples=60, motions=("still",), num_objects=(1, 1))), {True: 0, False: 0}
    for i in range(len(world)):
        scene, text = world.scene(i), world.caption(i, style="detailed")
        x, y = scene.bodies[0].path.state(np.zeros(1))[0][0] / (scene.width, scene.height) * 32
        true = next(place for place in sorted(PLACES, key=len, reverse=True) if place in text)
        near = [abs(at - line) <= 0.5 for at in (x, y) for line in (32 / 3, 64 / 3)]
        for place in set(PLACES) - {true}:
            right = judge_caption(world, i, text.replace(true, place), "detailed")["place"]
            assert not right or any(near)
            found[right] += 1
        # What a step of half a pixel over the nearest line leads to is right.
        assert any(near) == any(judge_caption(world, i, text.replace(true, place), "detailed")["place"]
                                for place in set(PLACES) - {true})  # fmt: skip
    assert found[True] and found[False]


def test_events_may_change_places_within_half_a_frame_and_no_further():
    world = World(WorldConfig(num_samples=200, motions=("fall",), num_objects=(2, 2), shapes=((9, 32, 32),)))
    found = {True: 0, False: 0}
    for i in range(len(world)):
        text = world.caption(i, style="detailed")
        first, second = (f"{body.color} {body.shape}" for body in world.scene(i).bodies)
        times = {}
        for time, _, body, _ in world.scene(i).contacts(1.0):
            times.setdefault(body, time)
        if "First" not in text or len(times) < 2 or first == second:
            continue
        before, events = text.split("First")
        turned = events.replace(first, "x").replace(second, first).replace("x", second)
        right = judge_caption(world, i, f"{before}First{turned}", "detailed")["events"]
        assert right == (abs(times[0] - times[1]) * world.config.fps <= 0.5)
        found[right] += 1
    assert found[True] and found[False]


def test_a_captioner_reads_latents_too(tiny_run, tmp_path):
    workdir = str(tmp_path / "run")
    experiment = tiny("captioner_world", "model.reads=latents", "model.in_channels=5", "model.patch_size=(1,4,4)",
                      f"vae.path={tiny_run}", "data.world.shapes=((5,32,32),)", "data.row_tokens=32", "train.steps=2",
                      "eval.every=2", QUICK)  # fmt: skip
    train(experiment, workdir)
    run, world = load_captioner(workdir), World(WorldConfig(num_samples=2, shapes=((5, 32, 32),)))
    texts = run.writer.captions([world[0]["video"], world[1]["video"]], "short", DecodingConfig(max_tokens=5))
    assert len(texts) == 2 and run.grid == dict(spatial_multiple=16, temporal_stride=2)
