"""One sample of a data set of latents as a TFDS record, and the names of the files of such a data set.

A data set is a folder that `tfds.builder_from_directory(folder).as_data_source(split)` reads:

    dataset_info.json  features.json  metadata.json      TFDS; metadata.json also names VAE, tokenizer and sources
    tokenizer.json                                       what made text_tokens of the captions
    empty_caption.npy                                    where there are text_embeds: that of the empty caption
    latents-SPLIT.array_record-KKKKK-of-NNNNN            shard k: samples k * n // K to (k + 1) * n // K - 1, in order
    SPLIT.json                                           identity, and size, count and SHA-256 of every shard
    SPLIT.parquet                                        what must be known of every sample before it is read
    parts/                                               the same of single shards, until all are there

Letters: t, h, w, C = frames, height, width and channels of latents; L = tokens of a caption, D = width of their
embeddings; n samples, K shards.
"""

import functools
import hashlib

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

NAME = "latents"
VERSION = "1.0.0"
INFO = "dataset_info.json"
PARTS = "parts"
EMPTY_CAPTION = "empty_caption.npy"  # bits of bfloat16, uint16 [D]
# [name, dtype] of the columns of SPLIT.parquet; num_frames, height and width are those of the video. checksum: the
# first 8 bytes of the SHA-256 of the record; weight: how often a sample comes in an epoch.
COLUMNS = (
    ("t", "int32"), ("h", "int32"), ("w", "int32"), ("text_length", "int32"), ("num_frames", "int32"),
    ("height", "int32"), ("width", "int32"), ("fps", "float32"), ("weight", "float64"), ("checksum", "uint64"),
)  # fmt: skip


# tensorflow.Example, which TFDS writes, as far as it is read; a map is a list of entries.
_MESSAGES = dict(
    Bytes=dict(value="BYTES *"), Floats=dict(value="FLOAT *"), Ints=dict(value="INT64 *"),
    Feature=dict(bytes_list="Bytes", float_list="Floats", int64_list="Ints"),
    Entry=dict(key="STRING", value="Feature"), Features=dict(feature="Entry *"), Example=dict(features="Features"),
)  # fmt: skip

# Of each further kind of caption that samples have, see `data_pipelines.caption_kinds`.
KIND_CAPTION, KIND_TOKENS, KIND_EMBEDS, KIND_LENGTH = "caption_", "text_tokens_", "text_embeds_", "text_length_"


def columns(kinds=()):
    """COLUMNS, and the lengths of the captions of further kinds."""
    return COLUMNS + tuple((KIND_LENGTH + kind, "int32") for kind in kinds)


def shard_name(split, k, num_shards):
    """File name of shard k, as TFDS has it."""
    return f"{NAME}-{split}.array_record-{k:05d}-of-{num_shards:05d}"


def features(channels, text_width=0, kinds=()):
    """The TFDS features of a record; `channels` is C, `text_width` D: 0 where captions are not embedded. kinds: of the
    captions that samples have beside their own.

    mean and logvar, of the posterior and not normalised, and text_embeds are uint16: the bits of bfloat16, which TFDS
    can only read back where TensorFlow is installed. `(x.astype(np.uint32) << 16).view(np.float32)` are the numbers.
    """
    import tensorflow_datasets as tfds

    def latents():
        return tfds.features.Tensor(shape=(None, None, None, channels), dtype=np.uint16, encoding="bytes")

    def tokens():
        return tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")

    def embeds():
        return tfds.features.Tensor(shape=(None, text_width), dtype=np.uint16, encoding="bytes")

    text = {KIND_CAPTION + kind: tfds.features.Text() for kind in kinds}
    text |= {KIND_TOKENS + kind: tokens() for kind in kinds}
    if text_width:
        text |= dict(text_embeds=embeds()) | {KIND_EMBEDS + kind: embeds() for kind in kinds}
    return tfds.features.FeaturesDict(
        dict(
            key=tfds.features.Text(),
            caption=tfds.features.Text(),
            text_tokens=tokens(),
            mean=latents(),
            logvar=latents(),
            num_frames=np.int32,
            height=np.int32,
            width=np.int32,
            fps=np.float32,
            sha256=tfds.features.Text(),
            **text,
        )
    )


def latents_sha256(mean, logvar):
    """SHA-256 (hex) of the bytes of mean and then of logvar."""
    return hashlib.sha256(np.ascontiguousarray(mean).tobytes() + np.ascontiguousarray(logvar).tobytes()).hexdigest()


def checksum(record):
    """What COLUMNS keeps of the bytes of a record."""
    return int.from_bytes(hashlib.sha256(record).digest()[:8], "little")


class RecordEncoder:
    """Samples -> bytes, the same bytes for the same sample."""

    def __init__(self, channels, text_width=0, kinds=()):
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._features = features(channels, text_width, kinds)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())

    def __call__(self, sample):
        """sample: dict of all features but sha256; mean and logvar uint16 [t, h, w, C], text_tokens int32 [L], and
        text_embeds uint16 [L, D] if there are; likewise of further kinds of captions."""
        encoded = self._features.encode_example(sample | dict(sha256=latents_sha256(sample["mean"], sample["logvar"])))
        # Protocol buffers keep the features in a map, whose order is not fixed otherwise.
        return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)


def parse_record(record):
    """The sample in the bytes of a record: a dict with the features' names; arrays may be read-only.

    Straight from the protocol buffer: TFDS's own reader takes several times as long, for generality.
    """
    feature = {entry.key: entry.value for entry in _example().FromString(record).features.feature}

    def text(name):
        return feature[name].bytes_list.value[0].decode()

    def number(name):
        return int(feature[name].int64_list.value[0])

    def latents(name):
        shape = tuple(feature[f"{name}/shape"].int64_list.value)
        return np.frombuffer(feature[f"{name}/value"].bytes_list.value[0], np.uint16).reshape(shape)

    texts = {}
    for kind in ("", *(name.removeprefix(KIND_CAPTION) for name in feature if name.startswith(KIND_CAPTION))):
        end = f"_{kind}" if kind else ""
        tokens = np.frombuffer(feature["text_tokens" + end].bytes_list.value[0], np.int32)
        texts |= {"caption" + end: text("caption" + end), "text_tokens" + end: tokens}
        if "text_embeds" in feature:
            bits = np.frombuffer(feature["text_embeds" + end].bytes_list.value[0], np.uint16)
            texts["text_embeds" + end] = bits.reshape(len(tokens), -1)
    return dict(
        key=text("key"),
        **texts,
        mean=latents("mean"),
        logvar=latents("logvar"),
        num_frames=number("num_frames"),
        height=number("height"),
        width=number("width"),
        fps=float(feature["fps"].float_list.value[0]),
        sha256=text("sha256"),
    )


@functools.cache
def _example():
    """The class of `_MESSAGES`' Example. That of TFDS comes with all of TFDS, whose lazy imports wait for each other
    where two threads of a loader are the first to need it."""

    def field(number, name, kind):
        kind, _, many = kind.partition(" ")
        found = dict(typeName=f".sorax.{kind}") if kind in _MESSAGES else dict(type=f"TYPE_{kind}")
        return dict(name=name, number=number, label=f"LABEL_{'REPEATED' if many else 'OPTIONAL'}", **found)

    types = [dict(name=name, field=[field(i, *what) for i, what in enumerate(fields.items(), 1)])
             for name, fields in _MESSAGES.items()]  # fmt: skip
    file = dict(name="example.proto", package="sorax", syntax="proto3", messageType=types)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(json_format.ParseDict(file, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sorax.Example"))


def columns_of(sample, record, weight=1.0, kinds=()):
    """What `columns` keeps of a sample."""
    return (
        *sample["mean"].shape[:3], len(sample["text_tokens"]), sample["num_frames"], sample["height"],
        sample["width"], sample["fps"], weight, checksum(record),
        *(len(sample[KIND_TOKENS + kind]) for kind in kinds),
    )  # fmt: skip


def floats(bits):
    """float32 of the bits of bfloat16, uint16 of any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
