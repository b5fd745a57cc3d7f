"""Folders that diffusers itself makes, of three configurations: imported they sample the same, train, and are exported
with the bytes they came with where nothing was trained (extra `parity`)."""

import json

import numpy as np
import pytest

from sorax import convert, read_weights
from sorax.cli import main
from sorax.runs import load_run

diffusers, torch, transformers = (
    pytest.importorskip(name, reason="extra `parity`") for name in ("diffusers", "torch", "transformers")
)

PROMPT, NEGATIVE, STEPS, GUIDANCE = "a red circle moving right", "blur", 4, 3.0
STATISTICS = dict(latents_mean=[0.1, -0.2, 0.3, 0.05], latents_std=[1.5, 0.8, 1.1, 0.6])
FIRST = dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True])
SECOND = dict(FIRST, decoder_base_dim=6, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
              scale_factor_spatial=16)  # fmt: skip
DIT = dict(num_attention_heads=2, attention_head_dim=20, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
           ffn_dim=64, num_layers=2, rope_max_seq_len=64)  # fmt: skip
TEXT = dict(vocab_size=384, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2, feed_forward_proj="gated-gelu")
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
# VAE, DiT, text encoder, scheduler, expand_timesteps, dtype.
CONFIGURATIONS = {
    "Wan 2.1": (FIRST, DIT, transformers.UMT5EncoderModel,
                lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=5.0), False, torch.bfloat16),
    "Wan 2.2 TI2V": (SECOND, dict(DIT, num_layers=3, ffn_dim=48), transformers.UMT5EncoderModel,
                     lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), True, torch.float32),
    "T5 and DPM++": (FIRST, dict(DIT, num_attention_heads=4, attention_head_dim=12), transformers.T5EncoderModel,
                     lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=2.0), False, torch.float16),
}  # fmt: skip


@pytest.fixture(params=CONFIGURATIONS)
def folder(request, tmp_path):
    """A folder with random weights, in files of at most 30 kB."""
    vae, dit, encoder, scheduler, expand, dtype = CONFIGURATIONS[request.param]
    torch.manual_seed(0)
    parts = dict(
        vae=diffusers.AutoencoderKLWan(**vae, **STATISTICS), transformer=diffusers.WanTransformer3DModel(**dit),
        text_encoder=encoder(encoder.config_class(**TEXT)),
    )  # fmt: skip
    with torch.no_grad():
        for part in parts.values():
            for weight in part.parameters():
                weight.add_(0.1 * torch.randn(weight.shape))  # what is made as zeros or ones is seen too
            part.to(dtype)
    pipe = diffusers.WanPipeline(**parts, tokenizer=transformers.ByT5Tokenizer(), scheduler=scheduler(),
                                 expand_timesteps=expand)  # fmt: skip
    pipe.save_pretrained(tmp_path / "theirs", max_shard_size="30kB")
    return tmp_path / "theirs"


def bytes_of(folder, part):
    """Tensor name -> (dtype, bytes)."""
    found = {}
    stem = convert.TEXT_WEIGHTS if part == "text_encoder" else convert.WEIGHTS
    for name, path in read_weights.tensor_files(folder / part, stem).items():
        with read_weights.open_safetensors(path) as file:
            value = file.get_tensor(name)
        found[name] = value.dtype, value.tobytes()
    return found


def test_a_folder_of_diffusers_is_imported_sampled_exported_and_trained(folder, tmp_path):
    """Latents to 1e-4 of the largest, in float32; ten steps change the transformer alone."""
    run, out, trained = (str(tmp_path / name) for name in ("run", "out", "trained"))
    assert main(["import", "--from", str(folder), "--workdir", run]) == 0
    vae = load_run(run, stored=True).networks.vae_config
    shape = (*vae.latent_shape(5, 64, 32), 4)
    noise = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    command = ["sample", "--run", run, "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--size", "32x64", "--frames",
               "5", "--steps", str(STEPS), "--guidance", str(GUIDANCE), "--noise", str(tmp_path / "noise.npy"),
               "--save-latents", str(tmp_path / "ours.npy"), "--out", str(tmp_path / "x.gif")]  # fmt: skip
    assert main(command) == 0
    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs = pipe(PROMPT, negative_prompt=NEGATIVE, height=64, width=32, num_frames=5, num_inference_steps=STEPS,
                  guidance_scale=GUIDANCE, output_type="latent",
                  latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy())).frames.numpy()  # fmt: skip
    theirs = np.moveaxis(theirs, 1, -1)
    np.testing.assert_allclose(np.load(tmp_path / "ours.npy"), theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())

    parts = ("transformer", "vae", "text_encoder")
    assert main(["export", "--run", run, "--out", out]) == 0
    before = {part: bytes_of(folder, part) for part in parts}
    assert {part: bytes_of(tmp_path / "out", part) for part in parts} == before
    there, here = (json.loads((f / "model_index.json").read_text()) for f in (folder, tmp_path / "out"))
    assert here["expand_timesteps"] == there["expand_timesteps"] and here["scheduler"] == there["scheduler"]

    settings = ("data.path=world", "data.batch=8", "data.row_tokens=64", "data.row_text=128", "data.val_samples=2",
                "train.steps=10", "train.remat=none", "optim.lr=1e-3", "optim.warmup_steps=0", "eval.num_steps=1",
                "eval.num_videos=1", "data.world.num_samples=8", "data.world.shapes=((5, 64, 32),)",
                "mesh.fsdp=8")  # fmt: skip
    config = tmp_path / "run" / "config.json"
    values = json.loads(config.read_text())
    values["data"]["world"] = dict(num_samples=8, shapes=((5, 32, 32),))
    config.write_text(json.dumps(values))
    assert main(["train", "--config", str(config), "--workdir", run, *(f"--config.{x}" for x in settings)]) == 0
    assert main(["export", "--run", run, "--out", trained]) == 0
    after = {part: bytes_of(tmp_path / "trained", part) for part in parts}
    assert after["vae"] == before["vae"] and after["text_encoder"] == before["text_encoder"]
    assert after["transformer"].keys() == before["transformer"].keys()
    assert after["transformer"]["proj_out.weight"] != before["transformer"]["proj_out.weight"]
    record = json.loads((tmp_path / "trained" / "provenance.json").read_text())
    assert record["step"] == 10 and record["data_plan"] and "+" in record["code_version"]
