"""Peak memory of import and export: full-size Wan 2.1 14B with UMT5-XXL, and checkpoints of two depths.

    python -m experiments.bench.weights_memory --folder /tmp/weights [--limit 8] [--layers 40] [--depths 8 24]

Made-up bfloat16 weights of the full size (28.6 GB for the transformer, 11.4 GB for the text encoder) are written with
holes: every tensor begins with random numbers, and the rest takes no room on the disk. `sorax import` and
`sorax export` run in processes whose address space is limited to `--limit` GiB, which counts all that they map; their
resident peak is printed, and every exported tensor must have the bytes it came with. Then runs that were "trained" to
checkpoints of two depths, in float32, are exported under the same limit: the peak must not grow with the depth. Where
the disk has no room for what is exported, fewer layers are, and it says so. The folder is removed.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.text_tokens import Tokenizer
from sorax import convert, export, import_wan, read_weights
from sorax.checkpoint import Checkpoints
from sorax.dit import DiT, DiTConfig
from sorax.export_weights import write_json
from sorax.functional import abstract
from sorax.sharding import path_string
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig

UMT5_XXL = TextConfig(vocab_size=256384, width=4096, num_layers=24, num_heads=64, ffn_dim=10240)
SMALL_TEXT = TextConfig(vocab_size=384, width=64, num_layers=1, num_heads=2, head_dim=32, ffn_dim=64)
FILE_BYTES, RANDOM_BYTES = 5 * 10**9, 1 << 16
STATISTICS = {"latents_mean": np.zeros(16, np.float32), "latents_std": np.ones(16, np.float32)}


def write_with_holes(folder, stem, names, shapes, config, rng):
    """A folder of bfloat16 weights, as diffusers keeps them; returns their bytes."""
    write_json(folder / "config.json", config)
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    files, filled = [{}], 0
    for name in names:
        shape = name.shape(leaves)
        size = 2 * int(np.prod(shape, dtype=np.int64))
        if files[-1] and filled + size > FILE_BYTES:
            files.append({})
            filled = 0
        files[-1][name.theirs] = dict(dtype="BF16", shape=shape, data_offsets=[filled, filled + size])
        filled += size
    weight_map = {}
    for k, header in enumerate(files, start=1):
        file = f"{stem}-{k:05d}-of-{len(files):05d}.safetensors"
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
            for entry in header.values():
                begin, end = entry["data_offsets"]
                f.seek(8 + len(text) + begin)
                # No exponent of all ones, which infinity has.
                f.write((rng.integers(0, 1 << 16, min(RANDOM_BYTES, end - begin) // 2, np.uint16) & 0xBFFF).tobytes())
        weight_map |= dict.fromkeys(header, file)
    write_json(folder / f"{stem}.safetensors.index.json", {"weight_map": weight_map})
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for header in files for entry in header.values())


def write_pipeline(folder, dit_config, text_config, vae_config):
    """A WanPipeline folder; returns the bytes of its weights."""
    rng, total = np.random.default_rng(0), 0
    for part, cls, names, config, written in (
        ("transformer", DiT, convert.dit_names, dit_config, export.dit_json(dit_config)),
        ("text_encoder", TextEncoder, convert.text_names, text_config, export.text_json(text_config)),
        ("vae", VAE, convert.vae_names, vae_config, export.vae_json(vae_config, STATISTICS)),
    ):
        stem = convert.TEXT_WEIGHTS if part == "text_encoder" else convert.WEIGHTS
        total += write_with_holes(folder / part, stem, names(config), abstract(cls, config)[1], written, rng)
    tokenizer = Tokenizer.of_bytes()
    tokenizer.save(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", export.scheduler_json("unipc", 5.0))
    write_json(folder / "model_index.json", export.index_json(text_config, tokenizer, "unipc", False))
    return total


# Runs the command line in limited memory; its last line on stderr has the peaks of its resident and its mapped memory.
RUN = """
import atexit, resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def peaks():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(*(int(status[name].split()[0]) for name in ("VmHWM", "VmPeak")), file=sys.stderr)
atexit.register(peaks)
runpy.run_module("sorax.cli", run_name="__main__")
"""


def limited(limit, *arguments):
    """Runs `sorax ...` in so many GiB of address space and prints what it took."""
    began = time.monotonic()
    environment = dict(os.environ, JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="2")  # arenas are mapped, but not used
    command = [sys.executable, "-c", RUN, str(limit << 30), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"sorax {arguments[0]} failed in {limit} GiB:\n{done.stderr}")
    resident, mapped = (int(x) / 2**20 for x in done.stderr.splitlines()[-1].split())
    print(f"sorax {arguments[0]} in {limit} GiB: peak resident {resident:.2f} GiB, mapped {mapped:.2f} GiB, "
          f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip


def check_bytes(source, out):
    """Compares every tensor of a folder with the hash that the exported one's provenance.json has of it."""
    hashes = json.loads((out / "provenance.json").read_text())["sha256"]
    for part, there in hashes.items():
        stem = convert.TEXT_WEIGHTS if part == "text_encoder" else convert.WEIGHTS
        files = read_weights.tensor_files(source / part, stem)
        assert files.keys() == there.keys(), part
        for name, file in files.items():
            with read_weights.open_safetensors(file) as opened:
                content = opened.get_tensor(name).view(np.uint8).data
            assert hashlib.sha256(content).hexdigest() == there[name], f"{part}: {name} has other bytes"
    print(f"{sum(map(len, hashes.values()))} tensors have the bytes they came with", flush=True)


def write_trained(folder, layers):
    """A run with a checkpoint in float32 of a DiT of the width of Wan's 1.3B; returns the bytes of its parameters."""
    dit_config, vae_config = DiTConfig(num_layers=layers, text_dim=SMALL_TEXT.width), VAEConfig()
    write_pipeline(folder / "vae_of", DiTConfig(num_layers=1, text_dim=64), SMALL_TEXT, vae_config)
    scheduler = export.scheduler_json("euler", 3.0)
    pipeline = convert.Pipeline(vae_config, None, dit_config, None, SMALL_TEXT, None, scheduler, False)
    config = import_wan.experiment(pipeline) | dict(init="", vae=dict(path=str(folder / "vae_of")))
    config["train"]["freeze"] = []
    write_json(folder / "run" / "config.json", config)
    Tokenizer.of_bytes().save(folder / "run")
    shapes = dict(dit=abstract(DiT, dit_config)[1], text=abstract(TextEncoder, SMALL_TEXT)[1])
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    checkpoints = Checkpoints(str(folder / "run"))
    checkpoints.save(1, {"ema_params": params}, {"data": "made up"})
    checkpoints.wait()
    checkpoints.close()
    return sum(x.size * 4 for x in jax.tree.leaves(shapes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="new one, on a disk with 45 GB of room")
    parser.add_argument("--limit", type=int, default=8, help="GiB of address space (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=40, help="of the 14B transformer, which has %(default)s")
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 24], help="layers of the trained runs")
    settings = parser.parse_args()
    root = pathlib.Path(settings.folder).resolve()
    root.mkdir(parents=True)
    try:
        source, run, out = root / "source", root / "run", root / "out"
        layers, room = settings.layers, 0.95 * shutil.disk_usage(root).free
        while True:
            config = DiTConfig(num_layers=layers, num_heads=40, ffn_dim=13824)
            total = write_pipeline(source, config, UMT5_XXL, VAEConfig())
            if total < room or layers <= 1:
                break
            shutil.rmtree(source)
            layers -= 1
        print(f"{layers} of {settings.layers} layers, {total / 1e9:.1f} GB of weights", flush=True)
        limited(settings.limit, "import", "--from", source, "--workdir", run)
        limited(settings.limit, "export", "--run", run, "--out", out)
        check_bytes(source, out)
        for path in (source, run, out):
            shutil.rmtree(path)
        for depth in settings.depths:
            size = write_trained(root / "trained", depth)
            print(f"a checkpoint of {depth} layers, {size / 1e9:.1f} GB of parameters", flush=True)
            limited(settings.limit, "export", "--run", root / "trained" / "run", "--out", out, "--dtype", "bf16")
            for path in (root / "trained", out):
                shutil.rmtree(path)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
