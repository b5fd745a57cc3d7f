"""`sorax <verb>`: one thin function a verb. Heavy imports wait until a verb needs them."""

import argparse
import os
import re
import signal
import sys
import threading
import traceback

from sorax import backend, cli_app, cli_caption, cli_data, cli_evaluate, cli_plan, cli_sample
from sorax.errors import UserError


def main(argv=None) -> int:
    """Entry point; returns the exit code. A user's mistake is one line on stderr and code 2.

    One of several processes that fails does not return: it ends at once, so that the others end too.
    """
    if argv is None:
        backend.start_again_with_large_pages()
    backend.configure()
    if threading.current_thread() is threading.main_thread():
        # Schedulers end a job so: it stops as it does at Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments, overrides = _parse(sys.argv[1:] if argv is None else argv)
    try:
        arguments.run(arguments, overrides)
        return 0
    except UserError as error:
        print(f"sorax: {' '.join(str(error).split())}", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt:
        print("sorax: interrupted; the same command goes on from what it has saved", file=sys.stderr)
        return _leave(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == 28:  # no space left on device
            print(f"sorax: no space left on the disk ({error}): free some and run the command again", file=sys.stderr)
            return _leave(2)
        if _is_one_of_several():
            traceback.print_exc()
            print("sorax: one of several processes failed, or lost another (which says why); the same command on all "
                  "goes on from what is saved", file=sys.stderr)  # fmt: skip
            _leave(1)
        raise


def _is_one_of_several():
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _leave(code):
    if _is_one_of_several():
        from sorax import processes

        processes.leave(code)
    return code


def _several(verb):
    """Flags of a verb that several processes can work on."""
    text = "by default these three are taken from Slurm, Open MPI or the TPU pod, if there is one"
    verb.add_argument("--coordinator", default="", help=f"HOST:PORT of process 0, where several processes run; {text}")
    verb.add_argument("--processes", type=int, default=0, help="how many there are; 1: this one alone")
    verb.add_argument("--process", type=int, default=-1, help="number of this one, from 0")


def _parse(argv):
    text = "Train, sample, evaluate and export text-to-video models."
    parser = argparse.ArgumentParser(prog="sorax", description=text)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(function, name, text):
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function, takes_overrides=False)
        return sub

    quick = verb(quickstart, "quickstart", "train a small model on the embedded world, sample, evaluate and export it")
    quick.add_argument("--workdir", default="runs/quickstart", help="run folder (default: %(default)s)")

    train = verb(train_verb, "train", "train what an experiment describes, or go on where its run stands")
    train.add_argument("--config", required=True, help="experiment file, such as experiments/quickstart.py")
    train.add_argument("--workdir", required=True, help="run folder")
    train.add_argument("--profile", nargs="?", const="10:13", default="", metavar="START:STOP",
                       help="write a profiler's trace of these steps, counted from where the run goes on, to the run "
                       "folder (default: %(const)s)")  # fmt: skip
    _several(train)
    train.add_argument("--config.KEY=VALUE", dest="_", help="override any key, such as --config.optim.lr=1e-4")
    train.set_defaults(takes_overrides=True)

    encode = verb(encode_verb, "encode", "write the latents of videos, once for all trainings, or check them")
    encode.add_argument("--config", default="", help="DiT experiment whose data section names the videos")
    encode.add_argument("--vae", default="", help="VAE: run, DiT run or diffusers folder (default: config.vae.path)")
    encode.add_argument("--out", default="", help="folder of the latents; train with --config.data.path=shards:FOLDER")
    encode.add_argument("--shards", type=int, default=0, help="number of files (default: as many as stay below 256 MB)")
    encode.add_argument("--tokenizer", default="",
                        help="bytes, bpe (trained on the captions), or a folder with one (default: "
                        "config.data.tokenizer)")  # fmt: skip
    encode.add_argument("--verify", default="", metavar="FOLDER", help="check latents that are there; writes nothing")
    _several(encode)
    encode.add_argument("--config.KEY=VALUE", dest="_", help="override any key, such as --config.data.path=FOLDER")
    encode.set_defaults(takes_overrides=True)

    export = verb(export_verb, "export", "write the networks of a run, or its VAE alone, for other programs")
    export.add_argument("--run", required=True, dest="workdir", help="run folder, of a VAE for the VAE alone")
    export.add_argument("--out", required=True, help="new folder")
    export.add_argument("--format", choices=("diffusers", "safetensors", "comfyui"), default="diffusers")
    export.add_argument("--dtype", choices=("auto", "f32", "bf16"), default="auto",
                        help="auto: as imported, or f32 where it was trained")  # fmt: skip
    export.add_argument("--weights", choices=("ema", "raw"), default="ema")
    export.add_argument("--lora", choices=("merged", "adapter"), default="merged",
                        help="of a run with a LoRA: the whole pipeline with the LoRA in its weights, or the adapters "
                        "alone, for pipe.load_lora_weights or ComfyUI (default: %(default)s)")  # fmt: skip
    export.add_argument("--license", default="other", help="of the model card, such as apache-2.0")
    export.add_argument("--max-shard-size", default="5GB", help="of a file of weights, such as 500MB (default: 5GB)")
    _several(export)

    imported = verb(import_verb, "import", "make a run of open weights, to sample, train, evaluate and export")
    imported.add_argument("--from", required=True, dest="source",
                          help="WanPipeline folder, ComfyUI export, or a transformer's safetensors file")  # fmt: skip
    imported.add_argument("--workdir", required=True, help="new run folder")
    for name, what in (("vae", "safetensors file or AutoencoderKLWan folder"), ("text", "UMT5 or T5 folder"),
                       ("tokenizer", "folder with a tokenizer (default: that of --text)")):  # fmt: skip
        imported.add_argument(f"--{name}", default="", help=f"with a transformer's file: {what}")

    imported.add_argument("--lora", default="", metavar="FILE_OR_FOLDER",
                          help="a LoRA of these weights: safetensors of diffusers, PEFT, or with Wan's own names; it "
                          "is in what is sampled and exported, and training goes on with it")  # fmt: skip

    cli_sample.add_verb(verbs)
    cli_app.add_verb(verbs)
    cli_data.add_verbs(verbs)
    cli_evaluate.add_verb(verbs, _several)
    cli_caption.add_verbs(verbs)
    cli_plan.add_verb(verbs)

    arguments, rest = parser.parse_known_args(argv)
    prefix = getattr(arguments, "prefix", "--config.")
    overrides = [text.removeprefix(prefix) for text in rest if text.startswith(prefix)]
    unknown = [text for text in rest if not text.startswith(prefix)]
    if unknown or (overrides and not arguments.takes_overrides):
        parser.error(f"unknown argument {(unknown or rest)[0]!r}")
    arguments.argv = list(argv)
    return arguments, overrides


def train_verb(arguments, overrides):
    from sorax import config, processes
    from sorax.objectives import complete
    from sorax.runs import anchored
    from sorax.train import train

    processes.start(arguments.coordinator, arguments.processes, arguments.process)
    profile = _steps(arguments.profile) if arguments.profile else None
    loaded = config.load_config(arguments.config, overrides, complete)
    if os.path.dirname(os.path.abspath(arguments.config)) != os.path.abspath(arguments.workdir):
        loaded = anchored(loaded, arguments.config)
    train(loaded, arguments.workdir, profile=profile)
    print(f"run: {arguments.workdir}")


def _steps(text):
    """(start, stop) of `--profile START:STOP`."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"--profile {text!r} is no range of steps: write for example --profile 10:13")
    return int(start), int(stop)


def encode_verb(arguments, overrides):
    if arguments.verify:
        _verify(arguments.verify)
        return
    if not arguments.config or not arguments.out:
        raise UserError("sorax encode needs --config and --out (or --verify FOLDER): name an experiment and a folder")
    from sorax import config as config_lib
    from sorax import processes
    from sorax.dit_data import encode_experiment
    from sorax.objectives import complete
    from sorax.runs import anchored

    processes.start(arguments.coordinator, arguments.processes, arguments.process)
    config = config_lib.load_config(arguments.config, overrides, complete)
    encode_experiment(anchored(config, arguments.config), arguments.vae, arguments.out, num_shards=arguments.shards,
                      tokenizer=arguments.tokenizer)  # fmt: skip
    print(f"latents: {arguments.out}, train with --config.data.path=shards:{arguments.out}")


def _verify(folder):
    from data_pipelines.latent_shards import read_manifest, verify, written_splits
    from sorax.runlog import Progress

    total = sum(read_manifest(folder, split)["count"] for split in written_splits(folder))
    with Progress("verify", total, unit="samples") as progress:
        problems = verify(folder, progress.advance)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{folder} is damaged, {len(problems)} problem(s) are listed above: delete the files named "
                        "there and run the `sorax encode` that made them again")  # fmt: skip
    print(f"{folder}: every shard and record is as it was written")


def quickstart(arguments, _):
    """Everything once, small; a second call goes on or says that it is done."""
    import importlib.util
    import time

    from sorax import config
    from sorax.objectives import complete
    from sorax.train import train

    began, workdir = time.monotonic(), arguments.workdir
    path = importlib.util.find_spec("experiments.quickstart").origin
    report, exported = os.path.join(workdir, "report"), os.path.join(workdir, "diffusers")
    train(config.load_config(path, complete=complete), workdir)
    if not os.path.exists(os.path.join(report, "scores.json")):
        backend.keep_programs()
        cli_evaluate.evaluate(workdir, report)
    if not os.path.exists(exported):
        _export(workdir, exported, "diffusers", "auto", "ema")
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    with open(os.path.join(report, "scores.md")) as f:
        print("\n" + f.read())
    print(f"done in {minutes} min {seconds} s")
    for what, where in (
        ("samples", os.path.join(report, "samples.png")), ("scores", os.path.join(report, "scores.md")),
        ("diffusers folder", exported), ("metrics", os.path.join(workdir, "metrics.jsonl")),
        ("TensorBoard", f"tensorboard --logdir {workdir}"),
        ("try", f'sorax sample --run {workdir} --prompt "a red circle moving right" --out red.gif'),
    ):  # fmt: skip
        print(f"  {what + ':':18}{where}")


def import_verb(arguments, _):
    from sorax.import_wan import import_run

    import_run(arguments.source, arguments.workdir, vae=arguments.vae, text=arguments.text,
               tokenizer=arguments.tokenizer, lora=arguments.lora)  # fmt: skip
    print(f"run: {arguments.workdir} (its config.json can be trained with --config, and --config.data.path=...)")


def export_verb(arguments, _):
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])I?B?", arguments.max_shard_size.upper())
    if not size or not float(size[1]):
        raise UserError(f"--max-shard-size {arguments.max_shard_size!r} is no size: write for example 5GB")
    from sorax import export, processes

    processes.start(arguments.coordinator, arguments.processes, arguments.process)
    if processes.is_first():
        export.check_is_free(arguments.out)  # before minutes are spent on reading weights
    limit = int(float(size[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[size[2]])
    if arguments.lora == "adapter":
        _export_lora(arguments)
    else:
        _export(arguments.workdir, arguments.out, arguments.format, arguments.dtype, arguments.weights, limit,
                arguments.license)  # fmt: skip
    print(f"{arguments.format} folder: {arguments.out}")


def _export_lora(arguments):
    from sorax import lora, processes
    from sorax.export_lora import export_lora
    from sorax.runs import load_run

    run = load_run(arguments.workdir, arguments.weights, stored=True)
    if run.adapters is None:
        raise UserError(f"{arguments.workdir!r} has no trained LoRA: export it without --lora adapter, or train one, "
                        "with --config.lora.rank=16")  # fmt: skip
    metadata = run.metadata(arguments.weights) | dict(license=arguments.license)
    if processes.is_first():
        export_lora(run.adapters, lora.read(run.config), run.networks.dit_config, arguments.out, form=arguments.format,
                    dtype=arguments.dtype, metadata=metadata)  # fmt: skip
    processes.wait("export")


def _export(workdir, out, form, dtype, weights, max_shard_bytes=5 * 10**9, license="other"):
    from sorax import export, processes
    from sorax.export_comfyui import export_comfyui
    from sorax.export_vae import export_vae_folder
    from sorax.runs import kind_of, load_run

    if kind_of(workdir) != "dit":
        if weights != "ema":
            raise UserError(f"{workdir!r} is a VAE, whose latent statistics are those of the EMA weights: export it "
                            "without --weights raw")  # fmt: skip
        export_vae_folder(workdir, out, license=license, form=form, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return
    run = load_run(workdir, weights, stored=True)
    write = dict(diffusers=export.export_diffusers, safetensors=export.export_safetensors, comfyui=export_comfyui)[form]
    how, options = run.sampling(), {}
    if form == "diffusers" and run.gives_frames:
        patch_size = run.networks.dit_config.patch_size
        options = dict(expand_timesteps=patch_size == export.IMAGE_PATCH)
        if patch_size != export.IMAGE_PATCH:
            print(f"without image-to-video: diffusers gives timesteps to patches of {export.IMAGE_PATCH}, those of "
                  f"this run are {patch_size}")  # fmt: skip
    metadata = run.metadata(weights) | dict(license=license)
    if processes.is_first():  # the others have opened the checkpoint with it, and wait
        write(run.networks, run.tokenizer, out, shift=how["shift"], solver=how["solver"], dtype=dtype,
              metadata=metadata, max_shard_bytes=max_shard_bytes, **options)  # fmt: skip
    processes.wait("export")


if __name__ == "__main__":
    sys.exit(main())
