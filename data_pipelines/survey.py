"""One look at the specs of all samples of a source, which decodes nothing."""

import dataclasses
import hashlib

import numpy as np

from sorax.errors import UserError

MAX_CAPTIONS = 100_000  # samples whose captions are kept, for a tokenizer to be trained on


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a source holds.

    identity: hash of all specs and weights, hence of all that can be known without decoding.
    shapes: int32 [n, 3], (T, H, W). caption_bytes: int32 [n], of the longest caption of each.
    captions: of at most MAX_CAPTIONS samples, evenly spread, all kinds.
    """

    identity: str
    shapes: np.ndarray
    caption_bytes: np.ndarray
    captions: tuple[str, ...]


def survey(source, look=None) -> Survey:
    """Looks at the spec of every sample of a source. Raises UserError where there is none.

    Args:
        look: function of (index, caption, dict of its captions of further kinds), called for each.
    """
    count, digest = len(source), hashlib.sha256()
    if not count:
        raise UserError("the data set is empty: there is nothing to learn from or to encode")
    shapes, caption_bytes, captions = np.empty((count, 3), np.int32), np.empty(count, np.int32), []
    kept, kinds = set(_spread(count, MAX_CAPTIONS)), getattr(source, "caption_kinds", ())
    for i in range(count):
        spec = source.spec(i)
        digest.update(repr(spec).encode())
        shapes[i] = spec.num_frames, spec.height, spec.width
        further = source.captions(i) if kinds else {}
        texts = [spec.caption, *further.values()]
        if kinds:
            digest.update(repr((kinds, texts)).encode())
        caption_bytes[i] = max(len(text.encode()) for text in texts)
        if i in kept:
            captions.extend(texts)
        if look is not None:
            look(i, spec.caption, further)
    if (weights := getattr(source, "weights", None)) is not None:
        digest.update(np.asarray(weights, np.float64).tobytes())
    return Survey(digest.hexdigest()[:16], shapes, caption_bytes, tuple(captions))


def source_identity(source, extra: str = "") -> str:
    """Hash of what a source holds, as far as can be known without decoding, and of `extra`."""
    return hashlib.sha256((survey(source).identity + extra).encode()).hexdigest()[:16]


def some_captions(source, most: int = MAX_CAPTIONS) -> list[str]:
    """Captions of all kinds of at most so many samples, evenly spread."""
    kinds, texts = getattr(source, "caption_kinds", ()), []
    for i in _spread(len(source), most):
        texts += [source.spec(i).caption, *(source.captions(i).values() if kinds else ())]
    return texts


def _spread(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()
