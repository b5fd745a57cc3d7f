"""The quickstart's model and world, trained on captions that were written anew: is recaptioning worth it here?

    WORLD="fps=6 extent=5 num_objects=(1,1) motions=('straight',) backgrounds=('plain',)"
    sorax train --config experiments/captioner_world.py --workdir runs/captioner --config.train.steps=900
        --config.model.patch_size="(5,4,4)" --config.data.row_text=56 $(printf -- '--config.data.world.%s ' $WORLD)
        --config.data.world.shapes="((5,32,32),)"
    sorax caption --data world --run runs/captioner --out captioned --data.world.num_samples=5000
        --data.world.shapes="((5,32,32),)" $(printf -- '--data.world.%s ' $WORLD)
    sorax train --config experiments/expander_world.py --workdir runs/expander --config.train.steps=300
        --config.data.world.shapes="((5,32,32),)" $(printf -- '--config.data.world.%s ' $WORLD)
    sorax train --config experiments/captions_world.py --config.data.path=captions:captioned --workdir runs/captions

Without --config.data.path the detailed captions are the world's own. `experiments/bench/captions.py` makes DALL-E 3's
table of it: kinds of captions in training against kinds of prompts.
"""

from ml_collections import ConfigDict

SHAPES = ((5, 32, 32),)


def get_world():
    return ConfigDict(
        dict(num_samples=5000, shapes=SHAPES, fps=6.0, extent=5.0, num_objects=(1, 1), motions=("straight",),
             backgrounds=("plain",))
    )


def get_vae():
    config = ConfigDict()
    config.kind = "vae"
    config.path = ""
    config.model = dict(
        base_width=16, width_multipliers=(1, 2), num_res_blocks=1, latent_channels=5, temporal_downsample=(True,),
        pixel_patch=2,
    )  # fmt: skip
    config.loss = dict(l1=0.0, l2=1.0, kl=2e-4)
    config.data = dict(path="", world=get_world(), batch=8, stages=(dict(steps=350, batch=32, crop=(1, 0, 0)),))
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
    )  # fmt: skip
    # Rows of eight clips of 12 tokens, and as many detailed captions.
    config.data = dict(
        path="world", world=get_world(), batch=32, row_tokens=96, row_text=208, max_segments=8, val_samples=64,
        tokenizer="bpe", caption_mix="detailed:0.95,short:0.05",
    )  # fmt: skip
    config.optim = dict(
        optimizer="muon", lr=3e-2, vector_lr=3e-2, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.995
    )
    config.train = dict(steps=1000, seed=0, log_every=50, unroll=True)
    config.checkpoint = dict(every=500, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4, num_steps=30, guidance_scale=2.0, num_clips=64)
    return config
