"""Several captions of a sample: the mix that training draws is the one asked for, and it is the same every time."""

import json

import numpy as np
import pytest
from video_files import numbered, write

from data_pipelines.caption_kinds import CaptionedSource, draw_kind, parse_mix
from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.rows import PixelExamples, RowSource
from data_pipelines.sources import open_source
from data_pipelines.world import World, WorldConfig
from sorax.errors import UserError

MIX = {"detailed": 0.95, "short": 0.05}
WORLD = dict(num_samples=20, shapes=((1, 16, 16),), kinds=("short", "detailed"))


def letters(caption):
    return np.frombuffer(caption.encode(), np.uint8).astype(np.int32)


def rows_of(source, **settings):
    options = dict(row_tokens=64, row_text=4096, batch_size=2, seed=3, patch_size=(1, 8, 8), order="out")
    return RowSource(PixelExamples(source, letters), **options, **settings)


@pytest.mark.parametrize("given", ["detailed:0.95,short:0.05", MIX, {"detailed": 19, "short": 1, "original": 0}])
def test_a_mix_is_read_from_text_and_dicts(given):
    assert parse_mix(given) == pytest.approx(MIX)


@pytest.mark.parametrize("bad", ["detailed", "detailed:x", "a:0,b:0", "a:1,a:2", "a:-1", "A:1", ("a", 1), {"a": "nan"}])
def test_what_is_no_mix_is_refused(bad):
    with pytest.raises(UserError, match="caption_mix"):
        parse_mix(bad)


def test_drawn_kinds_have_the_ratio_and_are_a_function_of_their_key():
    draws = [draw_kind(MIX, 7, row, place) for row in range(2000) for place in range(4)]
    assert draws == [draw_kind(MIX, 7, row, place) for row in range(2000) for place in range(4)]
    share = np.mean([kind == "short" for kind in draws])
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(draws)) ** 0.5  # four deviations
    assert draws != [draw_kind(MIX, 8, row, place) for row in range(2000) for place in range(4)]


def test_rows_hold_captions_of_the_drawn_kind_and_say_which():
    world = World(WorldConfig(**WORLD))
    source = rows_of(world, mix={"short": 0.5, "detailed": 0.5}, kinds=("short", "detailed"))
    met = set()
    for index in range(6):
        row = source[index]
        assert all(np.array_equal(row[name], value) for name, value in source[index].items())
        for place, sample in enumerate(source.samples(index).tolist(), 1):
            own = row["text_segment_ids"] == place
            kinds = set(row["text_kinds"][own].tolist())
            assert len(kinds) == 1
            kind = ("short", "detailed")[kinds.pop()]
            text = bytes(row["text_tokens"][own][:-1].astype(np.uint8)).decode()
            assert text == world.captions(sample)[kind]
            met.add((sample, kind))
    assert len(met) > len({sample for sample, _ in met})  # a sample has another caption at another time
    assert source.identity != rows_of(world).identity


def test_a_kind_that_nobody_has_is_refused():
    with pytest.raises(UserError, match="these kinds of captions: caption, short, detailed"):
        rows_of(World(WorldConfig(**WORLD)), mix={"original": 1.0})


def test_the_world_has_the_kinds_that_a_mix_names():
    section = dict(path="world", world=dict(num_samples=3), caption_mix="detailed:1")
    assert set(open_source(section).captions(0)) == {"detailed"}
    mixture = dict(section, mixture=[dict(path="world", weight=1.0)])
    assert open_source(mixture).captions(1) == open_source(section).captions(1)


@pytest.fixture
def folder(tmp_path):
    lines = [
        dict(file="a.mp4", caption="A long", caption_original="old a", captions=dict(short="a", detailed="A long.")),
        dict(file="b.mp4", caption="only this", captions=dict(short="bad \x00", Bad="x", detailed=7)),
    ]  # fmt: skip
    for line in lines:
        write(tmp_path / line["file"], numbered(5))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_folder_has_the_kinds_of_its_metadata_and_its_own_caption_for_those_that_lack(folder):
    source = FolderSource(folder, fit=Fit(max_tokens=100), processes=0)
    assert source.caption_kinds == ("detailed", "original", "short")
    assert source.captions(0) == dict(short="a", detailed="A long.", original="old a")
    assert source.captions(1) == dict.fromkeys(source.caption_kinds, "only this")


def test_captions_written_for_a_source_replace_its_own(tmp_path):
    world = World(WorldConfig(num_samples=3))
    rows = [dict(key=world.spec(i).key, caption=f"new {i}", captions=dict(short=f"s{i}")) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "source.json").write_text(json.dumps(dict(data=dict(path="world", world=dict(num_samples=3)))))
    source = open_source(dict(path=f"captions:{tmp_path}"))
    assert (source.spec(1).caption, source[1]["caption"], source.captions(1)) == ("new 1", "new 1", dict(short="s1"))
    assert np.array_equal(source[2]["video"], world[2]["video"])
    with pytest.raises(UserError, match="no caption for 1 of 4 samples"):
        CaptionedSource(World(WorldConfig(num_samples=4)), str(tmp_path))
