"""Samples in the layout that VBench's own tool reads (Huang et al. 2024, arXiv 2311.17982).

Its prompt suites are text files of a prompt a line, and it finds the samples of a prompt by their names: five files
`PROMPT-0.mp4` .. `PROMPT-4.mp4` in one folder that holds nothing else (it takes the ending of the first file for that
of all); of its suite for temporal flickering 25, from which its filter of still videos takes some. Then

    vbench evaluate --videos_path OUT/samples --dimension DIMENSION --full_json_dir VBench_full_info.json

with the prompts of all dimensions (`prompts/all_dimension.txt` of its repository) or of one. A report folder holds
`suite.json` (what the samples are of, with hashes), `seeds.json` (the seed of every file) and `samples/`.
"""

import dataclasses
import json
import os
import pathlib

import jax

from sorax import media, processes, suite
from sorax.config import write_atomic
from sorax.errors import UserError
from sorax.generate import Request, legal_shape
from sorax.runlog import Progress
from sorax.runs import Run
from sorax.score_report import code_hash, header, params_hash, writing

SAMPLES = 5  # of a prompt
NAME_BYTES = 255  # of a file's name: what file systems take
TOGETHER = 16  # samples that are made at a time
MAX_SHOWN = 5  # lines that an error names


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked for, and the prompt by which VBench knows it; line: in the file, from 1."""

    text: str
    name: str
    line: int


def read_prompts(path: str, names: str = "", samples: int = SAMPLES) -> list[Prompt]:
    """The prompts of a file, each once: VBench's own loop writes the same files again for a line that comes twice.

    Args:
        path: text file of a prompt a line; empty lines at its end count for nothing.
        names: file of the prompts as VBench knows them, line by line, where `path` has longer versions of them.
        samples: of a prompt, for the length of their names.

    Raises:
        UserError: a file cannot be read or has no prompt, the two have not as many lines, a name cannot be a file's, or
            stands for two prompts. It names the lines.
    """
    texts = _lines(path)
    known = _lines(names) if names else texts
    if len(known) != len(texts):
        raise UserError(f"{names} has {len(known)} lines and {path} {len(texts)}: line k of both is one prompt's")
    remedy = ("VBench finds samples by their prompt: shorten it, or name a file of its own prompts, line by line, with "
              "--names-file")  # fmt: skip
    prompts, problems = {}, []
    for line, (text, name) in enumerate(zip(texts, known), start=1):
        problem = "is empty" if not text or not name else _problem(f"{name}-{samples - 1}.mp4")
        if problem:
            problems.append(f"line {line} {problem}")
        elif name in prompts and prompts[name].text != text:
            problems.append(f"line {line} has the name of line {prompts[name].line} and another prompt")
        prompts.setdefault(name, Prompt(text, name, line))
    if problems:
        more = f" and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise UserError(f"{names or path}: {'; '.join(problems[:MAX_SHOWN])}{more}. {remedy}")
    return list(prompts.values())


def _problem(file):
    if "/" in file or os.sep in file or "\0" in file:
        return "has a slash, which no file name has"
    size = len(file.encode())
    return f"makes a file name of {size} bytes, more than {NAME_BYTES}" if size > NAME_BYTES else ""


def _lines(path):
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"prompts {path} cannot be read ({error.strerror}): name a text file of them") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} has no prompt: write one a line")
    return lines


def write_layout(
    run: Run, prompts_file: str, out: str, *, names_file: str = "", samples: int = SAMPLES, shape=None, seed: int = 0,
    num_steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None,
) -> int:  # fmt: skip
    """Makes the samples of a prompt suite of VBench, or those that are missing; processes share the work.

    Args:
        run: a text-to-video run (`runs.load_run`).
        prompts_file, names_file: see `read_prompts`.
        out: folder for `samples/` and what they are of.
        samples: of each prompt: 5, and 25 for temporal flickering.
        shape: (frames, height, width, fps) of the samples; None: what the run saw most.
        seed: sample k of prompt i is made from noise seed + i * samples + k: all differ, none is chosen.
        num_steps, guidance_scale, solver: of sampling; None: the run's own.

    Returns:
        the number of files that were made.

    Raises:
        UserError: prompts that VBench could not find again, or `out` holds samples of something else or cannot be
            written.
    """
    if samples < 1:
        raise UserError(f"{samples} samples of a prompt: VBench wants {SAMPLES}")
    prompts = read_prompts(prompts_file, names_file, samples)
    frames, height, width, fps = shape or run.usual_shape()
    networks, generator = run.networks, run.generator()
    size = legal_shape(networks.vae_config, networks.dit_config.patch_size, frames, height, width)
    given = dict(num_steps=num_steps, guidance_scale=guidance_scale, solver=solver)
    sampling = run.sampling() | {name: value for name, value in given.items() if value is not None}
    files = {f"{p.name}-{k}.mp4": (p, seed + i * samples + k) for i, p in enumerate(prompts) for k in range(samples)}
    described = header(run.workdir, "dit", run.step, run.config.to_dict()) | dict(
        suite="vbench", version=1, code=code_hash(), sampling=sampling, shape=[*size, fps], seed=seed,
        checkpoint=params_hash(dict(dit=networks.dit, text=networks.text, vae=networks.vae)),
        prompts=suite.identity_of(dict(prompts=[dataclasses.astuple(p) for p in prompts], samples=samples)),
    )  # fmt: skip
    del described["splits"]
    suite.begin(out, json.loads(json.dumps(described)))
    folder = os.path.join(out, suite.SAMPLES)
    if processes.is_first():
        with writing(out):
            seeds = {name: dict(seed=number, prompt=prompt.text) for name, (prompt, number) in files.items()}
            write_atomic(os.path.join(out, "seeds.json"), json.dumps(seeds, indent=1) + "\n")
    there = set(os.listdir(folder))
    missing = [(name, *made) for name, made in files.items() if name not in there][
        jax.process_index() :: jax.process_count()]  # fmt: skip
    with Progress("vbench", len(missing), unit="videos") as progress:
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            requests = [Request(prompt.text, *size, seed=number) for _, prompt, number in some]
            videos = generator.videos(requests, **sampling)
            for (name, _, _), video in zip(some, videos):
                # Beside the folder first: it holds whole videos and nothing else.
                part = os.path.join(out, f"partial_{jax.process_index()}.mp4")
                media.write_video(part, video, fps)
                with writing(out):
                    os.replace(part, os.path.join(folder, name))
            progress.advance(start + len(some))
    processes.wait("vbench: written")
    return len(missing)
