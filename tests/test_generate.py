"""What is given stays as it is and is all that a request sees of it; requests do not know what they are packed with."""

import numpy as np
import pytest
from tiny_generator import tiny_generator

from sorax.errors import UserError
from sorax.generate import Request, given_frames

SHAPE = (5, 16, 24)
SETTINGS = dict(num_steps=3, guidance_scale=2.0, solver="unipc")


@pytest.fixture(scope="module")
def generator():
    return tiny_generator()


def clip(num_frames=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, *SHAPE[1:], 3), dtype=np.uint8)


def test_what_is_given_is_in_the_result_bit_for_bit(generator):
    mask, latents = given_frames(generator.codec, {0: clip(), 2: clip(seed=1)}, *SHAPE)
    assert mask.any((1, 2)).tolist() == [True, False, True]
    request = Request("a red circle", *SHAPE, given=(mask, latents))
    made = generator.latents([request], **SETTINGS)[0]
    np.testing.assert_array_equal(made[mask], latents[mask])
    np.testing.assert_array_equal(latents[0], generator.codec.encode([clip()])[0][0])


def test_what_is_given_moves_the_rest_and_what_lies_under_the_mask_does_not(generator):
    mask, latents = given_frames(generator.codec, {0: clip()}, *SHAPE)
    elsewhere = np.where(mask[..., None], latents, 7.0)
    others = np.where(mask[..., None], latents + 1, 0.0)
    made = [generator.latents([Request("x", *SHAPE, given=(mask, given))], **SETTINGS)[0]
            for given in (latents, elsewhere, others)]  # fmt: skip
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2])[~mask].max() > 1e-3
    noise = np.asarray(made[0]) * 0  # nor does the noise where something is given
    two = [generator.latents([Request("x", *SHAPE, given=(mask, latents), noise=n)], **SETTINGS)[0]
           for n in (noise, np.where(mask[..., None], 3.0, noise))]  # fmt: skip
    np.testing.assert_array_equal(*two)


def test_requests_with_and_without_something_given_are_packed_as_if_alone(generator):
    """To 1e-5 of the largest: rows of other lengths sum in another order."""
    patch = np.zeros((3, 4, 6), bool)
    patch[:, :2, 2:4] = True  # in space, through time
    requests = [
        Request("a", *SHAPE, seed=1), Request("a long prompt", 1, 16, 16, seed=2),
        Request("b", *SHAPE, seed=3, given=given_frames(generator.codec, {0: clip(3)}, *SHAPE)),
        Request("c", *SHAPE, seed=4, given=(patch, generator.codec.encode([clip(5)])[0])),
    ]  # fmt: skip
    together = generator.latents(requests, **SETTINGS)
    for request, made in zip(requests, together):
        alone = generator.latents([request], **SETTINGS)[0]
        np.testing.assert_allclose(made, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_what_cannot_be_given_is_refused(generator):
    codec = generator.codec
    with pytest.raises(UserError, match="24x16 pixels, the video 16x16: scale it"):
        given_frames(codec, {0: clip()}, 5, 16, 16)
    with pytest.raises(UserError, match="latent frames 2 to 3 of 3, which are not there"):
        given_frames(codec, {2: clip(3)}, *SHAPE)
    with pytest.raises(UserError, match="given twice"):
        given_frames(codec, {0: clip(3), 1: clip()}, *SHAPE)
    mask, latents = given_frames(codec, {0: clip()}, *SHAPE)
    part = mask.copy()
    part[1, 0, 0] = True
    for given, message in (
        ((mask[:1], latents), "make the mask"), ((mask, latents[..., :1]), "make the mask"),
        ((mask, latents * np.nan), "NaN"), ((part, latents), "a patch of .* is given in part"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            generator.latents([Request("x", *SHAPE, given=given)], **SETTINGS)


def test_requests_of_every_schedule_and_guidance_are_packed_as_if_alone(generator):
    """An edit starts partway, a shift follows the number of tokens, guidance has an interval and is rescaled."""
    latents = generator.codec.encode([clip(5)])[0]
    requests = [
        Request("a", *SHAPE, seed=1), Request("b", *SHAPE, seed=2, edit=(latents, 0.5)),
        Request("c", 1, 16, 16, seed=3), Request("d", *SHAPE, seed=4, edit=(latents, 0.5),
                                                 given=given_frames(generator.codec, {0: clip()}, *SHAPE)),
    ]  # fmt: skip
    settings = SETTINGS | dict(shift_tokens=16, guidance_interval=(0.2, 0.8), guidance_rescale=0.7, num_steps=4)
    together = generator.latents(requests, **settings)
    for k in (1, 3):
        alone = generator.latents([requests[k]], **settings)[0]
        np.testing.assert_allclose(together[k], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_an_edit_keeps_more_the_less_noise_it_starts_with(generator):
    latents = generator.codec.encode([clip(5)])[0]
    far = [np.abs(generator.latents([Request("x", *SHAPE, edit=(latents, s))], **SETTINGS)[0] - latents).mean()
           for s in (0.01, 0.3, 1.0)]  # fmt: skip
    assert far[0] < 0.1 * far[2] and far[0] < far[1] < far[2]
    whole, plain = (generator.latents([Request("x", *SHAPE, edit=edit)], **SETTINGS)[0]
                    for edit in ((latents, 1.0), None))  # fmt: skip
    np.testing.assert_allclose(whole, plain, atol=1e-4)  # sigma begins at 1 - 1e-6
    with pytest.raises(UserError, match="make both the same"):
        generator.latents([Request("x", *SHAPE, edit=(latents[:1], 0.5))], **SETTINGS)
    with pytest.raises(UserError, match="starts between"):
        generator.latents([Request("x", *SHAPE, edit=(latents, 0.0))], **SETTINGS)


def test_guidance_outside_of_its_interval_is_off(generator):
    requests = [Request("a red circle", *SHAPE, negative_prompt="blue")]
    plain, off, narrow, whole = (
        generator.latents(requests, **SETTINGS | changed)[0]
        for changed in (dict(guidance_scale=1.0), dict(guidance_interval=(0, 0)), dict(guidance_interval=(0.8, 1)), {})
    )
    np.testing.assert_allclose(off, plain, atol=1e-5 * np.abs(plain).max())
    assert np.abs(narrow - plain).max() > 1e-3 and np.abs(narrow - whole).max() > 1e-3


def test_reuse_runs_the_network_less_and_zero_changes_nothing(generator):
    requests, settings = [Request("a red circle", *SHAPE)], SETTINGS | dict(num_steps=12)
    exact = generator.latents(requests, **settings)[0]
    assert generator.runs == 12
    near = generator.latents(requests, **settings, reuse=0.5)[0]
    assert 3 <= generator.runs < 12
    assert np.abs(near - exact).mean() < 0.5 * np.abs(exact).mean()
    for wrong in (dict(reuse=-1), dict(rising=2), dict(shift_tokens=-1), dict(guidance_interval=(0.9, 0.1)),
                  dict(guidance_rescale=2)):  # fmt: skip
        with pytest.raises(UserError, match="sampling: "):
            generator.latents(requests, **settings | wrong)


def test_noise_that_rises_along_time_makes_first_frames_first_and_what_fits_is_unchanged(generator):
    """Images have one frame, which does not wait; of clips the frames lag behind, those that are given do not count."""
    image, video = Request("a", 1, 16, 16, seed=1), Request("b", *SHAPE, seed=2)
    given = Request("c", *SHAPE, seed=3, given=given_frames(generator.codec, {0: clip(3)}, *SHAPE))
    settings = SETTINGS | dict(num_steps=4)
    plain, late = (generator.latents([image, video, given], **settings, rising=r) for r in (0.0, 0.5))
    assert generator.runs == 6
    for k in (0, 2):  # two frames of the third are given: the last has nothing to lag behind
        np.testing.assert_allclose(late[k], plain[k], rtol=0, atol=1e-5 * np.abs(plain[k]).max())
    assert np.abs(late[1] - plain[1]).max() > 1e-3
    alone = generator.latents([video], **settings, rising=0.5)[0]
    np.testing.assert_allclose(late[1], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_steps_are_told_of_and_change_nothing_and_what_the_listener_raises_ends_it():
    generator, requests, seen = tiny_generator(), [Request("a red circle", 5, 16, 16, seed=1)], []
    settings = dict(num_steps=3, guidance_scale=3.0)
    plain = generator.latents(requests, **settings)[0]
    assert np.array_equal(plain, generator.latents(requests, on_step=seen.append, **settings)[0]) and seen == [1, 2, 3]

    def stop(step):
        if step == 2:
            raise EOFError("enough")

    with pytest.raises(EOFError, match="enough"):
        generator.latents(requests, on_step=stop, **settings)
    assert np.array_equal(plain, generator.latents(requests, on_step=seen.append, **settings)[0])
