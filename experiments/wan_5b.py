r"""Wan 2.2's text- and image-to-video model of 5B parameters (TI2V), up to 704p x 121 frames, in packed rows.

    sorax plan --config experiments/wan_5b.py --topology v5p-64 --tokens 1e12
    sorax encode --config experiments/wan_5b.py --vae VAE --config.data.path=CLIPS --out latents
    sorax train --config experiments/wan_5b.py --config.data.path=shards:latents --config.vae.path=VAE \
        --workdir runs/wan_5b

The DiT has the published size (4,999,787,712 parameters) and takes a noise level per token: two in five
videos have their first frame given. Meant for 32 chips of TPU v5p, or 64 of v6e with mesh.context=2.

The text encoder stands in for Wan's frozen UMT5-XXL: as wide (4096), two layers deep, and trained along. VAE is a run,
or a folder with Wan's (Wan-AI/Wan2.2-TI2V-5B-Diffusers); without it the VAE of `get_vae` is trained first.
"""

from ml_collections import ConfigDict


def get_vae():
    """Wan 2.2's VAE, to train from nothing: images, then crops of clips."""
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""
    config.model = dict(
        base_width=160, decoder_base_width=256, width_multipliers=(1, 2, 4, 4), num_res_blocks=2, latent_channels=48,
        temporal_downsample=(False, True, True), pixel_patch=2, shortcuts=True,
    )  # fmt: skip
    config.loss = dict(l1=3.0, kl=3e-6, perceptual=3.0)
    config.data = dict(
        path="", fps=24.0, max_frames=17, max_tokens=1 << 24, oversize="trim", batch=64, crop=(17, 256, 256),
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
        in_channels=48, out_channels=48, patch_size=(1, 2, 2), num_layers=30, num_heads=24, head_dim=128,
        ffn_dim=14336, text_dim=4096, freq_dim=256,
    )  # fmt: skip
    config.text = dict(vocab_size=8192, width=4096, num_layers=2, num_heads=8, head_dim=64, ffn_dim=4096)
    config.flow = dict(
        sigma_mean=0.0, sigma_std=1.0, train_shift=5.0, sample_shift=5.0, caption_dropout=0.1,
        given=(0.5, 0.4, 0.02, 0.04, 0.04),
    )  # fmt: skip
    # 121 frames of 704 x 1280 are 31 x 22 x 40 = 27,280 tokens.
    config.data = dict(
        path="", fps=24.0, max_frames=121, max_tokens=27_280, batch=64, row_tokens=27_648, row_text=1024,
        max_segments=24, posterior="sample",
        tokenizer="bpe",  # of the captions: a hundred words are 600 bytes, more than the 511 that there is room for
    )  # fmt: skip
    config.optim = dict(
        optimizer="adamw", lr=1e-4, warmup_steps=2000, final_lr=0.1, b1=0.9, b2=0.95, weight_decay=1e-3, clip_norm=1.0,
        ema_decay=0.9999,
    )  # fmt: skip
    config.train = dict(steps=200_000, seed=0, log_every=20, dtype="bfloat16", remat="full", accumulate=1)
    config.checkpoint = dict(every=1000, keep=2)
    config.mesh = dict(data=1, fsdp=-1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4, num_steps=50, guidance_scale=5.0)
    return config
