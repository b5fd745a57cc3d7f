"""A VAE of real videos with every term of the loss: images, then clips, then a discriminator.

    sorax train --config experiments/vae_clips.py --config.data.path=CLIPS --workdir runs/vae_clips
    sorax evaluate --run runs/vae_clips

CLIPS is a folder of videos (captions are not needed for a VAE, but the index asks for them). L1, a perceptual term and
KL; a 3-D patch discriminator joins for the last steps. `--config.loss.lpips=FILE` gives the perceptual term its
weights; without them a Laplacian pyramid takes its place. `--config.init=RUN` starts from another VAE: with a lower
`--config.optim.lr`, since the first steps at this one undo part of what it brings.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.kind = "vae"
    config.init = ""
    config.model = dict(
        base_width=24, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=16, temporal_downsample=(True,),
        pixel_patch=2,
    )  # fmt: skip
    config.loss = dict(l1=1.0, kl=1e-6, perceptual=0.5, lpips="", adversarial=0.1, adversarial_start=1000)
    config.discriminator = dict(base_width=32)
    config.discriminator_optim = dict(lr=2e-4, b1=0.5, b2=0.9, warmup_steps=0)
    config.data = dict(
        path="", fps=8.0, max_frames=17, max_tokens=18000, batch=4, crop=(9, 64, 64),
        stages=(
            dict(steps=400, batch=16, crop=(1, 64, 64)),
            dict(steps=700, batch=4, crop=(9, 48, 48)),
        ),
    )  # fmt: skip
    config.optim = dict(optimizer="muon", lr=2e-2, warmup_steps=20, final_lr=0.05, b2=0.99, ema_decay=0.98)
    config.train = dict(steps=1300, seed=0, log_every=50)
    config.checkpoint = dict(every=100, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=13)
    return config
