"""Videos to latents and back, in batches of one shape; and a whole data set as latent shards."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines import latent_writer
from data_pipelines.latent_shards import LatentShards
from data_pipelines.read_ahead import read_ahead
from data_pipelines.text_tokens import MAX_TOKENS, Tokenizer
from sorax import functional
from sorax.errors import UserError
from sorax.runlog import Progress
from sorax.vae import VAE, VAEConfig

PIXELS_A_BATCH = 1 << 19  # bounds the memory of encoding and decoding
CLIPS_A_BATCH = 16  # of a device, when shards are written: more are no faster, and leave more of the last batch empty
READ_AHEAD_BYTES = 256 << 20  # of videos decoded before they are encoded
MAX_CAPTIONS = 100_000  # that a survey keeps, for a tokenizer to be trained on


@functools.lru_cache(maxsize=8)
def _programs(config: VAEConfig):
    """The compiled functions of a VAE of this size, shared by all that hold its parameters."""
    graphdef, _ = functional.abstract(VAE, config)

    def posterior(vae, video):
        return vae.encode(video.astype(jnp.float32) / 127.5 - 1.0)

    def encode(params, video):
        vae = nnx.merge(graphdef, params)
        return vae.normalize(posterior(vae, video)[0])

    def moments(params, video):
        mean, logvar = posterior(nnx.merge(graphdef, params), video)
        return jnp.concatenate([mean, jnp.exp(logvar)], axis=-1)

    def decode(params, latents):
        vae = nnx.merge(graphdef, params)
        video = jnp.clip(vae.decode(vae.denormalize(latents)), -1.0, 1.0)
        return jnp.round((video + 1.0) * 127.5).astype(jnp.uint8)

    return jax.jit(encode), jax.jit(moments), jax.jit(decode)


def _pixels(video):
    return video.shape[0] * video.shape[1] * video.shape[2]


class Codec:
    """A trained VAE with its parameters: uint8 videos <-> normalised latents."""

    def __init__(self, config: VAEConfig, params):
        self.config, self.params = config, params
        self._encode, self._moments, self._decode = _programs(config)

    def encode(self, videos):
        """Latents float32 `[t, h, w, C]` (posterior means, normalised) of each video uint8 `[T, H, W, 3]`."""
        return self._by_shape(self._encode, videos, _pixels)

    def posteriors(self, videos):
        """Mean and variance float32 `[t, h, w, 2C]`, not normalised, of the posterior of each video."""
        return self._by_shape(self._moments, videos, _pixels)

    def statistics(self, videos):
        """Mean and standard deviation float32 `[C]` of each channel of latents drawn from the posteriors of videos.

        Of draws, not of posterior means: a channel that the VAE does not use has means near 0 and draws of variance 1,
        and to scale its means up to 1 would make the DiT learn noise.
        """
        moments = self.posteriors(videos)
        flat = np.concatenate([m.reshape(-1, m.shape[-1]) for m in moments]).astype(np.float64)
        means, variances = np.split(flat, 2, axis=1)
        deviation = np.sqrt(means.var(0) + variances.mean(0))
        return means.mean(0).astype(np.float32), deviation.astype(np.float32)

    def decode(self, latents):
        """Videos uint8 `[T, H, W, 3]` of each latents `[t, h, w, C]`."""
        grow = self.config.temporal_stride * self.config.spatial_stride**2
        return self._by_shape(self._decode, latents, lambda z: _pixels(z) * grow)

    def _by_shape(self, function, items, pixels):
        results, groups = [None] * len(items), {}
        for i, item in enumerate(items):
            groups.setdefault(item.shape, []).append(i)
        for members in groups.values():
            size = max(1, min(64, PIXELS_A_BATCH // pixels(items[members[0]]), len(members)))
            for start in range(0, len(members), size):
                some = members[start : start + size]
                # The last batch repeats its last item, so that a shape compiles once.
                batch = np.stack([items[i] for i in some + [some[-1]] * (size - len(some))])
                for i, result in zip(some, np.asarray(function(self.params, batch))):
                    results[i] = result
        return results


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a source holds, from one look at the specs of all its samples.

    identity: hash of all specs and weights, hence of all that can be known without decoding.
    shapes: int32 [n, 3], (T, H, W). caption_bytes: int32 [n].
    captions: at most MAX_CAPTIONS of them, evenly spread.
    """

    identity: str
    shapes: np.ndarray
    caption_bytes: np.ndarray
    captions: tuple[str, ...]


def survey(source) -> Survey:
    """Looks at the spec of every sample of a source. Raises UserError where there is none."""
    count, digest = len(source), hashlib.sha256()
    if not count:
        raise UserError("there is no video to encode: the data set is empty")
    shapes, caption_bytes, captions = np.empty((count, 3), np.int32), np.empty(count, np.int32), []
    kept = set(np.linspace(0, count - 1, min(MAX_CAPTIONS, count)).astype(int).tolist())
    for i in range(count):
        spec = source.spec(i)
        digest.update(repr(spec).encode())
        shapes[i] = spec.num_frames, spec.height, spec.width
        caption_bytes[i] = len(spec.caption.encode())
        if i in kept:
            captions.append(spec.caption)
    if (weights := getattr(source, "weights", None)) is not None:
        digest.update(np.asarray(weights, np.float64).tobytes())
    return Survey(digest.hexdigest()[:16], shapes, caption_bytes, tuple(captions))


def source_identity(source, extra: str = "") -> str:
    """Hash of what a source holds, as far as can be known without decoding, and of `extra`."""
    return hashlib.sha256((survey(source).identity + extra).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _posterior_program(config: VAEConfig, mesh: Mesh):
    """Compiled (params, video uint8 [B, T, H, W, 3]) -> bits of bfloat16 [2, B, t, h, w, C]: mean and log-variance."""
    graphdef, _ = functional.abstract(VAE, config)

    def posterior(params, video):
        mean, logvar = nnx.merge(graphdef, params).encode(video.astype(jnp.float32) / 127.5 - 1.0)
        return jax.lax.bitcast_convert_type(jnp.stack([mean, logvar]).astype(jnp.bfloat16), jnp.uint16)

    split = NamedSharding(mesh, PartitionSpec("data"))
    out = NamedSharding(mesh, PartitionSpec(None, "data"))
    return jax.jit(posterior, in_shardings=(NamedSharding(mesh, PartitionSpec()), split), out_shardings=out)


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
) -> LatentShards:
    """The samples of a source as latent shards, a split of the data set in `folder`; written if they are not there.

    With several JAX processes each writes its own shards, on its own devices; all of them return when all is written.
    The shards do not depend on their number. What was stopped goes on with the first shard that is not finished.

    Args:
        vae_identity: of the codec's VAE.
        found: `survey(source)`, if there is one already.
        num_shards: 0 for as many as keep each within `latent_writer.SHARD_BYTES`.
        replace: delete what the folder holds of other data or of another VAE, in place of an error.
        origin: JSON value kept with the split: the `data` section that the source was opened from.
        workers: processes that read the source; 0 for threads.

    Raises:
        UserError: a sample cannot be read, its caption is too long, the folder holds another data set, or it cannot be
            written.
    """
    found = found or survey(source)
    _check_captions(source, found, tokenizer)
    config, count = codec.config, len(source)
    shapes = _latent_shapes(config, source, found.shapes)
    num_shards = num_shards or latent_writer.choose_shards(
        latent_writer.sample_bytes(shapes, config.latent_channels, 2 * found.caption_bytes)
    )
    parts = found.identity, vae_identity, tokenizer.identity
    vae = dict(identity=vae_identity, config=dataclasses.asdict(config)) | {
        name: np.asarray(codec.params[name], np.float64).tolist() for name in ("latents_mean", "latents_std")
    }
    origin = dict(data=origin, identity=found.identity, sorax=importlib.metadata.version("sorax"))
    writer = latent_writer.LatentWriter(
        folder, split, identity=hashlib.sha256(repr(parts).encode()).hexdigest()[:16], count=count,
        num_shards=min(num_shards, count), channels=config.latent_channels, source=origin,
        metadata=dict(vae=vae, tokenizer=tokenizer.identity),
    )  # fmt: skip
    if not writer.is_finished():
        first = jax.process_index() == 0
        if first:
            writer.prepare(replace=replace)
            tokenizer.save(folder)
        _wait_for_all(f"{title}: prepared")
        _write_shards(codec, source, tokenizer, writer, found.shapes, workers, title)
        _wait_for_all(f"{title}: written")
        if first:
            writer.finish()
        _wait_for_all(f"{title}: finished")
    return LatentShards(folder, split)


def _write_shards(codec, source, tokenizer, writer, shapes, workers, title):
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
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    params = jax.device_put(codec.params, NamedSharding(mesh, PartitionSpec()))
    split, compiled = NamedSharding(mesh, PartitionSpec("data")), _posterior_program(codec.config, mesh)

    def program(videos):
        return compiled(params, jax.device_put(videos, split))

    with contextlib.closing(reader) as samples, Progress(title, total, unit="samples") as progress:
        done = 0
        for shard, order in zip(shards, orders):
            records = {}
            for batch in _posteriors(program, mesh.size, zip(order.tolist(), samples)):
                for i, sample, (mean, logvar) in batch:
                    key, caption = sample["key"], sample["caption"]
                    T, H, W, _ = sample["video_shape"]
                    records[i] = dict(
                        key=key, caption=caption, text_tokens=tokenizer.encode(caption, key), mean=mean, logvar=logvar,
                        num_frames=T, height=H, width=W, fps=sample["fps"],
                        weight=1.0 if weights is None else float(weights[i]),
                    )  # fmt: skip
                done += len(batch)
                progress.advance(done)
            writer.write(shard, (records.pop(i) for i in sorted(records)))


def _posteriors(program, devices, samples):
    """Lists of (index, sample without its video, bits uint16 [2, t, h, w, C]), a batch each, of (index, sample)s.

    The next batch is read while the devices are busy with one.
    """
    waiting = collections.deque()
    for _, run in itertools.groupby(samples, key=lambda item: item[1]["video"].shape):
        run = iter(run)
        while some := list(itertools.islice(run, 1)):
            shape = some[0][1]["video"].shape
            size = devices * max(1, min(CLIPS_A_BATCH, PIXELS_A_BATCH // int(np.prod(shape[:3]))))
            some += itertools.islice(run, size - 1)
            videos = [sample.pop("video") for _, sample in some]
            # The last batch repeats its last clip: a shape has one size of batch, and so one program.
            waiting.append((some, program(np.stack(videos + videos[-1:] * (size - len(videos))))))
            for _, sample in some:
                sample["video_shape"] = shape
            if len(waiting) > 1:
                yield _fetch(*waiting.popleft())
    while waiting:
        yield _fetch(*waiting.popleft())


def _fetch(some, bits):
    bits = np.asarray(bits)  # [2, B, t, h, w, C]
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
        tokenizer.encode(spec.caption, spec.key)


def _wait_for_all(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
