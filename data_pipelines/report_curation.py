"""What curation dropped, for a data report: counts by stage, and pictures of some dropped clips.

Reads what `data_pipelines.curate` leaves in its output folder: curation.json (counts) and curation.parquet (a row for
every raw file and every clip).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data_pipelines import report_pictures
from data_pipelines.report_numbers import general
from sorax.errors import UserError

SUMMARY, TABLE = "curation.json", "curation.parquet"
STAGES = dict(file=("caption", "probe", "trim"), clip=("length", "bars", "brightness", "motion", "duplicate", "write"))
_COLUMNS = ("stage", "reason", "file", "clip", "caption", "start", "stop", "fps", "height", "width", "bar_top",
            "bar_bottom", "bar_left", "bar_right", "duplicate_of", "motion")  # fmt: skip


@dataclass(frozen=True)
class Curation:
    """numbers: counts by stage, for report.json. dropped: rows of dropped clips, as dicts; raw: folder of the files."""

    numbers: dict
    dropped: list
    raw: str

    def cards(self, processes=None):
        """Cards of some dropped clips, of each stage and reason in turn; none where the raw files are gone."""
        if not Path(self.raw).is_dir():
            return []
        rejected = [(i, row["stage"], row["reason"]) for i, row in enumerate(self.dropped)]
        rows = [self.dropped[i] for i, _ in report_pictures.pick_rejected(rejected, general)]
        outcomes = report_pictures.draw_all(
            report_pictures.draw_clip, [_clip(self.raw, row) for row in rows], processes=processes
        )
        return [_card(row, outcome) for row, (_, outcome) in zip(rows, outcomes)]


def find_curation(folder):
    """The Curation that made an indexed folder, or None where none did."""
    return read_curation(folder) if Path(folder, SUMMARY).is_file() else None


def read_curation(path) -> Curation:
    """The Curation of a folder that `sorax data curate` wrote, or of its curation.json.

    Raises: UserError where it is missing or cannot be read.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    summary, table = folder / SUMMARY, folder / TABLE
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        counts, raw = found["counts"], str(found["raw"])
        numbers = dict(path=str(summary), raw=raw, files=counts["files"]["total"], clips=counts["clips"]["total"],
                       kept=counts["clips"].get("kept", 0), frames=counts["frames"],
                       stages=[*_stages(counts["files"], "file"), *_stages(counts["clips"], "clip")])  # fmt: skip
        return Curation(numbers, _dropped(table), raw)
    except OSError as error:
        raise UserError(
            f"no curation in {path} ({error.strerror or error}): name a folder that `sorax data curate` finished"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{summary} is not the record of a curation ({type(error).__name__}: {error}): make it again "
                        "with `sorax data curate`") from error  # fmt: skip


def _stages(counts, kind):
    """How many files or clips each stage dropped, in the order of the stages, and how many were left."""
    left, lines = counts["total"], []
    dropped = counts["dropped"]
    for stage in (*STAGES[kind], *(name for name in dropped if name not in STAGES[kind])):
        reasons = sorted(dropped.get(stage, {}).items(), key=lambda item: (-item[1], item[0]))
        left -= sum(count for _, count in reasons)
        lines.append(dict(kind=kind, stage=stage, dropped=sum(count for _, count in reasons), left=left,
                          reasons=[dict(reason=reason, count=count) for reason, count in reasons]))  # fmt: skip
    return lines


def _dropped(table):
    import pyarrow.parquet as parquet

    filters = [("status", "==", "dropped"), ("kind", "==", "clip")]
    return parquet.read_table(table, columns=list(_COLUMNS), filters=filters).to_pylist()


def _clip(raw, row):
    height = (row["height"] or 0) + (row["bar_top"] or 0) + (row["bar_bottom"] or 0)
    width = (row["width"] or 0) + (row["bar_left"] or 0) + (row["bar_right"] or 0)
    seconds = max((row["stop"] or 0) - (row["start"] or 0) - 1 / (row["fps"] or 1), 0.0)
    return report_pictures.Clip(raw, row["file"], report_pictures.FRAMES, height, width, row["start"] or 0.0, seconds)


def _card(row, outcome):
    facts = [f"clip {row['clip']}", f"{row['start'] or 0:.1f} to {row['stop'] or 0:.1f} s"]
    if row["duplicate_of"]:
        facts.append(f"like {row['duplicate_of']}")
    card = report_pictures.card(row["file"], row["caption"], facts, outcome)
    return card | dict(tag=f"{row['stage']}: {row['reason']}")
