"""Parameters -> safetensors files, piece by piece: in memory is a layer of one parameter at a time, or a block of one
that has no layers (`read_weights.blocks`)."""

import hashlib
import json
import pathlib
import struct

import jax
import ml_dtypes
import numpy as np

from sorax import convert, read_weights
from sorax.errors import UserError
from sorax.sharding import path_string

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
AUTO = "auto"  # as it was read from a file; float32 where it was trained
MAX_SHARD_BYTES = 5 * 10**9


def write_model(folder, stem, names, params, config, dtype, max_shard_bytes) -> dict[str, str]:
    """Writes config.json and weights, in several files with an index if there is more than one file holds.

    Args:
        names: table of the tensors, `convert.Name`.
        params: tree of arrays, of `checkpoint.StoredArray` and `read_weights.StoredParam` too.
        dtype: one of `DTYPES`, or "auto".

    Returns:
        the sha256 of every tensor's bytes.
    """
    if dtype not in (*DTYPES, AUTO):
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, {AUTO}")
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {name.theirs: name.shape(leaves) for name in names}
    dtypes = {name.theirs: _dtype(name, leaves[name.ours], dtype) for name in names}
    sizes = {key: int(np.prod(shape, dtype=np.int64)) * dtypes[key].itemsize for key, shape in shapes.items()}
    shards, filled = [[]], 0
    for name in names:
        if shards[-1] and filled + sizes[name.theirs] > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name.theirs]

    write_json(folder / "config.json", config)
    hashes, weight_map = {}, {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name.theirs: (shapes[name.theirs], dtypes[name.theirs], _pieces(name, leaves[name.ours])) for name in shard
        }
        hashes |= write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return hashes


def stored_as(params, dtype: str) -> str:
    """What weights are written as, for people: "f32", or what "auto" comes to, such as "bf16 and f32"."""
    if dtype != AUTO:
        return dtype
    short = {value.name: key for key, value in DTYPES.items()} | {"float16": "f16"}  # which is read and kept only
    found = {leaf.dtype.name if isinstance(leaf, read_weights.StoredParam) else "float32"
             for leaf in jax.tree.leaves(params)}  # fmt: skip
    return " and ".join(sorted(short.get(name, name) for name in found))


def _dtype(name, leaf, dtype) -> np.dtype:
    """What a tensor is written as."""
    if dtype != AUTO:
        return DTYPES[dtype]
    return leaf.dtype_of(name.layer) if isinstance(leaf, read_weights.StoredParam) else DTYPES["f32"]


def write_safetensors(path, tensors, metadata=None) -> dict[str, str]:
    """Writes one file of the safetensors format: a header with every tensor's place, then their bytes.

    tensors: name -> (shape, dtype, iterable of arrays that follow each other in its memory). metadata: str -> str, what
    else the header says. Returns name -> sha256.
    """
    names = {v: k for k, v in read_weights.DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, (shape, dtype, _) in tensors.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = dict(dtype=names[dtype], shape=list(shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (_, dtype, pieces) in tensors.items():
            digest = hashlib.sha256()
            for piece in pieces:
                content = np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data
                digest.update(content)
                file.write(content)
            assert file.tell() == 8 + len(text) + header[name]["data_offsets"][1], f"{name}: size is not as announced"
            hashes[name] = digest.hexdigest()
    return hashes


# The layer is an argument of the compiled function, so that all layers of a parameter share one.
_layer = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False))


def _pieces(name: convert.Name, leaf):
    """The parts of a tensor one after another: what is written as it lies in blocks, the rest whole."""
    if name.layer is not None:
        parts = [_layer(leaf, name.layer) if isinstance(leaf, jax.Array) else leaf[name.layer]]
    elif name.pattern == convert.SAME:
        parts = read_weights.blocks(leaf)
    else:
        parts = [leaf]
    for value in map(np.asarray, parts):
        if not isinstance(leaf, read_weights.StoredParam) and not read_weights.is_finite(value):  # that is checked
            raise UserError(f"parameter {name.ours} holds NaN or infinite values: export an earlier checkpoint")
        yield name.to_theirs(value)


def write_json(path, value):
    """Writes a JSON file, in folders that are made if need be."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=str) + "\n")
