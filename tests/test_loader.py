"""Batches are a pure function of the step: however they are read, resumed or shared between processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from labelled_examples import Clips, Examples, Failing

from data_pipelines.clips import VideoClipSource
from data_pipelines.loader import make_clip_loader, make_loader
from data_pipelines.rows import RowSource
from sorax.errors import UserError

ROW_TOKENS, ROW_TEXT, BATCH = 20, 24, 4


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
    assert state == dict(step=3, identity=rows().identity)
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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_process_may_read_several_parts_of_a_batch(num_workers):
    whole = take(make_loader(rows(ranks=2)), 5)
    size = len(whole[0]["tokens"]) // 4
    for parts in ((0, 1), (1, 3), (0, 1, 3)):
        found = take(make_loader(rows(ranks=2), process_index=parts, process_count=4, num_workers=num_workers), 5)
        chosen = np.concatenate([np.arange(p * size, (p + 1) * size) for p in parts])
        assert_equal_batches([{name: x[chosen] for name, x in batch.items()} for batch in whole], found)


def test_workers_give_the_same_batches():
    whole = take(make_loader(rows()), 5)
    assert_equal_batches(whole[2:], take(make_loader(rows(), num_workers=2, start_step=2), 3))


def test_batches_of_workers_stay_as_they_are_while_they_are_in_use_and_their_memory_is_used_again():
    loader = make_loader(rows(), num_workers=1, prefetch=1)
    kept = [next(loader)["tokens"][1:, :3] for _ in range(8)]  # views: nobody holds the batches
    whole = take(make_loader(rows()), 40)
    made = len(list(Path(loader._notes.name).glob("*block*")))
    assert made >= 8
    kept.append(kept.pop()[:1])
    for tokens, batch in zip(kept, whole):
        np.testing.assert_array_equal(tokens, batch["tokens"][1:, :3][: len(tokens)])
    del kept, tokens
    for batch in whole[8:]:
        np.testing.assert_array_equal(next(loader)["tokens"], batch["tokens"])
    assert len(list(Path(loader._notes.name).glob("*block*"))) <= made + 3  # read ahead when they were counted
    loader.close()


def test_state_of_other_data_is_refused():
    state = make_loader(rows()).get_state()
    for other in (rows(Examples(29)), rows(seed=1), rows(window=3)):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            make_loader(other).set_state(state)
    clips = make_clip_loader(Clips(), batch_size=4, seed=3)
    with pytest.raises(UserError, match="not those of the checkpoint"):
        clips.set_state(make_clip_loader(Clips(), batch_size=4, seed=4).get_state())


@pytest.mark.parametrize("num_workers, how", [(0, "raise"), (1, "unpicklable")])
def test_an_error_of_a_reader_is_raised_and_names_the_sample(num_workers, how):
    loader = make_loader(rows(Failing(7, how)), num_workers=num_workers)
    with pytest.raises(RuntimeError, match=r"clip_7\.mp4 could not be read: .*moov atom"):
        take(loader, steps_of_epoch(rows()))
    loader.close()


def test_a_reader_that_is_killed_is_noticed_and_the_sample_named():
    loader = make_loader(rows(Failing(7, "kill")), num_workers=1)
    with pytest.raises(UserError, match=r"a worker died while it read clip_7\.mp4"):
        take(loader, steps_of_epoch(rows()))
    assert loader._iterator is None and loader._notes is None


ORPHANS = """
import os, sys, time
sys.path[:0] = {path!r}
from labelled_examples import Examples
from data_pipelines.loader import make_loader
from data_pipelines.rows import RowSource
if __name__ == "__main__":
    loader = make_loader(RowSource(Examples(), row_tokens=20, row_text=24, batch_size=4, seed=0), num_workers=1)
    next(loader)
    print(loader._notes.name, flush=True)
    os._exit(1)
"""


def test_workers_and_their_memory_do_not_outlive_a_process_that_dies(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    folder = Path(run.stdout.strip())
    assert folder.name.startswith("sorax-reading-")
    for _ in range(100):
        if not folder.exists():  # the last that a worker does
            return
        time.sleep(0.1)
    pytest.fail("the worker goes on without its parent")


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="multiple of 3"):
        rows(ranks=3)
    with pytest.raises(UserError, match="multiple of 3"):
        make_loader(rows(), process_count=3)


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
    with pytest.raises(UserError, match=r"2n \+ 1 frames \(1, 3, 5, 7"):
        VideoClipSource(Clips(), batch_size=1, seed=0, crop=(8, 16, 16), temporal_stride=2)
    for crop in ((5, 16), (5, 16, -1), (5, 16.0, 16), 5):
        with pytest.raises(UserError, match="it is \\(frames, height, width\\)"):
            VideoClipSource(Clips(), batch_size=1, seed=0, crop=crop)


def test_a_crop_that_no_clip_reaches_is_said(capsys):
    VideoClipSource(Clips(), batch_size=1, seed=0, crop=(0, 2000, 2000))
    assert "no clip is larger than the crop of (0, 2000, 2000)" in capsys.readouterr().out
    VideoClipSource(Clips(), batch_size=1, seed=0, crop=(1, 0, 0))
    assert not capsys.readouterr().out
