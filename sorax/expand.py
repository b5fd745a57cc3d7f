"""Short prompts made detailed, in the style of the captions that a model was trained on, and never less than they were.

A longer prompt is taken only if it keeps all that the short one says. Of the embedded world that is checked attribute
by attribute, by its grammar; of anything else every word that means something must be there, in any of its forms, and
words that stood side by side must follow each other closely. Where no proposal passes, the prompt stays as it is, and
why is said.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipelines.caption_kinds import CAPTION
from data_pipelines.latent_records import KIND_CAPTION
from data_pipelines.latent_shards import LatentShards, is_shards, shards_folder
from data_pipelines.latent_writer import splits
from data_pipelines.sources import open_source
from data_pipelines.world_grammar import keeps, read_caption
from sorax import config as config_lib
from sorax.caption_endpoint import DETAILED, SHORT
from sorax.caption_writer import CaptionRun
from sorax.decoding import DecodingConfig
from sorax.endpoint import AnswerError, NoAnswerError
from sorax.errors import UserError

EXPANDER = "expander"  # folder of a text-to-video run, where the model that expands its prompts is looked for
TRIES = 8  # proposals for a prompt
MOST = 2000  # characters of a prompt
WINDOW = 3  # words within which two that stood side by side have to follow each other
# Words that say nothing by themselves.
EMPTY_WORDS = frozenset((
    "a", "an", "the", "and", "or", "of", "on", "in", "at", "to", "into", "onto", "from", "by", "with", "for", "as",
    "is", "are", "was", "were", "be", "been", "being", "it", "its", "this", "that", "these", "those", "there",
    "then", "than", "while", "both", "all", "some", "any", "each", "very", "also", "so", "but", "who", "which",
    "what", "when", "where",
))  # fmt: skip
_ENDINGS = ("ingly", "edly", "ings", "ing", "ies", "ied", "es", "ed", "ly", "s", "d", "e", "y")


@dataclasses.dataclass(frozen=True)
class Expansion:
    """A prompt and what is to be sampled in its place. reason: why that is the prompt itself, or "". answered: whether
    there was a proposal at all."""

    prompt: str
    text: str
    reason: str = ""
    answered: bool = True

    @property
    def expanded(self) -> bool:
        return not self.reason


class Expander(Protocol):
    """Who proposes longer prompts."""

    def propose(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str | Exception]:
        """One for each prompt, a pure function of it and its seed; or an AnswerError or UserError about it alone."""
        ...


class RunExpander:
    """By a model that was trained here on pairs of captions."""

    def __init__(self, run: CaptionRun, settings: DecodingConfig | None = None):
        self.run, self.kind = run, run.writer.config.kinds[-1]
        self.settings = settings or DecodingConfig("nucleus", max_tokens=run.max_tokens, top_p=0.9)

    def propose(self, prompts, seeds):
        known, results = [], [None] * len(prompts)
        for i, prompt in enumerate(prompts):
            try:
                self.run.writer.tokenizer.encode(prompt, "the prompt")
                known.append(i)
            except UserError as error:
                results[i] = error
        texts = self.run.writer.captions([prompts[i] for i in known], self.kind, self.settings,
                                         seeds=[seeds[i] for i in known])  # fmt: skip
        for i, text in zip(known, texts):
            results[i] = text
        return results


class EndpointExpanders:
    """By a language model behind an endpoint; `one`: `caption_endpoint.EndpointExpander`."""

    def __init__(self, one):
        self.one = one

    def propose(self, prompts, seeds):
        results = []
        for prompt, seed in zip(prompts, seeds):
            try:
                results.append(self.one.propose(prompt, seed))
            except AnswerError as error:
                results.append(error)
        return results


def expand(prompts: Sequence[str], expander: Expander, seed: int = 0, tries: int = TRIES) -> list[Expansion]:
    """Longer prompts, a function of the prompts, the expander and the seed alone.

    Args:
        seed: of the first prompt; prompt k has seed + k. tries: proposals for each, of which the first that keeps all
            is taken. Who gave no answer, after its own tries, is not asked again.
    """
    reasons, found = ["there was no proposal"] * len(prompts), [None] * len(prompts)
    silent = set()
    for attempt in range(tries):
        open_ = [k for k, text in enumerate(found) if text is None and k not in silent]
        if not open_:
            break
        # Seeds of different prompts and attempts are far apart: one prompt's second try is not another's first.
        seeds = [int(np.random.SeedSequence([seed + k, attempt]).generate_state(1)[0] >> 1) for k in open_]
        for k, text in zip(open_, expander.propose([prompts[k] for k in open_], seeds)):
            if isinstance(text, Exception):
                reasons[k] = str(text)
                if isinstance(text, NoAnswerError):
                    silent.add(k)
                continue
            lost = lost_of(prompts[k], text)
            if lost:
                reasons[k] = f"proposals lose {', '.join(lost[:4])}"
            elif len(text) > MOST:
                reasons[k] = f"proposals are longer than {MOST} characters"
            else:
                found[k] = text
    return [Expansion(prompt, text or prompt, "" if text else reason, k not in silent)
            for k, (prompt, text, reason) in enumerate(zip(prompts, found, reasons))]  # fmt: skip


def lost_of(prompt: str, longer: str) -> list[str]:
    """What a longer prompt leaves out or changes of a prompt, in words; nothing where it keeps all."""
    short = read_caption(prompt)
    if short is None:
        return _lost_words(prompt, longer)
    if " ".join(prompt.split()) == " ".join(longer.split()):
        return []
    long = read_caption(longer)
    if long is None:  # told in other words: each of the prompt's has to be there
        return _lost_words(prompt, longer)
    return keeps(short, long)


def _lost_words(prompt: str, longer: str) -> list[str]:
    there, places = [_stem(word) for word in _words(longer)], {}
    for place, word in enumerate(there):
        places.setdefault(word, []).append(place)
    words = _words(prompt)
    lost = [word for word in words if word not in EMPTY_WORDS and _stem(word) not in places]
    for a, b in zip(words, words[1:]):  # a red dog and a blue cat: whose colour is which
        if not {a, b} & (EMPTY_WORDS | set(lost)) and not any(
            0 < q - p <= WINDOW for p in places[_stem(a)] for q in places[_stem(b)]
        ):
            lost.append(f"{a} {b}")
    return list(dict.fromkeys(lost))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def _stem(word: str) -> str:
    """A word without the ending that its form has: moves, moved and moving are one."""
    word = re.sub(r"['’]s?$", "", word)
    if word.isdecimal():
        return word
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiou" else word


def style_of(workdir: str, most: int = 4) -> dict:
    """What an endpoint is shown of the captions that a run was trained on: `examples`, pairs (short, detailed), where
    they are of both kinds, and else `style`, captions alone."""
    data = config_lib.read_config(workdir).data.to_dict()
    path = next((part["path"] for part in data.get("mixture") or ()), data.get("path"))
    if not path and not data.get("mixture"):
        return {}
    folder = os.path.join(workdir, "latents") if not is_shards(path) else shards_folder(path)
    if (path or "world") == "world" or not splits(folder):
        source = open_source(dict(data, caption_mix=f"{SHORT}:1,{DETAILED}:1" if path == "world" else ""))
        captions = [source.captions(i) if getattr(source, "caption_kinds", ()) else {CAPTION: source.spec(i).caption}
                    for i in _spread(len(source), most)]  # fmt: skip
    else:
        shards = LatentShards(folder, splits(folder)[0])
        names = {f"{KIND_CAPTION}{kind}": kind for kind in shards.caption_kinds} | {"caption": CAPTION}
        captions = [{kind: record[name] for name, kind in names.items()}
                    for record in map(shards.record, _spread(len(shards), most))]  # fmt: skip
    if all(SHORT in c and DETAILED in c for c in captions):
        return dict(examples=[(c[SHORT], c[DETAILED]) for c in captions])
    return dict(style=[c.get(CAPTION) or next(iter(c.values())) for c in captions])


def _spread(count, most):
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()
