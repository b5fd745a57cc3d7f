"""Our networks and samplers against what diffusers and transformers computed (`tests/fixtures/make_fixtures.py`).

Tolerances: 1e-4 of the reference's largest value, the limit set for float32 networks whose sums run in another
order. What is measured is 1e-6 to 1e-5.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sorax import convert, read_weights, sampler
from sorax.dit import DiT
from sorax.functional import abstract
from sorax.patchify import patchify, positions, unpatchify
from sorax.text import MAX_SLOTS, TextEncoder, slot_bias
from sorax.vae import VAE

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
REFERENCE = dict(np.load(FIXTURES / "reference.npz"))
SOLVERS = dict(np.load(FIXTURES / "solvers.npz"))
TOLERANCE = 1e-4


def reference(prefix):
    """The arrays under a prefix, videos and latents with channels last."""
    arrays = {k.removeprefix(f"{prefix}/"): v for k, v in REFERENCE.items() if k.startswith(f"{prefix}/")}
    return {k: np.moveaxis(v, 1, -1) if v.ndim == 5 else v for k, v in arrays.items()}


def assert_close(ours, theirs, tolerance=TOLERANCE):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def bind(cls, config, params):
    """A module with these parameters."""
    graphdef, _ = abstract(cls, config)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def pipeline():
    return convert.read_diffusers(FIXTURES / "wan")


@pytest.fixture(scope="module")
def dit(pipeline):
    return bind(DiT, pipeline.dit_config, pipeline.dit)


@pytest.mark.parametrize("name", ["vae", "vae_patch"])
@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_vae_equals_the_streaming_reference(name, num_frames):
    """Our whole-clip form and diffusers' form with caches, chunk by chunk, are one function."""
    vae = bind(VAE, *convert.read_vae(FIXTURES / ("wan/vae" if name == "vae" else name)))
    case = reference(f"{name}/{num_frames}")
    mean, logvar = jax.jit(vae.encode)(jnp.asarray(case["video"]))
    assert_close(mean, case["mean"])
    assert_close(logvar, case["logvar"])
    # diffusers clips at the end; ours leaves that to whoever writes pixels.
    assert_close(jnp.clip(jax.jit(vae.decode)(jnp.asarray(case["z"])), -1, 1), case["decoded"])


@pytest.mark.parametrize("name", ["umt5", "t5"])
def test_text_encoder_equals_reference(name):
    config, params = convert.open_text(FIXTURES / ("wan/text_encoder" if name == "umt5" else name))
    encoder = bind(TextEncoder, config, read_weights.load(params))
    case = reference(name)
    ids, mask = case["ids"], case["mask"]
    embeds = jax.jit(encoder)(jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32))
    assert_close(embeds, case["embeds"] * mask[..., None])  # beyond the caption Wan reads zeros


def test_text_encoder_of_packed_captions_equals_reference(pipeline):
    encoder = bind(TextEncoder, pipeline.text_config, pipeline.text)
    case = reference("umt5")
    lengths = case["mask"].sum(1)
    ids = np.concatenate([np.append(row[:n], 0) for row, n in zip(case["ids"], lengths)])
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths + 1)
    expected = np.concatenate([np.pad(row[:n], ((0, 1), (0, 0))) for row, n in zip(case["embeds"], lengths)])
    assert_close(jax.jit(encoder)(jnp.asarray(ids)[None], jnp.asarray(segments)[None])[0], expected)


def test_one_empty_slot_stands_for_all_unused():
    ids = jnp.asarray([[5, 6, 7, 0, 9, 0]])
    bias = slot_bias(ids, jnp.asarray([[1, 1, 1, 1, 2, 2]]), 2)[0]
    np.testing.assert_allclose(bias, [0, 0, 0, np.log(MAX_SLOTS - 3), 0, np.log(MAX_SLOTS - 1)], rtol=1e-6)


@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in SOLVERS}))
def test_solvers_equal_reference_step_for_step(case):
    """Euler, UniPC and DPM++ of orders 1 to 3; the reference computes its weights in float32."""
    name, num_steps, shift, order = case.split("/")
    solver = sampler.make_solver(name, int(num_steps), float(shift), int(order))
    np.testing.assert_allclose(solver.sigmas, SOLVERS[f"{case}/sigmas"], atol=1e-6)
    np.testing.assert_allclose(1000 * solver.levels, SOLVERS[f"{case}/timesteps"], rtol=1e-6)
    met = []  # what each step begins with

    def velocity(x, level):
        met.append(np.asarray(x))
        return jnp.sin(2 * x) * (1 + level)

    trajectory = SOLVERS[f"{case}/trajectory"]
    with jax.disable_jit():
        end = sampler.integrate(velocity, jnp.asarray(trajectory[0]), solver)
    assert len(met) == len(solver.levels)
    for x, theirs in zip([*met, end], trajectory, strict=True):
        assert_close(x, theirs, 1e-5)


def test_prompt_to_pixels_equals_the_whole_pipeline(pipeline, dit):
    """Four Euler steps with guidance 3: the prompt and the empty caption ride in one row, as two samples."""
    case = reference("pipeline")
    shape, config = case["noise"].shape[1:4], dit.config
    # Byte tokens: the reference was made with the tokenizer of ByT5.
    captions = [[b + 3 for b in text.encode()] + [1, 0] for text in ("a red circle moving right", "")]
    text_tokens = jnp.asarray([[*captions[0], *captions[1]]])
    text_ids = jnp.asarray([[1] * len(captions[0]) + [2] * len(captions[1])])
    text = jax.jit(bind(TextEncoder, pipeline.text_config, pipeline.text))(text_tokens, text_ids)
    bias = slot_bias(text_tokens, text_ids, 2)
    where = jnp.asarray(positions(*shape, config.patch_size))
    n = len(where)
    where, ids = jnp.tile(where, (2, 1))[None], jnp.repeat(jnp.asarray([1, 2]), n)[None]

    @jax.jit
    def velocity(tokens, sigma):
        levels = jnp.stack([0.0, sigma, sigma])[None]
        out = dit(jnp.tile(tokens, (1, 2, 1)), where, ids, levels, ids, text, text_ids, bias)
        return sampler.guide(out[:, :n], out[:, n:], 3.0)

    noise = jnp.asarray(patchify(case["noise"], config.patch_size))
    tokens = sampler.integrate(velocity, noise, sampler.make_solver("euler", 4, pipeline.shift))
    latents = unpatchify(tokens, shape, config.patch_size)
    assert_close(latents, case["latents"])
    vae = bind(VAE, pipeline.vae_config, pipeline.vae)
    video = jnp.clip(jax.jit(vae.decode)(vae.denormalize(latents)), -1, 1)
    # Both in [0, 1]; half a level of 8 bits.
    np.testing.assert_allclose(video / 2 + 0.5, REFERENCE["pipeline/video"], atol=0.5 / 255)
