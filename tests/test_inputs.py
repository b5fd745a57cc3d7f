"""Files that users give are read at the video's rate and size, in parts; what is wrong with one is said."""

import numpy as np
import pytest
from PIL import Image
from video_files import make_bad, numbered, numbers, write, write_sound

from sorax import inputs
from sorax.errors import UserError


def test_a_clip_is_read_in_parts_at_the_rate_and_size_that_are_asked_for(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(16), fps=8)
    clip = inputs.Clip(path, 4.0, 24, 32)
    assert clip.shape == (8, 24, 32, 3) and len(clip) == 8 and not clip.is_cropped
    assert numbers(clip[0:8]) == list(range(0, 16, 2)) and numbers(clip[5:7]) == [10, 12]
    assert len(inputs.Clip(path, 8.0, 24, 32, seconds=0.5)) == 4
    with pytest.raises(ValueError, match="one after the other"):
        clip[3:3]


def test_a_picture_covers_its_size_and_is_cut_in_the_middle(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    clip = inputs.Clip(tmp_path / "a.png", 1.0, 20, 20)
    assert clip.is_cropped and len(clip) == 1 and clip[0:1].min() >= 190
    np.testing.assert_array_equal(inputs.read_image(tmp_path / "a.png", 20, 60)[0], picture)


def test_sizes_keep_the_shape_of_a_picture_within_an_area(tmp_path):
    Image.new("RGB", (640, 360)).save(tmp_path / "a.png")
    height, width = inputs.fitting_size(inputs.inspect(tmp_path / "a.png"), 32 * 32, 8)
    assert height % 8 == width % 8 == 0 and height * width <= 32 * 32 and 1.3 < width / height < 2.1
    Image.new("RGB", (3, 3)).save(tmp_path / "b.png")
    assert inputs.fitting_size(inputs.inspect(tmp_path / "b.png"), 32 * 32, 8) == (8, 8)


@pytest.mark.parametrize("kind", ["zero bytes", "text", "garbage header", "cut image", "pipe", "truncated"])
def test_a_damaged_file_is_named_with_its_reason(tmp_path, kind):
    bad = make_bad(tmp_path, kind)
    with pytest.raises(UserError, match=rf"{bad.name}' cannot be used: \w+"):
        inputs.Clip(bad, 8.0, 24, 32)[0:1]


def test_sound_alone_and_what_is_not_there_and_what_is_huge_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.mp4' cannot be used: holds no video stream"):
        inputs.inspect(write_sound(tmp_path / "a.mp4"))
    with pytest.raises(UserError, match="no such file"):
        inputs.inspect(tmp_path / "none.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match="too large"):
        inputs.inspect(tmp_path / "huge.png")


def test_masks_are_of_the_size_and_length_of_their_clip(tmp_path):
    clip = inputs.Clip(write(tmp_path / "a.mp4", numbered(8), fps=8), 8.0, 24, 32)
    Image.fromarray(np.uint8([[0] * 32 + [255] * 32] * 48)).save(tmp_path / "half.png")
    mask = inputs.Mask(tmp_path / "half.png", clip)
    assert mask.shape == (8, 24, 32) and len(mask) == 8
    assert mask[2:4].shape == (2, 24, 32) and mask[2:4][:, :, 18:].all() and not mask[2:4][:, :, :14].any()
    moving = numbered(8)
    moving[:4], moving[4:] = 0, 255
    film = inputs.Mask(write(tmp_path / "m.mp4", moving, fps=8), clip)
    assert film[0:8].mean((1, 2)).tolist() == [0] * 4 + [1] * 4
    Image.new("L", (40, 40)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match="40x40 pixels, the video 64x48: make them the same"):
        inputs.Mask(tmp_path / "other.png", clip)
    with pytest.raises(UserError, match="4 frames at 8 fps, the video 8"):
        inputs.Mask(write(tmp_path / "short.mp4", moving[:4], fps=8), clip)
