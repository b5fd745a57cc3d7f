"""Prompts made longer: what is sampled says all that the prompt said, or is the prompt; a seed gives it again."""

import json

import pytest
from fake_endpoint import completion, serving

from data_pipelines.world import World, WorldConfig
from sorax import cli
from sorax.endpoint import AnswerError, NoAnswerError
from sorax.expand import TRIES, expand, lost_of

WORLD = World(WorldConfig(num_samples=300, num_objects=(1, 2), kinds=("short", "detailed")))
PROMPT = "a red circle moving right"
GOOD = "One object on a plain navy background. A small red circle starts on the left and moves right fast."


class Scripted:
    """Proposes what it is told to, in turn; remembers the seeds."""

    def __init__(self, *texts):
        self.texts, self.seeds = list(texts), []

    def propose(self, prompts, seeds):
        self.seeds.append(list(seeds))
        return [self.texts.pop(0) if len(self.texts) > 1 else self.texts[0] for _ in prompts]


def test_the_first_proposal_that_keeps_all_is_taken():
    expander = Scripted(GOOD.replace("red", "green"), AnswerError("busy"), GOOD, "not asked for")
    (found,) = expand([PROMPT], expander, seed=3)
    assert (found.text, found.reason, found.expanded) == (GOOD, "", True)
    again = Scripted(GOOD.replace("red", "green"), AnswerError("busy"), GOOD)
    expand([PROMPT], again, seed=3)
    assert again.seeds == expander.seeds and len({seed for (seed,) in again.seeds}) == 3


def test_where_none_does_the_prompt_stays_and_why_is_said():
    expander = Scripted(GOOD.replace("moves right", "moves left"))
    (found,) = expand([PROMPT], expander)
    assert found.text == PROMPT and not found.expanded and "red circle right" in found.reason
    assert len(expander.seeds) == TRIES
    assert "busy" in expand([PROMPT], Scripted(AnswerError("busy")))[0].reason
    silent = Scripted(NoAnswerError("nobody"), GOOD)
    assert not expand([PROMPT], silent)[0].answered and len(silent.seeds) == 1
    assert "longer than" in expand(["a dog"], Scripted("a dog " * 1000))[0].reason


def test_every_world_prompt_is_kept_whatever_is_proposed():
    """Nothing of 300 prompts is lost: not with the right proposals, not with those of other clips."""
    shorts = [WORLD.captions(i)["short"] for i in range(300)]
    longs = [WORLD.captions(i)["detailed"] for i in range(300)]
    right = expand(shorts, Scripted(*longs), tries=1)
    wrong = expand(shorts, Scripted(*longs[1:], longs[0]), tries=1)
    assert all(not lost_of(found.prompt, found.text) for found in right + wrong)
    assert sum(found.expanded for found in right) > 200 and sum(found.expanded for found in wrong) < 30


@pytest.mark.parametrize("prompt, longer, lost", [
    ("a dog running on the beach", "At noon a brown dog runs along the sandy beach, splashing.", []),
    ("a dog running on the beach", "A brown dog runs in a park.", ["beach"]),
    ("two cats sleeping", "Cats sleep in the sun.", ["two"]),
    ("a red dog and a blue cat", "A blue dog sits beside a red cat.", ["red dog", "blue cat"]),
    ("a red dog and a blue cat", "A large red dog lies by a small blue cat.", []),
    ("no people, an empty street", "An empty street at night.", ["no", "people"]),
    ("ein roter Kreis", "Ein roter Kreis auf schwarzem Grund.", []),
    ("红色的圆形", "A red circle.", ["红色的圆形"]),
    (PROMPT, "A red circle is slowly moving right over a lawn.", []),  # of the grammar, but its expansion is not
    (PROMPT, "A red circle on a lawn.", ["moving", "right", "circle moving", "moving right"]),
])  # fmt: skip
def test_what_is_lost_of_other_prompts_is_found_word_by_word(prompt, longer, lost):
    found = lost_of(prompt, longer)
    assert set(found) <= set(lost) and bool(found) == bool(lost)


def expand_by(server, *more):
    return cli.main(["expand", *more, "--endpoint", server.url, "--model", "m"])


def test_expansions_are_shown_kept_and_edited(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pin = tmp_path / "pinned.json"
    with serving(then=completion(json.dumps(dict(detailed="A large brown dog runs.")))) as server:
        assert expand_by(server, "a dog running", "a cat", "--pin", str(pin)) == 0
        out = capsys.readouterr().out
        assert "A large brown dog runs." in out and "as it was: proposals lose cat" in out
        calls = len(server.requests)
        assert expand_by(server, "a dog running", "a cat") == 0 and len(server.requests) == calls  # from the cache
        pinned = json.loads(pin.read_text())
        assert pinned == {"a dog running": "A large brown dog runs.", "a cat": "a cat"}
        pin.write_text(json.dumps(pinned | {"a cat": "A cat of my own words"}))
        assert expand_by(server, "a cat", "a cow", "--pin", str(pin)) == 0
        assert "A cat of my own words" in capsys.readouterr().out
    assert json.loads(pin.read_text())["a cow"] == "a cow"


def test_who_does_not_answer_is_asked_again_and_equal_prompts_have_their_own_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pin, dog = tmp_path / "pinned.json", completion(json.dumps(dict(detailed="A large brown dog runs.")))
    with serving(then=(500, b"down", {})) as server:
        assert expand_by(server, "a dog running", "--pin", str(pin), "--tries", "1") == 0
    assert not pin.exists()
    with serving(then=dog) as server:
        assert expand_by(server, "a dog running", "--pin", str(pin), "--tries", "1") == 0
        assert json.loads(pin.read_text()) == {"a dog running": "A large brown dog runs."}
        assert expand_by(server, "a dog", "a dog") == 0
        seeds = [request["seed"] for request in server.requests]
    assert len(seeds) == 3 and seeds[1] != seeds[2]


def test_what_is_missing_is_said(tmp_path, capsys):
    assert cli.main(["expand", " ", "--run", "x"]) == 2
    assert "prompt 1 is empty" in capsys.readouterr().err
    assert cli.main(["expand", "a dog"]) == 2
    assert "--run" in capsys.readouterr().err
    (tmp_path / "p.json").write_text("[1]")
    with serving() as server:
        assert expand_by(server, "a dog", "--pin", str(tmp_path / "p.json")) == 2
    assert "mend or remove" in capsys.readouterr().err
