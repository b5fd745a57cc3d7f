"""What a captioner learns from, as examples for packed rows: videos as pixels, or captions that are to be rewritten."""

import numpy as np

from data_pipelines.caption_kinds import CAPTION
from data_pipelines.rows import PixelExamples
from data_pipelines.survey import survey
from sorax.errors import UserError


def padded(video, patch_size):
    """A video uint8 [T, H, W, C] up to whole patches: it stands still at its end, with black rows and columns."""
    frames, *sides = (-n % p for n, p in zip(video.shape, patch_size))
    if any(sides):
        video = np.pad(video, [(0, 0), *((0, n) for n in sides), (0, 0)])
    return np.pad(video, [(0, frames), (0, 0), (0, 0), (0, 0)], mode="edge") if frames else video


class WholePatches(PixelExamples):
    """The videos of a source in whole patches, see `padded`: of any size and length."""

    def __init__(self, source, encode_text, patch_size):
        super().__init__(source, encode_text)
        self.patch_size = np.array(patch_size, np.int32)
        self.shapes = -(-self.shapes // self.patch_size) * self.patch_size

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return dict(example, latents=padded(example["latents"], self.patch_size))


class Rewritings:
    """Captions of one kind as what is read, those of other kinds as what is written: pairs, with no video.

    Args:
      source: whose samples have captions of several kinds. reads: kind that is read. encode_text: see `PixelExamples`.

    latents are the tokens read, int32 [n, 1, 1, 1], for patches of (1, 1, 1). identity: see `Survey`.
    """

    def __init__(self, source, encode_text, reads):
        kinds = getattr(source, "caption_kinds", ())
        if reads not in (CAPTION, *kinds):
            raise UserError(f"data.reads is {reads!r}, but the data has these kinds of captions: "
                            f"{', '.join((CAPTION, *kinds))}")  # fmt: skip
        self.source, self._texts = source, []

        def encode(index, caption, further):
            captions = {CAPTION: caption} | further
            self._texts.append({kind: np.asarray(encode_text(text), np.int32) for kind, text in captions.items()})

        self.identity = survey(source, encode).identity
        self.reads, self.weights = reads, getattr(source, "weights", None)
        lengths = {kind: np.array([len(t[kind]) for t in self._texts], np.int32) for kind in (CAPTION, *kinds)}
        self.shapes = np.stack([lengths[reads], *np.ones((2, len(self._texts)), np.int32)], axis=1)
        self.text_lengths = lengths.pop(CAPTION)
        self.kind_lengths = lengths

    def __len__(self):
        return len(self._texts)

    def __getitem__(self, index):
        """dict(latents int32 [n, 1, 1, 1], text_tokens int32 [L]), and text_tokens_KIND."""
        texts = self._texts[index]
        named = {"text_tokens" if kind == CAPTION else f"text_tokens_{kind}": ids for kind, ids in texts.items()}
        return named | dict(latents=texts[self.reads].reshape(-1, 1, 1, 1))

    def key(self, index):
        """The source's name of a sample."""
        return self.source.spec(index).key
