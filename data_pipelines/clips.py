"""Dense clips for the VAE: batches of one shape, drawn from a source of mixed shapes.

Letters: B = clips of a batch; T, H, W as in a video.
"""

import hashlib

import numpy as np

from data_pipelines import reading
from sorax.errors import UserError


def check_crop(crop, temporal_stride: int, spatial_multiple: int = 1):
    """Raises UserError unless crop is None or (frames, height, width) that a VAE of these strides takes."""
    if crop is None:
        return
    if not isinstance(crop, tuple | list) or len(crop) != 3 or not all(isinstance(n, int) and n >= 0 for n in crop):
        raise UserError(f"crop {crop!r}: it is (frames, height, width), whole numbers, 0 to leave a side as it is")
    if crop[0] and (crop[0] - 1) % temporal_stride:
        few = ", ".join(str(temporal_stride * n + 1) for n in range(4))
        raise UserError(f"crop {tuple(crop)}: clips have {temporal_stride}n + 1 frames ({few}, ...), or 0 to leave "
                        "them as they are")  # fmt: skip
    if any(side % spatial_multiple for side in crop[1:]):
        near = (crop[0], *(-(-side // spatial_multiple) * spatial_multiple for side in crop[1:]))
        raise UserError(f"crop {tuple(crop)}: heights and widths are multiples of {spatial_multiple}, such as {near}, "
                        "or 0 to leave them as they are")  # fmt: skip


class VideoClipSource:
    """Batches of dense clips, all of one shape, drawn from a source of mixed shapes; random access by step.

    Step k takes a shape with probability proportional to how many samples have it, then batch_size samples of
    that shape, different ones as far as there are enough; (seed, k) decides both.

    Args:
      source: a `data_pipelines.sources.Source`.
      crop: (frames, height, width) or None; 0 leaves a side as it is. Longer or larger videos are cut to it, at a
        place drawn for each clip, so that videos of many native sizes train in one shape; smaller ones keep their own
        size.

      temporal_stride: of the VAE; it takes clips of temporal_stride * n + 1 frames.

    Raises UserError where the source is empty or for a crop that `check_crop` refuses.
    """

    def __init__(self, source, *, batch_size, seed, crop=None, temporal_stride=4):
        if not len(source):
            raise UserError("there is no video to train on: the data set is empty")
        check_crop(crop, temporal_stride)
        self.source, self.batch_size, self.seed, self.crop = source, batch_size, seed, crop
        specs = (source.spec(i) for i in range(len(source)))
        shapes = np.array([(s.num_frames, s.height, s.width) for s in specs])
        cropped = shapes if crop is None else np.where(crop, np.minimum(shapes, crop), shapes)
        # A batch is of one shape, so few enough clips that reach a crop are worth a word.
        if crop is not None and any(crop) and not (cropped != shapes).any():
            print(f"no clip is larger than the crop of {crop} (frames, height, width): they are used whole")
        # Sorted, so that equal data draws equally: [groups, 3], members [groups] of indices.
        self.shapes, group_of, sizes = np.unique(cropped, axis=0, return_inverse=True, return_counts=True)
        self.groups = np.split(np.argsort(group_of.ravel(), kind="stable"), sizes.cumsum()[:-1])
        self._ends = sizes.cumsum()

    @property
    def identity(self):
        """Hash of the shapes of the data and of every setting: a checkpoint that has another is of other batches."""
        settings = repr((self.batch_size, self.seed, self.crop, self.shapes.tolist()))
        digest = hashlib.sha256(settings.encode())
        for group in self.groups:
            digest.update(group.astype("<i8"))
        return digest.hexdigest()[:16]

    def draw(self, step):
        """(shape, members, where) of a step: (T, H, W), int64 [B] indices, float64 [B, 3] places of the crops."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64)))
        group = int(np.searchsorted(self._ends, rng.integers(self._ends[-1]), side="right"))
        members = self.groups[group]
        if len(members) >= self.batch_size:
            chosen = rng.choice(members, self.batch_size, replace=False)
        else:
            chosen = np.resize(rng.permutation(members), self.batch_size)  # wraps around
        return tuple(self.shapes[group].tolist()), chosen, rng.random((self.batch_size, 3))

    def read(self, step, start, stop):
        """Clips start..stop - 1 of a step: dict(video uint8 [stop - start, T, H, W, 3])."""
        shape, members, where = self.draw(step)
        with reading.empty((stop - start, *shape, 3), np.uint8) as clips:
            self._fill(clips, shape, members[start:stop].tolist(), where[start:stop])
            return dict(video=clips)

    def _fill(self, clips, shape, members, where):
        for clip, member, place in zip(clips, members, where):
            try:
                with reading.note(member):
                    video = self.source[member]["video"]
            except UserError:
                raise
            except Exception as error:  # not all survive the way back from a worker, and none names the sample
                what = f"{type(error).__name__}: {error}"
                raise RuntimeError(f"{self.name(member)} could not be read: {what}") from error
            spare = np.array(video.shape[:3]) - shape
            if spare.min() < 0:
                raise UserError(
                    f"{self.name(member)} was listed as {shape} frames x height x width or larger, "
                    f"but reads as {video.shape[:3]}: the data changed; start again"
                )
            corner = (place * (spare + 1)).astype(int)
            clip[:] = video[tuple(slice(c, c + s) for c, s in zip(corner, shape))]

    def name(self, sample):
        """What to call a sample in an error."""
        return self.source.spec(sample).key
