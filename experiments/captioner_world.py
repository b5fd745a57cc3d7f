"""A captioner of the embedded world, in the two stages of DALL-E 3's: short captions first, then mostly detailed ones.

    sorax train --config experiments/captioner_world.py --workdir runs/captioner
    sorax evaluate --run runs/captioner --out runs/captioner/report
    sorax caption --data world --run runs/captioner --out captioned

One or two objects with five motions, 9 frames of 32x32 pixels, read as patches of 9 frames x 4x4 pixels: in 64 tokens
each sees all of its time, from which motion is learned much sooner than from patches of 3 frames x 8x8.

To read latents in place of pixels: --config.model.reads=latents --config.vae.path=RUN --config.model.in_channels=16
--config.model.patch_size="(1,2,2)", with the channels of that VAE.
"""

from ml_collections import ConfigDict

MOTIONS = ("still", "straight", "fall", "throw", "resize")


def get_world():
    return ConfigDict(
        dict(num_samples=180_000, shapes=((9, 32, 32),), fps=8.0, extent=6.0, num_objects=(1, 2), motions=MOTIONS,
             backgrounds=("plain", "two-tone"))
    )  # fmt: skip


def get_config():
    config = ConfigDict()
    config.kind = "captioner"
    config.model = dict(
        reads="pixels", in_channels=3, patch_size=(9, 4, 4), vocab_size=512, kinds=("short", "detailed"),
        encoder_layers=4, decoder_layers=3, num_heads=4, head_dim=32, ffn_dim=384,
    )  # fmt: skip
    config.data = dict(
        path="world", world=get_world(), batch=32, row_tokens=128, row_text=80, max_segments=2, val_samples=128,
        stages=(dict(steps=300, caption_mix="short:1", row_text=40),), caption_mix="detailed:0.9,short:0.1",
    )  # fmt: skip
    config.optim = dict(optimizer="muon", lr=2e-2, vector_lr=1e-2, warmup_steps=50, final_lr=0.02, b2=0.99,
                        ema_decay=0.995)  # fmt: skip
    config.train = dict(steps=2800, seed=0, log_every=50, unroll=True)
    config.checkpoint = dict(every=700, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=1400, num_videos=4, num_prompts=64)
    return config
