"""The world suite: Sora's open questions, asked in the embedded world, where pixels alone give exact answers.

Parts (of those that a run was trained for; what is left out is named with its reason under `not_scored`):

    prompts/SPLIT/STYLE   is the prompt followed: in distribution, in combinations never seen, outside the trained range
    persistence           is it the same object when it comes out from behind a bar
    physics/...           how right is motion that goes on from given frames (`sorax.physics_suite`)
    reliability           how many samples does one good video take
    length/FACTOR         what is left of it as the clip grows
    modes/MODE            are given frames reproduced, and is their story told on

Prompts, noise and settings are pinned: the same weights give the same numbers.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.caption_kinds import CAPTION, ORIGINAL, behind, parse_mix
from data_pipelines.phyworld import PhyWorld
from data_pipelines.sources import open_source
from data_pipelines.survey import source_identity
from data_pipelines.world import World
from sorax.abnormal import abnormal_events, persistence
from sorax.caption_writer import load_captioner
from sorax.errors import UserError
from sorax.evaluate import untrained_params
from sorax.expand import EXPANDER, RunExpander, expand
from sorax.generate import Request
from sorax.judging import DETAILED, SHORT, judge
from sorax.metrics import psnr
from sorax.parser import parse_clip
from sorax.patchify import num_tokens
from sorax.physics_suite import open_phyworld, world_physics_parts
from sorax.statistics import rate_cell, reliability
from sorax.suite import Part

SEED = 20_260_214  # of the suite's scenes: nobody trains or validates on them
SPLITS = {"test": "in distribution", "heldout": "combinations never trained", "ood": "speeds and sizes out of range"}
LENGTHS = (1, 2, 4)
CHUNK_TOKENS = 8192  # of a unit
CHECKS = {
    "joint": "joint", "usable": "usable", "normal": "nothing abnormal", "color": "colour", "shape": "shape",
    "count": "count", "size": "size", "direction": "direction", "speed": "speed", "motion": "motion",
    "relation": "relation",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much is asked: cases of a part, prompts of `reliability`, and samples of each of those."""

    clips: int = 64
    prompts: int = 200
    samples: int = 16

    def __post_init__(self):
        if min(self.clips, self.prompts, self.samples) < 1:
            raise UserError(f"a suite of {self.clips} clips, {self.prompts} prompts and {self.samples} samples: ask "
                            "for at least 1 of each")  # fmt: skip


class Makers:
    """Who makes the videos of a part: rows of functions of its cases.

    Args:
        generator: `sorax.generate.Generator` of the run. networks: of the run, for the untrained floor.
        sampling: num_steps, guidance_scale, shift and solver.
    """

    def __init__(self, generator, networks, sampling: dict):
        self.generator, self.sampling = generator, sampling
        self._trained = generator.params
        self._floor = functools.cache(lambda: generator.placed(untrained_params(networks, 0)))

    def truth(self, video: Callable[[int], np.ndarray]) -> dict:
        """The ceilings: what is true, and the VAE's copy of it."""
        codec = self.generator.codec

        def copies(cases):
            return codec.decode(codec.encode([video(i) for i in cases]))

        return dict(ground_truth=lambda cases: [video(i) for i in cases], vae=copies)

    def model(self, requests: Callable[[Sequence[int]], list[Request]]) -> dict:
        return dict(model=lambda cases: self._videos(requests(cases), self._trained))

    def untrained(self, requests: Callable[[Sequence[int]], list[Request]]) -> dict:
        return dict(untrained=lambda cases: self._videos(requests(cases), self._floor()))

    def _videos(self, requests, params):
        self.generator.params = params
        try:
            return self.generator.videos(requests, **self.sampling)
        finally:
            self.generator.params = self._trained

    def chunk(self, shape) -> int:
        """Cases of a unit of videos of this shape (T, H, W)."""
        latents = self.generator.codec.config.latent_shape(*shape)
        return int(np.clip(CHUNK_TOKENS // num_tokens(latents, self.generator.dit_config.patch_size), 8, 64))


def open_world(run) -> World:
    """The embedded world that a run was trained on, in its commonest moving shape, with the suite's own scenes.

    Raises:
        UserError: it was trained on something else.
    """
    data = behind(run.config.data)
    sections = list(data.get("mixture") or ()) or [data]
    if not any((section.get("path") or "world") == "world" for section in sections):
        raise UserError(f"the world suite asks for what the embedded world shows, and {run.workdir!r} is trained on "
                        "other data: add --data world to score it there, or take --suite video")  # fmt: skip
    vae, dit = run.networks.vae_config, run.networks.dit_config
    grid = dict(spatial_multiple=vae.spatial_stride * dit.patch_size[1], temporal_stride=vae.temporal_stride)
    world = open_source(dict(data, path="world", mixture=(), index=""), split="test", **grid)
    moving = [shape for shape in world.config.shapes if shape[0] > 1] or list(world.config.shapes)
    shape = collections.Counter(moving).most_common(1)[0][0]
    return World(dataclasses.replace(world.config, shapes=(shape,), seed=SEED))


def world_parts(run, makers: Makers, counts: Counts) -> tuple[list[Part], dict[str, str]]:
    """The parts for a run, and why the others are not scored: name -> reason. Of PhyWorld's scenes physics alone."""
    if run.config.data.get("path") == PhyWorld.name:
        return world_physics_parts(open_phyworld(run), makers, counts.clips)
    world = open_world(run)
    trained = trained_styles(run, world)
    parts, left = [], {}
    for split in SPLITS:
        try:
            _changed(world, split=split)
        except UserError as error:  # its largest objects do not fit in so small a world
            left[f"prompts/{split}"] = str(error).rstrip(".")
            continue
        for style in ("short", "detailed"):
            parts.append(prompt_part(world, makers, counts.clips, split, style, trained))
    expander = os.path.join(run.workdir, EXPANDER)
    if os.path.isdir(expander):
        parts.append(expanded_part(world, makers, counts.clips, RunExpander(load_captioner(expander, reads="text"))))
    else:
        left["prompts/test/expanded"] = f"the run has no model that expands prompts, in its folder {EXPANDER}/"
    parts.append(reliability_part(world, makers, counts))
    if "occlude" in world.config.motions:
        parts.append(persistence_part(world, makers, counts.clips))
    else:
        left["persistence"] = "the run is not trained on objects that pass behind a bar (motion `occlude`)"
    frames = world.config.shapes[0][0]
    if frames > 1:
        parts += [length_part(world, makers, counts.clips, factor) for factor in LENGTHS]
    else:
        left["length"] = "the run is trained on images alone"
    modes = trained_modes(run) if frames > 1 else {}
    parts += [mode_part(world, makers, counts.clips, mode) for mode in modes]
    if not modes:
        left["modes"] = "the run is not trained with given frames (config.flow.given)"
        left["physics"] = left["modes"]
    else:
        physics, why = world_physics_parts(world, makers, counts.clips)
        parts, left = parts + physics, left | why
    return parts, left


# --- Parts


class _Clips:
    """Clips of a world with their truths, each made once."""

    def __init__(self, world: World, count: int):
        self.world = World(dataclasses.replace(world.config, num_samples=count))
        self.shape = self.world.config.shapes[0]
        self.video = functools.lru_cache(256)(lambda i: self.world[i]["video"])
        self.truth = functools.cache(self.world.truth)
        self.caption = functools.cache(self.world.caption)
        self.data = source_identity(self.world)

    def requests(self, cases):
        return [Request(self.caption(i), *self.shape, seed=i) for i in cases]


def _changed(world, **values):
    return World(dataclasses.replace(world.config, **values))


def judge_clip(video, truth, asked) -> tuple[list, dict, list]:
    """(tracks, checks, events) of a clip: what its caption says, `normal`, and `usable`, which is all of that."""
    tracks = parse_clip(video)
    checks = {name: None if right is None else bool(right) for name, right in
              judge(video, truth, tracks=tracks, asked=asked).items()}  # fmt: skip
    events = [dataclasses.asdict(event) for event in abnormal_events(video, tracks)]
    checks["normal"] = not events
    checks["usable"] = checks["joint"] and not events
    return tracks, checks, events


def _judging(clips, asked):
    def judge_case(video, i):
        _, checks, events = judge_clip(video, clips.truth(i), asked)
        return dict(checks=checks, events=events)

    return judge_case


def trained_styles(run, world: World) -> set[str]:
    """Styles of captions, short and detailed, that a run was trained on: of the world's own, or those of its mix."""
    own = {"short", "detailed"} if world.config.captions == "mixed" else {world.config.captions}
    mix = parse_mix(run.config.data.get("caption_mix")) or {CAPTION: 1.0}
    return set().union(*(own if kind in (CAPTION, ORIGINAL) else {kind} for kind in mix))


def prompt_part(world: World, makers: Makers, count: int, split: str, style: str, trained: set[str]) -> Part:
    """Whether clips show what their captions say.

    style: of captions. trained: the styles that the run was trained on.
    """
    clips = _Clips(_changed(world, split=split, captions=style), count)
    asked = SHORT if style == "short" else DETAILED
    strange = "" if style in trained else f" The run has never seen {style} captions."
    return Part(
        name=f"prompts/{split}/{style}", title=f"Prompts, {SPLITS[split]}, {style} captions",
        about="Share of clips that show what the caption says, each made from its caption alone. Joint: everything "
        "that it says; usable: that, and nothing vanishes, appears, splits, deforms or jumps." + strange,
        count=count, chunk=makers.chunk(clips.shape),
        make=makers.truth(clips.video) | makers.model(clips.requests) | makers.untrained(clips.requests),
        judge=_judging(clips, asked), caption=clips.caption, seed=lambda i: i,
        metrics={name: title for name, title in CHECKS.items() if name in ("joint", "usable", "normal", *asked)},
        fps=world.config.fps, data=clips.data,
    )  # fmt: skip


def expanded_part(world: World, makers: Makers, count: int, expander: RunExpander) -> Part:
    """Whether clips that are made from expanded prompts show what the short prompts say."""
    clips = _Clips(_changed(world, split="test", captions="short"), count)
    longer = functools.cache(lambda i: expand([clips.caption(i)], expander, seed=i)[0].text)

    def requests(cases):
        return [dataclasses.replace(request, prompt=longer(i)) for i, request in zip(cases, clips.requests(cases))]

    return Part(
        name="prompts/test/expanded", title="Prompts, in distribution, short captions that were expanded",
        about="Clips are made from detailed prompts that a language model made of short ones, and judged by the short "
        "ones: the row to compare with is that of short captions.",
        count=count, chunk=makers.chunk(clips.shape), make=makers.truth(clips.video) | makers.model(requests),
        judge=_judging(clips, SHORT), caption=lambda i: f"{clips.caption(i)} -> {longer(i)}", seed=lambda i: i,
        metrics=CHECKS, fps=world.config.fps, data=f"{clips.data}-{expander.run.identity}",
    )  # fmt: skip


def reliability_part(world: World, makers: Makers, counts: Counts) -> Part:
    """How often one of several samples of a prompt is usable; see `statistics.reliability`."""
    clips, samples = _Clips(_changed(world, split="test", captions="short"), counts.prompts), counts.samples

    def requests(cases):
        return [Request(clips.caption(i // samples), *clips.shape, seed=1_000_000 + i) for i in cases]

    def judge_case(video, i):
        _, checks, events = judge_clip(video, clips.truth(i // samples), SHORT)
        return dict(checks=checks, events=events)

    def tables(judgements):
        good = np.array([j["checks"]["usable"] for j in judgements]).reshape(-1, samples)
        return reliability(good)

    names = ["usable", *(f"pass@{k}" for k in (1, 4, 16) if k <= samples), f"worst of {samples}"]
    return Part(
        name="reliability", title="How many samples does one good video take?",
        about=f"{samples} samples of each of {counts.prompts} prompts; a sample is usable if it shows all that the "
        "caption says and nothing abnormal. pass@k: at least one of k samples is usable; worst: all of them are.",
        count=counts.prompts * samples, chunk=makers.chunk(clips.shape), make=makers.model(requests), judge=judge_case,
        caption=lambda i: clips.caption(i // samples), seed=lambda i: 1_000_000 + i,
        metrics={name: name for name in names}, fps=world.config.fps, data=clips.data, tables=tables,
        group=lambda i: i // samples,
    )  # fmt: skip


def persistence_part(world: World, makers: Makers, count: int) -> Part:
    """Whether an object is the same after it was hidden."""
    config = dict(split="test", captions="short", motions=("occlude",), num_objects=(1, 1))
    clips = _Clips(_changed(world, **config), count)

    def judge_case(video, i):
        tracks, checks, events = judge_clip(video, clips.truth(i), SHORT)
        found = persistence(video, tracks)
        same = {f"same_{name}": found[name] for name in ("color", "size", "shape")}
        checks |= dict(hidden=found["occlusions"] > 0, same_object=found["same_object"], **same)
        return dict(checks=checks, events=events)

    return Part(
        name="persistence", title="Do objects persist when hidden?",
        about="An object passes behind a bar. Same: it comes out once, where it should, in its colour, shape and size "
        "(within 5 %); counted where it really was hidden and the clip shows what came after.",
        count=count, chunk=makers.chunk(clips.shape),
        make=makers.truth(clips.video) | makers.model(clips.requests) | makers.untrained(clips.requests),
        judge=judge_case, caption=clips.caption, seed=lambda i: i,
        metrics=dict(same_object="same object", hidden="really hidden", same_color="same colour", same_size="same size",
                     same_shape="same shape", normal="nothing abnormal", joint="prompt followed"),
        fps=world.config.fps, data=clips.data,
    )  # fmt: skip


def length_part(world: World, makers: Makers, count: int, factor: int) -> Part:
    """What is left of prompts and objects in clips `factor` times as long as those of training."""
    frames, height, width = world.config.shapes[0]
    fps = world.config.fps
    shape = (1 + (frames - 1) * factor, height, width)
    horizon = (frames - 1) * max(LENGTHS) / fps  # of the longest: the same scenes at every length
    clips = _Clips(_changed(world, split="test", captions="short", shapes=(shape,), horizon=horizon), count)

    def judge_case(video, i):
        tracks, checks, events = judge_clip(video, clips.truth(i), SHORT)
        truth = clips.truth(i)
        wanted = collections.Counter(thing.color for thing in truth.objects)
        present = []
        for t in range(len(video)):
            seen = collections.Counter(track.color for track in tracks if track.seen[t])
            shown = collections.Counter(o.color for o, v in zip(truth.objects, truth.visible[:, t]) if v > 0.5)
            # An object may leave the frame elsewhere than in the truth: it may be missing only where the truth lets it.
            present.append(bool(seen <= wanted and sum((seen & shown).values()) == sum(shown.values())))
        return dict(checks=checks, events=events, present=present)

    def series(rows):
        lines = {}
        for row, judgements in rows.items():
            cells = [rate_cell(column) for column in zip(*(j["present"] for j in judgements))]
            lines[row] = dict(x=[t / fps for t in range(len(cells))], y=[c["value"] for c in cells],
                              lo=[c["lo"] for c in cells], hi=[c["hi"] for c in cells])  # fmt: skip
        return [dict(title="Objects of the caption present, and no others", x_label="seconds", y_label="share of clips",
                     lines=lines)]  # fmt: skip

    names = ("usable", "joint", "normal", "color", "shape", "count", "direction", "motion")
    return Part(
        name=f"length/{factor}x", title=f"{factor} times the length of training: {shape[0]} frames",
        about="The same scenes and prompts at every length.", count=count, chunk=makers.chunk(shape),
        make=makers.truth(clips.video) | makers.model(clips.requests), judge=judge_case, caption=clips.caption,
        seed=lambda i: i, metrics={name: CHECKS[name] for name in names}, fps=fps, data=clips.data, series=series,
    )  # fmt: skip


# --- Given frames

# Mode -> its number in flow.given, its title, and which of t latent frames are given.
MODES = {
    "first": (1, "from the first frame", lambda t: [0]),
    "last": (2, "to the last latent frame", lambda t: [t - 1]),
    "ends": (3, "between both ends", lambda t: [0, t - 1]),
    "half": (4, "on from the first half", lambda t: range((t + 1) // 2)),
}


def trained_modes(run) -> dict[str, float]:
    """Mode -> how often it is drawn in training, of those that are."""
    weights = list(run.config.flow.get("given") or ())
    return {mode: weights[k] for mode, (k, _, _) in MODES.items() if k < len(weights) and weights[k] > 0}


def frames_of(given: Sequence[int], temporal_stride: int) -> list[int]:
    """Frames that given latent frames stand for: the first one for one frame, each other for `temporal_stride`."""
    groups = [[0] if k == 0 else range((k - 1) * temporal_stride + 1, k * temporal_stride + 1) for k in given]
    return [frame for group in groups for frame in group]


def mode_part(world: World, makers: Makers, count: int, mode: str) -> Part:
    """Whether what is given is reproduced, and the rest goes with it. The caption is given too."""
    config = dict(split="test", captions="short")
    clips = _Clips(_changed(world, **config), count)
    codec, (_, title, choose) = makers.generator.codec, MODES[mode]
    t = codec.config.latent_shape(*clips.shape)[0]
    given = sorted(set(choose(t)))
    shown = frames_of(given, codec.config.temporal_stride)

    def requests(cases):
        made = []
        for i, latents in zip(cases, codec.encode([clips.video(i) for i in cases])):
            mask = np.zeros(latents.shape[:3], bool)
            mask[given] = True
            made.append(dataclasses.replace(clips.requests([i])[0], given=(mask, latents)))
        return made

    def judge_case(video, i):
        tracks, checks, events = judge_clip(video, clips.truth(i), SHORT)
        original, truth = clips.video(i), clips.truth(i)
        copied = psnr(video[shown], original[shown])
        values = dict(given_psnr=min(copied, 99.0), position_error=position_error(tracks, truth, shown))
        return dict(checks=checks | dict(found=values["position_error"] is not None), events=events, values=values)

    return Part(
        name=f"modes/{mode}", title=f"Given frames: {title}",
        about=f"Frames {', '.join(map(str, shown))} of {clips.shape[0]} are given. PSNR: of those frames (99 if they "
        "are exact). Position error: of the objects in all other frames against the truth, where all are found.",
        count=count, chunk=makers.chunk(clips.shape), make=makers.truth(clips.video) | makers.model(requests),
        judge=judge_case, caption=clips.caption, seed=lambda i: i,
        metrics=dict(usable="usable", given_psnr="PSNR of what is given", position_error="position error",
                     found="all objects found", joint="prompt followed", normal="nothing abnormal"),
        units=dict(given_psnr="dB", position_error="of the frame"), fps=world.config.fps, data=clips.data,
    )  # fmt: skip


def position_error(tracks, truth, given: Sequence[int]) -> float | None:
    """Mean distance of objects from where they should be, over frames that are not given, in fractions of the frame.

    An object of the truth is the track of its colour (colours differ within a scene). None if one of them is not found
    in half of the frames in which it can be seen.
    """
    frames = np.setdiff1d(np.arange(len(truth.times)), list(given))
    errors = []
    for thing, position, visible in zip(truth.objects, truth.position, truth.visible):
        wanted = frames[visible[frames] > 0.5]
        track = next((track for track in tracks if track.color == thing.color), None)
        if not len(wanted):
            continue
        seen = wanted[track.seen[wanted]] if track is not None else []
        if len(seen) < len(wanted) / 2:
            return None
        errors.append(float(np.linalg.norm(track.positions[seen] - position[seen], axis=-1).mean()))
    return float(np.mean(errors)) if errors else None
