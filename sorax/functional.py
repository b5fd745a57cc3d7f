"""Between Flax NNX modules and plain pytrees: outside a module everything is a function of a nested dict of arrays."""

import jax
import jax.numpy as jnp
from flax import nnx

_TRACED = {}  # (class, its config in words) -> what `abstract` gives


class Keys:
    """The keys of `nnx.Rngs(params=)`, counted in Python; in its place for layers that ask for `rngs.params()` alone.

    nnx counts in arrays: where a model is traced for its shapes, every one of them becomes a part of the program, and
    nnx asks each for a sharding that it has not, for which jax writes an error about all of the program so far.

    params: a key, or a Python int, the seed.
    """

    def __init__(self, params):
        self.key, self.count = jax.random.key(params) if isinstance(params, int) else params, 0

    def params(self):
        """The next key."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def abstract(cls, config):
    """Graph definition and parameter shapes (nested dict of ShapeDtypeStruct) of `cls(config, rngs)`, at no memory."""
    key = (cls, repr(config))
    if key not in _TRACED:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config, Keys(params=0))))
        if not isinstance(cls, type):  # a function, which may be another one each time
            return graphdef, nnx.to_pure_dict(state)
        _TRACED[key] = graphdef, nnx.to_pure_dict(state)
    graphdef, shapes = _TRACED[key]
    return graphdef, jax.tree.map(lambda shape: shape, shapes)  # what a caller changes is his own


def init(cls, config, key):
    """Fresh parameters of `cls(config, rngs)` as a nested dict; may run under `jax.jit`."""
    params = nnx.to_pure_dict(nnx.split(cls(config, Keys(params=key)))[1])
    # A weakly typed leaf (made from Python numbers alone) would make the second training step compile again.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), params)


def cast(params, dtype):
    """Floating-point leaves in another dtype: what the forward pass computes in."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def count(params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
