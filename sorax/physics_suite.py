"""Does motion that goes on from given frames obey physics? Parts of a suite, one for each motion and split.

A model is given the first 3 frames of a clip that it never trained on, and continues it; its objects are tracked and
compared with the truth (`sorax.motion`). For PhyWorld's scenes the formulas are PhyWorld's, over its 32 frames; the
embedded world's own motions are scored alike where they go straight, are thrown, or collide.
"""

import collections
import dataclasses
import functools

import numpy as np

from data_pipelines import phyworld, world_physics
from data_pipelines.phyworld import GIVEN_FRAMES, PhyWorld
from data_pipelines.sources import open_source
from data_pipelines.survey import source_identity
from data_pipelines.world import World
from sorax.abnormal import abnormal_events
from sorax.errors import UserError
from sorax.generate import Request, given_frames
from sorax.motion import drift, velocity_error
from sorax.parser import parse_clip
from sorax.suite import Part

# Motion -> objects of a clip, and gravity in units / s^2.
PHYWORLD_MOTIONS = {"uniform": (1, 0.0), "parabola": (1, phyworld.GRAVITY), "collision": (2, 0.0)}
WORLD_MOTIONS = {"straight": (1, 0.0), "throw": (1, world_physics.GRAVITY), "collide": (2, 0.0)}
SPLITS = {"test": "in distribution", "ood": "speeds and sizes out of distribution"}
METRICS = {
    "velocity_error": "velocity error", "printed": "as printed", "before": "before contact", "after": "after contact",
    "energy": "energy drift", "momentum": "momentum drift", "tracked": "tracked", "normal": "nothing abnormal",
}  # fmt: skip
UNITS = {name: "units/s" for name in ("velocity_error", "printed", "before", "after")}


def world_physics_parts(world: World, makers, count: int, floor: bool = False) -> tuple[list[Part], dict[str, str]]:
    """Parts for the motions of a source that can be scored, and why the others are left out: name -> reason.

    Args:
        world: the embedded world, or PhyWorld's scenes; its split is not looked at. makers: `world_suite.Makers`.
        count: clips of a part. floor: an untrained model beside the model.
    """
    motions = PHYWORLD_MOTIONS if isinstance(world, PhyWorld) else WORLD_MOTIONS
    stride = makers.generator.codec.config.temporal_stride
    frames = world.config.shapes[0][0]
    if (GIVEN_FRAMES - 1) % stride:
        return [], {"physics": f"{GIVEN_FRAMES} frames are given, but a latent frame of this VAE stands for {stride}"}
    if frames < 2 * GIVEN_FRAMES:
        return [], {"physics": f"clips of {frames} frames leave too little after {GIVEN_FRAMES} that are given"}
    parts, left = [], {}
    for motion in motions:
        if motion not in world.config.motions:
            left[f"physics/{motion}"] = "the run is not trained on this motion"
            continue
        objects, gravity = motions[motion]
        for split in SPLITS:
            try:
                source = of_motion(world, motion, split, count, objects)
            except UserError as error:  # such as objects too large for a small frame
                left[f"physics/{motion}/{split}"] = str(error)
            else:
                parts.append(_part(source, makers, motion, split, objects, gravity, floor))
    return parts, left


def open_phyworld(run) -> PhyWorld:
    """PhyWorld's scenes as a run is trained on them.

    Raises:
        UserError: it is trained on something else.
    """
    if run.config.data.get("path") != PhyWorld.name:
        raise UserError(f"{run.workdir!r} is not trained on PhyWorld's scenes (config.data.path is "
                        f"{run.config.data.get('path')!r})")  # fmt: skip
    return open_source(run.config.data, split="test")


def of_motion(world: World, motion: str, split: str, count: int, objects: int) -> World:
    """Items of a source that show one motion and nothing else."""
    settings = dict(motions=(motion,), split=split, num_samples=count)
    if not isinstance(world, PhyWorld):
        settings |= dict(num_objects=(objects, objects), captions="short")
    return type(world)(dataclasses.replace(world.config, **settings))


def score(video, truth, *, fps: float, extent: float, gravity: float, horizontal: bool, frames: int) -> dict:
    """Judgement of a clip: checks `tracked` and `normal`, values as METRICS names them, and events.

    horizontal: velocity error as PhyWorld's code has it, of the horizontal axis. frames: of the clip, that count.
    """
    video, truth = video[:frames], _cut(truth, frames)
    tracks = parse_clip(video)
    error = velocity_error(tracks, truth, GIVEN_FRAMES, extent=extent, axes=(0,) if horizontal else (0, 1))
    bounces = [time for time, kind, _, _ in truth.contacts if kind == "floor"]
    until = int(min(bounces) * fps) if bounces else None
    change = drift(tracks, fps, gravity=gravity, extent=extent, start=GIVEN_FRAMES, until=until)
    events = [dataclasses.asdict(event) for event in abnormal_events(video, tracks)]
    values = dict(velocity_error=error.code, printed=error.printed, before=error.before, after=error.after,
                  energy=change.energy, momentum=change.momentum)  # fmt: skip
    wrong = 1.0 if error.code is None else error.code  # of a speed of about 1: the worst clips first
    return dict(checks=dict(tracked=error.tracked, normal=not events), values=values, events=events,
                score=float(np.exp(-wrong)))  # fmt: skip


def _cut(truth, frames):
    """The truth of the first frames of a clip."""
    end = truth.times[:frames][-1]
    arrays = {name: getattr(truth, name)[:, :frames] for name in ("position", "velocity", "radius", "visible")}
    contacts = [contact for contact in truth.contacts if contact[0] <= end]
    return dataclasses.replace(truth, times=truth.times[:frames], contacts=contacts, **arrays)


def _part(source, makers, motion, split, objects, gravity, floor):
    is_phyworld = isinstance(source, PhyWorld)
    shape = collections.Counter(source.config.shapes).most_common(1)[0][0]
    codec, fps, extent = makers.generator.codec, source.config.fps, source.config.extent
    frames = min(shape[0], phyworld.NUM_FRAMES) if is_phyworld else shape[0]
    video = functools.lru_cache(256)(lambda i: source[i]["video"])

    def requests(cases):
        given = [given_frames(codec, {0: video(i)[:GIVEN_FRAMES]}, *shape) for i in cases]
        return [Request(source.caption(i), *shape, seed=i, given=g) for i, g in zip(cases, given)]

    def judge(made, i):
        return score(made, source.truth(i), fps=fps, extent=extent, gravity=gravity, horizontal=is_phyworld,
                     frames=frames)  # fmt: skip

    names = [name for name in METRICS if objects == 2 or name not in ("before", "after")]
    which = "horizontal velocity, " if is_phyworld else "velocity, "
    return Part(
        name=f"physics/{motion}/{split}", title=f"Physics: {motion}, {SPLITS[split]}",
        about=f"The first {GIVEN_FRAMES} frames are given. Velocity error: |mean of {which}less that of the truth|, as "
        "PhyWorld's released code has it; as printed: the mean of |velocity less that of the truth|, frame by frame. "
        "Drift: relative change of energy and momentum, without a truth. Errors are of tracked clips; the others are "
        "failures, counted under tracked.",
        count=len(source), chunk=makers.chunk(shape), caption=source.caption, seed=lambda i: i, judge=judge,
        make=makers.truth(video) | makers.model(requests) | (makers.untrained(requests) if floor else {}),
        metrics={name: METRICS[name] for name in names}, units=UNITS, fps=fps, data=source_identity(source),
    )  # fmt: skip
