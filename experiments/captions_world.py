"""The quickstart's model, trained on captions that were written anew: is recaptioning worth it on the embedded world?

    sorax caption --data world --run runs/captioner --out captioned --data.world.num_samples=5000
        --data.world.num_objects=1,1 --data.world.motions=straight, --data.world.backgrounds=plain,
    sorax train --config experiments/captions_world.py --config.data.path=captions:captioned --workdir runs/captions

Without --config.data.path the detailed captions are the world's own. `experiments/bench/captions.py` makes DALL-E 3's
table of it: kinds of captions in training against kinds of prompts.
"""

from experiments import quickstart

# Of the clips that `captioner_world.py` learns from: 9 frames of 32x32 pixels.
SHAPES = ((9, 32, 32),)
VIEW = dict(shapes=SHAPES, fps=8.0, extent=6.0)


def get_config():
    config = quickstart.get_config()
    config.vae.data.world.update(VIEW | dict(shapes=((5, 32, 32),)))
    config.data.world.update(VIEW)
    config.data.caption_mix = "detailed:0.95,short:0.05"
    # Four clips of 20 tokens, and as many detailed captions.
    config.data.update(row_tokens=80, row_text=192, max_segments=4)
    config.flow.given = (1.0,)
    config.train.steps = 1000
    config.checkpoint.every = 500
    config.eval.every = 0
    return config
