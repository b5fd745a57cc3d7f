"""Experiment configs: loading, command-line overrides, the copy kept in a run folder, and dataclasses made from them.

A config is a Python file whose `get_config()` returns an `ml_collections.ConfigDict` and imports nothing of sorax.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib

import ml_collections

from sorax.errors import UserError

CONFIG_FILE = "config.json"
TRAINED_TOKENIZER = "tokenizer.json"
IMPORTED = "imported"  # folder of a run that `sorax import` made: the weights
# What may change when a run is continued: how long, how often, where to; never what is learned from what.
MAY_CHANGE = ("train.steps", "train.log_every", "checkpoint", "eval", "mesh")


def load_config(path: str, overrides=(), complete=None) -> ml_collections.ConfigDict:
    """Loads an experiment file and applies overrides such as `a.b=v`.

    Args:
        complete: function config -> None that adds what the file leaves to its default, so that it can be overridden
            and is written down with the run.

    Raises:
        UserError: no such file, no `get_config`, an unknown key or a value of the wrong type.

    path: a Python file, or the config.json of a run.
    """
    if path.endswith(".json") and os.path.isfile(path):
        config = read_config(os.path.dirname(path) or ".")
        if complete is not None:
            complete(config)
        return apply_overrides(config, overrides)
    if not os.path.isfile(path):
        raise UserError(f"config {path!r} does not exist: name a Python file with a get_config(), such as "
                        "experiments/quickstart.py")  # fmt: skip
    spec = importlib.util.spec_from_file_location("sorax_experiment", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"config {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path!r} has no get_config(): define one that returns an ml_collections.ConfigDict")
    config = module.get_config()
    if complete is not None:
        complete(config)
    return apply_overrides(config, overrides)


def apply_overrides(config, overrides):
    """Applies `a.b=v` strings to a config; v is a Python literal, or a string if it is none. A list of names may be
    written with commas alone."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} has no value: write --config.{name}=VALUE")
        *sections, last = name.split(".")
        section, so_far = config, "config"
        for key in sections:
            section = _child(section, key, so_far)
            so_far += "." + key
            if not isinstance(section, ml_collections.ConfigDict):
                raise UserError(f"{so_far} is a value, not a section, so {name!r} cannot be set")
        old = _child(section, last, so_far)
        if isinstance(old, ml_collections.ConfigDict):
            raise UserError(f"{so_far}.{last} is a section: set one of its keys: {', '.join(sorted(old))}")
        section[last] = _parse(text, old, f"{so_far}.{last}")
    return config


def _child(section, key, so_far):
    if key in section:
        return section[key]
    near = difflib.get_close_matches(key, list(section), n=1)
    hint = f"did you mean {so_far}.{near[0]}?" if near else f"known keys: {', '.join(sorted(section))}"
    raise UserError(f"unknown config key {so_far}.{key}: {hint}")


def _parse(text, old, name):
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(value, str) and isinstance(old, (tuple, list)) and old and all(isinstance(x, str) for x in old):
        value = tuple(part.strip() for part in value.split(","))
    if isinstance(old, bool) and not isinstance(value, bool):
        raise UserError(f"{name} takes true or false, got {text!r}")
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(old)(value)
    if old is not None and type(value) is not type(old):
        raise UserError(f"{name} takes a {type(old).__name__} such as {old!r}, got {text!r}")
    return value


def add_defaults(section, cls):
    """Adds the fields of a dataclass that a section leaves to their defaults."""
    with section.unlocked():
        for field in dataclasses.fields(cls):
            if field.name not in section and field.default is not dataclasses.MISSING:
                section[field.name] = field.default


def build(cls, section, where: str):
    """Makes a dataclass from a config section; every key must be a field.

    Raises:
        UserError: an unknown key, or values that the dataclass refuses.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    values = {}
    for key, value in dict(section).items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise UserError(f"unknown key {key!r} in config section {where!r}: {hint}")
        values[key] = _freeze(value)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"config section {where!r}: {error}") from error


def _freeze(value):
    return tuple(_freeze(v) for v in value) if isinstance(value, (list, tuple)) else value


def flatten(config, prefix="") -> dict:
    """`{"a.b": value}` of nested dicts, tuples as lists: the form in which two configs are compared."""
    flat = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def published(config):
    """A config, or a value of one, as it may be shown to anybody: of a path on somebody's disk its last part alone.

    `wan/imported` stays for the weights that a run imported; names of TFDS data sets stay whole.
    """
    if hasattr(config, "items"):
        return {key: published(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(map(published, config))
    if not isinstance(config, str) or "/" not in config or config.startswith("tfds:"):
        return config
    kind = "shards:" if config.startswith("shards:") else ""
    *above, name = pathlib.PurePosixPath(os.path.normpath(config.removeprefix(kind))).parts
    return kind + (f"{above[-1]}/{name}" if name == IMPORTED and above else name)


def save_config(config, workdir: str, complete, *, write: bool = True):
    """Writes the config of a new run, or checks that an existing run has the same.

    A run that has made nothing yet, such as one whose data was not found, may have another config the next time.

    Args:
        config: complete, as `complete` makes it; the config that is there is completed before the two are compared.
        write: False for a process that only checks: another one writes.

    Raises:
        UserError: the folder holds a run of another config; the first few differences are named.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    if os.path.exists(path) and _has_work(workdir):
        there = read_config(workdir)
        complete(there)
        old, new = flatten(there), flatten(config)
        if os.path.exists(os.path.join(workdir, TRAINED_TOKENIZER)):  # which older runs called ""
            old = {k: "bpe" if (k, v, new.get(k)) == ("data.tokenizer", "", "bpe") else v for k, v in old.items()}
        keys = sorted(set(old) | set(new))
        differ = [k for k in keys if old.get(k) != new.get(k) and not _may_change(k)]
        if differ:
            shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"{workdir!r} holds a run of another config ({shown}{more}): use another --workdir, "
                            "or the config the run was started with")  # fmt: skip
    if write:
        write_atomic(path, json.dumps(config.to_dict(), indent=1, sort_keys=True))


def _has_work(workdir):
    """Whether a run folder holds what depends on its config: a checkpoint, of its VAE at least, or a tokenizer that was
    trained on its captions (that of an imported run came with it)."""
    folder = pathlib.Path(workdir)
    made = ["checkpoints/*", "vae/checkpoints/*"] + ([] if (folder / IMPORTED).is_dir() else [TRAINED_TOKENIZER])
    return any(any(folder.glob(pattern)) for pattern in made)


def _may_change(key):
    key = key.removeprefix("vae.")
    return any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)


def read_config(workdir: str) -> ml_collections.ConfigDict:
    """Config of a run folder.

    Raises:
        UserError: the folder is missing or holds no run.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    if os.path.isfile(workdir):
        raise UserError(f"{workdir!r} is a file: name the folder that it is in")
    if not os.path.isdir(workdir):
        raise UserError(f"run folder {workdir!r} does not exist: name one written by `sorax train` or `sorax import`")
    if os.path.isfile(os.path.join(workdir, "model_index.json")):
        raise UserError(f"{workdir!r} holds no run, but a pipeline of diffusers: make a run of it, with `sorax import "
                        f"--from {workdir} --workdir RUN`")  # fmt: skip
    if not os.path.isfile(path):
        raise UserError(f"{workdir!r} holds no run ({CONFIG_FILE} is missing): name one written by `sorax train` or "
                        "`sorax import`")  # fmt: skip
    with open(path) as f:
        return ml_collections.ConfigDict(json.load(f))


def write_atomic(path: str, text: str):
    """Writes a text file so that it is either the old one or the new one, never half of one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = path + ".partial"
    with open(temporary, "w") as f:
        f.write(text)
    os.replace(temporary, path)
