"""Short prompts of the embedded world to detailed ones: a small model that reads text and writes text.

    sorax train --config experiments/expander_world.py --workdir runs/expander
    sorax evaluate --run runs/expander --out runs/expander/report
    sorax expand "a red circle moving right" --run runs/expander

It learns from the pairs (short, detailed) of the world's captions; no video is rendered. Of other data: name a folder
that `sorax caption` wrote, as --config.data.path.
"""

from ml_collections import ConfigDict

MOTIONS = ("still", "straight", "bounce", "fall", "throw", "collide", "orbit", "occlude", "resize")


def get_world():
    return ConfigDict(
        dict(num_samples=20_000, shapes=((9, 32, 32),), fps=8.0, extent=6.0, num_objects=(1, 2), motions=MOTIONS,
             backgrounds=("plain", "two-tone"))
    )  # fmt: skip


def get_config():
    config = ConfigDict()
    config.kind = "captioner"
    config.model = dict(
        reads="text", in_channels=1, patch_size=(1, 1, 1), vocab_size=512, kinds=("detailed",), encoder_layers=2,
        decoder_layers=3, num_heads=4, head_dim=32, ffn_dim=384,
    )  # fmt: skip
    config.data = dict(
        path="world", world=get_world(), reads="short", caption_mix="detailed:1", batch=16, row_tokens=96, row_text=256,
        max_segments=8, val_samples=64,
    )  # fmt: skip
    config.optim = dict(optimizer="muon", lr=2e-2, vector_lr=1e-2, warmup_steps=50, final_lr=0.02, b2=0.99,
                        ema_decay=0.995)  # fmt: skip
    config.train = dict(steps=800, seed=0, log_every=50, unroll=True)
    config.checkpoint = dict(every=400, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=400, num_videos=8)
    return config
