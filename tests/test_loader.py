"""Batches are a pure function of the step: however they are read, resumed or shared between processes."""

import numpy as np
import pytest

from data_pipelines.loader import RowSource, VideoClipSource, make_clip_loader, make_loader
from data_pipelines.sources import SampleSpec
from sorax.errors import UserError
from sorax.patchify import num_tokens, patchify, positions

SHAPES = [(1, 4, 4), (2, 4, 4), (3, 2, 6), (1, 2, 2), (3, 4, 6)]
ROW_TOKENS, ROW_TEXT, BATCH = 20, 24, 4


class Examples:
    """Latents of mixed sizes, each filled with its own index; captions of 1 to 6 tokens that name it too."""

    def __init__(self, count=30):
        self.count = count

    def __len__(self):
        return self.count

    def shape(self, index):
        return SHAPES[index % len(SHAPES)]

    def text_length(self, index):
        return index % 6 + 1

    def key(self, index):
        return f"clip_{index}.mp4"

    def __getitem__(self, index):
        latents = np.random.default_rng(index).standard_normal((*self.shape(index), 2)).astype(np.float32)
        return dict(latents=latents, text_tokens=np.full(self.text_length(index), index + 3, np.int32))


class Clips:
    """Videos of four shapes whose pixels tell which clip, frame, row and column they are."""

    shapes = [(9, 32, 48), (9, 32, 48), (9, 32, 48), (1, 32, 32), (5, 16, 16), (17, 48, 64)]

    def __init__(self, count=24):
        self.count = count

    def __len__(self):
        return self.count

    def spec(self, index):
        return SampleSpec(*self.shapes[index % len(self.shapes)], fps=8.0, caption="", key=f"clip_{index}")

    def __getitem__(self, index):
        t, h, w = self.shapes[index % len(self.shapes)]
        frame, row, column = np.indices((t, h, w))
        return dict(video=np.stack([frame + 20 * index % 256, row, column], -1).astype(np.uint8))


def rows(examples=None, **options):
    settings = dict(row_tokens=ROW_TOKENS, row_text=ROW_TEXT, batch_size=BATCH, seed=0) | options
    return RowSource(examples or Examples(), **settings)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def assert_equal_batches(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def steps_of_epoch(source, epoch=0):
    return source.plan(epoch).num_steps


def test_row_holds_its_samples_end_to_end():
    source, examples = rows(), Examples()
    for index in range(len(source.plan(0))):
        row = source[index]
        assert row["tokens"].shape == (ROW_TOKENS, 8) and row["tokens"].dtype == np.float32
        assert row["positions"].shape == (ROW_TOKENS, 3) and row["positions"].dtype == np.int32
        samples = source.samples(index)
        for segment, sample in enumerate(samples, start=1):
            example, inside = examples[sample], row["segment_ids"] == segment
            np.testing.assert_array_equal(row["tokens"][inside], patchify(example["latents"]))
            np.testing.assert_array_equal(row["positions"][inside], positions(*examples.shape(sample)))
            assert np.ptp(np.flatnonzero(inside)) + 1 == inside.sum() == num_tokens(examples.shape(sample))
            # The caption, then one empty slot that belongs to it.
            text = row["text_tokens"][row["text_segment_ids"] == segment]
            np.testing.assert_array_equal(text, [*example["text_tokens"], 0])
        padding = row["segment_ids"] == 0
        assert not row["tokens"][padding].any() and not row["positions"][padding].any()
        assert row["segment_ids"].max() == row["text_segment_ids"].max() == len(samples)
        assert not row["text_tokens"][row["text_segment_ids"] == 0].any()


@pytest.mark.parametrize("ranks, batch_size", [(1, 1), (2, 4), (4, 8)])
def test_every_sample_exactly_once_an_epoch(ranks, batch_size):
    source = rows(ranks=ranks, batch_size=batch_size)
    index = 0
    for epoch in range(3):
        plan = source.plan(epoch)
        new = [r for r in range(len(plan)) if r not in plan.repeated_rows]
        seen = np.concatenate([source.samples(index + r) for r in new])
        np.testing.assert_array_equal(np.sort(seen), np.arange(30))
        assert source.locate(index) == (epoch, 0)
        index += len(plan)
    assert source.locate(index) == (3, 0)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resumed_equals_uninterrupted(prefetch):
    # Long enough to cross from the first epoch into the third.
    count = steps_of_epoch(rows()) * 2 + 2
    whole = take(make_loader(rows(), prefetch=2), count)
    for step in (1, count // 2, count - 1):
        assert_equal_batches(whole[step:], take(make_loader(rows(), start_step=step, prefetch=prefetch), count - step))
    loader = make_loader(rows(), prefetch=prefetch)
    first = [next(loader) for _ in range(3)]
    state = loader.get_state()
    assert state == 3
    next(loader)
    loader.set_state(state)
    assert_equal_batches(whole, first + take(loader, count - 3))


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_global_batch(process_count):
    whole = take(make_loader(rows(ranks=2)), 5)
    parts = [
        take(make_loader(rows(ranks=2), process_index=p, process_count=process_count), 5) for p in range(process_count)
    ]
    joined = [{name: np.concatenate([batch[name] for batch in step]) for name in step[0]} for step in zip(*parts)]
    assert_equal_batches(whole, joined)


def test_workers_give_the_same_batches():
    whole = take(make_loader(rows()), 5)
    assert_equal_batches(whole, take(make_loader(rows(), num_workers=1), 5))
    assert_equal_batches(whole[2:], take(make_loader(rows(), num_workers=2, start_step=2), 3))


def test_identity_changes_with_data_and_settings():
    same, again = rows(), rows()
    assert same.identity == again.identity
    others = [rows(Examples(29)), rows(seed=1), rows(row_tokens=21), rows(row_text=25), rows(batch_size=2)]
    assert len({same.identity, *(other.identity for other in others)}) == 6


def test_oversize_samples_are_named():
    with pytest.raises(UserError, match=r"clip_4\.mp4 has 18 video tokens, but a row holds 17.*at least 18"):
        rows(row_tokens=17)
    with pytest.raises(UserError, match=r"clip_5\.mp4 has 7 text tokens, but a row holds 6"):
        rows(row_text=6)


def test_data_that_differs_from_what_was_promised_is_an_error_not_a_wrong_row():
    class Changed(Examples):
        def __getitem__(self, index):
            return dict(super().__getitem__(index), text_tokens=np.ones(3, np.int32))

    with pytest.raises(UserError, match=r"clip_\d+\.mp4 was planned as .* the data changed"):
        take(make_loader(rows(Changed())), steps_of_epoch(rows()))


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="multiple of 3"):
        rows(ranks=3)
    with pytest.raises(UserError, match="multiple of 3"):
        make_loader(rows(), process_count=3)
    with pytest.raises(ValueError, match="planned for 4"):
        make_loader(rows(), batch_size=8)


def test_clips_of_a_batch_have_one_shape_and_shapes_come_in_proportion():
    source = VideoClipSource(Clips(), batch_size=4, seed=0)
    shapes = [source.draw(step)[0] for step in range(600)]
    # 12 of 24 clips have this shape: 300 +- 12 draws; 4 deviations.
    assert abs(shapes.count((9, 32, 48)) - 300) < 50
    for step in range(20):
        shape, members, _ = source.draw(step)
        assert {Clips.shapes[m % 6] for m in members} == {shape}
        assert len(set(members)) == 4  # groups have at least 4 clips: none is taken twice
        video = source.read(step, 0, 4)["video"]
        assert video.shape == (4, *shape, 3) and video.dtype == np.uint8
        for clip, member in zip(video, members):
            np.testing.assert_array_equal(clip, Clips()[member]["video"])


def test_small_groups_wrap_around():
    source = VideoClipSource(Clips(6), batch_size=7, seed=0)
    for step in range(20):
        shape, members, _ = source.draw(step)
        counts = np.unique(members, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1 and len(counts) == Clips.shapes.count(shape)


def test_crops_are_windows_of_their_clips():
    source = VideoClipSource(Clips(), batch_size=3, seed=0, crop=(5, 32, 32))
    assert {tuple(s) for s in source.shapes.tolist()} == {(5, 32, 32), (5, 16, 16), (1, 32, 32)}
    corners = set()
    for step in range(30):
        shape, members, _ = source.draw(step)
        for clip, member in zip(source.read(step, 0, 3)["video"], members):
            video = Clips()[member]["video"]
            t, h, w = clip[0, 0, 0].astype(int) - video[0, 0, 0]
            np.testing.assert_array_equal(clip, video[t : t + shape[0], h : h + shape[1], w : w + shape[2]])
            corners.add((t, h, w))
    assert len(corners) > 20  # drawn anew for each clip


def test_clip_loader_resumes_and_is_shared_between_processes():
    def loader(**options):
        return make_clip_loader(Clips(), batch_size=4, seed=3, crop=(5, 16, 16), **options)

    whole = take(loader(), 8)
    assert_equal_batches(whole[5:], take(loader(start_step=5), 3))
    parts = [take(loader(process_index=p, process_count=2), 8) for p in range(2)]
    assert_equal_batches(whole, [{"video": np.concatenate([a["video"], b["video"]])} for a, b in zip(*parts)])


def test_bad_crops_and_empty_sources_are_refused():
    with pytest.raises(UserError, match="empty"):
        VideoClipSource([], batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"4n \+ 1"):
        VideoClipSource(Clips(), batch_size=1, seed=0, crop=(8, 16, 16))
