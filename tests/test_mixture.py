"""A mixture holds each of its parts whole, and brings their samples as often as their weights say."""

import dataclasses
import pickle

import numpy as np
import pytest
from video_files import numbered, numbers, write

from data_pipelines.mixture import MixtureExamples, MixtureSource
from data_pipelines.shuffle import epoch_counts
from data_pipelines.sources import open_source
from sorax.errors import UserError

WORLD = dict(num_samples=4, shapes=((5, 32, 32),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write(path / f"{i}.mp4", numbered(9 + 4 * i))
        (path / f"{i}.txt").write_text(f"clip {i}")
    return str(path)


def section(*parts, **around):
    return dict(path="nowhere", max_tokens=1000, world=WORLD, mixture=parts) | around


def test_a_mixture_is_its_parts_one_after_the_other(folder):
    parts = dict(path=folder, weight=2), dict(path="world", weight=0.5), dict(path=folder, max_frames=5)
    source = open_source(section(*parts), spatial_multiple=16, temporal_stride=4)
    assert isinstance(source, MixtureSource) and len(source) == 3 + 4 + 3
    assert source.weights.tolist() == [2.0] * 3 + [0.5] * 4 + [1.0] * 3
    assert [source.spec(i).num_frames for i in range(10)] == [9, 13, 17, 5, 5, 5, 5, 5, 5, 5]
    for i in range(len(source)):
        spec, sample = source.spec(i), source[i]
        assert sample["video"].shape == (spec.num_frames, spec.height, spec.width, 3)
        assert (sample["key"], sample["caption"]) == (spec.key, spec.caption)
    assert len({source.spec(i).key for i in range(len(source))}) == len(source)
    assert source.spec(8).key == f"2:{folder}/1.mp4" and numbers(source[8]["video"]) == list(range(5))
    again = pickle.loads(pickle.dumps(source))
    assert again.spec(9) == source.spec(9) and (again[9]["video"] == source[9]["video"]).all()
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_over_epochs_a_sample_comes_as_often_as_its_weight_says(weight):
    weights, epochs = np.array([weight, 1.0] * 50), 10
    counts = np.array([epoch_counts(weights, seed=3, epoch=e) for e in range(epochs)])
    assert (np.abs(counts.sum(0)[::2] - weight * epochs) < 1).all()
    assert (counts[:, 1::2] == 1).all()
    assert (np.abs(counts[:, ::2] - weight) < 1).all()


@dataclasses.dataclass
class Examples:
    """Latents of one frame that hold their own number."""

    first: int
    count: int
    path: str = "shards"
    weights: object = None

    def __post_init__(self):
        self.shapes = np.array([(1, 2, 2 + i) for i in range(self.count)], np.int32)
        self.text_lengths = np.arange(self.count, dtype=np.int32)
        self.identity = f"{self.first}+{self.count}"

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return dict(latents=np.full((*self.shapes[i], 1), self.first + i), text_tokens=np.zeros(i, np.int32))

    def sample(self, i, key):
        return dict(self[i], key=key)

    def key(self, i):
        return str(self.first + i)


def test_a_mixture_of_latents_has_the_examples_of_its_parts():
    mixed = MixtureExamples([Examples(0, 3), Examples(10, 2, weights=np.array([1.0, 4.0]))], [1, 0.5])
    assert mixed.weights.tolist() == [1, 1, 1, 0.5, 2.0]
    for i, number in enumerate([0, 1, 2, 10, 11]):
        assert mixed[i]["latents"].flat[0] == number and mixed[i]["latents"].shape[:3] == tuple(mixed.shapes[i])
        assert mixed.text_lengths[i] == len(mixed[i]["text_tokens"])
        assert mixed.key(i) == f"shards/{number}" and mixed.sample(i, 5)["key"] == 5
    assert mixed.identity != MixtureExamples([Examples(10, 2), Examples(0, 3)], [1, 1]).identity


MISTAKES = {
    "a negative weight": ([dict(path="world", weight=-1)], r"mixture\[0\].weight is -1"),
    "a weight that is no number": ([dict(path="world"), dict(path="world", weight="2")], r"mixture\[1\].weight is '2'"),
    "an endless weight": ([dict(path="world", weight=float("inf"))], "weight is inf"),
    "no weight at all": ([dict(path="world", weight=0)] * 2, "every data.mixture weight is 0"),
    "an unknown key": ([dict(path="world", wieght=1)], r"mixture\[0\].wieght: did you mean 'weight'"),
    "no path": ([dict(weight=1)], r"mixture\[0\] has no path"),
    "no list": ("world", "give a list of sections"),
    "a list of names": (["world"], "give a list of sections"),
    "an index for all parts": ([dict(path="world")], r"data.index is 'x' beside data.mixture"),
    "latents among videos": ([dict(path="world"), dict(path="shards:x")], "shards:x is latents"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    mixture, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        open_source(section(index="x" if "index" in mistake else "") | dict(mixture=mixture))
