"""What reports of scores have in common: their folder, their heading, and numbers in words and in JSON."""

import contextlib
import hashlib
import json
import math
import os

from sorax import config as config_lib
from sorax.errors import UserError
from sorax.export import code_version


def header(path: str, kind: str, step: int | None, settings: dict) -> dict:
    """The first entries of scores.json: what was scored, at which step of training, with a hash of its settings."""
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    name = os.path.basename(os.path.abspath(path))
    return dict(run=name, kind=kind, step=step, config=identity, code_version=code_version(), splits={})


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
