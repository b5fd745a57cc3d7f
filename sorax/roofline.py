"""How long a step would take on devices that are not there: from operations, bytes and what they should cost.

An estimate, not a measurement: the assumptions are the constants of this file, and a plan prints them.
"""

import dataclasses
import math

import numpy as np

from sorax.devices import Device
from sorax.hlo import Collective

MATMUL_EFFICIENCY = 0.7  # of peak, of large bfloat16 products; dense language models reach 0.6 to 0.7 as a whole
# Of peak, of flash attention whose heads are as wide as the matrix unit. Narrower heads fill a share of it: those of
# 128 half of v6e's and tpu7x's. MaxDiffusion's published times of Wan 14B at 720p x 81 frames agree: of training,
# 36.0 s on 4 chips of v5p leave attention 0.47; of guided sampling, 6.3 s a step on 8 chips of v6e and 5.3 s on 4 of
# tpu7x leave it 0.23 and 0.22, were products at MATMUL_EFFICIENCY.
ATTENTION_EFFICIENCY = 0.5
WIDTH_TRAFFIC = 68  # values of a token's width that a layer reads and writes, forward, beside its products
BACKWARD_TRAFFIC = 2  # of the same, backward / forward
# Backward / forward products of flash attention, which makes the scores again in both of its backward kernels: 7 / 2.
ATTENTION_BACKWARD = 3.5
# Forward passes of (affine layers, attention) that the backward pass repeats, by name of the remat policy.
REPEATED = {"none": (0, 0), "dots": (0, 1), "full": (1, 1), "offload": (1, 1)}
# Mesh axes whose traffic the next operation waits for; the others' is hidden, and what goes over fsdp and context at
# once: parameters are split over both.
ON_THE_PATH = {"context", "tensor"}

ASSUMPTIONS = (
    f"products reach {MATMUL_EFFICIENCY:.0%} of peak, attention {ATTENTION_EFFICIENCY:.0%} where heads are as wide as "
    f"the matrix unit and less where they are narrower (it makes scores again in its two backward kernels: "
    f"{ATTENTION_BACKWARD:g} times the forward products)",
    "affine layers work on every place of a row, attention on pairs of one segment",
    f"element-wise work reads and writes {WIDTH_TRAFFIC} widths a token, layer and forward pass from memory, "
    f"{BACKWARD_TRAFFIC} times that backward, and is not hidden",
    "traffic over data, fsdp and fsdp x context is hidden behind compute, over context or tensor alone it is not",
    "links run at full speed; an axis of the mesh has the links of the torus sides that it lies on",
    "data loading, checkpoints, evaluation and stalls cost nothing",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one step over all devices: operations forward, and what they pass over.

    affine: of affine layers, on every place of the rows. attention: of attention. places: tokens of rows, padding too.
    width, layers, head_dim: of the DiT. state: bytes of parameters, EMA, optimizer and gradients that a device holds.
    weights: bytes of the weights that a device reads in a pass. passes: micro-batches a step. backward: what the
    backward pass of affine layers takes, in forward ones: 1 where their kernels are not trained.
    """

    affine: float
    attention: float
    places: int
    width: int
    layers: int
    head_dim: int
    state: float
    weights: float
    passes: int = 1
    backward: float = 2.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step: compute, elementwise and memory of a device, traffic that is waited for and that is hidden.

    best: were all of it at peak and hidden.
    """

    compute: float
    elementwise: float
    memory: float
    exposed: float
    hidden: float
    best: float

    @property
    def step(self) -> float:
        return max(self.compute + self.elementwise + self.memory, self.hidden) + self.exposed


def compute_seconds(affine: float, attention: float, head_dim: int, device: Device, devices: int) -> float:
    """Seconds that so many operations of affine layers and of attention take, spread over devices."""
    filled = min(1.0, head_dim / device.matrix_unit)
    return (affine / MATMUL_EFFICIENCY + attention / (ATTENTION_EFFICIENCY * filled)) / (device.flops * devices)


def estimate(work: Work, remat: str, device: Device, devices: int, sent: dict[tuple[str, ...], float]) -> Estimate:
    """Seconds of a training step.

    Args:
        remat: policy by name. sent: seconds of traffic by mesh axes, see `traffic`.
    """
    affine_again, attention_again = REPEATED[remat]
    affine = work.affine * (1 + work.backward + affine_again)
    attention = work.attention * (1 + ATTENTION_BACKWARD + attention_again)
    peak = device.flops * devices
    again = max(affine_again, attention_again)
    values = work.places * work.width * work.layers * WIDTH_TRAFFIC * (1 + BACKWARD_TRAFFIC + again) / devices
    elementwise = 2 * values / device.memory_bandwidth
    # Parameters, moments and averages are read and written once a step, the weights in every pass.
    memory = (2 * work.state + work.passes * (2 + again) * work.weights) / device.memory_bandwidth
    exposed = sum(seconds for axes, seconds in sent.items() if ON_THE_PATH & set(axes) and "fsdp" not in axes)
    hidden = sum(sent.values()) - exposed
    return Estimate(
        compute=compute_seconds(affine, attention, work.head_dim, device, devices), elementwise=elementwise,
        memory=memory, exposed=exposed, hidden=hidden,
        best=max((affine + attention) / peak, elementwise + memory, sum(sent.values())),
    )  # fmt: skip


def traffic(found: list[Collective], mesh, device: Device, dims) -> dict[tuple[str, ...], float]:
    """Seconds that a program's communication takes, by mesh axes.

    Args:
        found: its communication. mesh: of TPU devices. dims: chips along the sides of a slice.
    """
    seconds = {}
    for c in found:
        inside, outside = axis_bandwidth(mesh, c.axes, device, dims)
        parts = slices_along(mesh, c.axes)
        time = c.total / inside if inside else 0.0
        if outside:
            # Inside a slice first; what then goes between slices is a share for each of its devices.
            time += c.total / max(c.size / parts, 1) / outside
        seconds[c.axes] = seconds.get(c.axes, 0.0) + time
    return seconds


def slices_along(mesh, axes) -> int:
    """Over how many slices the devices of mesh axes reach."""
    return len({getattr(d, "slice_index", None) for d in _line(mesh, axes)})


def axis_bandwidth(mesh, axes, device: Device, dims) -> tuple[float, float]:
    """Bytes a second that a device sends along mesh axes: inside its slice, and between slices (0: not there).

    An axis that lies on k sides of the torus has k links a direction, and both directions where a side is closed to a
    ring; an axis whose devices are not neighbours shares its links with those between them.
    """
    line = _line(mesh, axes)
    outside = device.slice_bandwidth if len({getattr(d, "slice_index", None) for d in line}) > 1 else 0.0
    first = getattr(line[0], "slice_index", None)
    places = np.array([d.coords[: len(dims)] for d in line if getattr(d, "slice_index", None) == first])
    links = 0.0
    for side, length in enumerate(dims):
        there = np.unique(places[:, side])
        if len(there) < 2:
            continue
        apart = int(np.min(np.diff(there)))
        ring = len(there) == length and length % device.full_ring == 0
        links += (2 if ring else 1) / apart
    if not links and not outside:
        links = 1.0  # the two devices of a chip, whose link is at least that
    return links * device.link_bandwidth, outside


def _line(mesh, axes):
    """The devices that differ from the first one along these axes only."""
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(np.asarray(mesh.devices[index], object).reshape(math.prod(mesh.shape[a] for a in axes)))
