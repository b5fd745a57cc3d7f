"""A plan in words and tables."""

from sorax import hlo, roofline
from sorax.devices import GIB
from sorax.plan import Plan
from sorax.plan_programs import Program

DAY = 86400.0


def lines(plan: Plan, tokens: float = 0.0) -> list[str]:
    """The report of a plan.

    tokens: a budget of useful tokens to say the days and chip-hours of; 0 for none.
    """
    topology, slices = plan.topology, f" x {plan.topology.slices} slices" if plan.topology.slices > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    counts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    found = [
        f"{topology.name}{slices}: {topology.chips} chips of {topology.device.memory / GIB:.2f} GiB and "
        f"{topology.device.flops * len(topology.devices) / topology.chips / 1e12:.0f} bf16 TFLOP/s; mesh {mesh}; remat "
        f"{plan.remat}" + (f"; {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""),
        f"parameters: {counts}",
        "",
    ]  # fmt: skip
    for program in plan.programs:
        found += [*_program(program), ""]
    if plan.step:
        found += [*_speed(plan, tokens), ""]
    found.append(verdict(plan))
    return found


def verdict(plan: Plan) -> str:
    """One line: whether everything fits, and what decides it."""
    worst = min(plan.programs, key=lambda p: p.memory.left)
    if plan.fits:
        return f"fits: the largest program ({worst.name}) leaves {worst.memory.left / GIB:.2f} GiB of a device free"
    over = -worst.memory.left / GIB
    return (f"DOES NOT FIT: {worst.name} is {over:.2f} GiB a device over; try a larger mesh.fsdp, mesh.context or "
            "mesh.tensor, train.remat=full or offload, train.accumulate, or shorter rows (--search)")  # fmt: skip


def memory_line(program: Program) -> str:
    """Whether a program fits, and by how much."""
    memory, state = program.memory, "fits" if program.fits else "DOES NOT FIT"
    by = f"{abs(memory.left) / GIB:.2f} GiB {'free' if memory.left >= 0 else 'over'}"
    return (f"{state}, {by}: {memory.total / GIB:.2f} of {memory.limit / GIB:.2f} GiB a device (compiled in "
            f"{program.seconds:.0f} s)")  # fmt: skip


def _program(program: Program) -> list[str]:
    memory = program.memory
    found = [f"{program.name}: {program.what}", f"  {memory_line(program)}"]
    parts = dict(params=memory.params, EMA=memory.ema, moments=memory.moments, inputs=memory.other_arguments,
                 activations=memory.activations, temporaries=memory.other_temporaries,
                 results=memory.results)  # fmt: skip
    found.append("  GiB: " + ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
                 + (f"; in the host's memory {memory.host / GIB:.2f}" if memory.host else ""))  # fmt: skip
    work = program.flops * (3 if program.name == "train" else 1)
    found.append(f"  operations: {_tera(work)} TFLOP, {_tera(work / program.devices)} a device"
                 + (" (forward and backward, without recomputation)" if program.name == "train" else ""))  # fmt: skip
    if program.error:
        return [*found, f"  the compiler says: {program.error}"]
    if not program.readable:
        return [*found, "  this compiler shows no text for this device: communication and activations are not known"]
    for (kind, axes), (times, total) in hlo.by_kind_and_axes(program.collectives).items():
        found.append(f"  sends {total / GIB:9.3g} GiB a device over {' x '.join(axes):15} in {times:5} {kind}")
    return found


def _speed(plan: Plan, tokens) -> list[str]:
    step, useful = plan.step, plan.useful_tokens
    a_day = useful / step.step * DAY
    total = plan.batch * plan.row_tokens
    found = [
        f"estimate of a training step: {_time(step.step)} = compute {_time(step.compute)} + element-wise "
        f"{_time(step.elementwise)} + optimizer and weights {_time(step.memory)} (or hidden traffic "
        f"{_time(step.hidden)}, if that is more) + traffic waited for {_time(step.exposed)}; at best "
        f"{_time(step.best)}",
        f"  MFU {plan.mfu:.1%}, {useful / step.step:,.0f} useful tokens/s ({useful / total:.1%} of the places of rows),"
        f" {a_day:.3g} useful tokens a day",
    ]  # fmt: skip
    if plan.sample_seconds is not None:
        found.append(f"  a guided sampling step: {_time(plan.sample_seconds)}")
    if tokens:
        days = tokens / a_day
        hours = days * 24 * plan.topology.chips
        found.append(f"  {tokens:.3g} useful tokens: {days:,.1f} days, {hours:,.0f} chip-hours")
    return [*found, "  assumed:", *(f"    {assumption}" for assumption in roofline.ASSUMPTIONS)]


def _time(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _tera(operations):
    return f"{operations / 1e12:,.0f}" if operations >= 1e14 else f"{operations / 1e12:.3g}"


def table(plans) -> list[str]:
    """Plans side by side, the fastest that fits first."""

    def rank(plan):
        return not plan.fits, -(plan.useful_tokens / plan.step.step if plan.step else 0.0)

    heads = ("data, fsdp, context, tensor", "remat", "rows x tokens", "GiB a device", "step, s", "MFU", "tokens/s")
    found = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for plan in sorted(plans, key=rank):
        worst = min(plan.programs, key=lambda p: p.memory.left)
        memory = f"{worst.memory.total / GIB:.2f}" + ("" if plan.fits else f", {-worst.memory.left / GIB:.2f} over")
        speed = ("-", "-", "-")
        if plan.step:
            speed = (f"{plan.step.step:.4g}", f"{plan.mfu:.1%}", f"{plan.useful_tokens / plan.step.step:,.0f}")
        axes, rows = ", ".join(map(str, plan.mesh.values())), f"{plan.batch} x {plan.row_tokens:,}"
        found.append(f"| {' | '.join((axes, plan.remat, rows, memory, *speed))} |")
    return found
