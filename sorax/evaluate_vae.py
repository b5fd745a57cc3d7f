"""Scores of a video VAE, of a run or of a diffusers folder: how well it copies clips, and what its latents are like.

Scored are fidelity (PSNR, SSIM, flicker and, with its weights at hand, LPIPS), of each split and of each shape in it,
and the statistics of the latents. A report folder holds

    scores.json            everything, for programs
    scores.md              the tables
    reconstructions.png    some clips beside their copies
    reconstructions/*.mp4  the same in motion, input left, copy right (.png for single frames)

One batch of clips is in memory at a time; a clip that is larger than a batch goes through in chunks.

Legend: T frames, H height, W width, C channels; lower case t, h, w for latents.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sorax import config as config_lib
from sorax import media
from sorax.encode import PIXELS_A_BATCH, Codec
from sorax.errors import UserError
from sorax.held_out import SPLITS, open_splits
from sorax.lpips import LEAST_SIDE, LPIPS
from sorax.metrics import flicker, psnr, ssim
from sorax.objectives import DataConfig, EvalConfig
from sorax.runlog import Progress, reporter
from sorax.runs import kind_of, open_vae
from sorax.score_report import header, make_folder, number, write_scores, writing
from sorax.stream import normalize

SHOWN = 12  # clips on the contact sheet, and files of them
FRAMES_SHOWN = 3  # of each, on the contact sheet
SSIM_SIDE = 11  # pixels, the least that SSIM is defined for
LPIPS_PIXELS = 1 << 18  # of a batch of frames: VGG's first features of two of these take 1 KiB a pixel
BATCH = 64  # clips at most
# A channel of which a latent position tells less than this many nats is not used: its posterior is the prior.
UNUSED_NATS = 0.01
# How videos are read for a VAE without a run: at their own size, up to 81 frames of 832 x 480 at strides of 4 x 8 x 8.
NATIVE = dict(max_tokens=1 << 17, world=dict(shapes=((1, 64, 64), (5, 64, 96), (17, 96, 64))))
SCORES = {"psnr": ("PSNR (dB)", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f"),
          "flicker": ("flicker", ".3f")}  # fmt: skip


def evaluate_vae(
    path: str, out: str, *, data: str = "", overrides=(), num_clips: int | None = None, lpips: str = ""
) -> dict:
    """Scores a VAE and writes the report folder `out`, over an older report if there is one.

    Args:
        path: finished VAE run, or diffusers folder; see `open_vae`.
        data: videos to score in place of the run's own: a folder, "world", or what else `data.path` may be. Needed for
            a diffusers folder, which names none.
        overrides: `KEY=VALUE` of the `data` section, such as "max_tokens=4096".
        num_clips: of each split; None: as the run's `eval` section says.
        lpips: safetensors file of `sorax.lpips`; "" for no LPIPS.

    Returns:
        What scores.json holds: `splits` -> the scores of all its clips (`vae`), of each shape (`shapes`), the latents
        (`LatentStatistics.summary`), and whether the run was trained on these clips (`trained_on`). Two evaluations of
        one VAE are equal.

    Raises:
        UserError: no VAE, data or LPIPS weights there, or `out` cannot be written.
    """
    distance = frame_distance(LPIPS.load(lpips)) if lpips else None
    config = None if kind_of(path) == "diffusers" else config_lib.read_config(path)
    section = data_section(None if config is None else config.data, data, overrides, path)
    settings = EvalConfig() if config is None else config_lib.build(EvalConfig, config.eval, "eval")
    vae_config, params, identity = open_vae(path)
    own = config is not None and not data
    cache = os.path.join(path, "index") if own and not overrides else None
    splits = open_splits(
        section, vae_config, settings.num_clips if num_clips is None else num_clips, vae_config.spatial_stride,
        alike=False, index_cache=cache, index_progress=reporter("index"),
    )  # fmt: skip
    make_folder(out)

    codec, sheet = Codec(vae_config, params), []
    step = None if config is None else config.train.steps
    described = dataclasses.asdict(vae_config) if config is None else config.to_dict()
    scores = header(path, "vae", step, described) | dict(vae=identity)
    with writing(out):
        _remove_videos(out)
    with Progress("evaluate", sum(len(split.indices) for split in splits.values()), unit="clips") as progress:
        for name, split in splits.items():
            most = SHOWN // len(splits)
            entry, pairs = _score_split(codec, split, name, out, distance, most, progress)
            scores["splits"][name] = entry | dict(trained_on=own and split.trained_on)
            sheet += pairs
    with writing(out):
        media.write_sheet(os.path.join(out, "reconstructions.png"), *zip(*sheet), columns=FRAMES_SHOWN, cell=192)
        write_scores(out, scores, markdown(scores))
    return scores


def data_section(own, path: str, overrides, vae: str) -> ConfigDict:
    """The `data` section that is scored: a run's own, another path read like it, or for a VAE without a run `NATIVE`.

    Args:
        own: section of the run, None without one. path: replaces its videos; "" keeps them. vae: names it in errors.
    """
    if own is None and not path:
        raise UserError(f"{vae!r} is a diffusers folder, which names no videos to score: add --data FOLDER, or world")
    section = ConfigDict(NATIVE if own is None else own.to_dict())
    config_lib.add_defaults(section, DataConfig)
    if path:
        section.update(path=path, index="", split="", val_path="", val_split="")
        section["mixture"] = ()
    return config_lib.apply_overrides(ConfigDict(dict(data=section)), [f"data.{text}" for text in overrides]).data


def clip_scores(original, copy, distance: Callable | None = None) -> dict:
    """Fidelity of a copy of a video uint8 [T, H, W, 3]; a score that the clip is too short or too small for is None.

    distance: of two videos, for `lpips` (`frame_distance`).
    """
    side = min(original.shape[1:3])
    found = dict(psnr=psnr(original, copy), ssim=ssim(original, copy) if side >= SSIM_SIDE else None,
                 flicker=flicker(original, copy))  # fmt: skip
    if distance is not None:
        found["lpips"] = distance(original, copy) if side >= LEAST_SIDE else None
    return found


def mean_scores(clips) -> dict:
    """Means of `clip_scores` over clips, with their number.

    A clip that is copied exactly has no finite PSNR: it is counted in `exact` and left out of that mean. A score that
    no clip has is None.
    """
    means = {}
    for name in clips[0]:
        values = [clip[name] for clip in clips if clip[name] is not None and math.isfinite(clip[name])]
        means[name] = float(np.mean(values)) if values else None
    return means | dict(n=len(clips), exact=sum(math.isinf(clip["psnr"]) for clip in clips))


def fidelity(originals, copies) -> dict:
    """Mean scores of copies of videos; see `mean_scores`."""
    return mean_scores([clip_scores(a, b) for a, b in zip(originals, copies)])


def frame_distance(metric: LPIPS) -> Callable:
    """Function of two uint8 videos [T, H, W, 3]: the mean LPIPS of their frames, which go through a few at a time."""

    @jax.jit
    def distances(params, a, b):
        a, b = (x.astype(jnp.float32) / 127.5 - 1.0 for x in (a, b))
        return metric(a, b, params)

    def distance(a, b):
        T, H, W, _ = a.shape
        size, total = min(T, max(1, LPIPS_PIXELS // (H * W))), 0.0
        for start in range(0, T, size):
            # The last batch goes back to frames that were counted, so that a shape compiles once.
            first = min(start, T - size)
            some = distances(metric.params, a[first : first + size], b[first : first + size])
            total += float(np.sum(np.asarray(some, np.float64)[start - first :]))
        return total / T

    return distance


class LatentStatistics:
    """Statistics of the latents of many clips, a channel at a time, from sums over all latent positions."""

    def __init__(self, channels: int):
        self.count, self._sums = 0, np.zeros((5, channels))

    def add(self, moments):
        """Takes a clip's posterior, mean and variance float32 `[t, h, w, 2C]`, not normalised."""
        mean, variance = np.split(moments.reshape(-1, moments.shape[-1]).astype(np.float64), 2, axis=-1)
        variance = np.maximum(variance, np.finfo(np.float32).tiny)
        kl = 0.5 * (mean**2 + variance - 1.0 - np.log(variance))
        self._sums += [x.sum(0) for x in (mean, mean**2, variance, np.sqrt(variance), kl)]
        self.count += len(mean)

    def summary(self, latents_mean, latents_std) -> dict:
        """Lists of C numbers, and totals.

        mean, std: of normalised latents drawn from the posteriors; near 0 and 1 if the statistics stored with the
            weights fit these clips. (Of draws: the posterior means of a channel that is not used hardly move.)
        posterior_std: mean standard deviation of the posterior, not normalised: below 1 where a channel says something.
        kl: nats that a latent position tells of a channel, against the standard normal prior.
        mean_posterior_std, kl_per_position (over all channels), unused_channels (kl below `unused_below`), positions.
        """
        mean, square, variance, deviation, kl = self._sums / self.count
        spread = np.sqrt(np.maximum(square - mean**2, 0.0) + variance)
        lists = dict(mean=(mean - latents_mean) / latents_std, std=spread / latents_std, posterior_std=deviation, kl=kl)
        return {name: values.tolist() for name, values in lists.items()} | dict(
            mean_posterior_std=float(deviation.mean()), kl_per_position=float(kl.sum()),
            unused_channels=int((kl < UNUSED_NATS).sum()), unused_below=UNUSED_NATS, positions=self.count,
        )  # fmt: skip


def _score_split(codec, split, name, out, distance, most, progress):
    """(entry of scores.json, (picture, caption) pairs for the contact sheet); writes up to `most` videos."""
    statistics, found, pairs = LatentStatistics(codec.config.latent_channels), {}, []
    batches = _batches(split)
    order = [i for _, _, batch in batches for i in batch]
    shown = {order[k] for k in np.linspace(0, len(order) - 1, min(most, len(order))).astype(int)}
    for shape, size, batch in batches:
        samples = [split.source[i] for i in batch]
        copies, posteriors = copy_videos(codec, [sample["video"] for sample in samples], size)
        for i, sample, copy, posterior in zip(batch, samples, copies, posteriors):
            statistics.add(posterior)
            found.setdefault(shape, []).append(clip_scores(sample["video"], copy, distance))
            if i in shown:
                pair = media.side_by_side(sample["video"], copy)
                suffix = "mp4" if len(pair) > 1 else "png"
                file = os.path.join(out, "reconstructions", f"{name}-{len(pairs):03d}.{suffix}")
                media.write_video(file, pair, sample["fps"])
                picks = np.rint(np.linspace(0, len(pair) - 1, min(FRAMES_SHOWN, len(pair)))).astype(int)
                pairs.append((pair[picks], f"{SPLITS[name]}: {sample['caption']}"))
        progress.advance(progress.done + len(batch))
    shapes = [dict(shape=list(shape), **mean_scores(clips)) for shape, clips in found.items()]
    every = mean_scores([clip for clips in found.values() for clip in clips])
    stats = (np.asarray(codec.params[key], np.float64) for key in ("latents_mean", "latents_std"))
    entry = dict(data=split.identity, vae=every, shapes=shapes,
                 latents=statistics.summary(*stats))  # fmt: skip
    return entry, pairs


def _batches(split):
    """[((T, H, W), size, indices of at most `size` clips of that shape)], shorter and smaller clips first."""
    groups = {}
    for i in split.indices:
        spec = split.source.spec(i)
        groups.setdefault((spec.num_frames, spec.height, spec.width), []).append(i)
    batches = []
    for shape, members in sorted(groups.items()):
        size = max(1, min(BATCH, len(members), PIXELS_A_BATCH // math.prod(shape)))
        batches += [(shape, size, members[start : start + size]) for start in range(0, len(members), size)]
    return batches


def copy_videos(codec, videos, size):
    """Copies uint8 and posteriors (mean, variance) float32 `[t, h, w, 2C]` of videos uint8 of one shape.

    They go through in one batch of `size`, which is at least their number.
    """
    posteriors = codec.posteriors(videos + videos[-1:] * (size - len(videos)))  # full, so that a shape compiles once
    return codec.decode([normalize(codec.config, codec.params, x) for x in posteriors]), posteriors


def _remove_videos(out):
    """Those of an older report, which might be of more clips."""
    folder = os.path.join(out, "reconstructions")
    for file in os.listdir(folder) if os.path.isdir(folder) else ():
        if re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{3}}\.(mp4|png)", file):
            os.remove(os.path.join(folder, file))


# --- The report


def summary_lines(scores: dict) -> list[str]:
    """The scores in a few lines of plain text, for a terminal."""
    lines = []
    for name, entry in scores["splits"].items():
        vae, latents = entry["vae"], entry["latents"]
        parts = [f"{SCORES[key][0].split()[0]} {number(vae[key], SCORES[key][1])}{' dB' if key == 'psnr' else ''}"
                 for key in SCORES if key in vae]  # fmt: skip
        lines.append(f"{SPLITS[name]}: {', '.join(parts)} over {vae['n']} clips of {len(entry['shapes'])} shapes")
        lines.append(f"{SPLITS[name]}: {_latents_line(latents)}")
    return lines


def _latents_line(latents):
    return (f"{latents['kl_per_position']:.2f} nats a latent position, mean posterior std "
            f"{latents['mean_posterior_std']:.3f}, {latents['unused_channels']} of {len(latents['kl'])} channels "
            "unused")  # fmt: skip


def markdown(scores: dict) -> str:
    """scores.md."""
    at = "" if scores["step"] is None else f" at step {scores['step']}"
    columns = [key for key in SCORES if key in next(iter(scores["splits"].values()))["vae"]]
    titles = " | ".join(SCORES[key][0] for key in columns)
    rule = "|---" * (len(columns) + 1) + "|"

    def cells(found):
        return " | ".join([*(number(found[key], SCORES[key][1]) for key in columns), str(found["n"])])

    lines = [f"# Scores of the VAE {scores['run']}{at}", "", f"| clips | {titles} | n |", f"|---{rule}"]
    lines += [f"| {SPLITS[name]} | {cells(entry['vae'])} |" for name, entry in scores["splits"].items()]
    lines += ["", "Means over clips, on 8-bit pixels. Flicker is the mean absolute error of the differences between "
              "frames that follow each other, in levels of 8 bits.", ""]  # fmt: skip
    exact = sum(entry["vae"]["exact"] for entry in scores["splits"].values())
    if exact:
        lines += [f"{exact} clips were copied exactly; the mean PSNR is that of the others.", ""]
    if any(entry["trained_on"] for entry in scores["splits"].values()):
        lines += ["These clips are from the training data: the run names no other.", ""]
    lines += ["## By length and size", "", f"| clips | frames | width x height | {titles} | n |", f"|---|---|---{rule}"]
    for name, entry in scores["splits"].items():
        for found in entry["shapes"]:
            frames, height, width = found["shape"]
            lines.append(f"| {SPLITS[name]} | {frames} | {width} x {height} | {cells(found)} |")
    lines += ["", "## Latents", ""]
    for name, entry in scores["splits"].items():
        latents = entry["latents"]
        lines += [f"{SPLITS[name].capitalize()}: {_latents_line(latents)} (KL below {latents['unused_below']} nats), "
                  f"over {latents['positions']} positions.", "", "| channel | mean | std | posterior std | KL (nats) |",
                  "|---|---|---|---|---|"]  # fmt: skip
        table = zip(*(latents[key] for key in ("mean", "std", "posterior_std", "kl")))
        lines += [f"| {c} | {mean:.3f} | {std:.3f} | {posterior:.3f} | {kl:.3f} |"
                  for c, (mean, std, posterior, kl) in enumerate(table)]  # fmt: skip
        lines.append("")
    lines += ["Mean and std are of normalised latents, and near 0 and 1 where the statistics stored with the weights "
              "fit these clips. Posterior std and KL (to the standard normal prior) are of latents before that.",
              ""]  # fmt: skip
    data = ", ".join(f"{entry['data']} ({name})" for name, entry in scores["splits"].items())
    lines.append(f"sorax {scores['code_version']}, config {scores['config']}, VAE {scores['vae']}, data {data}.")
    return "\n".join(lines) + "\n"
