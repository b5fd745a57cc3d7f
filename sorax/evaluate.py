"""Scores of a run against exact ground truth: what generated clips show, and how well the VAE copies.

Captions of the embedded world are given to the model and the pixels of what it makes are parsed (`sorax.metrics`),
without a network. Beside the model stand its ceilings, the true videos and the VAE's copies of them, and its floor, the
same architecture untrained. A report folder holds

    scores.json          everything, for programs
    scores.md            the table
    samples.png          generated clips, in distribution, marked right or wrong
    heldout.png          the same of combinations that training never shows
    reconstructions.png  original clips beside the VAE's copies
    test.npz heldout.npz the generated videos (uint8 [n, T, H, W, 3]), their captions and seeds
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import time

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from data_pipelines.latent_shards import source_of
from data_pipelines.sources import open_source
from data_pipelines.world import World
from data_pipelines.world_sampling import lead_motions
from sorax import config as config_lib
from sorax import functional, media
from sorax.dit import DiT
from sorax.encode import Codec, source_identity
from sorax.errors import UserError
from sorax.export import code_version
from sorax.generate import Request
from sorax.metrics import judge, psnr, ssim, summarise
from sorax.objectives import EvalConfig, FlowConfig
from sorax.runlog import Progress
from sorax.runs import Run, load_run, load_vae
from sorax.text import TextEncoder

SPLITS = {"test": "in distribution", "heldout": "held-out combinations", "folder": "clips of the folder"}
ROWS = {"ground_truth": "ground truth", "vae": "VAE", "model": "model", "untrained": "untrained model"}
COLUMNS = {"joint": "joint", "color": "colour", "shape": "shape", "count": "count", "direction": "direction"}
PICTURES = {"test": "samples.png", "heldout": "heldout.png"}
SHOWN = 12  # clips on a contact sheet
SSIM_SIDE = 11  # pixels, the least that SSIM is defined for


@dataclasses.dataclass(frozen=True)
class Clips:
    """The original clips of a split; `truths` is None for real videos, of which nothing is known."""

    videos: list
    captions: list
    truths: list | None
    fps: float
    identity: str


def evaluate_folder(workdir: str, out: str, *, weights: str = "ema", num_clips: int | None = None, **settings) -> dict:
    """Scores the run in a folder, of a text-to-video model (`evaluate_run`) or of a VAE (`evaluate_vae`).

    Args:
        weights: "ema" or "raw", of the text-to-video model.
        settings: what else `evaluate_run` takes.

    Raises:
        UserError: no such run, no checkpoint, no data, or `out` cannot be written.
    """
    if config_lib.read_config(workdir).kind == "vae":
        return evaluate_vae(workdir, out, num_clips=num_clips)
    return evaluate_run(load_run(workdir, weights), out, num_clips=num_clips, **settings)


def evaluate_run(
    run: Run, out: str, *, num_clips: int | None = None, num_steps: int | None = None,
    guidance_scale: float | None = None, seed: int = 0,
) -> dict:  # fmt: skip
    """Scores a text-to-video run and writes the report folder `out`, over an older report if there is one.

    Args:
        num_clips: of each split. num_steps, guidance_scale: of sampling. None: as the config's `eval` section says.
        seed: clip i is made from noise `seed + i`; the untrained model is initialised from it too.

    Returns:
        What scores.json holds. Two evaluations of one run differ in `speed` alone. A run on a folder of videos has
        scores of its VAE only: nobody knows what a real video should show.

    Raises:
        UserError: the folder of videos is missing or empty, or `out` cannot be written.
    """
    settings = config_lib.build(EvalConfig, run.config.eval, "eval")
    shift = config_lib.build(FlowConfig, run.config.flow, "flow").sample_shift
    sampling = dict(
        num_steps=settings.num_steps if num_steps is None else num_steps,
        guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
        shift=shift,
    )
    n = settings.num_clips if num_clips is None else num_clips
    networks, generator = run.networks, run.generator()
    codec = generator.codec
    multiple = codec.config.spatial_stride * networks.dit_config.patch_size[1]
    splits = load_splits(run.config.data, codec.config, n, multiple)
    _make_folder(out)

    scores = _header(run.config, run.workdir, run.step) | {"sampling": sampling | {"seed": seed}}
    prompts = all(clips.truths is not None for clips in splits.values())
    total, copies, made = sum(len(clips.videos) for clips in splits.values()), {}, {}
    with Progress("evaluate", total * (len(ROWS) if prompts else 1), unit="clips") as progress:
        for name, clips in splits.items():
            scores["splits"][name], copies[name] = _score_vae(clips, codec, progress)
        if prompts:
            # All splits in one call: they share rows and a compiled program.
            requests = {name: _requests(clips, seed) for name, clips in splits.items()}
            made, first = _generate(generator, requests, sampling, progress, "model")
            generator.params = untrained_params(networks, seed)
            floor, second = _generate(generator, requests, sampling, progress, "untrained")
            # Both passes do the same work; the first may have had to compile it.
            scores["speed"] = dict(seconds_per_clip=min(first, second) / total, clips_together=total, device=_device())
            for name, clips in splits.items():
                rows = dict(ground_truth=clips.videos, vae=copies[name], model=made[name], untrained=floor[name])
                judged = {row: _judge(videos, clips.truths) for row, videos in rows.items()}
                scores["splits"][name] |= dict(
                    prompts={row: summarise(judgements) for row, judgements in judged.items()},
                    clips=[dict(caption=r.prompt, seed=r.seed, **j) for r, j in zip(requests[name], judged["model"])],
                )
                progress.advance(progress.done + len(clips.videos), "parsed")
    _write_report(out, scores, splits, copies, made)
    return scores


def evaluate_vae(workdir: str, out: str, *, num_clips: int | None = None) -> dict:
    """Scores a VAE run, PSNR and SSIM, and writes the report folder `out`; see `evaluate_run`."""
    config = config_lib.read_config(workdir)
    vae_config, params, _ = load_vae(workdir)
    n = config_lib.build(EvalConfig, config.eval, "eval").num_clips if num_clips is None else num_clips
    splits = load_splits(config.data, vae_config, n, vae_config.spatial_stride)
    _make_folder(out)
    codec, copies, scores = Codec(vae_config, params), {}, _header(config, workdir, config.train.steps)
    with Progress("evaluate", sum(len(clips.videos) for clips in splits.values()), unit="clips") as progress:
        for name, clips in splits.items():
            scores["splits"][name], copies[name] = _score_vae(clips, codec, progress)
    _write_report(out, scores, splits, copies, {})
    return scores


def load_splits(data, vae_config, num_clips: int, spatial_multiple: int) -> dict[str, Clips]:
    """What is scored: split -> clips, of a config's `data` section.

    Of the world: the splits test and heldout, in the run's commonest shape of more than one frame, with a single object
    a clip if its motions allow that. Of a folder: at most `num_clips` of its videos, spread evenly. Of latent shards:
    the videos that they were encoded from.
    """
    if num_clips < 1:
        raise UserError(f"{num_clips} clips cannot be scored: ask for at least 1")
    source = open_source(source_of(data), spatial_multiple=spatial_multiple, temporal_stride=vae_config.temporal_stride)
    if not isinstance(source, World):
        indices = np.unique(np.linspace(0, len(source) - 1, min(num_clips, len(source))).astype(int))
        return {"folder": _read(source, indices, truths=False)}
    config, splits = source.config, {}
    moving = [shape for shape in config.shapes if shape[0] > 1] or config.shapes
    shape = collections.Counter(moving).most_common(1)[0][0]
    num_objects = (1, 1) if lead_motions(config.motions, 1) else config.num_objects
    for name in ("test", "heldout"):
        world = World(dataclasses.replace(config, split=name, num_samples=num_clips, shapes=(shape,),
                                          num_objects=num_objects))  # fmt: skip
        splits[name] = _read(world, range(num_clips), truths=True)
    return splits


def _read(source, indices, *, truths):
    samples = [source[int(i)] for i in indices]
    return Clips(
        videos=[s["video"] for s in samples], captions=[s["caption"] for s in samples],
        truths=[source.truth(i) for i in indices] if truths else None,
        fps=samples[0]["fps"], identity=source_identity(source),
    )  # fmt: skip


def untrained_params(networks, seed: int) -> dict:
    """Fresh parameters of a run's DiT and text encoder."""

    def init(key):
        dit_key, text_key = jax.random.split(key)
        return dict(dit=functional.init(DiT, networks.dit_config, dit_key),
                    text=functional.init(TextEncoder, networks.text_config, text_key))  # fmt: skip

    # On the device of a run's own parameters, for which the sampler is compiled already.
    place = SingleDeviceSharding(jax.local_devices()[0])
    return jax.jit(init, out_shardings=place)(jax.random.key(seed, impl="rbg"))  # threefry compiles slowly on a CPU


def fidelity(originals, copies) -> dict:
    """Means over clips of PSNR (dB) and SSIM of copies, with their number.

    A clip that is copied exactly has no finite PSNR: it is counted in `exact` and left out of the mean. A score that
    no clip has is None; frames under 11 pixels have no SSIM.
    """
    levels = [psnr(a, b) for a, b in zip(originals, copies)]
    finite = [x for x in levels if math.isfinite(x)]
    likeness = [ssim(a, b) for a, b in zip(originals, copies) if min(a.shape[1:3]) >= SSIM_SIDE]
    return dict(psnr=float(np.mean(finite)) if finite else None, ssim=float(np.mean(likeness)) if likeness else None,
                n=len(levels), exact=len(levels) - len(finite))  # fmt: skip


def _score_vae(clips, codec, progress):
    copies = codec.decode(codec.encode(clips.videos))
    shapes = collections.Counter(video.shape[:3] for video in clips.videos)
    entry = dict(shape=list(shapes.most_common(1)[0][0]), fps=clips.fps, data=clips.identity,
                 vae=fidelity(clips.videos, copies))  # fmt: skip
    progress.advance(progress.done + len(copies), "VAE")
    return entry, copies


def _requests(clips, seed):
    return [Request(caption, *video.shape[:3], seed=seed + i)
            for i, (caption, video) in enumerate(zip(clips.captions, clips.videos))]  # fmt: skip


def _generate(generator, requests, sampling, progress, note):
    """Videos of each split's requests, and the seconds that it took."""
    began, before = time.perf_counter(), progress.done
    flat = [request for some in requests.values() for request in some]
    videos = iter(generator.videos(flat, on_batch=lambda done: progress.advance(before + done, note), **sampling))
    return {name: [next(videos) for _ in some] for name, some in requests.items()}, time.perf_counter() - began


def _judge(videos, truths):
    judgements = [judge(video, truth) for video, truth in zip(videos, truths)]
    return [{name: None if right is None else bool(right) for name, right in j.items()} for j in judgements]


def _header(config, workdir, step):
    text = json.dumps(config.to_dict(), sort_keys=True)
    identity, name = hashlib.sha256(text.encode()).hexdigest()[:16], os.path.basename(os.path.abspath(workdir))
    return dict(run=name, kind=config.kind, step=step, config=identity, code_version=code_version(), splits={})


def _device():
    device = jax.local_devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


# --- The report


def summary_lines(scores: dict) -> list[str]:
    """The scores in a few lines of plain text, for a terminal."""
    lines = []
    for name, entry in scores["splits"].items():
        if "prompts" in entry:
            joint = {row: table["joint"] for row, table in entry["prompts"].items()}
            others = ", ".join(f"{ROWS[row]} {_percent(joint[row])}" for row in ROWS if row != "model")
            lines.append(f"{SPLITS[name]}: {_cell(joint['model'])} of {joint['model']['n']} clips right ({others})")
        vae = entry["vae"]
        lines.append(f"{SPLITS[name]}: VAE PSNR {_number(vae['psnr'], '.2f')} dB, SSIM {_number(vae['ssim'], '.4f')} "
                     f"over {vae['n']} clips")  # fmt: skip
    if "speed" in scores:
        lines.append(_speed_line(scores["speed"]))
    return lines


def markdown(scores: dict) -> str:
    """scores.md."""
    lines = [f"# Scores of {scores['run']} at step {scores['step']}", ""]
    for name, entry in scores["splits"].items():
        if "prompts" not in entry:
            continue
        frames, height, width = entry["shape"]
        n = max(cell["n"] for cell in entry["prompts"]["model"].values())
        lines += [f"## Prompts, {SPLITS[name]}", "",
                  f"{n} clips of {frames} frames, {width}x{height}, each from its caption. Share of clips that show "
                  "what the caption says, with the 95 % interval. Of several things in a clip the one most like the "
                  "caption is looked at, so that colour or direction alone can be right by chance.", "",
                  f"| | {' | '.join(COLUMNS.values())} | n |", "|---|" + "---|" * (len(COLUMNS) + 1)]  # fmt: skip
        for row, title in ROWS.items():
            table = entry["prompts"][row]
            cells = [_cell(table[column]) + ("" if table[column]["n"] in (0, n) else f" of {table[column]['n']}")
                     for column in COLUMNS]  # fmt: skip
            lines.append(f"| {title} | {' | '.join(cells)} | {n} |")
        lines.append("")
    if scores["kind"] == "dit" and "speed" not in scores:
        lines += ["Prompt scores need the world: of the videos in a folder nobody knows what each should show.", ""]
    lines += ["## VAE", "", "| clips | PSNR (dB) | SSIM | n |", "|---|---|---|---|"]
    for name, entry in scores["splits"].items():
        vae = entry["vae"]
        lines.append(f"| {SPLITS[name]} | {_number(vae['psnr'], '.2f')} | {_number(vae['ssim'], '.4f')} | {vae['n']} |")
    lines.append("")
    exact = sum(entry["vae"]["exact"] for entry in scores["splits"].values())
    if exact:
        lines += [f"{exact} clips were copied exactly; the mean PSNR is that of the others.", ""]
    if "speed" in scores:
        how = scores["sampling"]
        lines += [f"Sampling: {how['num_steps']} steps, guidance {how['guidance_scale']:g}, shift {how['shift']:g}, "
                  f"seeds from {how['seed']}. {_speed_line(scores['speed'])}.", ""]  # fmt: skip
    data = ", ".join(f"{entry['data']} ({name})" for name, entry in scores["splits"].items())
    lines.append(f"sorax {scores['code_version']}, config {scores['config']}, data {data}.")
    return "\n".join(lines) + "\n"


def _percent(cell):
    return "none asked" if cell["n"] == 0 else f"{100 * cell['rate']:.1f} %"


def _cell(cell):
    if cell["n"] == 0:
        return _percent(cell)
    return f"{_percent(cell)} [{100 * cell['lo']:.1f}, {100 * cell['hi']:.1f}]"


def _number(value, form):
    return "none" if value is None else format(value, form)


def _speed_line(speed):
    return f"{speed['seconds_per_clip']:.3g} s a clip, {speed['clips_together']} together, on {speed['device']}"


def _mark(clip):
    wrong = [title for column, title in COLUMNS.items() if column != "joint" and clip[column] is False]
    return f"{clip['caption']}: {'WRONG ' + ', '.join(wrong) if wrong else 'OK'}"


def _make_folder(out):
    """Before the work, so that a bad name costs no time."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"report folder {out!r} cannot be made ({error.strerror}): name another with --out") from error


def _write_report(out, scores, splits, copies, made):
    """Writes all files, each whole or not at all; scores.json last, so that where it is the report is complete."""
    pairs = []
    for name, clips in splits.items():
        some = list(zip(clips.videos, copies[name], clips.captions))[: SHOWN // len(splits)]
        pairs += [(np.concatenate([a, b], axis=2), f"{SPLITS[name]}: {caption}") for a, b, caption in some]
    try:
        for name, videos in made.items():
            clips = scores["splits"][name]["clips"]
            _write_npz(os.path.join(out, f"{name}.npz"), videos=np.stack(videos),
                       captions=np.array([clip["caption"] for clip in clips]),
                       seeds=np.array([clip["seed"] for clip in clips]))  # fmt: skip
            marks = [_mark(clip) for clip in clips[:SHOWN]]
            media.write_sheet(os.path.join(out, PICTURES[name]), videos[:SHOWN], marks)
        media.write_sheet(os.path.join(out, "reconstructions.png"), *zip(*pairs), columns=3, cell=192)
        config_lib.write_atomic(os.path.join(out, "scores.md"), markdown(scores))
        text = json.dumps(_without_nan(scores), indent=1, allow_nan=False)
        config_lib.write_atomic(os.path.join(out, "scores.json"), text + "\n")
    except OSError as error:
        raise UserError(f"the report in {out!r} cannot be written ({error.strerror or error}): free space, or name "
                        "another folder with --out") from error  # fmt: skip


def _write_npz(path, **arrays):
    with open(path + ".partial", "wb") as f:
        np.savez_compressed(f, **arrays)
    os.replace(path + ".partial", path)


def _without_nan(value):
    """JSON has no NaN: the rate of an attribute that no caption mentions is null."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
