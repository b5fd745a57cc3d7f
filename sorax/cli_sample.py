"""`sorax sample`: videos from prompts, images and clips, in every mode, of any length."""

import sys

from sorax import backend
from sorax.cli_caption import add_expansion, expand_prompts
from sorax.errors import UserError


def add_verb(verbs):
    text = "make videos from prompts, images and clips with a trained run"
    verb = verbs.add_parser("sample", help=text, description=text)
    verb.set_defaults(run=sample_verb, takes_overrides=False)
    add_flags(verb)


def add_flags(verb):
    """The flags of the verb, which the app knows too; see `sorax.sample_files`."""
    verb.add_argument("--run", required=True, dest="workdir", help="run folder")
    verb.add_argument("--prompt", action="append", default=[], help="what to show; may be given several times")
    verb.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    verb.add_argument("--size", default="", help="WxH in pixels (default: that of the first file, as large as most of "
                      "what the run was trained on; without a file, that)")  # fmt: skip
    verb.add_argument("--frames", type=int, default=0, help="number of frames (default: likewise)")
    verb.add_argument("--seconds", type=float, default=None, help="the same in seconds; with --extend, --connect, and "
                      "--loop of a clip: of what is new")  # fmt: skip
    verb.add_argument("--fps", type=float, default=0.0, help="frames per second (default: the run's)")
    verb.add_argument("--out", default="sample.mp4", help=".mp4, .gif, .png, .jpg, or FOLDER/ or NAME_%%04d.png for a "
                      "file a frame; several prompts are numbered")  # fmt: skip
    add_expansion(verb)
    mode = verb.add_argument_group("what there is")
    mode.add_argument("--image", default="", metavar="FILE", help="the first frame")
    mode.add_argument("--keyframe", action="append", default=[], metavar="TIME:FILE", help="an image at a frame "
                      "(48:b.png) or second (2s:b.png); may be given several times")  # fmt: skip
    mode.add_argument("--video", default="", metavar="FILE", help="a clip to extend, loop or edit")
    mode.add_argument("--extend", choices=("forward", "backward"), default="", help="new frames behind or before it")
    mode.add_argument("--loop", action="store_true", help="the last frame leads to the first, of new frames behind "
                      "--video, or of a new video")  # fmt: skip
    mode.add_argument("--connect", nargs=2, default=(), metavar="FILE", help="new frames between two clips")
    mode.add_argument("--strength", type=float, default=None, help="change --video: 0.01 hardly, 1 wholly")
    mode.add_argument("--mask", default="", metavar="FILE", help="image or video: change --video where it is white")
    long = verb.add_argument_group("long videos")
    long.add_argument("--shot", action="append", default=[], metavar="TIME:PROMPT", help="in place of --prompt, what "
                      "is shown from a frame (0:...) or second (5s:...) on; may be given several times")  # fmt: skip
    long.add_argument("--cut", action="store_true", help="each --shot is a scene of its own (default: it goes on)")
    long.add_argument("--window", type=int, default=None, help="most frames made at a time, 0: all (default: the "
                      "longest that the run was trained on, where it can go on from given frames)")  # fmt: skip
    long.add_argument("--overlap", type=int, default=0, help="frames before it that a window sees (default: 1/4 of it)")
    long.add_argument("--rising", type=float, default=0.0, metavar="SHARE", help="0 to 1: noise rises along time, the "
                      "last frame of a window lags behind by this share of the steps (default: 0)")  # fmt: skip
    how = verb.add_argument_group("how")
    how.add_argument("--solver", default="", help="euler, ddim, unipc or dpm++ (default: the config's)")
    how.add_argument("--steps", type=int, default=0, help="sampling steps (default: the config's)")
    how.add_argument("--guidance", type=float, default=None, help="guidance scale, 1 = off (default: the config's)")
    how.add_argument("--guidance-interval", default="", metavar="LO:HI", help="noise levels, from 0 to 1, between "
                     "which there is guidance (default: all)")  # fmt: skip
    how.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1: bring the contrast of guided samples "
                     "back (default: 0)")  # fmt: skip
    how.add_argument("--shift", type=float, default=None, help="noise schedule shift (default: the config's)")
    how.add_argument("--shift-tokens", type=int, default=0, help="tokens of a video that has this shift; others "
                     "have it by the square root of theirs (default: all have it)")  # fmt: skip
    how.add_argument("--reuse", type=float, default=0.0, metavar="CHANGE", help="leave out all layers but the first "
                     "in steps that change what it does by less than this, such as 0.1 (default: none)")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="noise seed; prompt k of several uses seed + k")
    how.add_argument("--weights", choices=("ema", "raw"), default="ema")
    how.add_argument("--mesh", default="", metavar="AXIS=N,...", help="devices to share the work: data, fsdp, context, "
                     "tensor (default: one device)")  # fmt: skip
    how.add_argument("--noise", default="", metavar="FILE.npy", help="initial noise [B, t, h, w, C], one a prompt")
    how.add_argument("--save-latents", default="", metavar="FILE.npy", help="keep the final latents [B, t, h, w, C], "
                     "normalised, as before decoding")  # fmt: skip


def sample_verb(arguments, _):
    from sorax import media, sample_files
    from sorax.runlog import Progress
    from sorax.runs import load_run

    ask = sample_files.check(arguments)
    backend.keep_programs()
    if arguments.expand:
        arguments.prompt = expand_prompts(arguments, arguments.prompt, arguments.expander or arguments.workdir,
                                          arguments.seed)  # fmt: skip
    run = load_run(arguments.workdir, arguments.weights)
    order = sample_files.prepare(arguments, ask, run)
    for note in order.notes:
        print(note)
    generator = run.generator(mesh_of(arguments.mesh))
    frames, height, width = order.shape
    # Imported weights make 81 frames of 832x480 unless told otherwise: hours on a CPU, which should not look like none.
    print(f"sampling {len(order.outs)} x {frames} frames of {width}x{height}, {order.sampling['num_steps']} steps of "
          f"{order.sampling['solver']}", flush=True)  # fmt: skip
    total = len(order.outs) * frames
    with Progress("sample", total, unit="frames") as progress:

        def advance(count):
            if progress.done + count < total:  # the last line is that of the file
                progress.advance(progress.done + count)

        latents = sample_files.make_files(generator, order, warn=_warn, on_frames=advance)
    if arguments.save_latents:
        media.write_array(arguments.save_latents, latents)
        print(f"{arguments.save_latents}: final latents")
    for out, prompt in zip(order.outs, order.prompts):
        print(f"{out}: {prompt}")


def _warn(text):
    print(f"warning: {text}", file=sys.stderr, flush=True)


def mesh_of(text):
    """Mesh of the devices that --mesh names; None without."""
    if not text:
        return None
    from sorax.sharding import AXES, make_mesh

    axes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in axes or not number.strip().isdecimal():
            raise UserError(f"--mesh {text!r}: write for example data=2,context=4, of {', '.join(AXES)}")
        axes[name.strip()] = int(number)
    return make_mesh(**axes)
