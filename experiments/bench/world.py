"""How fast the world renders: frames a second on one core, by CPU time.

    python -m experiments.bench.world
"""

import time

from data_pipelines.world import MOTIONS, World, WorldConfig


def measure(count=200, **config):
    """(milliseconds an item, frames a second) over `count` items: scene, caption and pixels."""
    world = World(WorldConfig(**config))
    world[0]
    start = time.process_time()
    frames = sum(len(world[i]["video"]) for i in range(count))
    seconds = time.process_time() - start
    return 1e3 * seconds / count, frames / seconds


if __name__ == "__main__":
    print(f"{'':32}{'ms/item':>9}{'frames/s':>10}")
    for motion in MOTIONS:
        count = (2, 2) if motion == "collide" else (1, 1)
        result = measure(shapes=((17, 64, 64),), motions=(motion,), num_objects=count)
        print(f"{'17x64x64 ' + motion:32}{result[0]:9.2f}{result[1]:10.0f}")
    for name, config in (
        ("17x64x64 mix, 1-3 objects", {"shapes": ((17, 64, 64),)}),
        ("9x32x32 mix, 1-3 objects", {"shapes": ((9, 32, 32),)}),
        ("9x32x32 straight, one object", {"motions": ("straight",), "num_objects": (1, 1)}),
        ("81x480x832 mix, 1-3 objects", {"shapes": ((81, 480, 832),), "fps": 16.0, "count": 4}),
    ):
        result = measure(**config)
        print(f"{name:32}{result[0]:9.2f}{result[1]:10.0f}")
