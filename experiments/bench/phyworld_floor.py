"""The least velocity error that can be measured: true clips of PhyWorld's three motions, parsed like generated ones.

    python -m experiments.bench.phyworld_floor [clips] [pixels]

Beside the floors that PhyWorld published (arXiv 2411.02385, "ground truth" rows; its code parses videos of 256 pixels):
by our parser, and by a parser like theirs, the mean place of the pixels that are more than half covered. Theirs draws
pixel k of W at k / (W - 1) of the frame and reads it at k / W: all speeds come out too small by a W-th part, which is
most of their floor; here that scale is put in by hand, as our renders do not have it.
"""

import sys

import numpy as np

from data_pipelines.phyworld import GIVEN_FRAMES, MOTIONS, PhyWorld, PhyWorldConfig
from sorax.motion import velocity_error
from sorax.parser import parse_clip
from sorax.tracks import Track

PUBLISHED = {"uniform": 0.0099, "parabola": 0.0117, "collision": 0.0210}


def thresholded_tracks(video, num_objects):
    """Tracks of the red and the blue ball as PhyWorld's code parses them."""
    red, _, blue = np.moveaxis(video.astype(int), -1, 0)
    masks = [(red > 127) & (blue < 127), (red < 127) & (blue > 127)][:num_objects]
    size = video.shape[1]
    rows, cols = np.mgrid[:size, :size]
    tracks = []
    for mask in masks:
        area = mask.sum((1, 2))
        seen = area > 0
        centre = np.stack([(mask * axis).sum((1, 2)) for axis in (cols, rows)], axis=-1) / np.maximum(area, 1)[:, None]
        places = np.where(seen[:, None], (centre + 0.5) / size * (size - 1) / size, np.nan)
        no, nothing = np.zeros(len(seen), bool), np.zeros((len(seen), 0))
        tracks.append(Track(None, "circle", np.zeros(3), places, area / size**2, seen, ~seen, {}, ~seen, no, no,
                            np.zeros((len(seen), 3)), nothing))  # fmt: skip
    return tracks


def measure(motion, clips, size, split="test", parse=parse_clip):
    """(mean printed, mean code, share tracked) over clips in units / s; clips out of view count nowhere."""
    world = PhyWorld(PhyWorldConfig(split=split, num_samples=clips, size=size, motions=(motion,)))
    errors = []
    for i in range(clips):
        truth = world.truth(i)
        video = world[i]["video"]
        tracks = parse(video) if parse is parse_clip else parse(video, truth.num_objects)
        errors.append(velocity_error(tracks, truth, GIVEN_FRAMES, axes=(0,)))
    asked = [error for error in errors if error.tracked is not None]
    found = [error for error in asked if error.tracked]
    return *(np.mean([getattr(e, name) for e in found]) for name in ("printed", "code")), len(found) / len(asked)


if __name__ == "__main__":
    clips, size = (int(x) for x in (sys.argv[1:] + ["300", "128"][len(sys.argv) - 1 :]))
    print(f"{clips} clips of 32 frames a motion; units / s\n{'':40}{'printed':>10}{'code':>10}{'tracked':>10}")
    for motion in MOTIONS:
        rows = {
            f"{motion}, {size} px": dict(size=size),
            f"{motion}, {size} px, out of distribution": dict(size=size, split="ood"),
            f"{motion}, 256 px, their parser": dict(size=256, parse=thresholded_tracks),
        }
        for name, settings in rows.items():
            printed, code, tracked = measure(motion, clips if settings["size"] == size else clips // 4, **settings)
            print(f"{name:40}{printed:10.5f}{code:10.5f}{100 * tracked:9.1f} %", flush=True)
        print(f"{motion + ', published':40}{'':10}{PUBLISHED[motion]:10.4f}")
