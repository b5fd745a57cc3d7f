"""Operations are counted as the networks do them: by hand where it is easy, by their own programs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sorax import flops
from sorax.captioner import Captioner, CaptionerConfig
from sorax.dit import DiT, DiTConfig
from sorax.functional import abstract
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAEConfig

DIT = DiTConfig(num_layers=3, num_heads=2, head_dim=12, ffn_dim=40, text_dim=16, freq_dim=8)
TEXT = TextConfig(vocab_size=32, width=16, num_layers=2, num_heads=2, head_dim=12, ffn_dim=24)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_products_and_convolutions_are_counted_through_loops_and_branches():
    def function(x, w, kernel):
        x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)
        image = x.reshape(1, 4, 2, 5)
        padding = ((0, 0), (1, 1))
        conv = jax.lax.conv_general_dilated(image, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.cond(x[0, 0] > 0, lambda: conv.sum(), lambda: (x @ x.T).sum())

    counted = flops.traced(jax.jit(function), shape(4, 10), shape(7, 10, 10), shape(1, 3, 5, 6))
    scan, conv, branch = 7 * 2 * 4 * 10 * 10, 2 * (4 * 2 * 6) * (1 * 3 * 5), 2 * 4 * 4 * 10
    assert counted == scan + conv + branch


def dit_program(N, M, S):
    """Operations of the DiT's own program on a row that is one segment."""
    graphdef, params = abstract(DiT, DIT)
    ids = shape(1, N, dtype=jnp.int32)
    rows = shape(1, N, DIT.patch_dim), shape(1, N, 3, dtype=jnp.int32), ids, shape(1, S), ids
    text = shape(1, M, DIT.text_dim), shape(1, M, dtype=jnp.int32), shape(1, M)
    return flops.traced(lambda params, *row: nnx.merge(graphdef, params)(*row), params, *rows, *text)


def test_the_dit_is_counted_as_its_program_does_it():
    N, M, S = 50, 9, 2
    level_table = 2 * N * S * DIT.width * (6 * DIT.num_layers + 2)  # a look-up, by a product
    rope_table = 2 * 2 * N * (DIT.head_dim // 2) * DIT.head_dim  # cosines and sines are spread by a product each
    assert dit_program(N, M, S) == flops.dit_forward(DIT, [N], [M], levels=S) + level_table + rope_table


def test_the_dit_by_hand():
    D, F, L, s, m = 24, 40, 3, 10, 4
    one_token = L * (8 * D * D + 4 * D * D + 4 * D * F) + 2 * D * 64 * 2  # q, k, v, o; q, o to text; MLP; both ends
    one_slot = L * 4 * D * D + 2 * 16 * D + 2 * D * D  # k, v of the text; the MLP before
    pairs = L * 4 * D * (s * s + s * m)
    level = 2 * (8 * D + D * D + 6 * D * D)
    assert flops.dit_forward(DIT, [s], [m]) == s * one_token + m * one_slot + pairs + level


def test_attention_costs_by_segment_and_not_by_row():
    several, one = flops.dit_attention(DIT, [10] * 4, [3] * 4), flops.dit_attention(DIT, [40], [12])
    assert several * 4 == one


def test_the_text_encoder_is_counted_as_its_program_does_it():
    M = 20
    graphdef, params = abstract(TextEncoder, TEXT)
    ids = shape(1, M, dtype=jnp.int32)
    counted = flops.traced(lambda params, *row: nnx.merge(graphdef, params)(*row), params, ids, ids)
    bias_table = TEXT.num_layers * 2 * (2 * M) * TEXT.num_buckets * TEXT.num_heads  # a look-up, by a product
    assert counted == flops.text_forward(TEXT, [M]) + bias_table


def test_the_captioner_is_counted_as_its_program_does_it():
    config = CaptionerConfig(reads="latents", in_channels=2, patch_size=(1, 2, 2), vocab_size=11, encoder_layers=3,
                             decoder_layers=2, num_heads=2, head_dim=8, ffn_dim=24)  # fmt: skip
    N, M, A = 10, 6, config.head_dim
    graphdef, params = abstract(Captioner, config)
    ids, text_ids = shape(1, N, dtype=jnp.int32), shape(1, M, dtype=jnp.int32)
    row = shape(1, N, config.patch_dim), shape(1, N, 3, dtype=jnp.int32), ids, text_ids, text_ids, text_ids
    counted = flops.traced(lambda params, *row: nnx.merge(graphdef, params)(*row), params, *row)
    work = flops.captioner_work(config, dict(segment_ids=np.ones((1, N), int), text_segment_ids=np.ones((1, M), int)))
    rope_tables = 2 * 2 * (N + M) * (A // 2) * A
    assert 3 * (counted - rope_tables) == work["model_flops"]


def test_a_vae_is_counted_by_clip():
    small = VAEConfig(base_width=4, width_multipliers=(1, 2), temporal_downsample=(True,), latent_channels=3)
    few, decoded = flops.vae_forward(small, 5, 16, 24)
    many, _ = flops.vae_forward(small, 9, 16, 24)
    assert 0 < few < many and decoded > few  # the decoder has a block more at each size
    assert flops.vae_work(small, (2, 5, 16, 24, 3)) == dict(frames=10, model_flops=3 * 2 * (few + decoded))


def test_a_batch_is_counted_by_what_it_holds():
    ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    text_ids = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    work = flops.rows_work(DIT, TEXT, dict(segment_ids=ids, text_segment_ids=text_ids))
    assert (work["samples"], work["tokens"], work["useful_tokens"]) == (3, 12, 9)
    expected = flops.dit_forward(DIT, [3, 2, 4], [2, 3, 2], levels=5) + flops.text_forward(TEXT, [2, 3, 2])
    assert work["model_flops"] == 3 * expected
