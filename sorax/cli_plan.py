"""`sorax plan`: what a training would take on TPUs that are not here."""

import math
import re

from sorax.errors import UserError

PROGRAMS = ("train", "sample", "encode", "decode")


def add_verb(verbs):
    """Adds `plan` to the verbs of the command line."""
    text = "say whether an experiment fits on a TPU topology, how fast it should be and what it costs, without a TPU"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.set_defaults(run=plan_verb, takes_overrides=True)
    plan.add_argument("--config", required=True, help="experiment of a DiT, such as experiments/wan_14b.py")
    plan.add_argument("--topology", required=True, help="chips along each side, such as v5p:4x4x8, or v5p-256")
    plan.add_argument("--slices", type=int, default=1, help="so many of it (default: %(default)s)")
    plan.add_argument("--video", default="", metavar="TxHxW", help="frames, height and width of the videos that fill "
                      "the rows (default: the largest of 16:9 that data.max_tokens lets through)")  # fmt: skip
    plan.add_argument("--tokens", type=float, default=0.0, help="budget of tokens, such as 1e12: says days, chip-hours")
    plan.add_argument("--programs", default=",".join(PROGRAMS), help="which to compile (default: %(default)s)")
    plan.add_argument("--search", action="store_true", help="try mesh shapes, remat policies and row lengths")
    plan.add_argument("--max-compiles", type=int, default=8, help="of --search (default: %(default)s)")
    plan.add_argument("--config.KEY=VALUE", dest="_", help="override any key, such as --config.mesh.fsdp=16")


def plan_verb(arguments, overrides):
    from sorax import topology

    topology.prepare()  # before jax starts
    from sorax import config as config_lib
    from sorax import plan, plan_report, plan_search
    from sorax.objectives import complete
    from sorax.runs import anchored

    if not 0 <= arguments.tokens < math.inf:
        raise UserError(f"--tokens is {arguments.tokens:g}: it is a number of tokens, such as 1e12")
    config = anchored(config_lib.load_config(arguments.config, overrides, complete), arguments.config)
    place = topology.open_topology(arguments.topology, arguments.slices)
    names, video = _programs(arguments.programs), _video(arguments.video)
    if not arguments.search:

        def progress(name, program):
            print(f"{name}: {plan_report.memory_line(program) if program else 'compiling ...'}", flush=True)

        made = plan.make_plan(config, place, names=names, video=video, report=progress)
        print("\n" + "\n".join(plan_report.lines(made, arguments.tokens)))
        return
    if arguments.max_compiles < 1:
        raise UserError(f"--max-compiles is {arguments.max_compiles}: it must be at least 1")

    def report(done, c):
        rows = f"{c.batch} rows of {c.row_tokens:,}"
        print(f"{done + 1}/{arguments.max_compiles}: mesh {c.axes}, remat {c.remat}, {rows}", flush=True)

    plans = plan_search.search(config, place, names=("train",), video=video, most=arguments.max_compiles, report=report)
    print("\n".join(plan_report.table(plans)))
    fitting = [p for p in plans if p.fits and p.step]
    if not fitting:
        raise UserError(f"none of the {len(plans)} that were compiled fits {place.name}: take more chips, or more "
                        "--max-compiles")  # fmt: skip
    best = max(fitting, key=lambda p: p.useful_tokens / p.step.step)
    print("\n" + "\n".join(plan_report.lines(best, arguments.tokens)))


def _programs(text):
    names = tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown or not names:
        raise UserError(f"--programs {text!r}: use some of {','.join(PROGRAMS)}")
    return names


def _video(text):
    if not text:
        return None
    if not re.fullmatch(r"\d+x\d+x\d+", text) or "x0" in "x" + text:
        raise UserError(f"--video {text!r} is not TxHxW (frames, height, width): write for example --video 81x720x1280")
    return tuple(map(int, text.split("x")))
