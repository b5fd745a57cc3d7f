"""A captioner at work: videos of any size, packed in rows, to captions; or captions to longer ones."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.caption_examples import padded
from data_pipelines.rows import RowSource
from data_pipelines.text_tokens import MAX_TOKENS, Tokenizer
from sorax import config as config_lib
from sorax import decoding, functional
from sorax.captioner import Captioner, CaptionerConfig
from sorax.decoding import DecodingConfig
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.runs import load_params, open_vae, vae_folder

ROW_TOKENS = 512  # rows are this long, or as long as the longest video
ROWS_A_BATCH = 8
MAX_SEGMENTS = 32  # captions that are written of a row


class _Items:
    """What is read, as the examples of packed rows; there is no caption yet."""

    def __init__(self, items):
        self.items, self.shapes = items, np.array([x.shape[:3] for x in items], np.int32)
        self.text_lengths = np.zeros(len(items), np.int32)

    def __len__(self):
        return len(self.items)

    def key(self, i):
        return f"input {i}"

    def __getitem__(self, i):
        return dict(latents=self.items[i], text_tokens=np.zeros(0, np.int32))


class CaptionWriter:
    """Captions by a captioner with these parameters.

    Args:
        codec: of a captioner that reads latents; None where it reads pixels or text.
    """

    def __init__(self, config: CaptionerConfig, params, tokenizer: Tokenizer, codec: Codec | None = None):
        self.config, self.params, self.tokenizer, self.codec = config, params, tokenizer, codec
        graph = functional.abstract(Captioner, config)[0]
        self._write = jax.jit(functools.partial(write_rows, graph, config), static_argnames=("settings",))

    def captions(self, videos, kind: str, settings: DecodingConfig = DecodingConfig(), seeds=None) -> list[str]:
        """Captions of a kind, of videos uint8 `[T, H, W, 3]` (of any sizes) or of texts, whichever it reads.

        A caption depends on its own video and seed alone, not on what is written beside it.

        Args:
            seeds: of the draws, one a video; 0, 1, ... by default.

        Raises:
            UserError: it was not trained to write that kind, or a text is too long.
        """
        if kind not in self.config.kinds:
            raise UserError(f"this captioner writes captions of the kinds {', '.join(self.config.kinds)}: there is no "
                            f"{kind!r}")  # fmt: skip
        if not len(videos):
            return []
        items = self._items(videos)
        seeds = np.arange(len(items)) if seeds is None else np.asarray(seeds)
        counts = [int(np.prod(x.shape[:3])) // int(np.prod(self.config.patch_size)) for x in items]
        row_tokens = -(-max(ROW_TOKENS, max(counts)) // 16) * 16
        rows = RowSource(_Items(items), row_tokens=row_tokens, row_text=MAX_SEGMENTS, max_segments=MAX_SEGMENTS,
                         batch_size=1, seed=0, patch_size=self.config.patch_size, order=order(self.config))  # fmt: skip
        count, texts = len(rows.plan(0)), [None] * len(items)
        size = min(ROWS_A_BATCH, count)
        most = -(-max(len(rows.samples(i)) for i in range(count)) // 8) * 8
        for start in range(0, count, size):
            # The last batch has rows of the next epoch too, which hold the same.
            batch = rows.read(start, start + size)
            samples = [rows.samples(i).tolist()[:most] for i in range(start, start + size)]
            ids, own = np.zeros((size, most), np.int32), np.zeros((size, most), np.int64)
            for row, members in enumerate(samples):
                ids[row, : len(members)], own[row, : len(members)] = np.arange(1, len(members) + 1), seeds[members]
            tokens = np.asarray(self._write(
                self.params, batch["tokens"], batch["positions"], batch["segment_ids"], ids,
                jnp.uint32(own.reshape(-1) % (1 << 32)), self.config.start_token(self.config.kinds.index(kind)),
                settings=settings,
            ))  # fmt: skip
            for row, members in enumerate(samples):
                for place, member in enumerate(members):
                    texts[member] = self.tokenizer.decode(tokens[row * most + place])
        return texts

    def _items(self, videos):
        if self.config.reads == "text":
            return [self.tokenizer.encode(text, "the prompt").reshape(-1, 1, 1, 1) for text in videos]
        if self.codec is None:
            return [padded(np.asarray(video), self.config.patch_size) for video in videos]
        return self.codec.encode(videos)


def pixel_grid(patch_size) -> dict:
    """As `CaptionRun.grid`, of videos read as patches of pixels: of any length, the last patches are filled up."""
    return dict(spatial_multiple=max(patch_size[1:]), temporal_stride=patch_size[0], any_length=True)


def order(config: CaptionerConfig) -> str:
    """Order of the values of a patch, see `sorax.patchify`: pixels are cut fastest so."""
    return "out" if config.reads == "pixels" else "in"


def as_inputs(tokens, dtype):
    """Patches as the network takes them: uint8 pixels in [-1, 1]; token ids as they are."""
    if tokens.dtype == jnp.uint8:
        return (tokens.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)
    return tokens if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens.astype(dtype)


def write_rows(graph, config, params, tokens, positions, segment_ids, ids, seeds, start, *, settings):
    """Token ids `[X, T]` of captions of packed rows: of segments ids `[B, S]`, X = B S of them, 0 for none.

    seeds: uint32 `[X]`. start: the token that all begin with.
    """
    model, dtype = nnx.merge(graph, params), params["head"]["kernel"].dtype
    memory = model.encode(as_inputs(tokens, dtype), positions, segment_ids)
    memories, wide = model.memories(memory), jnp.repeat(ids, settings.width, axis=1)

    def step(cache, last, position):
        return model.step(memories, segment_ids, wide, cache, last, position)

    cache, X = model.empty_cache(wide.size, settings.max_tokens, dtype), ids.size
    keys = jax.vmap(jax.random.key)(seeds)
    return decoding.write(step, cache, jnp.full(X, start, jnp.int32), ids.reshape(-1) > 0, keys, settings)


@dataclasses.dataclass(frozen=True)
class CaptionRun:
    """A trained captioner: its folder, config and step, and who writes."""

    workdir: str
    config: object
    step: int
    writer: CaptionWriter

    @property
    def grid(self) -> dict:
        """What videos must be multiples of, in the words of `open_source`."""
        patch_size, codec = self.writer.config.patch_size, self.writer.codec
        if codec is None:
            return pixel_grid(patch_size)
        vae = codec.config
        return dict(spatial_multiple=vae.spatial_stride * patch_size[1], temporal_stride=vae.temporal_stride)

    @property
    def max_tokens(self) -> int:
        """Of a caption that it writes: no longer ones were learned from."""
        return min(MAX_TOKENS, int(self.config.data.row_text))

    @property
    def identity(self) -> str:
        """What its captions depend on, in words."""
        from sorax.score_report import params_hash

        name, weights = os.path.basename(os.path.abspath(self.workdir)), params_hash(self.writer.params)
        return f"captioner {name} at step {self.step}, weights {weights[:8]}"


def load_captioner(workdir: str, weights: str = "ema", reads: str = "") -> CaptionRun:
    """The latest checkpoint of a captioner's run.

    reads: "video" or "text", what it has to read; "" for either.

    Raises:
        UserError: no run there, of something else, without a checkpoint, or without its tokenizer.
    """
    config = config_lib.read_config(workdir)
    model = config_lib.build(CaptionerConfig, config.model, "model") if config.get("kind") == "captioner" else None
    if model is None or (reads and (model.reads == "text") != (reads == "text")):
        found = f"a captioner that reads {model.reads}" if model else f"a {config.get('kind')}"
        wanted = dict(video="a captioner of videos, such as experiments/captioner_world.py",
                      text="one that rewrites captions, such as experiments/expander_world.py")  # fmt: skip
        raise UserError(f"{workdir!r} is the run of {found}: name that of {wanted.get(reads, 'a captioner')}")
    tokenizer = Tokenizer.load(workdir, model.vocab_size)
    shapes = dict(captioner=functional.abstract(Captioner, model)[1])
    params, step = load_params(workdir, shapes, weights)
    codec = Codec(*open_vae(vae_folder(config, workdir))[:2]) if model.reads == "latents" else None
    return CaptionRun(workdir, config, step, CaptionWriter(model, params["captioner"], tokenizer, codec))
