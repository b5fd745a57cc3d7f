"""The form of the app is a command of `sorax sample`, which makes the same file; it serves its own files alone."""

import json
import pathlib
import re
import shlex
import threading
import urllib.error
import urllib.request

import av
import numpy as np
import pytest
from PIL import Image
from video_files import numbered

from data_pipelines.decode import decode
from sorax import cli, cli_app, sample_files
from sorax.app import MODES, App, Form, parse, words_of
from sorax.errors import UserError
from sorax.runs import load_run

FULL = dict(prompt="a red circle", shots="0: a\n2s:  b: c\n", image="a.png", video="v.mp4", second="w.mp4",
            mask="m.png", keyframes=(("0", "a.png"), (" 2s", "b.png")), strength=0.5, seconds=2.0, seed=7)  # fmt: skip


def test_every_mode_is_a_command():
    flags = dict(
        text={}, picture=dict(frames=1, seconds=None), image=dict(image="kept/a.png"),
        keyframes=dict(keyframe=("0:kept/a.png", "2s:kept/b.png")), extend=dict(extend="forward", video="kept/v.mp4"),
        loop=dict(loop=True), loop_clip=dict(loop=True, video="kept/v.mp4"),
        connect=dict(connect=("kept/v.mp4", "kept/w.mp4")), edit=dict(strength=0.5, video="kept/v.mp4"),
        inpaint=dict(mask="kept/m.png", video="kept/v.mp4"), shots={},
    )  # fmt: skip
    assert flags.keys() == MODES.keys()
    for mode, expected in flags.items():
        arguments = parse(["--run", "W", *words_of(Form(mode=mode, **FULL), lambda path: f"kept/{path}")])
        ask = sample_files.check(arguments)
        assert {name: getattr(ask, name) for name in expected} == expected
        assert arguments.seed == 7 and ask.seconds == (None if mode == "picture" else 2.0)
        assert arguments.prompt == ([] if mode == "shots" else ["a red circle"])
        assert arguments.shot == (["0:a", "2s:b: c"] if mode == "shots" else [])


def test_words_that_look_like_flags_are_none():
    words = words_of(Form(prompt="--seed 3", negative_prompt="-x", guidance=-1.5, fps=0.1))
    arguments = parse(["--run", "W", *words])
    assert arguments.prompt == ["--seed 3"] and arguments.negative_prompt == "-x" and arguments.seed == 0
    assert arguments.guidance == -1.5 and arguments.fps == 0.1


@pytest.mark.parametrize(
    "form, message",
    [
        (dict(mode="image"), "Image to video needs an image"),
        (dict(mode="connect", video="v.mp4"), "needs two clips"),
        (dict(mode="keyframes"), "needs an image at least"),
        (dict(mode="morph"), "is not a mode"),
        (dict(mode="extend", video="v.mp4", extend="up"), "invalid choice"),
        (dict(prompt="x", steps=1.5), "invalid int"),
        (dict(prompt="x", seconds="two"), "invalid float"),
    ],
)
def test_what_is_missing_or_wrong_is_said(form, message):
    with pytest.raises(UserError, match=message):
        parse(["--run", "W", *words_of(Form(**form))])


@pytest.fixture(scope="module")
def app(tiny_run, tmp_path_factory):
    return App(load_run(tiny_run), ["--run", tiny_run], str(tmp_path_factory.mktemp("app") / "out"))


def last(app, **form):
    *_, report = app.make(Form(**form), threading.Event())
    assert not report.error, report.error
    return report.result


def test_the_command_makes_the_same_file(app, tmp_path):
    Image.fromarray(numbered(1, 32, 32)[0]).save(tmp_path / "my name.png")
    for form in (dict(prompt="a red circle", seed=5), dict(mode="image", image=str(tmp_path / "my name.png"), seed=6)):
        result = last(app, steps=3, **form)
        file = pathlib.Path(result.path)
        made, seen = file.read_bytes(), decode(file, 5, 32, 32, 6.0)
        with av.open(result.path) as container:
            assert json.loads(container.metadata["comment"]) == json.loads(json.dumps(result.facts))
        assert result.facts["seed"] == form["seed"] and "my name" not in result.facts["command"]
        file.unlink()
        assert cli.main(shlex.split(result.facts["command"])[1:]) == 0
        assert file.read_bytes() == made and np.array_equal(decode(file, 5, 32, 32, 6.0), seen)


def test_every_step_is_reported_and_one_can_be_the_last(app):
    reports = list(app.make(Form(prompt="a red circle", steps=2, mode="picture", guidance=1.0), threading.Event()))
    assert reports[-1].result.is_picture and Image.open(reports[-1].result.path).size == (32, 32)
    shares = [report.share for report in reports]
    assert shares == sorted(shares) and shares[-1] == 1
    before, stop, steps = sorted(pathlib.Path(app.out).iterdir()), threading.Event(), []
    plain = app.generator.latents

    def latents(requests, *, on_step, **settings):
        def step(number):
            steps.append(number)
            if number == 2:
                stop.set()
            on_step(number)

        return plain(requests, on_step=step, **settings)

    app.generator.latents = latents
    try:
        *_, report = app.make(Form(prompt="a red circle", steps=3), stop)
    finally:
        del app.generator.latents
    assert report.error == "cancelled: nothing was written" and steps == [1, 2]
    assert sorted(pathlib.Path(app.out).iterdir()) == before
    *_, report = app.make(Form(prompt="a red circle", size="no"), threading.Event())
    assert "not WxH" in report.error and not report.result


@pytest.mark.parametrize(
    "form, message",
    [
        (dict(seconds=61.0), "366 frames are more than this page makes, 360: .*--max-seconds"),
        (dict(seconds=6.1, fps=60.0), "366 frames are more"),
        (dict(size="1296x32"), "1296 pixels a side are more than this page makes, 1280: .*--max-side"),
        (dict(size="32x90000", mode="image"), "90000 pixels a side"),
    ],
)
def test_who_asks_for_too_much_is_told_how_much_there_is_before_a_file_is_read(app, form, message, monkeypatch):
    monkeypatch.setattr(sample_files, "prepare", lambda *_: pytest.fail("files are read"))
    *_, report = app.make(Form(prompt="a red circle", image=__file__, **form), threading.Event())
    assert re.search(message, report.error) and not report.result


def test_what_is_as_long_and_large_as_may_be_is_made_though_the_grid_is_coarser(app, monkeypatch):
    monkeypatch.setattr(app, "max_frames", 6.0)
    monkeypatch.setattr(app, "max_side", 40)
    for form in (dict(seconds=1.0, size="32x32"), dict(size="40x32")):
        last(app, prompt="a red circle", steps=1, **form)
    *_, report = app.make(Form(prompt="a red circle", mode="loop_clip", video=app.results[-1].path, seconds=1.0),
                          threading.Event())  # fmt: skip
    assert "frames are more" in report.error  # with those of the clip


def test_a_folder_of_other_files_is_not_shown(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(UserError, match=r"secret\.txt, which the page could show"):
        App(None, [], str(tmp_path))


def test_only_this_machine_may_open_it_without_a_password(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="the app needs gradio: pip install 'sorax[app]'")
    assert cli.main(["app", "--run", "W", "--host", "0.0.0.0"]) == 2
    assert "give --auth FILE" in capsys.readouterr().err
    for text in ("", "alone\n", ":x\n"):
        (tmp_path / "users").write_text(text)
        with pytest.raises(UserError, match="USER:PASSWORD"):
            cli_app.read_users(str(tmp_path / "users"))
    (tmp_path / "users").write_text("a:b:c\n")
    assert cli_app.read_users(str(tmp_path / "users")) == [("a", "b:c")]
    assert cli_app.is_loopback("::1") and cli_app.is_loopback("127.0.0.2") and not cli_app.is_loopback("example.org")


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["app", "--run", "W"]) == 2
    assert capsys.readouterr().err == "sorax: sorax app needs gradio: pip install 'sorax[app]'\n"


def answer(url, path, **headers):
    request = urllib.request.Request(url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_the_page_serves_its_own_alone(app, tmp_path):
    pytest.importorskip("gradio", reason="the app needs gradio: pip install 'sorax[app]'")
    from gradio_client import Client

    from sorax.app_page import closing, serve

    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    url, served = serve(app, host="127.0.0.1", port=0, max_upload=1, block=False)
    url = url.rstrip("/")
    with closing(app, *served):
        status, headers, body = answer(url, "/")
        assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
        assert b"fonts.googleapis.com/css" not in body
        assert answer(url, "/", Host="evil.example")[0] == 400
        assert answer(url, f"/gradio_api/file={secret}")[0] == 403
        big = urllib.request.Request(f"{url}/gradio_api/upload", data=bytes(1_200_000))
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(big, timeout=30)
        client = Client(url, verbose=False)
        rest = ["", False, *[None] * 4, *[None, ""] * 4, "forward", 0.6, "", "", "", 8, False, 2, "euler", 1.0, 3.0,
                *[""] * 6]  # fmt: skip
        values = client.predict("text", "a red circle", *rest, api_name="/generate")
        assert "Made 5 frames of 32x32" in values[0] and "seed 8" in values[0] and app.results[-1].path in values[0]
        name = pathlib.Path(app.results[-1].path).resolve()
        assert answer(url, f"/gradio_api/file={name}")[2] == name.read_bytes()
        assert "Image to video needs an image" in client.predict("image", "x", *rest, api_name="/generate")[0]
