"""Memory that the full-size Wan 2.1 VAE needs of each TPU chip when they share a video; compiled, without a TPU.

    pip install libtpu
    python -m experiments.bench.vae_tpu [--topology v5e:2x4] [--shape 81 720 1280] [--chunk 16] [--dtype bfloat16]

Compiles for the topology, over all its chips on the mesh axis `context`, what `Codec` and the streams run: a chunk of
so many frames behind another chunk (--chunk 0: the whole video at once), to encode and to decode. Printed: bytes of
temporaries, arguments and results of a chip, what is sent between chips, and the largest tensor that is gathered.
"""

import argparse
import collections
import os
import re
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from sorax import functional, sharding
from sorax.encode import DECODE, ENCODE
from sorax.stream import programs
from sorax.vae import VAE, VAEConfig

GB = 1e9
SENDING = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--shape", type=int, nargs=3, default=(81, 720, 1280), help="frames, height, width")
    parser.add_argument("--chunk", type=int, default=16, help="frames that go through at a time; 0 for all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ways", nargs="+", default=["encode", "decode"], choices=["encode", "decode"])
    settings = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=settings.topology).devices)
    mesh = Mesh(devices.reshape(1, 1, -1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    config, (T, H, W) = VAEConfig(), settings.shape
    t, h, w = config.latent_shape(T, H, W)
    place, whole = sharding.video_sharding(mesh, h, w, whole_batch=True), sharding.replicated(mesh)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(settings.dtype), sharding=whole),
                          functional.abstract(VAE, config)[1])  # fmt: skip
    chunk, stride = settings.chunk, config.temporal_stride
    print(f"{settings.topology}, {mesh.size} chips, {T} x {H} x {W}, "
          f"{f'chunks of {chunk} frames' if chunk else 'whole'}, {settings.dtype}, split {place.spec}")  # fmt: skip
    for name in settings.ways:
        way = ENCODE if name == "encode" else DECODE

        def struct(frames, latents, way=way):
            shape = ((1, frames, H, W, 3), (1, latents, h, w, config.latent_channels))[way]
            return jax.ShapeDtypeStruct(shape, (jnp.uint8, jnp.float32)[way], sharding=place)

        program, began, frames = programs(config, place)[way], time.time(), None
        if chunk:
            _, frames = program.eval_shape(params, struct(chunk + 1, chunk // stride + 1), None, False)
            frames = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), frames)
        x = struct(chunk, chunk // stride) if chunk else struct(T, t)
        try:
            compiled = program.lower(params, x, frames, not chunk).compile()
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            continue
        memory = compiled.memory_analysis()
        sizes = [memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes]
        print(f"{name}: temporaries {sizes[0] / GB:.2f}, arguments {sizes[1] / GB:.2f}, results {sizes[2] / GB:.2f} GB "
              f"of a chip; compiled in {time.time() - began:.0f} s", flush=True)  # fmt: skip
        sent = collections.defaultdict(list)
        for shape, operation in re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? ({SENDING})(?:-start)?\(", compiled.as_text()):
            sent[operation].append((int(np.prod([int(n) for n in shape.split(",") if n])), shape))
        for operation, shapes in sorted(sent.items()):
            print(f"    {len(shapes)} x {operation}, the largest of [{max(shapes)[1]}]", flush=True)


if __name__ == "__main__":
    main()
