"""Overfits a small model on a folder of captioned real videos, each at its own shape, packed together in rows.

    sorax train --config experiments/clips.py --config.data.path=CLIPS --workdir runs/clips
    sorax sample --run runs/clips --prompt "CAPTION OF ONE OF THE CLIPS" --out clip.mp4

CLIPS holds videos with metadata.jsonl (`file`, `caption`) or a .txt beside each. The VAE is trained first, on crops
of the same folder. A check that the whole system learns from real input, not a recipe for a model that generalises.
"""

from ml_collections import ConfigDict


def get_vae():
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""
    config.model = dict(
        base_width=16, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=8, temporal_downsample=(True,),
        pixel_patch=2,
    )  # fmt: skip
    config.loss = dict(l1=0.0, l2=1.0, kl=1e-4)
    config.data = dict(
        path="", fps=8.0, max_frames=9, max_tokens=2560, batch=4, crop=(9, 48, 48),
        stages=(dict(steps=400, batch=16, crop=(1, 48, 48)),),
    )  # fmt: skip
    config.optim = dict(optimizer="muon", lr=2e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.98)
    config.train = dict(steps=600, seed=0, log_every=20)
    config.checkpoint = dict(every=300, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4)
    return config


def get_config():
    config = ConfigDict()
    config.kind = "dit"
    config.vae = get_vae()
    config.model = dict(
        in_channels=8, out_channels=8, patch_size=(1, 4, 4), num_layers=4, num_heads=4, head_dim=32, ffn_dim=512,
        text_dim=64, freq_dim=256,
    )  # fmt: skip
    config.text = dict(vocab_size=512, width=64, num_layers=2, num_heads=2, head_dim=32, ffn_dim=128)
    config.flow = dict(
        sigma_mean=0.0, sigma_std=1.5, train_shift=1.5, sample_shift=3.0, caption_dropout=0.1,
        given=(0.8, 0.1, 0.02, 0.04, 0.04),
    )  # fmt: skip
    # max_tokens counts patches of 16 x 16 pixels and 2 frames here, of 4 x 4 for the VAE: the same sizes.
    config.data = dict(
        path="", fps=8.0, max_frames=9, max_tokens=160, batch=4, row_tokens=512, row_text=256, max_segments=8,
        val_samples=64, tokenizer="bpe",
    )  # fmt: skip
    config.optim = dict(
        optimizer="muon", lr=3e-2, vector_lr=3e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.99
    )
    config.train = dict(steps=1800, seed=0, log_every=20, unroll=True)
    config.checkpoint = dict(every=600, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=600, num_videos=13, num_steps=30, guidance_scale=1.0, num_clips=64)
    return config
