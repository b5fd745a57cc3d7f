"""What looking at raw videos costs: curation's scan against bare decoding, frames a second of one core's CPU time.

python -m experiments.bench.curation FOLDER
"""

import sys
import time

import av
import numpy as np

from data_pipelines.curate_scan import scan
from data_pipelines.curate_settings import Settings
from data_pipelines.decode import DecodeError
from data_pipelines.listing import list_folder


def bare(path) -> int:
    """Decodes a video and throws it away; the number of its frames."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def cpu_seconds(function, *arguments, rounds=3) -> float:
    """Median of process CPU time; a first round is not counted."""
    taken = []
    for _ in range(rounds + 1):
        began = time.process_time()
        function(*arguments)
        taken.append(time.process_time() - began)
    return float(np.median(taken[1:]))


def line(name, frames, scanning, decoding):
    print(f"{name:32}{frames:8.0f}{frames / scanning:9.0f}{frames / decoding:10.0f}{decoding / scanning:7.2f}")


if __name__ == "__main__":
    print(f"{'':32}{'frames':>8}{'scan/s':>9}{'decode/s':>10}{'ratio':>7}")
    totals = np.zeros(3)
    for file in list_folder(sys.argv[1]).keys:
        path = f"{sys.argv[1]}/{file}"
        try:
            found = scan(path, Settings())
        except DecodeError as error:
            print(f"{file:32}{error.reason}")
            continue
        if not found["is_image"]:
            row = found["num_frames"], cpu_seconds(scan, path, Settings()), cpu_seconds(bare, path)
            totals += row
            line(file, *row)
    line("all", *totals)
