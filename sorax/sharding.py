"""The mesh, and the one table from parameter paths to how they are split over it.

Axes: `data` replicates parameters and splits the batch, `fsdp` splits both (ZeRO-3, Rajbhandari et al. 2020), `tensor`
splits widths (Megatron, Shoeybi et al. 2019), `context` splits the tokens of a row (Ulysses, Jacobs et al. 2023) or, in
the VAE, the height (or width) of videos, and parameters as `fsdp` does. The compiler inserts the communication, but for
that of attention.
"""

import collections
import dataclasses
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sorax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # what a batch is split over
SHARE = ("fsdp", "context")  # what parameters are split over: devices that share a row need no copy each
ALL = (*SHARE, "tensor")

# First match wins; specs are aligned to the *last* dimensions of a parameter, so stacked layers need no rule.
# Every tree that mirrors the parameters (EMA, optimizer moments) matches by the same paths.
# Of two products in a row the first splits its outputs over `tensor`, the second its inputs: between them each device
# has its own columns, and one sum follows. The first and last products of the DiT are small, and are not split over
# `tensor`: that would split the width of all activations, and they would be gathered in every block.
RULES = (
    (r"(latents_mean|latents_std|bias|gamma|scale|norm_\w+|modulation)$", ()),
    (r"(q|k|v|mlp_in|wi|wi_gate|text_in|time_in|patch_in)/kernel$", (SHARE, "tensor")),
    (r"(o|mlp_out|wo|text_out|time_out|patch_out)/kernel$", ("tensor", SHARE)),
    (r"time_proj/kernel$", (None, ALL)),
    (r"(patch|pos)_embed/kernel$", (None, SHARE)),
    (r"proj_out/kernel$", (SHARE, None)),
    # The branch of a LoRA, [n, r] and [r, m], has its ends as the kernel [n, m] has them; r is small, and whole.
    (r"(q|k|v|mlp_in)/lora_a$", (SHARE, None)),
    (r"(q|k|v|mlp_in)/lora_b$", (None, "tensor")),
    (r"(o|mlp_out)/lora_a$", ("tensor", None)),
    (r"(o|mlp_out)/lora_b$", (None, SHARE)),
    (r"embedding$", (None, ALL)),
    (r"kernel$", (SHARE,)),  # convolutions: the output channels
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` section: devices along each axis, of which one may be -1 (what the others leave)."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 0  # groups with a slow network between them; 0: the slices of TPUs, else one


def make_mesh(
    data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, *, slices: int = 0, devices=None
) -> Mesh:
    """Mesh over all devices; one axis may be -1 and takes what the others leave.

    Several slices are split over `data` as far as it divides, then over `fsdp`: between slices go sums of gradients
    and, where `fsdp` reaches over them, parameters; the traffic of `context` and `tensor` stays inside a slice.

    Args:
        slices: groups of devices with a slow network between them; 0: the slices of TPUs, else one.
        devices: `jax.devices()` by default; those of a topology, to compile for what is not there.

    Raises:
        UserError: the axes do not multiply to the number of devices, or cannot be laid over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, count = [data, fsdp, context, tensor], len(devices)
    shown = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh {shown}: axes are positive, and at most one is -1 (what the others leave)")
    rest = math.prod(size for size in sizes if size != -1)
    sizes = [count // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        raise UserError(f"mesh {shown} does not cover the {count} device(s) here: set config.mesh.* so that the "
                        "product is that, or one axis to -1")  # fmt: skip
    groups = _slices(devices, slices)
    over_data = math.gcd(sizes[0], len(groups))
    over_fsdp = len(groups) // over_data
    if sizes[1] % over_fsdp:
        raise UserError(f"mesh {shown} cannot be laid over {len(groups)} slices: make config.mesh.data, or data x fsdp "
                        "together, a multiple of that")  # fmt: skip
    inside = (sizes[0] // over_data, sizes[1] // over_fsdp, sizes[2], sizes[3])
    blocks = np.empty((over_data, over_fsdp, 1, 1, *inside), object)
    for k, group in enumerate(groups):
        blocks[divmod(k, over_fsdp)] = _lay_out(inside, group, shown)
    order = [place for axis in range(4) for place in (axis, axis + 4)]  # of each axis the slices, then inside a slice
    return Mesh(blocks.transpose(order).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices, slices):
    """Devices of each slice. Only those of TPUs say which is theirs; others are cut up in order."""
    if devices[0].platform != "tpu":
        slices = slices or 1
        if len(devices) % slices:
            raise UserError(f"config.mesh.slices is {slices}, which {len(devices)} devices cannot be cut into")
        return np.array(devices, object).reshape(slices, -1).tolist()
    members = collections.defaultdict(list)
    for device in devices:
        members[getattr(device, "slice_index", 0)].append(device)  # a topology of one slice has no numbers
    if slices not in (0, len(members)):
        raise UserError(f"config.mesh.slices is {slices}, but the {len(devices)} devices here are of {len(members)} "
                        "slice(s): set it to that, or to 0")  # fmt: skip
    return [members[key] for key in sorted(members)]


def _lay_out(sizes, devices, shown):
    """Devices of one slice as an array of these sizes, neighbours in the network near each other."""
    for split in (False, True):  # one axis of the network shared by two of the mesh is the second choice
        try:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
        except (NotImplementedError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(f"mesh {shown} cannot be laid over these {len(devices)} devices ({reason}): use axes that are "
                    "products of the sides of the topology")  # fmt: skip


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
    return PartitionSpec(*(_dividing(axis, size, mesh) for axis, size in zip(spec, shape)))


def _dividing(axes, size, mesh):
    """Of the axes for a dimension the first ones whose product divides it: a name, several, or None."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes if len(axes) > 1 else axes[0] if axes else None


def shardings_for(tree, mesh: Mesh):
    """Tree of NamedSharding for a tree of arrays (or ShapeDtypeStruct): parameters, or state that mirrors them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_for(path_string(path), np.shape(x), mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


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
    batch, parts = None if whole_batch else BATCH, mesh.shape["context"]
    if rows % parts == 0:
        return NamedSharding(mesh, PartitionSpec(batch, None, "context" if parts > 1 else None))
    if columns % parts == 0:
        return NamedSharding(mesh, PartitionSpec(batch, None, None, "context"))
    raise UserError(f"latents of {rows} x {columns} (h x w) cannot be split over {parts} devices: make the "
                    "mesh's context axis (config.mesh.context) divide one of them, or crop the video")  # fmt: skip


def row_shares(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Which of the `batch_parts` this process's devices hold, ascending, and how many processes hold the same ones.

    Processes that split rows between them (over context or tensor) hold the same; on a torus of TPUs a process's own
    need not be neighbours.

    Raises:
        UserError: processes share some of their rows, not all or none.
    """
    parts = collections.defaultdict(set)
    for index, device in np.ndenumerate(mesh.devices):
        parts[device.process_index].add(index[0] * mesh.shape["fsdp"] + index[1])
    own = parts[jax.process_index()]
    same = sum(other == own for other in parts.values())
    if any(other & own and other != own for other in parts.values()):
        raise UserError("the mesh makes processes share some of their rows: make config.mesh.context x tensor a "
                        "multiple or a divisor of the devices of a process")  # fmt: skip
    return tuple(sorted(own)), same


def put_batch(batch, mesh: Mesh):
    """Makes global arrays of this process's rows of a batch (numpy), split as `batch_sharding` says.

    The rows are those of `row_shares`, in its order.
    """
    own, _ = row_shares(mesh)
    sharding, place = batch_sharding(mesh), {part: k for k, part in enumerate(own)}

    def put(x):
        x = np.asarray(x)
        size = len(x) // len(own)  # rows of a part
        shape = (size * batch_parts(mesh), *x.shape[1:])

        def rows(index):
            start = place[(index[0].start or 0) // size] * size
            return x[start : start + size]

        return jax.make_array_from_callback(shape, sharding, rows)

    return jax.tree.map(put, batch)


def put_rows(batch, mesh: Mesh):
    """As `put_batch`, where every process has all rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


# --- Packed rows: tokens over context, heads over tensor


def check_rows(mesh: Mesh, num_heads: int, row_tokens: int):
    """Raises UserError where rows of so many tokens, or so many heads, cannot be split over context and tensor."""
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    if num_heads % (context * tensor):
        raise UserError(f"{num_heads} heads of attention cannot be split over context={context} x tensor={tensor} "
                        "devices: make config.mesh.context x config.mesh.tensor a divisor of config.model.num_heads")
    if row_tokens % context:
        raise UserError(f"rows of {row_tokens} tokens cannot be split over context={context} devices: make "
                        "config.data.row_tokens a multiple of config.mesh.context")  # fmt: skip


def activation_constraint(mesh: Mesh):
    """Function that pins activations to rows over data and fsdp and, of tokens `[B, N, ...]`, tokens over context.

    With tokens=False, as for what a row has of text and noise levels, `[B, M, ...]`, context has copies.
    """
    split, whole = (NamedSharding(mesh, PartitionSpec(BATCH, axis)) for axis in ("context", None))
    return lambda x, tokens=True: jax.lax.with_sharding_constraint(x, split if tokens else whole)


def attention_on(mesh: Mesh, attention):
    """(attention of a row's tokens to each other, attention of its tokens to its text) over the devices of a mesh.

    Each device runs `attention` on whole segments of some rows and some heads: kernels that the compiler cannot split
    can be used. Outside, tokens are over context and heads over tensor. Tokens attend to each other by Ulysses
    (Jacobs et al. 2023): one all-to-all gives each device whole rows of a part of its heads, another takes them back.
    Text is whole on every device of `context`, so that attending to it needs no communication; its gradient is summed.

    Args:
        attention: function of (q `[B, N, K, A]`, k, v `[B, M, K, A]`, segment ids `[B, N]`, `[B, M]`) and of keywords:
            arrays are key_bias `[B, M]` alone.

    Returns:
        two such functions. They raise UserError where heads or tokens cannot be split (`check_rows`).
    """
    if mesh.size == 1:
        return attention, attention
    tokens, text = PartitionSpec(BATCH, "context", "tensor"), PartitionSpec(BATCH, None, "tensor")
    whole, split = PartitionSpec(BATCH), PartitionSpec(BATCH, "context")

    def run(body, specs, arrays):
        # Kernels do not say over which axes their results vary: that check is off.
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(*arrays)

    def to_tokens(q, k, v, q_segment_ids, kv_segment_ids, **options):
        check_rows(mesh, q.shape[2], q.shape[1])

        def body(q, k, v, q_ids, kv_ids):
            if mesh.shape["context"] == 1:
                return attention(q, k, v, q_ids, kv_ids, **options)
            q, k, v = (jax.lax.all_to_all(x, "context", 2, 1, tiled=True) for x in (q, k, v))
            return jax.lax.all_to_all(attention(q, k, v, q_ids, kv_ids, **options), "context", 1, 2, tiled=True)

        return run(body, (tokens, tokens, tokens, whole, whole), (q, k, v, q_segment_ids, kv_segment_ids))

    def to_text(q, k, v, q_segment_ids, kv_segment_ids, *, key_bias=None, **options):
        check_rows(mesh, q.shape[2], q.shape[1])
        biases = () if key_bias is None else (key_bias,)

        def body(q, k, v, q_ids, kv_ids, *biases):
            return attention(q, k, v, q_ids, kv_ids, **dict(zip(("key_bias",), biases)), **options)

        specs = (tokens, text, text, split, whole, *(whole for _ in biases))
        return run(body, specs, (q, k, v, q_segment_ids, kv_segment_ids, *biases))

    return to_tokens, to_text


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
