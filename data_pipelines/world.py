"""A procedural 2-D world: captioned videos with exact ground truth, the data set that needs no download.

Item i of (split, seed) is the same at any time, on any machine and in any order: scenes are drawn from a
counter-based generator, described in world units and continuous time (world_scene), and rendered by exact area
coverage at whatever size, frame rate and length is asked for (world_render).

    world = World(WorldConfig(shapes=((9, 32, 32), (1, 48, 32))))
    world[7]["video"]                     # uint8 [T, H, W, 3]
    world.truth(7).position               # [K, T, 2]
    world.scene_video(world.scene(7), num_frames=33, height=256, width=256, fps=24.0)
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import numpy as np

from data_pipelines.sources import SampleSpec
from data_pipelines.world_captions import detailed_caption, short_caption
from data_pipelines.world_physics import SHAPES
from data_pipelines.world_render import render, view, visible_fractions
from data_pipelines.world_sampling import Draws, lead_motions, sample_scene
from data_pipelines.world_scene import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    MOTIONS,
    SPLITS,
    Scene,
)
from sorax.errors import UserError

__all__ = [
    "BACKGROUNDS", "COLORS", "DIRECTIONS", "MOTIONS", "SHAPES", "SPLITS", "ObjectTruth", "Truth", "World",
    "WorldConfig",
]  # fmt: skip

CAPTIONS = ("short", "detailed", "mixed")


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What to draw. An unusable value raises UserError.

    split: train | test (same distribution, other items) | heldout (colour-shape and shape-motion combinations that
      the others never contain) | ood (speeds and radii outside the training ranges).
    shapes: (frames, height, width), one drawn per item. extent: world units along the frame's shorter side; fewer
      show the objects larger. num_objects: inclusive range within 1..3. captions: short | detailed | mixed.
    motions: a motion that is named twice is drawn twice as often.
    horizon: the seconds for which objects are placed to stay in the frame; None: as long as the item's own clip (an
      image: one second). With a number, an item of another length is the same video, cut or continued.
    kinds: of captions (short, detailed) that an item has beside its own, for training to draw from.
    """

    split: str = "train"
    seed: int = 0
    num_samples: int = 10_000
    shapes: tuple[tuple[int, int, int], ...] = ((9, 32, 32),)
    fps: float = 8.0
    extent: float = 10.0
    num_objects: tuple[int, int] = (1, 3)
    motions: tuple[str, ...] = MOTIONS
    captions: str = "short"
    backgrounds: tuple[str, ...] = BACKGROUNDS
    horizon: float | None = None
    kinds: tuple[str, ...] = ()

    def __post_init__(self):
        def fix(name, convert):
            try:
                object.__setattr__(self, name, convert(getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise UserError(f"world: {name} = {getattr(self, name)!r} cannot be read ({error}).") from None

        fix("shapes", lambda value: tuple(tuple(operator.index(n) for n in shape) for shape in value))
        fix("num_objects", lambda value: tuple(operator.index(n) for n in value))
        fix("motions", tuple)
        fix("backgrounds", tuple)
        fix("kinds", tuple)
        fix("seed", operator.index)
        fix("num_samples", operator.index)
        fix("fps", float)
        fix("extent", float)
        fix("horizon", lambda value: None if value is None else float(value))
        check_choice("split", (self.split,), SPLITS)
        check_choice("captions", (self.captions,), CAPTIONS)
        if self.kinds:
            check_choice("kinds", self.kinds, CAPTIONS[:2])
        check_choice("motions", self.motions, MOTIONS)
        check_choice("backgrounds", self.backgrounds, BACKGROUNDS)
        check_setting(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to 2**63 - 1")
        check_setting(self.num_samples >= 1, "num_samples", self.num_samples, "use 1 or more")
        check_setting(0 < self.fps < 1e4, "fps", self.fps, "use frames a second, above 0")
        least = 7.0 if self.split == "ood" else 5.0
        check_setting(least <= self.extent <= 100, "extent", self.extent,
               f"the largest objects of split {self.split!r} need {least:g} units, and 100 is the most")  # fmt: skip
        check_setting(self.horizon is None or self.horizon > 0, "horizon", self.horizon, "use seconds > 0, or None")
        check_setting(len(self.shapes) > 0, "shapes", self.shapes, "give at least one (frames, height, width)")
        for shape in self.shapes:
            good = len(shape) == 3 and shape[0] >= 1 and min(shape[1:]) >= 8
            check_setting(good, "shapes", shape, "use (frames >= 1, height >= 8, width >= 8)")
        good = len(self.num_objects) == 2 and 1 <= self.num_objects[0] <= self.num_objects[1] <= 3
        check_setting(good, "num_objects", self.num_objects, "use (least, most) within 1 to 3")
        for count in range(self.num_objects[0], self.num_objects[1] + 1):
            leads = lead_motions(self.motions, count)
            check_setting(bool(leads), "motions", self.motions,
                   f"they cannot fill a scene of {count} object(s), as collide takes two and occlude one: "
                   "add a motion or change num_objects")  # fmt: skip


def check_setting(good: bool, name: str, value, remedy: str, section: str = "world"):
    """Raises UserError, with the remedy, unless a setting of a config section is good."""
    if not good:
        raise UserError(f"{section}: {name} = {value!r} cannot be used; {remedy}.")


def check_choice(name: str, values, options, section: str = "world"):
    """Raises UserError unless there is at least one value and all are among the options."""
    for value in values or (values,):
        check_setting(value in options, name, value, f"choose of {', '.join(options)}", section)


@functools.lru_cache(maxsize=64)  # spec, captions and video of an item are asked for one after the other
def _scene(config: WorldConfig, index: int, shape: tuple[int, int, int]) -> Scene:
    num_frames, height, width = shape
    horizon = config.horizon
    if horizon is None:
        horizon = (num_frames - 1) / config.fps if num_frames > 1 else 1.0
    unit = config.extent / min(height, width)
    return sample_scene(
        config.split, config.seed, index, (width * unit, height * unit), horizon,
        config.num_objects, config.motions, config.backgrounds,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ObjectTruth:
    """An object in words. direction is None unless it moves along a line; in an image it is "still"."""

    color: str
    shape: str
    size: str  # small | medium | large, at time 0
    motion: str
    direction: str | None
    speed_bin: str | None  # slow | medium | fast
    sense: str | None  # right | left (throw), clockwise | counterclockwise, growing | shrinking


@dataclasses.dataclass(frozen=True)
class Truth:
    """Ground truth of a clip of T frames with K objects, from back to front.

    Lengths are fractions of the frame's shorter side; x right, y down, pixel (row r, column c) covers c..c+1, r..r+1.
    radius is that of the circle of equal area; visible is the share of an object's area that is in the frame and not
    covered by an object in front or by the bar. contacts: (seconds, wall | floor | object, i, j), j = -1 if no object.
    unit: the length of a world unit. bar: (axis, low, high) of the grey bar, axis 0 = x; None if there is none.
    """

    objects: tuple[ObjectTruth, ...]
    times: np.ndarray  # [T] seconds
    position: np.ndarray  # [K, T, 2]
    velocity: np.ndarray  # [K, T, 2] a second
    radius: np.ndarray  # [K, T]
    visible: np.ndarray  # [K, T]
    contacts: list[tuple[float, str, int, int]]
    unit: float
    bar: tuple[int, float, float] | None = None

    @property
    def num_objects(self) -> int:
        return len(self.objects)


class World:
    """Random-access source of the world's items; picklable, pure, without state."""

    name = "world"  # in a data section's path, and first in the keys of items
    scored_splits = ("test", "heldout")

    def __init__(self, config: WorldConfig | None = None):
        self.config = config or WorldConfig()

    def __len__(self) -> int:
        return self.config.num_samples

    def _index(self, index) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"world item {index} of {len(self)}")
        return index

    def frame_shape(self, index: int) -> tuple[int, int, int]:
        """(frames, height, width) of an item."""
        shapes = self.config.shapes
        return shapes[0] if len(shapes) == 1 else self._draws(self._index(index), 2).choice(shapes)

    def _draws(self, index: int, stream: int) -> Draws:
        return Draws(self.config.seed, self.config.split, index, stream)

    def scene(self, index: int) -> Scene:
        """What happens in an item, in world units and continuous time."""
        index = self._index(index)
        return _scene(self.config, index, self.frame_shape(index))

    def caption(self, index: int, scene: Scene | None = None, style: str = "") -> str:
        """The item's caption, short or detailed; "": in the style of the configuration."""
        scene = scene or self.scene(index)
        style = style or self.config.captions
        if style == "mixed":
            style = self._draws(self._index(index), 3).choice(CAPTIONS[:2])
        duration = (self.frame_shape(index)[0] - 1) / self.config.fps
        return (short_caption if style == "short" else detailed_caption)(scene, duration)

    @property
    def caption_kinds(self) -> tuple[str, ...]:
        """Kinds of captions that `captions` gives."""
        return self.config.kinds

    def captions(self, index: int, scene: Scene | None = None) -> dict[str, str]:
        """The captions that an item has beside its own, by their kind."""
        scene = scene or self.scene(index)
        return {kind: self.caption(index, scene, kind) for kind in self.config.kinds}

    def spec(self, index: int, scene: Scene | None = None) -> SampleSpec:
        """Shape, frame rate, caption and key of an item, without rendering it."""
        index = self._index(index)
        key = f"{self.name}/{self.config.split}/{self.config.seed}/{index}"
        return SampleSpec(*self.frame_shape(index), self.config.fps, self.caption(index, scene), key)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """dict(video uint8 [T, H, W, 3], caption, fps, key)."""
        scene = self.scene(index)
        spec = self.spec(index, scene)
        video = self.scene_video(scene, num_frames=spec.num_frames, height=spec.height, width=spec.width, fps=spec.fps)
        return {"video": video, "caption": spec.caption, "fps": spec.fps, "key": spec.key}

    @staticmethod
    def scene_video(scene: Scene, *, num_frames: int, height: int, width: int, fps: float) -> np.ndarray:
        """Any scene at any size, frame rate and length: uint8 [T, H, W, 3]. Another aspect ratio shows more around."""
        return render(scene, np.arange(num_frames) / fps, height, width)

    def truth(self, index: int) -> Truth:
        """Ground truth of an item as it is rendered."""
        num_frames, height, width = self.frame_shape(index)
        return self.scene_truth(
            self.scene(index), num_frames=num_frames, height=height, width=width, fps=self.config.fps
        )

    @staticmethod
    def scene_truth(scene: Scene, *, num_frames: int, height: int, width: int, fps: float) -> Truth:
        """Ground truth of scene_video(...) with the same arguments."""
        times = np.arange(num_frames) / fps
        states = [body.path.state(times) for body in scene.bodies]
        position = np.stack([position for position, _ in states])
        velocity = np.stack([velocity for _, velocity in states])
        radius = np.stack([body.radii(times) for body in scene.bodies])
        scale, left, top = view(scene, height, width)
        frame = (-left / scale, -top / scale, (width - left) / scale, (height - top) / scale)
        unit = scale / min(height, width)
        if num_frames > 1:
            names = [f.name for f in dataclasses.fields(ObjectTruth)]
            objects = tuple(ObjectTruth(*(getattr(body, name) for name in names)) for body in scene.bodies)
        else:
            objects = tuple(ObjectTruth(b.color, b.shape, b.size, "still", None, None, None) for b in scene.bodies)
        return Truth(
            objects=objects,
            times=times,
            position=position * unit + np.array([left, top]) / min(height, width),
            velocity=velocity * unit,
            radius=radius * unit,
            visible=visible_fractions(scene, position, radius, frame),
            contacts=scene.contacts(times[-1]),
            unit=unit,
            bar=_bar_in_frame(scene, unit, np.array([left, top]) / min(height, width)),
        )


def _bar_in_frame(scene: Scene, unit: float, corner: np.ndarray):
    bar = scene.bar
    return bar and (bar.axis, *(float(edge * unit + corner[bar.axis]) for edge in (bar.low, bar.high)))
