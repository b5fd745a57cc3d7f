"""The quickstart's model in four steps without guidance, in place of thirty with it: multistep consistency distilled.

    sorax train --config experiments/distill.py --workdir runs/distill         # from runs/quickstart, a few minutes
    sorax train --config experiments/distill.py --config.init=RUN --config.vae.path=RUN --workdir W      # from another
    python -m experiments.bench.few_steps --teacher runs/quickstart --student runs/distill     # the scorecard

Another number of steps is set in two places: --config.distill.steps=2 --config.eval.num_steps=2. `model`, `text` and
`data` are those of the teacher.
"""

from ml_collections import ConfigDict

SHAPES = ((5, 32, 32),) * 12 + ((1, 32, 32), (9, 32, 32), (5, 32, 48), (5, 48, 32))


def get_config():
    config = ConfigDict()
    config.kind = "dit"
    config.init = "runs/quickstart"  # the teacher, which the student starts as
    config.vae = dict(path="runs/quickstart")
    config.distill = dict(steps=4, teacher_steps=64, guidance=2.0)
    config.model = dict(
        in_channels=5, out_channels=5, patch_size=(1, 4, 4), num_layers=4, num_heads=4, head_dim=32, ffn_dim=512,
        text_dim=64, freq_dim=256,
    )  # fmt: skip
    config.text = dict(vocab_size=512, width=64, num_layers=2, num_heads=2, head_dim=32, ffn_dim=128)
    config.flow = dict(sample_shift=3.0, caption_dropout=0.0, given=(0.65, 0.25, 0.02, 0.04, 0.04))
    world = dict(num_samples=5000, shapes=SHAPES, fps=6.0, extent=5.0, num_objects=(1, 1), motions=("straight",),
                 backgrounds=("plain",))  # fmt: skip
    config.data = dict(
        path="world", world=world, batch=32, row_tokens=48, row_text=48, max_segments=8, val_samples=64, tokenizer="bpe"
    )
    config.optim = dict(
        optimizer="muon", lr=5e-3, vector_lr=5e-3, warmup_steps=20, final_lr=0.02, b2=0.99, ema_decay=0.99
    )
    config.train = dict(steps=400, seed=0, log_every=20, unroll=True, freeze=("text",))
    config.checkpoint = dict(every=200, keep=1)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.eval = dict(every=0, num_videos=4, num_steps=4, solver="ddim", guidance_scale=1.0, num_clips=64)
    return config
