"""Checkpoints of a run: Orbax, asynchronous; each tree of the training state is an item that can be read alone."""

import contextlib
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from sorax.errors import UserError
from sorax.sharding import path_string

ITEMS = ("params", "ema_params", "opt_state", "rng")
CHUNK_BYTES = 2**28  # of a stored array: what is read of it at a time costs one or two of these
# Devices that have copies of an array share in writing it where the part of each is as large as this. Each part of each
# shape is cut out by a program of its own: hundreds of small arrays would take longer to compile than to write.
SHARED_BYTES = 2**20
# (Set on the handler that there is: one that takes its place is warned of at every start.)
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = SHARED_BYTES


class Checkpoints:
    """The `checkpoints/` folder of a run: `ITEMS` are trees of arrays, beside them `info`, a small JSON."""

    def __init__(self, workdir: str, *, keep: int = 2):
        self.path = os.path.abspath(os.path.join(workdir, "checkpoints"))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS} | {"info": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, items: dict, info: dict):
        """Starts writing a checkpoint; the arrays are copied first, so that they may be donated at once.

        Raises:
            UserError: the disk has no room (checked before anything is written; the last checkpoint stays), or the
                checkpoint before this one could not be written.
        """
        leaves = [x for x in jax.tree.leaves(items) if hasattr(x, "dtype")]
        need = sum(x.size * x.dtype.itemsize for x in leaves if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
        free = shutil.disk_usage(self.path).free
        if free < 1.1 * need:
            raise UserError(
                f"no space left for the checkpoint of step {step} in {self.path!r}: {need / 2**20:.0f} MiB needed, "
                f"{free / 2**20:.0f} MiB free; free some and run the same command to go on"
            )
        chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        args = {name: ocp.args.StandardSave(tree, save_args=jax.tree.map(lambda _: chunks, tree))
                for name, tree in items.items()}  # fmt: skip
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**args, info=ocp.args.JsonSave(info))))

    def restore(self, abstract_items: dict, step: int | None = None):
        """Items and info of a step (the latest by default).

        Args:
            abstract_items: name -> tree of ShapeDtypeStruct with shardings; only these are read.

        Raises:
            UserError: no checkpoint, or one of another architecture: the first arrays that differ are named.
        """
        step = self._step(step)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
        there = self._manager.item_metadata(step)
        for name, tree in abstract_items.items():
            self._check_same_shapes(tree, there[name], name)
        restored = self._manager.restore(step, args=ocp.args.Composite(**args, info=ocp.args.JsonRestore()))
        return {name: restored[name] for name in abstract_items}, restored["info"]

    def stored(self, abstract, name: str, step: int | None = None):
        """An item of a step (the latest by default) as a tree of `StoredArray`: nothing is read until it is asked for.

        abstract: the item's tree of ShapeDtypeStruct. Raises UserError as `restore` does.
        """
        step = self._step(step)
        self._check_same_shapes(abstract, self._manager.item_metadata(step)[name], name)
        folder = os.path.join(self.path, str(step), name)
        return jax.tree_util.tree_map_with_path(lambda path, _: StoredArray(folder, path_string(path)), abstract), step

    def info(self, step: int | None = None) -> dict:
        """The info of a step (the latest by default). Raises UserError where there is no checkpoint."""
        return self._manager.restore(self._step(step), args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]

    def _step(self, step):
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.path!r}: train first, or name another run")
        return step

    def _check_same_shapes(self, tree, metadata, name):
        there, here = _shapes(getattr(metadata, "tree", metadata)), _shapes(tree)
        differ = [f"{name}/{k}: {there.get(k, 'absent')} there, {here.get(k, 'absent')} here"
                  for k in sorted(set(there) | set(here)) if there.get(k) != here.get(k)]  # fmt: skip
        if differ:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"the checkpoint in {self.path!r} is of another architecture ({'; '.join(differ[:3])}"
                            f"{more}): use the config it was trained with, or another workdir")  # fmt: skip

    def wait(self):
        """Returns when everything is on disk."""
        self._guard(self._manager.wait_until_finished)

    @contextlib.contextmanager
    def finishing(self):
        """Where the body is interrupted or fails, a checkpoint that is being written is finished first. Not so in one
        of several processes: the others may be gone."""
        try:
            yield
        except BaseException:
            if jax.process_count() == 1:
                self.wait()
            raise

    def close(self):
        self._guard(self._manager.close)

    def _guard(self, action):
        try:
            action()
        except OSError as error:
            raise UserError(
                f"a checkpoint could not be written to {self.path!r}: {error}; the last complete one is of step "
                f"{self.latest_step()}: run the same command to go on from it"
            ) from error


class StoredArray:
    """An array of a checkpoint that is read piece by piece: `stored[i]` reads one layer, `np.asarray(stored)` all."""

    def __init__(self, folder: str, path: str):
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": path.replace("/", ".") + "/"}
        self._array = tensorstore.open({"driver": "zarr", "kvstore": place}, read=True).result()
        self.shape, self.dtype = tuple(self._array.shape), np.dtype(self._array.dtype.numpy_dtype)
        self.size, self.ndim = int(np.prod(self.shape, dtype=np.int64)), len(self.shape)

    def __getitem__(self, index) -> np.ndarray:
        return self._array[index].read().result()

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array.read().result(), dtype)


def _shapes(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_string(path): tuple(x.shape) for path, x in leaves if getattr(x, "shape", None) is not None}
