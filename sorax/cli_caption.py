"""`sorax caption` and `sorax expand`: a data set captioned anew; short prompts made detailed."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

from sorax.errors import UserError

# How far videos are looked at by a model behind an endpoint, unless --data.KEY says otherwise.
LOOK = dict(fps=8.0, max_frames=81, min_frames=1, max_tokens=30_000, oversize="scale")


def add_verbs(verbs):
    """Adds both verbs."""
    text = "write short and detailed captions for videos: the same data set comes out, with the captions"
    caption = verbs.add_parser("caption", help=text, description=text)
    caption.set_defaults(run=caption_verb, takes_overrides=True, prefix="--data.")
    caption.add_argument("--data", required=True, help="folder of videos, world, tfds:NAME, ... (data.path)")
    caption.add_argument("--data.KEY=VALUE", dest="_", help="override a key of it, such as --data.fps=4")
    caption.add_argument("--out", required=True, help="new folder; an interrupted run goes on in it")
    caption.add_argument("--shard", default="0/1", metavar="K/N", help="do every N-th video, from the K-th on: N "
                         "processes or hosts with one --out share the work (default: %(default)s)")  # fmt: skip
    caption.add_argument("--caption", default="detailed", help="kind that becomes the caption of a video where it is "
                         "trained on without data.caption_mix (default: %(default)s)")  # fmt: skip
    add_captioning(caption)

    text = "make short prompts detailed, in the style of the captions that a model was trained on"
    expand = verbs.add_parser("expand", help=text, description=text)
    expand.set_defaults(run=expand_verb, takes_overrides=False)
    expand.add_argument("prompt", nargs="+", help="what to show; each is made longer")
    expand.add_argument("--run", default="", dest="workdir", help="run of a model that expands prompts, or the "
                        "text-to-video run in whose expander/ it is")  # fmt: skip
    expand.add_argument("--seed", type=int, default=0, help="of the first prompt; prompt k has seed + k")
    add_expansion(expand, with_run=False)


def add_captioning(verb):
    """Adds the flags of who writes captions to a verb: see `captioning`."""
    writing = verb.add_argument_group("captions by a captioner that was trained here")
    writing.add_argument("--run", default="", dest="workdir", help="its run")
    writing.add_argument("--how", choices=("greedy", "nucleus", "beam"), default="greedy")
    writing.add_argument("--beams", type=int, default=4)
    writing.add_argument("--top-p", type=float, default=0.9)
    writing.add_argument("--weights", choices=("ema", "raw"), default="ema")
    shown = _add_endpoint(verb)
    shown.add_argument("--frames", type=int, default=8, help="of a video that are shown (default: %(default)s)")
    shown.add_argument("--side", type=int, default=512, help="pixels of their longer side (default: %(default)s)")


def add_expansion(verb, with_run: bool = True):
    """Adds the flags of expansion to a verb, such as `sample`: see `expand_prompts`."""
    group = verb.add_argument_group("expansion of prompts")
    if with_run:
        group.add_argument("--expand", action="store_true", help="make the prompts detailed first, and show them")
        group.add_argument("--expander", default="", help="run of a model that does it (default: RUN/expander)")
    group.add_argument("--pin", default="", metavar="FILE.json", help="prompts and what they became: what is there is "
                       "taken as it is, edited or not, and what is new is added; equal prompts share one")  # fmt: skip
    _add_endpoint(verb)


def _add_endpoint(verb):
    group = verb.add_argument_group("with --endpoint, a server of the OpenAI kind (vLLM, Ollama, llama.cpp, hosted)")
    group.add_argument("--endpoint", default="", metavar="URL", help="such as http://localhost:8000/v1")
    group.add_argument("--model", default="", help="name of a model there")
    group.add_argument("--key-variable", default="SORAX_API_KEY", metavar="NAME", help="environment variable that "
                       "holds the key, if it wants one (default: %(default)s)")  # fmt: skip
    group.add_argument("--concurrency", type=int, default=4, help="requests at a time (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds of a try (default: %(default)s)")
    group.add_argument("--tries", type=int, default=6, help="of a request (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, default=700, help="of an answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=None, help="of answers (default: 0 for captions, 0.7 for "
                       "prompts)")  # fmt: skip
    group.add_argument("--price-in", type=float, default=0.0, help="of a million tokens sent")
    group.add_argument("--price-out", type=float, default=0.0, help="of a million tokens received")
    group.add_argument("--max-cost", type=float, default=0.0, help="at which to stop, in the same money")
    group.add_argument("--cache", default="", help="folder of answers, which are paid for once (default: in --out, or "
                       "~/.cache/sorax/answers)")  # fmt: skip
    return group


def _endpoint(arguments, cache: str, temperature: float):
    from sorax.endpoint import Endpoint, EndpointConfig

    names = [field.name for field in dataclasses.fields(EndpointConfig) if hasattr(arguments, field.name)]
    settings = {name: getattr(arguments, name) for name in names} | dict(cache=arguments.cache or cache)
    settings["temperature"] = temperature if arguments.temperature is None else arguments.temperature
    return Endpoint(EndpointConfig(url=arguments.endpoint, **settings))


# --- caption


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Who writes captions, of which kinds. captions: source -> what `recaption` takes. data, grid: how videos are read
    for it (None: no run says). row_tokens: of the rows that a captioner was trained on, 0: unknown. usage: what to tell
    of it at the end."""

    identity: dict
    kinds: tuple[str, ...]
    captions: Callable
    data: Any
    grid: dict
    row_tokens: int
    usage: Callable[[], str]


def _writer(arguments, cache: str) -> _Writer:
    if bool(arguments.workdir) == bool(arguments.endpoint):
        raise UserError("captions need --run RUN, a captioner, or --endpoint URL with --model, and not both")
    from sorax import recaption

    if arguments.endpoint:
        from sorax.caption_endpoint import DETAILED, SHORT, EndpointCaptioner

        writer = EndpointCaptioner(_endpoint(arguments, cache, 0.0), arguments.frames, arguments.side)
        identity = dict(writer=writer.identity, frames=arguments.frames, side=arguments.side,
                        temperature=writer.endpoint.config.temperature)
        return _Writer(identity, (SHORT, DETAILED), functools.partial(recaption.by_endpoint, writer), None,
                       dict(spatial_multiple=16, temporal_stride=1), 0, writer.endpoint.usage.line)  # fmt: skip
    from sorax.caption_writer import load_captioner
    from sorax.config import build
    from sorax.decoding import DecodingConfig

    run = load_captioner(arguments.workdir, arguments.weights, reads="video")
    flags = dict(how=arguments.how, beams=arguments.beams, top_p=arguments.top_p, max_tokens=run.max_tokens)
    settings = build(DecodingConfig, flags, "decoding")
    identity = dict(writer=run.identity, decoding=dataclasses.asdict(settings))
    by = functools.partial(recaption.by_run, run, settings)
    return _Writer(identity, run.writer.config.kinds, by, run.config.data, run.grid, int(run.config.data.row_tokens),
                   lambda: f"captions by {run.identity}")  # fmt: skip


def captioning(arguments, work: str):
    """The captioning stage that the flags of `add_captioning` ask for, for `data_pipelines.curate`; None without.

    work: see `recaption.clip_captions`.
    """
    if not (arguments.workdir or arguments.endpoint):
        return None
    from sorax.recaption import clip_captions
    from sorax.runlog import reporter

    writer = _writer(arguments, os.path.join(arguments.out, work, "answers"))
    stage = clip_captions(writer.captions, writer.identity, _section("", writer.data, ()), work,
                          reporter("caption", "clips"), **writer.grid)  # fmt: skip

    def run(folder):
        try:
            return stage(folder)
        finally:
            print(writer.usage())

    return run


def caption_verb(arguments, overrides):
    from sorax.runlog import reporter

    shard = _shard(arguments.shard)
    work = os.path.join(arguments.out, ".captions")
    if os.path.isdir(arguments.data) and os.path.realpath(arguments.out) == os.path.realpath(arguments.data):
        raise UserError("--out is the folder of --data: name a new one, the captions that are there stay there")
    from sorax import recaption

    writer = _writer(arguments, os.path.join(work, "answers"))
    if arguments.caption not in writer.kinds:
        raise UserError(f"--caption {arguments.caption!r} is none of the kinds that are written: use one of "
                        f"{', '.join(writer.kinds)}")  # fmt: skip
    section = _section(arguments.data, writer.data, overrides)
    source = recaption.open_uncaptioned(section, os.path.join(work, "index"), reporter("index"), **writer.grid)
    if writer.row_tokens:
        _warn_of_long_ones(source, writer, arguments.workdir)
    try:
        summary = recaption.recaption(
            source, arguments.out, writer.captions(source), identity=writer.identity, section=section, shard=shard,
            caption=arguments.caption, progress=reporter("caption", "videos"),
        )  # fmt: skip
    finally:
        print(writer.usage())
    if summary is None:
        print(f"this share is done; the process that ends last writes {arguments.out}/metadata.jsonl")
        return
    print(f"{summary['captioned']} of {summary['samples']} videos captioned, {len(summary['failed'])} failed and kept "
          f"their caption, {len(summary['rejected'])} cannot be used")  # fmt: skip
    for key, reason in list(summary["failed"].items())[:5]:
        print(f"  {key}: {reason}")
    path = arguments.out if os.path.isdir(arguments.data) else f"captions:{arguments.out}"
    print(f"train with --config.data.path={path} --config.data.caption_mix=detailed:0.95,original:0.05")


def _warn_of_long_ones(source, writer, workdir):
    from data_pipelines.fit import tokens

    grid = [writer.grid[name] for name in ("spatial_multiple", "temporal_stride")]
    counts = [tokens(source.spec(i), *grid) for i in range(len(source))]
    beyond = [count for count in counts if count > writer.row_tokens]
    if beyond:
        print(f"warning: {len(beyond)} of {len(counts)} videos are of more tokens (up to {max(beyond)}) than a row of "
              f"{workdir} held in training ({writer.row_tokens}): what is written of them is a guess; "
              f"--data.max_tokens={writer.row_tokens} scales files down, --data.max_frames=N cuts them")  # fmt: skip


def _shard(text):
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(f"--shard {text!r} is no share: write K/N with K from 0 to N - 1, such as 0/4")
    return int(k), int(n)


def _section(path, own, overrides) -> dict:
    """The `data` section of what is captioned: as a run of a captioner reads its own, or `LOOK`."""
    from ml_collections import ConfigDict

    from data_pipelines.world import WorldConfig
    from sorax import config as config_lib
    from sorax.objectives import DataConfig

    section = ConfigDict(own.to_dict() if own is not None else LOOK)
    config_lib.add_defaults(section, DataConfig)
    same = own is not None and (own.get("path") or "world") == path
    with section.unlocked():
        section.update(path=os.path.abspath(path) if os.path.isdir(path) else path, index="", mixture=(), stages=(),
                       caption_mix="", val_path="", val_split="", min_frames=1, oversize="scale")  # fmt: skip
        if path == "world" and not (same and "world" in section):
            section.world = {field.name: field.default for field in dataclasses.fields(WorldConfig)}
    section = config_lib.apply_overrides(ConfigDict(dict(data=section)), [f"data.{text}" for text in overrides]).data
    return json.loads(json.dumps(section.to_dict()))


# --- expand


def expand_verb(arguments, _):
    if not arguments.workdir and not arguments.endpoint:
        raise UserError("sorax expand needs --run RUN, a model that expands prompts, or --endpoint URL with --model")
    expand_prompts(arguments, arguments.prompt, arguments.workdir, arguments.seed)


def expand_prompts(arguments, prompts, workdir: str, seed: int) -> list[str]:
    """What is to be sampled in place of prompts; shows each.

    Args:
        arguments: with the flags of `add_expansion`. workdir: of a text-to-video run or of a model that expands.
        seed: prompt k has seed + k.
    """
    from sorax.expand import expand

    for k, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {k + 1} is empty: there is nothing to make longer")
    pinned, expander, texts = _read_pinned(arguments.pin), None, []
    for k, prompt in enumerate(prompts):
        reason = ""
        if prompt in pinned:
            texts.append(pinned[prompt])
        else:
            expander = expander or _expander(arguments, workdir)
            (found,) = expand([prompt], expander, seed + k)  # one by one: a prompt's seed is that of its place
            texts.append(found.text)
            reason = found.reason
            if arguments.pin and found.answered:  # who did not answer is asked again
                from sorax.config import write_atomic

                pinned[prompt] = found.text
                write_atomic(arguments.pin, json.dumps(pinned, indent=1, ensure_ascii=False) + "\n")
        print(f"{prompt}\n  -> {texts[-1]}" + f"\n     (as it was: {reason})" * bool(reason), flush=True)
    return texts


def _read_pinned(path) -> dict[str, str]:
    if not path or not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            pinned = json.load(f)
    except (OSError, ValueError) as error:
        raise UserError(f"--pin {path} cannot be read ({error}): mend or remove it") from error
    if not isinstance(pinned, dict) or not all(isinstance(text, str) for text in pinned.values()):
        raise UserError(f'--pin {path} is not like {{"prompt": "what it became"}}: mend or remove it')
    return pinned


def _expander(arguments, workdir):
    if arguments.endpoint:
        from sorax.caption_endpoint import EndpointExpander
        from sorax.expand import EndpointExpanders, style_of

        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        endpoint = _endpoint(arguments, os.path.join(home, "sorax", "answers"), 0.7)
        return EndpointExpanders(EndpointExpander(endpoint, **(style_of(workdir) if workdir else {})))
    return open_expander(getattr(arguments, "expander", "") or workdir)


def open_expander(workdir: str):
    """The model that a run is, or that is in its `expander/`: a `RunExpander`. Raises UserError where there is none."""
    from sorax.caption_writer import load_captioner
    from sorax.expand import EXPANDER, RunExpander
    from sorax.runs import kind_of

    folder = workdir
    if kind_of(folder) != "captioner":
        folder = os.path.join(folder, EXPANDER)
        if not os.path.isdir(folder):
            raise UserError(f"{workdir} has no model that expands prompts: train one on its captions, with `sorax "
                            f"train --config experiments/expander_world.py --workdir {folder}` (of other data than "
                            "the world: --config.data.path), name the run of one, or an --endpoint")  # fmt: skip
    return RunExpander(load_captioner(folder, reads="text"))
