"""Open weights become a run whose export has the bytes they came with; what is refused leaves nothing behind."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sorax import convert, export, plan, read_weights
from sorax.cli import main
from sorax.config import load_config
from sorax.errors import UserError
from sorax.evaluate import evaluate_folder
from sorax.export_comfyui import export_comfyui
from sorax.import_wan import import_run
from sorax.objectives import complete
from sorax.runs import anchored, load_run, open_vae_config, start_tokenizer
from sorax.train import train

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
WAN, TOKENIZERS = FIXTURES / "wan", FIXTURES / "tokenizers"
FILES = {"transformer": convert.WEIGHTS, "vae": convert.WEIGHTS, "text_encoder": convert.TEXT_WEIGHTS}


@pytest.fixture
def source(tmp_path):
    """A WanPipeline folder: float16, and one tensor of float32."""
    shutil.copytree(WAN, tmp_path / "wan")
    shutil.rmtree(tmp_path / "wan" / "tokenizer")
    (tmp_path / "wan" / "tokenizer").mkdir()
    (tmp_path / "wan" / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    path = tmp_path / "wan" / "transformer" / f"{convert.WEIGHTS}.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] = tensors["proj_out.bias"].astype(np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "wan"


def tensors_of(folder):
    """Part -> name -> (dtype, bytes)."""
    found = {}
    for part, stem in FILES.items():
        files = set(read_weights.tensor_files(folder / part, stem).values())
        values = {key: value for file in files for key, value in load_file(file).items()}
        found[part] = {key: (value.dtype, value.tobytes()) for key, value in values.items()}
    return found


def test_import_then_export_gives_the_same_bytes(source, tmp_path):
    workdir, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["import", "--from", str(source), "--workdir", workdir]) == 0
    assert main(["export", "--run", workdir, "--out", str(out), "--max-shard-size", "20KB"]) == 0
    assert (out / "vae" / f"{convert.WEIGHTS}.safetensors.index.json").exists()
    assert tensors_of(out) == tensors_of(source)
    assert {dtype for dtype, _ in tensors_of(out)["transformer"].values()} == {np.dtype("float16"), np.dtype("float32")}
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler" and scheduler["shift"] == 3.0


def test_wans_own_names_give_the_same_bytes(source, tmp_path):
    """Through single files under Wan's own names, and back."""
    pipeline = convert.open_diffusers(source)
    first = import_run(source, tmp_path / "first")
    run = load_run(str(first), stored=True)
    first_sampling = run.sampling()
    single = export_comfyui(run.networks, run.tokenizer, tmp_path / "single", shift=5.0, metadata={"name": "x"})
    again = import_run(single, tmp_path / "second")
    assert load_run(str(again), stored=True).sampling() == first_sampling | dict(shift=5.0)
    assert tensors_of(again / "imported") == tensors_of(source)
    assert load_run(str(again)).networks.dit_config == pipeline.dit_config
    third = import_run(
        single / "diffusion_models" / "x.safetensors", tmp_path / "third", vae=str(source / "vae"),
        text=str(source / "text_encoder"), tokenizer=str(TOKENIZERS / "t5"),
    )  # fmt: skip
    assert tensors_of(third / "imported") == tensors_of(source)


def test_an_imported_run_has_the_networks_and_keeps_how_they_sample(source, tmp_path):
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(export.scheduler_json("unipc", 5.0)))
    run = load_run(str(import_run(source, tmp_path / "run")))
    there = convert.read_diffusers(source)
    assert run.sampling() == dict(num_steps=50, solver="unipc", guidance_scale=5.0, shift=5.0) and run.step == 0
    for part in ("vae", "dit", "text"):
        assert getattr(run.networks, f"{part}_config") == getattr(there, f"{part}_config")
        ours = read_weights.load(getattr(run.networks, part))
        for a, b in zip(*(sorted(leaves(tree)) for tree in (ours, getattr(there, part))), strict=True):
            assert a == b


def test_an_imported_run_trains_and_exports_the_rest_untouched(source, tmp_path):
    """Two steps of the transformer alone: its tensors change, those of VAE and text encoder keep their bytes."""
    workdir, out = str(import_run(source, tmp_path / "run")), tmp_path / "out"
    overrides = ["data.path=world", "data.batch=8", "data.row_tokens=64", "data.row_text=128", "data.val_samples=4"]
    overrides += ["train.steps=2", "train.remat=none", "optim.lr=1e-2", "optim.warmup_steps=0", "eval.num_steps=2"]
    overrides += ["mesh.data=-1", "mesh.fsdp=2"]
    config = load_config(f"{workdir}/config.json", overrides, complete)
    with config.unlocked():
        config.data.world = dict(num_samples=8, shapes=((5, 32, 32),), fps=8.0)
    train(config, workdir)
    run = load_run(workdir)
    assert run.step == 2 and run.config.train.freeze == ["text"]
    assert main(["export", "--run", workdir, "--out", str(out)]) == 0
    before, after = tensors_of(source), tensors_of(out)
    assert after["vae"] == before["vae"] and after["text_encoder"] == before["text_encoder"]
    assert after["transformer"].keys() == before["transformer"].keys()
    name = "blocks.0.attn1.to_q.weight"
    assert after["transformer"][name] != before["transformer"][name]
    there = convert.read_diffusers(source).dit["blocks"]["self_attention"]["q"]["kernel"]
    moved = np.abs(np.asarray(run.networks.dit["blocks"]["self_attention"]["q"]["kernel"]) - there)
    assert 0 < moved.max() < 0.1  # it began where the weights were


def test_the_config_of_an_imported_run_is_used_elsewhere_too(source, tmp_path, monkeypatch):
    """Its networks are found from any folder, by `plan`, `encode`, and `train` in another run."""
    workdir = import_run(source, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    config = anchored(load_config("run/config.json", (), complete), "run/config.json")
    assert config.init == config.vae.path == str(workdir / "imported")
    assert plan.read(config).vae == open_vae_config("run") == convert.open_vae(source / "vae")[0]
    assert start_tokenizer(config, "elsewhere") == str(workdir / "imported" / "tokenizer")
    assert list(config.flow.given) == [1.0, 0.0, 0.0, 0.0, 0.0]  # text to video alone, as it came
    with pytest.raises(UserError, match=r"imported weights and no data to score them on: add --data"):
        evaluate_folder("run", "report")
    assert load_run("run").usual_shape() == (81, 480, 832, 16.0)


def test_weights_of_another_architecture_are_no_start(source, tmp_path):
    workdir = str(import_run(source, tmp_path / "run"))
    config = load_config(f"{workdir}/config.json", ["model.num_layers=5"], complete)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match=r"another architecture \(model\.num_layers: 2 there, 5 here\)"):
        load_run(workdir)


def leaves(tree, path=""):
    for key, value in tree.items() if hasattr(tree, "items") else enumerate(tree):
        if hasattr(value, "items") or isinstance(value, list):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", np.asarray(value).tobytes()


def poison(folder):
    path = folder / "transformer" / f"{convert.WEIGHTS}.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][0] = np.nan
    save_file(tensors, path)


def other_scheduler(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index(folder, value):
    path = folder / "transformer" / f"{convert.WEIGHTS}.safetensors"
    weight_map = dict.fromkeys(load_file(path), value)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(dict(weight_map=weight_map)))


def change(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILT = {
    "an index of lists": (lambda f: index(f, ["a"]), r"names \['a'\], which is not a plain"),
    "an index of elsewhere": (lambda f: index(f, "../x.safetensors"), r"names '\.\./x\.safetensors', which"),
    "no number": (lambda f: change(f, "transformer", num_layers="two"), r"num_layers is 'two': it takes 1"),
    "below one": (lambda f: change(f, "text_encoder", d_model=-1), r"d_model is -1: it takes 1 whole"),
    "a flat patch": (lambda f: change(f, "transformer", patch_size=[2, 2]), r"patch_size is \[2, 2\]: it takes 3"),
    "10^9 blocks": (lambda f: change(f, "transformer", num_layers=10**9), "asks for 1000000000 blocks, and the files"),
    "10^9 layers": (lambda f: change(f, "text_encoder", num_layers=10**9), "asks for 1000000000 blocks, and the files"),
    "10^9 residual blocks": (lambda f: change(f, "vae", num_res_blocks=10**9), "asks for 4000000000 blocks, and the"),
    "not finite": (poison, r"proj_out\.bias holds NaN"),
    "another scheduler": (lambda f: other_scheduler(f, _class_name="DDIMScheduler"), "a DDIMScheduler is not"),
    "another spacing": (lambda f: other_scheduler(f, use_karras_sigmas=True), "use_karras_sigmas = True is not"),
    "no flow": (lambda f: other_scheduler(f, _class_name="UniPCMultistepScheduler"), "prediction_type = None is"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer\.json cannot be read"),
    "no pipeline": (lambda f: (f / "model_index.json").unlink(), "neither a WanPipeline folder"),
    "a pickle": (
        lambda f: ((f / "model_index.json").unlink(), (f / "model.pth").write_bytes(b"x")), r"model\.pth is a pickle",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_imported_is_refused_and_nothing_is_left(source, tmp_path, name):
    spoil, message = SPOILT[name]
    spoil(source)
    with pytest.raises(UserError, match=message) as refused:
        import_run(source, tmp_path / "run")
    assert str(source) in str(refused.value) and "partial" not in str(refused.value)  # what is said exists
    assert not (tmp_path / "run").exists() and not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_transformers_file_needs_the_other_parts(source, tmp_path):
    file = source / "transformer" / f"{convert.WEIGHTS}.safetensors"
    with pytest.raises(UserError, match="a transformer alone: name --vae and --text too"):
        import_run(file, tmp_path / "run")
    (source / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no blocks.*: not a transformer with Wan's own names"):
        import_run(file, tmp_path / "run", vae=str(source / "vae"), text=str(source / "text_encoder"))
    with pytest.raises(UserError, match=r"exists and is not an empty folder"):
        import_run(source, source)
