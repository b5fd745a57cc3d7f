"""`sorax sample`: videos from prompts, images and clips, in every mode, of any length."""

import contextlib
import json
import os
import shlex
import sys

from sorax import backend
from sorax.cli_caption import add_expansion, expand_prompts
from sorax.errors import UserError


def add_verb(verbs):
    text = "make videos from prompts, images and clips with a trained run"
    verb = verbs.add_parser("sample", help=text, description=text)
    verb.set_defaults(run=sample_verb, takes_overrides=False)
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
    how.add_argument("--solver", default="", help="euler, unipc or dpm++ (default: the config's)")
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
    from sorax import media
    from sorax.ask import Ask, canvas_for, prompts_at
    from sorax.modes import untrained_rising
    from sorax.runs import load_run
    from sorax.windows import Job, longest_gap, make

    ask = Ask(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()
                 if name in Ask.__dataclass_fields__})  # fmt: skip
    if bool(arguments.prompt) and bool(arguments.shot):
        raise UserError("--prompt and --shot: give one of them, each --shot with its time")
    if not arguments.prompt and not arguments.shot and not ask.files:
        raise UserError("there is nothing to show: give a --prompt, or an --image, --video or --keyframe")
    if arguments.cut and (ask.files or ask.loop or not arguments.shot):
        raise UserError("--cut makes each --shot a scene of its own: give --shot, and no clip, image or loop")
    if arguments.save_latents and not arguments.save_latents.endswith(".npy"):
        raise UserError(f"--save-latents {arguments.save_latents!r}: arrays are written as .npy files")
    backend.keep_programs()
    if arguments.expand:
        if not arguments.prompt:
            raise UserError("--expand makes each --prompt longer: give one")
        arguments.prompt = expand_prompts(arguments, arguments.prompt, arguments.expander or arguments.workdir,
                                          arguments.seed)  # fmt: skip
    run = load_run(arguments.workdir, arguments.weights)
    stride = run.networks.vae_config.temporal_stride
    goes_on = any(run.given[4:5])  # trained to go on from several frames
    window = (run.longest() if goes_on else 0) if arguments.window is None else arguments.window
    canvas, fps = canvas_for(ask, run, longest_gap(window, arguments.overlap, stride))
    for note in canvas.notes:
        print(note)
    prompts = [prompts_at(arguments.shot, fps)] if arguments.shot else arguments.prompt or [""]
    noise = _read_noise(arguments.noise, len(prompts))
    jobs = [Job(canvas, prompt, arguments.seed + k, arguments.negative_prompt, noise[k])
            for k, prompt in enumerate(prompts)]  # fmt: skip
    scenes = [jobs] if not arguments.cut else [[job] for job in _scenes(jobs[0], run)]
    frames = sum(scene[0].canvas.shape[0] for scene in scenes)
    outs = _names(arguments.out, len(jobs))
    media.check_suffix(outs[0], frames)
    sampling = _sampling(arguments, run)
    generator = run.generator(_mesh(arguments.mesh))
    height, width = canvas.shape[1:]
    # Imported weights make 81 frames of 832x480 unless told otherwise: hours on a CPU, which should not look like none.
    print(f"sampling {len(jobs)} x {frames} frames of {width}x{height}, {sampling['num_steps']} steps of "
          f"{sampling['solver']}", flush=True)  # fmt: skip
    if text := untrained_rising(arguments.rising, run.rising):
        print(f"warning: {text}", file=sys.stderr, flush=True)
    settings = dict(size=window, overlap=arguments.overlap, on_request=_warning(run.given), **sampling)
    facts = dict(command=shlex.join(["sorax", *arguments.argv]), run=os.path.basename(os.path.abspath(run.workdir)),
                 step=run.step, checkpoint=run.identity, frames=frames, width=width, height=height, fps=fps,
                 negative_prompt=arguments.negative_prompt, sampling=sampling)  # fmt: skip
    latents = _make(make, generator, scenes, outs, fps, facts, settings)
    if arguments.save_latents:
        media.write_array(arguments.save_latents, latents)
        print(f"{arguments.save_latents}: final latents")
    for out, job in zip(outs, jobs):
        print(f"{out}: {job.prompt if isinstance(job.prompt, str) else ' | '.join(p for _, p in job.prompt)}")


def _make(make, generator, scenes, outs, fps, facts, settings):
    """Writes scenes, lists of jobs, one after the other to the files of the jobs; returns the latents of each."""
    import numpy as np

    from sorax import media
    from sorax.runlog import Progress

    latents = [[] for _ in outs]
    total = len(outs) * facts["frames"]
    with contextlib.ExitStack() as stack:
        writers = []
        for k, out in enumerate(outs):
            of_file = facts | dict(seed=scenes[0][k].seed, prompt=[scene[k].prompt for scene in scenes])
            writers.append(stack.enter_context(media.video_writer(out, fps, json.dumps(of_file, ensure_ascii=False))))
        progress = stack.enter_context(Progress("sample", total, unit="frames"))
        done = 0

        def write(number, frames):
            nonlocal done
            writers[number](frames)
            done += len(frames)
            if done < total:  # the last line is that of the file
                progress.advance(done)

        for scene in scenes:
            make(generator, scene, on_frames=write, on_latents=lambda k, some: latents[k].append(some), **settings)
    return [np.concatenate(parts) for parts in latents]


def _scenes(job, run):
    """A job for each of the prompts of one, of as many frames as it is shown for."""
    import dataclasses

    from sorax.generate import legal_shape

    vae, patch_size = run.networks.vae_config, run.networks.dit_config.patch_size
    ends = [frame for frame, _ in job.prompt[1:]] + [job.canvas.num_frames]
    jobs, made = [], 0
    for k, ((begin, prompt), end) in enumerate(zip(job.prompt, ends)):
        if end <= begin:
            raise UserError(f"--shot {begin}:{prompt} begins where the video ends, at frame {end}: make that longer")
        frames = legal_shape(vae, patch_size, end - made, *job.canvas.shape[1:])[0]
        made += frames
        canvas = dataclasses.replace(job.canvas, num_frames=frames)
        jobs.append(dataclasses.replace(job, canvas=canvas, prompt=prompt, seed=job.seed + k, noise=None))
    return jobs


def _names(out, count):
    if count == 1:
        return [out]
    if out.endswith(("/", os.sep)):
        return [os.path.join(out, str(k), "") for k in range(count)]
    stem, suffix = os.path.splitext(out)
    return [f"{stem}_{k}{suffix}" for k in range(count)]


def _sampling(arguments, run):
    given = dict(num_steps=arguments.steps or None, solver=arguments.solver or None, guidance_scale=arguments.guidance,
                 shift=arguments.shift, guidance_rescale=arguments.guidance_rescale or None,
                 shift_tokens=arguments.shift_tokens or None, reuse=arguments.reuse or None,
                 rising=arguments.rising or None)  # fmt: skip
    if arguments.guidance_interval:
        low, _, high = arguments.guidance_interval.partition(":")
        try:
            given["guidance_interval"] = float(low), float(high)
        except ValueError:
            raise UserError(f"--guidance-interval {arguments.guidance_interval!r} is not LO:HI: write for example "
                            "0.2:0.9") from None  # fmt: skip
    return run.sampling() | {name: value for name, value in given.items() if value is not None}


def _warning(weights):
    """Warns once of each thing that the checkpoint was not trained for."""
    from sorax.modes import untrained

    said = set()

    def look(number, request):
        text = untrained(request.given[0], weights) if request.given else None
        if text and text not in said:
            said.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    return look


def _mesh(text):
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


def _read_noise(path, count):
    """The noise of each prompt from a .npy file; None each if there is none."""
    import numpy as np

    if not path:
        return [None] * count
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--noise {path!r} cannot be read ({error}): write it with numpy.save") from error
    if noise.ndim != 5 or len(noise) != count or not np.issubdtype(noise.dtype, np.floating):
        raise UserError(f"--noise {path!r} holds {noise.dtype} {list(noise.shape)}: it must be floats "
                        f"[{count}, t, h, w, C], one noise a prompt")  # fmt: skip
    return list(noise)
