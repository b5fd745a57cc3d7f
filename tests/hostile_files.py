"""Files that mean harm, made of good ones; and a check that an index and a folder source survive them.

    python tests/hostile_files.py --clips FOLDER --count 1000 --out DIR

makes them in DIR, indexes them, decodes every sample that is said to be usable, and checks: nothing crashes or hangs
beyond the limit, every file is accounted for exactly once, nothing is written elsewhere, what is usable decodes. Ends
with 1 and a list of what went wrong, if anything did.
"""

import argparse
import collections
import fractions
import hashlib
import json
import os
import pathlib
import struct
import sys
import tempfile
import time

import av
import numpy as np

from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.index import FolderRecords, build_index
from data_pipelines.inspection import Limits, MeasureFile
from data_pipelines.workers import Failure, run_bounded

HUGE = 100_000  # the size that a header claims, or the most that its format can say

# --- Mutations of bytes: (generator, bytes, suffix) -> bytes


def flip_bits(rng, data, suffix, region=1.0):
    """A few bits turned over, near the beginning if region is small."""
    out = bytearray(data)
    for place in rng.integers(0, max(1, int(len(data) * region)), rng.integers(1, 65)):
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flip_header_bits(rng, data, suffix):
    return flip_bits(rng, data, suffix, 400 / len(data))


def truncate(rng, data, suffix):
    return data[: int(rng.uniform(0, 1) * len(data))]


def cut_beginning(rng, data, suffix):
    return data[int(rng.uniform(0, 0.5) * len(data)) :]


def garble(rng, data, suffix):
    """A range overwritten with noise."""
    start, end = sorted(int(x) for x in rng.integers(0, len(data), 2))
    return data[:start] + rng.integers(0, 256, end - start, dtype=np.uint8).tobytes() + data[end:]


def blank(rng, data, suffix):
    start, end = sorted(int(x) for x in rng.integers(0, len(data), 2))
    return data[:start] + bytes(end - start) + data[end:]


def double(rng, data, suffix):
    return data + data


def boxes(data, start=0, end=None):
    """(type, first byte, end) of the mp4 boxes that lie between two places."""
    end, found = len(data) if end is None else end, []
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > end:
            break
        found.append((kind, start, start + size))
        start += size
    return found


def inner_boxes(data, path):
    """(type, first byte, end) of the boxes inside the first box of each of the names of a path."""
    start, end = 0, len(data)
    for name in path:
        start, end = next(((a + 8, b) for kind, a, b in boxes(data, start, end) if kind == name), (0, 0))
    return boxes(data, start, end)


def swap_boxes(rng, data, suffix):
    """Two neighbouring boxes of an mp4 or mov in the other order, at the top or inside; another file is flipped."""
    path = [(), (b"moov",), (b"moov", b"trak", b"mdia", b"minf", b"stbl")][rng.integers(3)]
    found = inner_boxes(data, path)
    if len(found) < 2:
        return flip_bits(rng, data, suffix)
    k = int(rng.integers(len(found) - 1))
    (_, a, b), (_, _, c) = found[k], found[k + 1]
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def lose_box(rng, data, suffix):
    found = inner_boxes(data, (b"moov", b"trak", b"mdia", b"minf", b"stbl")) or boxes(data)
    if not found:
        return flip_bits(rng, data, suffix)
    _, a, _ = found[rng.integers(len(found))]
    return data[: a + 4] + b"free" + data[a + 8 :]


def resize_box(rng, data, suffix):
    """A box that says that it is longer or shorter than it is."""
    found = boxes(data)
    if not found:
        return flip_bits(rng, data, suffix)
    _, a, _ = found[rng.integers(len(found))]
    return data[:a] + struct.pack(">I", int(rng.integers(0, 1 << 32))) + data[a + 4 :]


def claim_size(rng, data, suffix):
    """A header that claims a picture of 100000 x 100000, or the largest that its format can say."""
    if suffix == ".png":
        return data[:16] + struct.pack(">II", HUGE, HUGE) + data[24:]
    if suffix == ".avi" and (place := data.find(b"strf")) >= 0:
        return data[: place + 12] + struct.pack("<ii", HUGE, HUGE) + data[place + 20 :]
    if suffix == ".gif":
        return data[:6] + b"\xff\xff\xff\xff" + data[10:]
    if suffix in (".webm", ".mkv"):  # elements PixelWidth and PixelHeight of two bytes
        for name in (b"\xb0\x82", b"\xba\x82"):
            place = data.find(name)
            data = data[: place + 2] + b"\xff\xff" + data[place + 4 :] if place >= 0 else data
        return data
    for name in (b"avc1", b"mp4v", b"hvc1"):  # the sample entry
        place = data.find(name + bytes(6))
        data = data[: place + 28] + b"\xff\xff\xff\xff" + data[place + 32 :] if place >= 0 else data
    return data


def claim_size_within(rng, data, suffix):
    """Key frames of VP8 that claim a picture of 16383 x 16383; the header of another file is flipped."""
    place = data.find(b"\x9d\x01\x2a")
    if place < 0:
        return flip_header_bits(rng, data, suffix)
    while place >= 0:
        data = data[: place + 3] + b"\xff\x3f\xff\x3f" + data[place + 7 :]
        place = data.find(b"\x9d\x01\x2a", place + 7)
    return data


def claim_frames(rng, data, suffix):
    """A header that claims endless frames or time."""
    if suffix in (".webm", ".mkv"):
        place = data.find(b"\x44\x89\x88")  # Duration, of eight bytes
        return data[: place + 3] + struct.pack(">d", 1e300) + data[place + 11 :] if place >= 0 else data
    if suffix == ".avi" and (place := data.find(b"avih")) >= 0:
        return data[: place + 24] + b"\xff\xff\xff\x7f" + data[place + 28 :]
    counts = [(b"stts", 12), (b"stsz", 12), (b"mvhd", 20), (b"mdhd", 20), (b"stsc", 8), (b"ctts", 8)]
    name, offset = counts[rng.integers(len(counts))]
    place = data.find(name)
    return data[: place + offset] + b"\x7f\xff\xff\xff" + data[place + offset + 4 :] if place >= 0 else data


def claim_clock(rng, data, suffix):
    """A time scale of 0, 1 or 2^32 - 1 ticks a second."""
    place = data.find(b"mdhd" if rng.integers(2) else b"mvhd")
    if place < 0:
        return flip_header_bits(rng, data, suffix)
    scale = struct.pack(">I", [0, 1, 2**32 - 1][rng.integers(3)])
    return data[: place + 16] + scale + data[place + 20 :]


BYTES = dict(
    intact=lambda rng, data, suffix: data, flipped=flip_bits, flipped_header=flip_header_bits, truncated=truncate,
    beheaded=cut_beginning, garbled=garble, blanked=blank, doubled=double, swapped=swap_boxes, lost=lose_box,
    resized=resize_box, huge=claim_size, huge_within=claim_size_within, endless=claim_frames, clock=claim_clock,
)  # fmt: skip
TEXTS = dict(
    zero_bytes=b"", one_byte=b"\0", text=b"this is no video\n" * 50, html=b"<html><body>404</body></html>",
    playlist=b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n../outside/secret.mp4\n#EXT-X-ENDLIST\n",
    list_of_files=b"ffconcat version 1.0\nfile ../outside/secret.mp4\n", svg=b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    noise=np.random.default_rng(1).bytes(5000),
)  # fmt: skip
CAPTIONS = dict(
    nul_caption=b"a \0 b", huge_caption=b"x" * HUGE, escape_caption=b"\x1b[2J", not_utf8_caption=b"\xff\xfe\xfd",
    blank_caption=b" \n", no_caption=None, bom_caption=b"\xef\xbb\xbfwords", format_caption=b"%s {0} ${x} `x` $(x)",
)  # fmt: skip
NAMES = dict(
    newline_name="new\nline {n}", unicode_name="ünï 影 \u202e {n}", quoted_name="'\";& {n}", dash_name="-rf {n}",
    long_name="x" * 240 + "{n}", percent_name="%s%n{{}} {n}", dots_name="a..b.txt {n}", not_utf8_name="bad\udcff {n}",
)  # fmt: skip
LINKS = dict(link_out="../outside/secret.mp4", link_loop="{name}", link_nowhere="nowhere.mp4", link_zero="/dev/zero",
             link_within="good.bin", link_folder="../outside")  # fmt: skip
SPECIAL = ("pipe", "folder", "no_rights", "many_frames")
LISTED = dict(
    up="../outside/secret.mp4", absolute="{out}/outside/secret.mp4", up_inside="x/../../outside/{n}.mp4",
    nul_path="nul\0{n}.mp4", surrogate_path="\ud800{n}.mp4", endless_path="y" * 5000 + "{n}.mp4", gone="gone {n}.mp4",
    root="/etc/passwd", dot=".", stream="pipe:0", remote="http://127.0.0.1:9/x{n}.mp4", listed_nul="0 intact.nul",
)  # fmt: skip


def many_frames(path, count):
    """A small file of very many frames, a thousand a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width = stream.height = stream.gop_size = 16
        stream.time_base = fractions.Fraction(1, 1000)
        (packet,) = [*stream.encode(av.VideoFrame(16, 16, "yuv420p")), *stream.encode()]
        data = bytes(packet)
        for k in range(count):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, stream.time_base
            container.mux(packet)


def make_files(clips, out, count, seed=0, frames=20_000):
    """Makes about `count` hostile files in out/beside (captions in .txt) and out/listed (in metadata.jsonl).

    Returns {folder: {key, or a number where the key is not known: kind}}.
    """
    rng, out = np.random.default_rng(seed), pathlib.Path(out).resolve()
    clips = sorted(pathlib.Path(path) for path in clips)
    beside, listed, outside = (out / name for name in ("beside", "listed", "outside"))
    for folder in (beside, listed, outside):
        folder.mkdir(parents=True)
        (folder / "good.bin").write_bytes(clips[0].read_bytes())  # not seen but by a link
    (outside / "secret.mp4").write_bytes(clips[0].read_bytes())
    (outside / "secret.txt").write_text("a secret")
    kinds = [*BYTES, *TEXTS, *CAPTIONS, *NAMES, *LINKS, *SPECIAL]
    made = {beside: {}, listed: {}}
    lines = []
    for n in range(count):
        # Mutations of bytes have the most ways to go wrong: every other file is one.
        kind = list(BYTES)[n // 2 % len(BYTES)] if n % 2 else kinds[n // 2 % len(kinds)]
        source = clips[int(rng.integers(len(clips)))]
        suffix = source.suffix if rng.uniform() < 0.9 else [".mp4", ".webm", ".png"][rng.integers(3)]
        stem = NAMES[kind].format(n=n) if kind in NAMES else f"{n} {kind}"
        folder = listed if n % 3 == 2 else beside
        path = folder / (stem + suffix)
        made_of = _make_one(rng, kind, source.read_bytes(), source.suffix, path, frames)
        caption = CAPTIONS.get(kind, b"words")
        if folder == beside and caption is not None:
            (folder / (stem + ".txt")).write_bytes(caption)
        elif folder == listed and caption is not None:
            lines.append(dict(file=path.name, caption=caption.decode("utf-8", "surrogateescape")))
        if made_of:
            key = path.name.encode("utf-8", "backslashreplace").decode()
            made[folder][key] = kind
    for n, (kind, name) in enumerate(LISTED.items()):
        file = name.format(n=n, out=out) if "{" in name else name
        lines.append(dict(file=file, caption="words"))
        made[listed][n] = kind
    (listed / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def _make_one(rng, kind, data, suffix, path, frames) -> bool:
    """Makes one file; False if the walk of the folder will not see it."""
    if kind in LINKS:
        path.symlink_to(LINKS[kind].format(name=path.name))
        return kind != "link_folder" or path.parent.name == "listed"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        return path.parent.name == "listed"
    elif kind == "many_frames":
        many_frames(path.with_suffix(".mp4"), frames)
        if path.suffix != ".mp4":
            path.with_suffix(".mp4").rename(path)
    else:
        path.write_bytes(TEXTS[kind] if kind in TEXTS else BYTES.get(kind, BYTES["intact"])(rng, data, suffix))
        if kind == "no_rights":
            path.chmod(0)
    return True


# --- The check


class _Timed(FolderRecords):
    """Files of a folder; each worker also writes down how long a file took."""

    log = ""

    def measurer(self):
        return _TimedMeasure(self.folder, self.limits, self.log)


class _TimedMeasure(MeasureFile):
    def __init__(self, folder, limits, log):
        super().__init__(folder, limits)
        self.log = log

    def __call__(self, key):
        began = time.monotonic()
        outcome = super().__call__(key)
        with open(os.path.join(self.log, str(os.getpid())), "a") as f:
            f.write(json.dumps([time.monotonic() - began, key]) + "\n")
        return outcome


class _Decode:
    """Decodes a sample of a source as training does; None, or what is wrong with it."""

    def __init__(self, source):
        self.source = source

    def __call__(self, index):
        spec, video = self.source.spec(index), self.source[index]["video"]
        same = video.shape == (spec.num_frames, spec.height, spec.width, 3) and video.dtype == np.uint8
        return None if same else f"{video.shape} is not what {spec} promises"


def snapshot(folder):
    """{path: (type, hash or target)} of everything below a folder that is not a hostile file."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(root, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as f:
                    found[path] = hashlib.sha256(f.read()).hexdigest()
            else:
                found[path] = "other"
    return found


def check(made, out, limits, processes, fit):
    """Indexes and reads the files that make_files made; returns (problems, report lines)."""
    out = pathlib.Path(out).resolve()
    problems, outcomes, seconds, reasons = [], collections.Counter(), [], collections.Counter()
    work, log, temporary = (out / name for name in ("work", "log", "tmp"))
    for folder in (work, log, temporary):
        folder.mkdir()
    before, began, home, old = snapshot(out), time.monotonic(), os.getcwd(), tempfile.tempdir
    os.chdir(work)
    tempfile.tempdir = str(temporary)
    try:
        for folder, expected in made.items():
            records = _Timed(folder, limits)
            records.log = str(log)
            index = build_index(records, out / f"index {folder.name}", limits=limits, processes=processes)
            keys = [key for key in expected if isinstance(key, str)]
            rows = collections.Counter(index.columns["key"].tolist())
            problems += [f"{key!r} is in the index {rows[key]} times" for key in keys if rows[key] != 1]
            if len(index) != len(expected):
                problems.append(f"{folder.name}: {len(expected)} files but {len(index)} rows")
            if len(index.usable) + sum(index.rejected().values()) != len(index):
                problems.append(f"{folder.name}: counts do not add up")
            reasons.update(index.rejected())
            source = FolderSource(folder, fit=fit, index=index, time_limit=limits.time_limit)
            if len(source) + len(source.rejected) != len(index):
                problems.append(f"{folder.name}: {len(source)} samples and {len(source.rejected)} rejected")
            reasons.update(rejected.reason.partition(": ")[0] for rejected in source.rejected
                           if rejected.reason.startswith(("too short", "too small", "over budget")))  # fmt: skip
            used = set()
            for i, wrong in run_bounded(_Decode(source), range(len(source)), processes=processes,
                                        time_limit=10 * limits.time_limit, memory_limit=limits.memory):  # fmt: skip
                used.add(source.spec(i).key)
                if wrong is not None:
                    wrong = wrong.reason if isinstance(wrong, Failure) else wrong
                    problems.append(f"{source.spec(i).key!r} is usable but {wrong}")
            for key, kind in expected.items():
                outcomes[kind, key in used] += 1
    finally:
        os.chdir(home)
        tempfile.tempdir = old
    for path in log.iterdir():
        seconds += [tuple(json.loads(line)) for line in path.read_text().splitlines()]
    after = snapshot(out)
    ours = tuple(str(out / name) for name in ("index beside", "index listed", "log"))
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    problems += [f"{path} was written or changed" for path in changed if not path.startswith(ours)]
    return problems, _report(made, outcomes, reasons, seconds, time.monotonic() - began)


def _report(made, outcomes, reasons, seconds, wall):
    total = sum(map(len, made.values()))
    used = sum(count for (_, is_used), count in outcomes.items() if is_used)
    lines = [f"{total} files: {used} usable, {total - used} rejected, in {wall:.1f} s", "by reason:"]
    lines += [f"  {count:5}  {reason}" for reason, count in reasons.most_common()]
    lines += ["by what was done to them (usable of all):"]
    for kind in dict.fromkeys(kind for kind, _ in outcomes):
        lines.append(f"  {outcomes[kind, True]:4} of {outcomes[kind, True] + outcomes[kind, False]:4}  {kind}")
    worst = sorted(seconds, reverse=True)[:3]
    lines += ["longest, in seconds: " + ", ".join(f"{time:.2f} ({key!r})" for time, key in worst)]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", required=True, help="folder of good videos")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--memory", type=int, default=1024, help="MiB a worker")
    arguments = parser.parse_args()
    videos = (".mp4", ".webm", ".mov", ".avi")
    clips = [path for path in pathlib.Path(arguments.clips).iterdir() if path.suffix in videos]
    made = make_files(clips, arguments.out, arguments.count, arguments.seed)
    limits = Limits(time_limit=arguments.time_limit, memory=arguments.memory << 20)
    problems, lines = check(made, arguments.out, limits, arguments.processes, Fit(2560, fps=8, max_frames=33))
    print("\n".join([*lines, *problems, f"{len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
