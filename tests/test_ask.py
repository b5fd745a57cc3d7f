"""Flags that do not go together are refused with a reason, before anything is read."""

import pytest

from sorax.ask import Ask, frame_at, prompts_at, split_time
from sorax.errors import UserError


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(frames=5, seconds=1.0), "say the same twice"),
        (dict(seconds=-2.0), "--seconds is -2"),
        (dict(seconds=float("inf")), "--seconds is inf"),
        (dict(frames=-5), "above 0"),
        (dict(video="a.mp4"), "add --extend forward"),
        (dict(video="a.mp4", connect=("a.mp4", "b.mp4")), "add --extend forward"),
        (dict(video="a.mp4", extend="forward", loop=True), "--extend and --loop are two things"),
        (dict(video="a.mp4", extend="up"), "write forward or backward"),
        (dict(extend="forward"), "--extend needs a clip"),
        (dict(strength=0.5), "--strength needs a clip"),
        (dict(mask="m.png"), "--mask needs a clip"),
        (dict(image="a.png", loop=True), "begin a video of their own"),
        (dict(video="a.mp4", extend="forward", frames=5), "with a clip give --seconds"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        Ask(**flags)


def test_times_are_frames_or_seconds():
    assert split_time("48:b:c.png") == ("48", "b:c.png") and split_time("2.5s:a red circle") == ("2.5s", "a red circle")
    assert frame_at("48", 6.0) == 48 and frame_at("2.5s", 6.0) == 15
    for text in ("b.png", "-1:b.png", "s:b.png", "1.5:b.png", "3:"):
        with pytest.raises(UserError, match="has no time"):
            split_time(text)
    assert prompts_at(["1s:b", "0:a"], 6.0) == ((0, "a"), (6, "b"))
    for shots in (["1s:b"], ["0:a", "0s:b"]):
        with pytest.raises(UserError, match="the first begins at 0"):
            prompts_at(shots, 6.0)


def test_files_are_those_of_all_flags():
    assert Ask(image="a.png", keyframe=("8:b.png",)).files == ("a.png", "b.png")
    assert Ask(connect=("a.mp4", "b.mp4")).files == ("a.mp4", "b.mp4") and Ask().files == ()
