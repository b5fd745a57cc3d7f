"""Which features of a TFDS data set are its videos and captions; TensorFlow is not needed to tell."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sorax.errors import UserError

DEFAULT_FPS = 8.0  # of frames without a clock, unless data.fps or a feature "fps" says
_USUAL = dict(
    video=("video", "clip", "frames", "image"),
    caption=("caption", "captions", "text", "prompt", "description", "title", "label"),
)


class Choice(NamedTuple):
    """The records of one split, and which of their features are what.

    folder: of the prepared data set. split: may be a part, such as "train[:10%]".
    video, caption: names of features, "a/b" for one in a dictionary; fps: likewise, or "".
    kind: of the video, "file" (bytes of a video or image), "images" (a sequence of such bytes) or "stack" (an array).
    names: of the classes, where the caption is a label.
    """

    folder: str
    split: str
    video: str
    caption: str
    fps: str
    kind: str
    names: tuple[str, ...]
    default_fps: float


def choose_features(name, split, data_dir="", video_key="", caption_key="", default_fps=DEFAULT_FPS) -> Choice:
    """Opens a data set far enough to know its features; arguments and errors as of `tfds_source.TFDSSource`."""
    builder = _builder(name, data_dir)
    try:
        builder.as_data_source(split)
    except NotImplementedError as e:
        call = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        raise UserError(f"TFDS data set {name} in {builder.data_dir} is not prepared for random access: {call}") from e
    except (ValueError, AssertionError, OSError) as e:
        raise UserError(f"split {split!r} of TFDS data set {name} cannot be read ({_first_line(e)}): it has "
                        f"{', '.join(builder.info.splits) or 'none'}; set data.split") from e  # fmt: skip
    flat = dict(flatten(builder.info.features))
    videos = {key: kind for key, feature in flat.items() if (kind := video_kind(feature))}
    video = _choose(video_key, "video", videos, videos, flat, name)
    captions = {key: kind for key, feature in flat.items() if key != video and (kind := _caption_kind(feature))}
    # Words are better than the name of a class; bytes are taken for words only if they are called so.
    usual = {k: kind for k, kind in captions.items() if kind != "bytes" or _last(k) in _USUAL["caption"]}
    worded = {k: kind for k, kind in usual.items() if kind != "label"}
    caption = _choose(caption_key, "caption", captions, worded or usual, flat, name)
    names = tuple(n.replace("_", " ") for n in flat[caption].names) if captions[caption] == "label" else ()
    fps = "fps" if "fps" in flat and flat["fps"].shape == () and _is_number(flat["fps"]) else ""
    return Choice(str(builder.data_dir), split, video, caption, fps, videos[video], names, default_fps)


def _builder(name, data_dir):
    import tensorflow_datasets as tfds

    try:
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        return tfds.builder(name, data_dir=data_dir or None)
    except ImportError as e:
        raise UserError(f"TFDS data set {name} cannot be read without {e.name}: install it, or write the data set with "
                        "features that need no more than TFDS") from e  # fmt: skip
    except (ValueError, AssertionError, OSError) as e:
        where = data_dir or "the default folder of TFDS"
        raise UserError(f"no TFDS data set {name} in {where} ({_first_line(e)}): check data.path and data.data_dir"
                        ) from e  # fmt: skip


def flatten(features, prefix=""):
    """(name, feature) of all features, those of dictionaries as "a/b"."""
    for key, feature in features.items():
        if hasattr(feature, "items"):
            yield from flatten(feature, f"{prefix}{key}/")
        else:
            yield prefix + key, feature


def _is_number(feature):
    return isinstance(feature.np_dtype, type | np.dtype) and np.issubdtype(feature.np_dtype, np.number)


def video_kind(feature):
    """Kind of video that a feature can hold: "file", "images", "stack", or "" for none."""
    from tensorflow_datasets.core import features as tfds_features

    if isinstance(feature, tfds_features.Image):
        return "file"
    if isinstance(feature, tfds_features.Sequence):
        inner = feature.feature
        return "images" if isinstance(inner, tfds_features.Image) or _is_bytes(inner) else ""
    if _is_bytes(feature):
        return "file"
    is_stack = isinstance(feature, tfds_features.Tensor) and feature.np_dtype == np.uint8
    return "stack" if is_stack and len(feature.shape) in (3, 4) and feature.shape[-1] in (1, 3, None) else ""


def _is_bytes(feature):
    from tensorflow_datasets.core import features as tfds_features

    if not isinstance(feature, tfds_features.Tensor) or isinstance(feature, tfds_features.Text):
        return False
    return feature.shape == () and feature.np_dtype in (np.object_, np.str_, np.bytes_)


def _caption_kind(feature):
    """Kind of caption that a feature can be: "text", "label", "bytes", or "" for none."""
    from tensorflow_datasets.core import features as tfds_features

    if isinstance(feature, tfds_features.ClassLabel):
        named = feature.names != [str(i) for i in range(feature.num_classes)]
        return "label" if named else ""
    if isinstance(feature, tfds_features.Text):
        return "text"
    return "bytes" if _is_bytes(feature) else ""


def _choose(key, what, possible, likely, flat, name):
    """The feature that a setting names, or of the likely ones that with the most usual name, or the only one."""
    shown = ", ".join(f"{k} ({_describe(f)})" for k, f in flat.items())
    if key:
        if key not in possible:
            wrong = "can be no" if key in flat else "is no feature, hence no"
            raise UserError(f"data.{what}_key is {key!r}, which {wrong} {what} of TFDS data set {name}: it has {shown}")
        return key
    named = [k for word in _USUAL[what] for k in likely if _last(k) == word]
    if named or len(likely) == 1:
        return named[0] if named else next(iter(likely))
    problem = f"several features that may be the {what}" if likely else f"no feature that can be a {what}"
    hint = " (a label without class names is none)" if what == "caption" and not likely else ""
    raise UserError(f"TFDS data set {name} has {problem}{hint}, set data.{what}_key: it has {shown}")


def _last(key):
    return key.rpartition("/")[2]


def _describe(feature):
    dtype = feature.np_dtype
    shape = "x".join("?" if n is None else str(n) for n in feature.shape) if isinstance(feature.shape, tuple) else ""
    return " ".join(filter(None, [type(feature).__name__, shape, getattr(dtype, "__name__", str(dtype))]))


def stored(features, names):
    """The features of these names alone, for reading: images stay the bytes that they are stored as."""
    import tensorflow_datasets as tfds

    flat, tree = dict(flatten(features)), {}
    data = tfds.features.Tensor(shape=(), dtype=np.object_)
    for name in names:
        feature, inner = flat[name], tree
        if video_kind(feature) == "file":
            feature = data
        elif video_kind(feature) == "images":
            feature = tfds.features.Sequence(data)
        *above, last = name.split("/")
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = feature
    return tfds.features.FeaturesDict(tree)


def _first_line(error):
    return str(error).strip().split("\n")[0][:200]
