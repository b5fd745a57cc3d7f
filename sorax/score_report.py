"""What reports of scores have in common: their folder, their heading, and numbers in words and in JSON."""

import contextlib
import hashlib
import json
import math
import os
import pathlib

import jax
import numpy as np

from sorax import config as config_lib
from sorax.errors import UserError
from sorax.export import code_version
from sorax.sharding import path_string


def header(path: str, kind: str, step: int | None, settings: dict) -> dict:
    """The first entries of scores.json: what was scored, at which step of training, with a hash of its settings."""
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    name = os.path.basename(os.path.abspath(path))
    return dict(run=name, kind=kind, step=step, config=identity, code_version=code_version(), splits={})


def code_hash() -> str:
    """Hash of the source of sorax and data_pipelines as it is on the disk (16 hexadecimal digits)."""
    digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for path in sorted(path for package in ("sorax", "data_pipelines") for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def params_hash(params) -> str:
    """Hash of the names, shapes, types and values of a tree of arrays, stored or not (16 hexadecimal digits)."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{path_string(path)} {tuple(leaf.shape)} {np.dtype(leaf.dtype)}".encode())
        for part in leaf if len(leaf.shape) > 2 else [leaf]:  # stacked layers one by one: memory for one
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def make_folder(out: str):
    """Makes the report folder, before the work, so that a bad name costs no time. Raises UserError."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"report folder {out!r} cannot be made ({error.strerror}): name another with --out") from error


@contextlib.contextmanager
def writing(out: str):
    """Where files of a report are written: what the disk refuses becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the report in {out!r} cannot be written ({error.strerror or error}): free space, or name "
                        "another folder with --out") from error  # fmt: skip


def write_scores(out: str, scores: dict, markdown: str):
    """Writes scores.md and, last, scores.json: where that one is, the report is complete."""
    config_lib.write_atomic(os.path.join(out, "scores.md"), markdown)
    text = json.dumps(without_nan(scores), indent=1, allow_nan=False)
    config_lib.write_atomic(os.path.join(out, "scores.json"), text + "\n")


def number(value, form: str) -> str:
    """A number in a table; "none" where there is none."""
    return "none" if value is None else format(value, form)


def without_nan(value):
    """JSON has no NaN: the rate of an attribute that no caption mentions is null."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
