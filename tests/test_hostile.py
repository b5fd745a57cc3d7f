"""A small version of `hostile_files.py`; the script itself does as many as it is asked for."""

import numpy as np
from hostile_files import BYTES, CAPTIONS, LINKS, LISTED, NAMES, SPECIAL, TEXTS, check, make_files
from PIL import Image
from video_files import numbered, write

from data_pipelines.fit import Fit
from data_pipelines.inspection import Limits


def test_hostile_files_cost_themselves_only(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), dtype=np.uint8)
    clips = [write(tmp_path / f"clip.{suffix}", noise // 4 + numbered(17)) for suffix in ("mp4", "webm", "mov", "avi")]
    Image.fromarray(noise[0]).save(tmp_path / "png.png")
    kinds = len(BYTES) + len(TEXTS) + len(CAPTIONS) + len(NAMES) + len(LINKS) + len(SPECIAL)
    made = make_files([*clips, tmp_path / "png.png"], tmp_path / "out", 2 * kinds, frames=2000)
    assert {kind for folder in made.values() for kind in folder.values()} >= {*BYTES, *TEXTS, *LISTED}
    limits = Limits(time_limit=10.0, memory=1 << 30)
    problems, lines = check(made, tmp_path / "out", limits, 2, Fit(100, fps=8, max_frames=9))
    print("\n".join(lines))
    assert problems == []
    assert sum(" usable, " in line for line in lines) == 1
