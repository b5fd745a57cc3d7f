"""Parameters for tests: no matrix is zero at the start, and no norm or bias is trivial."""

import jax
import numpy as np

from sorax.functional import abstract
from sorax.sharding import path_string


def random_params(cls, config, seed=0):
    """(graphdef, params) of a network: kernels of unit gain, everything else near its usual start."""
    graphdef, shapes = abstract(cls, config)
    rng = np.random.default_rng(seed)

    def draw(path, x):
        path = path_string(path)
        noise = rng.standard_normal(x.shape).astype(np.float32)
        if path.endswith("kernel"):
            stacked = len(x.shape) == 3  # layers of the DiT; a convolution has five axes
            return noise / np.float32(np.sqrt(np.prod(x.shape[stacked:-1])))
        if path.endswith("embedding"):
            return noise
        near_one = path.rsplit("/", 1)[-1] in ("scale", "gamma", "norm_q", "norm_k", "norm_scale", "latents_std")
        return np.float32(near_one) + np.float32(0.1) * noise

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


def assert_close(ours, theirs, tolerance=1e-5):
    """Every leaf within `tolerance` of the largest value of its reference."""
    ours, theirs = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (ours, theirs))
    assert len(ours) == len(theirs)
    for (path, a), (_, b) in zip(ours, theirs):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{path_string(path)}: {a.shape} and {b.shape}"
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)
        assert error <= tolerance, f"{path_string(path) or 'value'}: relative error {error:.2e}"
