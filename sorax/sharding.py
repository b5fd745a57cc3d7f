"""The mesh, and the one table from parameter paths to how they are split over it.

Axes: `data` replicates parameters and splits the batch, `fsdp` splits both (ZeRO-3), `tensor` splits widths
(Megatron), `context` splits the tokens of a row and, in the VAE, the height (or width) of videos. The compiler inserts
the communication.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sorax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")

# First match wins; specs are aligned to the *last* dimensions of a parameter, so stacked layers need no rule.
# Every tree that mirrors the parameters (EMA, optimizer moments) matches by the same paths.
RULES = (
    (r"(latents_mean|latents_std|bias|gamma|scale|norm_\w+|modulation)$", ()),
    (r"(q|k|v|mlp_in|wi|wi_gate|text_in|time_in)/kernel$", ("fsdp", "tensor")),
    (r"(o|mlp_out|wo|text_out|time_out)/kernel$", ("tensor", "fsdp")),
    (r"(patch_embed|time_proj)/kernel$", (None, "fsdp")),
    (r"proj_out/kernel$", ("fsdp", None)),
    (r"embedding$", (None, "fsdp")),
    (r"kernel$", ("fsdp",)),  # convolutions: the output channels
)


def make_mesh(data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """Mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, context, tensor], jax.device_count()
    shown = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh {shown}: axes are positive, and at most one is -1 (what the others leave)")
    rest = math.prod(size for size in sizes if size != -1)
    sizes = [count // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        raise UserError(f"mesh {shown} does not cover the {count} device(s) here: set config.mesh.* so that the "
                        "product is that, or one axis to -1")  # fmt: skip
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> Mesh:
    """Mesh of this process's own devices, all of them on `data`."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_string(path) -> str:
    """`encoder/blocks/0/conv1/kernel` of a pytree key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of a parameter; an axis that does not divide its dimension is left out."""
    rule = next((axes for pattern, axes in RULES if re.search(rf"(^|/){pattern}", path)), ())
    rule = rule[-len(shape) :] if shape else ()
    spec = [None] * (len(shape) - len(rule)) + list(rule)
    spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)]
    return PartitionSpec(*spec)


def shardings_for(tree, mesh: Mesh):
    """Tree of NamedSharding for a tree of arrays (or ShapeDtypeStruct): parameters, or state that mirrors them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_for(path_string(path), np.shape(x), mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def video_sharding(mesh: Mesh, rows: int, columns: int, whole_batch: bool = False) -> NamedSharding:
    """How videos and latents `[B, T, H, W, C]`, and all activations between them, are split.

    B over data and fsdp; over context the height or, where its rows of latents do not divide, the width. Nothing is
    padded: every device holds whole latent pixels, and neighbours exchange the edges that a convolution reads.

    Args:
        rows, columns: of the latents.
        whole_batch: do not split B (one video).

    Raises:
        UserError: neither rows nor columns divide.
    """
    batch, parts = None if whole_batch else ("data", "fsdp"), mesh.shape["context"]
    if rows % parts == 0:
        return NamedSharding(mesh, PartitionSpec(batch, None, "context" if parts > 1 else None))
    if columns % parts == 0:
        return NamedSharding(mesh, PartitionSpec(batch, None, None, "context"))
    raise UserError(f"latents of {rows} x {columns} (h x w) cannot be split over {parts} devices: make the "
                    "mesh's context axis (config.mesh.context) divide one of them, or crop the video")  # fmt: skip


def put_batch(batch, mesh: Mesh):
    """Makes global arrays of this process's rows of a batch (numpy), split as `batch_sharding` says."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def activation_constraint(mesh: Mesh):
    """Function that pins activations `[B, N, ...]` to rows over data and fsdp, tokens over context."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
