"""Videos to latents and back, in batches of one shape; and a whole data set as latents kept in a run folder."""

import functools
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.text_tokens import Tokenizer
from sorax import functional
from sorax.errors import UserError
from sorax.runlog import Progress
from sorax.vae import VAE, VAEConfig

PIXELS_A_BATCH = 1 << 19  # bounds the memory of encoding and decoding


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

    def statistics(self, videos):
        """Mean and standard deviation float32 `[C]` of each channel of latents drawn from the posteriors of videos.

        Of draws, not of posterior means: a channel that the VAE does not use has means near 0 and draws of variance 1,
        and to scale its means up to 1 would make the DiT learn noise.
        """
        moments = self._by_shape(self._moments, videos, _pixels)
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


class LatentExamples:
    """Latents and caption tokens of a data set in memory: what `data_pipelines.loader.RowSource` reads."""

    def __init__(self, latents, tokens, captions, keys, shapes, fps):
        self.latents, self.tokens, self.captions, self.keys = latents, tokens, captions, keys
        self.video_shapes, self.fps = shapes, fps

    def __len__(self):
        return len(self.latents)

    def key(self, i):
        return self.keys[i]

    def shape(self, i):
        return self.latents[i].shape[:3]

    def text_length(self, i):
        return len(self.tokens[i])

    def __getitem__(self, i):
        return dict(latents=self.latents[i], text_tokens=self.tokens[i])


def source_identity(source, extra: str = "") -> str:
    """Hash of what a source holds, as far as can be known without decoding, and of `extra`."""
    digest = hashlib.sha256(extra.encode())
    for i in range(len(source)):
        digest.update(repr(source.spec(i)).encode())
    return digest.hexdigest()[:16]


def encode_source(
    codec: Codec, source, tokenizer: Tokenizer, cache: str, vae_identity: str, *, title: str = "encode"
) -> LatentExamples:
    """Latents and caption tokens of every sample of a source; latents are made once and kept in the file `cache` (npz).

    Args:
        cache: path; read if it holds the latents of this very source and VAE.
        vae_identity: what the latents depend on besides the source.

    Raises:
        UserError: a sample cannot be read, its caption is too long, or the file cannot be written.
    """
    identity = source_identity(source, vae_identity)
    specs = [source.spec(i) for i in range(len(source))]
    captions, keys = [s.caption for s in specs], [s.key for s in specs]
    tokens = [tokenizer.encode(s.caption, s.key) for s in specs]
    shapes, fps = [(s.num_frames, s.height, s.width) for s in specs], [s.fps for s in specs]
    latents = _read_cache(cache, identity, [codec.config.latent_shape(*shape) for shape in shapes])
    if latents is None:
        latents = [None] * len(specs)
        order = sorted(range(len(specs)), key=lambda i: shapes[i])  # so that a batch has one shape
        with Progress(title, len(specs), unit="samples") as progress:
            done = 0
            while done < len(order):
                pixels = int(np.prod(shapes[order[done]]))
                some = order[done : done + max(1, min(512, 8 * PIXELS_A_BATCH // pixels))]
                for i, z in zip(some, codec.encode([source[i]["video"] for i in some])):
                    latents[i] = z
                done += len(some)
                progress.advance(done)
        flat = np.concatenate([z.reshape(-1, z.shape[-1]) for z in latents])
        try:
            os.makedirs(os.path.dirname(cache), exist_ok=True)
            with open(cache + ".partial", "wb") as f:
                np.savez(f, latents=flat, identity=np.array(identity))
            os.replace(cache + ".partial", cache)
        except OSError as error:
            raise UserError(f"latents could not be written to {cache!r}: {error}") from error
    return LatentExamples(latents, tokens, captions, keys, shapes, fps)


def _read_cache(cache, identity, shapes):
    if not os.path.exists(cache):
        return None
    with np.load(cache) as stored:
        if str(stored["identity"]) != identity:
            return None
        flat = stored["latents"]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [z.reshape(*shape, -1) for z, shape in zip(np.split(flat, ends[:-1]), shapes)]
