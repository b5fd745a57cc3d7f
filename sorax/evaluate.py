"""Scores of a text-to-video run against exact ground truth: what generated clips show, and how well its VAE copies.

Captions of the embedded world are given to the model and the pixels of what it makes are judged (`sorax.judging`),
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
import os
import time

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from sorax import config as config_lib
from sorax import functional, media
from sorax.dit import DiT
from sorax.errors import UserError
from sorax.evaluate_captioner import evaluate_captioner
from sorax.evaluate_captioner import summary_lines as captioner_lines
from sorax.evaluate_vae import data_section, evaluate_vae, fidelity
from sorax.evaluate_vae import summary_lines as vae_lines
from sorax.generate import Request
from sorax.held_out import SPLITS, load_splits
from sorax.judging import judge
from sorax.metrics import summarise
from sorax.objectives import EvalConfig
from sorax.runlog import Progress
from sorax.runs import Run, kind_of, load_run
from sorax.score_report import header, make_folder, number, write_scores, writing
from sorax.text import TextEncoder

ROWS = {"ground_truth": "ground truth", "vae": "VAE", "model": "model", "untrained": "untrained model"}
COLUMNS = {"joint": "joint", "color": "colour", "shape": "shape", "count": "count", "direction": "direction",
           "motion": "motion"}  # fmt: skip
PICTURES = {"test": "samples.png", "heldout": "heldout.png", "ood": "ood.png"}
SHOWN = 12  # clips on a contact sheet


def evaluate_folder(
    path: str, out: str, *, weights: str = "ema", num_clips: int | None = None, data: str = "", overrides=(),
    lpips: str = "", **settings,
) -> dict:  # fmt: skip
    """Scores what a folder holds: a text-to-video run (`evaluate_run`), a VAE, run or not (`evaluate_vae`), or a
    captioner (`evaluate_captioner`).

    Args:
        weights: "ema" or "raw", of the text-to-video model.
        data, overrides, lpips: of the VAE, see `evaluate_vae`; the first two also of imported weights, which have no
            data of their own.
        settings: what else `evaluate_run` takes.

    Raises:
        UserError: no such run, no checkpoint, no data, or `out` cannot be written.
    """
    if kind_of(path) == "captioner":
        if data or overrides or lpips:
            raise UserError(f"{path!r} is a captioner, which is scored on its own data: leave out --data and --lpips")
        return evaluate_captioner(path, out, weights=weights, num_clips=num_clips)
    if kind_of(path) != "dit":
        return evaluate_vae(path, out, num_clips=num_clips, data=data, overrides=overrides, lpips=lpips)
    run = load_run(path, weights)
    if lpips:
        raise UserError(f"{path!r} is a text-to-video run, which is scored without LPIPS: --lpips is for a VAE, "
                        "name its folder with --run")  # fmt: skip
    run = with_data(run, data, overrides)
    return evaluate_run(run, out, num_clips=num_clips, **settings)


def with_data(run: Run, data: str = "", overrides=()) -> Run:
    """A run of imported weights, which has no data of its own, with data to score it on; any other as it is.

    Raises:
        UserError: a run with data of its own was given other data, or one without was given none.
    """
    if run.config.data.get("path") or run.config.data.get("mixture"):
        if data or overrides:
            raise UserError(f"{run.workdir!r} is scored on its own data: --data is for a VAE (name its folder with "
                            "--run) and for imported weights")  # fmt: skip
        return run
    if not data:
        raise UserError(f"{run.workdir!r} has imported weights and no data to score them on: add --data FOLDER of "
                        "videos (its VAE is scored), or --data world (prompts too)")  # fmt: skip
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.data = data_section(config.data, data, overrides, run.workdir)
    return dataclasses.replace(run, config=config)


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
    given = dict(num_steps=num_steps, guidance_scale=guidance_scale)
    sampling = run.sampling() | {name: value for name, value in given.items() if value is not None}
    n = settings.num_clips if num_clips is None else num_clips
    networks, generator = run.networks, run.generator()
    codec = generator.codec
    multiple = codec.config.spatial_stride * networks.dit_config.patch_size[1]
    splits = load_splits(run.config.data, codec.config, n, multiple)
    make_folder(out)

    scores = header(run.workdir, run.config.kind, run.step, run.config.to_dict())
    scores["sampling"] = sampling | {"seed": seed}
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


def untrained_params(networks, seed: int) -> dict:
    """Fresh parameters of a run's DiT and text encoder."""

    def init(key):
        dit_key, text_key = jax.random.split(key)
        return dict(dit=functional.init(DiT, networks.dit_config, dit_key),
                    text=functional.init(TextEncoder, networks.text_config, text_key))  # fmt: skip

    # On the device of a run's own parameters, for which the sampler is compiled already.
    place = SingleDeviceSharding(jax.local_devices()[0])
    return jax.jit(init, out_shardings=place)(jax.random.key(seed, impl="rbg"))  # threefry compiles slowly on a CPU


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
    return [{name: None if j[name] is None else bool(j[name]) for name in COLUMNS} for j in judgements]


def _device():
    device = jax.local_devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


# --- The report


def summary_lines(scores: dict) -> list[str]:
    """The scores in a few lines of plain text, for a terminal."""
    if scores["kind"] in ("vae", "captioner"):
        return dict(vae=vae_lines, captioner=captioner_lines)[scores["kind"]](scores)
    lines = []
    for name, entry in scores["splits"].items():
        if "prompts" in entry:
            joint = {row: table["joint"] for row, table in entry["prompts"].items()}
            others = ", ".join(f"{ROWS[row]} {_percent(joint[row])}" for row in ROWS if row != "model")
            lines.append(f"{SPLITS[name]}: {_cell(joint['model'])} of {joint['model']['n']} clips right ({others})")
        vae = entry["vae"]
        lines.append(f"{SPLITS[name]}: VAE PSNR {number(vae['psnr'], '.2f')} dB, SSIM {number(vae['ssim'], '.4f')} "
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
    if "speed" not in scores:
        lines += ["Prompt scores need the world: of the videos in a folder nobody knows what each should show.", ""]
    lines += ["## VAE", "", "| clips | PSNR (dB) | SSIM | n |", "|---|---|---|---|"]
    for name, entry in scores["splits"].items():
        vae = entry["vae"]
        lines.append(f"| {SPLITS[name]} | {number(vae['psnr'], '.2f')} | {number(vae['ssim'], '.4f')} | {vae['n']} |")
    lines.append("")
    exact = sum(entry["vae"]["exact"] for entry in scores["splits"].values())
    if exact:
        lines += [f"{exact} clips were copied exactly; the mean PSNR is that of the others.", ""]
    if "speed" in scores:
        how = scores["sampling"]
        lines += [f"Sampling: {how['num_steps']} steps, guidance {how['guidance_scale']:g}, shift {how['shift']:g}, "
                  f"{how['solver']}, seeds from {how['seed']}. {_speed_line(scores['speed'])}.", ""]  # fmt: skip
    data = ", ".join(f"{entry['data']} ({name})" for name, entry in scores["splits"].items())
    lines.append(f"sorax {scores['code_version']}, config {scores['config']}, data {data}.")
    return "\n".join(lines) + "\n"


def _percent(cell):
    return "none asked" if cell["n"] == 0 else f"{100 * cell['rate']:.1f} %"


def _cell(cell):
    if cell["n"] == 0:
        return _percent(cell)
    return f"{_percent(cell)} [{100 * cell['lo']:.1f}, {100 * cell['hi']:.1f}]"


def _speed_line(speed):
    return f"{speed['seconds_per_clip']:.3g} s a clip, {speed['clips_together']} together, on {speed['device']}"


def _mark(clip):
    wrong = [title for column, title in COLUMNS.items() if column != "joint" and clip[column] is False]
    return f"{clip['caption']}: {'WRONG ' + ', '.join(wrong) if wrong else 'OK'}"


def _write_report(out, scores, splits, copies, made):
    """Writes all files, each whole or not at all; scores.json last, so that where it is the report is complete."""
    pairs = []
    for name, clips in splits.items():
        some = list(zip(clips.videos, copies[name], clips.captions))[: SHOWN // len(splits)]
        pairs += [(np.concatenate([a, b], axis=2), f"{SPLITS[name]}: {caption}") for a, b, caption in some]
    with writing(out):
        for name, videos in made.items():
            clips = scores["splits"][name]["clips"]
            _write_npz(os.path.join(out, f"{name}.npz"), videos=np.stack(videos),
                       captions=np.array([clip["caption"] for clip in clips]),
                       seeds=np.array([clip["seed"] for clip in clips]))  # fmt: skip
            marks = [_mark(clip) for clip in clips[:SHOWN]]
            media.write_sheet(os.path.join(out, PICTURES[name]), videos[:SHOWN], marks)
        media.write_sheet(os.path.join(out, "reconstructions.png"), *zip(*pairs), columns=3, cell=192)
        write_scores(out, scores, markdown(scores))


def _write_npz(path, **arrays):
    with open(path + ".partial", "wb") as f:
        np.savez_compressed(f, **arrays)
    os.replace(path + ".partial", path)
