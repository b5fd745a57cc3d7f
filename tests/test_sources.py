"""Which source a config's `data` section opens, and with which settings."""

import pytest
from video_files import numbered, write

from data_pipelines.index import Index
from data_pipelines.sources import open_source
from sorax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clips"
    path.mkdir()
    write(path / "long.mp4", numbered(40, 48, 64), fps=8)
    (path / "long.txt").write_text("grey, getting brighter")
    return path


def test_open_source_reads_a_folder_with_the_settings_of_the_section(folder):
    data = dict(path=str(folder), max_tokens=1000, fps=8.0, max_frames=9, row_length=512, world=dict(seed=1))
    assert open_source(data).spec(0).num_frames == 9
    assert open_source(data, max_frames=5).spec(0).num_frames == 5
    with pytest.raises(UserError, match=r"data\.max_tokens is not set"):
        open_source(dict(path=str(folder)))


def test_open_source_passes_on_what_is_done_with_oversize_samples(folder):
    data = dict(path=str(folder), max_tokens=24, fps=8.0, max_frames=9)
    scaled = open_source(data).spec(0)
    assert (scaled.num_frames, scaled.height) == (9, 32)
    trimmed = open_source(dict(data, oversize="trim")).spec(0)
    assert (trimmed.num_frames, trimmed.height, trimmed.width) == (5, 48, 64)
    with pytest.raises(UserError, match="over budget"):
        open_source(dict(data, oversize="refuse"))


def test_open_source_keeps_its_index_where_it_is_told_and_reads_one_that_is_named(folder, tmp_path):
    data = dict(path=str(folder), max_tokens=1000, fps=8.0, max_frames=9)
    made = open_source(data, index_cache=tmp_path / "index")
    assert len(Index.load(tmp_path / "index")) == 1
    named = open_source(dict(data, index=str(tmp_path / "index")))
    assert named.spec(0) == made.spec(0)
    with pytest.raises(UserError, match="no index is there"):
        open_source(dict(data, index=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="needs no index"):
        open_source(dict(path="world", index="somewhere"))


def test_open_source_makes_the_world_from_its_section():
    source = open_source(dict(path="", world=dict(shapes=[[5, 32, 48]], num_samples=3)), split="test")
    assert len(source) == 3 and source.config.split == "test"
    assert source[0]["video"].shape == (5, 32, 48, 3)
    with pytest.raises(UserError, match=r"unknown key data\.world\.shape: did you mean data\.world\.shapes"):
        open_source(dict(path="world", world=dict(shape=1)))
