"""What a compiled program says of itself: which bytes it sends over which mesh axes, and what its loops keep.

Read from the text of optimised HLO (`compiled.as_text()`), where every device runs the same program and a device is
named by its place in the mesh, row by row. A loop's body stands there once and runs as often as the loop does.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Bytes that a device sends, as a multiple of the bytes that it holds before, in a group of n devices (ring algorithms).
SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_BITS = dict(pred=8, token=0, bf16=16)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a program.

    axes: the mesh axes over which it goes. size: devices of a group. sent: bytes that each device sends each time.
    times: how often a run of the program does it.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    sent: float
    times: int

    @property
    def total(self) -> float:
        """Bytes that each device sends in a run of the program."""
        return self.sent * self.times


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: how often it runs (0 where that is not known) and what it carries, as (dtype, shape, bytes)."""

    trips: int
    buffers: tuple[tuple[str, tuple[int, ...], int], ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    text: str

    def called(self) -> list[str]:
        """Names of the computations that it runs, but for a loop's."""
        names = re.findall(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.text)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.text):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


def parse_shapes(text: str) -> list[tuple[str, tuple[int, ...], int]]:
    """(dtype, shape, bytes) of every array in the text of a type; layouts are passed over."""
    found = []
    for dtype, shape in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]", text):
        dims = tuple(int(n.lstrip("<=")) for n in shape.split(",") if n)
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["32"])[0])
        found.append((dtype, dims, math.prod(dims) * bits // 8))
    return found


def _computations(text):
    """(name of the entry, name -> instructions)."""
    computations, entry, body = {}, None, None
    for line in text.splitlines():
        if line.split("//")[0].rstrip() == "}":  # a kernel's attributes have lines that begin with one
            body = None
        elif body is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head and not line.startswith("HloModule"):
                body = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        else:
            line = re.sub(r"/\*.*?\*/", "", line)
            match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$", line)
            if match:
                inside = match[4].split("), ")[0]
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                body.append(_Instruction(match[1], match[2], match[3], operands, match[4]))
    return entry, computations


def _trips(loop, computations) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    # Counting up from nothing to a constant, as `jax.lax.scan` does.
    constants = [i for i in computations.get(condition[1], ()) if i.operation == "constant" and "[]" in i.type]
    found = [int(m[1]) for i in constants if (m := re.match(r"(\d+)\)", i.text))]
    return found[0] if len(found) == 1 else 0


def _runs(entry, computations):
    """How often each computation runs in a run of the program. A loop of unknown length counts once."""
    runs = collections.Counter()

    def visit(name, times):
        runs[name] += times
        for instruction in computations.get(name, ()):
            if instruction.operation == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.text)[1]
                visit(body, times * max(_trips(instruction, computations), 1))
            elif not instruction.operation.endswith(("-done", "-update")):
                for called in instruction.called():
                    visit(called, times)

    visit(entry, 1)
    return runs


def _groups(text, count) -> list[list[int]]:
    """Groups of devices that communicate, from an instruction's attributes."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{?(\d+,\d+)", pairs[1])]
    listed = re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", text)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        numbers = [[int(n) for n in part.split(",")] if part else None for part in tiled.groups()]
        devices = np.arange(math.prod(numbers[1])).reshape(numbers[1])
        if numbers[2]:
            devices = devices.transpose(numbers[2])
        return devices.reshape(numbers[0][0], -1).tolist()
    return [list(range(count))]


def _axes(groups, shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(np.arange(math.prod(shape.values())), tuple(shape.values())))
    differ = np.zeros(len(shape), bool)
    for group in groups:
        differ |= (places[:, group] != places[:, group[:1]]).any(axis=1)
    return tuple(name for name, far in zip(shape, differ) if far)


def _kind(instruction, computation) -> str | None:
    kind = instruction.operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    # A TPU adds up and keeps one part in a fusion that ends in a slice of the sum.
    if kind == "all-reduce" and any(
        i.operation == "dynamic-slice" and instruction.name in i.operands for i in computation
    ):
        return "reduce-scatter"
    return kind


def collectives(text: str, shape: dict[str, int]) -> list[Collective]:
    """Every communication of a program.

    Args:
        text: of the compiled program.
        shape: of the mesh, name of each axis -> size, outermost first (`dict(mesh.shape)`).
    """
    entry, computations = _computations(text)
    runs, found = _runs(entry, computations), []
    for name, instructions in computations.items():
        types = {i.name: i.type for i in instructions}
        for instruction in instructions:
            kind = _kind(instruction, instructions)
            if kind is None or not runs[name]:
                continue
            groups = _groups(instruction.text, math.prod(shape.values()))
            axes = _axes(groups, shape)
            if not axes:
                continue  # each device alone
            held = sum(size for o in instruction.operands for *_, size in parse_shapes(types.get(o, "")))
            size = math.prod(shape[a] for a in axes) if kind == "collective-permute" else max(map(len, groups))
            found.append(Collective(kind, axes, size, held * SENT[kind](size), runs[name]))
    return found


def loops(text: str) -> list[Loop]:
    """Every loop of a program."""
    _, computations = _computations(text)
    return [
        Loop(_trips(i, computations), tuple(parse_shapes(i.type)))
        for instructions in computations.values() for i in instructions if i.operation == "while"
    ]  # fmt: skip


def by_kind_and_axes(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """(kind, axes) -> (how often, bytes that a device sends) of a run of the program, the largest first."""
    totals = collections.defaultdict(lambda: (0, 0.0))
    for c in found:
        times, total = totals[c.kind, c.axes]
        totals[c.kind, c.axes] = times + c.times, total + c.total
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))
