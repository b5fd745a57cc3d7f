"""Which mesh, remat policy and row length train fastest on a topology: counted first, then compiled, best first."""

import dataclasses
import itertools
from collections.abc import Callable

from sorax import flops, functional, roofline, sharding
from sorax.dit import REMAT
from sorax.dit_task import dit_task
from sorax.errors import UserError
from sorax.plan import Plan, affine_of_rows, make_plan, read, usual_rows
from sorax.plan_programs import params_of
from sorax.topology import Topology

ROW_LENGTHS = (0.5, 1, 2)  # times the experiment's own; rows are as many fewer
STATE_BYTES = 16  # of a parameter: itself, EMA and Adam's two moments, in float32
# Values of a token's width that a layer keeps for the backward pass, by remat policy. `dots`: results of products.
KEPT = {"none": 60, "dots": 14, "full": 1, "offload": 0}
# Values of a token's width that one layer needs while it is worked on, mostly backward: so many, and so many times the
# width of the MLP in widths. That gives what libtpu took for the 1.3B (120) and the 14B (80).
WORKING = 45, 13


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is tried: axes of the mesh, remat policy, rows of a step and their length; what counting says of it.

    memory: bytes of a device. seconds: of a step, per useful token of the batch.
    """

    axes: tuple[int, int, int, int]
    remat: str
    batch: int
    row_tokens: int
    memory: float
    seconds: float

    def overrides(self) -> dict:
        """Config keys that make it."""
        axes = {f"mesh.{name}": size for name, size in zip(sharding.AXES, self.axes)}
        return axes | {"train.remat": self.remat, "data.batch": self.batch, "data.row_tokens": self.row_tokens}


def candidates(config, topology: Topology, video=None) -> list[Candidate]:
    """All that are possible, those that should fit and be fast first. Nothing is compiled.

    A step has the same tokens in all, of the same videos: shorter ones would be cheaper a token, and another task.

    Args:
        video: (frames, height, width) that fill the rows; None for what the experiment's own rows hold.

    Raises:
        UserError: there is none.
    """
    recipe = read(config)
    data, count = recipe.data, len(topology.devices)
    mesh = sharding.make_mesh(data=count, devices=topology.devices)
    task = dit_task(recipe.config, data, recipe.settings, mesh)
    model, text = task.model, task.text_model
    video = video or usual_rows(recipe, model).video
    parameters = sum(map(functional.count, params_of(task).values()))
    found = []
    for scale, axes, remat in itertools.product(ROW_LENGTHS, _axes(count), REMAT):
        ranks, split = axes[0] * axes[1], axes[2] * axes[3]
        row_tokens, batch = int(data.row_tokens * scale), int(data.batch / scale)
        possible = batch * row_tokens == data.batch * data.row_tokens and batch % ranks == 0
        possible &= batch // ranks % recipe.settings.accumulate == 0
        if not possible or model.num_heads % split or row_tokens % axes[2]:
            continue
        here = dataclasses.replace(recipe, data=dataclasses.replace(data, row_tokens=row_tokens, batch=batch))
        try:
            rows = usual_rows(here, model, video)
        except UserError:  # a row that holds no video
            continue
        lengths = [rows.tokens] * rows.samples, [rows.text] * rows.samples
        attention = batch * flops.dit_attention(model, *lengths, **task.routing)
        affine = batch * (affine_of_rows(recipe, task, row_tokens) + flops.text_forward(text, lengths[1]))
        shard = parameters / (axes[1] * axes[2] * axes[3])
        tokens = batch / ranks * row_tokens / axes[2] / recipe.settings.accumulate
        values = KEPT[remat] * model.num_layers + WORKING[0] + WORKING[1] * model.ffn_dim / model.width
        memory = shard * (STATE_BYTES + 4) + 2 * tokens * model.width * values
        sent = _traffic(axes, parameters, tokens, model, recipe.settings.accumulate, topology, remat)
        work = roofline.Work(
            affine=affine, attention=attention, places=batch * row_tokens, width=model.width, layers=model.num_layers,
            head_dim=model.head_dim, state=shard * (STATE_BYTES + 4), weights=2 * parameters / axes[3],
            passes=recipe.settings.accumulate,
        )  # fmt: skip
        step = roofline.estimate(work, remat, topology.device, count, sent).step
        found.append(Candidate(axes, remat, batch, row_tokens, memory, step / (batch * rows.samples * rows.tokens)))
    if not found:
        raise UserError(f"no mesh of {count} devices can share {data.batch} rows and {model.num_heads} heads: make "
                        "config.data.batch a multiple of more of the devices")  # fmt: skip
    limit = topology.device.memory
    return sorted(found, key=lambda c: (c.memory > limit, c.seconds if c.memory <= limit else c.memory))


def _axes(count):
    """All (data, fsdp, context, tensor) with this product."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data, fsdp, context in itertools.product(divisors, repeat=3):
        if count % (data * fsdp * context) == 0:
            yield data, fsdp, context, count // (data * fsdp * context)


def _traffic(axes, parameters, tokens, model, passes, topology, remat):
    """Seconds of traffic by mesh axes, counted: weights and gradients over fsdp and data, widths of tokens else."""
    data, fsdp, context, tensor = axes
    device, repeats = topology.device, max(roofline.REPEATED[remat])
    speed = device.link_bandwidth * 2  # of one closed side, or of two open ones
    slow = device.slice_bandwidth if topology.slices > 1 else speed
    weights, width = 2 * parameters / tensor, 2 * model.width * tokens * model.num_layers * passes
    share = {n: (n - 1) / n for n in (*axes, fsdp * context)}
    sent = {
        ("fsdp", "context"): weights * share[fsdp * context] * passes * (4 + repeats),
        ("data",): 4 * parameters / (tensor * fsdp * context) * 2 * share[data] * (speed / slow),
        # q, k, v and back; a sum after attention, after attention to text and after the MLP.
        ("context",): 4 * width * share[context] * (2 + 1 + repeats) / 2,
        ("tensor",): 3 * 2 * width * share[tensor] * (2 + repeats),
    }
    return {names: total / speed for names, total in sent.items()}


def search(config, topology: Topology, *, names=("train",), video=None, most: int = 8,
           report: Callable = lambda done, candidate: None) -> list[Plan]:  # fmt: skip
    """Plans of the most promising candidates, each compiled.

    Args:
        names, video: as `make_plan` takes them. most: how many are compiled. report: called before each with how many
            are done and the candidate.
    """
    plans, tried = [], candidates(config, topology, video)
    for done, candidate in enumerate(tried[:most]):
        report(done, candidate)
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            for name, value in candidate.overrides().items():
                section, key = name.split(".")
                changed[section][key] = value
        plans.append(make_plan(changed, topology, names=names, video=video))
    return plans
