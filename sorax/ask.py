"""What a user asks `sorax sample` or the app for, in files, seconds and words, as a canvas of a run."""

import dataclasses
import re

from sorax import inputs, modes
from sorax.errors import UserError
from sorax.generate import legal_shape
from sorax.modes import Canvas, frames_of_seconds
from sorax.runs import Run

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Ask:
    """The flags of `sorax sample` that say what is made; see its help. Files are paths.

    Raises:
        UserError: flags that do not go together.
    """

    size: str = ""
    frames: int = 0
    seconds: float | None = None
    fps: float = 0.0
    image: str = ""
    video: str = ""
    extend: str = ""
    loop: bool = False
    connect: tuple[str, ...] = ()
    strength: float | None = None
    mask: str = ""
    keyframe: tuple[str, ...] = ()

    def __post_init__(self):
        if self.frames and self.seconds is not None:
            raise UserError("--frames and --seconds say the same twice: give one of them")
        if self.seconds is not None:
            frames_of_seconds(self.seconds, 1.0)
        if self.frames < 0 or self.fps < 0:
            raise UserError(f"--frames {self.frames} and --fps {self.fps:g}: give numbers above 0")
        edits = self.strength is not None or bool(self.mask)
        uses = dict(extend=bool(self.extend), loop=self.loop, strength=edits, connect=bool(self.connect))
        asked = [name for name, used in uses.items() if used]
        if len(asked) > 1:
            raise UserError(f"--{asked[0]} and --{asked[1]} are two things to make: ask for one, then for the other")
        if self.video and (not asked or self.connect):
            raise UserError("--video is a clip to go on from: add --extend forward, --extend backward, --loop, "
                            "--strength or --mask")  # fmt: skip
        for name in ("extend", "strength"):
            if uses[name] and not self.video:
                flag = "mask" if name == "strength" and self.mask else name
                raise UserError(f"--{flag} needs a clip: add --video FILE")
        if self.extend and self.extend not in DIRECTIONS:
            raise UserError(f"--extend {self.extend!r}: write forward or backward")
        if asked and (self.image or self.keyframe):
            raise UserError(f"--image and --keyframe begin a video of their own: leave them out with --{asked[0]}")
        if self.frames and (self.extend or self.connect or self.video):
            raise UserError("--frames counts the whole of a new video: with a clip give --seconds")

    @property
    def files(self) -> tuple[str, ...]:
        """Files that it is made of, without masks."""
        keys = tuple(split_time(text)[1] for text in self.keyframe)
        return (*filter(None, (self.image, self.video)), *self.connect, *keys)


def split_time(text: str) -> tuple[str, str]:
    """("48", rest) or ("2.5s", rest) of TIME:REST: a frame, or seconds.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+|\d+(?:\.\d+)?s):(.+)", text, re.DOTALL)
    if not match:
        raise UserError(f"{text!r} has no time: write the number of a frame, as 48:..., or seconds, as 2.5s:...")
    return match[1], match[2]


def frame_at(time: str, fps: float) -> int:
    """Frame of a time as `split_time` returns it."""
    return round(float(time[:-1]) * fps) if time.endswith("s") else int(time)


def prompts_at(shots, fps: float) -> tuple[tuple[int, str], ...]:
    """((frame, prompt), ...) of TIME:PROMPT texts, in order.

    Raises:
        UserError: a time that is none, or comes twice; none at the beginning.
    """
    found = sorted((frame_at(*part[:1], fps), part[1]) for part in map(split_time, shots))
    if len({frame for frame, _ in found}) < len(found) or found[0][0]:
        raise UserError("--shot TIME:PROMPT: the first begins at 0, and each at a time of its own")
    return tuple(found)


def canvas_for(ask: Ask, run: Run, longest_back: int = 0) -> tuple[Canvas, float]:
    """The canvas that is asked for, with notes on what was rounded or cut, and its frames per second.

    Args:
        longest_back: most frames of a new loop that lead back to its beginning; 0: half of it.

    Raises:
        UserError: files, sizes or times that cannot be.
    """
    vae, patch_size = run.networks.vae_config, run.networks.dit_config.patch_size
    usual_frames, *usual, fps = run.usual_shape()
    fps, stride, notes = ask.fps or fps, vae.temporal_stride, []
    height, width = _size(ask, usual, vae.spatial_stride * patch_size[1])
    whole = ask.frames or usual_frames
    if ask.seconds is not None:
        whole = frames_of_seconds(ask.seconds, fps)
    if min(whole, height, width) < 1:
        raise UserError(f"{width}x{height} with {whole} frames is too small: all must be at least 1")
    frames, *size = legal_shape(vae, patch_size, whole, height, width)
    is_new = not (ask.video or ask.connect)
    if [height, width] != size or (is_new and frames != whole):
        what = f"{whole} frames of " if is_new else ""
        made = f"{frames} of " if is_new else ""
        notes.append(f"{what}{width}x{height} are off the grid: making {made}{size[1]}x{size[0]}")
    new = whole if ask.seconds is not None else max(stride, usual_frames // 2)

    def clip(path, seconds=float("inf")):
        found = inputs.Clip(path, fps, *size, seconds=seconds)
        if found.is_cropped:
            notes.append(f"{path} has {found.info.width}x{found.info.height} pixels: it is scaled, and cut at its "
                         f"edges, to {size[1]}x{size[0]}")  # fmt: skip
        return found

    if ask.connect:
        first, second = map(clip, ask.connect)
        canvas = modes.connect(first, second, new, stride)
    elif ask.extend:
        canvas = modes.extend(clip(ask.video), new, stride, backward=ask.extend == "backward")
    elif ask.loop and ask.video:
        canvas = modes.loop(clip(ask.video), new, stride)
    elif ask.loop:
        canvas = modes.loop_of_text(frames, *size, stride, longest_back or frames)
    elif ask.video:
        video = clip(ask.video, float("inf") if ask.seconds is None else ask.seconds)
        holes = inputs.Mask(ask.mask, video) if ask.mask else None
        canvas = modes.edit(video, stride, strength=1.0 if ask.strength is None else ask.strength, holes=holes)
        if holes is not None:
            masked, made = modes.hole_shares(canvas, vae, patch_size)
            if not made:
                raise UserError(f"--mask {ask.mask!r} is black everywhere: paint white what is to be made anew")
            unit = vae.spatial_stride * patch_size[1], vae.spatial_stride * patch_size[2]
            notes.append(f"{100 * masked:.1f} % of the video is masked, {100 * made:.1f} % is made anew: masks are "
                         f"rounded to patches of {unit[1]}x{unit[0]} pixels and {stride} frames")  # fmt: skip
    elif ask.keyframe or ask.image:
        images = {frame_at(split_time(text)[0], fps): clip(split_time(text)[1])[0:1] for text in ask.keyframe}
        if len(images) < len(ask.keyframe) or (ask.image and 0 in images):
            raise UserError("--image and --keyframe give several pictures for one frame: give one for each")
        if ask.image:
            images[0] = clip(ask.image)[0:1]
        canvas = modes.keyframes(images, frames, stride)
    else:
        canvas = modes.text(frames, *size)
    return dataclasses.replace(canvas, notes=(*dict.fromkeys([*notes, *canvas.notes]),)), fps


def _size(ask, usual, multiple):
    if ask.size:
        match = re.fullmatch(r"(\d+)x(\d+)", ask.size)
        if not match:
            raise UserError(f"--size {ask.size!r} is not WxH: write for example --size 48x32")
        return int(match[2]), int(match[1])
    if ask.files:
        return inputs.fitting_size(inputs.inspect(ask.files[0]), usual[0] * usual[1], multiple)
    return usual
