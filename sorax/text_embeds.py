"""Captions embedded once, by a text encoder that is not trained: kept beside the latents, so that a DiT trains without
the encoder in memory."""

import functools
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.latent_records import EMPTY_CAPTION
from sorax import config as config_lib
from sorax import functional, read_weights, sharding
from sorax.runs import start_params
from sorax.text import EOS_ID, MAX_SLOTS, TextConfig, TextEncoder

LENGTH_STEP = 64  # captions are padded to a multiple of it: few shapes are compiled


class FrozenText:
    """The text encoder that `config.init` of a DiT experiment names; its weights stay on the disk.

    Attributes:
        config: `TextConfig`. identity: hash of config and weights, whichever their form and dtype on the disk.

    Raises:
        UserError: there is no such encoder, or it is another than config.text says.
    """

    def __init__(self, config, workdir: str):
        self.config = config_lib.build(TextConfig, config.text, "text")
        self._params = start_params(config, workdir, ["text"], stored=True)["text"]
        self._dtype = config.train.get("dtype", "auto")

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256(repr(self.config).encode())
        for leaf in jax.tree.leaves(self._params):
            for block in read_weights.blocks(leaf):
                digest.update(np.ascontiguousarray(block, np.float32).data)
        return digest.hexdigest()[:16]

    @property
    def metadata(self) -> dict:
        """What a data set of latents keeps of it."""
        return dict(identity=self.identity, width=self.config.width)

    def embedder(self) -> "Embedder":
        """The encoder on all devices of this process, its parameters split over them."""
        from sorax.train import compute_dtype

        mesh = sharding.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
        dtype = compute_dtype(self._dtype, mesh.devices.flat[0].platform)
        places = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), self._params,
                              sharding.shardings_for(self._params, mesh))  # fmt: skip
        return Embedder(self.config, read_weights.place(self._params, places), mesh)


class Embedder:
    """Function from captions (token ids int [L] each) to their embeddings: bfloat16 bits, uint16 [L, D] each."""

    def __init__(self, config: TextConfig, params, mesh):
        graph = functional.abstract(TextEncoder, config)[0]
        self._params, self._place, self._parts = params, sharding.batch_sharding(mesh), sharding.batch_parts(mesh)
        self._run = jax.jit(
            lambda params, tokens: nnx.merge(graph, params)(tokens, jnp.ones_like(tokens)).astype(jnp.bfloat16)
        )

    def __call__(self, captions):
        longest = max(map(len, captions))
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max(MAX_SLOTS, longest))
        rows = self._parts << (-(-len(captions) // self._parts) - 1).bit_length()  # few numbers of rows, too
        tokens = np.zeros((rows, length), np.int32)
        for row, caption in zip(tokens, captions):
            row[: len(caption)] = caption
        embeds = np.asarray(self._run(self._params, jax.device_put(tokens, self._place))).view(np.uint16)
        return [row[: len(caption)].copy() for row, caption in zip(embeds, captions)]

    def save_empty(self, folder):
        """Writes the embedding of the empty caption, which dropped captions become, into a folder of latents."""
        path = os.path.join(folder, EMPTY_CAPTION)
        with open(path + ".partial", "wb") as file:
            np.save(file, self([np.array([EOS_ID])])[0][0])
        os.replace(path + ".partial", path)
