"""The video suite: real videos beside those of a model, of its VAE, or of any other generator.

No ground truth says what a real video should show, so what is scored is likeness to a reference: without a network
(`sorax.video_metrics`), pair by pair where the videos are copies (PSNR, SSIM, flicker and, with weights, LPIPS), as a
distribution in the features of a VideoMAE (FVD and a kernel distance, `sorax.distances`), and to prompts by a CLIP. The
weights of these networks are the user's, in local folders; without them the report says what to put where.

A report folder holds `suite.json` (what is evaluated, with hashes), `samples/*.npz` (`sorax.video_units`),
`scores.json`, `scores.md` and `index.html`. What was stopped goes on; several processes share the work.
"""

import dataclasses
import json
import os

import jax
import numpy as np

from sorax import processes, suite, video_parts, videomae
from sorax.clip_model import REMEDY as CLIP_REMEDY
from sorax.clip_model import CLIPScore
from sorax.distances import KERNEL_LEAST, check_frechet
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.evaluate_vae import frame_distance
from sorax.generate import Request, legal_shape
from sorax.lpips import LPIPS
from sorax.report_html import write_report
from sorax.runs import kind_of, load_run, open_vae
from sorax.score_report import code_hash, header, params_hash, write_scores, writing
from sorax.video_inputs import Videos, open_videos, pair
from sorax.video_units import Measures, Row, compare_unit, make_units, read_table

VERSION = 1
GRID = 16, 4  # multiple of sizes, and of frames but one, where no network asks for another


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is scored. rows: by name, the reference first; scored: the row that it is about; described: of what it is,
    as suite.json has it; skipped: part -> why it is left out."""

    rows: dict[str, Row]
    scored: str
    measures: Measures
    described: dict
    skipped: dict[str, str]


def evaluate_videos(out: str, reference: str, **arguments) -> dict | None:
    """Scores videos and writes the report folder `out`, or goes on with one of the same; processes share the work.

    Args:
        reference: real videos with captions: a folder, "tfds:NAME", or "world".
        arguments: what `prepare` takes.

    Returns:
        What scores.json holds; None in processes that are not the first. Two evaluations of the same are equal.

    Raises:
        UserError: see `prepare`; `out` holds another evaluation, or cannot be written.
    """
    found = prepare(reference, index=os.path.join(out, "index"), **arguments)
    identity = suite.begin(out, found.described)
    units = [unit for row in found.rows.values() for unit in row.units]
    make_units(units[jax.process_index() :: jax.process_count()], found.measures, out, identity)
    processes.wait("video suite: units")
    if not processes.is_first():
        return None
    scores = _scores(out, found, identity)
    with writing(out):
        write_report(out, scores)
        write_scores(out, scores, video_parts.markdown(scores))
    return scores


def verify_videos(out: str, count: int = 2, seed: int = 0) -> list[str]:
    """Makes `count` units of a report again, drawn by `seed`, and compares them to the bit.

    Returns:
        What differs, in words; nothing if all is the same.

    Raises:
        UserError: the folder is no report of this suite, or what it was made of (code, data, weights) is no longer
            there or has changed: then nothing can be said.
    """
    there = suite.read_described(out)
    if there.get("suite") != "video":
        raise UserError(f"{out!r} is a report of the {there.get('suite')} suite, not of videos")
    found = prepare(**there["arguments"], index=os.path.join(out, "index"))
    here = found.described
    differ = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differ:
        shown = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differ[:3])
        raise UserError(f"{out!r} was made of something else ({shown}): verify it with the same code, data and weights")
    units = [unit for row in found.rows.values() for unit in row.units]
    chosen = np.random.default_rng(seed).permutation(len(units))[:count]
    return [problem for k in chosen
            for problem in compare_unit(out, units[k], suite.identity_of(there), found.measures)]  # fmt: skip


def prepare(
    reference: str, *, run: str = "", videos: str = "", reconstruct: bool = False, paired: bool = False,
    weights: str = "ema", features: str = "", fvd: bool = True, clip: str = "", lpips: str = "",
    num_clips: int | None = None, num_steps: int | None = None, guidance_scale: float | None = None,
    solver: str | None = None, seed: int = 0, overrides=(), index: str | None = None,
) -> Evaluation:  # fmt: skip
    """Opens all that is needed, and refuses what cannot be scored before any work is done.

    Args:
        reference: see `evaluate_videos`.
        run: a text-to-video run: a clip is made from each caption of the reference, at its shape on the model's grid;
            beside it stand its VAE's copies. Or, with `reconstruct`, any run or diffusers folder with a VAE, of which
            the copies alone are scored.
        videos: in place of a run, a folder of any generator's videos, with prompts in its metadata.jsonl.
        paired: the videos are copies of those of the reference that have their names.
        weights: "ema" or "raw", of a text-to-video run.
        features, clip: folders of a VideoMAE and of a CLIP; "" leaves out what needs them.
        fvd: whether FVD is wanted, which needs more videos than there are features.
        lpips: safetensors file of `sorax.lpips`, for copies.
        num_clips: of the reference, and of videos that are not paired, spread evenly; None: all.
        num_steps, guidance_scale, solver: of sampling; None: the run's own. seed: clip i is made from noise seed + i.
        overrides: `KEY=VALUE` of a `data` section, such as "max_frames=17": how videos are read.
        index: folder where indexes of folders are kept; None: nowhere.

    Raises:
        UserError: nothing or two things to score; videos that cannot be read, have no prompt where one is needed, or do
            not pair; fewer of them than a metric needs; weights that are missing or of another network.
    """
    arguments = dict(locals())
    del arguments["index"]
    arguments["overrides"] = list(overrides)
    for name in ("reference", "run", "videos", "features", "clip", "lpips"):  # for `verify_videos`, from anywhere
        if os.path.exists(arguments[name]):
            arguments[name] = os.path.abspath(arguments[name])
    _check(run, videos, reconstruct, paired, lpips)
    metric = LPIPS.load(lpips) if lpips else None
    measures = Measures(features=videomae.VideoFeatures.load(features) if features else None,
                        clip=CLIPScore.load(clip) if clip else None,
                        lpips=frame_distance(metric) if metric else None)  # fmt: skip

    def open_side(path, what, **settings):
        cache = index and os.path.join(index, what.strip("-"))
        return open_videos(path, overrides=overrides, what=what, cache=cache, **settings)

    if videos:
        found = _videos(open_side, reference, videos, paired, num_clips, "CLIP" if clip else "")
    elif reconstruct:
        found = _reconstructions(open_side, reference, run, num_clips)
    else:
        given = dict(num_steps=num_steps, guidance_scale=guidance_scale, solver=solver)
        found = _model(open_side, reference, load_run(run, weights), num_clips, given, seed)
    if clip and not videos:
        found.reference.captions("CLIP")
    rows = {"reference": _row("reference", "reference", found.reference)} | found.rows
    skipped = _skipped(rows, measures, fvd)
    networks = {name: net.identity for name, net in (("features", measures.features), ("clip", measures.clip)) if net}
    networks |= dict(lpips=params_hash(metric.params)) if metric else {}
    del found.header["splits"]
    described = dict(suite="video", version=VERSION, **found.header, code=code_hash(), sampling=found.sampling,
                     seed=seed, data=found.data | dict(reference=found.reference.identity), networks=networks,
                     arguments=arguments)  # fmt: skip
    return Evaluation(rows, list(rows)[-1], measures, json.loads(json.dumps(described)), skipped)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What is scored: the reference, the rows beside it, and how it is described."""

    reference: Videos
    rows: dict[str, Row]
    header: dict
    sampling: dict = dataclasses.field(default_factory=dict)
    data: dict = dataclasses.field(default_factory=dict)


def _videos(open_side, reference, videos, paired, num_clips, needed) -> _Found:
    ours, theirs = open_side(videos, "--videos"), open_side(reference, "--reference")
    ours, theirs = pair(ours, theirs) if paired else (ours, theirs)
    ours, theirs = ours.spread(num_clips), theirs.spread(num_clips)
    ours.captions(needed)
    title = f"videos of {os.path.basename(os.path.abspath(videos))}"
    row = _row("videos", title, ours, originals=theirs.video if paired else None)
    described = header(videos, "videos", None, {}) | dict(checkpoint=ours.identity)
    return _Found(theirs, dict(videos=row), described, data=dict(videos=ours.identity))


def _reconstructions(open_side, reference, run, num_clips) -> _Found:
    config, params, identity = open_vae(run)
    grid = dict(spatial_multiple=config.spatial_stride, temporal_stride=config.temporal_stride)
    theirs = open_side(reference, "--reference", **grid).spread(num_clips)
    described = header(run, "vae", None, dataclasses.asdict(config)) | dict(checkpoint=identity)
    return _Found(theirs, dict(vae=_copies(theirs, Codec(config, params))), described)


def _model(open_side, reference, run, num_clips, given, seed) -> _Found:
    networks, generator = run.networks, run.generator()
    vae, patch = networks.vae_config, networks.dit_config.patch_size
    grid = dict(spatial_multiple=vae.spatial_stride * patch[1], temporal_stride=vae.temporal_stride)
    theirs = open_side(reference, "--reference", own=run.config.data, **grid).spread(num_clips)
    prompts = theirs.captions("a text-to-video run")
    sampling = run.sampling() | {name: value for name, value in given.items() if value is not None}
    rows = dict(vae=_copies(theirs, generator.codec), model=_samples(theirs, prompts, generator, sampling, seed))
    checkpoint = params_hash(dict(dit=networks.dit, text=networks.text, vae=networks.vae))
    described = header(run.workdir, "dit", run.step, run.config.to_dict()) | dict(checkpoint=checkpoint)
    return _Found(theirs, rows, described, sampling)


def _check(run, videos, reconstruct, paired, lpips):
    if bool(run) == bool(videos):
        raise UserError("name what is scored: --run W, a run, or --videos DIR, a folder of videos; one of them")
    if videos and reconstruct:
        raise UserError("--reconstruct is of a run, whose VAE copies the reference: leave it out with --videos")
    if run and paired:
        raise UserError("--paired is of --videos: a model's samples are no copies, and a VAE's always are")
    if lpips and videos and not paired:
        raise UserError("--lpips compares copies with their originals: add --paired, or leave it out")
    if run and not reconstruct and kind_of(run) != "dit":
        raise UserError(f"{run!r} holds a VAE, which makes no videos from captions: add --reconstruct to score its "
                        "copies of the reference, or name a text-to-video run")  # fmt: skip


def _skipped(rows, measures, fvd):
    """Part -> why it is left out. Raises UserError where there are too few videos for what is asked."""
    skipped = {}
    if measures.features is None:
        skipped["video/fvd"] = f"FVD and kernel distance need a feature network: {videomae.REMEDY} with --features"
    else:
        smallest = min(len(row.shapes) for row in rows.values())
        if smallest < KERNEL_LEAST:
            raise UserError(f"distances of distributions need at least {KERNEL_LEAST} videos on either side, and there "
                            f"are {smallest}: add videos, or leave out --features")  # fmt: skip
        if fvd:
            counts = [len(row.shapes) for row in rows.values()]
            try:
                check_frechet(min(counts), counts[0], measures.features.dim)
            except UserError as error:
                raise UserError(f"{error}; --no-fvd leaves it out") from error
    if measures.clip is None:
        skipped["video/clip"] = f"the CLIP score needs a CLIP: {CLIP_REMEDY} with --clip-model"
    if not any(row.originals is not None for row in rows.values()):
        skipped["video/paired"] = "these videos are no copies of the reference (--paired says that they are)"
    return skipped


def _row(name: str, title: str, videos: Videos, **more) -> Row:
    specs = videos.specs
    shapes = [(spec.num_frames, spec.height, spec.width) for spec in specs]
    settings = dict(shapes=shapes, fps=[spec.fps for spec in specs], names=videos.names, captions=videos.captions(),
                    make=lambda members: [videos.video(i) for i in members])  # fmt: skip
    return Row(name, title, **settings | more)


def _copies(videos: Videos, codec: Codec) -> Row:
    def make(members):
        return codec.decode(codec.encode([videos.video(i) for i in members]))

    return _row("vae", "VAE's copies", videos, make=make, originals=videos.video)


def _samples(videos: Videos, prompts, generator, sampling, seed) -> Row:
    config, patch = generator.codec.config, generator.dit_config.patch_size
    shapes = [legal_shape(config, patch, spec.num_frames, spec.height, spec.width) for spec in videos.specs]

    def make(members):
        return generator.videos([Request(prompts[i], *shapes[i], seed=seed + i) for i in members], **sampling)

    seeds = [seed + i for i in range(len(shapes))]
    return _row("model", "model", videos, shapes=shapes, make=make, seeds=seeds, keep_all=True)


def _scores(out, found: Evaluation, identity: str) -> dict:
    tables = {name: read_table(out, row, identity) for name, row in found.rows.items()}
    described, measures, parts = found.described, found.measures, {}
    data = described["data"]["reference"]
    parts["video/no-network"] = video_parts.plain_part(tables, data, found.scored)
    if "video/paired" not in found.skipped:
        parts["video/paired"] = video_parts.paired_part(tables, data)
    if measures.features is not None:
        network = f"a VideoMAE of width {measures.features.dim} ({measures.features.identity})"
        fvd = described["arguments"]["fvd"]
        parts["video/fvd"] = video_parts.distance_part(tables, data, measures.features.dim, network, fvd)
    if measures.clip is not None:
        network = f"a CLIP of {measures.clip.config.projection} dimensions ({measures.clip.identity})"
        parts["video/clip"] = video_parts.clip_part(tables, data, network, found.scored)
    kept = {key: value for key, value in described.items() if key != "arguments"}
    return kept | dict(clips=len(tables[found.scored]), titles=video_parts.titles(tables), parts=parts, curves=[],
                       not_scored=found.skipped)  # fmt: skip
