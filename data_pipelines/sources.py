"""Random-access sources of captioned videos."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """What is known of a sample without decoding it; the decoded video agrees with it exactly."""

    num_frames: int
    height: int
    width: int
    fps: float
    caption: str
    key: str


class Source(Protocol):
    """A picklable sequence of samples: dict(video uint8 [T, H, W, 3], caption str, fps float, key str)."""

    def __len__(self) -> int: ...

    def spec(self, index: int) -> SampleSpec: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...
