"""A text-to-video model from nothing in minutes on two CPU cores: VAE, text encoder and DiT on the embedded world.

    sorax quickstart                                  # trains, samples, evaluates and exports
    sorax train --config experiments/quickstart.py --workdir runs/quickstart

Images and clips of several sizes and lengths, one moving object each (8 colours x 4 shapes x 8 directions), packed
together in rows.
"""

from ml_collections import ConfigDict

# (frames, height, width); the share of a shape is how often it stands here.
SHAPES = ((5, 32, 32),) * 12 + ((1, 32, 32), (9, 32, 32), (5, 32, 48), (5, 48, 32))


def get_world():
    return ConfigDict(
        dict(num_samples=5000, shapes=SHAPES, fps=6.0, extent=5.0, num_objects=(1, 1), motions=("straight",),
             backgrounds=("plain",))
    )


def get_vae():
    """The VAE experiment: 2x4x4 compression, trained first, on single frames and then on clips."""
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""  # a finished VAE run, or a diffusers folder, to use instead of training one
    config.model = dict(
        base_width=16, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=5, temporal_downsample=(True,),
        pixel_patch=2,
    )  # fmt: skip
    config.loss = dict(l1=0.0, l2=1.0, kl=2e-4)
    world = get_world()
    world.shapes = ((5, 32, 32),)
    config.data = dict(path="", world=world, batch=8, stages=(dict(steps=350, batch=32, crop=(1, 0, 0)),))
    config.optim = dict(optimizer="muon", lr=2e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.98)
    config.train = dict(steps=800, seed=0, log_every=20)
    config.checkpoint = dict(every=400, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4)
    return config


def get_config():
    config = ConfigDict()
    config.kind = "dit"
    config.vae = get_vae()
    config.model = dict(
        in_channels=5, out_channels=5, patch_size=(1, 4, 4), num_layers=4, num_heads=4, head_dim=32, ffn_dim=512,
        text_dim=64, freq_dim=256,
    )  # fmt: skip
    config.text = dict(vocab_size=512, width=64, num_layers=2, num_heads=2, head_dim=32, ffn_dim=128)
    config.flow = dict(
        sigma_mean=0.0, sigma_std=1.0, train_shift=3.0, sample_shift=3.0, caption_dropout=0.1,
        given=(0.65, 0.25, 0.02, 0.04, 0.04),
    )  # fmt: skip
    config.data = dict(
        path="world", world=get_world(), batch=32, row_tokens=48, row_text=48, max_segments=8, val_samples=64,
        tokenizer="bpe",  # of the captions, which are 7 tokens then, in place of 28 bytes
    )  # fmt: skip
    config.optim = dict(
        optimizer="muon", lr=3e-2, vector_lr=3e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.995
    )
    config.train = dict(steps=1180, seed=0, log_every=40, unroll=True)
    config.checkpoint = dict(every=590, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=590, num_videos=4, num_steps=30, guidance_scale=2.0, num_clips=64)
    return config
