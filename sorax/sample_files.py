"""The flags of `sorax sample` as files: what the command line and the app do, in the same steps.

`check` the flags, `prepare` an order from the files that they name, `make_files`.
"""

import contextlib
import dataclasses
import json
import os
import shlex

import numpy as np

from sorax import media
from sorax.ask import Ask, canvas_for, prompts_at
from sorax.errors import UserError
from sorax.generate import legal_shape
from sorax.modes import untrained, untrained_rising
from sorax.runs import Run
from sorax.windows import Job, longest_gap, make


@dataclasses.dataclass(frozen=True)
class Order:
    """Files that are to be made.

    outs: their names. scenes: one after the other, each a job for every file. facts: what all files say of themselves.
    notes: what was rounded or cut, in words for the user. settings: of `windows.make`, without hooks.
    given, rising: `config.flow.given` and `config.flow.rising` of the run.
    """

    outs: tuple[str, ...]
    scenes: tuple[tuple[Job, ...], ...]
    facts: dict
    notes: tuple[str, ...]
    settings: dict
    given: tuple[float, ...]
    rising: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of each file."""
        return self.facts["frames"], self.facts["height"], self.facts["width"]

    @property
    def sampling(self) -> dict:
        """Solver, steps and guidance, as `Generator.latents` takes them."""
        return self.facts["sampling"]

    @property
    def prompts(self) -> list[str]:
        """What each file shows, in one line."""
        jobs = self.scenes[0]
        return [job.prompt if isinstance(job.prompt, str) else " | ".join(p for _, p in job.prompt) for job in jobs]


def check(arguments) -> Ask:
    """What is asked for, of flags that go together; reads nothing yet.

    arguments: as `cli_sample.add_flags` parses them.

    Raises:
        UserError: flags that do not go together.
    """
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
    for name in ("pin", "expander", "endpoint"):
        if getattr(arguments, name, "") and not arguments.expand:
            raise UserError(f"--{name} is of the expansion of prompts: add --expand")
    if arguments.expand and not arguments.prompt:
        raise UserError("--expand makes each --prompt longer: give one")
    return ask


def prepare(arguments, ask: Ask, run: Run) -> Order:
    """Looks at the files that are given, and says what will be made; prompts are taken as they are.

    arguments: with `argv`, the words of the command after `sorax`.

    Raises:
        UserError: files, sizes, times or settings that cannot be.
    """
    stride = run.networks.vae_config.temporal_stride
    goes_on = any(run.given[4:5])  # trained to go on from several frames
    window = (run.longest() if goes_on else 0) if arguments.window is None else arguments.window
    canvas, fps = canvas_for(ask, run, longest_gap(window, arguments.overlap, stride))
    prompts = [prompts_at(arguments.shot, fps)] if arguments.shot else arguments.prompt or [""]
    noise = _read_noise(arguments.noise, len(prompts))
    jobs = tuple(Job(canvas, prompt, arguments.seed + k, arguments.negative_prompt, noise[k])
                 for k, prompt in enumerate(prompts))  # fmt: skip
    scenes = tuple((job,) for job in _scenes(jobs[0], run)) if arguments.cut else (jobs,)
    frames, (height, width) = sum(scene[0].canvas.shape[0] for scene in scenes), canvas.shape[1:]
    outs = _names(arguments.out, len(jobs))
    media.check_suffix(outs[0], frames)
    sampling = _sampling(arguments, run)
    facts = dict(command=shlex.join(["sorax", *arguments.argv]), run=os.path.basename(os.path.abspath(run.workdir)),
                 step=run.step, checkpoint=run.identity, frames=frames, width=width, height=height, fps=fps,
                 negative_prompt=arguments.negative_prompt, sampling=sampling)  # fmt: skip
    settings = dict(size=window, overlap=arguments.overlap, **sampling)
    return Order(tuple(outs), scenes, facts, canvas.notes, settings, run.given, run.rising)


def make_files(generator, order: Order, *, warn, on_frames=lambda count: None, on_request=lambda request: None,
               **hooks) -> list[np.ndarray]:  # fmt: skip
    """Writes the files of an order, each with a comment in JSON that says how it was made.

    Args:
        warn: called once with each thing that the checkpoint was not trained for, in words.
        on_frames: called with the number of frames that were written. on_request: called with each `Request`, before
            it is made. hooks: of `Generator.latents`.

    Returns:
        the latents of each file, [t, h, w, C].

    Raises:
        UserError: what a request cannot be, or a file that cannot be written; then none is left.
    """
    latents, said = [[] for _ in order.outs], set()
    if text := untrained_rising(order.sampling.get("rising", 0.0), order.rising):
        warn(text)

    def look(number, request):
        text = untrained(request.given[0], order.given) if request.given else None
        if text and text not in said:
            said.add(text)
            warn(text)
        on_request(request)

    with contextlib.ExitStack() as stack:
        writers = []
        for k, out in enumerate(order.outs):
            own = dict(seed=order.scenes[0][k].seed, prompt=[scene[k].prompt for scene in order.scenes])
            comment = json.dumps(order.facts | own, ensure_ascii=False)
            writers.append(stack.enter_context(media.video_writer(out, order.facts["fps"], comment)))

        def write(number, frames):
            writers[number](frames)
            on_frames(len(frames))

        for scene in order.scenes:
            make(generator, scene, on_frames=write, on_latents=lambda k, some: latents[k].append(some),
                 on_request=look, **order.settings, **hooks)  # fmt: skip
    return [np.concatenate(parts) for parts in latents]


def _scenes(job, run):
    """A job for each of the prompts of one, of as many frames as it is shown for."""
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


def _read_noise(path, count):
    """The noise of each prompt from a .npy file; None each if there is none."""
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
