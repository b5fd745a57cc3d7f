"""Captions as numbers: their bytes, a byte-level BPE that is trained on them, and the tokenizers of the T5 family.

A tokenizer is a file or two, as Hugging Face's libraries keep them: `tokenizer.json` (any tokenizer of `tokenizers`),
`spiece.model` (SentencePiece, as T5 and UMT5 have it) or `tokenizer_config.json` alone (ByT5, whose tokens are bytes).
All mark padding with 0 and the end of a caption with 1.
"""

import hashlib
import html
import json
import os
import pathlib

import ftfy
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sorax.errors import UserError

PAD_ID = 0
EOS_ID = 1
MARKS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5; nothing is unknown, for every byte is a token
MIN_VOCAB = len(MARKS) + 256
MAX_TOKENS = 512  # of one caption, end included: the text slots of a Wan-shaped model
TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"
CONFIG_FILE = "tokenizer_config.json"
BYTE_CLASS = "ByT5Tokenizer"
BYTE_OFFSET, BYTE_SENTINELS = len(MARKS), 125  # ByT5's ids: the marks, 256 bytes, sentinels that captions never have
BYTES, BPE = "bytes", "bpe"  # names for `Tokenizer.wanted`


def clean(caption):
    """A caption as Wan's pipeline cleans it: mojibake mended, HTML entities resolved, white space folded."""
    if not (caption.isascii() and caption.isprintable() and "&" not in caption):  # else there is nothing to mend
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split())


class _Json:
    """The tokenizers of `tokenizers`, from the text of a `tokenizer.json`."""

    file, hugging_face = TOKENIZER_FILE, "PreTrainedTokenizerFast"

    def __init__(self, content):
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.encode_special_tokens = True  # a caption that spells "</s>" is text, not an end
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_id = self._tokenizer.token_to_id(MARKS[PAD_ID])

    def encode(self, text):
        return self._tokenizer.encode(text).ids

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ")


class _SentencePiece:
    """SentencePiece (Kudo and Richardson 2018), from a `spiece.model`.

    Of a model with byte fallback (UMT5's) transformers makes unknown tokens where SentencePiece makes bytes: to have
    the same, put the tokenizer.json of transformers beside it, which is read first.
    """

    file, hugging_face = SENTENCEPIECE_FILE, "T5Tokenizer"

    def __init__(self, content):
        if not content:
            raise ValueError("it is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size, self.pad_id = self._model.get_piece_size(), self._model.pad_id()

    def encode(self, text):
        return [*self._model.encode(text), self._model.eos_id()]

    def decode(self, ids):
        return self._model.decode([i for i in ids if i not in (self._model.eos_id(), self.pad_id)])


class _Bytes:
    """ByT5 (Xue et al. 2022): the bytes of UTF-8; its file is a tokenizer_config.json that says so.

    What else the file says changes no token: all have the identity of `content`.
    """

    file, hugging_face = CONFIG_FILE, BYTE_CLASS
    vocab_size, pad_id = BYTE_OFFSET + 256 + BYTE_SENTINELS, PAD_ID
    content = json.dumps({"tokenizer_class": BYTE_CLASS, "extra_ids": BYTE_SENTINELS}).encode()

    def __init__(self, content):
        if json.loads(content).get("tokenizer_class") != BYTE_CLASS:
            raise ValueError(f"it is not of a {BYTE_CLASS}, and neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} is "
                             "beside it")  # fmt: skip

    def encode(self, text):
        return [BYTE_OFFSET + byte for byte in text.encode("utf-8", "surrogatepass")] + [EOS_ID]

    def decode(self, ids):
        text = bytes(i - BYTE_OFFSET for i in ids if BYTE_OFFSET <= i < BYTE_OFFSET + 256)
        return text.decode("utf-8", "surrogatepass")


_KINDS = (_Json, _SentencePiece, _Bytes)


class Tokenizer:
    """Captions to token ids and back, from the content of the file that holds a tokenizer, see above.

    The BPE is that of GPT-2 (Radford et al. 2019): a word is a token with the space before it; the first word of a
    caption is given one too, so that it has the token that it has elsewhere. `identity` is a short hash of the file.
    `bytes_a_token` is about how many bytes of a caption a token is.
    """

    def __init__(self, content: bytes, kind=_Json):
        self.content = content
        self.identity = hashlib.sha256(_Bytes.content if kind is _Bytes else content).hexdigest()[:16]
        self.file, self.hugging_face, self.bytes_a_token = kind.file, kind.hugging_face, 1 if kind is _Bytes else 3
        self._tokenizer = kind(content)

    @classmethod
    def of_bytes(cls):
        """ByT5's: no training, no file to download, some five times as many tokens as words."""
        return cls(_Bytes.content, _Bytes)

    @classmethod
    def wanted(cls, name, captions, vocab_size):
        """The tokenizer that `config.data.tokenizer` names, of at most vocab_size tokens.

        name: "" or "bytes" for ByT5's, "bpe" for one that is trained on the captions, else a folder that holds one.

        Raises UserError where there is no such folder, what it holds is broken, or vocab_size is too small.
        """
        if name == BPE:
            return cls.train(captions, vocab_size)
        if name in ("", BYTES):
            tokenizer = cls.of_bytes()
            if tokenizer.vocab_size > vocab_size:
                raise UserError(
                    f"the tokenizer of bytes has {tokenizer.vocab_size} tokens, but config.text.vocab_size is "
                    f"{vocab_size}: set it to at least that, or config.data.tokenizer to another"
                )
            return tokenizer
        if not os.path.isdir(name):
            raise UserError(f"config.data.tokenizer is {name!r}: use {BYTES}, {BPE} or a folder with a tokenizer")
        return cls.load(name, vocab_size)

    @classmethod
    def train(cls, captions, vocab_size):
        """BPE tokenizer of at most vocab_size tokens for an iterable of captions, which are cleaned first.

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
        return cls(tokenizer.to_str().encode())

    @classmethod
    def is_in(cls, folder) -> bool:
        """Whether a folder holds a tokenizer."""
        return any(pathlib.Path(folder, kind.file).exists() for kind in _KINDS)

    @classmethod
    def load(cls, folder, vocab_size=None):
        """The tokenizer in a folder: `tokenizer.json`, else `spiece.model`, else ByT5's `tokenizer_config.json`.

        Raises UserError that names the file where it is missing or broken, has other marks, or has more than
        vocab_size tokens.
        """
        kind = next((kind for kind in _KINDS if pathlib.Path(folder, kind.file).exists()), _Json)
        path = pathlib.Path(folder, kind.file)
        try:
            tokenizer = cls(path.read_bytes(), kind)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): put the file back") from error
        except Exception as error:  # the libraries raise nothing narrower
            raise UserError(f"{path} is no tokenizer ({error}): put the file back") from error
        if tokenizer.encode("").tolist() != [EOS_ID] or tokenizer._tokenizer.pad_id != PAD_ID:
            raise UserError(f"{path} does not end captions with token {EOS_ID} and pad with {MARKS[PAD_ID]} = {PAD_ID}"
                            ": use a tokenizer that does")  # fmt: skip
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(f"{path} has {tokenizer.vocab_size} tokens, but config.text.vocab_size is {vocab_size}: "
                            f"set it to at least {tokenizer.vocab_size}")  # fmt: skip
        return tokenizer

    def save(self, folder):
        """Writes the tokenizer's file into a folder, whole or not at all."""
        path = pathlib.Path(folder, self.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_bytes(self.content)
        os.replace(temporary, path)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def encode(self, caption, key=None):
        """Token ids int32 [L] of a caption, cleaned, the end mark last; an empty caption is the end mark alone.

        Raises UserError that names the sample `key` where there are more than `MAX_TOKENS`.
        """
        caption = clean(caption)
        ids = np.array(self._tokenizer.encode(caption), np.int32)
        if len(ids) > MAX_TOKENS:
            whose = f" of {key}" if key is not None else ""
            raise UserError(
                f"the caption{whose} has {len(ids) - 1} tokens (it begins {caption[:40]!r}), at most "
                f"{MAX_TOKENS - 1} fit: shorten it"
            )
        return ids

    def decode(self, ids):
        """The caption of token ids [L]; padding and end marks are left out."""
        return self._tokenizer.decode(np.asarray(ids).tolist())
