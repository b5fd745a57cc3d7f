"""The captioner: what is packed is as if it were alone, and what is written word by word is what the model says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_params import random_params

from sorax import sharding
from sorax.attention import attention
from sorax.captioner import Captioner, CaptionerConfig, places_in_segments
from sorax.decoding import EOS_ID, DecodingConfig, nucleus, write

CONFIG = CaptionerConfig(reads="latents", in_channels=2, patch_size=(1, 2, 2), vocab_size=11, encoder_layers=2,
                         decoder_layers=2, num_heads=2, head_dim=8, ffn_dim=24)  # fmt: skip


def random_captioner(config):
    graph, params = random_params(Captioner, config)
    is_norm = lambda path: path[-1].key.startswith("norm_") and path[-1].key not in ("norm_q", "norm_k")  # noqa: E731
    return graph, jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(x + is_norm(path)), params)


GRAPH, PARAMS = random_captioner(CONFIG)
LENGTHS, TEXTS = (5, 3, 6), (4, 6, 2)  # of three samples: patches, tokens with the end mark


def samples(seed=0):
    """Patches, positions and captions of three samples."""
    rng = np.random.default_rng(seed)
    made = []
    for n, m in zip(LENGTHS, TEXTS):
        text = [*rng.integers(2, CONFIG.vocab_size, m - 1).tolist(), EOS_ID]
        made.append((rng.normal(size=(n, CONFIG.patch_dim)).astype(np.float32), rng.integers(0, 4, (n, 3)), text))
    return made


def packed(some, N=16, M=16, kinds=(1, 0, 1)):
    """One row of samples: the arguments of `Captioner.__call__`."""
    row = dict(tokens=np.zeros((N, CONFIG.patch_dim), np.float32), positions=np.zeros((N, 3), np.int32))
    row |= {name: np.zeros(n, np.int32) for name, n in
            (("segment_ids", N), ("text_tokens", M), ("text_segment_ids", M), ("text_kinds", M))}  # fmt: skip
    at = text_at = 0
    for place, (patches, where, text) in enumerate(some, 1):
        own, words = slice(at, at + len(patches)), slice(text_at, text_at + len(text) + 1)
        row["tokens"][own], row["positions"][own], row["segment_ids"][own] = patches, where, place
        row["text_tokens"][words], row["text_segment_ids"][words] = [*text, 0], place
        row["text_kinds"][words] = kinds[place - 1]
        at, text_at = own.stop, words.stop
    return {name: value[None] for name, value in row.items()}


@jax.jit
def logits(params, row):
    return nnx.merge(GRAPH, params)(**row)


def test_places_begin_anew_in_each_segment():
    places, starts = places_in_segments(jnp.array([[1, 1, 2, 2, 2, 0, 0]]))
    assert places[0, :5].tolist() == [0, 1, 0, 1, 2]
    assert starts[0].tolist() == [True, False, True, False, False, False, False]


@pytest.mark.parametrize("axis", range(3))
def test_where_a_video_is_in_time_and_space_is_seen(axis):
    row = packed(samples())
    there = logits(PARAMS, row)
    moved = logits(PARAMS, dict(row, positions=row["positions"] + np.eye(3, dtype=int)[axis]))
    assert np.abs(moved - there)[row["text_segment_ids"] != 0].max() > 1e-3 * np.abs(there).max()


def test_packed_equals_separate_forward_and_backward():
    row = packed(samples())

    def losses(params, row, place):
        own = (row["text_segment_ids"] == place)[..., None]
        return jnp.sum(jnp.where(own, jnp.sin(nnx.merge(GRAPH, params)(**row)), 0))

    value = jax.jit(jax.value_and_grad(losses))
    at = 0
    for place, (sample, kind) in enumerate(zip(samples(), (1, 0, 1)), 1):
        alone = packed([sample], kinds=(kind,))
        m = len(sample[2]) + 1
        np.testing.assert_allclose(logits(PARAMS, row)[0, at : at + m], logits(PARAMS, alone)[0, :m], atol=2e-5)
        (a, grads), (b, other) = value(PARAMS, row, place), value(PARAMS, alone, 1)
        np.testing.assert_allclose(a, b, atol=1e-4)
        for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(other)):
            np.testing.assert_allclose(x, y, atol=2e-4 * max(1, float(np.abs(y).max())))
        at += m


def test_a_word_depends_on_those_before_it_alone():
    row = packed(samples())
    changed = dict(row, text_tokens=row["text_tokens"].copy())
    changed["text_tokens"][0, 2] = 9 if row["text_tokens"][0, 2] != 9 else 8
    same = np.isclose(logits(PARAMS, row), logits(PARAMS, changed), atol=1e-6).all(-1)[0]
    assert same[:3].all() and not same[3] and same[5:].all()  # the third word is read by the fourth, of its caption


def test_the_kind_and_the_video_matter():
    row = packed(samples())
    for name in ("text_kinds", "tokens"):
        changed = row | {name: 1 - row[name]}
        assert not np.allclose(logits(PARAMS, row)[0, 0], logits(PARAMS, changed)[0, 0], atol=1e-3)


def make_step(params, row, ids):
    """The step function of captions of these segments `[B, X / B]` of rows, and an empty cache."""
    model, segment_ids = nnx.merge(GRAPH, params), row["segment_ids"]
    memories = model.memories(model.encode(row["tokens"], row["positions"], segment_ids))
    step = lambda cache, tokens, position: model.step(memories, segment_ids, ids, cache, tokens, position)  # noqa: E731
    return step, model.empty_cache(ids.size, 8, jnp.float32)


def test_word_by_word_equals_all_at_once():
    """Teacher forcing through the cache gives the logits of the packed pass."""
    some = samples()
    row, kinds, ids = packed(some), (1, 0, 1), jnp.array([[1, 2, 3]])
    step = jax.jit(lambda params, row, *args: make_step(params, row, ids)[0](*args))
    cache = make_step(PARAMS, row, ids)[1]
    expected, starts = np.asarray(logits(PARAMS, row))[0], np.cumsum([0, *(m + 1 for m in TEXTS)])
    last = jnp.array([CONFIG.start_token(kind) for kind in kinds])
    for position in range(max(TEXTS)):
        found, cache = step(PARAMS, row, cache, last, position)
        for k, (_, _, text) in enumerate(some):
            if position < len(text):
                np.testing.assert_allclose(found[k], expected[starts[k] + position], atol=2e-5)
        last = jnp.array([text[position] if position < len(text) else 0 for _, _, text in some])


@functools.cache
def writer(config):
    @jax.jit
    def write_all(params, row, ids, starts, keys):
        step, cache = make_step(params, row, jnp.repeat(ids, config.width, axis=1))
        return write(step, cache, starts, ids.reshape(-1) > 0, keys, config)

    return write_all


def written(how, row, ids, starts, keys=None, **settings):
    keys = jax.random.split(jax.random.key(0), ids.size) if keys is None else keys
    config = DecodingConfig(how, max_tokens=8, **settings)
    return np.asarray(writer(config)(PARAMS, row, ids, starts, keys))


def likelihood(row, text):
    """Log-likelihood of a caption of the first sample of a row."""
    row = {name: value.copy() for name, value in row.items()}
    row["text_tokens"][:], row["text_segment_ids"][:] = 0, 0
    row["text_tokens"][0, : len(text)], row["text_segment_ids"][0, : len(text)] = text, 1
    chances = jax.nn.log_softmax(logits(PARAMS, row))[0]
    return float(sum(chances[i, word] for i, word in enumerate(text)))


def ended(tokens):
    return tokens[: (tokens == EOS_ID).argmax() + 1].tolist() if EOS_ID in tokens else None


IDS, STARTS = jnp.array([[1, 2, 3, 0]]), jnp.array([12, 11, 12, 11])


@pytest.mark.parametrize("how", ["greedy", "nucleus", "beam"])
def test_captions_do_not_depend_on_what_is_written_beside_them(how):
    row, keys = packed(samples()), jax.random.split(jax.random.key(5), 4)
    together = written(how, row, IDS, STARTS, keys)
    assert not together[3].any()  # nothing is asked of the last
    for k in range(3):
        own = jnp.roll(STARTS, -k), jnp.roll(keys, -k)
        alone = written(how, packed([samples()[k]]), jnp.array([[1, 0, 0, 0]]), *own)
        assert together[k].tolist() == alone[0].tolist()


def test_beams_find_likelier_captions_than_the_greedy_choice_and_than_all_short_ones():
    ids, starts = jnp.array([[1]]), jnp.array([12])
    rows = (packed(samples(seed)[:1], kinds=(1,)) for seed in range(20))
    row, greedy = next((row, text) for row in rows if (text := ended(written("greedy", row, ids, starts)[0])))
    found = likelihood(row, ended(written("beam", row, ids, starts, beams=40, length_penalty=0.0)[0]))
    assert found >= likelihood(row, greedy) - 1e-4
    assert found >= max(likelihood(row, [*start, EOS_ID]) for start in ([], *([a] for a in range(2, 11)))) - 1e-4


def test_a_nucleus_is_the_fewest_tokens_with_the_chances_asked_for():
    chances = jnp.array([[0.1, 0.5, 0.05, 0.35], [1e-9, 1.0, 1e-9, 1e-9]])
    assert nucleus(jnp.log(chances), 0.8).tolist() == [[False, True, False, True], [False, True, False, False]]
    assert nucleus(jnp.log(chances), 1.0)[0].all()


def test_draws_are_a_function_of_the_seed_and_follow_the_chances():
    row, ids, starts = packed(samples()[:1]), jnp.ones((1, 300), jnp.int32), jnp.full(300, 12)
    keys = jax.random.split(jax.random.key(1), 300)
    first = written("nucleus", row, ids, starts, keys, top_p=1.0)
    assert (first == written("nucleus", row, ids, starts, keys, top_p=1.0)).all()
    expected = np.asarray(jax.nn.softmax(logits(PARAMS, dict(row, text_kinds=0 * row["text_kinds"] + 1))[0, 0]))
    share = np.bincount(first[:, 0], minlength=11) / 300
    assert np.abs(share - expected).max() < 4 * (0.25 / 300) ** 0.5  # four deviations


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, context=2), dict(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_no_number(axes):
    mesh = sharding.make_mesh(**axes)
    one = packed(samples())
    row = {name: np.concatenate([value] * 4) for name, value in one.items()}
    attend, attend_text = sharding.attention_on(mesh, attention)
    options = dict(attend=attend, attend_text=attend_text, constrain=sharding.activation_constraint(mesh))
    params = jax.device_put(PARAMS, sharding.shardings_for(PARAMS, mesh))
    run = jax.jit(lambda params, row: nnx.merge(GRAPH, params)(**row, **options))
    found = run(params, sharding.put_rows(row, mesh))
    np.testing.assert_allclose(found[2], logits(PARAMS, one)[0], atol=3e-5)
    kernels = [p for p in jax.tree.leaves(params) if p.ndim > 1]
    assert any(not p.sharding.is_fully_replicated for p in kernels)


def test_text_is_read_in_place_of_patches():
    config = CaptionerConfig(reads="text", in_channels=1, patch_size=(1, 1, 1), vocab_size=11, kinds=("detailed",),
                             encoder_layers=1, decoder_layers=1, num_heads=2, head_dim=8, ffn_dim=8)  # fmt: skip
    graph, params = random_captioner(config)
    row = packed(samples(), kinds=(0, 0, 0))
    row["tokens"] = np.arange(16).reshape(1, 16, 1) % 11
    row["positions"] = np.stack([np.arange(16), 0 * np.arange(16), 0 * np.arange(16)], -1)[None]
    out = nnx.merge(graph, params)(**row)
    turned = nnx.merge(graph, params)(**dict(row, tokens=row["tokens"][:, ::-1]))
    assert np.isfinite(out).all() and not np.allclose(out, turned)
