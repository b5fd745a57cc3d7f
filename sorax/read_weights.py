"""Parameters from safetensors files: opened and checked at once, read piece by piece.

Pickles are never opened: they may run any code.
"""

import json
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sorax.errors import UserError
from sorax.sharding import path_string

BLOCK_BYTES = 2**27  # of a parameter that is gone through piece by piece
CACHED = 2**16  # numbers that are looked at together, while they are in the processor's cache
SAME = "... -> ..."  # of `convert.Name`: a tensor of theirs that has our axes
# What weights are stored as, by the names of the format.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class StoredParam:
    """A parameter of ours that is one tensor of theirs in a file, or one a layer. Reading checks that it is finite.

    `stored[i]` reads entry i of the first axis, `np.asarray(stored)` all of it, in the dtype of the file. Of a tensor
    that is stored as ours is, no more is read than is asked for.
    """

    def __init__(self, shape, parts):
        """parts: layer (None where it is not stacked) -> (`convert.Name`, file, key in it, dtype)."""
        self.shape, self._parts = tuple(shape), parts
        self.size, self.ndim = int(np.prod(shape, dtype=np.int64)), len(shape)
        self.dtype = self.dtype_of(next(iter(parts)))

    @property
    def is_stacked(self) -> bool:
        return None not in self._parts

    def dtype_of(self, layer) -> np.dtype:
        """Of the tensor of a layer; None where there are no layers."""
        return DTYPES[self._parts[layer][3]]

    @property
    def is_as_ours(self) -> bool:
        """Whether it is one tensor with our axes."""
        return not self.is_stacked and self._parts[None][0].pattern == SAME

    def __getitem__(self, index) -> np.ndarray:
        if self.is_stacked:
            return self._read(index)
        return self._read(None, index) if self.is_as_ours else self._read(None)[index]

    def __array__(self, dtype=None, copy=None):
        if not self.is_stacked:
            return np.asarray(self._read(None), dtype)
        out = np.empty(self.shape, dtype or self.dtype)
        for layer in self._parts:
            out[layer] = self._read(layer)
        return out

    def _read(self, layer, index=None):
        name, path, key, _ = self._parts[layer]
        with open_safetensors(path) as file:
            value = np.asarray(file.get_tensor(key) if index is None else file.get_slice(key)[index])
        if not is_finite(value):
            raise UserError(f"{path}: {key} holds NaN or infinite values: the file is damaged")
        return value if index is not None else name.to_ours(value)


def open_params(where, files, names, shapes, extra=None, aliases=None):
    """The parameters of one network in safetensors files, none of them read yet.

    Args:
        where: what errors call the place. files: tensor name -> file, `tensor_files`.
        names: its table of `convert.Name`; shapes: tree of ShapeDtypeStruct of our parameters.
        extra: path -> array, parameters that are not among the tensors.
        aliases: name -> other name of the same tensor.

    Returns:
        tree like `shapes` of `StoredParam`, and of the arrays of `extra`.

    Raises:
        UserError: tensors are missing, not expected, of another shape or of a dtype that is not read; or a file is
            damaged, a pickle or not there. All that is wrong is said at once, before gigabytes are read.
    """
    files, aliases, extra = dict(files), aliases or {}, extra or {}
    for alias, name in aliases.items():
        if alias in files:
            files.setdefault(name, files[alias])
    expected = {name.theirs for name in names}
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    unfilled = leaves.keys() - {name.ours for name in names} - extra.keys()
    assert not unfilled, f"the name table leaves out {sorted(unfilled)}"
    by_file, parts, misshapen, strange = {}, {}, [], []
    for name in names:
        if name.theirs in files:
            by_file.setdefault(files[name.theirs], []).append(name)
    for path, members in by_file.items():
        with open_safetensors(path) as opened:
            inside = set(opened.keys())
            for name in members:
                key = name.theirs if name.theirs in inside else _alias_of(name.theirs, aliases, inside)
                if key is None:
                    raise UserError(f"{path}: tensor {name.theirs} is not there, though the index says so")
                (found, dtype), wanted = _kind(opened, key), name.shape(leaves)
                if found != wanted:
                    misshapen.append(f"{key} has shape {found}, the config asks for {wanted}")
                if dtype not in DTYPES:
                    strange.append(f"{key} is {dtype}")
                parts.setdefault(name.ours, {})[name.layer] = name, path, key, dtype
    refuse(where, {
        "lacks {} tensor(s)": expected - files.keys(),
        "has unexpected {} tensor(s)": files.keys() - expected - aliases.keys(),
        "has {} tensor(s) of another shape": misshapen,
        f"has {{}} tensor(s) of a dtype other than {', '.join(DTYPES)}": strange,
    })  # fmt: skip
    made = {path: extra[path] if path in extra else StoredParam(leaf.shape, parts[path])
            for path, leaf in leaves.items()}  # fmt: skip
    return jax.tree_util.tree_map_with_path(lambda path, _: made[path_string(path)], shapes)


def is_finite(value) -> bool:
    """Whether all numbers of an array in one of `DTYPES` are finite."""
    flat, is_short = np.ascontiguousarray(value).reshape(-1), value.dtype.itemsize == 2
    parts = (flat[start : start + CACHED] for start in range(0, flat.size, CACHED))
    if not is_short:
        return all(np.isfinite(part).all() for part in parts)
    # By their bits: no exponent of all ones. Ten times as fast as through float32.
    ones = np.uint16(0x7F80 if value.dtype == DTYPES["BF16"] else 0x7C00)
    return all((part.view(np.uint16) & ones).max() < ones for part in parts)


def blocks(leaf):
    """A parameter's values in order, piece by piece: numpy arrays that are each a layer, or some BLOCK_BYTES of rows.

    leaf: an array, a `StoredParam` or a `checkpoint.StoredArray`. What has to be transposed, which is no larger than
    a layer of others, comes whole.
    """
    if getattr(leaf, "is_stacked", False):
        yield from (leaf[layer] for layer in range(leaf.shape[0]))
    elif isinstance(leaf, jax.Array) or not leaf.shape or not getattr(leaf, "is_as_ours", True):
        yield np.asarray(leaf)
    else:
        rows = max(1, BLOCK_BYTES * leaf.shape[0] // max(1, leaf.size * leaf.dtype.itemsize))
        for start in range(0, leaf.shape[0], rows):
            yield np.asarray(leaf[start : min(start + rows, leaf.shape[0])])


def load(params):
    """Tree of float32 numpy arrays of what is stored."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def place(params, places):
    """Tree of jax arrays of what is stored, each device's part read by the process that has the device.

    places: tree of arrays, or ShapeDtypeStruct, that say each one's dtype and sharding. Beyond the arrays no more than
    one layer is in memory in the file's dtype.
    """

    def put(leaf, like):
        def part(index):
            if not getattr(leaf, "is_stacked", False):
                return np.asarray(leaf[index], like.dtype)
            layers = range(*index[0].indices(leaf.shape[0]))
            return np.stack([np.asarray(leaf[layer][index[1:]], like.dtype) for layer in layers])

        return jax.make_array_from_callback(leaf.shape, like.sharding, part)

    return jax.tree.map(put, params, places)


def tensor_files(folder, stem) -> dict[str, pathlib.Path]:
    """Tensor name -> file, from one safetensors file or from the index of several."""
    folder = pathlib.Path(folder)
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: the index is damaged")
        shards = {}
        for file in weight_map.values():
            # A name with a folder in it could point anywhere on the disk.
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise UserError(f"{index} names {file!r}, which is not a plain safetensors file beside it: refused")
        for file in set(weight_map.values()):
            with open_safetensors(folder / file) as tensors:
                shards[file] = set(tensors.keys())
        for file, names in shards.items():
            strays = {name for name in names if weight_map.get(name) != file}
            refuse(folder / file, {"repeats, or has beside the index, {} tensor(s)": strays})
        return {key: folder / file for key, file in weight_map.items()}
    if single.exists():
        with open_safetensors(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    refuse_pickle(folder)
    raise UserError(f"{folder} has neither {single.name} nor {index.name}: not a complete model folder")


def refuse_pickle(path):
    """Raises UserError where a file is a pickle, or a folder has one."""
    path = pathlib.Path(path)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    pickles = [file.name for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise UserError(f"{path}: {pickles[0]} is a pickle, which sorax does not open (it may run any code): load it "
                        "with its own library and save it with safe_serialization=True, or its tensors with "
                        "safetensors.torch.save_file")  # fmt: skip


def _kind(file, key):
    """(shape, dtype) of a tensor. A slice that outlives its file keeps all of it mapped: here it does not."""
    tensor = file.get_slice(key)
    return tuple(tensor.get_shape()), tensor.get_dtype()


def tensor_shapes(path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one safetensors file."""
    with open_safetensors(path) as file:
        return {name: _kind(file, name)[0] for name in file.keys()}  # noqa: SIM118


def open_safetensors(path):
    """Opens a safetensors file; UserError where it is missing or damaged."""
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error


def read_json(path) -> dict:
    """A JSON object from a file; UserError where there is none."""
    try:
        value = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): not a complete model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: not a model folder")
    return value


def _alias_of(name, aliases, inside):
    return next((alias for alias, other in aliases.items() if other == name and alias in inside), None)


def refuse(where, problems):
    """Raises UserError that lists all of the problems (what is said of a number of things -> the things), if any."""
    said = []
    for what, things in problems.items():
        shown = sorted(things)[:3] + ([f"{len(things) - 3} more"] if len(things) > 3 else [])
        said += [f"{what.format(len(things))}: {', '.join(shown)}"] if things else []
    if said:
        raise UserError(f"{where} {'; '.join(said)}. Do config and weights belong together?")
