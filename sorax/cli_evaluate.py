"""`sorax evaluate`: scores of a run, of a VAE or of anybody's videos; reports verified and compared."""

import os

from sorax import backend
from sorax.errors import UserError

SUITES = ("scores", "world", "video", "vbench")


def add_verb(verbs, several):
    """Adds the verb; `several` adds the flags of several processes."""
    text = "score a run against exact ground truth, a VAE by its copies, or any videos against real ones"
    verb = verbs.add_parser("evaluate", help=text, description=text)
    verb.set_defaults(run=evaluate_verb, takes_overrides=True, prefix="--data.")
    verb.add_argument("--run", default="", dest="workdir", help="run folder, or a diffusers folder with a VAE")
    verb.add_argument("--suite", choices=SUITES, default="scores",
                      help="scores: prompts and VAE in a minute or so; world: all questions that the embedded world "
                      "answers; video: anybody's videos against real ones; vbench: samples laid out for VBench's own "
                      "tool (default: %(default)s)")  # fmt: skip
    verb.add_argument("--out", default="report", help="report folder (default: %(default)s); in RUN/report, the model "
                      "card of an export quotes its scores")  # fmt: skip
    verb.add_argument("--clips", type=int, default=None, help="clips of each split or part (default: the config's; 64 "
                      "in the world suite)")  # fmt: skip
    verb.add_argument("--weights", choices=("ema", "raw"), default="ema")
    verb.add_argument("--steps", type=int, default=None, help="sampling steps (default: the config's)")
    verb.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the config's)")
    verb.add_argument("--solver", default=None, help="euler, ddim, unipc or dpm++ (default: the config's)")
    verb.add_argument("--data", default="", help="of a VAE or imported weights: folder of videos, or world (default: "
                      "the run's data)")  # fmt: skip
    verb.add_argument("--data.KEY=VALUE", dest="_", help="override a key of it, such as --data.max_tokens=4096 or "
                      "--data.world.shapes='((17,256,448),)'")  # fmt: skip
    verb.add_argument("--lpips", default="", metavar="FILE", help="of copies: LPIPS weights, see sorax/lpips.py")
    verb.add_argument("--seed", type=int, default=0, help="of samples, with --suite video and vbench")
    verb.add_argument("--samples", type=int, default=None, help="of a prompt, with --suite world (in its reliability "
                      "part, default 16) and vbench (default 5; it wants 25 for temporal flickering)")  # fmt: skip
    world = verb.add_argument_group("--suite world")
    world.add_argument("--prompts", type=int, default=200, help="of the reliability part (default: %(default)s)")
    world.add_argument("--parts", nargs="+", default=(), metavar="NAME", help="these alone, such as reliability or "
                       "prompts/test (default: all)")  # fmt: skip
    world.add_argument("--verify", default="", metavar="REPORT", help="make a random part of this report again, with "
                       "--run, and compare every pixel and number")  # fmt: skip
    world.add_argument("--units", type=int, default=3, help="files of samples that --verify makes again")
    video = verb.add_argument_group("--suite video")
    video.add_argument("--reference", default="", metavar="DATA", help="real videos with captions: a folder, tfds:NAME "
                       "or world")  # fmt: skip
    video.add_argument("--videos", default="", metavar="DIR", help="videos of any generator, with their prompts in "
                       "metadata.jsonl, in place of --run")  # fmt: skip
    video.add_argument("--paired", action="store_true", help="the videos are copies of those of their names")
    video.add_argument("--reconstruct", action="store_true", help="score the VAE's copies of the reference alone")
    video.add_argument("--features", default="", metavar="FOLDER", help="VideoMAE of transformers, for FVD and the "
                       "kernel distance")  # fmt: skip
    video.add_argument("--no-fvd", action="store_true", help="the kernel distance alone, which needs fewer videos")
    video.add_argument("--clip-model", default="", metavar="FOLDER", help="CLIP of transformers, for the CLIP score")
    vbench = verb.add_argument_group("--suite vbench")
    vbench.add_argument("--prompt-file", default="", help="VBench's prompts, one a line")
    vbench.add_argument("--names-file", default="", help="the prompts as VBench names them, if those are longer ones")
    verb.add_argument("--compare", nargs="+", default=(), metavar="REPORT", help="differences between reports of one "
                      "suite, with their significance, as a page in --out")  # fmt: skip
    several(verb)


def evaluate_verb(arguments, overrides):
    from sorax import processes

    if arguments.clips is not None and arguments.clips < 1:
        raise UserError(f"--clips {arguments.clips}: score at least 1 clip of each split")
    if arguments.compare:
        _compare(arguments)
        return
    if not (arguments.workdir or arguments.videos or arguments.verify):
        raise UserError("sorax evaluate needs --run FOLDER (or --videos DIR, with --suite video), or --compare REPORTS")
    processes.start(arguments.coordinator, arguments.processes, arguments.process)
    backend.keep_programs()
    if arguments.verify:
        _verify(arguments)
    elif arguments.suite == "world":
        _world(arguments, overrides)
    elif arguments.suite == "video":
        _video(arguments, overrides)
    elif arguments.suite == "vbench":
        _vbench(arguments)
    else:
        if processes.count() > 1:
            raise UserError("--suite scores is the work of one process: run it alone, or take --suite world")
        evaluate(arguments.workdir, arguments.out, arguments.clips, data=arguments.data, overrides=overrides,
                 lpips=arguments.lpips, weights=arguments.weights, **_sampling(arguments, "solver"))  # fmt: skip


def _sampling(arguments, *without):
    given = dict(num_steps=arguments.steps, guidance_scale=arguments.guidance, solver=arguments.solver)
    for name in without:
        if given.pop(name) is not None:
            raise UserError(f"--{name} is of --suite world alone: the others take the config's")
    return given


def evaluate(workdir, out, clips=None, **settings):
    """Scores a run or VAE (`evaluate_folder`) and prints what was found."""
    from sorax import evaluate

    scores = evaluate.evaluate_folder(workdir, out, num_clips=clips, **settings)
    print("\n".join(evaluate.summary_lines(scores)))
    print(f"report: {out}")


def _world(arguments, overrides):
    from sorax.evaluate import with_data
    from sorax.evaluate_suite import evaluate_world, summary_lines
    from sorax.runs import load_run
    from sorax.world_suite import Counts

    if arguments.lpips:
        raise UserError("--lpips is for a VAE: name its folder with --run, without --suite")
    run = with_data(load_run(arguments.workdir, arguments.weights), arguments.data, overrides)
    samples = 16 if arguments.samples is None else arguments.samples
    counts = Counts(arguments.clips or 64, arguments.prompts, samples)
    scores = evaluate_world(run, arguments.out, counts=counts, only=arguments.parts, **_sampling(arguments))
    if scores is not None:
        print("\n".join(summary_lines(scores)))
        print(f"report: {os.path.join(arguments.out, 'index.html')}")


def _video(arguments, overrides):
    from sorax.evaluate_suite import summary_lines
    from sorax.video_suite import evaluate_videos

    if not arguments.reference:
        raise UserError("--suite video needs --reference: a folder of real videos with captions, tfds:NAME or world")
    scores = evaluate_videos(
        arguments.out, arguments.reference, run=arguments.workdir, videos=arguments.videos, paired=arguments.paired,
        reconstruct=arguments.reconstruct, weights=arguments.weights, features=arguments.features,
        clip=arguments.clip_model, fvd=not arguments.no_fvd, lpips=arguments.lpips, num_clips=arguments.clips,
        seed=arguments.seed, overrides=overrides, **_sampling(arguments),
    )  # fmt: skip
    if scores is not None:
        print("\n".join(summary_lines(scores)))
        print(f"report: {os.path.join(arguments.out, 'index.html')}")


def _vbench(arguments):
    from sorax.runs import load_run
    from sorax.vbench import SAMPLES, write_layout

    if not arguments.prompt_file:
        raise UserError("--suite vbench needs --prompt-file: VBench's prompts, one a line")
    run = load_run(arguments.workdir, arguments.weights)
    made = write_layout(
        run, arguments.prompt_file, arguments.out, names_file=arguments.names_file, seed=arguments.seed,
        samples=SAMPLES if arguments.samples is None else arguments.samples, **_sampling(arguments, "solver"),
    )  # fmt: skip
    print(f"{made} videos made: {os.path.join(arguments.out, 'samples')} is what VBench's own tool reads")


def _verify(arguments):
    from sorax.suite import read_described

    seed = int.from_bytes(os.urandom(4), "little")
    if read_described(arguments.verify).get("suite") == "video":
        from sorax.video_suite import verify_videos

        problems = verify_videos(arguments.verify, arguments.units, seed)
    else:
        from sorax.evaluate import with_data
        from sorax.evaluate_suite import verify_world
        from sorax.runs import load_run

        if not arguments.workdir:
            raise UserError(f"--verify {arguments.verify} needs --run: the run that the report is of")
        run = with_data(load_run(arguments.workdir, arguments.weights), arguments.data, ())
        problems = verify_world(run, arguments.verify, units=arguments.units, seed=seed)
    print("\n".join(problems) or f"{arguments.verify}: {arguments.units} files of samples (drawn by seed {seed}) were "
          "made again: every pixel and judgement is the same")  # fmt: skip
    if problems:
        raise UserError(f"{arguments.verify} cannot be reproduced here: {len(problems)} difference(s), listed above")


def _compare(arguments):
    from sorax.comparison import text_table
    from sorax.report_compare import compare_reports

    print(text_table(compare_reports(list(arguments.compare), arguments.out)))
    print(f"comparison: {os.path.join(arguments.out, 'compare.html')}")
