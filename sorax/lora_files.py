"""LoRA files: safetensors of diffusers and PEFT, and under Wan's own names as ComfyUI and its trainers write them.

A file has two tensors a layer, lora_A [r, n] and lora_B [m, r] (also called lora_down and lora_up); alpha is in the
file's metadata or the folder's adapter_config.json, or a tensor beside each pair, or, being nowhere, equal to r.
"""

import collections
import dataclasses
import json
import pathlib

import jax
import numpy as np

from sorax import convert, original_names, read_weights
from sorax import lora as lora_lib
from sorax.dit import DiTConfig
from sorax.errors import UserError
from sorax.lora import LoRAConfig

FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
METADATA = "lora_adapter_metadata"  # of a safetensors file of diffusers: JSON of transformer.r, transformer.lora_alpha
PREFIX = "transformer."  # of diffusers' names
ORIGINAL_PREFIX = "diffusion_model."  # of Wan's own
_PREFIXES = (PREFIX, ORIGINAL_PREFIX, "base_model.model.", "")
_UNDERSCORED = "lora_unet_"  # of Wan's own names with underscores for dots
_PARTS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".lora_down.weight": "lora_a",
          ".lora_up.weight": "lora_b", ".alpha": "alpha"}  # fmt: skip
# What PEFT can do to adapters that makes them other functions than ours; off where it is absent, false or empty.
_UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save", "alpha_pattern",
                "layers_to_transform")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of a block that a file may have adapters of: its name in diffusers, our path, and which block."""

    name: str
    ours: str
    block: int


def original_layer_names(config: DiTConfig) -> dict[str, str]:
    """Name in diffusers -> name in Wan's own checkpoints, of the layers of `lora.linear_layers`."""
    names = zip(convert.dit_names(config), original_names.dit_names(config))
    both = {a.theirs.removesuffix(".weight"): b.theirs.removesuffix(".weight") for a, b in names}
    return {name: both[name] for name in lora_lib.linear_layers(config)}


def start_of(lora: LoRAConfig, path, config: DiTConfig):
    """The adapters that a run with this `lora` section starts from, as `open_lora` opens them.

    Raises:
        UserError: as `open_lora`, or they are not what the section describes: what differs is named.
    """
    there, params = open_lora(path, config)
    facts = [("rank", there.rank, lora.rank), ("alpha", there.alpha, lora.scale * lora.rank)]
    differ = [f"{name}: {a:g} there, {b:g} here" for name, a, b in facts if a != b]
    if lora_lib.adapted_layers(config, there.targets) != lora_lib.adapted_layers(config, lora.targets):
        differ.append(f"targets: {', '.join(there.targets)} there, {', '.join(lora.targets)} here")
    if differ:
        raise UserError(f"config.lora.init {path!r} is another LoRA than config.lora says ({'; '.join(differ)}): make "
                        "the config the same, or start from none")  # fmt: skip
    return params


def open_lora(path, config: DiTConfig):
    """(its `LoRAConfig` without init, adapters as `read_weights.StoredParam`, not read yet) of a file for a DiT.

    Args:
        path: a safetensors file, or a folder with one.

    Raises:
        UserError: no such file, a pickle, or a damaged one; tensors that belong to no layer of the DiT's blocks, pairs
            that are not whole, layers adapted in some blocks only, other ranks, alphas or shapes, or variants of LoRA
            that sorax does not have. All that is wrong is said at once.
    """
    file = find_file(path)
    tensors, known = read_weights.tensor_shapes(file), _known_names(config)
    parts, strange, twice = collections.defaultdict(dict), [], []  # parts: layer -> part -> key
    for key in tensors:
        name, ending = next(((key.removesuffix(e), e) for e in _PARTS if key.endswith(e)), ("", ""))
        if name not in known:
            strange.append(key)
        elif _PARTS[ending] in parts[known[name]]:
            twice.append(key)
        else:
            parts[known[name]][_PARTS[ending]] = key
    if not parts:
        raise UserError(f"{file} has no adapter of any layer of this transformer, so it would change nothing: it has "
                        f"{len(tensors)} tensor(s), such as {', '.join(sorted(tensors)[:2]) or 'none'}, where "
                        f"{PREFIX}{next(iter(known.values())).name}.lora_A.weight is wanted")  # fmt: skip
    blocks = collections.defaultdict(set)
    for layer in parts:
        blocks[layer.ours].add(layer.block)
    lacking = [f"{lora_lib.kind(layer.name)} of block {i}" for layer in {x.ours: x for x in parts}.values()
               for i in range(config.num_layers) if i not in blocks[layer.ours]]  # fmt: skip
    halves = [f"{layer.name} ({' and '.join(sorted(found))})" for layer, found in parts.items()
              if not {"lora_a", "lora_b"} <= found.keys()]  # fmt: skip
    ranks = {layer.name: (*tensors[found["lora_a"]], 0)[0] for layer, found in parts.items() if "lora_a" in found}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    settings, alphas = _settings(file), _alphas(file, parts)
    read_weights.refuse(file, {
        "has {} tensor(s) that are no adapter of a layer of this transformer's blocks": strange,
        "has {} tensor(s) twice": twice,
        "adapts some blocks only, and lacks {} adapter(s)": lacking,
        "has {} adapter(s) with only one of lora_A and lora_B": halves,
        "has {} adapter(s) of another rank than " + str(rank): [f"{n}: {r}" for n, r in ranks.items() if r != rank],
        "has {} alpha(s), where all layers need the same one": [f"{x:g}" for x in alphas] if len(alphas) > 1 else (),
        "has settings that sorax does not support, {}": [key for key in _UNSUPPORTED if settings.get(key)],
    })  # fmt: skip
    if settings.get("r", rank) != rank:
        raise UserError(f"{file} says that its rank is {settings['r']}, but its tensors are of rank {rank}")
    alpha = next(iter(alphas), settings.get("lora_alpha", rank))
    if not (isinstance(alpha, int | float) and 0 < alpha < float("inf")):
        raise UserError(f"{file} has an alpha of {alpha}, which is not a positive number")

    names = [convert.Name(found[part], f"{layer.ours}/{part}", convert.MATRIX, layer.block)
             for layer, found in parts.items() for part in lora_lib.LEAVES]  # fmt: skip
    layers = lora_lib.linear_layers(config).items()
    targets = tuple(dict.fromkeys(lora_lib.kind(name) for name, (ours, _) in layers if ours in blocks))
    lora = LoRAConfig(rank=rank, alpha=float(alpha), targets=targets)
    files = {name.theirs: file for name in names}
    return lora, read_weights.open_params(file, files, names, lora_lib.adapted_dit(config, lora)[1])


def find_file(path) -> pathlib.Path:
    """The LoRA file that a path is, or a folder has."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a LoRA's safetensors file, or a folder with one")
    if path.is_file():
        if path.suffix != ".safetensors":
            read_weights.refuse_pickle(path)
        return path
    for name in (FILE, PEFT_FILES[0]):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("loras/*.safetensors"))  # as exported for ComfyUI
    if len(found) == 1:
        return found[0]
    read_weights.refuse_pickle(path)
    raise UserError(f"{path} has {len(found)} safetensors files and no {FILE}: name the file of the LoRA")


def copy_files(path, folder) -> None:
    """Copies a LoRA's file, and what is said of it beside it, into a new folder."""
    file, folder = find_file(path), pathlib.Path(folder)
    folder.mkdir(parents=True)
    for source in (file, file.with_name(PEFT_FILES[1])):
        if source.is_file():
            (folder / source.name).write_bytes(source.read_bytes())


def check_values(params):
    """Reads every adapter once. Raises UserError where one is not finite."""
    for leaf in jax.tree.leaves(params):
        np.asarray(leaf)


def _known_names(config):
    """Every name that a file may give a layer -> the layer."""
    originals, known = original_layer_names(config), {}
    for name, (ours, block) in lora_lib.linear_layers(config).items():
        original, layer = originals[name], _Layer(name, ours, block)
        known |= {prefix + spelled: layer for prefix in _PREFIXES for spelled in (name, original)}
        known[_UNDERSCORED + original.replace(".", "_")] = layer
    return known


def _settings(file) -> dict:
    """What PEFT's configuration of a file says, by its keys; empty where there is none."""
    beside = file.with_name(PEFT_FILES[1])
    if beside.is_file():
        return read_weights.read_json(beside)
    with read_weights.open_safetensors(file) as opened:
        text = (opened.metadata() or {}).get(METADATA)
    try:
        found = json.loads(text) if text else {}
        return {key.removeprefix(PREFIX): value for key, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} has {METADATA} that cannot be read ({error}): the file is damaged") from error


def _alphas(file, parts) -> set[float]:
    """The different alphas that are tensors of a file; some layers may have none."""
    keys = [found["alpha"] for found in parts.values() if "alpha" in found]
    with read_weights.open_safetensors(file) as opened:
        values = [np.asarray(opened.get_tensor(key), np.float32).ravel() for key in keys]
    wrong = [key for key, value in zip(keys, values) if value.size != 1]
    if wrong or 0 < len(keys) < len(parts):
        raise UserError(f"{file}: alpha is not one number for each adapter: {', '.join(wrong[:3]) or len(keys)} of "
                        f"{len(parts)}")  # fmt: skip
    return {float(value[0]) for value in values}
