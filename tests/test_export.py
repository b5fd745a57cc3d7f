"""Weights in and out: the name tables, what is written, and what is refused."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from data_pipelines.text_tokens import Tokenizer
from sorax import convert, export, original_names
from sorax.checkpoint import Checkpoints
from sorax.config import published
from sorax.dit import DiT, DiTConfig
from sorax.errors import UserError
from sorax.export_comfyui import export_comfyui
from sorax.export_weights import write_safetensors
from sorax.functional import abstract, count
from sorax.import_wan import import_run
from sorax.sharding import path_string
from sorax.text import TextConfig, TextEncoder
from sorax.vae import VAE, VAEConfig

WAN = pathlib.Path(__file__).parent / "fixtures" / "wan"
TOKENIZER = Tokenizer.train(["a red circle moving right", "two blue stars, both standing still"], 300)
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def networks():
    p = convert.read_diffusers(WAN)
    return export.Networks(p.vae_config, p.vae, p.dit_config, p.dit, p.text_config, p.text)


@pytest.fixture
def folder(tmp_path):
    """A copy of the reference folder, to be spoilt."""
    shutil.copytree(WAN, tmp_path / "wan")
    return tmp_path / "wan"


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


FULL_SIZES = {  # tensors and parameters of the published models
    "T2V 1.3B": (DiT, convert.dit_names, DiTConfig(), 825, 1_418_996_800),
    "T2V 14B": (DiT, convert.dit_names, DiTConfig(num_layers=40, num_heads=40, ffn_dim=13824), 1095, 14_288_491_584),
    "TI2V 5B": (
        DiT, convert.dit_names, DiTConfig(in_channels=48, out_channels=48, num_heads=24, ffn_dim=14336), 825,
        4_999_787_712,
    ),
    "VAE": (VAE, convert.vae_names, VAEConfig(), 194, 126_892_531),
    "UMT5-XXL": (
        TextEncoder, convert.text_names,
        TextConfig(vocab_size=256384, width=4096, num_layers=24, num_heads=64, ffn_dim=10240), 242, 5_680_910_336,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_SIZES)
def test_names_cover_every_parameter_of_full_size_models_once(name):
    cls, table, config, num_tensors, num_parameters = FULL_SIZES[name]
    names, shapes = table(config), abstract(cls, config)[1]
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    ours = [(n.ours, n.layer) for n in names]
    layers = {path: leaf.shape[0] if path.startswith("blocks/") else None for path, leaf in leaves.items()}
    expected = {(path, i) for path, n in layers.items() for i in (range(n) if n else [None])}
    assert len(ours) == len(set(ours)) and len({n.theirs for n in names}) == len(names) == num_tensors
    assert set(ours) == expected - {("latents_mean", None), ("latents_std", None)}
    assert sum(int(np.prod(n.shape(leaves))) for n in names) == num_parameters
    assert count(shapes) == num_parameters + (2 * config.latent_channels if cls is VAE else 0)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_export_then_read_is_exact(networks, tmp_path, max_shard_bytes):
    out = export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0, max_shard_bytes=max_shard_bytes)
    back = convert.read_diffusers(out)
    assert (out / "vae" / "diffusion_pytorch_model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    for part in ("vae", "dit", "text"):
        assert getattr(back, f"{part}_config") == getattr(networks, f"{part}_config")
        assert_trees_equal(getattr(back, part), getattr(networks, part))
    assert back.shift == 3.0


def test_exported_tensors_are_those_the_library_itself_wrote(networks, tmp_path):
    out = export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0)
    for part, file in WEIGHTS.items():
        ours, theirs = load_file(out / part / file), load_file(WAN / part / file)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key].astype(np.float32))
        written, expected = (json.loads((f / part / "config.json").read_text()) for f in (out, WAN))
        told = {k: v for k, v in expected.items() if k in written and not k.startswith("_")}
        # Dropout is for training only, a cache for decoders, and the length of the RoPE table is no weight.
        free = {"dropout_rate", "use_cache", "rope_max_seq_len"}
        assert {k: written[k] for k in told if k not in free} == {k: v for k, v in told.items() if k not in free}


def test_bf16_export_rounds_to_nearest(networks, tmp_path):
    out = export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0, dtype="bf16")
    with safe_open(out / "transformer" / WEIGHTS["transformer"], "np") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), networks.dit)
    assert_trees_equal(convert.read_diffusers(out).dit, rounded)


def test_jax_arrays_export_as_numpy_arrays_do(networks, tmp_path):
    on_device = export.Networks(
        networks.vae_config, jax.tree.map(jax.numpy.asarray, networks.vae),
        networks.dit_config, jax.tree.map(jax.numpy.asarray, networks.dit),
        networks.text_config, jax.tree.map(jax.numpy.asarray, networks.text),
    )  # fmt: skip
    a = export.export_diffusers(networks, TOKENIZER, tmp_path / "a", shift=3.0)
    b = export.export_diffusers(on_device, TOKENIZER, tmp_path / "b", shift=3.0)
    assert (a / "provenance.json").read_bytes() == (b / "provenance.json").read_bytes()


def test_provenance_has_the_hash_of_every_tensor(networks, tmp_path):
    metadata = {"step": 7, "config": {"optim": {"lr": 1e-4}}}
    out = export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0, metadata=metadata)
    record = json.loads((out / "provenance.json").read_text())
    assert record["step"] == 7 and record["config"] == metadata["config"] and record["code_version"]
    for part, file in WEIGHTS.items():
        tensors = load_file(out / part / file)
        assert record["sha256"][part] == {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in tensors.items()}


def test_model_card_says_how_to_run_it(networks, tmp_path):
    metadata = {"step": 7, "license": "apache-2.0", "sample": {"prompt": 'a "{x}" circle', "fps": 6}}
    out = export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0, metadata=metadata)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: diffusers\n")
    assert "7 training steps, stored in f32." in card and '"a \\"{x}\\" circle"' in card and "fps=6" in card
    assert "image-to-video" not in card and "given frames" not in card
    metadata["given_frames"] = True  # in patches that diffusers gives no timesteps
    told = export.export_diffusers(networks, TOKENIZER, tmp_path / "told", shift=3.0, metadata=metadata)
    assert "It was trained with given frames too, which diffusers cannot run" in (told / "README.md").read_text()


@pytest.mark.parametrize("there, shown", [
    ("/home/x/clips", "clips"), ("../runs/vae/", "vae"), ("shards:/home/x/latents", "shards:latents"), ("", ""),
    ("/home/x/wan/imported", "wan/imported"), ("imported", "imported"), ("tfds:a/b:1.0.0", "tfds:a/b:1.0.0"),
    ("gs://bucket/x/clips", "clips"), ("world", "world"), ([dict(path="/x/clips")], [dict(path="clips")]),
])  # fmt: skip
def test_of_a_path_its_last_part_is_published(there, shown):
    assert published({"data": {"path": there}}) == {"data": {"path": shown}}


def test_own_format_keeps_names_and_values(networks, tmp_path):
    out = export.export_safetensors(networks, TOKENIZER, tmp_path / "out", shift=3.0)
    tensors = load_file(out / "dit" / "dit.safetensors")
    np.testing.assert_array_equal(tensors["blocks/mlp_in/kernel"], networks.dit["blocks"]["mlp_in"]["kernel"])
    assert json.loads((out / "dit" / "config.json").read_text())["num_heads"] == networks.dit_config.num_heads
    with pytest.raises(UserError, match=r"has sorax's own names .*: import what --format diffusers or comfyui writes"):
        import_run(out, tmp_path / "run")


@pytest.mark.parametrize("write, place", [("export_diffusers", "tokenizer"), ("export_safetensors", ".")])
def test_the_tokenizer_goes_along(networks, tmp_path, write, place):
    out = getattr(export, write)(networks, TOKENIZER, tmp_path / "out", shift=3.0)
    assert Tokenizer.load(out / place).identity == TOKENIZER.identity


def test_export_refuses_a_folder_with_something_in_it(networks, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_export_into_an_empty_folder_fills_it(networks, tmp_path):
    (tmp_path / "out").mkdir()
    export.export_diffusers(networks, TOKENIZER, tmp_path / "out", shift=3.0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("dtype, text", [("f32", "NaN"), ("f7", "dtype")])
def test_a_failed_export_leaves_nothing(networks, tmp_path, dtype, text):
    dit = jax.tree.map(np.copy, networks.dit)
    dit["proj_out"]["bias"][0] = np.nan
    bad = export.Networks(
        networks.vae_config, networks.vae, networks.dit_config, dit, networks.text_config, networks.text
    )
    with pytest.raises(UserError, match=text):
        export.export_diffusers(bad, TOKENIZER, tmp_path / "out", shift=3.0, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_export_refuses_what_diffusers_has_no_form_for(networks, tmp_path):
    config = VAEConfig(base_width=4, temporal_downsample=(True, True, True), latent_channels=4)
    other = export.Networks(
        config, networks.vae, networks.dit_config, networks.dit, networks.text_config, networks.text
    )
    with pytest.raises(UserError, match=r"temporal stride of 8.*--format safetensors"):
        export.export_diffusers(other, TOKENIZER, tmp_path / "out", shift=3.0)


def edit_tensors(folder, part, change):
    path = folder / part / WEIGHTS[part]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder, weight_map):
    """Replaces the transformer's file by one shard and an index that says `weight_map(name)` of each tensor."""
    path = folder / "transformer" / WEIGHTS["transformer"]
    names = load_file(path).keys()
    path.rename(path.with_name("a.safetensors"))
    index = {"weight_map": {name: weight_map(name) for name in names}}
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))


def point_elsewhere(folder):
    """Makes the index say that one tensor, which is in both files, is in the second."""
    path = folder / "transformer" / f"{WEIGHTS['transformer']}.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.bias"] = "b.safetensors"
    tensors = load_file(folder / "transformer" / "b.safetensors")
    save_file({"proj_out.bias": tensors["proj_out.bias"]}, folder / "transformer" / "b.safetensors")
    path.write_text(json.dumps(index))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def poison(tensors):
    tensors["proj_out.bias"][0] = np.nan


SPOILT = {
    "missing": (lambda f: edit_tensors(f, "transformer", lambda t: t.pop("proj_out.bias")), "lacks 1.*proj_out.bias"),
    "extra": (
        lambda f: edit_tensors(f, "transformer", lambda t: t.update(strange=np.ones(1, np.float32))),
        "unexpected 1.*strange",
    ),
    "misshapen": (
        lambda f: edit_tensors(f, "vae", lambda t: t.update({"quant_conv.bias": np.ones(3, np.float32)})),
        r"quant_conv.bias has shape \(3,\), the config asks for \(8,\)",
    ),
    "nan": (lambda f: edit_tensors(f, "transformer", poison), "proj_out.bias holds NaN"),
    "truncated": (lambda f: truncate(f / "vae" / WEIGHTS["vae"]), "cannot be read"),
    "pickle": (lambda f: (f / "vae" / WEIGHTS["vae"]).rename(f / "vae" / "model.bin"), "pickle.*safe_serialization"),
    "no weights": (lambda f: (f / "vae" / WEIGHTS["vae"]).unlink(), "not a complete model folder"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json cannot be read"),
    "not json": (lambda f: (f / "vae" / "config.json").write_text("{"), "is not JSON"),
    "image to video": (
        lambda f: edit_json(f / "model_index.json", _class_name="WanImageToVideoPipeline"),
        "takes the image as more latent channels.*TI2V",
    ),
    "duplicated": (
        lambda f: (shard(f, lambda name: "a.safetensors"), shutil.copy(f / "transformer" / "a.safetensors",
                   f / "transformer" / "b.safetensors"), point_elsewhere(f)), "repeats, or has beside the index, 1 ten",
    ),
    "other pipeline": (lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "two transformers": (lambda f: edit_json(f / "model_index.json", boundary_ratio=0.9), "two transformers"),
    "image model": (lambda f: edit_json(f / "transformer" / "config.json", image_dim=1280), "image_dim = 1280"),
    "other VAE": (lambda f: edit_json(f / "vae" / "config.json", is_residual=True), "belong together"),
    "other text encoder": (lambda f: edit_json(f / "text_encoder" / "config.json", model_type="bert"), "'bert'"),
    "other depth": (lambda f: edit_json(f / "transformer" / "config.json", num_layers=3), "lacks 27"),
    "no deviations": (lambda f: edit_json(f / "vae" / "config.json", latents_std=None), "latents_std must hold 4"),
    "words for deviations": (lambda f: edit_json(f / "vae" / "config.json", latents_std=["a"]), "std must hold 4"),
    "a word for a width": (lambda f: edit_json(f / "vae" / "config.json", decoder_base_dim="a"), "width is 'a'"),
    "no deviation": (
        lambda f: edit_json(f / "vae" / "config.json", latents_std=[1.0, 0.0, 1.0, 1.0]), "not positive.*copy",
    ),
    "escape": (lambda f: shard(f, lambda name: "../../elsewhere.safetensors"), "refused"),
    "shard missing": (
        lambda f: shard(f, lambda name: "b.safetensors" if name == "proj_out.bias" else "a.safetensors"),
        "b.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_refused_with_the_reason(folder, name):
    spoil, text = SPOILT[name]
    spoil(folder)
    with pytest.raises(UserError, match=text):
        convert.read_diffusers(folder)


def test_both_names_of_the_embedding_are_read(folder, networks):
    def double(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]

    edit_tensors(folder, "text_encoder", double)
    assert_trees_equal(convert.read_diffusers(folder).text, networks.text)
    edit_tensors(folder, "text_encoder", lambda tensors: tensors.pop("shared.weight"))
    assert_trees_equal(convert.read_diffusers(folder).text, networks.text)


# --- Wan's own names, and what stays on the disk


def test_own_names_of_wan_are_those_that_diffusers_reads():
    """What diffusers does to read single-file checkpoints turns them into its own names."""
    pytest.importorskip("diffusers", reason="needs the extra `parity`")
    import torch
    from diffusers.loaders import single_file_utils

    dit, vae = DiTConfig(num_layers=2), VAEConfig()
    pairs = (
        (original_names.dit_names(dit), convert.dit_names(dit), single_file_utils.convert_wan_transformer_to_diffusers),
        (original_names.vae_names(vae), convert.vae_names(vae), single_file_utils.convert_wan_vae_to_diffusers),
    )
    for own, theirs, read in pairs:
        found = read({name.theirs: torch.full((1,), i) for i, name in enumerate(own)})
        assert {key: int(value) for key, value in found.items()} == {n.theirs: i for i, n in enumerate(theirs)}


def test_own_names_of_the_second_generation_are_nested_by_stage():
    config = VAEConfig(base_width=8, latent_channels=4, shortcuts=True, pixel_patch=2)
    names = [name.theirs for name in original_names.vae_names(config)]
    assert len(set(names)) == len(names) == len(convert.vae_names(config))
    assert {
        "encoder.downsamples.0.downsamples.0.residual.0.gamma", "decoder.upsamples.3.upsamples.2.residual.6.bias",
        "encoder.downsamples.1.downsamples.2.time_conv.weight", "decoder.head.2.weight", "conv1.weight",
    } <= set(names)  # fmt: skip


def test_comfyui_export_has_the_same_tensors_in_single_files(networks, tmp_path):
    metadata = {"name": "tiny", "step": 7}
    out = export_comfyui(networks, TOKENIZER, tmp_path / "out", shift=3.0, dtype="f32", metadata=metadata)
    dit, vae = (load_file(out / file) for file in ("diffusion_models/tiny.safetensors", "vae/tiny_vae.safetensors"))
    reference = load_file(WAN / "transformer" / WEIGHTS["transformer"])
    np.testing.assert_array_equal(dit["blocks.1.self_attn.q.weight"], reference["blocks.1.attn1.to_q.weight"])
    np.testing.assert_array_equal(dit["head.modulation"], reference["scale_shift_table"])
    assert len(dit) == len(reference) and "decoder.middle.1.to_qkv.weight" in vae
    text = load_file(out / "text_encoders" / "tiny_text.safetensors")
    assert text.keys() == load_file(WAN / "text_encoder" / WEIGHTS["text_encoder"]).keys()
    assert "After 7 training steps" in (out / "README.md").read_text()


def test_a_stored_run_exports_as_a_loaded_one(networks, tmp_path):
    """Layer by layer from the checkpoint: the same bytes in every format."""
    tree = dict(dit=networks.dit, text=networks.text)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, {"params": jax.tree.map(jnp.asarray, tree)}, {})
    checkpoints.wait()
    stored, step = checkpoints.stored(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree), "params")
    checkpoints.close()
    assert step == 3
    one = stored["dit"]["blocks"]["mlp_in"]["kernel"]
    assert one.shape == networks.dit["blocks"]["mlp_in"]["kernel"].shape and one.dtype == np.float32
    assert_trees_equal(jax.tree.map(np.asarray, stored), tree)
    kept = dataclasses.replace(networks, dit=stored["dit"], text=stored["text"])
    for name, write in (("a", export.export_diffusers), ("b", export.export_safetensors), ("c", export_comfyui)):
        folders = [write(n, TOKENIZER, tmp_path / name / str(i), shift=3.0, dtype="f32", metadata={"name": "x"})
                   for i, n in enumerate((networks, kept))]  # fmt: skip
        files = [{str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()} for out in folders]
        assert files[0] == files[1]


def test_files_that_are_written_piece_by_piece_are_safetensors(tmp_path):
    values = {name: np.random.default_rng(i).standard_normal(shape).astype(np.float32)
              for i, (name, shape) in enumerate({"a": (3, 4), "b": (), "c": (0, 2), "d": (5,)}.items())}  # fmt: skip
    hashes = write_safetensors(
        tmp_path / "x.safetensors", {k: (v.shape, v.dtype, list(v) if v.ndim == 2 else [v]) for k, v in values.items()}
    )
    found = load_file(tmp_path / "x.safetensors")
    assert_trees_equal(found, values)
    assert hashes == {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in values.items()}
