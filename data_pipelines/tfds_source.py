"""Any TFDS data set of videos or images with captions or labels as a source; TensorFlow is not needed.

Videos may be files in the records (bytes), stacks of frames [T, H, W, C], sequences of images, or single images, which
are videos of one frame; C is 1 or 3. They are brought within the same limits as the files of a folder.

Shapes: T frames, H height, W width, C channels. A video is uint8 [T, H, W, 3] and T = 4n + 1.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
from av import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from data_pipelines.decode import MAX_PIXELS, TIME_LIMIT, DecodeError, VideoInfo, decode, image_frame, reasons
from data_pipelines.fit import Fit
from data_pipelines.folder import FolderSource
from data_pipelines.index import Index, build_index
from data_pipelines.inspection import Limits, inspect
from data_pipelines.listing import Listing, check_caption
from data_pipelines.sources import Sample
from data_pipelines.tfds_features import DEFAULT_FPS, Choice, choose_features, stored
from sorax.errors import UserError

_log = logging.getLogger(__name__)


class Records:
    """The records of one split by their number. Picklable. choice: see `tfds_features.Choice`."""

    def __init__(self, choice: Choice):
        self.choice = choice

    def __len__(self):
        return len(_open(self.choice)[0])

    def data(self, index: int) -> bytes:
        """The bytes of a record."""
        return _open(self.choice)[0][index]

    def caption(self, index: int) -> str:
        """The caption of a record."""
        caption = self._values(index, "caption")["caption"]
        names = self.choice.names
        return names[caption] if names else bytes(caption).decode("utf-8", "replace").strip()

    def video(self, index: int):
        """(video, frames per second) of a record, frames not decoded; a file has no rate.

        Raises DecodeError if the rate makes no sense.
        """
        values = self._values(index, "video", *(["fps"] if self.choice.fps else []))
        rate = float(values["fps"]) if self.choice.fps else self.choice.default_fps
        if not 0 < rate <= 1000:
            raise DecodeError(f"bad rate: {rate} frames per second")
        return values["video"], rate

    def _values(self, index, *wanted):
        values, found = _parser(self.choice, wanted).deserialize_example_np(self.data(index)), {}
        for name in wanted:
            found[name] = values
            for key in getattr(self.choice, name).split("/"):
                found[name] = found[name][key]
        return found

    def shape(self, video) -> tuple[int, int, int]:
        """(T, H, W) of a stack or a sequence of images. Raises DecodeError where it cannot be a video."""
        if self.choice.kind == "images":
            if not len(video):
                raise DecodeError("no frame: the sequence is empty")
            sizes = {frame.shape for frame in map(_image, video)}
            if len(sizes) > 1:
                raise DecodeError("bad frames: they differ in size")
            return len(video), *sizes.pop()[:2]
        if video.dtype != np.uint8 or video.ndim not in (3, 4) or video.shape[-1] not in (1, 3) or 0 in video.shape:
            raise DecodeError(f"bad frames: {video.dtype} {list(video.shape)}, not uint8 [T, H, W, 1 or 3]")
        return (1, *video.shape[:2]) if video.ndim == 3 else video.shape[:3]


_opened, _lock = {}, threading.Lock()


def _open(choice: Choice):
    """The bytes of the records of a split, by number, and its features; opened once in each process."""
    with _lock:
        if choice not in _opened:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(choice.folder)
            _opened[choice] = builder.as_data_source(choice.split).data_source, builder.info.features
        return _opened[choice]


@functools.lru_cache(maxsize=64)
def _parser(choice: Choice, wanted: tuple[str, ...]):
    return stored(_open(choice)[1], [getattr(choice, name) for name in wanted])


class TFDSRecords:
    """The records of a split, as what `data_pipelines.index.build_index` measures. Keys are SPLIT/NUMBER."""

    def __init__(self, records: Records, limits: Limits):
        self.records, self.limits = records, limits
        choice = records.choice
        self.description = dict(kind="tfds", path=choice.folder, section=json.loads(json.dumps(choice._asdict())))

    def listing(self) -> Listing:
        count = len(self.records)
        captions = [self.records.caption(i) for i in range(count)]
        wrong = [check_caption(caption) for caption in captions]
        lengths = np.array([len(caption) for caption in captions], np.int32)
        captions = ["" if reason else caption for caption, reason in zip(captions, wrong)]
        sizes = np.array([len(self.records.data(i)) for i in range(count)], np.int64)
        keys = [f"{self.records.choice.split}/{i}" for i in range(count)]
        return Listing(keys, captions, lengths, wrong, sizes, np.zeros(count, np.int64))

    def measurer(self):
        return MeasureRecord(self.records, self.limits)

    def items(self, rows, keys):
        return (int(i) for i in rows)


class MeasureRecord:
    """What an index says of a record: its number -> (VideoInfo, SHA-256 of its bytes)."""

    def __init__(self, records: Records, limits: Limits):
        self.records, self.limits = records, limits

    def __call__(self, index: int) -> tuple[VideoInfo, str]:
        sha256, kind = hashlib.sha256(self.records.data(index)).hexdigest(), self.records.choice.kind
        try:
            with reasons():
                video, rate = self.records.video(index)
                if kind != "file":
                    T, H, W = self.records.shape(video)
        except DecodeError as e:
            return VideoInfo(container="tfds", codec=kind, reason=e.reason), sha256
        if kind == "file":
            return inspect(io.BytesIO(video), self.limits), sha256
        still = T == 1
        return VideoInfo(T, H, W, rate, (T - 1) / rate, duration=0.0 if still else T / rate, codec=kind,
                         container="tfds", is_image=still), sha256  # fmt: skip


class TFDSSource(FolderSource):
    """One split of a TFDS data set, in its own order. Random access reads ArrayRecord files.

    Arguments:
      name: NAME, NAME/CONFIG, NAME:VERSION or both, of a data set that is prepared in data_dir; or its folder.
      fit: the limits that samples are brought within.
      split: its name or a part of it, such as "train[:10%]".
      data_dir: where TFDS keeps data sets; "" for its default.
      video_key, caption_key: features that hold the video and the caption, "a/b" for one in a dictionary; "" to find
        them. A label is a caption by the name of its class.
      index, cache, processes, time_limit: as of FolderSource.
    A feature "fps" is the rate of frames that come as an array or as images; else they count as fit.fps, or 8 a second.
    Raises UserError if there is no such data set, it is not prepared in a format for random access, or has no features
    of these kinds.
    """

    def __init__(
        self,
        name: str,
        *,
        fit: Fit,
        split: str = "",
        data_dir: str = "",
        video_key: str = "",
        caption_key: str = "",
        index: Index | str | os.PathLike | None = None,
        cache: str | os.PathLike | None = None,
        processes: int | None = None,
        time_limit: float = TIME_LIMIT,
    ):
        self.fit, self.time_limit = fit, time_limit
        choice = choose_features(name, split or "train", data_dir, video_key, caption_key, fit.fps or DEFAULT_FPS)
        self.records, self.path = Records(choice), Path(choice.folder)
        seconds = fit.max_frames / fit.fps if fit.fps else None
        limits = Limits(max_seconds=seconds, max_frames=None if fit.fps else fit.max_frames, time_limit=time_limit)
        wanted = TFDSRecords(self.records, limits)
        if index is None:
            index = build_index(wanted, cache, limits=limits, processes=processes)
        else:
            index = index if isinstance(index, Index) else Index.load(index)
            if index.settings["source"] != wanted.description:
                raise UserError(f"data.index is not one of {name}, split {choice.split}: leave it empty")
        self._read(index)
        if len(self._rejected):
            summary = self._summary(len(index))
            if not len(self):
                raise UserError(f"no usable video in {name}: {summary}")
            _log.warning("%s: %s", name, summary)

    def __getitem__(self, index: int) -> Sample:
        """Decodes one sample. Raises UserError if its record has changed."""
        spec, start = self.spec(index), float(self._rates[index, 1])
        shape = spec.num_frames, spec.height, spec.width
        try:
            with reasons():
                video, rate = self.records.video(int(spec.key.rpartition("/")[2]))
                if self.records.choice.kind == "file":
                    limit = 10 * self.time_limit
                    video = decode(io.BytesIO(video), *shape, spec.fps, start, time_limit=limit)
                else:
                    video = _show(video, rate, shape, spec.fps, start)
        except DecodeError as e:
            raise UserError(f"record {spec.key} of {self.path} could be decoded when it was indexed but no longer: "
                            f"{e.reason}; restore it, or index the data set again") from e  # fmt: skip
        return dict(video=video, caption=spec.caption, fps=spec.fps, key=spec.key)


def _show(video, rate, shape, fps, start) -> np.ndarray:
    """uint8 [T, H, W, 3]: the frames on screen at start + k / fps, scaled, of a stack or a list of images at `rate`."""
    T, H, W = shape
    video = video[None] if getattr(video, "ndim", 4) == 3 else video
    # As for files: a little under half a frame early counts, so that a tie does not hang on rounding.
    times = start + np.arange(T) / fps + 0.45 * min(1 / fps, 1 / rate)
    picks = np.minimum(np.floor(times * rate).astype(int), len(video) - 1).tolist()
    out, reformatter = np.empty((T, H, W, 3), np.uint8), VideoReformatter()
    for k, pick in enumerate(picks):
        if k and pick == picks[k - 1]:
            out[k] = out[k - 1]
            continue
        frame = _image(video[pick]) if isinstance(video[pick], bytes) else video[pick]
        if frame.shape != (H, W, 3):
            frame = np.ascontiguousarray(np.broadcast_to(frame, (*frame.shape[:2], 3)))
            smaller = frame.shape[0] >= H and frame.shape[1] >= W
            how = Interpolation.AREA if smaller else Interpolation.BICUBIC
            frame = reformatter.reformat(VideoFrame.from_ndarray(frame, "rgb24"), W, H, "rgb24", interpolation=how)
            frame = frame.to_ndarray()
        out[k] = frame
    return out


def _image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG or JPEG."""
    return image_frame(io.BytesIO(data), MAX_PIXELS)[0].to_ndarray(format="rgb24")
