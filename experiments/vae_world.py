"""A VAE of the whole embedded world, from nothing to more than 36 dB in less than an hour on two CPU cores.

    sorax train --config experiments/vae_world.py --workdir runs/vae_world
    sorax evaluate --run runs/vae_world

One to three objects, every motion and background, images and clips of several shapes; 2x4x4 compression into 16
channels. Images come first: they are cheap, and space is learned from them. Then crops of clips, then all of them.
"""

from ml_collections import ConfigDict

CLIPS = ((9, 64, 64), (17, 64, 64), (9, 48, 80), (9, 80, 48))


def get_config():
    config = ConfigDict()
    config.kind = "vae"
    config.model = dict(
        base_width=24, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=16, temporal_downsample=(True,),
        pixel_patch=2,
    )  # fmt: skip
    config.loss = dict(l1=0.0, l2=1.0, kl=3e-7)
    world = dict(num_samples=10_000, shapes=((1, 64, 64), *CLIPS), fps=8.0)
    config.data = dict(
        path="world", world=world, batch=8,
        stages=(
            dict(steps=500, batch=32, crop=(1, 0, 0)),
            dict(steps=500, batch=8, crop=(9, 48, 48)),
        ),
    )  # fmt: skip
    config.optim = dict(optimizer="muon", lr=2e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.99)
    config.train = dict(steps=2000, seed=0, log_every=50)
    config.checkpoint = dict(every=500, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=500, num_videos=16, num_clips=64)
    return config
