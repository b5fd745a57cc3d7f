"""TPU topologies as libtpu describes them, on a machine that has none."""

import dataclasses
import functools
import importlib.util
import math
import os
import re

from sorax.devices import DEVICES, Device, device_of
from sorax.errors import UserError

# Of the names that accelerators are sold under: v4 and v5p count tensor cores, two a chip, the others chips.
LAYOUTS = {
    **{f"{g}-{2 * math.prod(d)}": (g, d) for g in ("v4", "v5p") for d in (
        (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16))},
    **{f"{g}-{math.prod(d)}": (g, d) for g in ("v5e", "v6e") for d in (
        (1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))},
}  # fmt: skip
SHOWN = "v5e:4x4, v5p:4x4x8, v6e:16x16"
# libtpu is asked for a description only: it neither looks for chips, nor for other hosts, nor says that it has none.
ENVIRONMENT = dict(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true", TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_STDERR_LOG_LEVEL="3", TPU_MIN_LOG_LEVEL="3",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of a kind, described rather than there. dims: chips along each side of one slice."""

    name: str
    device: Device
    dims: tuple[int, ...]
    slices: int
    devices: tuple

    @property
    def chips(self) -> int:
        """Chips of all slices; v4's and tpu7x's have two devices each."""
        return math.prod(self.dims) * self.slices


def prepare():
    """Sets the environment in which libtpu describes topologies; to be called before jax starts its backends."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """(generation, chips along each side) of "v5p:4x4x8", or of a name such as "v5p-256".

    Raises:
        UserError: neither of these; known ones are named.
    """
    if text in LAYOUTS:
        return LAYOUTS[text]
    generations = {device.name: device for device in DEVICES if device.torus}
    generation, _, layout = text.replace("-", ":", 1).partition(":")
    if generation not in generations:
        raise UserError(f"topology {text!r}: unknown TPU {generation!r}; known are {', '.join(generations)}, for "
                        f"example {SHOWN}")  # fmt: skip
    if not re.fullmatch(r"\d+(x\d+)*", layout) or "-" in text:
        known = ", ".join(name for name in LAYOUTS if name.startswith(generation + "-"))
        raise UserError(f"topology {text!r}: write the chips along each side, such as {SHOWN}"
                        + (f", or a name: {known}" if known else ""))  # fmt: skip
    dims = tuple(map(int, layout.split("x")))
    torus = generations[generation].torus
    if len(dims) != torus or 0 in dims:
        example = "x".join(["4"] * torus)
        raise UserError(f"topology {text!r}: a {generation} has {torus} sides, such as {generation}:{example}")
    return generation, dims


@functools.cache
def open_topology(text: str, slices: int = 1) -> Topology:
    """A topology's devices, to compile for.

    Args:
        text: as `parse` takes it. slices: so many of it, joined by the data-centre network.

    Raises:
        UserError: libtpu is not installed, no such topology, or none of that shape.
    """
    generation, dims = parse(text)
    if slices < 1:
        raise UserError(f"--slices is {slices}: there is at least one")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a plan is compiled by libtpu, which is not installed (no TPU is needed): "
                        "pip install 'sorax[tpu]'")  # fmt: skip
    prepare()
    import jax
    from jax.experimental import topologies

    name = f"{generation}:{'x'.join(map(str, dims))}"
    try:
        options = dict(num_slices=slices) if slices > 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        known = [f"{generation}:{'x'.join(map(str, sides))}" for kind, sides in LAYOUTS.values() if kind == generation]
        raise UserError(f"topology {name!r} with {slices} slice(s) does not exist for libtpu ({reason}): try "
                        f"{', '.join(known) or SHOWN}") from error  # fmt: skip
    device = device_of(devices[0].device_kind)
    if device is None:
        raise UserError(f"topology {name!r} has {devices[0].device_kind!r}, which sorax/devices.py has no figures of")
    return Topology(name, device, dims, slices, tuple(devices))
