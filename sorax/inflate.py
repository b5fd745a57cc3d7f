"""A VAE that starts from the weights of another, such as one of images.

What the two have alike is copied. A kernel with fewer time taps is filled up with zeros before them, so that every
frame is seen as the image network saw it; layers that only a video network has, those that change the frame rate, keep
their first values, which repeat frames and drop them: the inflation of Carreira and Zisserman, "Quo Vadis" (2017), in
the causal form of Yu et al., "Language Model Beats Diffusion" (MAGVIT-v2, 2024).
"""

import jax
import numpy as np

from sorax.errors import UserError
from sorax.sharding import path_string


def inflate(params, start, where: str):
    """Parameters `params` with the values of those in `start`, on the devices and in the dtypes of `params`.

    where: what to call `start` in an error.
    Raises UserError that lists what `start` has of another shape, lacks or has too much.
    """
    there = {path_string(path): x for path, x in jax.tree_util.tree_flatten_with_path(start)[0]}
    wrong = []

    def value(path, x):
        name = path_string(path)
        if name not in there:
            if "time_conv" not in name:
                wrong.append(f"{name} is missing")
            return x
        found = np.asarray(there.pop(name))
        taps = x.shape[0] - found.shape[0] if x.ndim == 5 and found.ndim == 5 else 0
        if taps > 0:
            found = np.pad(found, ((taps, 0), *((0, 0),) * 4))
        if found.shape != x.shape:
            wrong.append(f"{name} is {found.shape}, not {x.shape}")
            return x
        return jax.device_put(found.astype(x.dtype), x.sharding)

    result = jax.tree_util.tree_map_with_path(value, params)
    wrong += [f"{name} has no place" for name in there]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{where} cannot start this VAE: {'; '.join(wrong[:4])}{more}: make config.model alike, up to "
                        "what time needs")  # fmt: skip
    return result
