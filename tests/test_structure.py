"""The shape of the project: what may import what, which files are small enough to read, which experiments build."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from data_pipelines.phyworld import PhyWorldConfig
from data_pipelines.text_tokens import BPE, MIN_VOCAB, Tokenizer
from sorax import config as config_lib
from sorax import objectives
from sorax.captioner import Captioner, CaptionerConfig
from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError
from sorax.functional import abstract
from sorax.optim import OptimConfig, make_tx
from sorax.patchify import num_tokens
from sorax.text import TextConfig, TextEncoder
from sorax.train import CheckpointConfig, TrainConfig
from sorax.vae import VAE, VAEConfig

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("sorax", "data_pipelines", "experiments")
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").glob("*.py") if "def get_config" in path.read_text())
MAX_LINES = 450

MODELS = ("vae", "dit", "text", "captioner", "attention")
KERNELS = ("attention_cpu", "attention_cudnn", "attention_gpu", "attention_tpu")  # imported where they are called
# Of sorax, what each of the lower modules may import; whatever is not named here stands above all of them.
LOWER = {
    "errors": (),
    "backend": ("errors",),
    "patchify": (),
    **dict.fromkeys(MODELS, ("patchify", "attention", "linear", "conv", "routing", "functional")),
    "captioner": ("attention", "dit", "text", "functional"),  # the blocks are made of the DiT's parts
    "decoding": (),
    "attention_blocks": (),
    **dict.fromkeys(KERNELS, ("attention_blocks",)),
    "conv": (),
    "linear": (),
    "routing": (),
    "mup": ("dit", "sharding"),
    "flow": (),
    "sampler": ("flow",),
    "functional": (),
    "flops": (*MODELS, "patchify", "functional"),
    "devices": (),
    "hlo": (),
    "roofline": ("devices", "hlo"),
    "topology": ("devices", "errors"),
    "sharding": ("errors",),
    "processes": ("errors",),
    "optim": ("errors", "sharding"),
    "checkpoint": ("errors", "sharding"),
    "config": ("errors",),
    "media": ("errors",),
    "runlog": ("errors", "media"),
    "metrics": ("errors",),
    "significance": ("metrics",),
    "statistics": ("metrics",),
    "curves": (),
    "parser": ("errors", "shape_match", "background", "tracks"),
    "tracks": ("errors", "shape_match"),
    "background": (),
    "shape_match": ("errors",),
    "motion_kinds": (),
    "judging": ("errors", "parser", "motion_kinds"),
    "abnormal": ("errors", "parser", "background", "tracks", "motion_kinds"),
    "read_weights": ("errors", "sharding"),
}
# Libraries that they may import besides the standard one; a module that is not named may import any.
LIBRARIES = {
    "patchify": {"numpy", "einops"},
    **{name: {"jax", "flax", "numpy", "einops"} for name in (*MODELS, *KERNELS, "attention_blocks")},
    "flow": {"jax", "numpy"},
    "routing": {"jax"},
    "decoding": {"jax"},
    "mup": {"jax"},
    "sampler": {"jax", "numpy"},
    "functional": {"jax", "flax"},
    "devices": set(),
    "hlo": {"numpy"},
    "roofline": {"numpy"},
    "topology": set(),
    "sharding": {"jax", "numpy"},
    "processes": {"jax", "numpy"},
    "optim": {"jax", "optax"},
    "checkpoint": {"jax", "orbax", "numpy", "tensorstore"},
    "errors": set(),
}


def imports(path):
    """Names of the modules that a file imports when it is itself imported; not what its functions import."""
    names, stack = set(), [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = (ROOT / node.module.replace(".", "/")).is_dir()  # `from package import module`
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += ast.iter_child_nodes(node)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def ours(path, package):
    """Modules of a package of ours that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.split(".")[0] == package}


def modules(package):
    return sorted(path for path in (ROOT / package).glob("*.py") if path.stem != "__init__")


def test_the_reader_of_imports_sees_them(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import os, jax.numpy as jnp\nfrom sorax import flow, errors\nfrom sorax.dit import DiT\n"
                    "if True:\n    import av\nclass A:\n    import grain\ndef f():\n    import torch\n")  # fmt: skip
    assert imports(path) == {"jax.numpy", "sorax.flow", "sorax.errors", "sorax.dit", "av", "grain"}


@pytest.mark.parametrize("path", modules("sorax"), ids=lambda path: path.stem)
def test_imports_of_sorax_go_one_way(path):
    found, name = ours(path, "sorax"), path.stem
    if name in LOWER:
        assert found <= set(LOWER[name]), f"{name} may not import {found - set(LOWER[name])}"
        assert not ours(path, "data_pipelines")
    libraries = {n.split(".")[0] for n in imports(path)} - set(PACKAGES)
    if name in LIBRARIES:
        assert libraries <= LIBRARIES[name], f"{name} may not import {libraries - LIBRARIES[name]}"
    assert not libraries & {"torch", "tensorflow", "diffusers", "transformers"}
    assert not ours(path, "experiments")
    if name != "cli":
        assert not found & {"train", "cli"}, "only the command line imports the training loop"


@pytest.mark.parametrize("path", modules("data_pipelines"), ids=lambda path: path.stem)
def test_data_pipelines_know_no_model(path):
    assert ours(path, "sorax") <= {"patchify", "errors"}
    assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax", "orbax", "experiments"}


def test_the_world_and_patches_need_no_jax():
    code = "import data_pipelines.world, data_pipelines.packing, sorax.patchify, sys; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


def test_nothing_imports_in_a_circle():
    graph = {f"{p}.{path.stem}": imports(path) for p in ("sorax", "data_pipelines") for path in modules(p)}
    done = set()

    def visit(name, above):
        assert name not in above, f"a circle of imports: {' -> '.join([*above, name])}"
        if name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", modules("experiments"), ids=lambda path: path.stem)
def test_an_experiment_imports_ml_collections_alone(path):
    everything = {name for node in ast.walk(ast.parse(path.read_text())) for name in imported_by(node)}
    assert everything <= {"ml_collections"} | sys.stdlib_module_names


def imported_by(node):
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def test_no_file_is_too_long_to_read():
    files = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lines) > 30
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


# --- Every experiment builds, at no memory


def world_shapes(config):
    """(frames, height, width) of what is drawn; nothing for a folder, whose videos nobody knows yet."""
    if "phyworld" in config.data:
        return PhyWorldConfig(**config.data.phyworld).shapes
    return config.data.world.shapes if "world" in config.data else ()


def check_sections(config):
    """The sections that every experiment has; unknown keys are errors."""
    for section, cls in dict(data=objectives.DataConfig, train=TrainConfig, checkpoint=CheckpointConfig,
                             eval=objectives.EvalConfig).items():  # fmt: skip
        config_lib.build(cls, config[section], section)
    assert set(config.mesh) == {"data", "fsdp", "context", "tensor"}
    return make_tx({"": config_lib.build(OptimConfig, config.optim, "optim")}, config.train.steps)


def check_vae(config):
    """Builds, and reconstructs a video of each of its shapes; returns its config."""
    tx = check_sections(config)
    config_lib.build(objectives.VAELossConfig, config.loss, "loss")
    vae_config = config_lib.build(VAEConfig, config.model, "model")
    graphdef, params = abstract(VAE, vae_config)
    jax.eval_shape(tx.init, params)
    for shape in {tuple(config.data.get("crop") or (5, 32, 32)), *world_shapes(config)}:
        video = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
        copy = jax.eval_shape(lambda p, v: (vae := nnx.merge(graphdef, p)).decode(vae.encode(v)[0]), params, video)
        assert copy.shape == video.shape
    return vae_config


def check_dit(config):
    """Builds, takes a step's batch of rows, and every shape of its world fits in a row."""
    tx = check_sections(config)
    config_lib.build(objectives.FlowConfig, config.flow, "flow")
    model = config_lib.build(DiTConfig, config.model, "model")
    text_model = config_lib.build(TextConfig, config.text, "text")
    data = config_lib.build(objectives.DataConfig, config.data, "data")
    (dit_graph, dit), (text_graph, text) = abstract(DiT, model), abstract(TextEncoder, text_model)
    jax.eval_shape(tx.init, dict(dit=dit, text=text))
    B, N, M, S = data.batch, data.row_tokens, data.row_text, data.max_segments
    ids, text_ids = (jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (N, M))
    levels, bias = (jax.ShapeDtypeStruct((B, n), jnp.float32) for n in (S + 1, M))
    tokens, where = (jax.ShapeDtypeStruct((B, N, n), t) for n, t in ((model.patch_dim, jnp.float32), (3, jnp.int32)))

    def velocity(dit, text, tokens, where, ids, levels, text_ids, bias):
        embeds = nnx.merge(text_graph, text)(text_ids, text_ids)
        network = nnx.merge(dit_graph, dit)
        return network(tokens, where, ids, levels, ids, embeds, text_ids, bias, remat=config.train.get("remat", "none"))

    assert jax.eval_shape(velocity, dit, text, tokens, where, ids, levels, text_ids, bias).shape == tokens.shape
    assert text_model.vocab_size >= (MIN_VOCAB if data.tokenizer == BPE else Tokenizer.of_bytes().vocab_size)
    if not config.vae.get("path"):
        vae_config = check_vae(config.vae)
        assert vae_config.latent_channels == model.in_channels == model.out_channels
        for shape in world_shapes(config):
            assert num_tokens(vae_config.latent_shape(*shape), model.patch_size) <= N


def check_captioner(config):
    """Builds, takes a step's batch of rows, and every shape of its world fits in a row."""
    tx = check_sections(config)
    model = config_lib.build(CaptionerConfig, config.model, "model")
    data = config_lib.build(objectives.DataConfig, config.data, "data")
    graph, params = abstract(Captioner, model)
    jax.eval_shape(tx.init, dict(captioner=params))
    B, N, M, P = data.batch, data.row_tokens, data.row_text, 1 if model.reads == "text" else model.patch_dim
    ids, text_ids = (jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (N, M))
    tokens, where = (jax.ShapeDtypeStruct((B, N, n), t) for n, t in ((P, jnp.float32), (3, jnp.int32)))
    logits = jax.eval_shape(lambda p, *x: nnx.merge(graph, p)(*x), params, tokens, where, ids, *[text_ids] * 3)
    assert logits.shape == (B, M, model.vocab_size) and model.vocab_size >= MIN_VOCAB
    for shape in world_shapes(config) if model.reads == "pixels" else ():
        assert num_tokens([-(-n // p) * p for n, p in zip(shape, model.patch_size)], model.patch_size) <= N


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_builds(path):
    config = config_lib.load_config(str(path))
    dict(vae=check_vae, dit=check_dit, captioner=check_captioner)[config.kind](config)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_what_an_experiment_leaves_to_its_default_can_be_overridden_and_is_written_down(path):
    overrides = ["data.oversize=trim", "optim.weight_decay=0.5", "train.remat=full"]
    config = config_lib.load_config(str(path), overrides, objectives.complete)
    assert (config.data.oversize, config.optim.weight_decay, config.train.remat) == ("trim", 0.5, "full")
    assert config.checkpoint.keep >= 1 and "oversize" in config.to_dict()["data"]
    with pytest.raises(UserError, match="did you mean"):
        config_lib.load_config(str(path), ["data.oversise=trim"], objectives.complete)


def test_there_are_experiments():
    assert ROOT / "experiments" / "quickstart.py" in EXPERIMENTS
