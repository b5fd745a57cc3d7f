r"""Wan 2.1's text-to-video model of 14B parameters, on videos of up to 720p x 81 frames and images, in packed rows.

    sorax plan --config experiments/wan_14b.py --topology v5p-128 --tokens 1e12
    sorax encode --config experiments/wan_14b.py --vae VAE --config.data.path=CLIPS --out latents
    sorax train --config experiments/wan_14b.py --config.data.path=shards:latents --config.vae.path=VAE \
        --workdir runs/wan_14b

The DiT has the published size (14,288,491,584 parameters). Meant for 64 chips of TPU v5p (v5p-128 = v5p:4x4x4: the name
counts tensor cores) or 256 of v6e (v6e-256 = v6e:16x16).

The text encoder stands in for Wan's frozen UMT5-XXL: as wide (4096), two layers deep, and trained along. VAE is a run,
or a folder with Wan's (Wan-AI/Wan2.1-T2V-14B-Diffusers); without it the VAE of `get_vae` is trained first.
"""

from ml_collections import ConfigDict


def get_vae():
    """Wan 2.1's VAE, to train from nothing: images, then crops of clips."""
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""
    config.model = dict(
        base_width=96, width_multipliers=(1, 2, 4, 4), num_res_blocks=2, latent_channels=16,
        temporal_downsample=(False, True, True),
    )  # fmt: skip
    config.loss = dict(l1=3.0, kl=3e-6, perceptual=3.0)
    config.data = dict(
        path="", fps=16.0, max_frames=17, max_tokens=1 << 24, oversize="trim", batch=64, crop=(17, 256, 256),
        stages=(dict(steps=100_000, batch=256, crop=(1, 256, 256)),),
    )  # fmt: skip
    config.optim = dict(lr=1e-4, warmup_steps=1000, ema_decay=0.999)
    config.train = dict(steps=300_000, seed=0, log_every=100, remat="full")
    config.checkpoint = dict(every=5000, keep=2)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=5000, num_videos=4)
    return config


def get_config():
    config = ConfigDict()
    config.kind = "dit"
    config.vae = get_vae()
    config.model = dict(
        in_channels=16, out_channels=16, patch_size=(1, 2, 2), num_layers=40, num_heads=40, head_dim=128,
        ffn_dim=13824, text_dim=4096, freq_dim=256,
    )  # fmt: skip
    config.text = dict(vocab_size=8192, width=4096, num_layers=2, num_heads=8, head_dim=64, ffn_dim=4096)
    config.flow = dict(
        sigma_mean=0.0, sigma_std=1.0, train_shift=5.0, sample_shift=5.0, caption_dropout=0.1,
        given=(0.7, 0.2, 0.02, 0.04, 0.04),
    )  # fmt: skip
    # 81 frames of 720 x 1280 are 21 x 45 x 80 = 75,600 tokens.
    config.data = dict(
        path="", fps=16.0, max_frames=81, max_tokens=75_600, batch=32, row_tokens=75_776, row_text=1024,
        max_segments=24, posterior="sample",
        tokenizer="bpe",  # of the captions: a hundred words are 600 bytes, more than the 511 that there is room for
    )  # fmt: skip
    config.optim = dict(
        optimizer="adamw", lr=1e-4, warmup_steps=2000, final_lr=0.1, b1=0.9, b2=0.95, weight_decay=1e-3, clip_norm=1.0,
        ema_decay=0.9999,
    )  # fmt: skip
    config.train = dict(steps=200_000, seed=0, log_every=20, dtype="bfloat16", remat="full", accumulate=1)
    config.checkpoint = dict(every=1000, keep=2)
    config.mesh = dict(data=1, fsdp=-1, context=8, tensor=1)
    config.eval = dict(every=0, num_videos=4, num_steps=50, guidance_scale=5.0)
    return config
