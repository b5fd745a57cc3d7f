"""A packed row: its samples end to end, each cut and drawn as was planned."""

import logging
import pickle

import numpy as np
import pytest
from labelled_examples import Clips, Examples, Failing

from data_pipelines.rows import PixelExamples, RowSource
from sorax.errors import UserError
from sorax.patchify import num_tokens, patchify, positions, unpatchify

ROW_TOKENS, ROW_TEXT, BATCH = 20, 24, 4


def rows(examples=None, **options):
    settings = dict(row_tokens=ROW_TOKENS, row_text=ROW_TEXT, batch_size=BATCH, seed=0) | options
    return RowSource(examples or Examples(), **settings)


def words(caption):
    return [len(word) for word in caption.split()]


def test_row_holds_its_samples_end_to_end():
    source, examples = rows(), Examples()
    for index in range(len(source.plan(0))):
        row = source[index]
        assert row["tokens"].shape == (ROW_TOKENS, 8) and row["tokens"].dtype == np.float32
        assert row["positions"].shape == (ROW_TOKENS, 3) and row["positions"].dtype == np.int32
        samples = source.samples(index)
        for segment, sample in enumerate(samples, start=1):
            example, inside = examples[sample], row["segment_ids"] == segment
            shape = examples.shapes[sample].tolist()
            np.testing.assert_array_equal(row["tokens"][inside], patchify(example["latents"]))
            np.testing.assert_array_equal(row["positions"][inside], positions(*shape))
            assert np.ptp(np.flatnonzero(inside)) + 1 == inside.sum() == num_tokens(shape)
            # The caption, then one empty slot that belongs to it.
            text = row["text_tokens"][row["text_segment_ids"] == segment]
            np.testing.assert_array_equal(text, [*example["text_tokens"], 0])
        padding = row["segment_ids"] == 0
        assert not row["tokens"][padding].any() and not row["positions"][padding].any()
        assert row["segment_ids"].max() == row["text_segment_ids"].max() == len(samples)
        assert not row["text_tokens"][row["text_segment_ids"] == 0].any()


def test_rows_read_together_are_those_read_alone():
    source = rows()
    together = source.read(2, 7)
    for place, index in enumerate(range(2, 7)):
        for name, values in source[index].items():
            np.testing.assert_array_equal(values, together[name][place])


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


def test_the_weights_of_the_examples_are_those_of_the_plan():
    source = rows(Examples(weights=np.where(np.arange(30) < 10, 2.0, 0.5)))
    plan = source.plan(0)
    counts = np.bincount(np.concatenate([plan.row(r) for r in range(len(plan)) if r not in plan.repeated_rows]))
    assert (counts[:10] == 2).all() and counts[10:].max() == 1 and 4 <= counts[10:].sum() <= 16


def test_samples_are_drawn_by_seed_row_and_place():
    """So that a row is the same whoever reads it, and the same sample is another draw when it comes again."""
    source = rows(posterior="sample", seed=5)
    draws = {}
    for index in range(2 * len(source.plan(0))):
        row = source[index]
        for place, sample in enumerate(source.samples(index).tolist()):
            latents = row["tokens"][row["segment_ids"] == place + 1]
            np.testing.assert_array_equal(latents[:, :4], hash((5, index, place)) % 9973)
            np.testing.assert_array_equal(latents[:, 4:], place)
            draws.setdefault(sample, set()).add(float(latents[0, 0]))
    assert all(len(found) >= 2 for found in draws.values())
    np.testing.assert_array_equal(source[3]["tokens"], rows(posterior="sample", seed=5)[3]["tokens"])


def test_too_long_samples_are_cut_to_the_frames_that_fit_and_named(caplog):
    """(3, 4, 6) are 3 frames of 6 tokens: 17 hold two."""
    with caplog.at_level(logging.WARNING):
        source = rows(row_tokens=17, oversize="trim")
    np.testing.assert_array_equal(source.trimmed, np.arange(4, 30, 5))
    assert "6 of 30 samples are longer than a row of 17 tokens" in caplog.text
    assert "clip_4.mp4, clip_9.mp4, clip_14.mp4 and 3 more" in caplog.text
    seen = set()
    for index in range(len(source.plan(0))):
        row = source[index]
        for segment, sample in enumerate(source.samples(index).tolist(), start=1):
            frames = 2 if sample % 5 == 4 else Examples().shapes[sample, 0]
            inside = row["segment_ids"] == segment
            np.testing.assert_array_equal(row["tokens"][inside], patchify(Examples()[sample]["latents"][:frames]))
            assert row["positions"][inside][:, 0].max() == frames - 1
            seen.add(sample)
    assert len(seen) == 30


def test_one_frame_larger_than_a_row_cannot_be_trimmed():
    with pytest.raises(UserError, match=r"clip_4\.mp4 has 6 video tokens, but a row holds 5"):
        rows(row_tokens=5, oversize="trim")


def test_oversize_samples_are_named():
    with pytest.raises(UserError, match=r"clip_4\.mp4 has 18 video tokens, but a row holds 17.*at least 18"):
        rows(row_tokens=17)
    with pytest.raises(UserError, match=r"clip_5\.mp4 has 7 text tokens, but a row holds 6"):
        rows(row_text=6)


def test_shapes_that_are_no_whole_patches_are_named():
    with pytest.raises(UserError, match=r"clip_0\.mp4 is 1 x 4 x 4, .* do not divide"):
        rows(patch_size=(1, 3, 3))


@pytest.mark.parametrize("order", ["in", "out"])
def test_pixels_can_be_packed_as_they_are(order):
    source = RowSource(PixelExamples(Clips(), words), row_tokens=60, row_text=40, batch_size=2, seed=0,
                       patch_size=(1, 16, 16), order=order, oversize="trim")  # fmt: skip
    found = set()
    for index in range(len(source.plan(0))):
        row = source[index]
        assert row["tokens"].dtype == np.uint8 and row["tokens"].shape == (60, 768)
        for segment, sample in enumerate(source.samples(index).tolist(), start=1):
            video, inside = Clips()[sample]["video"], row["segment_ids"] == segment
            kept = 5 if len(video) == 17 else len(video)  # 17 frames of 3 x 4 patches
            whole = unpatchify(row["tokens"][inside], (kept, *video.shape[1:3]), (1, 16, 16), order)
            np.testing.assert_array_equal(whole, video[:kept])
            text = row["text_tokens"][row["text_segment_ids"] == segment]
            np.testing.assert_array_equal(text, [4] * (sample % 3 + 1) + [0])
            found.add(sample)
    assert found == set(range(24))


def test_a_pickled_source_gives_the_same_rows():
    source = rows(chunk=6, window=3)
    source.samples(7)
    again = pickle.loads(pickle.dumps(source))
    for index in (0, 7, 12, 3):
        np.testing.assert_array_equal(source[index]["tokens"], again[index]["tokens"])


def test_identity_changes_with_data_and_settings():
    same, again = rows(), rows()
    assert same.identity == again.identity
    changes = [dict(seed=1), dict(row_tokens=21), dict(row_text=25), dict(batch_size=2), dict(order="out"),
               dict(posterior="sample"), dict(ranks=2)]  # fmt: skip
    others = [rows(Examples(29)), *(rows(**change) for change in changes)]
    assert len({same.identity, *(other.identity for other in others)}) == 9


def test_data_that_differs_from_what_was_promised_is_an_error_not_a_wrong_row():
    class Changed(Examples):
        def __getitem__(self, index):
            return dict(super().__getitem__(index), text_tokens=np.ones(3, np.int32))

    class Turned(Examples):  # as many tokens, another shape
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return dict(example, latents=example["latents"].swapaxes(1, 2))

    for examples in (Changed(), Turned()):
        source = rows(examples)
        with pytest.raises(UserError, match=r"clip_\d+\.mp4 was planned as .* the data changed"):
            source.read(0, len(source.plan(0)))


@pytest.mark.parametrize("how", ["raise", "unpicklable"])
def test_a_sample_that_cannot_be_read_is_named(how):
    source = rows(Failing(7, how))
    with pytest.raises(RuntimeError, match=r"clip_7\.mp4 could not be read: .*moov atom"):
        source.read(0, len(source.plan(0)))


def test_unknown_policies_are_refused():
    with pytest.raises(UserError, match="oversize is 'shrink'"):
        rows(oversize="shrink")
    with pytest.raises(UserError, match="posterior is 'mode'"):
        rows(posterior="mode")
    with pytest.raises(UserError, match="no distribution"):
        rows(PixelExamples(Clips(), words), posterior="sample", patch_size=(1, 16, 16), row_tokens=999)
