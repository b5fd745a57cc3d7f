"""Random-access sources of captioned videos: what every source offers, and a folder of real files.

Shapes: T frames, H height, W width. A video is uint8 [T, H, W, 3] and T = 4n + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Sample = dict[str, Any]  # video uint8 [T, H, W, 3], caption str, fps float, key str


@dataclass(frozen=True)
class SampleSpec:
    """What a sample will look like, known without decoding it.

    num_frames, height and width are those of the decoded video exactly; fps is in frames per second;
    key names the sample for people (a file name, or an index in a generated world).
    """

    num_frames: int
    height: int
    width: int
    fps: float
    caption: str
    key: str


class Source(Protocol):
    """A picklable sequence of captioned videos whose shapes are known before they are decoded."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def spec(self, index: int) -> SampleSpec:
        """Shape, rate and caption of one sample; cheap, decodes nothing."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample itself; its video has exactly the shape that spec(index) promised."""
        ...
