"""The record of a curation: a row for every raw file and every clip, their counts, and the files they are kept in."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from data_pipelines.inspection import reason_kind

VERSION = 1
TRIMMED = ("margin", "blank", "fade")
# What the columns mean, kept with the table for whoever finds it.
COLUMNS = {
    "kind": "file (as it was found) or clip (as it was cut out of one)",
    "status": "kept or dropped; of a file: cut (its clips have rows of their own) or dropped",
    "stage": "which stage dropped it: caption, probe, trim (files); length, bars, brightness, motion, duplicate, write",
    "reason": "why",
    "file": "raw file, relative to the raw folder",
    "clip": "number of the clip in its file, from 0; -1 of a file",
    "path": "where a kept clip lies in this folder",
    "copied": "a kept clip is a copy of the file, byte for byte; else it is encoded anew, without sound",
    "caption": "caption of the file, empty if it has none",
    "first": "first frame of the clip in its file",
    "end": "frame after its last",
    "start": "seconds from the first frame of the file",
    "stop": "likewise, of its end",
    "num_frames": "frames",
    "height": "pixels, upright; of a clip after bars are cut off",
    "width": "likewise",
    "fps": "frames per second",
    "rotation": "degrees counter-clockwise that the file asks to be turned by; pixels of encoded clips are turned",
    "bar_top": "pixels that are cut off",
    "bar_bottom": "likewise",
    "bar_left": "likewise",
    "bar_right": "likewise",
    "motion": "mean length of the optical flow, in longer sides of the frame per second",
    "brightness": "mean grey level, 0 to 255",
    "contrast": "standard deviation of grey levels, mean over frames",
    "duplicate_of": "path of the kept clip that this one is a near-duplicate of, perhaps through others",
    "duplicate_bits": "bits of 63 that their hashes differ in, in the mean over frames",
    "trimmed_margin": "frames of the file beside cuts, in no clip",
    "trimmed_blank": "black or white frames at the ends of its shots, in no clip",
    "trimmed_fade": "frames of fades at the ends of its shots, in no clip",
    "bytes": "size of a kept clip",
}


def file_row(entry: dict, found: dict, stage: str = "", reason: str = "") -> dict:
    """The row of a raw file: what curate_scan.scan found, or the stage that dropped it."""
    trimmed = {f"trimmed_{k}": found["trimmed"].get(k, 0) for k in TRIMMED} if found else {}
    names = ("num_frames", "height", "width", "fps", "rotation")
    return dict(
        kind="file", status="dropped" if stage else "cut", stage=stage, reason=reason, file=entry["file"], clip=-1,
        caption=entry["caption"], **{k: found[k] for k in names if k in found}, **trimmed,
    )  # fmt: skip


def clip_row(clip: dict, stage: str = "", reason: str = "", **more) -> dict:
    """The row of a clip: kept, or the stage that dropped it."""
    kept = dict(path=clip["path"], copied=clip["whole"], bytes=clip["bytes"]) if not stage else {}
    names = ("caption", "first", "end", "start", "stop", "height", "width", "fps", "motion", "brightness", "contrast")
    bars = {f"bar_{side}": n for side, n in zip(("top", "bottom", "left", "right"), clip["bars"])}
    return dict(
        kind="clip", status="dropped" if stage else "kept", stage=stage, reason=reason, file=clip["file"],
        clip=clip["number"], num_frames=clip["end"] - clip["first"], **{k: clip[k] for k in names}, **bars, **kept,
        **more,
    )  # fmt: skip


def summarise(rows: list[dict]) -> dict:
    """Counts of files, clips and frames by where they ended; each kind adds up to its total."""
    counts = {}
    for kind in ("file", "clip"):
        of_kind = [r for r in rows if r["kind"] == kind]
        dropped: dict[str, Counter] = {}
        for row in of_kind:
            if row["status"] == "dropped":
                dropped.setdefault(row["stage"], Counter())[reason_kind(row["reason"])] += 1
        counts[f"{kind}s"] = dict(
            total=len(of_kind), **Counter(r["status"] for r in of_kind if r["status"] != "dropped"),
            dropped={stage: dict(sorted(reasons.items())) for stage, reasons in sorted(dropped.items())},
        )  # fmt: skip
    clips = [r for r in rows if r["kind"] == "clip"]
    files = [r for r in rows if r["kind"] == "file"]
    counts["clips"]["copied"] = sum(r.get("copied", False) for r in clips)
    counts["clips"]["without_bars"] = sum(r["status"] == "kept" and any(r[f"bar_{s}"] for s in (
        "top", "bottom", "left", "right")) for r in clips)  # fmt: skip
    counts["clips"]["uncaptioned"] = sum(r["status"] == "kept" and not r["caption"] for r in clips)
    counts["frames"] = dict(
        total=sum(r.get("num_frames", 0) for r in files),
        kept=sum(r["num_frames"] for r in clips if r["status"] == "kept"),
        dropped=sum(r["num_frames"] for r in clips if r["status"] == "dropped"),
        trimmed={k: sum(r.get(f"trimmed_{k}", 0) for r in files) for k in TRIMMED},
    )
    return counts


def write_outputs(out: str, rows: list[dict], *, settings: dict, raw: str, captions=None) -> dict:
    """Writes metadata.jsonl (kept clips), curation.parquet (all rows) and, last, curation.json.

    metadata.jsonl has a line a clip, in the order of files and clips: file, caption, source, start, stop, fps,
    num_frames and scores; FolderSource reads file and caption. captions: {path: {kind: caption}} of clips that were
    captioned: their lines have the detailed one as caption, caption_original, and captions. Returns what curation.json
    holds: version, raw, settings, counts (`summarise`) and columns (what those of the table mean).
    """
    lines = [
        dict(file=r["path"], source=r["file"], **_captions(r["caption"], (captions or {}).get(r["path"])),
             **{k: r[k] for k in ("start", "stop", "fps", "num_frames", "motion", "brightness", "contrast")})
        for r in rows if r["status"] == "kept"
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    _replace(Path(out, "metadata.jsonl"), text.encode())
    part = os.path.join(out, ".curation.parquet.part")
    _table(rows, part)
    os.replace(part, os.path.join(out, "curation.parquet"))
    counts = summarise(rows)
    if captions:
        counts["clips"]["captioned"] = len(captions)
    summary = dict(version=VERSION, raw=raw, settings=settings, counts=counts, columns=COLUMNS)
    _replace(Path(out, "curation.json"), json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return summary


def _captions(own: str, written: dict[str, str] | None) -> dict:
    if not written:
        return dict(caption=own)
    caption = written.get("detailed") or next(iter(written.values()))
    return dict(caption=caption, caption_original=own, captions=written)


def _table(rows: list[dict], path: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = dict.fromkeys(COLUMNS, pa.int32()) | dict.fromkeys(
        ("kind", "status", "stage", "reason", "file", "path", "caption", "duplicate_of"), pa.string())  # fmt: skip
    kinds |= dict.fromkeys(("start", "stop", "fps", "motion", "brightness", "contrast", "duplicate_bits"), pa.float64())
    kinds |= dict(copied=pa.bool_(), bytes=pa.int64())
    schema = pa.schema([(name, kinds[name]) for name in COLUMNS])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _replace(path: Path, data: bytes):
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
