"""Accelerators by the numbers: peak speeds, memories and networks, for plans and for the MFU of runs.

Every figure is of one *device* of jax, which is a chip but for TPU v4 and 7x, whose chips show as two devices.
Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x: peak, HBM, links of tpu7x); "How to Scale Your Model"
(jax-ml/scaling-book, 2025), chapter on TPUs (links, data-centre network, matrix units); NVIDIA's data sheets of A100,
H100, H200 and B200 (dense, SXM unless the name says other). Usable memory of TPUs: what libtpu 0.0.42 reports as the
limit when a program is too large; of tpu7x it is a guess from 96 GB a device, and so is its data-centre network.
"""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak figures of one device. FLOP/s are dense bfloat16, bandwidths bytes a second."""

    name: str
    kind: str  # begins `jax.Device.device_kind`
    flops: float
    memory: float  # bytes that a program may use
    memory_bandwidth: float
    link_bandwidth: float = 0.0  # of one torus link, one way
    torus: int = 0  # dimensions of the torus; 0: no TPU
    full_ring: int = 0  # a dimension of this size (or, in 3-D, of multiples of it) is closed to a ring
    slice_bandwidth: float = 0.0  # to other slices, through the data-centre network, one way
    matrix_unit: int = 128  # side of a TPU's matrix units


# The first that matches is taken: longer kinds come before those that begin them.
DEVICES = (
    Device("v4", "TPU v4", 275e12 / 2, 15.25 * GIB, 1228e9 / 2, 45e9, 3, 4, 6.25e9 / 2),
    Device("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 45e9, 2, 16, 3.125e9),
    Device("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 90e9, 3, 4, 6.25e9),
    Device("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 90e9, 2, 16, 12.5e9, 256),
    Device("tpu7x", "TPU7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9, 3, 4, 12.5e9 / 2, 256),
    Device("H100 PCIe", "NVIDIA H100 PCIe", 756e12, 80e9, 2000e9),
    Device("H100 NVL", "NVIDIA H100 NVL", 835e12, 94e9, 3900e9),
    Device("H100", "NVIDIA H100", 989.4e12, 80e9, 3350e9),
    Device("H200 NVL", "NVIDIA H200 NVL", 836e12, 141e9, 4800e9),
    Device("H200", "NVIDIA H200", 989.4e12, 141e9, 4800e9),
    Device("B200", "NVIDIA B200", 2250e12, 180e9, 8000e9),
    Device("A100", "NVIDIA A100", 312e12, 80e9, 2039e9),
)


def device_of(kind: str) -> Device | None:
    """The device whose `device_kind` begins so; None for a CPU or one that is not in the table."""
    return next((device for device in DEVICES if kind.startswith(device.kind)), None)


def peak_flops(kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by its `device_kind`; None where it is not known."""
    device = device_of(kind)
    return device and device.flops
