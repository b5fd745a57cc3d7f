"""What is scored: the clips of a run's held-out splits, or of whatever videos it is pointed at."""

import collections
import dataclasses

import numpy as np

from data_pipelines.latent_shards import is_shards, source_of
from data_pipelines.phyworld import PhyWorld
from data_pipelines.survey import source_identity
from data_pipelines.world import World
from data_pipelines.world_sampling import lead_motions
from sorax.dit_data import held_out_source
from sorax.errors import UserError

SPLITS = {"test": "in distribution", "heldout": "held-out combinations", "ood": "out of distribution",
          "folder": "clips of the folder"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Split:
    """Samples to score, which are decoded when they are asked for: `source[i]` for i of `indices`.

    trained_on: they are the training data, because the `data` section names no other.
    """

    source: object
    indices: tuple[int, ...]
    trained_on: bool

    @property
    def identity(self) -> str:
        return source_identity(self.source)


@dataclasses.dataclass(frozen=True)
class Clips:
    """The original clips of a split; `truths` is None for real videos, of which nothing is known."""

    videos: list
    captions: list
    truths: list | None
    fps: float
    identity: str


def open_splits(data, vae_config, num_clips: int, spatial_multiple: int, *, alike: bool, **options) -> dict[str, Split]:
    """Split -> samples to score, of a config's `data` section.

    Of the world: the splits test and heldout; of PhyWorld's scenes: test and ood. Of files: at most `num_clips` of the
    videos of `val_path` and `val_split` or, where there are none, of the training data, spread evenly. Of latent
    shards: likewise of the videos that they were encoded from.

    Args:
        alike: of the world, clips of one shape, the commonest of more than one frame, and with a single object if
            its motions allow that; else clips as the section draws them, of all its shapes.
        options: what else `open_source` takes: index_cache, index_progress.

    Raises:
        UserError: fewer than one clip, or the data is missing or cannot be used.
    """
    if num_clips < 1:
        raise UserError(f"{num_clips} clips cannot be scored: ask for at least 1")
    section = source_of(data)
    if is_shards(section.get("val_path")):
        section = dict(section, val_path="")
    source = held_out_source(section, spatial_multiple=spatial_multiple, temporal_stride=vae_config.temporal_stride,
                             **options)  # fmt: skip
    if not isinstance(source, World):
        indices = np.unique(np.linspace(0, len(source) - 1, min(num_clips, len(source))).astype(int)).tolist()
        trained_on = not (section.get("val_path") or section.get("val_split"))
        return {"folder": Split(source, tuple(indices), trained_on)}
    config = dataclasses.replace(source.config, num_samples=num_clips)
    if alike and not isinstance(source, PhyWorld):
        moving = [shape for shape in config.shapes if shape[0] > 1] or config.shapes
        shape = collections.Counter(moving).most_common(1)[0][0]
        num_objects = (1, 1) if lead_motions(config.motions, 1) else config.num_objects
        config = dataclasses.replace(config, shapes=(shape,), num_objects=num_objects)
    worlds = {name: type(source)(dataclasses.replace(config, split=name)) for name in source.scored_splits}
    return {name: Split(world, tuple(range(num_clips)), trained_on=False) for name, world in worlds.items()}


def load_splits(data, vae_config, num_clips: int, spatial_multiple: int) -> dict[str, Clips]:
    """Split -> the clips themselves, alike so that they can be judged against their captions; see `open_splits`."""
    splits = open_splits(data, vae_config, num_clips, spatial_multiple, alike=True)
    return {name: _read(split) for name, split in splits.items()}


def _read(split):
    samples = [split.source[i] for i in split.indices]
    known = isinstance(split.source, World)
    return Clips(
        videos=[s["video"] for s in samples], captions=[s["caption"] for s in samples],
        truths=[split.source.truth(i) for i in split.indices] if known else None,
        fps=samples[0]["fps"], identity=split.identity,
    )  # fmt: skip
