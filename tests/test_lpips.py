"""LPIPS against the PyTorch definition with random weights (fixtures: tests/fixtures/make_lpips_fixtures.py)."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sorax.errors import UserError
from sorax.lpips import LPIPS, tensor_shapes

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from make_lpips_fixtures import SHAPES, draw_weight, pictures  # noqa: E402

TOLERANCE = 1e-5  # relative; the reference is in float64
REFERENCE = np.load(FIXTURES / "lpips.npz")


@pytest.fixture(scope="module")
def tensors():
    return {name: draw_weight(name, shape) for name, shape in tensor_shapes().items()}


@pytest.fixture(scope="module")
def metric(tensors):
    return LPIPS.from_tensors(tensors)


@pytest.fixture(scope="module")
def distance(metric):
    """Compiled, with the weights as an argument."""
    compiled = jax.jit(lambda params, a, b: metric(a, b, params))
    return lambda a, b: compiled(metric.params, a, b)


def test_the_tensors_are_those_of_the_definition():
    assert sorted(tensor_shapes()) == REFERENCE["names"].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_distances_equal_the_definition_in_pytorch(distance, name):
    a, b = pictures(name)
    np.testing.assert_allclose(distance(a, b), REFERENCE[name], rtol=TOLERANCE)


def test_it_is_symmetric_zero_for_equal_pictures_and_positive_else(distance):
    (a, *_), (b, *_) = pictures("small")
    there, back, same = distance(np.stack([a, b, a]), np.stack([b, a, a]))
    np.testing.assert_allclose(there, back, rtol=1e-6)
    assert there > 0.01 and same < 1e-12  # the two halves of a batch may be rounded otherwise


@pytest.fixture(scope="module")
def slope(metric):
    """(distances, gradient by the first pictures), compiled."""
    compiled = jax.jit(jax.grad(lambda x, y, params: (lambda d: (jnp.sum(d), d))(metric(x, y, params)), has_aux=True))
    return lambda x, y: compiled(x, y, metric.params)[::-1]


def test_gradients_are_finite_where_pictures_are_equal_or_black_and_lead_nearer(slope):
    (a, *_), (b, *_) = pictures("small")
    black = np.full_like(a, -1.0)
    x, y = np.stack([a, black, black, a]), np.stack([a, black, b, b])
    before, gradient = slope(x, y)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0]).max() < 1e-6 < np.abs(gradient[3]).max()
    after, _ = slope(x - 1e-2 * gradient / np.sqrt(np.sum(np.square(gradient[3]))), y)
    assert after[3] < before[3]


def test_files_are_read_and_faulty_ones_are_explained(tensors, metric, tmp_path):
    path = str(tmp_path / "lpips.safetensors")
    save_file(tensors, path)
    read = LPIPS.load(path)
    jax.tree.map(np.testing.assert_array_equal, read.params, metric.params)
    faulty = {k: v for k, v in tensors.items() if not k.startswith("lin")} | {"features.0.bias": np.zeros(3)}
    save_file(faulty, path)
    with pytest.raises(UserError, match=r"lin0.* is missing; .*bias is \(3,\), not \(64,\) and 3 more: .*lpips.py"):
        LPIPS.load(path)
    spoilt = dict(tensors, strange=np.zeros(3, np.float32))
    spoilt["features.0.bias"] = np.full(64, np.nan, np.float32)
    save_file(spoilt, path)
    with pytest.raises(UserError, match=r"strange has no place; features.0.bias holds NaN"):
        LPIPS.load(path)
    pathlib.Path(path).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        LPIPS.load(path)


def test_pictures_too_small_for_four_poolings_are_refused(metric):
    with pytest.raises(UserError, match="at least 16 pixels a side, these are 16 x 15: take larger crops"):
        metric(*np.zeros((2, 1, 16, 15, 3), np.float32))
