"""The tokenizer: any caption comes back, the same captions make the same tokenizer, and bad files are named."""

import json
import pathlib

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import survey
from data_pipelines.sources import SampleSpec
from data_pipelines.text_tokens import EOS_ID, MAX_TOKENS, MIN_VOCAB, PAD_ID, Tokenizer, clean
from data_pipelines.world import World, WorldConfig
from sorax.dit_data import prepare_tokenizer
from sorax.errors import UserError

WORLD = World(WorldConfig(num_samples=500, num_objects=(1, 1), motions=("straight",)))
CAPTIONS = [WORLD.spec(i).caption for i in range(len(WORLD))]
TOKENIZER = Tokenizer.train(CAPTIONS, 512)
BYTES = Tokenizer.train([], MIN_VOCAB)  # learned nothing: every byte is a token
SPELT = "</s> a red</s>circle <pad><unk> "


def test_captions_are_cleaned_as_wan_cleans_them():
    """Mojibake, entities (escaped twice, too) and white space; what is clean stays, in any script."""
    assert clean("  a red\n\tcircle ") == "a red circle"
    assert clean("dÃ©jÃ\xa0 vu &amp;amp; &quot;more&quot;") == 'déjà vu & "more"'
    for caption in ("a red circle", "красный круг", "赤い円", ""):
        assert clean(caption) == caption


@given(st.text(st.characters(codec="ascii", exclude_characters="&")))
def test_plain_text_is_not_mended_and_needs_none(text):
    assert clean(text) == " ".join(ftfy.fix_text(text).split())


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=100) | st.text("a red</s>\t", max_size=100))
def test_any_caption_comes_back(caption):
    """Cleaned; its end mark stands at the end alone, and padding is not read."""
    for tokenizer in (TOKENIZER, BYTES):
        ids = tokenizer.encode(caption)
        assert ids.dtype == np.int32 and ids[-1] == EOS_ID
        assert ids[:-1].min(initial=3) >= 3 and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, PAD_ID, PAD_ID]) == clean(caption)


@pytest.mark.parametrize("caption", ["красный круг", "赤い円 🔴", "👩‍👩‍👧 ﷽", "\ud800 half a pair", "&#xD83D;", SPELT])
def test_what_was_never_seen_is_made_of_bytes(caption):
    ids = TOKENIZER.encode(caption)
    assert TOKENIZER.decode(ids) == clean(caption)
    assert not {*ids[:-1].tolist()} & {0, 1, 2}


def test_an_empty_caption_is_the_end_mark_alone():
    for caption in ("", " \n", "&nbsp;"):
        np.testing.assert_array_equal(TOKENIZER.encode(caption), [EOS_ID])


def test_captions_of_the_world_take_a_token_a_word():
    assert len(TOKENIZER.encode("a red circle moving right")) == 6
    assert np.mean([len(TOKENIZER.encode(caption)) for caption in CAPTIONS]) < 8
    first, second = (TOKENIZER.encode(caption).tolist() for caption in ("red circle", "a red circle"))
    assert first == second[1:]


def test_the_same_captions_make_the_same_tokenizer():
    again = Tokenizer.train(CAPTIONS[::-1], 512)
    assert again.content == TOKENIZER.content and again.identity == TOKENIZER.identity
    for captions, size in ((CAPTIONS[1:], 512), (CAPTIONS, 300)):
        assert Tokenizer.train(captions, size).identity != TOKENIZER.identity
    assert Tokenizer.train(CAPTIONS, 300).vocab_size == 300


def test_a_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path / "new", TOKENIZER.vocab_size)
    assert loaded.identity == TOKENIZER.identity
    for caption in (*CAPTIONS[:9], SPELT):
        np.testing.assert_array_equal(loaded.encode(caption), TOKENIZER.encode(caption))


def test_a_caption_that_is_too_long_is_named():
    assert len(BYTES.encode("x" * 510)) == MAX_TOKENS  # with the space before it and the end mark
    with pytest.raises(UserError, match=r"caption of clip_7\.mp4 has 512 tokens \(it begins 'xxx.*at most 511"):
        BYTES.encode("x" * 511, key="clip_7.mp4")


def test_a_vocabulary_holds_every_byte():
    assert BYTES.vocab_size == MIN_VOCAB == 259
    with pytest.raises(UserError, match=r"258 tokens is too small.*259.*text\.vocab_size"):
        Tokenizer.train(CAPTIONS, 258)


def without_end_mark(text):
    return json.dumps(json.loads(text) | {"post_processor": None})


SPOILT = {
    "missing": (None, "cannot be read"),
    "cut": (lambda text: text[:-100], "is no tokenizer"),
    "empty": (lambda text: "", "is no tokenizer"),
    "of another kind": (lambda text: "{}", "is no tokenizer"),
    "without end mark": (without_end_mark, "not end captions with token 1"),
    "with other padding": (lambda text: text.replace("<pad>", "[PAD]"), "pad with <pad> = 0"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_is_named_with_the_reason(name, tmp_path):
    spoil, reason = SPOILT[name]
    if spoil:
        (tmp_path / "tokenizer.json").write_text(spoil(TOKENIZER.content.decode()))
    with pytest.raises(UserError, match=f"tokenizer.json .*{reason}"):
        Tokenizer.load(tmp_path)


class Captions:
    """A source that knows its captions only."""

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def spec(self, index):
        return SampleSpec(1, 8, 8, 8.0, self.captions[index], str(index))


def test_a_run_folder_keeps_its_tokenizer(tmp_path, monkeypatch):
    """Trained on captions from first to last; one that is there is read, if the vocabulary has room for it. So are
    those of runs that were begun when "" meant to train one."""
    monkeypatch.setattr(survey, "MAX_CAPTIONS", 3)
    captions = survey.survey(Captions(["first", "no", "mid", "no", "last"])).captions
    made = prepare_tokenizer(captions, 300, tmp_path, "bpe")
    assert made.identity == Tokenizer.train(["first", "mid", "last"], 300).identity
    for wanted in ("bpe", ""):
        assert prepare_tokenizer(["other"], 300, tmp_path, wanted).identity == made.identity
    with pytest.raises(UserError, match=rf"tokenizer.json has {made.vocab_size} tokens.*vocab_size is 260"):
        prepare_tokenizer(["first"], 260, tmp_path)


# --- Other tokenizers

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "tokenizers"
REFERENCE = json.loads((FIXTURES / "ids.json").read_text())


def others():
    t5 = {name: Tokenizer.load(FIXTURES / name) for name in ("t5", "t5_json")}
    return t5 | {"byt5": Tokenizer.of_bytes()}


@pytest.mark.parametrize("name", ["t5", "t5_json", "byt5"])
def test_ids_are_those_of_transformers(name):
    """200 prompts in many scripts, with emoji, NUL, empty and over-long ones; those that do not fit are refused."""
    tokenizer, refused = others()[name], 0
    for prompt, expected in zip(REFERENCE["prompts"], REFERENCE[name.removesuffix("_json")], strict=True):
        if len(expected) == MAX_TOKENS:  # cut off there
            with pytest.raises(UserError, match="at most 511 fit"):
                tokenizer.encode(prompt)
            refused += 1
        else:
            np.testing.assert_array_equal(tokenizer.encode(prompt), expected)
    assert len(REFERENCE["prompts"]) == 200 and 0 < refused < 40


@pytest.mark.parametrize("name", ["t5", "t5_json", "byt5"])
def test_other_tokenizers_are_kept_and_found_again(name, tmp_path):
    tokenizer = others()[name]
    assert not Tokenizer.is_in(tmp_path)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path, tokenizer.vocab_size)
    assert Tokenizer.is_in(tmp_path) and loaded.identity == tokenizer.identity
    caption = "a red circle moving right"
    np.testing.assert_array_equal(loaded.encode(caption), tokenizer.encode(caption))
    assert loaded.decode([*loaded.encode(caption), PAD_ID]) == caption


def test_a_run_takes_the_tokenizer_that_is_wanted(tmp_path):
    """Bytes unless told otherwise; whatever else a file of ByT5's says."""
    folder = str(FIXTURES / "t5")
    assert prepare_tokenizer([], 800, tmp_path / "a", folder).identity == Tokenizer.load(folder).identity
    for wanted in ("", "bytes", ""):
        assert prepare_tokenizer([], 384, tmp_path / "b", wanted).identity == Tokenizer.of_bytes().identity
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "pad_token": "<pad>"}')
    for wanted in ("bytes", str(tmp_path / "b")):
        assert prepare_tokenizer([], 384, tmp_path / "c", wanted).identity == Tokenizer.of_bytes().identity
    for there, wanted in (("a", "bytes"), ("a", "bpe"), ("b", "bpe"), ("b", folder)):
        with pytest.raises(UserError, match=rf"another tokenizer \(\w+\.\w+\) than '{wanted}', which config\.data"):
            prepare_tokenizer([], 800, tmp_path / there, wanted)
    with pytest.raises(UserError, match=r"has 384 tokens, but config\.text\.vocab_size is 300"):
        prepare_tokenizer([], 300, tmp_path / "d")
    with pytest.raises(UserError, match=r"is 'byte': use bytes, bpe or a folder"):
        prepare_tokenizer([], 800, tmp_path / "d", "byte")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("content, reason", [(b"no model", "is no tokenizer"), (b"", "is no tokenizer")])
def test_a_spoilt_sentencepiece_model_is_named(content, reason, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=f"spiece.model .*{reason}"):
        Tokenizer.load(tmp_path)
