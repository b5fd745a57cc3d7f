"""Videos to latents and back, in batches of one shape; and a whole data set as latent shards."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from data_pipelines import latent_writer
from data_pipelines.latent_shards import LatentShards
from data_pipelines.read_ahead import read_ahead
from data_pipelines.survey import Survey, survey
from data_pipelines.text_tokens import MAX_TOKENS, Tokenizer
from sorax import functional, processes, sharding, stream
from sorax.errors import UserError
from sorax.runlog import Progress
from sorax.vae import VAE, VAEConfig

ENCODE, DECODE = 0, 1  # which of `stream.programs`
PIXELS_A_BATCH = 1 << 19  # of a device: bounds the memory of encoding and decoding
ITEMS_A_DEVICE = 8  # at most: more of them gain nothing
CLIPS_A_BATCH = 16  # of a device, when shards are written: more are no faster, and leave more of the last batch empty
READ_AHEAD_BYTES = 256 << 20  # of videos decoded before they are encoded


def chunk_frames(config: VAEConfig, shape, together: int = 1) -> int:
    """Frames of a chunk behind the first one, of videos `[T, H, W]` that so many devices share."""
    T, H, W = shape
    stride, fit = config.temporal_stride, PIXELS_A_BATCH * together // (H * W)
    return T - 1 if fit >= T else max(stride, fit // stride * stride)


class Codec:
    """A trained VAE with its parameters: videos <-> normalised latents, of any length and number, in bounded memory.

    Videos of one shape go through together. A video of more than PIXELS_A_BATCH pixels goes in chunks of as many frames
    as make that number (at least one latent frame), each with what the chunk before left. That gives the same numbers:
    <= 1e-5 of the largest latent; pixels, which are rounded to bytes, may differ by one level.

    Args:
        mesh: of this process's devices (`sorax.sharding`): `data` and `fsdp` split a batch of videos, `context` the
            height of each, or its width where the height's latent rows do not divide. As exact as one device.
        tile: frames larger than tile x tile pixels go through in tiles, blended where they overlap: an approximation,
            for frames that no device holds. 0: never.
        overlap: of tiles, in pixels; None for a quarter of a tile.

    Raises:
        UserError: tile or overlap is no multiple of the VAE's spatial stride; the mesh has another process's devices.
    """

    def __init__(
        self, config: VAEConfig, params, mesh: Mesh | None = None, *, tile: int = 0, overlap: int | None = None
    ):
        stride = config.spatial_stride
        overlap = tile // 4 // stride * stride if overlap is None else overlap
        if overlap and not tile:
            raise UserError(f"an overlap of {overlap} pixels without tiles: set tile to their side too")
        if tile < 0 or tile % stride or overlap % stride or not 0 <= overlap < max(tile, 1):
            raise UserError(f"tiles of {tile} pixels with an overlap of {overlap}: use multiples of {stride}, the "
                            "overlap smaller than the tile")  # fmt: skip
        if mesh is not None and any(device.process_index != jax.process_index() for device in mesh.devices.flat):
            raise UserError("a codec's mesh has devices of other processes: make one of jax.local_devices()")
        wanted = jax.tree.map(lambda x: x.shape, functional.abstract(VAE, config)[1])
        if jax.tree.map(np.shape, params) != wanted:
            raise UserError("the parameters are not those of a VAE of this config: take both from one place, such as "
                            "sorax.runs.open_vae(folder)")  # fmt: skip
        self.config, self.mesh = config, mesh
        self.params = jax.device_put(params, None if mesh is None else sharding.replicated(mesh))
        self._tile, self._overlap = tile // stride, overlap // stride
        # Devices that share a video; parts that a batch is split into.
        self._together, self._parts = (1, 1) if mesh is None else (mesh.shape["context"], sharding.batch_parts(mesh))

    def encode(self, videos):
        """Latents float32 `[t, h, w, C]` (posterior means, normalised) of each video.

        Args:
            videos: `[T, H, W, 3]` each, uint8 or float in [-1, 1], T = 4n + 1.

        Raises:
            UserError: a video that is not like that, says how; or one that the mesh cannot split.
        """
        return [stream.normalize(self.config, self.params, m) for m in self._moments(videos)]

    def posteriors(self, videos):
        """Mean and variance float32 `[t, h, w, 2C]`, not normalised, of the posterior of each video; as `encode`."""
        split = (np.split(moments, 2, axis=-1) for moments in self._moments(videos))
        return [np.concatenate([mean, np.exp(logvar)], axis=-1) for mean, logvar in split]

    def statistics(self, videos):
        """Mean and standard deviation float32 `[C]` of each channel of latents drawn from the posteriors of videos.

        Of draws, not of posterior means: a channel that the VAE does not use has means near 0 and draws of variance 1,
        and to scale its means up to 1 would make the DiT learn noise.
        """
        flat = np.concatenate([m.reshape(-1, m.shape[-1]) for m in self.posteriors(videos)]).astype(np.float64)
        means, variances = np.split(flat, 2, axis=1)
        deviation = np.sqrt(means.var(0) + variances.mean(0))
        return means.mean(0).astype(np.float32), deviation.astype(np.float32)

    def decode(self, latents):
        """Videos uint8 `[T, H, W, 3]` of each latents `[t, h, w, C]`.

        Raises:
            UserError: latents that are not of this VAE's shape or not finite, or that the mesh cannot split.
        """
        latents = [np.asarray(z) for z in latents]
        for i, z in enumerate(latents):
            with _naming("latents", i, len(latents)):
                stream.check_latents(self.config, z)
                if not len(z):
                    raise UserError("latents without a frame: there is nothing to decode")
        return self._all(DECODE, latents)

    def _moments(self, videos):
        videos = [np.asarray(video) for video in videos]
        for i, video in enumerate(videos):
            with _naming("video", i, len(videos)):
                stream.check_video(self.config, video)
        return self._all(ENCODE, videos)

    def batch_size(self, shape, most: int) -> int:
        """How many videos `[T, H, W]` go through at a time, on all devices; on one at most `most`."""
        return self._parts * max(1, min(most, PIXELS_A_BATCH * self._together // int(np.prod(shape))))

    def start(self, way: int, batch):
        """Starts a batch of `batch_size`: not checked, not tiled, not waited for.

        Args:
            way: ENCODE for videos `[B, T, H, W, 3]`, DECODE for normalised latents `[B, t, h, w, C]`.

        Returns:
            function without arguments that waits for the result: posteriors `[B, t, h, w, 2 C]` (means and
            log-variances, not normalised), or videos uint8 `[B, T, H, W, 3]`.
        """
        T, H, W = self._video_shape(way, batch.shape[1:4])
        t, h, w = self.config.latent_shape(T, H, W)
        later = chunk_frames(self.config, (T, H, W), self._together)
        later = later if way == ENCODE else later // self.config.temporal_stride
        place = None if self.mesh is None else sharding.video_sharding(self.mesh, h, w)
        put = np.asarray if place is None else functools.partial(jax.device_put, device=place)
        program = stream.programs(self.config, place)[way]
        results = stream.in_chunks(program, self.params, batch, later + 1, later, put)
        return lambda: np.concatenate([np.asarray(x) for x in results], axis=1)[:, : t if way == ENCODE else T]

    def _video_shape(self, way, shape):
        if way == ENCODE:
            return shape
        ts, ss = self.config.temporal_stride, self.config.spatial_stride
        return (shape[0] - 1) * ts + 1, shape[1] * ss, shape[2] * ss

    def _all(self, way, items):
        units = (self.config.spatial_stride, 1)[:: 1 if way == ENCODE else -1]
        large = {i for i, x in enumerate(items) if self._tile and max(x.shape[1:3]) > self._tile * units[0]}
        rest = iter(self._by_shape(way, [x for i, x in enumerate(items) if i not in large]))

        def in_tiles(x):
            settings = dict(tile=self._tile, overlap=self._overlap, unit_in=units[0], unit_out=units[1])
            return stream.tiled(functools.partial(self._by_shape, way), x, **settings)

        return [in_tiles(x) if i in large else next(rest) for i, x in enumerate(items)]

    def _by_shape(self, way, items):
        results, groups = [None] * len(items), {}
        for i, item in enumerate(items):
            groups.setdefault((item.shape, item.dtype), []).append(i)
        for members in groups.values():
            shape = self._video_shape(way, items[members[0]].shape[:3])
            # As many a device however many there are: the same program, and so the same numbers to the bit.
            size = self.batch_size(shape, min(ITEMS_A_DEVICE, len(members)))
            for start in range(0, len(members), size):
                some = members[start : start + size]
                # The last batch repeats its last item, so that a shape compiles once.
                batch = np.stack([items[i] for i in some + [some[-1]] * (size - len(some))])
                for i, result in zip(some, self.start(way, batch)()):
                    results[i] = result
        return results


@contextlib.contextmanager
def _naming(kind, number, count):
    """An error says which one of several it is about."""
    try:
        yield
    except UserError as error:
        if count == 1:
            raise
        raise UserError(f"{kind}[{number}] of {count}: {error}") from error


def encode_source(
    codec: Codec,
    source,
    tokenizer: Tokenizer,
    folder: str,
    split: str,
    vae_identity: str,
    *,
    found: Survey | None = None,
    num_shards: int = 0,
    replace: bool = False,
    origin=None,
    workers: int = 0,
    title: str = "encode",
    text=None,
    kinds=None,
) -> LatentShards:
    """The samples of a source as latent shards, a split of the data set in `folder`; written if they are not there.

    With several JAX processes each writes its own shards, on its own devices; all of them return when all is written.
    The shards do not depend on their number. What was stopped goes on with the first shard that is not finished.

    Args:
        codec: without a mesh it uses all devices of this process; its tiles are not used.
        vae_identity: of the codec's VAE.
        found: `survey(source)`, if there is one already.
        num_shards: 0 for as many as keep each within `latent_writer.SHARD_BYTES`.
        replace: delete what the folder holds of other data or of another VAE, in place of an error.
        origin: JSON value kept with the split: the `data` section that the source was opened from.
        workers: processes that read the source; 0 for threads.
        text: `text_embeds.FrozenText` that embeds the captions, to be kept too; None to keep their tokens alone.
        kinds: of captions to be kept beside each sample's own, which stands for one that it lacks; None: those that the
            source has.

    Raises:
        UserError: a sample cannot be read, its caption is too long, the folder holds another data set, or it cannot be
            written.
    """
    found = found or survey(source)
    kinds = tuple(getattr(source, "caption_kinds", ()) if kinds is None else kinds)
    _check_captions(source, found, tokenizer)
    config, count = codec.config, len(source)
    shapes = _latent_shapes(config, source, found.shapes)
    size = tokenizer.bytes_a_token  # a token takes 4 bytes itself
    texts = (1 + 4 // size) * found.caption_bytes
    texts += 2 * text.config.width * (found.caption_bytes // size + 1) if text else 0
    num_shards = num_shards or latent_writer.choose_shards(
        latent_writer.sample_bytes(shapes, config.latent_channels, texts)
    )
    texts = texts * (1 + len(kinds))
    parts = found.identity, vae_identity, tokenizer.identity, *([text.identity] if text else [])
    parts += (kinds,) if kinds else ()
    vae = dict(identity=vae_identity, config=dataclasses.asdict(config)) | {
        name: np.asarray(codec.params[name], np.float64).tolist() for name in ("latents_mean", "latents_std")
    }
    origin = dict(data=origin, identity=found.identity, sorax=importlib.metadata.version("sorax"))
    writer = latent_writer.LatentWriter(
        folder, split, identity=hashlib.sha256(repr(parts).encode()).hexdigest()[:16], count=count,
        num_shards=min(num_shards, count), channels=config.latent_channels, source=origin,
        metadata=dict(vae=vae, tokenizer=tokenizer.identity) | (dict(text=text.metadata) if text else {})
        | (dict(caption_kinds=kinds) if kinds else {}),
    )  # fmt: skip
    if not writer.is_finished():
        first, embed = jax.process_index() == 0, text.embedder() if text else None
        if first:
            writer.prepare(replace=replace)
            tokenizer.save(folder)
            if embed:
                embed.save_empty(folder)
        processes.wait(f"{title}: prepared")
        _write_shards(codec, source, tokenizer, embed, kinds, writer, found.shapes, workers, title)
        processes.wait(f"{title}: written")
        if first:
            writer.finish()
        processes.wait(f"{title}: finished")
    return LatentShards(folder, split, text_embeds=text is not None)


def _write_shards(codec, source, tokenizer, embed, kinds, writer, shapes, workers, title):
    """Writes this process's shards, one after the other; holds the latents of one at a time."""
    shards = writer.pending(jax.process_index(), jax.process_count())
    weights = getattr(source, "weights", None)
    # Of a shard, samples of one shape after the other: a batch has one shape, and every shape is compiled once.
    orders = [np.arange(writer.bounds[k], writer.bounds[k + 1]) for k in shards]
    orders = [order[np.lexsort(shapes[order].T)] for order in orders]
    total = sum(map(len, orders))
    if not total:
        return
    ahead = max(1, min(64, READ_AHEAD_BYTES // (3 * int(shapes.astype(np.int64).prod(1).max()))))
    reader = read_ahead(source, np.concatenate(orders), ahead=ahead, num_workers=workers)
    if codec.mesh is None:
        codec = Codec(codec.config, codec.params, sharding.local_mesh())
    with contextlib.closing(reader) as samples, Progress(title, total, unit="samples") as progress:
        done = 0
        for shard, order in zip(shards, orders):
            records = {}
            for batch in _posteriors(codec, zip(order.tolist(), samples)):
                texts = _texts(source, [(i, sample) for i, sample, _ in batch], tokenizer, embed, kinds)
                for (i, sample, (mean, logvar)), text in zip(batch, texts):
                    T, H, W, _ = sample["video_shape"]
                    records[i] = dict(
                        key=sample["key"], mean=mean, logvar=logvar, num_frames=T, height=H, width=W, fps=sample["fps"],
                        weight=1.0 if weights is None else float(weights[i]), **text,
                    )  # fmt: skip
                done += len(batch)
                progress.advance(done)
            writer.write(shard, (records.pop(i) for i in sorted(records)))


def _texts(source, samples, tokenizer, embed, kinds):
    """What a record has of the captions of some (index, sample)s: caption, tokens and embeddings of each kind."""
    found, texts = getattr(source, "caption_kinds", ()), [{} for _ in samples]
    others = [source.captions(i) if found and kinds else {} for i, _ in samples]
    for kind in ("", *kinds):
        end = f"_{kind}" if kind else ""
        captions = [other.get(kind) or sample["caption"] for (_, sample), other in zip(samples, others)]
        tokens = [tokenizer.encode(text, sample["key"]) for text, (_, sample) in zip(captions, samples)]
        embeds = embed(tokens) if embed else [None] * len(tokens)
        for text, caption, ids, vectors in zip(texts, captions, tokens, embeds):
            text |= {"caption" + end: caption, "text_tokens" + end: ids}
            text |= {"text_embeds" + end: vectors} if embed else {}
    return texts


def _posteriors(codec, samples):
    """Lists of (index, sample without its video, bits uint16 [2, t, h, w, C]), a batch each, of (index, sample)s.

    The next batch is read while the devices are busy with one.
    """
    waiting = collections.deque()
    for _, run in itertools.groupby(samples, key=lambda item: item[1]["video"].shape):
        run = iter(run)
        while some := list(itertools.islice(run, 1)):
            shape = some[0][1]["video"].shape
            size = codec.batch_size(shape[:3], CLIPS_A_BATCH)
            some += itertools.islice(run, size - 1)
            videos = [sample.pop("video") for _, sample in some]
            # The last batch repeats its last clip: a shape has one size of batch, and so one program.
            batch = np.stack(videos + videos[-1:] * (size - len(videos)))
            waiting.append((some, codec.start(ENCODE, batch)))
            for _, sample in some:
                sample["video_shape"] = shape
            if len(waiting) > 1:
                yield _fetch(*waiting.popleft())
    while waiting:
        yield _fetch(*waiting.popleft())


def _fetch(some, result):
    bits = np.stack(np.split(result(), 2, axis=-1)).astype(ml_dtypes.bfloat16).view(np.uint16)  # [2, B, t, h, w, C]
    return [(i, sample, bits[:, b].copy()) for b, (i, sample) in enumerate(some)]  # not all B for the sake of one


def _latent_shapes(config, source, shapes):
    """(t, h, w), int64 [n, 3], of the latents of videos of shapes int32 [n, 3]."""
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    latents = []
    for kind, shape in enumerate(kinds.tolist()):
        try:
            latents.append(config.latent_shape(*shape))
        except ValueError as error:
            first = int(np.argmax(kind_of.ravel() == kind))
            raise UserError(f"{source.spec(first).key} cannot be encoded: {error}") from error
    return np.array(latents, np.int64)[kind_of.ravel()]


def _check_captions(source, found, tokenizer):
    """Finds captions that are too long before hours are spent on encoding those before them."""
    # A token is at least one byte, but cleaning may lengthen a caption: half the bytes are a safe bound.
    for i in np.flatnonzero(found.caption_bytes > MAX_TOKENS // 2).tolist():
        spec = source.spec(i)
        for text in (spec.caption, *(source.captions(i).values() if getattr(source, "caption_kinds", ()) else ())):
            try:
                tokenizer.encode(text, spec.key)
            except UserError as error:
                if tokenizer.bytes_a_token > 1:
                    raise
                raise UserError(f"{error}, or train the text encoder on tokens that are longer than a byte, with "
                                "config.data.tokenizer=bpe") from error  # fmt: skip
