"""Videos to latents and back: of any length, in tiles where asked for, and with a word for every wrong input."""

import jax
import numpy as np
import pytest
from random_params import assert_close, random_params

from sorax import encode
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.vae import VAE, VAEConfig

CONFIG = VAEConfig(4, (1, 2), 1, 3, (True,))  # strides: 2 in time, 2 in space
PARAMS = random_params(VAE, CONFIG)[1]


@pytest.fixture(scope="module")
def codec():
    return Codec(CONFIG, PARAMS)


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (3, 9, 8, 12, 3), np.uint8))


def differences(videos, others):
    return np.abs(np.int16(videos) - np.int16(others))


def test_long_videos_go_in_chunks_to_the_same_numbers(codec, videos, monkeypatch):
    latents = codec.encode(videos)
    shown, statistics = codec.decode(latents), codec.statistics(videos)
    monkeypatch.setattr(encode, "PIXELS_A_BATCH", 8 * 12 * 5)  # chunks of 4 frames, the last one filled up
    assert_close(codec.encode(videos), latents)
    assert_close(codec.statistics(videos), statistics)
    chunked = differences(codec.decode(latents), shown)
    assert chunked.max() <= 1 and chunked.mean() < 1e-3  # a rounding to bytes may fall to the other side


def test_a_chunk_has_at_most_so_many_pixels(codec, monkeypatch):
    """Whatever the length; one latent frame goes through even if it has more."""
    sizes = []

    def spy(program, params, items, first, later, put):
        sizes.append((first, later))
        raise InterruptedError

    monkeypatch.setattr(encode.stream, "in_chunks", spy)
    monkeypatch.setattr(encode, "PIXELS_A_BATCH", 8 * 12 * 7)
    for way, shape in ((encode.ENCODE, (1, 501, 8, 12, 3)), (encode.DECODE, (1, 251, 4, 6, 3)),
                       (encode.ENCODE, (1, 7, 8, 12, 3)), (encode.ENCODE, (1, 501, 80, 12, 3))):  # fmt: skip
        with pytest.raises(InterruptedError):
            codec.start(way, np.zeros(shape, np.uint8))
    assert sizes == [(7, 6), (4, 3), (7, 6), (3, 2)]


def test_floats_in_minus_one_to_one_are_pixels_too(codec, videos):
    assert_close(codec.encode([v.astype(np.float32) / 127.5 - 1 for v in videos]), codec.encode(videos))


def test_tiles_at_least_as_large_as_the_frame_change_nothing(codec, videos):
    tiled = Codec(CONFIG, PARAMS, tile=12)
    latents = codec.encode(videos)
    np.testing.assert_array_equal(tiled.encode(videos), latents)
    np.testing.assert_array_equal(tiled.decode(latents), codec.decode(latents))


def test_tiles_come_close_to_the_whole_frame_and_closer_with_more_overlap():
    """Away from the attention, which sees all of a frame: its output is set to nothing here."""
    config = VAEConfig(4, (1, 1), 1, 3, (True,))
    params = random_params(VAE, config)[1]
    for side in ("encoder", "decoder"):
        attention = params[side]["middle"]["attention"]
        attention["proj"] = jax.tree.map(np.zeros_like, attention["proj"])
    x = np.linspace(0, 3, 40)
    frame = 127 + 120 * np.sin(x[:, None, None] + 2 * x[:, None] + np.arange(3))
    videos = [np.repeat(frame[None].astype(np.uint8), 3, axis=0), np.zeros((1, 4, 4, 3), np.uint8)]
    whole = Codec(config, params)
    latents = whole.encode(videos)
    errors = []
    for overlap in (0, 12):
        tiled = Codec(config, params, tile=24, overlap=overlap)
        found = tiled.encode(videos)
        assert_close(found[1], latents[1])
        errors.append(np.sqrt(np.mean((found[0] - latents[0]) ** 2)))
        errors.append(np.sqrt(np.mean(differences(tiled.decode(latents)[0], whole.decode(latents)[0]) ** 2.0)))
    assert 0 < errors[2] < errors[0] and 0 < errors[3] < errors[1]


def wrong_videos():
    video = np.zeros((5, 8, 12, 3), np.uint8)
    floats = np.zeros(video.shape, np.float32)
    some_nan = floats.copy()
    some_nan[2, 3, 4] = np.nan
    return {
        "even number of frames": (video[:4], r"2n \+ 1 frames, got 4: cut it to 3"),
        "no frames": (video[:0], "got 0: there is nothing in it"),
        "channels first": (np.moveaxis(video, -1, 0), r"\[3, 5, 8, 12\]: move axis 0 to the end"),
        "channels second": (np.moveaxis(video, -1, 1), "move axis 1 to the end"),
        "a batch": (video[None], r"\[1, 5, 8, 12, 3\]: pass a list of videos"),
        "a frame": (video[0], r"pass a frame as video\[None\]"),
        "grey": (video[..., :1], "pass RGB frames, channels last"),
        "a name": ("video.mp4", "pass a list of arrays"),
        "NaN": (some_nan, r"3 of 1440 values are NaN or infinite, the first at \[2, 3, 4, 0\]"),
        "bytes as floats": (floats + 200, r"values in \[-1, 1\], this one up to 200: pass uint8, or divide by 127.5"),
        "integers": (video.astype(np.int64), r"uint8 .* or floats in \[-1, 1\], this one int64"),
        "off the grid": (video[:, :, :11], "multiples of 2, got 8 x 11 .*: crop or scale it"),
    }


@pytest.mark.parametrize("name", wrong_videos())
def test_a_wrong_video_is_refused_in_words(codec, name):
    video, message = wrong_videos()[name]
    with pytest.raises(UserError, match=message):
        codec.encode([video])


def test_of_several_the_wrong_one_is_named(codec, videos):
    with pytest.raises(UserError, match=r"video\[2\] of 3: .* got 4: cut it to 3"):
        codec.encode([*videos[:2], videos[2][:4]])
    latents = np.zeros((2, 4, 4, 3), np.float32)
    with pytest.raises(UserError, match=r"latents\[1\] of 2: .* these are \[2, 4, 3, 4\]: pass those of each video"):
        codec.decode([latents, latents.swapaxes(2, 3)])


@pytest.mark.parametrize(
    "latents, message",
    [
        (np.zeros((3, 2, 4, 4), np.float32), r"\[t, h, w, 3\] \(channels last\), these are \[3, 2, 4, 4\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "floats, these are uint8"),
        (np.full((2, 4, 4, 3), np.inf, np.float32), "96 of 96 values are NaN or infinite"),
        (np.zeros((0, 4, 4, 3), np.float32), "nothing to decode"),
    ],
)
def test_wrong_latents_are_refused_in_words(codec, latents, message):
    with pytest.raises(UserError, match=message):
        codec.decode([latents])


@pytest.mark.parametrize("tile, overlap", [(9, 0), (8, 3), (8, 8), (-8, 0), (8, -2)])
def test_tiles_off_the_grid_are_refused(tile, overlap):
    with pytest.raises(UserError, match="use multiples of 2, the overlap smaller than the tile"):
        Codec(CONFIG, PARAMS, tile=tile, overlap=overlap)


def test_a_codec_refuses_what_does_not_belong_together(codec):
    with pytest.raises(UserError, match="not those of a VAE of this config"):
        Codec(codec.config, {})
    with pytest.raises(UserError, match="overlap of 16 pixels without tiles"):
        Codec(codec.config, codec.params, overlap=16)
