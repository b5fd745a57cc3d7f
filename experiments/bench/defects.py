"""Clips of the embedded world with one thing wrong, to see what the judges of clips catch.

`inject(kind, world, index, draw)` renders item `index` with a defect of one of KINDS where nothing excuses it: the
object is wholly in the frame, and away from whatever could hide it.
"""

import dataclasses

import numpy as np

from data_pipelines import world_physics as physics
from data_pipelines.world import COLORS, SHAPES
from data_pipelines.world_render import coverage, view

OVERSAMPLE = 4


def inject(kind, world, index, draw):
    """(video, number of the object, first wrong frame), or None if the item has no object that it can be done to.

    draw: numpy Generator.
    """
    scene, truth = world.scene(index), world.truth(index)
    num_frames, height, width = world.frame_shape(index)
    size = dict(num_frames=num_frames, height=height, width=width, fps=world.config.fps)
    options = [(k, m) for k in range(truth.num_objects) for m in range(2, num_frames - 2)]
    clear = [_clear(scene, truth, k, height, width) for k in range(truth.num_objects)]
    for n in draw.permutation(len(options)):
        k, m = options[n]
        made = KINDS[kind](scene, truth, k, m, clear[k], size, world, draw)
        if made is not None:
            return made, k, (0 if kind in WHOLE_CLIP else m)
    return None


def _clear(scene, truth, k, height, width, apart=0.04):
    """[T] whether an object is away from the frame's edge, the bar and all others."""
    reach = truth.radius[k] * physics.reach(scene.bodies[k].shape)
    frame = np.array([width, height]) / min(height, width)
    place = truth.position[k]
    clear = np.minimum(place, frame - place).min(-1) > reach + apart
    for j, body in enumerate(scene.bodies):
        if j != k:
            far = np.linalg.norm(place - truth.position[j], axis=-1)
            clear &= far > reach + truth.radius[j] * physics.reach(body.shape) + apart
    if scene.bar is not None:
        scale, left, top = view(scene, height, width)
        low, high = ((edge * scale + (left, top)[scene.bar.axis]) / min(height, width)
                     for edge in (scene.bar.low, scene.bar.high))  # fmt: skip
        along = place[:, scene.bar.axis]
        clear &= (along + reach + apart < low) | (along - reach - apart > high)
    return clear


def _around(clear, m, before=2, after=2):
    return clear[m - before : m + after].all()


def _longest(flags):
    """Length of the longest run of True."""
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


def _join(scene, changed, m, size, world):
    """A scene up to frame m, and another from there."""
    first, second = (world.scene_video(each, **size) for each in (scene, changed))
    return np.concatenate([first[:m], second[m:]])


def _with(scene, k, *bodies):
    return dataclasses.replace(scene, bodies=(*scene.bodies[:k], *bodies, *scene.bodies[k + 1 :]))


def _through(times, positions):
    """A path through given positions [T, 2] at given times."""
    steps = np.diff(positions, axis=0) / np.diff(times)[:, None]
    steps = np.concatenate([steps, steps[-1:]])
    return physics.Flight(tuple((float(t), *map(float, p), *map(float, v), 0.0)
                                for t, p, v in zip(times, positions, steps)))  # fmt: skip


def _where(body, truth):
    return body.path.state(truth.times)[0]


def _swap_color(scene, truth, k, m, clear, size, world, draw):
    used = {body.color for body in scene.bodies}
    color = draw.choice([name for name in COLORS if name not in used])
    changed = _with(scene, k, dataclasses.replace(scene.bodies[k], color=str(color)))
    return _join(scene, changed, m, size, world) if _around(clear, m) else None


def _swap_shape(scene, truth, k, m, clear, size, world, draw):
    shape = draw.choice([name for name in SHAPES if name != scene.bodies[k].shape])
    changed = _with(scene, k, dataclasses.replace(scene.bodies[k], shape=str(shape)))
    after = _clear(changed, world.scene_truth(changed, **size), k, size["height"], size["width"])
    return _join(scene, changed, m, size, world) if _around(clear & after, m) else None


def _delete(scene, truth, k, m, clear, size, world, draw):
    return _join(scene, _with(scene, k), m, size, world) if _around(clear, m) else None


def _delete_hidden(scene, truth, k, m, clear, size, world, draw):
    """Never comes out from behind the bar, though there would be time to see it."""
    hides = scene.bodies[k].motion == "occlude" and truth.visible[k, m] < 0.02 and clear[:m].sum() >= 3
    return _join(scene, _with(scene, k), m, size, world) if hides and clear[m:].sum() >= 4 else None


def _appear(scene, truth, k, m, clear, size, world, draw):
    return _join(_with(scene, k), scene, m, size, world) if _around(clear, m) else None


def _split(scene, truth, k, m, clear, size, world, draw):
    body, angle = scene.bodies[k], draw.uniform(0, 2 * np.pi)
    away = np.array([np.cos(angle), np.sin(angle)])
    spread = (0.8 + 0.25 * np.maximum(np.arange(len(truth.times)) - m, 0))[:, None] * body.radii(truth.times)[:, None]
    halves = [dataclasses.replace(body, path=_through(truth.times, _where(body, truth) + side * spread * away),
                                  radius=body.radius / 2**0.5, end_radius=body.end_radius / 2**0.5)
              for side in (1, -1)]  # fmt: skip
    return _join(scene, _with(scene, k, *halves), m, size, world) if _around(clear, m, 2, 3) else None


def _teleport(scene, truth, k, m, clear, size, world, draw):
    body = scene.bodies[k]
    for angle in draw.uniform(0, 2 * np.pi, 8):
        there = _where(body, truth) + 2.0 * np.array([np.cos(angle), np.sin(angle)])
        changed = _with(scene, k, dataclasses.replace(body, path=_through(truth.times, there)))
        after = world.scene_truth(changed, **size)
        if _around(clear, m, 2, 0) and _clear(changed, after, k, size["height"], size["width"])[m : m + 2].all():
            return _join(scene, changed, m, size, world)
    return None


def _stretch(scene, truth, k, m, clear, size, world, draw):
    """1.5 times as long along one axis from frame m on."""
    height, width = size["height"], size["width"]
    if not _clear(scene, truth, k, height, width, apart=0.04 + 0.5 * truth.radius[k].max())[m - 2 :].all():
        return None
    body, axis = scene.bodies[k], int(draw.integers(2))
    video = _join(scene, _with(scene, k), m, size, world)
    n, times = OVERSAMPLE, np.arange(m, len(video))
    centre, radius = truth.position[k, m:] * min(height, width) * n, truth.radius[k, m:] * min(height, width) * n
    fine = coverage(body.shape, centre, radius, np.zeros((len(times), 2)), height * n, width * n)
    for i, t in enumerate(times):
        mask = np.clip(fine[i], 0, 1).swapaxes(0, 1) if axis == 0 else np.clip(fine[i], 0, 1)
        along = np.arange(len(mask)) + 0.5
        source = np.floor((along - centre[i, axis]) / 1.5 + centre[i, axis]).astype(int).clip(0, len(mask) - 1)
        mask = mask[source].swapaxes(0, 1) if axis == 0 else mask[source]
        alpha = mask.reshape(height, n, width, n).mean((1, 3))[..., None]
        color = np.asarray(COLORS[body.color])
        video[t] = np.floor(video[t] + alpha * (color - video[t].astype(float)) + 0.5).astype(np.uint8)
    return video


def _grow(scene, truth, k, m, clear, size, world, draw):
    """Half as large again by the end, though no resizing is asked for."""
    body = scene.bodies[k]
    if body.motion == "resize" or not (clear.mean() >= 0.6 and clear[:3].all() and clear[-3:].all()):
        return None
    motion = "resize" if body.is_still else body.motion  # what is still is drawn once for all frames
    grown = dataclasses.replace(body, motion=motion, end_radius=1.5 * body.radius, resize_time=float(truth.times[-1]))
    return world.scene_video(_with(scene, k, grown), **size)


def _wrong_direction(scene, truth, k, m, clear, size, world, draw):
    """From where it should end to where it should begin."""
    body = scene.bodies[k]
    if body.motion not in ("straight", "occlude", "throw", "orbit") or clear.sum() < 5:
        return None
    if body.motion in ("throw", "orbit") and _longest(clear & clear[::-1]) < 5:
        return None
    positions = _where(body, truth)
    far = np.ptp(positions[clear], axis=0)
    if max(far) < 0.8 or (body.motion == "throw" and far[0] < 0.8):
        return None
    reverse = dataclasses.replace(body, path=_through(truth.times, positions[::-1]))
    return world.scene_video(_with(scene, k, reverse), **size)


def _drift(scene, truth, k, m, clear, size, world, draw):
    """All of its motion 5 % too fast."""
    body = scene.bodies[k]
    at = body.path.state(truth.times * 1.05)[0]
    travelled = np.linalg.norm(np.diff(_where(body, truth)[clear], axis=0), axis=-1).sum() if clear.sum() > 4 else 0.0
    if body.motion == "collide" or travelled < 1.0:
        return None
    return world.scene_video(_with(scene, k, dataclasses.replace(body, path=_through(truth.times, at))), **size)


KINDS = {
    "swap colour": _swap_color, "swap shape": _swap_shape, "delete": _delete, "delete while hidden": _delete_hidden,
    "appear": _appear, "split in two": _split, "teleport": _teleport, "stretch 1.5x": _stretch, "grow 1.5x": _grow,
    "wrong direction": _wrong_direction, "5 % too fast": _drift,
}  # fmt: skip
WHOLE_CLIP = ("grow 1.5x", "wrong direction", "5 % too fast")
