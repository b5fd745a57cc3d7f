"""What becomes of every sample of an index under the settings of a training run, column by column.

Letters: n = samples that are looked at. The rules are those of `data_pipelines.fit`, applied once to each group of
samples that they cannot tell apart, so that millions cost seconds.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np

from data_pipelines.fit import CHANGES, Fit, Unfit, fit_sample
from data_pipelines.packing import COST_A, COST_B
from data_pipelines.text_tokens import MAX_TOKENS, Tokenizer
from sorax.errors import UserError

MOST_ENCODED = 100_000  # different captions that are tokenised; of more, the others are estimated


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of an experiment that a report needs; the names are those of its sections `data`, `text` and `train`.

    rows: False for a VAE, which trains on dense clips. steps: of the run, 0 where it is not known.
    tokenizer and vocab_size: which one training would take, see `Tokenizer.wanted`; tokenizer_captions: on how many
    captions it would train one. cost_a, cost_b: as in `plan_epoch`.
    origin: where the settings come from, in words.
    """

    fit: Fit
    row_tokens: int = 16384
    row_text: int = 4096
    max_segments: int = 64
    batch: int = 8
    seed: int = 0
    steps: int = 0
    tokenizer: str = ""
    vocab_size: int = 512
    tokenizer_captions: int = 100_000
    cost_a: float = COST_A
    cost_b: float = COST_B
    rows: bool = True
    origin: str = "defaults of sorax"


@dataclasses.dataclass(frozen=True)
class Fits:
    """What n samples are decoded to: int64 num_frames, height, width and native_tokens, float64 fps, all [n].

    native_tokens: tokens at the sample's own size and length. changes: uint8 [n], bit k set = CHANGES[k].
    reasons: object [n], "" or why a sample cannot be fitted (its other columns are 0 then).
    """

    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    fps: np.ndarray
    native_tokens: np.ndarray
    changes: np.ndarray
    reasons: np.ndarray

    def tokens(self, fit: Fit):
        """Tokens of each sample as trained, int64 [n]."""
        return _tokens(self.num_frames, self.height, self.width, fit)

    def of(self, mask):
        """The same of some samples."""
        return Fits(*(getattr(self, field.name)[mask] for field in dataclasses.fields(self)))


def fit_columns(image, height, width, own, span, duration, fit: Fit) -> Fits:
    """`fit_sample` of n samples at once.

    Args: columns of an index, [n] each: image bool, height and width in pixels, own their frames per second, span and
      duration in seconds.
    """
    height, width = height.astype(np.int64), width.astype(np.int64)
    fps = np.full(len(image), fit.fps) if fit.fps else own
    available = np.where(image, 1, _frames_at(span, fps))
    whole = np.maximum(available, _frames_at(np.maximum(duration - 1 / np.maximum(own, 1e-9), 0), fps))
    native = _tokens(available, height, width, fit)

    # Beyond the longest clip it makes no difference how much longer a video is.
    most = fit.max_frames + fit.temporal_stride
    available, whole = np.minimum(available, most), np.where(image, 1, np.minimum(whole, most))
    group, first = _groups(image, height, width, available, whole)
    # At one frame a second a span in seconds is a number of frames; what depends on the true rate follows below.
    slow = dataclasses.replace(fit, fps=None)
    table, bits, unfit = np.zeros((len(first), 3), np.int64), np.zeros(len(first), np.uint8), np.zeros(len(first), bool)
    for g, i in enumerate(first.tolist()):
        info = SimpleNamespace(height=int(height[i]), width=int(width[i]), fps=1.0, span=float(available[i] - 1),
                               duration=float(whole[i]), is_image=bool(image[i]))  # fmt: skip
        try:
            fitted = fit_sample(info, slow)
        except Unfit:
            unfit[g] = True
            continue
        table[g] = fitted.num_frames, fitted.height, fitted.width
        bits[g] = sum(1 << CHANGES.index(change) for change in fitted.changes)
    retimed = ~image & (np.abs(fps - own) > 1e-3 * own) & ~unfit[group]
    reasons, known = np.full(len(image), "", object), {}
    for i in np.flatnonzero(unfit[group]).tolist():
        same = (group[i], own[i])
        if same not in known:  # the reason names the true rate
            known[same] = _reason(fit, height[i], width[i], own[i], span[i], duration[i], image[i])
        reasons[i] = known[same]
    changes = bits[group] | (retimed.astype(np.uint8) << CHANGES.index("retimed"))
    return Fits(*table[group].T, np.where(unfit[group], 0.0, fps), native, changes, reasons)


def _frames_at(span, fps):
    return (np.floor(np.minimum(span * fps, 1e12) + 0.1) + 1).astype(np.int64)


def _tokens(num_frames, height, width, fit):
    m, stride = fit.spatial_multiple, fit.temporal_stride
    return np.where(num_frames > 0, ((num_frames - 1) // stride + 1) * (height // m) * (width // m), 0)


def _groups(*columns):
    """(group of each row int64 [n], first row of each group) of rows that are equal in all columns."""
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, own = np.unique(column, return_inverse=True)
        _, code = np.unique(code * (own.max(initial=0) + 1) + own, return_inverse=True)
    return code, np.unique(code, return_index=True)[1]


def _reason(fit, height, width, fps, span, duration, image):
    info = SimpleNamespace(height=int(height), width=int(width), fps=float(fps), span=float(span),
                           duration=float(duration), is_image=bool(image))  # fmt: skip
    try:
        fit_sample(info, fit)
    except Unfit as e:
        return e.reason
    raise AssertionError("a sample fits alone but not in its group")


def text_lengths(captions, settings: Settings):
    """Tokens of each caption, with the tokenizer that training would take or make of them.

    Args: captions: pyarrow array [n] of the samples in training's order.
    Returns: (lengths int64 [n], end mark included and MAX_TOKENS + 1 for a caption that is too long, how many of the
      different captions were tokenised, how many different ones there are). Of more than 100,000 different captions,
      every so manieth is tokenised, and each of the others takes the length of one with as many characters.
    Raises: UserError where the vocabulary is too small, or the tokenizer is missing.
    """
    import pyarrow.compute as pc

    if not len(captions):
        return np.zeros(0, np.int64), 0, 0
    picks = np.linspace(0, len(captions) - 1, min(settings.tokenizer_captions, len(captions))).astype(int)
    tokenizer = Tokenizer.wanted(settings.tokenizer, captions.take(picks).to_pylist(), settings.vocab_size)
    different, code = distinct(captions)
    chosen = np.linspace(0, len(different) - 1, min(MOST_ENCODED, len(different))).astype(int)
    lengths = np.array([_length(tokenizer, caption) for caption in different.take(chosen).to_pylist()], np.int64)
    if len(chosen) < len(different):
        lengths = _estimate(pc.utf8_length(different).to_numpy(), chosen, lengths)
    return lengths[code], len(chosen), len(different)


def distinct(values):
    """(different values of a pyarrow array, in order of their first place, number of each value int64 [n])."""
    encoded = values.dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def _length(tokenizer, caption):
    try:
        return len(tokenizer.encode(caption))
    except UserError:  # too long, which is counted and named
        return MAX_TOKENS + 1


def _estimate(characters, chosen, lengths):
    """Lengths of all captions from those of the `chosen`, through the number of characters."""
    order = np.argsort(characters[chosen], kind="stable")
    known, tokens = characters[chosen][order], lengths[order]
    left, right = np.searchsorted(known, characters, "left"), np.searchsorted(known, characters, "right")
    # In turns over those with as many characters: not the mean, which would make the distribution too narrow.
    place = left + np.arange(len(characters)) % np.maximum(right - left, 1)
    estimated = tokens[np.minimum(place, len(tokens) - 1)]
    estimated[chosen] = lengths
    return estimated
