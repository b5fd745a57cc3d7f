"""Raw files to clips: where they are cut, what is measured on them, and that what is written is what was there."""

import av
import numpy as np
import pytest
from curate_videos import fade_in, letterboxed, panning, texture
from PIL import Image
from video_files import damaged, write

from data_pipelines.curate_clips import clip_path, write_clips
from data_pipelines.curate_scan import judge, scan
from data_pipelines.curate_settings import Settings
from data_pipelines.decode import DecodeError, decode, probe

pytest.importorskip("scenedetect", reason="curation needs sorax[curate]")

QUICK = Settings(min_seconds=0.4, margin=0.0)
CAN_ROTATE = hasattr(av.video.stream.VideoStream, "set_display_rotation")


def cut(path, settings=QUICK):
    """scan() of a file, and what its good clips look like once written: {clip number: (info, video)}."""
    found = scan(path, settings)
    out = path.parent / f"{path.name} clips"
    (out / "clips").mkdir(parents=True)
    clips = [c | dict(path=clip_path(path.name, k, c["whole"])) for k, c in enumerate(found["clips"]) if not c["stage"]]
    sizes = write_clips(path.parent, path.name, out, out, found, clips, 60)
    assert sizes == {c["path"]: (out / c["path"]).stat().st_size for c in clips}
    assert {p.name for p in out.iterdir()} == {"clips"}
    written = {}
    for clip in clips:
        info = probe(out / clip["path"])
        video = decode(out / clip["path"], info.num_frames, info.height, info.width, info.fps)
        written[found["clips"].index({k: v for k, v in clip.items() if k != "path"})] = info, video
    return found, written


def error(a, b):
    return np.abs(a.astype(float) - b).mean((1, 2, 3)).max()


def test_a_cut_gives_two_clips_of_exactly_their_frames(tmp_path):
    video = np.concatenate([panning(0, 12), panning(1, 15)])
    found, written = cut(write(tmp_path / "a.mp4", video, fps=15))
    assert [(c["first"], c["end"]) for c in found["clips"]] == [(0, 12), (12, 27)]
    for number, (first, end) in enumerate([(0, 12), (12, 27)]):
        info, clip = written[number]
        assert (info.num_frames, info.fps, info.height, info.width) == (end - first, 15.0, 96, 128)
        wanted = decode(tmp_path / "a.mp4", 27, 96, 128, 15.0)[first:end]
        # Quantisation costs less than 2 grey levels; the frame before or after differs by more than 5.
        assert error(clip, wanted) < 2 and error(clip[1:], wanted[:-1]) > 5


def test_a_file_without_a_cut_is_copied(tmp_path):
    found, _ = cut(write(tmp_path / "a.webm", panning(0, 20), fps=15))
    assert [c["whole"] for c in found["clips"]] == [True] and found["trimmed"] == {}
    copy = next((tmp_path / "a.webm clips" / "clips").iterdir())
    assert copy.suffix == ".webm" and copy.read_bytes() == (tmp_path / "a.webm").read_bytes()


def test_every_frame_is_in_a_clip_or_counted_as_trimmed(tmp_path):
    video = np.concatenate([fade_in(panning(0, 20), 6), panning(1, 20)])
    found, _ = cut(write(tmp_path / "a.mp4", video, fps=15), Settings(min_seconds=0.4, margin=0.1))
    assert [c["first"] for c in found["clips"]] == [6, 22]  # margins at the cut: frames 18 to 21
    assert sum(c["end"] - c["first"] for c in found["clips"]) + sum(found["trimmed"].values()) == 40
    assert found["trimmed"]["margin"] == 4 and found["trimmed"]["blank"] + found["trimmed"]["fade"] == 6


def test_long_shots_are_split_and_short_ones_dropped(tmp_path):
    path = write(tmp_path / "a.mp4", np.concatenate([panning(0, 30), panning(1, 5)]), fps=10)
    clips = scan(path, Settings(min_seconds=0.75, max_seconds=1.5, margin=0.0))["clips"]
    assert [(c["first"], c["end"], c["stage"]) for c in clips] == [(0, 15, ""), (15, 30, ""), (30, 35, "length")]
    assert clips[2]["reason"] == "shorter than --min-seconds 0.75"


@pytest.mark.skipif(not CAN_ROTATE, reason="this PyAV reads rotation flags but cannot write them")
@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_rotated_file_comes_out_upright_copied_or_cut(tmp_path, turn):
    scenes = [panning(0, 10), panning(1, 10)]
    upright = [np.rot90(s, turn // 90, axes=(1, 2)) for s in scenes]  # the flag counts counter-clockwise
    whole = write(tmp_path / "whole.mp4", scenes[0], fps=10, rotation=turn)
    both = write(tmp_path / "both.mp4", np.concatenate(scenes), fps=10, rotation=turn)
    for path, shots in ((whole, upright[:1]), (both, upright)):
        found, written = cut(path)
        assert len(written) == len(shots) and found["rotation"] == turn
        for (info, clip), shot in zip(written.values(), shots):
            assert (info.height, info.width) == shot.shape[1:3]
            assert info.rotation == (turn if path == whole else 0)
            assert error(clip, shot) < 5  # two rounds of the codec; turned another way, it is above 40


def test_bars_are_cut_off(tmp_path):
    video = letterboxed(panning(0, 12), 14)
    found, written = cut(write(tmp_path / "a.mp4", video, fps=10))
    (clip,) = found["clips"]
    assert clip["bars"] == [16, 16, 0, 0] and not clip["whole"]
    info, pixels = written[0]
    assert (info.height, info.width) == (64, 128) == (clip["height"], clip["width"])
    assert error(pixels, video[:, 16:-16]) < 5
    assert clip["brightness"] == pytest.approx((video[:, 16:-16] @ [0.299, 0.587, 0.114]).mean(), abs=3)
    narrow = letterboxed(panning(0, 12), 36)
    (clip,) = scan(write(tmp_path / "b.mp4", narrow, fps=10), QUICK)["clips"]
    assert (clip["stage"], clip["reason"]) == ("bars", "bars leave less than --min-picture 0.4 of the frame")


@pytest.mark.parametrize("height, width, aspect", [(95, 127, None), (96, 128, 2)])
def test_odd_sides_lose_a_line_and_wide_pixels_become_square(tmp_path, height, width, aspect):
    video = np.concatenate([panning(k, 10, height, width) for k in range(2)])
    _, written = cut(write(tmp_path / "a.mp4", video, fps=10, aspect=aspect, pixel_format="yuv444p"))
    for info, pixels in written.values():
        assert pixels.shape[1:3] == (info.height, info.width) == (height // 2 * 2, width // 2 * 2 * (aspect or 1))
    if not aspect:
        assert error(pixels, video[10:, :94, :126]) < 8 < error(pixels, video[10:, 1:, 1:])  # colour at half the size


def test_a_variable_rate_keeps_its_times(tmp_path):
    gaps = [100, 100, 200, 100, 300, 100, 100, 200, 100] * 2
    times = [0, *np.cumsum(gaps).tolist()]
    video = np.concatenate([panning(0, 10), panning(1, 9)])
    found, written = cut(write(tmp_path / "a.webm", video, times_ms=times))
    assert [c["constant"] for c in found["clips"]] == [False, False]
    info, _ = written[1]
    assert info.span == pytest.approx((times[-1] - times[10]) / 1000, abs=1e-3)
    with av.open(str(next((tmp_path / "a.webm clips" / "clips").glob("*-0001.mp4")))) as container:
        found = [float(frame.time) for frame in container.decode(video=0)]
    np.testing.assert_allclose(found, np.array(times[10:]) / 1000 - times[10] / 1000, atol=2e-3)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv444p", "yuv420p10le"])
def test_colours_survive(tmp_path, pixel_format):
    video = np.concatenate([panning(k, 6) for k in range(2)])
    path = write(tmp_path / "a.mp4", video, fps=10, pixel_format=pixel_format)
    _, written = cut(path)
    before = decode(path, 12, 96, 128, 10.0)
    for number, (_, pixels) in written.items():
        wrong = pixels.astype(float) - before[6 * number : 6 * number + 6]
        # A wrong range or matrix shifts whole colours; colour at half the size blurs them.
        assert np.abs(wrong.mean((0, 1, 2))).max() < 2 and np.abs(wrong).mean() < 5


def test_scores_tell_static_dark_and_bright_clips(tmp_path):
    moving, still = panning(0, 12), np.repeat(panning(0, 1), 12, 0)
    noise = np.random.default_rng(0).normal(0, 3, still.shape)
    videos = dict(moving=moving, static=np.clip(still + noise, 0, 255), dark=moving * 0.12,
                  bright=255 - (255 - moving) * 0.1)  # fmt: skip
    for name, video in videos.items():
        (clip,) = scan(write(tmp_path / f"{name}.mp4", video.astype(np.uint8), fps=12), QUICK)["clips"]
        stage, reason = judge(clip, QUICK)
        wanted = dict(moving="", static="static: below", dark="too dark: below", bright="too bright: above")[name]
        assert reason.startswith(wanted) and bool(reason) == bool(wanted)
        assert stage == dict(moving="", static="motion").get(name, "brightness")


def test_motion_is_that_of_the_picture_within_the_bars(tmp_path):
    plain, boxed = panning(0, 12, speed=3), letterboxed(panning(0, 12, speed=3), 20)
    scores = [scan(write(tmp_path / f"{k}.mp4", v, fps=12), QUICK)["clips"][0]["motion"]
              for k, v in enumerate((plain, boxed))]  # fmt: skip
    assert scores == pytest.approx([3 / 128 * 12] * 2, rel=0.3)


def test_an_image_is_one_clip_as_it_is(tmp_path):
    Image.fromarray(texture(0, 60, 80)).save(tmp_path / "a.png")
    found, written = cut(tmp_path / "a.png", Settings())
    (clip,) = found["clips"]
    assert clip["whole"] and judge(clip, Settings(), found["is_image"]) == ("", "")
    np.testing.assert_array_equal(written[0][1][0], texture(0, 60, 80))


def test_bad_files_give_a_reason(tmp_path):
    good = write(tmp_path / "good.mp4", panning(0, 30))
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    for path, reason, settings in (
        (damaged(good, tmp_path / "cut.mp4", keep=0.5), "truncated", QUICK),
        (damaged(good, tmp_path / "garbage.mp4", garbage=(0.3, 0.6)), "corrupt|cannot be decoded|truncated", QUICK),
        (tmp_path / "text.mp4", "not a video", QUICK),
        (good, "longer than --max-file-seconds 2", Settings(max_file_seconds=2)),
        (write(tmp_path / "tiny.mp4", panning(0, 9, 8, 64)), "too small: 64x8", QUICK),
    ):
        with pytest.raises(DecodeError, match=reason):
            scan(path, settings)


def test_a_file_that_changes_between_looking_and_cutting_is_noticed(tmp_path):
    path = write(tmp_path / "a.mp4", np.concatenate([panning(0, 12), panning(1, 12)]), fps=12)
    found = scan(path, QUICK)
    write(path, panning(0, 15), fps=12)
    clips = [c | dict(path=f"clips/{k}.mp4") for k, c in enumerate(found["clips"])]
    (tmp_path / "clips").mkdir()
    with pytest.raises(DecodeError, match="changed while it was curated"):
        write_clips(tmp_path, "a.mp4", tmp_path, tmp_path, found, clips, 60)


def test_names_of_clips_are_plain_and_differ_by_file(tmp_path):
    names = {clip_path(f, 0, True) for f in ("a.mp4", "b/a.mp4", "b_a.mp4", "../a.mp4", "a\n.mp4", "ä" * 300 + ".mp4")}
    assert len(names) == 6
    assert all(name.startswith("clips/") and name[6:].isascii() and "/" not in name[6:] for name in names)
    assert max(map(len, names)) < 100
