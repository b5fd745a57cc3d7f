"""A LoRA: adapters alone are learned and kept; in the weights or beside them, here or in a file, it is one function."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh
from random_params import assert_close
from safetensors.numpy import load_file, save_file

from sorax import convert, lora_files, sharding
from sorax import lora as lora_lib
from sorax.checkpoint import Checkpoints
from sorax.cli import main
from sorax.config import apply_overrides, load_config, save_config
from sorax.dit import DiT
from sorax.errors import UserError
from sorax.functional import abstract
from sorax.generate import Request
from sorax.import_wan import import_run
from sorax.lora import LoRAConfig
from sorax.objectives import complete
from sorax.optim import OptimConfig, make_tx
from sorax.read_weights import load
from sorax.runs import load_run, start_tokenizer
from sorax.sharding import make_mesh
from sorax.train import train

WAN = pathlib.Path(__file__).parent / "fixtures" / "wan"
STEPS, ALPHA = 20, np.array(8, np.float32)
TRAIN = (
    "data.path=world", "data.batch=8", "data.row_tokens=64", "data.row_text=128", "data.val_samples=4",
    f"train.steps={STEPS}", "train.remat=none", "optim.lr=1e-2", "optim.warmup_steps=0", "eval.num_steps=2",
    "lora.rank=4", "lora.alpha=8", "lora.targets=to_q,to_out.0,ffn.net.2", "checkpoint.every=10",
    "optim.schedule=constant", "data.ranks=8",  # one program, whatever the number of steps; one order on any mesh
)  # fmt: skip
KINDS = "attn1.to_q, attn1.to_k, attn1.to_v, attn1.to_out.0, attn2.to_q"


def config_of(workdir, *overrides):
    """Of a training in seconds, from the config.json of an imported run."""
    config = load_config(f"{workdir}/config.json", TRAIN + overrides, complete)
    with config.unlocked():
        config.data.world = dict(num_samples=8, shapes=((5, 32, 32),), fps=8.0)
    return config


@pytest.fixture(scope="module")
def one_device():
    """Trains on the first of the devices."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda **_: mesh)
        yield


@pytest.fixture(scope="module")
def trained(one_device, tmp_path_factory):
    """An imported run after `STEPS` steps; shared, so not to be changed."""
    folder = import_run(WAN, tmp_path_factory.mktemp("lora") / "trained")
    train(config_of(folder), str(folder))
    return folder


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """What it was before, with the latents of its data; to be copied."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("lora") / "base")
    shutil.rmtree(folder / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Its raw adapters in a folder for diffusers."""
    out = tmp_path_factory.mktemp("lora") / "adapter"
    assert main(["export", "--run", str(trained), "--lora", "adapter", "--weights", "raw", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def dit_config():
    return convert.read_dit_config(WAN / "transformer" / "config.json")


def parameters(workdir, name="params"):
    """Arrays of a checkpoint's trained parameters by their paths."""
    run = load_run(str(workdir))
    shapes = lora_lib.adapted_dit(run.networks.dit_config, lora_lib.read(run.config))[1]
    checkpoints = Checkpoints(str(workdir))
    stored = checkpoints.stored(dict(lora=shapes), name)[0]
    checkpoints.close()
    return {path: np.asarray(x) for path, x in flatten_dict(stored, sep="/").items()}


# --- Training


def test_adapters_alone_are_trained_and_kept(trained):
    """Nothing of the size of a kernel is in a checkpoint, in its averages or moments."""
    found, averages = parameters(trained), parameters(trained, name="ema_params")
    layers = ("self_attention/q", "self_attention/o", "cross_attention/q", "cross_attention/o", "mlp_out")
    assert found.keys() == {f"lora/blocks/{layer}/lora_{x}" for layer in layers for x in "ab"} == averages.keys()
    assert found["lora/blocks/mlp_out/lora_a"].shape == (2, 64, 4)
    assert found["lora/blocks/mlp_out/lora_b"].shape == (2, 4, 40)
    assert all(np.abs(x).max() > 0 for path, x in found.items() if path.endswith("b"))  # they were zero
    count = sum(x.size for x in found.values())
    run = load_run(str(trained))
    assert count < sum(x.size for x in jax.tree.leaves(run.networks.dit)) / 10
    files = sum(f.stat().st_size for f in (trained / "checkpoints" / str(STEPS)).rglob("*") if f.is_file())
    assert files < 2 * 4 * 4 * count + 100_000  # parameters, averages, two moments; and what describes them


def test_the_base_is_what_it_was(trained, base):
    """Where there is no adapter, bit by bit; and where there is one, by what the adapters say."""
    run, before = load_run(str(trained)), load_run(str(base))
    ours, theirs = (flatten_dict(r.networks.dit, sep="/") for r in (run, before))
    changed = {path for path in ours if not np.array_equal(ours[path], theirs[path])}
    layers = ("self_attention/q", "self_attention/o", "cross_attention/q", "cross_attention/o", "mlp_out")
    assert changed == {f"blocks/{layer}/kernel" for layer in layers}
    a, b = (run.adapters["blocks"]["mlp_out"][f"lora_{x}"] for x in "ab")
    delta = ours["blocks/mlp_out/kernel"] - theirs["blocks/mlp_out/kernel"]
    np.testing.assert_allclose(delta, 2 * np.einsum("lnr,lrm->lnm", a, b), atol=1e-6)  # alpha / rank = 2
    for part in ("vae", "text"):
        jax.tree.map(np.testing.assert_array_equal, getattr(run.networks, part), getattr(before.networks, part))


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(base, trained, tmp_path):
    folder = shutil.copytree(base, tmp_path / "run")
    train(config_of(folder, "train.steps=10"), str(folder))
    train(config_of(folder), str(folder))
    for name in ("params", "ema_params"):
        ours, whole = parameters(folder, name), parameters(trained, name)
        assert ours.keys() == whole.keys() and all(np.array_equal(ours[path], whole[path]) for path in ours)


def test_eight_devices_learn_what_one_does(base, trained, tmp_path, monkeypatch):
    """On a mesh with fsdp and tensor, over which the adapters are split."""
    folder, mesh = shutil.copytree(base, tmp_path / "run"), make_mesh(data=1, fsdp=4, tensor=2)
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
    train(config_of(folder), str(folder))
    assert_close(parameters(folder), parameters(trained), 1e-2)  # Adam, of gradients that are summed in another order


def test_adapters_are_split_as_the_kernels_beside_them(dit_config):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shapes = lora_lib.adapted_dit(dit_config, LoRAConfig(rank=2))[1]
    specs = {path: tuple(s.spec) for path, s in flatten_dict(sharding.shardings_for(shapes, mesh), sep="/").items()}
    assert len(specs) == 20 and specs["blocks/mlp_in/lora_a"] == (None, "fsdp", None)
    assert specs["blocks/mlp_in/lora_b"] == (None, None, "tensor")
    assert specs["blocks/mlp_out/lora_a"] == (None, "tensor", None)
    assert specs["blocks/cross_attention/o/lora_b"] == (None, None, "fsdp")


def test_muon_learns_adapters_as_matrices(dit_config):
    """Its update of B, from zero, is orthogonal in every layer; Adam's is not."""
    params = dict(lora=lora_lib.init(lora_lib.adapted_dit(dit_config, LoRAConfig(rank=4))[1], jax.random.key(0)))
    tx = make_tx({"": OptimConfig(optimizer="muon", lr=1.0, warmup_steps=0, schedule="constant", clip_norm=0.0)}, 10)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
    updates = tx.update(gradients, tx.init(params), params)[0]
    values = np.linalg.svd(updates["lora"]["blocks"]["mlp_out"]["lora_b"], compute_uv=False)
    assert values.shape == (2, 4) and values.min() > 0.5 * values.max()


def test_a_run_with_a_lora_is_the_base_of_another(trained, base, tmp_path):
    """What it has learned is in the weights that config.init names; its tokenizer goes with them."""
    overrides = [f"init={trained}", f"vae.path={base}", "lora.targets=attn1.to_v"]
    config, folder = config_of(base, *overrides), tmp_path / "next"
    save_config(config, str(folder), complete)
    assert start_tokenizer(config, str(folder)) == str(trained)
    shutil.copy(trained / "tokenizer_config.json", folder)
    jax.tree.map(np.testing.assert_array_equal, load_run(str(folder)).networks.dit, load_run(str(trained)).networks.dit)


# --- One function, in the weights or beside them


def test_merged_equals_beside(trained, base, dit_config):
    run, before = load_run(str(trained)), load_run(str(base))
    lora = lora_lib.read(run.config)
    graph, shapes = lora_lib.adapted_dit(dit_config, lora)
    assert jax.tree.map(np.shape, run.adapters) == jax.tree.map(lambda x: x.shape, shapes)
    rng = np.random.default_rng(0)
    row = (
        jnp.asarray(rng.standard_normal((1, 12, dit_config.patch_dim)), jnp.float32),
        jnp.asarray(np.indices((3, 2, 2)).reshape(3, -1).T)[None], jnp.ones((1, 12), jnp.int32),
        jnp.float32([[0.0, 0.5]]), jnp.ones((1, 12), jnp.int32),
        jnp.asarray(rng.standard_normal((1, 4, dit_config.text_dim)), jnp.float32), jnp.ones((1, 4), jnp.int32),
        jnp.zeros((1, 4)),
    )  # fmt: skip
    beside = nnx.merge(graph, lora_lib.join(before.networks.dit, run.adapters))(*row)
    merged = nnx.merge(abstract(DiT, dit_config)[0], run.networks.dit)(*row)
    without = nnx.merge(abstract(DiT, dit_config)[0], before.networks.dit)(*row)
    assert_close(beside, merged, 1e-5)  # sums in another order
    assert np.abs(merged - without).max() > 1e-2 * np.abs(without).max()


def test_a_fresh_lora_changes_nothing(dit_config):
    """B is zero, A is not."""
    shapes = lora_lib.adapted_dit(dit_config, LoRAConfig(rank=4, alpha=32))[1]
    made = flatten_dict(lora_lib.init(shapes, jax.random.key(0)), sep="/")
    assert all((np.abs(x).max() > 0) == path.endswith("a") for path, x in made.items())
    assert np.abs(made["blocks/mlp_out/lora_a"]).max() <= 64**-0.5


@pytest.mark.parametrize("targets, count", [
    (("to_q",), 2), (("attn1.to_q",), 1), ((r"attn1\..*",), 4), ((r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",), 2),
    (("to_v", "ffn.net.2"), 3), ((".*",), 10), (LoRAConfig().targets, 10),
])  # fmt: skip
def test_targets_are_names_of_peft_or_expressions(dit_config, targets, count):
    assert len(lora_lib.adapted_layers(dit_config, targets)) == count


@pytest.mark.parametrize("targets, message", [
    (("query",), rf"'query' matches no layer, and would train nothing: the layers of a block are {KINDS}"),
    (("to_q", "o"), "'o' matches no layer"),
    (("q",), "'q' matches no layer"),
    ((r"blocks\.0\..*",), r"matches blocks\.0\.attn1\.to_q in some blocks only"),
    (("(",), r"is no regular expression"),
    ((), "targets is empty"),
])  # fmt: skip
def test_targets_that_touch_nothing_are_refused(dit_config, targets, message):
    with pytest.raises(UserError, match=message):
        lora_lib.adapted_layers(dit_config, targets)


@pytest.mark.parametrize("overrides, message", [
    (["lora.rank=-1"], "section 'lora': rank is -1"),
    (["lora.rank=0", "lora.init=x"], "rank is 0"),
    (["lora.targets=query"], "'query' matches no layer"),
    (["init="], "config.lora.rank keeps the weights of dit and text, but config.init names none"),
    (["vae.path="], "config.vae.path is empty, but the DiT is kept"),
])  # fmt: skip
def test_a_lora_that_cannot_be_trained_is_refused(base, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(config_of(base, *overrides), str(tmp_path / "run"))


def test_a_rank_of_zero_is_off(base):
    config = config_of(base, "lora.rank=0")
    assert lora_lib.frozen_networks(config) == ("text",)


def test_names_may_be_written_with_commas(base):
    config = load_config(f"{base}/config.json", complete=complete)
    for text, names in (("to_q, ffn.net.2", ["to_q", "ffn.net.2"]), ("to_k", ["to_k"]), ("['to_v']", ["to_v"])):
        assert list(apply_overrides(config, [f"lora.targets={text}"]).lora.targets) == names


def test_the_adapters_are_the_same_function_in_diffusers(trained, exported):
    """WanPipeline with `load_lora_weights`, from one noise: latents within 1e-3 of their largest value, what is set for
    float32 networks whose sums run in another order."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("peft", reason="diffusers loads a LoRA with peft")
    pipe = diffusers.WanPipeline.from_pretrained(WAN, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    run = load_run(str(trained), "raw")
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    request = Request("a red circle moving right", 5, 32, 32, noise=noise)
    ours = run.generator().latents([request], num_steps=4, guidance_scale=3.0, shift=pipe.scheduler.config.shift)[0]

    def theirs():
        start = torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy())
        made = pipe(request.prompt, negative_prompt="", height=32, width=32, num_frames=5, num_inference_steps=4,
                    guidance_scale=3.0, latents=start, output_type="latent").frames.numpy()[0]  # fmt: skip
        return np.moveaxis(made, 0, -1)

    without = theirs()
    pipe.load_lora_weights(str(exported))
    found = theirs()
    assert np.abs(ours - found).max() <= 1e-3 * np.abs(found).max()
    assert np.abs(without - found).max() > 0.01 * np.abs(found).max()  # or there was nothing to compare


# --- Files


def test_export_then_import_gives_the_same_adapters(trained, exported, tmp_path):
    """And the run that imported them exports them again, byte by byte, and samples what the first does."""
    assert {path.name for path in exported.iterdir()} == {lora_files.FILE, "README.md", "provenance.json"}
    tensors = load_file(exported / lora_files.FILE)
    assert len(tensors) == 2 * 2 * 5 and tensors["transformer.blocks.1.ffn.net.2.lora_A.weight"].shape == (4, 64)
    workdir, again = tmp_path / "run", tmp_path / "again"
    assert main(["import", "--from", str(WAN), "--lora", str(exported), "--workdir", str(workdir)]) == 0
    first, run = load_run(str(trained), "raw"), load_run(str(workdir))
    assert (run.config.lora.rank, run.config.lora.alpha) == (4, 8.0) and run.step == 0
    jax.tree.map(np.testing.assert_array_equal, run.adapters, first.adapters)
    jax.tree.map(np.testing.assert_array_equal, run.networks.dit, first.networks.dit)
    assert main(["export", "--run", str(workdir), "--lora", "adapter", "--out", str(again)]) == 0
    assert (again / lora_files.FILE).read_bytes() == (exported / lora_files.FILE).read_bytes()


def test_training_goes_on_with_an_imported_lora(exported, base, tmp_path):
    workdir = import_run(WAN, tmp_path / "run", lora=str(exported))
    shutil.copytree(base / "latents", workdir / "latents")
    start = load_run(str(workdir)).adapters
    own = [f"{key}={value}" for key, value in json.loads((workdir / "config.json").read_text())["lora"].items()]
    train(config_of(workdir, *(f"lora.{text}" for text in own), "train.steps=1"), str(workdir))
    run = load_run(str(workdir), "raw")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run.adapters, start)
    assert run.step == 1 and 0 < max(jax.tree.leaves(moved)) < 0.02  # one step with a learning rate of 0.01


def test_a_merged_export_has_the_lora_in_its_weights(trained, tmp_path):
    """Layer by layer from the disk, the rest with the bytes it came with."""
    assert main(["export", "--run", str(trained), "--out", str(tmp_path / "out")]) == 0
    run, back = load_run(str(trained)), convert.read_diffusers(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back.dit, run.networks.dit)
    file = f"transformer/{convert.WEIGHTS}.safetensors"
    before, after = load_file(WAN / file), load_file(tmp_path / "out" / file)
    changed = {name for name in after if after[name].tobytes() != before[name].tobytes()}
    assert len(changed) == 10 and {after[name].dtype.name for name in changed} == {"float32"}


def test_what_is_exported_names_no_folder_of_somebodys_disk(trained, tmp_path, capsys):
    """And a folder that is taken is refused before any weights are read."""
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"], config["init"], config["lora"]["init"] = "/home/x/clips", f"{run}/imported", "/home/x/lora"
    (run / "config.json").write_text(json.dumps(config))
    for kind in ("merged", "adapter"):
        assert main(["export", "--run", str(run), "--lora", kind, "--out", str(tmp_path / kind)]) == 0
        texts = [(tmp_path / kind / name).read_text() for name in ("README.md", "provenance.json")]
        assert "`clips`" in texts[0] and not any(place in text for text in texts for place in ("/home", str(tmp_path)))
    assert "`run/imported`" in texts[0]
    shutil.rmtree(run / "imported")
    for kind in ("merged", "adapter"):
        assert main(["export", "--run", str(run), "--lora", kind, "--out", str(tmp_path / kind)]) == 2
        assert "exists and is not an empty folder" in capsys.readouterr().err


def test_wans_own_names_are_read_and_written(trained, tmp_path):
    out, workdir = tmp_path / "out", tmp_path / "run"
    arguments = ["--lora", "adapter", "--format", "comfyui", "--weights", "raw", "--out", str(out)]
    assert main(["export", "--run", str(trained), *arguments]) == 0
    file = out / "loras" / "trained.safetensors"
    tensors = load_file(file)
    assert tensors["diffusion_model.blocks.0.self_attn.o.alpha"] == 8.0 and len(tensors) == 30
    assert lora_files.find_file(file) == file
    run = load_run(str(import_run(WAN, workdir, lora=str(out))))  # the folder as it was exported
    jax.tree.map(np.testing.assert_array_equal, run.adapters, load_run(str(trained), "raw").adapters)


def renamed(tensors, style):
    """A file's tensors as others write them."""
    if style == "kohya":
        tensors = {k.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up."): v for k, v in tensors.items()}
        spelled = (("transformer.", "lora_unet_"), (".attn1.to_out.0", "_self_attn_o"), (".attn1.to_q", "_self_attn_q"),
                   (".attn2.to_out.0", "_cross_attn_o"), (".attn2.to_q", "_cross_attn_q"), (".ffn.net.2", "_ffn_2"),
                   ("_blocks.", "_blocks_"))  # fmt: skip
        for old, new in spelled:
            tensors = {k.replace(old, new): v for k, v in tensors.items()}
        return tensors | {k.replace(".lora_down.weight", ".alpha"): ALPHA for k in tensors if "down" in k}
    return {k.replace("transformer.", "base_model.model."): v for k, v in tensors.items()}


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_files_of_other_trainers_are_read(exported, dit_config, tmp_path, style):
    tensors = load_file(exported / lora_files.FILE)
    save_file(renamed(tensors, style), tmp_path / "adapter_model.safetensors")
    if style == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps(dict(r=4, lora_alpha=8, rank_pattern={})))
    lora, params = lora_files.open_lora(tmp_path, dit_config)
    expected, wanted = lora_files.open_lora(exported, dit_config)
    assert lora == expected and (lora.rank, lora.alpha) == (4, 8.0)
    jax.tree.map(np.testing.assert_array_equal, load(params), load(wanted))


def drop(tensors, *parts):
    for key in [key for key in tensors if all(part in key for part in parts)]:
        del tensors[key]


def change(tensors, part, function):
    key = next(key for key in sorted(tensors) if part in key)
    tensors[key] = function(tensors[key])


SPOILT = {
    "nothing matches": (
        lambda t: [t.update({f"unet.{k}": t.pop(k)}) for k in list(t)],
        r"has no adapter of any layer of this transformer, so it would change nothing: .*unet\.transformer",
    ),
    "empty": (lambda t: t.clear(), r"0 tensor\(s\), such as none, where transformer\.blocks\.0\.attn1\.to_q\.lora_A"),
    "something does not match": (
        lambda t: t.update({"transformer.blocks.7.attn1.to_q.lora_A.weight": np.zeros((4, 40), np.float32)}),
        r"1 tensor\(s\) that are no adapter of a layer .*: transformer\.blocks\.7",
    ),
    "a half": (lambda t: drop(t, "1.ffn.net.2.lora_B"), r"1 adapter\(s\) with only one of lora_A and .*: blocks\.1"),
    "some blocks": (lambda t: drop(t, "1.ffn.net.2"), r"some blocks only, and lacks 1 .*: ffn\.net\.2 of block 1"),
    "another rank": (
        lambda t: [change(t, f"0.ffn.net.2.lora_{x}", lambda v: v[:3] if len(v) == 4 else v[:, :3]) for x in "AB"],
        r"1 adapter\(s\) of another rank than 4: blocks\.0\.ffn\.net\.2: 3",
    ),
    "another shape": (
        lambda t: change(t, "0.ffn.net.2.lora_B", lambda x: x[:-1]), r"shape \(39, 4\), the config asks for \(40, 4\)",
    ),
    "not finite": (lambda t: change(t, "lora_A", lambda x: x * np.nan), r"lora_A\.weight holds NaN"),
    "integers": (lambda t: change(t, "lora_A", lambda x: x.astype(np.int32)), r"dtype other than"),
    "some alphas": (
        lambda t: t.update({"transformer.blocks.0.ffn.net.2.alpha": ALPHA}), r"alpha is not one number for",
    ),
    "twice": (
        lambda t: t.update({"diffusion_model.blocks.0.ffn.2.lora_A.weight": np.zeros((4, 64), np.float32)}),
        r"1 tensor\(s\) twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_is_wrong_is_refused_and_nothing_is_left(exported, tmp_path, name):
    spoil, message = SPOILT[name]
    tensors = load_file(exported / lora_files.FILE)
    spoil(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        import_run(WAN, tmp_path / "run", lora=str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "run").exists() and not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_what_is_no_lora_is_refused(exported, trained, dit_config, tmp_path, capsys):
    (tmp_path / "adapter.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"adapter\.bin is a pickle"):
        lora_files.find_file(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        lora_files.find_file(tmp_path / "nothing")
    shutil.copy(exported / lora_files.FILE, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(r=4, lora_alpha=8, use_rslora=True)))
    with pytest.raises(UserError, match="settings that sorax does not support, 1: use_rslora"):
        lora_files.open_lora(tmp_path, dit_config)
    with pytest.raises(UserError, match=r"another LoRA than config\.lora says \(rank: 4 there, 2 here; .*targets: "):
        lora_files.start_of(LoRAConfig(rank=2), exported, dit_config)
    out = str(tmp_path / "out")
    assert main(["export", "--run", str(trained), "--lora", "adapter", "--format", "safetensors", "--out", out]) == 2
    assert "no adapters alone" in capsys.readouterr().err
