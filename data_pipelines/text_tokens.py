"""Captions as numbers. Byte tokens need no vocabulary file and know every script."""

import html

import ftfy
import numpy as np

from sorax.errors import UserError

PAD_ID = 0
EOS_ID = 1
MAX_TOKENS = 512  # of one caption, end included: the text slots of a Wan-shaped model


def clean(caption):
    """A caption as Wan's pipeline cleans it: mojibake mended, HTML entities resolved, white space folded."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


class ByteTokenizer:
    """UTF-8 bytes as tokens: id = byte + 3, then the end mark 1; 0 is padding, 2 stays unused.

    The numbering of ByT5 (Xue et al. 2021), so that its text encoders can be read.
    """

    offset = 3
    vocab_size = 256 + offset

    def __init__(self, max_tokens=MAX_TOKENS):
        self.max_tokens = max_tokens

    def encode(self, caption, key=None):
        """Token ids int32 [L] of a caption, cleaned, the end mark last; an empty caption is the end mark alone.

        Raises UserError that names the sample `key` where the caption has more than max_tokens - 1 bytes.
        """
        caption = clean(caption)
        raw = np.frombuffer(caption.encode("utf-8", errors="replace"), np.uint8)
        if len(raw) + 1 > self.max_tokens:
            whose = f" of {key}" if key is not None else ""
            raise UserError(
                f"the caption{whose} has {len(raw)} bytes (it begins {caption[:40]!r}), at most "
                f"{self.max_tokens - 1} fit: shorten it"
            )
        return np.append(raw.astype(np.int32) + self.offset, np.int32(EOS_ID)).astype(np.int32)

    def decode(self, ids):
        """The caption of token ids [L]; what is no byte (padding, end mark) is left out."""
        ids = np.asarray(ids)
        raw = ids[(ids >= self.offset) & (ids < self.vocab_size)] - self.offset
        return raw.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
