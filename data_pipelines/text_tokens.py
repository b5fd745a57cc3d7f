"""Captions as numbers: byte-level BPE that is trained on the data's own captions and knows every script."""

import hashlib
import html
import os
import pathlib

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sorax.errors import UserError

PAD_ID = 0
EOS_ID = 1
MARKS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5; nothing is unknown, for every byte is a token
MIN_VOCAB = len(MARKS) + 256
MAX_TOKENS = 512  # of one caption, end included: the text slots of a Wan-shaped model
TOKENIZER_FILE = "tokenizer.json"


def clean(caption):
    """A caption as Wan's pipeline cleans it: mojibake mended, HTML entities resolved, white space folded."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


class Tokenizer:
    """Byte-level BPE as in GPT-2 (Radford et al. 2019), from the text of a `tokenizer.json` of Hugging Face tokenizers.

    A word is a token with the space before it; the first word of a caption is given one too, so that it has the
    token that it has elsewhere. `identity` is a short hash of the text.
    """

    def __init__(self, text):
        self.text, self.identity = text, hashlib.sha256(text.encode()).hexdigest()[:16]
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True  # a caption that spells "</s>" is text, not an end
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def train(cls, captions, vocab_size):
        """Tokenizer of at most vocab_size tokens for an iterable of captions, which are cleaned first.

        Depends on how often each caption comes, not on their order. Raises UserError below `MIN_VOCAB` tokens.
        """
        if vocab_size < MIN_VOCAB:
            raise UserError(f"a vocabulary of {vocab_size} tokens is too small, for {len(MARKS)} marks and 256 bytes "
                            f"make {MIN_VOCAB}: set config.text.vocab_size to at least that")  # fmt: skip
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(MARKS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(map(clean, captions), trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {MARKS[EOS_ID]}", special_tokens=[(MARKS[EOS_ID], EOS_ID)]
        )
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, folder, vocab_size=None):
        """The tokenizer in `folder/tokenizer.json`.

        Raises UserError that names the file where it is missing or broken, has other marks, or has more than
        vocab_size tokens.
        """
        path = pathlib.Path(folder, TOKENIZER_FILE)
        try:
            tokenizer = cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): put the file back") from error
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer ({error}): put the file back") from error
        if tokenizer.encode("").tolist() != [EOS_ID] or tokenizer._tokenizer.token_to_id(MARKS[PAD_ID]) != PAD_ID:
            raise UserError(f"{path} does not end captions with token {EOS_ID} and pad with {MARKS[PAD_ID]} = {PAD_ID}"
                            ": use a tokenizer that does")  # fmt: skip
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(f"{path} has {tokenizer.vocab_size} tokens, but config.text.vocab_size is {vocab_size}: "
                            f"set it to at least {tokenizer.vocab_size}")  # fmt: skip
        return tokenizer

    def save(self, folder):
        """Writes `folder/tokenizer.json`, whole or not at all."""
        path = pathlib.Path(folder, TOKENIZER_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(self.text, encoding="utf-8")
        os.replace(temporary, path)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, caption, key=None):
        """Token ids int32 [L] of a caption, cleaned, the end mark last; an empty caption is the end mark alone.

        Raises UserError that names the sample `key` where there are more than `MAX_TOKENS`.
        """
        caption = clean(caption)
        ids = np.array(self._tokenizer.encode(caption).ids, np.int32)
        if len(ids) > MAX_TOKENS:
            whose = f" of {key}" if key is not None else ""
            raise UserError(
                f"the caption{whose} has {len(ids) - 1} tokens (it begins {caption[:40]!r}), at most "
                f"{MAX_TOKENS - 1} fit: shorten it"
            )
        return ids

    def decode(self, ids):
        """The caption of token ids [L]; padding and end marks are left out."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True).removeprefix(" ")
