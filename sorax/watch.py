"""A small fixed part of the world suite that is asked again and again during training."""

import dataclasses

from sorax.generate import Request
from sorax.held_out import Clips, load_splits
from sorax.judging import judge
from sorax.metrics import summarise


@dataclasses.dataclass(frozen=True)
class Watched:
    """Test prompts of the world with their truths."""

    clips: Clips

    def requests(self) -> list[Request]:
        return [Request(caption, *video.shape[:3], seed=i)
                for i, (caption, video) in enumerate(zip(self.clips.captions, self.clips.videos))]  # fmt: skip

    def rates(self, videos) -> dict[str, float]:
        """eval/prompts/joint, ...: the share of videos (of `requests`, in order) that are right in that."""
        table = summarise([judge(video, truth) for video, truth in zip(videos, self.clips.truths)])
        return {f"eval/prompts/{name}": cell["rate"] for name, cell in table.items() if cell["n"]}


def watched_prompts(data, vae_config, patch_size, count: int) -> Watched | None:
    """What is watched of a `data` section; None where it is not the embedded world, or nothing is asked for."""
    if not count or (data.path or "world") != "world" or data.mixture:
        return None
    splits = load_splits(dataclasses.asdict(data), vae_config, count, vae_config.spatial_stride * patch_size[1])
    return Watched(splits["test"])
