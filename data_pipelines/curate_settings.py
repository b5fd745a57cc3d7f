"""What curation asks of a clip: the settings, and what the command line says of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sorax.errors import UserError

MAX_DUPLICATE_BITS = 14  # more would compare nearly everyone with everyone


def _setting(default, text):
    return field(default=default, metadata=dict(help=text))


@dataclass(frozen=True)
class Settings:
    """Limits for clips and for the work on a file; the command line has an option of the same name for each."""

    min_seconds: float = _setting(1.0, "shorter clips are dropped")
    max_seconds: float = _setting(20.0, "longer shots are split into equal parts")
    margin: float = _setting(0.05, "seconds taken off on both sides of a cut")
    min_motion: float = _setting(0.002, "a clip is static below this mean optical flow, in longer sides of it a second")
    min_brightness: float = _setting(16.0, "a clip is too dark below this mean grey level of 255")
    max_brightness: float = _setting(240.0, "a clip is too bright above it")
    min_picture: float = _setting(0.4, "fraction of the frame that black bars must leave")
    duplicate_bits: int = _setting(6, "bits of 63 a frame that near-duplicates may differ in")
    allow_uncaptioned: bool = _setting(False, "keep clips of files without a caption")
    max_file_seconds: float = _setting(3600.0, "longer files are dropped")
    time_limit: float = _setting(1800.0, "seconds that looking at a file may take; cutting it, ten times that")
    memory: int = _setting(3072, "MiB that a worker may take")

    def __post_init__(self):
        """Raises UserError for a setting that cannot be."""
        for wrong, message in (
            (not self.max_seconds > 0, "--max-seconds must be above 0"),
            (not (self.min_seconds >= 0 and self.margin >= 0), "--min-seconds and --margin must not be negative"),
            (2 * self.min_seconds > self.max_seconds, f"--min-seconds {self.min_seconds:g} is more than half of "
             f"--max-seconds {self.max_seconds:g}: parts of a long shot would be too short; lower it"),
            (not 0 <= self.min_picture <= 1, "--min-picture is a fraction of the frame, from 0 to 1"),
            (not self.min_brightness < self.max_brightness, "--min-brightness must be below --max-brightness"),
            (not 0 <= self.duplicate_bits <= MAX_DUPLICATE_BITS,
             f"--duplicate-bits must be from 0 to {MAX_DUPLICATE_BITS} (of 63 bits a frame)"),
            (not (self.time_limit > 0 and self.max_file_seconds > 0 and self.memory > 0),
             "--time-limit, --max-file-seconds and --memory must be above 0"),
        ):  # fmt: skip
            if wrong:
                raise UserError(message)
