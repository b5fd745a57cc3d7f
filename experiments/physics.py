"""A model of motion on two CPU cores, in three quarters of an hour: it is given 3 frames and continues them.

    sorax train --config experiments/physics.py --workdir runs/physics

PhyWorld's three motions (arXiv 2411.02385), its ranges and its 32 frames at 10 a second, at 64x64 pixels. The VAE makes
2x8x8 pixels one place of 6 channels, so that 3 frames are 2 latent frames: those are always given. It makes an odd
number of frames: the 33rd is not scored.
"""

from ml_collections import ConfigDict


def get_phyworld():
    return ConfigDict(dict(num_samples=6000, num_frames=33, size=64))


def get_vae():
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""
    config.model = dict(
        base_width=24, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=6, temporal_downsample=(True,),
        pixel_patch=4,
    )  # fmt: skip
    config.loss = dict(l1=0.0, l2=1.0, kl=1e-5)
    config.data = dict(
        path="phyworld", phyworld=get_phyworld(), batch=6, crop=(9, 64, 64),
        stages=(dict(steps=400, batch=32, crop=(1, 0, 0)),),
    )  # fmt: skip
    config.optim = dict(optimizer="muon", lr=2e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.99)
    config.train = dict(steps=1200, seed=0, log_every=50)
    config.checkpoint = dict(every=400, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4)
    return config


def get_config():
    config = ConfigDict()
    config.kind = "dit"
    config.vae = get_vae()
    config.model = dict(
        in_channels=6, out_channels=6, patch_size=(1, 4, 4), num_layers=5, num_heads=4, head_dim=32, ffn_dim=512,
        text_dim=64, freq_dim=256,
    )  # fmt: skip
    config.text = dict(vocab_size=512, width=64, num_layers=1, num_heads=2, head_dim=32, ffn_dim=128)
    # Only "the first k" is drawn, and k is 2.
    config.flow = dict(
        sigma_mean=0.0, sigma_std=1.0, train_shift=3.0, sample_shift=3.0, caption_dropout=0.0,
        given=(0.0, 0.0, 0.0, 0.0, 1.0), first_k=(2, 2),
    )  # fmt: skip
    config.data = dict(
        path="phyworld", phyworld=get_phyworld(), tokenizer="bpe", batch=32, row_tokens=68, row_text=48,
        max_segments=1, val_samples=64,
    )  # fmt: skip
    config.optim = dict(
        optimizer="muon", lr=3e-2, vector_lr=3e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.995
    )
    config.train = dict(steps=2000, seed=0, log_every=50, unroll=True)
    config.checkpoint = dict(every=500, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4, num_steps=30, guidance_scale=1.0, num_clips=64)
    return config
