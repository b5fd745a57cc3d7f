"""Rows of packed patches, with random access: the plan's samples are read, cut into patches and laid end to end.

Letters: B = rows; N, M, P as in a packed row; n = samples.
"""

import hashlib
import itertools
import logging
import math
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from data_pipelines import reading
from data_pipelines.caption_kinds import CAPTION, check_mix, draw_kind
from data_pipelines.packing import PackPlan
from data_pipelines.survey import survey
from data_pipelines.text_tokens import PAD_ID
from sorax.errors import UserError
from sorax.patchify import PATCH_SIZE, patch_view, positions

POSTERIORS = ("mean", "sample")
OVERSIZE = ("refuse", "trim")
_ENDLESS = 1 << 48  # of rows: more than anybody trains on
_BLOCK = 1 << 20  # samples whose lengths are counted at a time
_log = logging.getLogger(__name__)

# Small samples are read by the thousand, and there are few shapes.
_positions = lru_cache(maxsize=256)(positions)


class Examples(Protocol):
    """What rows are packed from: a picklable sequence of latents (or pixels) and caption tokens of known lengths.

    shapes: int32 [n, 3], (t, h, w) of each. text_lengths: int32 [n], the tokens of each caption.
    weights, which it may lack: float64 [n] or None, how often each comes in an epoch on average.
    kind_lengths, which it may lack: kind -> int32 [n], the tokens of captions of further kinds, which its examples have
    as text_tokens_KIND (see `data_pipelines.caption_kinds`).
    sample(i, key), where there is a distribution of latents: as [i], but a draw, a pure function of i and key.
    text_width, which it may lack: D of the text_embeds uint16 [L, D] that its examples have, or 0.
    """

    shapes: np.ndarray
    text_lengths: np.ndarray

    def __len__(self) -> int:
        """Number of examples, n."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """dict(latents [t, h, w, C], text_tokens int32 [L])."""
        ...

    def key(self, index: int) -> str:
        """What to call an example in an error; may be slow."""
        ...


class PixelExamples:
    """The videos of a source as examples: pixels where others have latents, so that they can be packed in rows.

    Args:
      source: a `data_pipelines.sources.Source`. encode_text: picklable function caption -> int [L], its tokens.

    Its rows have a `patch_size` in pixels, such as (1, 16, 16), and are uint8 as the videos are.
    identity: see `Survey`.
    """

    def __init__(self, source, encode_text):
        self.source, self.encode_text = source, encode_text
        self.text_lengths = np.empty(len(source), np.int32)
        self.kind_lengths = {kind: np.empty(len(source), np.int32) for kind in getattr(source, "caption_kinds", ())}

        def count(index, caption, further):
            lengths = {text: len(encode_text(text)) for text in {caption, *further.values()}}
            self.text_lengths[index] = lengths[caption]
            for kind, text in further.items():
                self.kind_lengths[kind][index] = lengths[text]

        found = survey(source, count)
        self.shapes, self.identity, self.weights = found.shapes, found.identity, getattr(source, "weights", None)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        """dict(latents uint8 [T, H, W, 3], text_tokens int32 [L]), and text_tokens_KIND of its further captions."""
        sample = self.source[index]
        captions = self.source.captions(index) if self.kind_lengths else {}
        texts = {"text_tokens": sample["caption"]} | {f"text_tokens_{kind}": text for kind, text in captions.items()}
        return dict(latents=sample["video"]) | {
            name: np.asarray(self.encode_text(text), np.int32) for name, text in texts.items()
        }

    def key(self, index):
        """The source's name of a sample."""
        return self.source.spec(index).key


class RowSource:
    """Packed rows of all epochs, one after the other, with random access by global row index.

    Args:
      examples: see `Examples`.
      row_tokens, row_text: N and M, the room of a row. Each caption takes L + 1 text slots: its tokens and one
        empty slot, which stands for all slots that it leaves unused.
      batch_size: rows of a step over all processes. ranks: how many equal shares of a step have equal cost; a
        property of the run, not of the machines that read it.
      posterior: "mean" reads examples[i]; "sample" reads examples.sample(i, key), key = (seed, global row index, place
        in the row): each time a sample is met it is another draw, and every row is the same whoever reads it.
      mix: kind -> share of its captions (`caption_kinds.parse_mix`); one is drawn by (seed, global row index, place in
        the row), and room is kept for the longest. Empty: each example's own.
      kinds: names of kinds, those of the mix among them; rows then say of which each text slot is, in text_kinds int32
        [M]: its number among these.
      oversize: what is done with an example larger than a row: "refuse", or "trim" to the most frames that fit.
      patch_size: (t, h, w). order: of the values of a patch, "in" or "out", see `sorax.patchify`; pixels are cut
        several times faster in "out". The others as in `data_pipelines.packing.PackSettings`.

    Row index r is row r % batch_size of step r // batch_size; epochs are whole steps. `source[r]` is a dict of
    tokens [N, P] (of the dtype of the latents), positions int32 [N, 3], segment_ids int32 [N] (1.., 0 = padding),
    text_tokens int32 [M], text_segment_ids int32 [M] and, where the examples have them, text_embeds uint16 [M, D] (bits
    of bfloat16; 0 at empty slots). `plans` is the `PackPlan`; `trimmed` int64, the examples that
    are cut.

    Raises UserError where an example does not fit in a row, and, when read, where it has not the promised size.
    """

    def __init__(
        self,
        examples,
        *,
        row_tokens,
        row_text,
        batch_size,
        seed,
        patch_size=PATCH_SIZE,
        order="in",
        ranks=1,
        posterior="mean",
        oversize="refuse",
        mix=None,
        kinds=(),
        **settings,
    ):
        if batch_size % ranks:
            raise UserError(
                f"{batch_size} rows a step cannot be shared equally by {ranks} data-parallel ranks: "
                f"make the batch a multiple of {ranks}"
            )
        for name, value, known in (("posterior", posterior, POSTERIORS), ("oversize", oversize, OVERSIZE)):
            if value not in known:
                raise UserError(f"{name} is {value!r}: use one of {', '.join(known)}")
        if posterior == "sample" and not hasattr(examples, "sample"):
            raise UserError('posterior is "sample", but these examples hold no distribution to draw from: use "mean"')
        self.examples, self.patch_size, self.order, self.posterior = examples, tuple(patch_size), order, posterior
        self.row_tokens, self.row_text, self.batch_size = row_tokens, row_text, batch_size
        self.text_width = getattr(examples, "text_width", 0)
        self.mix, self.kinds = dict(mix or {}), tuple(kinds)
        self._kind_lengths = dict(getattr(examples, "kind_lengths", {}))
        check_mix(self.mix, self._kind_lengths)
        video, text = self._lengths(oversize)
        self.plans = PackPlan(
            video,
            text,
            weights=getattr(examples, "weights", None),
            names=self.name,
            row_tokens=row_tokens,
            row_text=row_text,
            seed=seed,
            ranks=ranks,
            rows_per_rank_step=batch_size // ranks,
            **settings,
        )

    @property
    def identity(self):
        """Hash of the data's lengths and of every setting: a checkpoint that has another is of other batches."""
        settings = self.plans.identity, self.patch_size, self.order, self.posterior
        settings += (sorted(self.mix.items()),) if self.mix else ()
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def plan(self, epoch):
        """The `EpochPlan` of an epoch."""
        return self.plans.epoch(epoch)

    def locate(self, index):
        """(epoch, row of the epoch) of a global row index."""
        return self.plans.locate(index)

    def samples(self, index):
        """Which samples are in a row: int64 [k] indices into `examples`, in order of their segment ids."""
        return self.plans.row(index)

    def name(self, sample):
        """What to call an example in an error: its key, or its number where it has none that can be read."""
        try:
            return str(self.examples.key(sample))
        except Exception:  # it is named because something is wrong with it
            return f"sample {sample}"

    def __len__(self):
        return _ENDLESS

    def __getitem__(self, index):
        return {name: values[0] for name, values in self.read(index, index + 1).items()}

    def read(self, start, stop):
        """Rows start..stop - 1, stacked: dict of tokens [B, N, P] and the other fields, [B, ...]."""
        plan = [(index, self.samples(index).tolist()) for index in range(start, stop)]
        read = ((row, place, *self._read(sample, index, place)) for row, (index, samples) in enumerate(plan)
                for place, sample in enumerate(samples))  # fmt: skip
        first = next(read)
        channels, dtype = first[2].shape[3], first[2].dtype
        with reading.empty((len(plan), self.row_tokens, channels * math.prod(self.patch_size)), dtype) as tokens:
            return dict(tokens=tokens, **self._fill(tokens, itertools.chain([first], read)))

    def _fill(self, tokens, samples):
        """Puts samples (row, place, latents, kind, text, embeddings) into tokens [B, N, P]; returns other fields."""
        count, tokens = len(tokens), tokens.view(np.ndarray)
        where = np.zeros((count, self.row_tokens, 3), np.int32)
        segment_ids = np.zeros((count, self.row_tokens), np.int32)
        text_tokens = np.full((count, self.row_text), PAD_ID, np.int32)
        text_segment_ids = np.zeros((count, self.row_text), np.int32)
        text_embeds = np.zeros((count, self.row_text, self.text_width), np.uint16)
        text_kinds = np.zeros((count, self.row_text), np.int32)
        ends, end, text_end = np.zeros(count, int), 0, 0
        for row, place, latents, kind, text, embeds in samples:
            at, text_at = (0, 0) if place == 0 else (end, text_end)
            patches = patch_view(latents, self.patch_size, self.order)  # [t, h, w, C, pt, ph, pw]
            end = at + math.prod(patches.shape[:3])
            text_end = text_at + len(text) + 1  # + 1: the empty slot
            _copy(patches, tokens[row, at:end])
            where[row, at:end] = _positions(*latents.shape[:3], self.patch_size)
            segment_ids[row, at:end] = place + 1
            text_tokens[row, text_at : text_end - 1] = text
            text_segment_ids[row, text_at:text_end] = place + 1
            if self.text_width:
                text_embeds[row, text_at : text_end - 1] = embeds
            if self.kinds:
                text_kinds[row, text_at:text_end] = self.kinds.index(kind)
            ends[row] = end
        for row, end in enumerate(ends):
            tokens[row, end:] = 0
        fields = dict(
            positions=where, segment_ids=segment_ids, text_tokens=text_tokens, text_segment_ids=text_segment_ids
        )
        fields |= dict(text_embeds=text_embeds) if self.text_width else {}
        return fields | (dict(text_kinds=text_kinds) if self.kinds else {})

    def _lengths(self, oversize):
        """Video and text tokens of each example, int32 [n] both; names those that are cut."""
        shapes, count = np.asarray(self.examples.shapes), len(self.examples)
        video, trimmed = np.empty(count, np.int32), []
        for start in range(0, count, _BLOCK):
            grid, rest = np.divmod(shapes[start : start + _BLOCK], np.array(self.patch_size, np.int32))
            if rest.any():
                worst = start + int(rest.any(axis=1).argmax())
                t, h, w = shapes[worst].tolist()
                raise UserError(f"{self.name(worst)} is {t} x {h} x {w}, which patches of {self.patch_size} do not "
                                "divide: bring it to whole patches")  # fmt: skip
            frames, per_frame = grid[:, 0], grid[:, 1] * grid[:, 2]
            # A frame that fits in no row is left as it is, for the plan to refuse.
            most = np.maximum(self.row_tokens // np.maximum(per_frame, 1), 1)
            kept = np.minimum(frames, most) if oversize == "trim" else frames
            video[start : start + len(grid)] = np.minimum(kept.astype(np.int64) * per_frame, np.iinfo(np.int32).max)
            trimmed.append(start + np.flatnonzero(kept < frames))
        self.trimmed = np.concatenate(trimmed) if trimmed else np.zeros(0, np.int64)
        if len(self.trimmed):
            named = ", ".join(self.name(i) for i in self.trimmed[:3].tolist())
            more = f" and {len(self.trimmed) - 3} more" if len(self.trimmed) > 3 else ""
            _log.warning("%d of %d samples are longer than a row of %d tokens and are cut to the frames that fit: %s%s",
                         len(self.trimmed), count, self.row_tokens, named, more)  # fmt: skip
        lengths = [self._text_lengths(kind) for kind in self.mix or (CAPTION,)]
        return video, np.max(lengths, axis=0).astype(np.int32) + 1

    def _text_lengths(self, kind):
        return self.examples.text_lengths if kind == CAPTION else self._kind_lengths[kind]

    def _read(self, sample, index, place):
        """(latents [t, h, w, C] cut to the length that was planned, kind of caption, its tokens [L], its embeddings
        [L, D] or None)."""
        seed = self.plans.settings.seed
        try:
            with reading.note(sample):
                if self.posterior == "sample":
                    example = self.examples.sample(sample, (seed, index, place))
                else:
                    example = self.examples[sample]
        except UserError:
            raise
        except Exception as error:  # not all survive the way back from a worker, and none names the sample
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{self.name(sample)} could not be read: {what}") from error
        kind = draw_kind(self.mix, seed, index, place) if self.mix else CAPTION
        # Of a mixture, a part without the kind has its own captions alone.
        end = "" if kind == CAPTION or f"text_tokens_{kind}" not in example else f"_{kind}"
        latents, text = np.asarray(example["latents"]), np.asarray(example["text_tokens" + end])
        promised = tuple(self.examples.shapes[sample].tolist()), int(self._text_lengths(kind)[sample])
        found = tuple(latents.shape[:3]), len(text)
        if found != promised:
            raise UserError(
                f"{self.name(sample)} was planned as {_shown(promised)}, but reads as {_shown(found)}: the data "
                "changed; start again from its index"
            )
        pt, ph, pw = self.patch_size
        _, h, w = latents.shape[:3]
        frames = int(self.plans.video[sample]) // ((h // ph) * (w // pw)) * pt
        return latents[:frames], kind, text, example["text_embeds" + end] if self.text_width else None


def _copy(patches, tokens):
    """Puts patches [t, h, w, ...] of three more axes and C into tokens [n, P]."""
    if patches.strides[-2] == patches.shape[-1] * patches.strides[-1] and patches.strides[-1] == patches.itemsize:
        # The last two axes lie end to end, as in order "out": copied as one value, at twice the speed.
        run = np.dtype((np.void, patches.shape[-1] * patches.shape[-2] * patches.itemsize))
        patches = patches.reshape(*patches.shape[:-2], -1).view(run)
        tokens = tokens.view(run)
    tokens.reshape(patches.shape)[...] = patches


def _shown(size):
    (t, h, w), text = size
    return f"{t} x {h} x {w} with {text} text tokens"
