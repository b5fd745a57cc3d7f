"""Windows cover a timeline once, each with what it goes on from; what they make has what was given, without seams."""

import numpy as np
import pytest
from hypothesis import example, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from tiny_generator import tiny_generator

from sorax import modes
from sorax.errors import UserError
from sorax.generate import Request
from sorax.windows import Job, Window, latent_sizes, longest_gap, make, plan

SETTINGS = dict(num_steps=2, guidance_scale=2.0)
H, W = 16, 24


def clip(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, H, W, 3), dtype=np.uint8)


timelines = st.lists(st.booleans(), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@for_all(timelines, st.integers(3, 12), st.integers(1, 6), st.sets(st.integers(0, 40)))
@example([False] * 5 + [True], 4, 1, {0, 1, 4})
def test_windows_make_everything_once_and_see_what_is_there(known, size, overlap, breaks):
    overlap = min(overlap, size - 1)
    backward, forward = plan(known, size, overlap, tuple(breaks))
    done = set(np.flatnonzero(known)) if backward else set()
    order = sorted(backward, key=lambda w: w.first) + forward
    assert [w.first for w in order] == [0, *(w.last for w in order[:-1])] and order[-1].last == len(known)
    for window in backward + forward:
        assert window.start <= window.first < window.last <= window.stop <= window.start + size
        new = set(range(window.first, window.last))
        makes = not all(known[window.first : window.last])
        assert not (makes and any(window.first < b < min(window.last, len(known)) for b in breaks))
        if window.start:  # the frame that it begins with is there
            assert window.start in done or (window in backward and window.first == window.start + 1)
        if window in forward:
            assert set(range(window.start, window.first)) <= done
            assert window.first - window.start >= min(1, window.first)
        done |= new
    assert done == set(range(len(known)))


def test_windows_reach_what_is_known_behind_with_something_to_see_of_it():
    known = [True] * 4 + [False] * 9 + [True] * 6
    backward, forward = plan(known, 7, 2)
    assert backward == []
    closing = next(w for w in forward if w.last > 12)
    assert closing.stop >= 15 and closing.first - closing.start >= 2  # two latent frames of both sides
    assert plan([False] * 5 + [True] * 2, 4, 2) == (
        [Window(3, 7, 4, 5), Window(2, 6, 3, 4), Window(1, 5, 2, 3), Window(0, 4, 0, 2)], [Window(3, 7, 5, 7)],
    )  # fmt: skip
    assert latent_sizes(17, 0, 4) == (5, 2) and latent_sizes(17, 5, 4) == (5, 2) and latent_sizes(0, 0, 4) == (0, 2)
    assert longest_gap(17, 0, 4) == 4 and longest_gap(0, 0, 4) == 0
    with pytest.raises(UserError, match="smaller than the window"):
        latent_sizes(9, 9, 4)


def test_jobs_of_all_modes_in_one_batch_are_those_alone_and_keep_what_is_given():
    """Pixels within one level: rows of other lengths sum in another order."""
    generator = tiny_generator()
    a, b = clip(5), clip(5, 1)
    holes = np.zeros((5, H, W), bool)
    holes[:, :8] = True
    jobs = [
        Job(modes.text(5, H, W), "a", 1), Job(modes.keyframes({0: a[:1]}, 5, 2), "b", 2),
        Job(modes.extend(a, 4, 2), "c", 3), Job(modes.extend(a[:4], 4, 2, backward=True), "d", 4),
        Job(modes.connect(a[:3], b[:4], 4, 2), "e", 5), Job(modes.loop(a, 4, 2), "f", 6),
        Job(modes.loop_of_text(9, H, W, 2, 2), "g", 7), Job(modes.edit(a, 2, strength=0.5), "h", 8),
        Job(modes.edit(a, 2, holes=holes), "i", 9), Job(modes.text(13, H, W), ((0, "j"), (6, "k")), 10),
    ]  # fmt: skip
    seen = []
    videos = make(generator, jobs, size=5, on_request=lambda *x: seen.append(x), **SETTINGS)
    assert [v.shape for v in videos] == [(*job.canvas.shape, 3) for job in jobs]
    assert max(request.num_frames for _, request in seen) == 5
    copies = generator.codec.decode(generator.codec.encode([a, clip(5, 1)]))
    # The first window's given latents are bit for bit those of the clip, and so is what is decoded of them.
    for number in (2, 5):
        assert np.abs(videos[number][:5].astype(int) - copies[0]).max() <= 1
    np.testing.assert_array_equal(videos[0], generator.videos([Request("a", 5, H, W, seed=1)], **SETTINGS)[0])
    long = [request.prompt for number, request in seen if number == 9]
    assert long[0] == "j" and long[-1] == "k" and long == sorted(long)
    for number in (3, 9):
        alone = make(generator, [jobs[number]], size=5, **SETTINGS)[0]
        assert np.abs(alone.astype(int) - videos[number]).max() <= 1


def test_what_is_given_behind_new_frames_is_encoded_with_them_as_its_past():
    generator, given, latents, frames = tiny_generator(), clip(4), [], []
    job = Job(modes.extend(given, 5, 2, backward=True), "a", 1)
    make(generator, [job], on_latents=lambda _, z: latents.append(z), on_frames=lambda _, x: frames.append(x),
         **SETTINGS)  # fmt: skip
    made = np.concatenate(frames)
    whole = generator.codec.encode([np.concatenate([made[:5], given])])[0]
    np.testing.assert_allclose(np.concatenate(latents)[3:], whole[3:], atol=1e-5)


def test_frames_come_in_order_and_with_their_latents():
    generator, frames, latents = tiny_generator(), [[], []], [[], []]
    jobs = [Job(modes.text(15, H, W), "a", 1), Job(modes.text(5, H, W), "b", 2)]
    done = make(generator, jobs, size=5, on_frames=lambda k, some: frames[k].append(some),
                on_latents=lambda k, some: latents[k].append(some), **SETTINGS)  # fmt: skip
    assert done is None and len(frames[0]) > 3 and [sum(map(len, f)) for f in frames] == [15, 5]
    whole = generator.codec.decode([np.concatenate(z) for z in latents])
    for made, decoded in zip(frames, whole):  # as one video: there are no seams
        assert np.abs(np.concatenate(made).astype(int) - decoded).max() <= 1
    assert np.abs(np.concatenate(frames[0])[:5].astype(int) - make(generator, jobs[:1], **SETTINGS)[0][:5]).max() > 0


def test_a_job_that_does_not_begin_is_refused():
    with pytest.raises(UserError, match="begins at frame 0"):
        Job(modes.text(5, H, W), ((3, "a"),))
    with pytest.raises(UserError, match="too short to go on from"):
        make(tiny_generator(), [Job(modes.text(9, H, W), "a")], size=3, **SETTINGS)
