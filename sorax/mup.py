"""muP for the DiT: initial scales and learning rates under which good settings of a narrow network serve a wide one.

Yang et al. 2022, "Tensor Programs V", table 3, for Adam; Muon's updates transfer as they are, so that only the initial
scales matter to it. The width grows by more heads of the same size, and the MLP with it. The output multiplier of the
paper is folded into the learning rate of the last layer (its kernel starts at zero), so that the architecture, and what
is exported, stay Wan's.
"""

import math
import re

import jax

from sorax.dit import DiTConfig
from sorax.sharding import path_string

INPUTS = r"(^|/)(patch_embed|text_in|time_in)/kernel$"  # read what does not grow with the width


def lr_factor(config: DiTConfig):
    """Function (path, shape) of a parameter of `dict(dit=..., ...)` -> factor on its Adam learning rate.

    base width / width for kernels that read the width; 1 for all else. None where there is no base width.
    """
    if not config.mup_base_width:
        return None
    ratio = config.mup_base_width / config.width

    def factor(path, shape):
        hidden = path.startswith("dit/") and path.endswith("kernel") and not re.search(INPUTS, path)
        return ratio if hidden else 1.0

    return factor


def rescale(params, config: DiTConfig):
    """Fresh parameters of the DiT with the scales of muP; as they are where width and base_width are the same.

    Kernels that read the width have variances as 1 / width, all else what it has at the base width.
    """
    base_width = config.mup_base_width
    if not base_width:
        return params
    grown = config.width / base_width

    def scale(path, p):
        path = path_string(path)
        if path.endswith("modulation"):  # drawn with a deviation of width ** -0.5
            return p * math.sqrt(grown)
        if path == "patch_embed/kernel":  # Xavier: a variance of 2 / (inputs + outputs)
            inputs = p.shape[-2]
            return p * math.sqrt((inputs + config.width) / (inputs + base_width))
        if path in ("text_out/kernel", "time_out/kernel"):  # a deviation that does not know the width
            return p / math.sqrt(grown)
        return p

    return jax.tree_util.tree_map_with_path(scale, params)
