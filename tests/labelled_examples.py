"""Examples and clips whose contents tell which they are, for the tests of what packs and reads them."""

import os
import signal
import time

import numpy as np

from data_pipelines.sources import SampleSpec

SHAPES = [(1, 4, 4), (2, 4, 4), (3, 2, 6), (1, 2, 2), (3, 4, 6)]


class Examples:
    """Latents of mixed sizes, random but for their index; captions of 1 to 6 tokens, each of them index + 3."""

    def __init__(self, count=30, weights=None):
        self.shapes = np.array([SHAPES[i % len(SHAPES)] for i in range(count)], np.int32)
        self.text_lengths = (np.arange(count) % 6 + 1).astype(np.int32)
        self.weights = weights

    def __len__(self):
        return len(self.shapes)

    def key(self, index):
        return f"clip_{index}.mp4"

    def __getitem__(self, index):
        shape = (*self.shapes[index].tolist(), 2)
        latents = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
        return dict(latents=latents, text_tokens=np.full(self.text_lengths[index], index + 3, np.int32))

    def sample(self, index, key):
        """Latents that say which key they were drawn with."""
        latents = np.zeros((*self.shapes[index].tolist(), 2), np.float32)
        latents[..., 0], latents[..., 1] = hash(key) % 9973, key[-1]
        return dict(self[index], latents=latents)


class Failing(Examples):
    """One of them cannot be read: how = "raise", "kill", or "unpicklable"."""

    def __init__(self, bad, how):
        super().__init__()
        self.bad, self.how = bad, how

    def __getitem__(self, index):
        if index == self.bad:
            if self.how == "kill":
                time.sleep(0.2)  # what was read before it is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "unpicklable":
                raise Stubborn("moov atom", lambda: None)
            raise ValueError("moov atom not found")
        return super().__getitem__(index)


class Stubborn(Exception):
    """Can neither be pickled nor made again from its message."""

    def __init__(self, message, function):
        super().__init__(message)
        self.function = function


def ids(batch):
    """The samples of each row of a batch of `Examples`: lists of indices, read from their captions."""
    rows = []
    for tokens, segments in zip(batch["text_tokens"], batch["text_segment_ids"]):
        rows.append([int(tokens[segments == s][0]) - 3 for s in range(1, segments.max() + 1)])
    return rows


class Clips:
    """Videos of four shapes whose pixels tell which clip, frame, row and column they are."""

    shapes = [(9, 32, 48), (9, 32, 48), (9, 32, 48), (1, 32, 32), (5, 16, 16), (17, 48, 64)]

    def __init__(self, count=24):
        self.count = count

    def __len__(self):
        return self.count

    def spec(self, index):
        caption = " ".join(["word"] * (index % 3 + 1))
        return SampleSpec(*self.shapes[index % len(self.shapes)], fps=8.0, caption=caption, key=f"clip_{index}")

    def __getitem__(self, index):
        t, h, w = self.shapes[index % len(self.shapes)]
        frame, row, column = np.indices((t, h, w))
        video = np.stack([frame + 20 * index % 256, row, column], -1).astype(np.uint8)
        return dict(video=video, caption=self.spec(index).caption)
