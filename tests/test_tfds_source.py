"""TFDS data sets of every kind of video become the same samples as a folder, without TensorFlow."""

import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from video_files import numbered, numbers, write

from data_pipelines.fit import Fit
from data_pipelines.index import Index
from data_pipelines.sources import open_source
from data_pipelines.tfds_source import TFDSSource
from sorax.errors import UserError

T, H, W = 9, 48, 64
FIT = Fit(max_tokens=1000)
COLORS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))
F = tfds.features


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def plain(color, height=H, width=W):
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


class Kinds(tfds.core.GeneratorBasedBuilder):
    """One config for each way to hold videos and captions."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n) for n in (
        "bytes", "stack", "grey", "images", "image", "labels", "unnamed", "nested", "ambiguous", "broken", "rated",
    )]  # fmt: skip
    folder = None  # of video files

    def _info(self):
        stack = F.Tensor(shape=(None, None, None, 3), dtype=np.uint8, encoding="zlib")
        static = F.Tensor(shape=(T, H, W, 3), dtype=np.uint8, encoding="bytes")
        data = F.Tensor(shape=(), dtype=np.object_)
        text, label = F.Text(), F.ClassLabel(names=["red_circle", "cat"])
        features = dict(
            bytes=dict(video=data, caption=text), stack=dict(frames=stack, text=text, label=label),
            grey=dict(video=F.Tensor(shape=(T, H, W, 1), dtype=np.uint8), caption=text),
            images=dict(video=F.Sequence(F.Image(shape=(None, None, 3))), prompt=text),
            image=dict(image=F.Image(shape=(None, None, 3)), notes=text), labels=dict(video=static, label=label),
            unnamed=dict(video=static, label=F.ClassLabel(num_classes=3)),
            nested=dict(episode=dict(clip=static, says=text)), ambiguous=dict(a=static, b=static, caption=text),
            broken=dict(video=data, caption=text), rated=dict(video=static, caption=text, fps=np.float32),
        )  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features[self.builder_config.name]))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, self._example(self.builder_config.name, i, numbered(T, H, W), f"clip {i}")

    def _example(self, config, i, video, text):
        file = (self.folder / f"{i}.mp4").read_bytes()
        return dict(
            bytes=dict(video=file, caption=text),
            stack=dict(frames=video[: 5 + i], text=text, label=0),
            grey=dict(video=video[..., :1], caption=text),
            images=dict(video=[io.BytesIO(png(frame)) for frame in video[: 4 + i]], prompt=text),
            image=dict(image=io.BytesIO(png(plain(COLORS[i], H + 16 * i))), notes=text),
            labels=dict(video=video, label=i % 2),
            unnamed=dict(video=video, label=i),
            nested=dict(episode=dict(clip=video, says=text)),
            ambiguous=dict(a=video, b=video, caption=text),
            broken=dict(video=(b"no video", b"", file)[i], caption="" if i == 1 else text),
            rated=dict(video=video, caption=text, fps=16.0),
        )[config]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Kinds.folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        write(Kinds.folder / f"{i}.mp4", numbered(T + 4 * i, H, W), fps=8)
    for config in Kinds.BUILDER_CONFIGS:
        Kinds(config=config.name, data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def opened(data_dir, config, fit=FIT, **options):
    return TFDSSource(f"kinds/{config}", fit=fit, data_dir=str(data_dir), processes=0, **options)


def check_protocol(source):
    for i in range(len(source)):
        spec, sample = source.spec(i), source[i]
        assert sample["video"].shape == (spec.num_frames, spec.height, spec.width, 3)
        assert sample["video"].dtype == np.uint8
        assert [sample[n] for n in ("caption", "fps", "key")] == [spec.caption, spec.fps, spec.key]


SHAPES = {
    "bytes": [(9, 48, 64), (13, 48, 64), (17, 48, 64)], "stack": [(5, 48, 64)] * 3, "grey": [(9, 48, 64)] * 3,
    "images": [(1, 48, 64), (5, 48, 64), (5, 48, 64)], "image": [(1, 48, 64), (1, 64, 64), (1, 80, 64)],
    "nested": [(9, 48, 64)] * 3,
}  # fmt: skip


@pytest.mark.parametrize("config", SHAPES)
def test_every_kind_of_video_gives_its_frames_and_captions(data_dir, config):
    source = opened(data_dir, config)
    check_protocol(source)
    found = [source.spec(i) for i in range(len(source))]
    assert [(s.num_frames, s.height, s.width) for s in found] == SHAPES[config]
    assert sorted(s.caption for s in found) == ["clip 0", "clip 1", "clip 2"] and not source.rejected
    for i, spec in enumerate(found):
        video = source[i]["video"]
        if config == "image":
            color = COLORS[int(spec.caption[-1])]
            assert np.abs(video - np.array(color)).max() == 0
        else:
            assert numbers(video) == list(range(spec.num_frames))
    assert "tensorflow" not in sys.modules


def test_class_names_are_captions_and_words_come_before_them(data_dir):
    assert {opened(data_dir, "labels").spec(i).caption for i in range(3)} == {"red circle", "cat"}
    assert opened(data_dir, "stack").spec(0).caption.startswith("clip")
    assert opened(data_dir, "stack", caption_key="label").spec(0).caption == "red circle"


def test_frames_are_brought_within_the_limits_as_files_are(data_dir):
    fit = Fit(max_tokens=2 * 2 * 3, max_frames=5)
    for config in ("stack", "grey", "bytes", "images"):
        source = opened(data_dir, config, fit=fit)
        check_protocol(source)
        spec = source.spec(len(source) - 1)
        assert (spec.num_frames, spec.height, spec.width) == (5, 32, 48)
        assert numbers(source[len(source) - 1]["video"]) == list(range(5))


def test_a_rate_in_the_record_is_kept_or_resampled(data_dir):
    assert opened(data_dir, "rated").spec(0).fps == 16.0
    halved = opened(data_dir, "rated", fit=Fit(max_tokens=1000, fps=8.0))
    assert (halved.spec(0).fps, halved.spec(0).num_frames) == (8.0, 5) and halved.changes == {"retimed": 3}
    assert numbers(halved[0]["video"]) == [0, 2, 4, 6, 8]
    assert opened(data_dir, "stack").spec(0).fps == 8.0
    assert opened(data_dir, "stack", fit=Fit(max_tokens=1000, fps=12.0)).spec(0).fps == 12.0


def test_bad_records_are_left_out_with_their_reason(data_dir):
    source = opened(data_dir, "broken")
    assert len(source) == 1 and numbers(source[0]["video"]) == list(range(T + 8))
    reasons = sorted(reason for _, reason in source.rejected)
    assert len(reasons) == 2 and reasons[0] == "no caption: it is empty" and "video" in reasons[1]


def test_splits_parts_and_folders_can_be_named(data_dir):
    assert len(opened(data_dir, "bytes", split="test")) == 1
    assert len(opened(data_dir, "bytes", split="train[1:]")) == 2
    folder = data_dir / "kinds" / "bytes" / "1.0.0"
    assert len(TFDSSource(str(folder), fit=FIT, processes=0)) == 3
    assert len(TFDSSource("kinds/bytes:1.0.0", fit=FIT, data_dir=str(data_dir), processes=0)) == 3


def test_the_index_is_kept_and_belongs_to_its_data(data_dir, tmp_path, monkeypatch):
    first = opened(data_dir, "bytes", cache=tmp_path)
    monkeypatch.setattr("data_pipelines.tfds_source.inspect", lambda *_: pytest.fail("measured again"))
    again = opened(data_dir, "bytes", cache=tmp_path)
    given = opened(data_dir, "bytes", index=Index.load(tmp_path))
    for source in (again, given, pickle.loads(pickle.dumps(again))):
        assert [source.spec(i) for i in range(3)] == [first.spec(i) for i in range(3)]
        np.testing.assert_array_equal(source[1]["video"], first[1]["video"])
    with pytest.raises(UserError, match=r"data\.index is not one of kinds/stack"):
        opened(data_dir, "stack", index=tmp_path)


def test_a_config_names_it(data_dir):
    data = dict(path="tfds:kinds/labels", data_dir=str(data_dir), split="test", max_tokens=1000, world={})
    source = open_source(data, split="test", spatial_multiple=8, num_samples=5)
    assert (len(source), source.spec(0).caption) == (1, "red circle")


MISTAKES = {
    "unnamed": (dict(), "no feature that can be a caption .*without class names.*label [(]ClassLabel int64[)]"),
    "ambiguous": (dict(), "several features that may be the video, set data.video_key.*a [(]Tensor 9x48x64x3 uint8[)]"),
    "bytes": (dict(video_key="vide"), "'vide', which is no feature.*video [(]Tensor object[)]"),
    "labels": (dict(caption_key="video"), "'video', which can be no caption"),
    "images": (dict(split="valid"), "split 'valid' .* it has test, train|split 'valid' .* it has train, test"),
    "nothing": (dict(), "no TFDS data set kinds/nothing"),
}


@pytest.mark.parametrize("config", MISTAKES)
def test_mistakes_are_named_with_the_features(data_dir, config):
    options, message = MISTAKES[config]
    with pytest.raises(UserError, match=message) as error:
        opened(data_dir, config, **options)
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_and_one_without_random_access_are_named(tmp_path):
    with pytest.raises(UserError, match="no TFDS data set nosuch in"):
        TFDSSource("nosuch", fit=FIT, data_dir=str(tmp_path))
    with pytest.raises(UserError, match="not prepared for random access"):
        TFDSSource("mnist", fit=FIT, data_dir=str(tmp_path))
