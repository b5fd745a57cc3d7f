"""`sorax data <what>`: looks at data sets and prepares them. One thin function each, added to `add_verbs`."""

import contextlib
import dataclasses
import os

from data_pipelines.curate_settings import Settings
from sorax import cli_caption
from sorax.errors import UserError

_LEAST_MEMORY = 512  # MiB, of --memory


def add_verbs(verbs):
    """Adds `data` to the verbs of the command line."""
    text = "look at data sets and prepare them"
    data = verbs.add_parser("data", help=text, description=text)
    kinds = data.add_subparsers(required=True, metavar="WHAT")

    def verb(function, name, text, takes_overrides=False):
        sub = kinds.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function, takes_overrides=takes_overrides)
        return sub

    index = verb(index_verb, "index", "make the table of what a folder or another source holds", takes_overrides=True)
    index.add_argument("--path", default="", help="folder of captioned videos, or world, tfds:NAME, ... (data.path)")
    index.add_argument("--out", required=True, help="folder of the index; what it has of this source is kept")
    index.add_argument("--processes", type=int, default=None, help="workers (default: one a CPU)")
    index.add_argument("--max-seconds", type=float, default=60, help="how far to decode a file (default: %(default)s)")
    index.add_argument("--time-limit", type=float, default=60.0, help="seconds of work a file (default: %(default)s)")
    index.add_argument("--memory", type=int, default=2048, help="MiB that a worker may take (default: %(default)s)")
    index.add_argument("--config", default="", help="experiment whose data section says more of the source")
    index.add_argument("--config.KEY=VALUE", dest="_", help="override a key of it, such as --config.data.world.seed=1")

    report = verb(report_verb, "report", "show what will be trained on, before training", takes_overrides=True)
    report.add_argument("--index", required=True, help="folder that `sorax data index` wrote")
    report.add_argument("--out", required=True, help="folder for report.html, report.json and lists of files")
    report.add_argument("--config", default="", help="experiment that is to be trained (default: sorax's own settings)")
    report.add_argument("--ranks", type=int, default=1, help="data-parallel ranks of that run (default: %(default)s)")
    report.add_argument("--curation", default="", help="what `sorax data curate` wrote (default: beside the files)")
    report.add_argument("--processes", type=int, default=None, help="workers for thumbnails (default: one a CPU)")
    report.add_argument("--config.KEY=VALUE", dest="_", help="override a key of it, such as --config.data.fps=16")

    curate = verb(curate_verb, "curate", "cut raw videos into clean, captioned clips, and say what was dropped and why",
                  takes_overrides=True)  # fmt: skip
    curate.add_argument("--path", required=True, help="folder of raw videos, with captions as for training")
    curate.add_argument("--out", required=True, help="new folder; an interrupted run goes on in it")
    for field in dataclasses.fields(Settings):
        name, text = field.name.replace("_", "-"), field.metadata["help"]
        if isinstance(field.default, bool):
            curate.add_argument(f"--{name}", action="store_true", help=text)
        else:
            kind = type(field.default)
            curate.add_argument(f"--{name}", type=kind, default=field.default, help=f"{text} (default: %(default)s)")
    curate.add_argument("--processes", type=int, default=None, help="workers (default: one a CPU)")
    curate.add_argument("--runner", default="fnapi", help="fnapi (embedded, default), flink, spark or dataflow")
    curate.add_argument("--beam.OPTION=VALUE", dest="_", help="option of Beam, such as --beam.flink_master=host:8081")
    curate.set_defaults(prefix="--beam.")
    cli_caption.add_captioning(curate)


def index_verb(arguments, overrides):
    from data_pipelines.index import build_index, check_source
    from data_pipelines.inspection import Limits
    from sorax.runlog import reporter

    data = _data_section(arguments, overrides)
    for name in ("max_seconds", "time_limit", "memory", "processes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it must be above 0")
    if arguments.memory < _LEAST_MEMORY:
        raise UserError(f"--memory is {arguments.memory} MiB: a worker needs {_LEAST_MEMORY} to decode at all")
    limits = Limits(max_seconds=arguments.max_seconds, time_limit=arguments.time_limit, memory=arguments.memory << 20)
    records = _records(data, limits)
    check_source(arguments.out, records)
    index = build_index(records, arguments.out, limits=limits, processes=arguments.processes,
                        progress=reporter("index"))  # fmt: skip
    print(f"{len(index)} samples, {len(index.usable)} usable, {len(index) - len(index.usable)} rejected")
    for kind, count in index.rejected().items():
        print(f"  {count:6}  {kind}")
    if len(index.usable) < len(index):
        print("which ones: `sorax data report` lists them")
    print(f"index: {arguments.out}")


def _records(data, limits):
    """What is to be measured: the files of a folder, the records of a TFDS data set, or the samples of any source."""
    from data_pipelines.index import FolderRecords, SourceRecords
    from data_pipelines.sources import is_folder, open_source

    path = data.get("path", "")
    if is_folder(data):
        return FolderRecords(path, limits)
    if path.startswith("tfds:") and not data.get("mixture"):
        from data_pipelines.tfds_features import DEFAULT_FPS, choose_features
        from data_pipelines.tfds_source import Records, TFDSRecords

        keys = (data.get(name) or "" for name in ("data_dir", "video_key", "caption_key"))
        choice = choose_features(path.removeprefix("tfds:"), data.get("split") or "train", *keys,
                                 data.get("fps") or DEFAULT_FPS)  # fmt: skip
        return TFDSRecords(Records(choice), limits)
    source = open_source(dict(dict(max_tokens=1 << 40), **data))  # its samples as large as they are
    return SourceRecords(source, path or "mixture", data)


def report_verb(arguments, overrides):
    from data_pipelines.fit import Fit
    from data_pipelines.index import Index
    from data_pipelines.report import PAGE, make_report
    from data_pipelines.report_fit import Settings

    for name in ("ranks", "processes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    index = Index.load(arguments.index)
    is_folder = index.settings["source"]["kind"] == "folder"
    if arguments.config:
        from sorax import config
        from sorax.data_report import report_settings
        from sorax.objectives import complete

        origin = " ".join([arguments.config, *(f"--config.{override}" for override in overrides)])
        settings = report_settings(config.load_config(arguments.config, overrides, complete), origin, is_folder)
    elif overrides:
        raise UserError(f"--config.{overrides[0]} overrides an experiment: name one with --config FILE")
    else:
        settings = Settings(Fit(max_tokens=4096))
    source = None if is_folder else _reopen(index)
    numbers = make_report(
        index, arguments.out, settings, ranks=arguments.ranks, curation=arguments.curation or None, source=source,
        processes=arguments.processes, say=lambda text: print(f"report: {text}"),
    )  # fmt: skip
    totals = numbers["totals"]
    print(f"{totals['samples']} samples, {totals['kept']} kept, {totals['rejected']} rejected")
    for warning in numbers["warnings"]:
        print(f"  {warning['level']}: {warning['text']}")
    print(f"report: {os.path.join(arguments.out, PAGE)}")


def curate_verb(arguments, beam_options):
    from data_pipelines.curate import curate
    from sorax.runlog import Progress

    if arguments.processes is not None and arguments.processes < 1:
        raise UserError(f"--processes is {arguments.processes}: it must be at least 1")
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})
    caption = cli_caption.captioning(arguments, os.path.join(".curate", "caption"))
    if caption:
        settings = dataclasses.replace(settings, allow_uncaptioned=True)
    with contextlib.ExitStack() as stack:
        bars = {}

        def tell(what, done, most):
            if what not in bars:
                unit = "files" if what == "scan" else "files at most"
                bars[what] = stack.enter_context(Progress(what, most, unit=unit))
            bars[what].advance(done)

        summary = curate(
            arguments.path, arguments.out, settings, runner=arguments.runner, processes=arguments.processes,
            beam_options=tuple(f"--{option}" for option in beam_options), tell=tell, caption=caption,
        )  # fmt: skip
    counts = summary["counts"]
    files, clips, frames = counts["files"], counts["clips"], counts["frames"]
    print(f"{files['total']} files, {files.get('cut', 0)} cut into {clips['total']} clips, {clips.get('kept', 0)} kept")
    for kind in (files, clips):
        for stage, reasons in kind["dropped"].items():
            for reason, count in reasons.items():
                print(f"  {count:6}  {'file' if kind is files else 'clip'}(s) dropped by {stage}: {reason}")
    print(f"{frames['kept']} of {frames['total']} frames kept, {sum(frames['trimmed'].values())} trimmed")
    anew = clips.get("kept", 0) - clips["copied"]
    print(f"{clips['copied']} clips copied as they are, {anew} encoded anew without sound, {clips['without_bars']} of "
          f"these without their bars; {clips['uncaptioned']} without a caption")  # fmt: skip
    print(f"clips: {arguments.out}, dropped ones in {os.path.join(arguments.out, 'curation.parquet')}")


def _reopen(index):
    """The source that was indexed, for thumbnails; None, said aloud, where it is gone."""
    from data_pipelines.sources import open_source

    try:
        return open_source(dict(dict(max_tokens=1 << 40), **index.settings["source"]["section"]))
    except UserError as error:
        print(f"report: no thumbnails, for the source cannot be opened: {error}")
        return None


def _data_section(arguments, overrides) -> dict:
    """The `data` section that --config, its overrides and --path give, as plain data."""
    if overrides and not arguments.config:
        raise UserError(f"--config.{overrides[0]} overrides an experiment: name one with --config FILE")
    data = {}
    if arguments.config:
        from sorax import config
        from sorax.objectives import complete

        experiment = config.load_config(arguments.config, overrides, complete)
        if "data" not in experiment:
            raise UserError(f"{arguments.config} has no section data: name an experiment that reads videos")
        data = experiment.data.to_dict()
    if arguments.path:
        data = dict(data, path=arguments.path, mixture=())
    if not data.get("path") and not data.get("mixture"):
        raise UserError("no source to index: name it with --path")
    return data
