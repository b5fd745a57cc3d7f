"""Which files a folder holds, and which captions they have; nothing is opened."""

import json
import os

import numpy as np
import pytest

from data_pipelines.listing import MAX_CAPTION, list_folder
from sorax.errors import UserError


def make(folder, *names, captions=None):
    """Files that need not be videos, for they are not opened."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for name, caption in (captions or {}).items():
        (folder / name).write_text(caption)
    return folder


def found(folder):
    """{key: caption, or the reason against the file}"""
    listing = list_folder(folder)
    assert listing.keys == sorted(set(listing.keys))
    assert all(bool(caption) or bool(reason) for caption, reason in zip(listing.captions, listing.reasons))
    return {key: reason or caption for key, caption, reason in zip(listing.keys, listing.captions, listing.reasons)}


def one_line(error):
    return "\n" not in str(error.value)


def test_text_files_beside_videos_are_captions(tmp_path):
    make(tmp_path, "a.mp4", "sub/b.webm", "c.png", ".hidden.mp4", "notes.doc")
    make(tmp_path, captions={"a.txt": "  one thing\n", "sub/b.txt": "\ufeffanother", "sub/c.txt": "of no file"})
    assert found(tmp_path) == {"a.mp4": "one thing", "c.png": "no caption: no .txt beside it", "sub/b.webm": "another"}


LISTS = {
    "metadata.jsonl": '{"file": "a.mp4", "caption": "one thing"}\n\n{"file": "./sub/b.mp4", "caption": "two, both"}\n',
    "metadata.csv": 'caption,more,file\none thing,1,a.mp4\n"two, both",2,sub/b.mp4\n',
    "videos.txt": "a.mp4\nsub/b.mp4\n",
    "prompts.txt": "one thing\ntwo, both\n",
}


@pytest.mark.parametrize("names", [("metadata.jsonl",), ("metadata.csv",), ("videos.txt", "prompts.txt")], ids=str)
def test_every_list_gives_the_same_captions(tmp_path, names):
    make(tmp_path, "a.mp4", "sub/b.mp4", "c.mp4", captions={name: LISTS[name] for name in names} | {"a.txt": "unread"})
    assert found(tmp_path) == {
        "a.mp4": "one thing",
        "c.mp4": f"no caption: not listed in {names[0]}",
        "sub/b.mp4": "two, both",
    }


@pytest.mark.parametrize("encode", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
@pytest.mark.parametrize("names", [("metadata.jsonl",), ("metadata.csv",), ("videos.txt", "prompts.txt")], ids=str)
def test_lists_from_other_systems_are_read(tmp_path, names, encode):
    make(tmp_path, "a.mp4", "sub/b.mp4")
    for name in names:
        (tmp_path / name).write_bytes(encode(LISTS[name]).encode())
    assert found(tmp_path) == {"a.mp4": "one thing", "sub/b.mp4": "two, both"}


@pytest.mark.parametrize("second", ["metadata.csv", "videos.txt"])
def test_two_lists_are_an_error_that_says_which(tmp_path, second):
    make(tmp_path, "a.mp4", captions={name: LISTS[name] for name in ("metadata.jsonl", second)})
    if second == "videos.txt":
        make(tmp_path, captions={"prompts.txt": LISTS["prompts.txt"]})
    with pytest.raises(UserError, match=rf"two lists of captions, metadata\.jsonl and {second}.*: remove one") as error:
        list_folder(tmp_path)
    assert one_line(error)


def test_lists_line_by_line_must_have_as_many_lines(tmp_path):
    make(tmp_path, "a.mp4", captions={"videos.txt": "a.mp4\nb.mp4\n", "prompts.txt": "one\n"})
    with pytest.raises(UserError, match=r"videos\.txt has 2 lines but prompts\.txt 1"):
        list_folder(tmp_path)
    make(tmp_path, captions={"prompts.txt": "one\n\n"})  # a caption that is empty, not one that is missing
    assert found(tmp_path) == {"a.mp4": "one", "b.mp4": "no caption: it is empty"}
    (tmp_path / "prompts.txt").unlink()
    with pytest.raises(UserError, match=r"has videos\.txt but no prompts\.txt"):
        list_folder(tmp_path)
    make(tmp_path, "videos.mp4")  # then it is that file's caption
    assert found(tmp_path)["videos.mp4"] == "a.mp4\nb.mp4"


@pytest.mark.parametrize(
    "line, words",
    [
        ("{not json", "line 2 is not JSON"),
        ('["a.mp4", "words"]', 'line 2 has no "file"'),
        ('{"caption": "words"}', 'line 2 has no "file"'),
        ('{"file": "b.mp4", "caption": 3}', 'line 2: "caption" is not text'),
        ('{"file": "sub/../a.mp4", "caption": "again"}', r"line 2 lists a\.mp4 again, after line 1"),
        (b'{"file": "b.mp4", "caption": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_malformed_metadata_names_its_line(tmp_path, line, words):
    make(tmp_path, "a.mp4")
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file": "a.mp4", "caption": "words"}\n' + line + b"\n")
    with pytest.raises(UserError, match=words) as error:
        list_folder(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize(
    "text, words",
    [
        ("name,caption\na.mp4,words\n", "no columns file and caption"),
        ("", "no columns file and caption"),
        ("file,caption\na.mp4,words,and more\n", "line 2 has more fields"),
        ("file,caption\n,words\n", "line 2 has no file"),
        ('file,caption\na.mp4,"words\n', "line 2 is not CSV"),
        ("file,caption\na.mp4,x\na.mp4,y\n", r"line 3 lists a\.mp4 again, after line 2"),
    ],
)
def test_a_malformed_table_names_its_line(tmp_path, text, words):
    make(tmp_path, "a.mp4", captions={"metadata.csv": text})
    with pytest.raises(UserError, match=words) as error:
        list_folder(tmp_path)
    assert one_line(error)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    inside = make(tmp_path / "clips", "a.mp4", "sub/b.mp4")
    make(tmp_path / "outside", "secret.mp4", captions={"words.txt": "a secret"})
    make(tmp_path / "clips2", "c.mp4")  # begins like the folder's name
    (inside / "link.mp4").symlink_to(tmp_path / "outside" / "secret.mp4")
    (inside / "away").symlink_to(tmp_path / "outside")
    (inside / "within.mp4").symlink_to("sub/b.mp4")
    (inside / "loop.mp4").symlink_to("loop.mp4")
    absolute = str(inside / "a.mp4")
    bad = ["../outside/secret.mp4", "../clips2/c.mp4", str(tmp_path / "outside/secret.mp4"), "link.mp4",
           "away/secret.mp4", "sub/../../outside/other.mp4", "..", "/etc/passwd"]  # fmt: skip
    rows = [json.dumps(dict(file=name, caption="words")) for name in [absolute, "within.mp4", "loop.mp4", *bad]]
    make(inside, captions={"metadata.jsonl": "\n".join(rows)})
    outcome = found(inside)
    assert sum(reason == "lies outside the folder" for reason in outcome.values()) == len(bad)
    assert outcome["a.mp4"] == outcome["within.mp4"] == "words"
    assert outcome["loop.mp4"].startswith("not a usable file name")
    # By .txt the folder of the link is not walked, and a caption that lies elsewhere is not read.
    (inside / "metadata.jsonl").unlink()
    (inside / "a.txt").symlink_to(tmp_path / "outside" / "words.txt")
    outcome = found(inside)
    assert outcome["a.mp4"] == "no caption: its .txt lies outside the folder" and "away/secret.mp4" not in outcome


def test_strange_names_are_kept_apart_and_written_as_text(tmp_path):
    names = ["new\nline.mp4", "ünï 影.mp4", "sp ace;'\".mp4", "-rf.mp4", "%s{}.mp4"]
    make(tmp_path, *names, captions={os.path.splitext(n)[0] + ".txt": "words" for n in names})
    raw = os.fsencode(tmp_path) + b"/bad\xff.mp4"
    with open(raw, "wb") as f:
        f.write(b"x")
    outcome = found(tmp_path)
    assert {name: "words" for name in names}.items() <= outcome.items()
    assert len(outcome) == len(names) + 1
    assert outcome["bad\\udcff.mp4"] == "no caption: its .txt has no usable file name: it is not UTF-8"
    rows = [json.dumps(dict(file=name, caption="words")) for name in ["nul\0.mp4", "\ud800.mp4", "x" * 5000 + ".mp4"]]
    make(tmp_path, captions={"metadata.jsonl": "\n".join(rows)})
    outcome = found(tmp_path)
    assert sum(reason.startswith("not a usable file name") for reason in outcome.values()) == 3


@pytest.mark.parametrize("how", ["metadata.jsonl", "metadata.csv", "prompts.txt", "a.txt"])
@pytest.mark.parametrize(
    "caption, reason",
    [
        ("x" * MAX_CAPTION, ""),
        ("tab\tand ünïcode 影 \u200b", ""),
        ("x" * (MAX_CAPTION + 1), "bad caption: 10001 characters, more than 10000"),
        ("x" * 100_000, "bad caption: 100000 "),
        ("nul \0 inside", "bad caption: holds the control character U+0000"),
        ("escape \x1b[31m", "bad caption: holds the control character U+001B"),
        ("  ", "no caption: it is empty"),
    ],
    ids=["longest", "unicode", "too long", "100 kB", "NUL", "escape", "blank"],
)
def test_bad_captions_are_refused_with_their_reason(tmp_path, how, caption, reason):
    make(tmp_path, "a.mp4")
    write = {
        "metadata.jsonl": {"metadata.jsonl": json.dumps(dict(file="a.mp4", caption=caption))},
        "metadata.csv": {"metadata.csv": f'file,caption\na.mp4,"{caption}"\n'},
        "prompts.txt": {"videos.txt": "a.mp4\n", "prompts.txt": caption + "\n"},
        "a.txt": {"a.txt": caption},
    }[how]
    make(tmp_path, captions=write)
    listing = list_folder(tmp_path)
    assert listing.reasons[0].startswith(reason) and bool(listing.reasons[0]) == bool(reason)
    assert listing.captions == ["" if reason else caption.strip()]
    assert listing.caption_lengths[0] == len(caption.strip())


def test_halves_of_surrogate_pairs_are_no_text(tmp_path):
    make(tmp_path, "a.mp4", captions={"metadata.jsonl": r'{"file": "a.mp4", "caption": "half \ud800"}'})
    assert list_folder(tmp_path).reasons == ["bad caption: holds the control character U+D800"]


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    make(tmp_path, "a.mp4", captions={"pipe.txt": "words"})
    os.mkfifo(tmp_path / "a.txt")  # to read it would wait for ever
    (tmp_path / "folder.mp4").mkdir()
    assert found(tmp_path) == {"a.mp4": "no caption: not a regular file", "pipe.mp4": "not a regular file"}


def test_sizes_and_times_are_those_of_the_files(tmp_path):
    make(tmp_path, "a.mp4", captions={"a.txt": "words"})
    (tmp_path / "a.mp4").write_bytes(b"12345")
    listing, stat = list_folder(tmp_path), os.stat(tmp_path / "a.mp4")
    np.testing.assert_array_equal([listing.sizes, listing.mtimes], [[5], [stat.st_mtime_ns]])


def test_a_missing_or_empty_folder_is_a_user_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.mp4").write_bytes(b"x")
    for name, words in {"none": "no folder", "empty": "no videos in", "x.mp4": "is a file"}.items():
        with pytest.raises(UserError, match=words) as error:
            list_folder(tmp_path / name)
        assert one_line(error)
