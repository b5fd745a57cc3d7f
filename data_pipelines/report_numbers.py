"""Every number of a data report: what is kept, changed and rejected, how it is distributed, how it will pack.

Letters: n = samples of the index, u = usable ones, k = those that training keeps.
"""

import dataclasses
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc

from data_pipelines.fit import CHANGES
from data_pipelines.inspection import reason_kind
from data_pipelines.packing import plan_epoch
from data_pipelines.report_fit import Settings, distinct, fit_columns, text_lengths
from data_pipelines.text_tokens import BYTES, MAX_TOKENS
from sorax.errors import UserError

MOST_NAMED = 100  # files named for a reason, groups of duplicates
RANKS = (1, 8, 64, 256)
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
SHORT_CAPTION = 12  # characters


@dataclasses.dataclass(frozen=True)
class Analysis:
    """numbers: what report.json holds. arrays: columns of the kept samples, for plots and pictures.

    rejected: (row of the index, stage "index" or "fit" or "row", reason) of each sample that is left out.
    duplicates: lists of keys whose files are equal. row_sizes: int64 [R], samples of each row of the first epoch.
    """

    numbers: dict
    arrays: SimpleNamespace
    rejected: list
    duplicates: list
    row_sizes: np.ndarray


def analyse(index, settings: Settings, ranks: int = 1) -> Analysis:
    """Everything that can be known of a data set from its index.

    Args: index: a `data_pipelines.index.Index`. ranks: data-parallel ranks of the planned run.
    Raises: UserError where the batch cannot be shared by the ranks, or the vocabulary is too small.
    """
    fit, usable = settings.fit, index.usable
    image, video = (pc.equal(index.table["kind"], kind).to_numpy(zero_copy_only=False) for kind in ("image", "video"))
    numbers = [index.columns[name][usable] for name in ("height", "width", "fps", "span", "duration")]
    fits = fit_columns(image[usable], *numbers, fit)
    unusable = np.setdiff1d(np.arange(len(index)), usable)
    reasons = index.table["reason"].take(unusable).to_pylist()
    rejected = [(row, "index", reason) for row, reason in zip(unusable.tolist(), reasons)]
    rejected += [(int(usable[i]), "fit", fits.reasons[i]) for i in np.flatnonzero(fits.reasons != "")]

    kept = fits.reasons == ""
    rows, fits = usable[kept], fits.of(kept)
    captions = column(index, "caption", rows)
    texts, encoded, different = text_lengths(captions, settings)
    tokens = fits.tokens(fit)
    refused = _refused(tokens, texts, settings)
    rejected += [(int(rows[i]), "row", reason) for i, reason in refused.items()]
    fitting = np.ones(len(rows), bool)
    fitting[list(refused)] = False
    before = _arrays(index.columns, rows, video, fits, tokens, texts)
    arrays = SimpleNamespace(**{name: a[fitting] for name, a in vars(before).items()})
    if refused:
        captions = captions.filter(fitting)

    duplicates = _duplicates(index, arrays.rows)
    packing, row_sizes = None, np.zeros(0, np.int64)
    if settings.rows and len(arrays.rows):
        packing, row_sizes = pack_prediction(arrays, settings, ranks)
    numbers = dict(
        version=1,
        totals=_totals(index, video, arrays, len(rejected)),
        settings=_settings(settings, ranks),
        outcome=_outcome(len(index), arrays, before),
        rejected=_rejections(index, rejected),
        refused_by_training=len(refused),
        shapes=_shapes(arrays),
        distributions=_distributions(arrays),
        captions=_captions(captions, arrays, encoded, different),
        duplicates=dict(groups=len(duplicates), samples=sum(map(len, duplicates)), listed=duplicates[:MOST_NAMED]),
        packing=packing,
    )
    return Analysis(numbers, arrays, rejected, duplicates, row_sizes)


def column(index, name, rows):
    """Some rows of a column of text, as a pyarrow array: as Python's texts they would take several times the memory."""
    return index.table[name].take(np.asarray(rows, np.int64)).combine_chunks()


def _arrays(columns, rows, video, fits, tokens, texts):
    video = video[rows]
    return SimpleNamespace(
        rows=rows, video=video, num_frames=fits.num_frames, height=fits.height, width=fits.width, fps=fits.fps,
        native_tokens=fits.native_tokens, changes=fits.changes, tokens=tokens, text=texts,
        seconds=np.where(video, fits.num_frames / np.maximum(fits.fps, 1e-9), 0.0),
        own_seconds=np.where(video, columns["duration"][rows], 0.0), own_fps=columns["fps"][rows],
        own_height=columns["height"][rows], own_width=columns["width"][rows],
        characters=columns["caption_length"][rows],
    )  # fmt: skip


def _refused(tokens, texts, settings):
    """{position among the fitted: why training would stop there}; none for a VAE, which has neither rows nor text."""
    if not settings.rows:
        return {}
    reasons = {}
    for i in np.flatnonzero((tokens > settings.row_tokens) | (texts + 1 > settings.row_text) | (texts > MAX_TOKENS)):
        if tokens[i] > settings.row_tokens:
            reason = f"{tokens[i]} video tokens, over data.row_tokens {settings.row_tokens}"
        elif texts[i] > MAX_TOKENS:
            reason = f"caption of more than {MAX_TOKENS} tokens"
        else:
            reason = f"caption of {texts[i]} tokens and an empty slot, over data.row_text {settings.row_text}"
        reasons[int(i)] = reason
    return reasons


def _totals(index, video, arrays, num_rejected):
    columns, usable = index.columns, index.usable
    video = video[usable]
    return dict(
        samples=len(index), usable=len(usable), kept=len(arrays.rows), rejected=num_rejected,
        videos=int(video.sum()), images=int((~video).sum()),
        hours=float(columns["duration"][usable][video].sum(dtype=np.float64) / 3600),
        bytes=int(columns["bytes"].sum(dtype=np.int64)),
        kept_videos=int(arrays.video.sum()), kept_images=int((~arrays.video).sum()),
        kept_hours=float(arrays.seconds.sum() / 3600), kept_tokens=int(arrays.tokens.sum()),
        kept_frames=int(arrays.num_frames.sum()),
    )  # fmt: skip


def _settings(settings, ranks):
    values = dict(origin=settings.origin, **{f"data.{k}": v for k, v in dataclasses.asdict(settings.fit).items()})
    values |= {f"grid.{k}": values.pop(f"data.{k}") for k in ("spatial_multiple", "temporal_stride", "any_length")}
    values["data.batch"] = settings.batch
    if settings.rows:
        values |= {f"data.{k}": getattr(settings, k) for k in ("row_tokens", "row_text", "max_segments")}
        values |= {"data.tokenizer": settings.tokenizer or BYTES, "text.vocab_size": settings.vocab_size}
        values |= {"train.steps": settings.steps, "ranks": ranks}
        values["train.seed"] = settings.seed
    return values


def _outcome(count, arrays, before):
    """What happens to the samples: a row for each way, with samples, hours and tokens before and after."""
    n = max(count, 1)
    hours = max(float(before.own_seconds.sum()), 1e-9)
    native = max(int(before.native_tokens.sum()), 1)

    def line(what, mask):
        own, seconds = float(arrays.own_seconds[mask].sum()), float(arrays.seconds[mask].sum())
        first, last = int(arrays.native_tokens[mask].sum()), int(arrays.tokens[mask].sum())
        some = int(mask.sum())
        return dict(what=what, samples=some, share=some / n, hours_before=own / 3600, share_hours=own / hours,
                    hours_after=seconds / 3600, tokens_before=first, share_tokens=first / native,
                    tokens_after=last)  # fmt: skip

    everything = np.ones(len(arrays.rows), bool)
    lines = [line("kept", everything), line("unchanged", arrays.changes == 0)]
    lines += [line(change, arrays.changes >> bit & 1 == 1) for bit, change in enumerate(CHANGES)]
    return lines


def general(reason):
    """A reason without its details and numbers, so that like ones can be counted together."""
    return re.sub(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", "#", reason_kind(reason))


def _rejections(index, rejected):
    """One entry a stage and reason (numbers aside), the most frequent first; the first 100 are named."""
    counts = Counter((stage, general(reason)) for _, stage, reason in rejected)
    named = {same: [] for same in counts}
    for row, stage, reason in rejected:
        names = named[stage, general(reason)]
        if len(names) < MOST_NAMED:
            names.append(dict(key=index.table["key"][row].as_py(), reason=reason))
    total = max(len(index), 1)
    return [dict(stage=stage, reason=reason, samples=count, share=count / total, names=named[stage, reason])
            for (stage, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]  # fmt: skip


def _shapes(arrays, most=12):
    """The most frequent shapes as trained."""
    if not len(arrays.rows):
        return dict(different=0, listed=[])
    shape = np.stack([arrays.num_frames, arrays.height, arrays.width]).astype(np.int64)
    code = (shape[0] << 40) + (shape[1] << 20) + shape[2]
    values, counts = np.unique(code, return_counts=True)
    sums = np.zeros(len(values))
    np.add.at(sums, np.searchsorted(values, code), arrays.tokens)
    order = np.argsort(-counts, kind="stable")[:most]
    low = (1 << 20) - 1
    listed = [dict(num_frames=int(values[i] >> 40), height=int(values[i] >> 20 & low), width=int(values[i] & low),
                   samples=int(counts[i]), share=float(counts[i] / len(code)),
                   share_tokens=float(sums[i] / max(sums.sum(), 1))) for i in order]  # fmt: skip
    return dict(different=len(values), listed=listed)


def spread(values):
    """Mean and quantiles of an array, as a dict of numbers; empty for an empty array."""
    if not len(values):
        return {}
    points = np.percentile(values, QUANTILES).tolist()
    return dict(mean=float(np.mean(values)), **{f"p{q}": float(v) for q, v in zip(QUANTILES, points)})


def _distributions(arrays):
    video = arrays.video
    return dict(
        width=spread(arrays.width), height=spread(arrays.height), file_width=spread(arrays.own_width),
        file_height=spread(arrays.own_height), frames=spread(arrays.num_frames), seconds=spread(arrays.seconds[video]),
        file_seconds=spread(arrays.own_seconds[video]), fps=spread(arrays.fps[video]),
        file_fps=spread(arrays.own_fps[video]), video_tokens=spread(arrays.tokens),
        caption_characters=spread(arrays.characters), text_tokens=spread(arrays.text),
    )  # fmt: skip


def _captions(captions, arrays, encoded, different):
    values, code = distinct(captions)
    counts = np.bincount(code)
    often = np.argsort(-counts, kind="stable")[:5]
    return dict(
        different=len(values), tokenised=encoded, estimated=encoded < different,
        repeated=int(counts[counts > 1].sum()), empty=int((arrays.characters == 0).sum()),
        short=int((arrays.characters < SHORT_CAPTION).sum()),
        most_frequent=[dict(caption=values[i].as_py()[:300], samples=int(counts[i])) for i in often if counts[i] > 1],
    )  # fmt: skip


def _duplicates(index, rows):
    """Lists of keys of kept samples whose bytes are equal, the longest list first."""
    hashes, code = distinct(column(index, "sha256", rows))
    order = np.argsort(code, kind="stable")
    counts = np.bincount(code, minlength=len(hashes))
    ends = counts.cumsum()
    twice = [g for g in np.flatnonzero(counts > 1).tolist() if hashes[g].as_py()]
    groups = [column(index, "key", rows[order[ends[g] - counts[g] : ends[g]]]).to_pylist() for g in twice]
    return sorted(groups, key=lambda keys: (-len(keys), keys))


def pack_prediction(arrays, settings: Settings, ranks: int):
    """What the planner makes of the first epoch, at the planned number of ranks and at others.

    At another number of ranks each rank reads as many rows a step as at the planned one. Returns (dict of numbers,
    samples of each row).
    Raises: UserError where the batch is no multiple of the ranks.
    """
    if settings.batch % ranks:
        raise UserError(
            f"{settings.batch} rows a step (data.batch) cannot be shared equally by {ranks} data-parallel ranks: make "
            "the batch a multiple of --ranks"
        )
    lines, planned = [], None
    for count in sorted({ranks, *RANKS}):
        epoch = plan_epoch(
            arrays.tokens, arrays.text + 1, row_tokens=settings.row_tokens, row_text=settings.row_text,
            max_segments=settings.max_segments, seed=settings.seed, epoch=0, ranks=count,
            rows_per_rank_step=settings.batch // ranks, cost_a=settings.cost_a, cost_b=settings.cost_b,
        )  # fmt: skip
        rows = len(epoch)
        lines.append(dict(ranks=count, batch=epoch.rows_per_step, steps_per_epoch=epoch.num_steps, rows_per_epoch=rows,
                          repeated_rows=int(epoch.repeated), imbalance=epoch.imbalance,
                          tokens_per_step=epoch.fill * settings.row_tokens * epoch.rows_per_step,
                          epochs=settings.steps / epoch.num_steps if settings.steps else None))  # fmt: skip
        if count == ranks:
            planned = epoch
    starts, samples = planned.row_starts, planned.samples
    sizes = np.diff(starts)
    used = np.add.reduceat(arrays.tokens[samples], starts[:-1])
    text = np.add.reduceat(arrays.text[samples] + 1, starts[:-1])
    short = used < 0.95 * settings.row_tokens
    full = sizes >= settings.max_segments if settings.max_segments else np.zeros(len(sizes), bool)
    least = int(arrays.text.min()) + 1
    numbers = dict(
        fill=planned.fill, text_fill=planned.text_fill, imbalance=planned.imbalance, rows=len(planned),
        steps_per_epoch=planned.num_steps, identity=planned.identity, samples_a_row=spread(sizes),
        most_text=int(text.max()), underfilled_rows=float(short.mean()),
        limited_by_segments=float((short & full).mean()),
        limited_by_text=float((short & ~full & (text > settings.row_text - 2 * least)).mean()),
        by_ranks=lines,
    )  # fmt: skip
    return numbers, sizes
