"""Between modules and plain pytrees: the keys that parameters are drawn with."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sorax import functional
from sorax.dit import DiT, DiTConfig

CONFIG = DiTConfig(num_layers=2, num_heads=2, head_dim=12, ffn_dim=16, text_dim=8, freq_dim=8, in_channels=2,
                   out_channels=2)  # fmt: skip


@pytest.mark.parametrize("seed", [7, jax.random.key(7), jax.random.PRNGKey(7)], ids=["seed", "key", "old key"])
def test_keys_are_those_of_flax(seed):
    ours, theirs = functional.Keys(params=seed), nnx.Rngs(params=seed)
    for _ in range(3):
        draws = [np.asarray(jax.random.normal(rngs.params(), (4,))) for rngs in (ours, theirs)]
        np.testing.assert_array_equal(*draws)


def test_the_shapes_of_a_model_are_those_of_its_parameters():
    _, shapes = functional.abstract(DiT, CONFIG)
    params = functional.init(DiT, CONFIG, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_a_model_is_traced_once_and_what_a_caller_changes_is_his_own():
    made = []

    class Counted(DiT):
        def __init__(self, config, rngs):
            made.append(config)
            super().__init__(config, rngs)

    first = functional.abstract(Counted, CONFIG)[1]
    del first["blocks"]
    assert "blocks" in functional.abstract(Counted, CONFIG)[1] and made == [CONFIG]
    functional.abstract(Counted, dataclasses.replace(CONFIG, ffn_dim=8))
    assert len(made) == 2
