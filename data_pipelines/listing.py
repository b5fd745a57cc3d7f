"""The files of a folder with their captions, before any is opened: which there are, and which cannot be used.

Captions come from one list of the folder, `metadata.jsonl`, `metadata.csv` or `videos.txt` with `prompts.txt`, or,
where there is none, from x.txt beside x.mp4. Names and captions may be hostile: a name that leads out of the folder,
by ".." or a link, and a caption that is no plain text or endless are refused with a reason.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.caption_kinds import kinds_in
from data_pipelines.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sorax.errors import UserError

MAX_CAPTION = 10_000  # characters: some twenty times what a text encoder reads
_LISTS = ("metadata.jsonl", "metadata.csv", "videos.txt with prompts.txt")


class Listing(NamedTuple):
    """The files of a folder, sorted by name.

    keys: file names relative to the folder, with "/". captions: "" where there is none that can be used.
    caption_lengths: int32 [n], characters. reasons: "" or why the file is not to be opened. sizes, mtimes: int64 [n],
    bytes and nanoseconds; 0 where the file cannot be looked at.
    """

    keys: list[str]
    captions: list[str]
    caption_lengths: np.ndarray
    reasons: list[str]
    sizes: np.ndarray
    mtimes: np.ndarray


def list_folder(folder: str | os.PathLike) -> Listing:
    """All videos and images of a folder, and all files that its list names.

    Links to folders are not followed; names that start with a dot are left alone.
    Raises UserError if the folder or its list cannot be read, is malformed or holds nothing.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"no folder {folder}: give data.path an existing folder of videos")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give data.path the folder that holds the videos")
    inside = Inside(folder)
    try:
        found = set(_walk(folder))
        listed, missing = _read_list(folder, found)
        captions = {file: _read_text(folder, file, inside) for file in found} if listed is None else listed
        files = sorted(found | set(captions), key=_as_utf8)
    except OSError as e:
        raise UserError(f"cannot read {e.filename or folder}: {e.strerror}; check its permissions") from e
    if not files:
        raise UserError(
            f"no videos in {folder}: put files ({', '.join(VIDEO_SUFFIXES[:4])}, .png, .jpg ...) there, with "
            "metadata.jsonl or a .txt caption beside each"
        )
    lengths = np.zeros(len(files), np.int32)
    sizes, mtimes = np.zeros((2, len(files)), np.int64)
    keys, texts, reasons, taken = [], [], [], set()
    for i, file in enumerate(files):
        caption = captions.get(file, _NoCaption(missing))
        reason = caption.reason if isinstance(caption, _NoCaption) else check_caption(caption)
        lengths[i] = caption.length if isinstance(caption, _NoCaption) else len(caption)
        unusable = inside.reason(file)
        if not unusable:
            sizes[i], mtimes[i], unusable = _look(folder / file)
        keys.append(_unique(_as_utf8(file), taken))
        reasons.append(reason or unusable)
        texts.append("" if reason else caption)
    return Listing(keys, texts, lengths, reasons, sizes, mtimes)


def list_kinds(folder: str | os.PathLike) -> dict[str, dict[str, str]]:
    """{file: {kind: caption}} of those lines of a folder's metadata.jsonl that have captions of several kinds.

    What cannot be used as a caption is left out. Raises UserError if the list is malformed.
    """
    folder = Path(folder)
    if not (folder / "metadata.jsonl").is_file():
        return {}
    captions = _Captions(folder)
    try:
        _read_jsonl(folder, captions)
    except UnicodeDecodeError as e:
        raise UserError(f"{folder / 'metadata.jsonl'} is not UTF-8 text ({e.reason}): save it as UTF-8") from e
    return captions.kinds


class _NoCaption(NamedTuple):
    """In place of a caption: why there is none that can be used, and the length of the one that there is."""

    reason: str
    length: int = 0


def check_caption(caption: str) -> str:
    """Why a caption cannot be used, or ""."""
    if not caption:
        return "no caption: it is empty"
    if len(caption) > MAX_CAPTION:
        return f"bad caption: {len(caption)} characters, more than {MAX_CAPTION}"
    if not caption.isprintable():
        for character in caption:
            # Line breaks and tabs are text; other control characters and halves of surrogate pairs are not.
            if unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
                return f"bad caption: holds the control character U+{ord(character):04X}"
    return ""


class Inside:
    """Tells names that stay within a folder from those that lead out of it, themselves or by a link."""

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.root = os.fspath(folder), os.path.realpath(folder)
        self._parents = {}  # a folder's files share its real path

    def reason(self, file: str) -> str:
        """Why a name is not to be opened, or ""."""
        try:
            file.encode()
        except UnicodeEncodeError:
            return "not a usable file name: it is not UTF-8"
        try:
            path = os.path.join(self.folder, file)
            parent, name = os.path.split(path)
            if os.path.islink(path) or name in ("", ".", ".."):
                real = os.path.realpath(path)
            else:
                if parent not in self._parents:
                    self._parents[parent] = os.path.realpath(parent)
                real = os.path.join(self._parents[parent], name)
        except (OSError, ValueError):  # a name with a zero byte
            return "not a usable file name"
        within = real == self.root or real.startswith(self.root.rstrip(os.sep) + os.sep)
        return "" if within else "lies outside the folder"


def _look(path) -> tuple[int, int, str]:
    """(bytes, time of last change in ns, why it is not to be opened or "")."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0, "no such file"
    except (OSError, ValueError) as e:
        return 0, 0, f"not a usable file name: {getattr(e, 'strerror', None) or e}"
    if not stat.S_ISREG(found.st_mode):  # a named pipe would block for ever
        return 0, 0, "not a regular file"
    return found.st_size, found.st_mtime_ns, ""


def _as_utf8(name: str) -> str:
    """A name as text that can be written: what is not UTF-8 of it as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _unique(key: str, taken: set[str]) -> str:
    while key in taken:
        key += "?"
    taken.add(key)
    return key


def _walk(folder: Path) -> Iterator[str]:
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    for root, _, names in os.walk(folder, onerror=_raise):  # links to folders could lead anywhere, or in a circle
        inner = os.path.relpath(root, folder).replace(os.sep, "/")
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield name if inner == "." else f"{inner}/{name}"


def _raise(error: OSError):
    raise error


def _read_text(folder: Path, file: str, inside: Inside) -> str | _NoCaption:
    """The caption in x.txt beside x.mp4."""
    text = os.path.splitext(file)[0] + ".txt"
    unusable = inside.reason(text)
    if unusable:
        return _NoCaption(f"no caption: its .txt {unusable.replace('not a usable', 'has no usable')}")
    size, _, unusable = _look(folder / text)
    if unusable:
        return _NoCaption("no caption: no .txt beside it" if unusable == "no such file" else f"no caption: {unusable}")
    if size > 4 * MAX_CAPTION + 1000:  # not even read
        return _NoCaption(f"bad caption: {size} bytes, more than {MAX_CAPTION} characters", min(size, 2**31 - 1))
    try:
        return (folder / text).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return _NoCaption("bad caption: its .txt is not UTF-8 text")
    except OSError as e:
        return _NoCaption(f"no caption: its .txt cannot be read ({e.strerror})")


# --- Lists of a folder


def _read_list(folder: Path, found: set[str]) -> tuple[dict[str, str] | None, str]:
    """({file: caption} or None if the folder has no list, what is said of a file that is not in it).

    Raises UserError for two lists, or one that is malformed.
    """
    jsonl, table, videos, prompts = (
        (folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv", "videos.txt", "prompts.txt")
    )
    there = [name for name, is_there in zip(_LISTS, (jsonl, table, videos and prompts)) if is_there]
    if len(there) > 1:
        raise UserError(f"{folder} has two lists of captions, {there[0]} and {there[1]}: remove one of them")
    if not there:
        alone = "videos.txt" if videos else "prompts.txt"
        if (videos or prompts) and not any(os.path.splitext(f)[0] == alone[:-4] for f in found):
            other = "prompts.txt" if videos else "videos.txt"
            raise UserError(f"{folder} has {alone} but no {other}: add it, line by line, or remove {alone}")
        return None, "no caption: no .txt beside it"
    read = {_LISTS[0]: _read_jsonl, _LISTS[1]: _read_csv, _LISTS[2]: _read_lines}[there[0]]
    captions = _Captions(folder)
    try:
        read(folder, captions)
    except UnicodeDecodeError as e:
        raise UserError(f"{folder / there[0].split()[0]} is not UTF-8 text ({e.reason}): save it as UTF-8") from e
    return captions.of, f"no caption: not listed in {there[0].split()[0]}"


class _Captions:
    """Captions by file, each file once."""

    def __init__(self, folder: Path):
        self.root, self.of, self.line_of, self.kinds = str(folder), {}, {}, {}

    def add(self, file: str, caption: str | None, path: Path, number: int, kinds: dict[str, str] | None = None):
        """Raises UserError if the file was listed before."""
        file = os.path.normpath(file).replace(os.sep, "/")
        if file.startswith(self.root + "/"):  # an absolute name of a file of this folder
            file = file[len(self.root) + 1 :]
        if file in self.of:
            before = self.line_of[file]
            raise UserError(f"{path} line {number} lists {file} again, after line {before}: keep one of them")
        self.of[file], self.line_of[file] = (caption or "").strip(), number
        usable = {kind: text for kind, text in (kinds or {}).items() if not check_caption(text)}
        if usable:
            self.kinds[file] = usable


def _read_jsonl(folder: Path, captions: _Captions):
    path = folder / "metadata.jsonl"
    wanted = 'each line must be like {"file": "x.mp4", "caption": "..."}'
    with open(path, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} line {number} is not JSON ({getattr(e, 'msg', e)}): {wanted}") from e
            if not isinstance(row, dict) or not isinstance(row.get("file"), str) or not row["file"]:
                raise UserError(f'{path} line {number} has no "file": {wanted}')
            caption = row.get("caption", "")
            if not isinstance(caption, str | None):
                raise UserError(f'{path} line {number}: "caption" is not text: {wanted}')
            captions.add(row["file"], caption, path, number, kinds_in(row))


def _read_csv(folder: Path, captions: _Captions):
    path = folder / "metadata.csv"
    with _any_field_size(), open(path, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f, strict=True)
        try:
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise UserError(f"{path} has no columns file and caption: name them so in its first line")
            for row in rows:
                if not row["file"] or None in row:
                    what = "no file" if not row["file"] else "more fields than its first line (quote commas)"
                    raise UserError(f"{path} line {rows.line_num} has {what}: write file,caption")
                captions.add(row["file"], row["caption"], path, rows.line_num)
        except csv.Error as e:
            raise UserError(f"{path} line {rows.reader.line_num} is not CSV ({e}): write file,caption") from e


@contextlib.contextmanager
def _any_field_size():
    """A caption that is too long is one file's fault, not the table's."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_lines(folder: Path, captions: _Captions):
    path, texts = folder / "videos.txt", folder / "prompts.txt"
    names = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    prompts = texts.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    while len(prompts) > len(names) and not prompts[-1].strip():
        prompts.pop()
    if len(names) != len(prompts):
        raise UserError(f"{path} has {len(names)} lines but prompts.txt {len(prompts)}: line k of both is one file's")
    for number, (name, prompt) in enumerate(zip(names, prompts), 1):
        if not name.strip():
            raise UserError(f"{path} line {number} is empty: name a file, or remove the line from both lists")
        captions.add(name.strip(), prompt, path, number)
