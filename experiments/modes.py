"""A model for every mode of generation on the embedded world, on two CPU cores: the quickstart's, with longer clips.

    sorax train --config experiments/modes.py --workdir runs/modes
    sorax sample --run runs/modes --video clip.mp4 --extend forward --seconds 2 --out longer.mp4

The object moves through the frame, bounces, or passes behind a bar. Masks of all modes are drawn in training
(`flow.given`); three clips in ten are made from text alone. Clips of up to 13 frames are windows of 7 latent frames, of
which two or more are given when a video goes on.
"""

from ml_collections import ConfigDict

# (frames, height, width); the share of a shape is how often it stands here.
SHAPES = ((13, 32, 32),) * 6 + ((9, 32, 32),) * 3 + ((5, 32, 32),) * 2 + ((1, 32, 32), (9, 32, 48), (9, 48, 32))


def get_world():
    return ConfigDict(
        dict(num_samples=5000, shapes=SHAPES, fps=6.0, extent=5.0, num_objects=(1, 1),
             motions=("straight", "bounce", "occlude"), backgrounds=("plain",))
    )  # fmt: skip


def get_vae():
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""
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
        # nothing, first, last, both ends, first k, last k, both ends with k each, keyframes, around a box
        given=(0.3, 0.14, 0.03, 0.05, 0.16, 0.08, 0.1, 0.06, 0.08),
    )  # fmt: skip
    config.data = dict(
        path="world", world=get_world(), batch=32, row_tokens=96, row_text=64, max_segments=16, val_samples=64,
        tokenizer="bpe",
    )  # fmt: skip
    config.optim = dict(
        optimizer="muon", lr=3e-2, vector_lr=3e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.995
    )
    config.train = dict(steps=2500, seed=0, log_every=50, unroll=True)
    config.checkpoint = dict(every=500, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4, num_steps=30, guidance_scale=2.0, num_clips=64)
    return config
