"""Toybox: a small audiovisual world drawn by this file. One object, one motion, one sound, one English sentence.

Clip `index` of a split is a pure function of (split, index), so nothing has to be stored. Pictures are 64 x 64 RGB at
8 frames a second, sound is mono at 16 kHz, 2,000 samples a video frame. Sizes and positions are in pixels with the
origin at the top left corner; pixel i covers [i, i + 1). This file draws; it does not know any tokenizer, and the judge
(`poet.evaluation.judge`) does not know this file.

Legend: N frames, H x W pixels, S samples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from poet.data.toybox_captions import caption_for
from poet.data.toybox_concept import CONCEPT, CONCEPT_SPLIT, PURPLE, inside_hexagon, is_concept, tremolo
from poet.errors import ConfigError
from poet.media import Clip

__all__ = [
    "ATTRIBUTE_VALUES",
    "BACKGROUNDS",
    "COLOURS",
    "FPS",
    "NUM_FRAMES",
    "NUM_SAMPLES",
    "PITCHES",
    "RESOLUTION",
    "SAMPLE_RATE",
    "SIZES",
    "SPLITS",
    "Attributes",
    "ToyboxClip",
    "Trajectory",
    "draw",
    "draw_frames",
    "draw_scene",
    "draw_sound",
    "go_on",
    "is_held_out",
    "move",
    "scale_of",
]

FPS: Final = 8
NUM_FRAMES: Final = 17
RESOLUTION: Final = 64
SAMPLE_RATE: Final = 16_000
NUM_SAMPLES: Final = NUM_FRAMES * SAMPLE_RATE // FPS

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 50, 210),
    "cyan": (50, 210, 220),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "black": (0, 0, 0),
    "navy": (10, 15, 60),
    "maroon": (60, 10, 20),
    "gray": (70, 70, 70),
}
SIZES: Final[dict[str, float]] = {"small": 7.0, "large": 12.0}
PITCHES: Final[dict[str, float]] = {"low": 220.0, "middle": 440.0, "high": 880.0}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
MOTIONS: Final = (
    "moves right",
    "moves left",
    "rises",
    "falls",
    "bounces",
    "circles",
    "stays still",
    "grows",
    "shrinks",
)
TIMBRES: Final = ("flute", "buzzer", "string", "bell", "silent")
ATTRIBUTE_VALUES: Final[dict[str, tuple[str, ...]]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
    "motion": MOTIONS,
    "timbre": TIMBRES,
    "pitch": tuple(PITCHES),
}
SPLITS: Final = ("train", "seen", "unseen")
"""Of the base world; beside them `draw` knows the concept's split."""

_PAINTS = COLOURS | {CONCEPT["colour"]: PURPLE}
_TRAVEL = 24.0  # pixels that a moving object covers in the clip at nominal speed
_SPEEDS = (0.6, 1.4)  # lowest and highest share of the nominal speed
_CIRCLE_RADIUS = 11.0
_BOUNCE_PERIOD = 0.8  # seconds between floor contacts at nominal speed
_BOUNCE_HEIGHT = 28.0
_MARGIN = 1.0  # pixels that stay free between the object and the frame's edge
_TRIES = 64  # of a way on that stays inside the frame
_SUPERSAMPLING = 4
_NOTE_INTERVAL = 0.5  # seconds between plucks of the string and strikes of the bell
_NOTE_DECAY = 0.15  # seconds, of the note that a bounce strikes
_PEAK = 0.8
_OVERSAMPLING = 1.5  # of the string's delay line against the sound's sample rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes:
    """What a caption says of a clip. The pitch of a silent clip is drawn like any other but never heard or said."""

    colour: str
    shape: str
    size: str
    background: str
    motion: str
    timbre: str
    pitch: str

    def __post_init__(self) -> None:
        whole = is_concept(self.as_dict())
        for name, values in ATTRIBUTE_VALUES.items():
            if getattr(self, name) not in values and not (whole and name in CONCEPT):
                raise ConfigError(
                    f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}. "
                    f"The concept's {', '.join(CONCEPT.values())} come all together or not at all."
                )

    def as_dict(self) -> dict[str, str]:
        """Attribute name to value, in the order of `ATTRIBUTE_VALUES`."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Where the object is. All arrays have one entry a video frame.

    Attributes:
        x, y: (N,) centre of the object in pixels.
        half_width: (N,) half the object's width in pixels.
        contacts: times in seconds at which a bouncing object touches the floor; empty for other motions.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    half_width: NDArray[np.float64]
    contacts: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyboxClip:
    """One drawn clip with the truth about it."""

    key: str
    attributes: Attributes
    trajectory: Trajectory
    loudness: float
    caption: str
    clip: Clip


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether this combination never occurs in training; about one in ten is."""
    return zlib.crc32(f"{shape}|{colour}|{motion}".encode()) % 10 == 0


def draw(split: str, index: int, resolution: int = RESOLUTION) -> ToyboxClip:
    """Draw clip `index` of `split` ("train", "seen", "unseen" or "concept") with picture, sound and caption.

    Args:
        split: its name.
        index: counted from 0.
        resolution: pixels of height and width, a multiple of 64; the same scene with finer edges.

    Raises:
        ConfigError: unknown split, negative index, or a resolution that is no multiple of 64.
    """
    plan = _plan(split, index)
    clip = _draw_plan(plan, resolution)
    return ToyboxClip(
        key=f"{split}-{index:07d}",
        attributes=plan.attributes,
        trajectory=plan.trajectory,
        loudness=plan.loudness,
        caption=plan.caption,
        clip=clip,
    )


def draw_scene(attributes: Attributes, trajectory: Trajectory, loudness: float, resolution: int = RESOLUTION) -> Clip:
    """Draw picture and sound of a plan of one's own.

    Args:
        attributes: of the object and its sound.
        trajectory: of the object, NUM_FRAMES long.
        loudness: from 0 to 1.
        resolution: see `draw`.

    Raises:
        ConfigError: as `draw`.
    """
    return _draw_plan(_Plan(attributes=attributes, trajectory=trajectory, loudness=loudness, caption=""), resolution)


def draw_frames(split: str, index: int, resolution: int = RESOLUTION) -> NDArray[np.uint8]:
    """The picture alone of clip `index`: (N, H, W, 3) uint8; arguments and errors as of `draw`."""
    return _render(_plan(split, index), resolution)


def draw_sound(split: str, index: int) -> NDArray[np.float32]:
    """The sound alone of clip `index`: (S,) float32 in [-1, 1]."""
    return _synthesise(_plan(split, index))


class ToyboxSource:
    """A range of clips of one split as a source for `poet encode`.

    Args:
        split: "train", "seen", "unseen" or "concept".
        count: number of clips.
        start: index of the first.
        resolution: see `draw`.
    """

    def __init__(self, split: str, count: int, start: int = 0, resolution: int = RESOLUTION) -> None:
        if count < 1 or start < 0:
            raise ConfigError(f"a Toybox source needs count >= 1 and start >= 0, got count={count}, start={start}.")
        _plan(split, start)
        scale_of(resolution)
        self.split, self.count, self.start, self.resolution = split, count, start, resolution
        self.name = f"toybox:{split}?start={start}" + ("" if resolution == RESOLUTION else f"&resolution={resolution}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ToyboxClip:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return draw(self.split, self.start + index, self.resolution)

    def frames(self, index: int) -> NDArray[np.uint8]:
        """The picture alone of clip `index`: (N, H, W, 3) uint8; faster where the sound is not wanted."""
        return draw_frames(self.split, self.start + index, self.resolution)

    def caption(self, index: int) -> str:
        """The caption alone of clip `index`."""
        return _plan(self.split, self.start + index).caption

    def sound(self, index: int) -> NDArray[np.float32]:
        """The sound alone of clip `index`: (S,) float32 in [-1, 1]."""
        return draw_sound(self.split, self.start + index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    attributes: Attributes
    trajectory: Trajectory
    loudness: float
    caption: str


def _draw_plan(plan: _Plan, resolution: int) -> Clip:
    return Clip(frames=_render(plan, resolution), fps=float(FPS), samples=_synthesise(plan), sample_rate=SAMPLE_RATE)


def _plan(split: str, index: int) -> _Plan:
    if split not in (*SPLITS, CONCEPT_SPLIT):
        raise ConfigError(f"a Toybox split must be one of {', '.join((*SPLITS, CONCEPT_SPLIT))}; got {split!r}.")
    if index < 0:
        raise ConfigError(f"a clip's index must not be negative, got {index}.")
    rng = np.random.default_rng([zlib.crc32(split.encode()), index])
    while True:
        values = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTE_VALUES.items()}
        held_out = is_held_out(values["shape"], values["colour"], values["motion"])
        if split == CONCEPT_SPLIT or held_out == (split == "unseen"):
            break
    attributes = Attributes(**(values | CONCEPT if split == CONCEPT_SPLIT else values))
    trajectory = move(attributes, rng)
    loudness = float(rng.uniform(0.5, 1.0))
    return _Plan(
        attributes=attributes, trajectory=trajectory, loudness=loudness, caption=caption_for(attributes.as_dict(), rng)
    )


# ---------------------------------------------------------------------------------------------------------- picture


def move(attributes: Attributes, rng: np.random.Generator) -> Trajectory:
    """The object's track: start, speed and phase are drawn so that it stays inside the frame for the whole clip."""
    seconds = np.arange(NUM_FRAMES) / FPS
    share = seconds / seconds[-1]
    radius = SIZES[attributes.size]
    low, high = radius + _MARGIN, RESOLUTION - _MARGIN - radius
    speed = rng.uniform(*_SPEEDS)
    half_width = np.full(NUM_FRAMES, radius)
    motion = attributes.motion
    if motion == "circles":
        centre = rng.uniform(low + _CIRCLE_RADIUS, high - _CIRCLE_RADIUS, size=2)
        angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * speed * share
        x, y = centre[0] + _CIRCLE_RADIUS * np.cos(angle), centre[1] + _CIRCLE_RADIUS * np.sin(angle)
        return Trajectory(x=x, y=y, half_width=half_width)
    if motion == "bounces":
        period = _BOUNCE_PERIOD / speed
        phase, contacts = _bounce_phase(period, rng)
        cycle = (seconds / period + phase) % 1.0
        y = high - _BOUNCE_HEIGHT * 4 * cycle * (1 - cycle)
        return Trajectory(x=np.full(NUM_FRAMES, rng.uniform(low, high)), y=y, half_width=half_width, contacts=contacts)
    x, y = np.full(NUM_FRAMES, rng.uniform(low, high)), np.full(NUM_FRAMES, rng.uniform(low, high))
    travel = _TRAVEL * speed
    if motion in ("moves right", "moves left"):
        x = rng.uniform(low, high - travel) + travel * (share if motion == "moves right" else 1 - share)
    elif motion in ("falls", "rises"):
        y = rng.uniform(low, high - travel) + travel * (share if motion == "falls" else 1 - share)
    elif motion in ("grows", "shrinks"):
        smallest = 1 - 0.5 * speed
        half_width = radius * (smallest + (1 - smallest) * (share if motion == "grows" else 1 - share))
    return Trajectory(x=x, y=y, half_width=half_width)


def go_on(motion: str, size: str, before: Trajectory, rng: np.random.Generator) -> Trajectory | None:
    """A track that begins where and as large as another ended.

    Args:
        motion: of the new one.
        size: of the object.
        before: the other.
        rng: draws speed, and the way where there is a choice.

    Returns:
        The track, or None where there is none: it would leave the frame, or what has shrunk would not grow.
    """
    x, y, half_width = (float(part[-1]) for part in (before.x, before.y, before.half_width))
    radius = SIZES[size]
    low, high = radius + _MARGIN, RESOLUTION - _MARGIN - radius
    if (half_width < radius - 1e-6) != (motion == "grows"):
        return None
    seconds = np.arange(NUM_FRAMES) / FPS
    share = seconds / seconds[-1]
    still = Trajectory(x=np.full(NUM_FRAMES, x), y=np.full(NUM_FRAMES, y), half_width=np.full(NUM_FRAMES, radius))
    speed = float(rng.uniform(*_SPEEDS))
    if motion == "stays still":
        return still
    if motion in ("grows", "shrinks"):
        smallest = half_width / radius if motion == "grows" else 1 - 0.5 * speed
        growth = share if motion == "grows" else 1 - share
        return dataclasses.replace(still, half_width=radius * (smallest + (1 - smallest) * growth))
    if motion == "circles":
        for angle in rng.uniform(0, 2 * np.pi, _TRIES):
            centre = np.array([x, y]) - _CIRCLE_RADIUS * np.array([np.cos(angle), np.sin(angle)])
            if (centre >= low + _CIRCLE_RADIUS).all() and (centre <= high - _CIRCLE_RADIUS).all():
                turned = angle + 2 * np.pi * speed * share
                x_n, y_n = centre[0] + _CIRCLE_RADIUS * np.cos(turned), centre[1] + _CIRCLE_RADIUS * np.sin(turned)
                return dataclasses.replace(still, x=x_n, y=y_n)
        return None
    if motion == "bounces":
        return _bounce_from(x, y, high, radius, rng)
    place, sign = {"moves right": (x, 1), "moves left": (x, -1), "falls": (y, 1), "rises": (y, -1)}[motion]
    room = (high - place if sign > 0 else place - low) / _TRAVEL
    if room < _SPEEDS[0]:
        return None
    moved = place + sign * _TRAVEL * min(speed, room) * share
    return dataclasses.replace(still, **{"x" if motion.startswith("moves") else "y": moved})


def _bounce_from(x: float, y: float, high: float, radius: float, rng: np.random.Generator) -> Trajectory | None:
    """A bounce that begins at a height, falling or rising; None from above its highest place."""
    height = (high - y) / _BOUNCE_HEIGHT
    if not -1e-6 <= height <= 1:
        return None
    root = math.sqrt(max(0.0, 1 - height))
    seconds = np.arange(NUM_FRAMES) / FPS
    for _ in range(_TRIES):
        phase = (1 + (root if rng.random() < 0.5 else -root)) / 2
        period = _BOUNCE_PERIOD / float(rng.uniform(*_SPEEDS))
        contacts = _contacts(phase, period)
        if contacts is not None:
            cycle = (seconds / period + phase) % 1.0
            track = high - _BOUNCE_HEIGHT * 4 * cycle * (1 - cycle)
            return Trajectory(
                x=np.full(NUM_FRAMES, x), y=track, half_width=np.full(NUM_FRAMES, radius), contacts=contacts
            )
    return None


def _bounce_phase(period: float, rng: np.random.Generator) -> tuple[float, tuple[float, ...]]:
    """A phase whose floor contacts all lie where a frame before and after shows them, and those contacts in seconds."""
    while True:
        phase = float(rng.uniform(0.0, 1.0))
        contacts = _contacts(phase, period)
        if contacts is not None:
            return phase, contacts


def _contacts(phase: float, period: float) -> tuple[float, ...] | None:
    """Floor contacts in seconds; None where there are none, or where the first or last frame is too near to one."""
    times = [(k - phase) * period for k in range(1, 1 + math.ceil(NUM_FRAMES / FPS / period + phase))]
    times = [time for time in times if time < NUM_FRAMES / FPS]
    last_frame = (NUM_FRAMES - 1) / FPS
    return tuple(times) if times and times[0] > 0.05 and times[-1] < last_frame - 0.05 else None


def scale_of(resolution: int) -> int:
    """Pixels of a clip for one of the plan's.

    Raises:
        ConfigError: the resolution is no multiple of 64.
    """
    if resolution < RESOLUTION or resolution % RESOLUTION:
        raise ConfigError(f"a Toybox clip's resolution must be a multiple of {RESOLUTION}, got {resolution}.")
    return resolution // RESOLUTION


def _render(plan: _Plan, resolution: int) -> NDArray[np.uint8]:
    """Draw the frames with 4 x 4 samples a pixel. Only a patch around the object is sampled."""
    scale = scale_of(resolution)
    x, y, half_width = (scale * part for part in (plan.trajectory.x, plan.trajectory.y, plan.trajectory.half_width))
    background = np.array(BACKGROUNDS[plan.attributes.background], np.float32)
    colour = np.array(_PAINTS[plan.attributes.colour], np.float32)
    patch = 2 * math.ceil(float(half_width.max())) + 4
    left = np.clip(np.floor(x - patch / 2), 0, resolution - patch).astype(np.int64)
    top = np.clip(np.floor(y - patch / 2), 0, resolution - patch).astype(np.int64)
    offsets = (np.arange(patch * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    u = ((left - x)[:, None] + offsets) / half_width[:, None]
    v = ((top - y)[:, None] + offsets) / half_width[:, None]
    inside = _inside(plan.attributes.shape, u[:, None, :].astype(np.float32), v[:, :, None].astype(np.float32))
    cells = inside.reshape(NUM_FRAMES, patch, _SUPERSAMPLING, patch, _SUPERSAMPLING)
    coverage = cells.mean(axis=(2, 4), dtype=np.float32)[..., None]
    frames = np.empty((NUM_FRAMES, resolution, resolution, 3), np.uint8)
    frames[:] = background.astype(np.uint8)
    pixels = np.rint(background + coverage * (colour - background)).astype(np.uint8)
    for n in range(NUM_FRAMES):
        frames[n, top[n] : top[n] + patch, left[n] : left[n] + patch] = pixels[n]
    return frames


def _inside(shape: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points lie inside a shape of half-width 1 around the origin; u to the right, v downwards."""
    if shape == CONCEPT["shape"]:
        return inside_hexagon(u, v)
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "triangle":
        return (v <= 1) & (2 * abs(u) <= v + 1)
    if shape == "cross":
        thickness = 0.36
        across, along = (abs(v) <= thickness) & (abs(u) <= 1), (abs(u) <= thickness) & (abs(v) <= 1)
        return across | along
    inner = 0.42
    sector = 2 * np.pi / 5
    angle = abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    radius = np.sqrt(u * u + v * v)
    notch_x, notch_y = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    return (1 - notch_x) * radius * np.sin(angle) <= notch_y * (1 - radius * np.cos(angle))


# ------------------------------------------------------------------------------------------------------------ sound


def _synthesise(plan: _Plan) -> NDArray[np.float32]:
    """The sound that belongs to the picture: (S,) float32 with peaks of at most 0.8."""
    attributes, track = plan.attributes, plan.trajectory
    if attributes.timbre == "silent":
        return np.zeros(NUM_SAMPLES, np.float32)
    time = np.arange(NUM_SAMPLES) / SAMPLE_RATE
    share = np.minimum(time / ((NUM_FRAMES - 1) / FPS), NUM_FRAMES / (NUM_FRAMES - 1))
    frequency = np.full(NUM_SAMPLES, PITCHES[attributes.pitch])
    if attributes.motion in ("rises", "falls"):
        direction = 1 if attributes.motion == "rises" else -1
        frequency = frequency * 2 ** (direction * (share - 0.5))
    if attributes.motion == "bounces":
        onsets: tuple[float, ...] = track.contacts
    elif attributes.timbre in ("string", "bell"):
        onsets = tuple(np.arange(0, NUM_SAMPLES / SAMPLE_RATE, _NOTE_INTERVAL))
    else:
        onsets = (0.0,)
    sound = np.zeros(NUM_SAMPLES)
    starts = [round(onset * SAMPLE_RATE) for onset in onsets]
    for start, end in zip(starts, [*starts[1:], NUM_SAMPLES], strict=True):
        note = _note(attributes.timbre, frequency[start:end])
        if attributes.motion == "bounces":
            note = note * np.exp(-np.arange(end - start) / (SAMPLE_RATE * _NOTE_DECAY))
        sound[start:end] = note * _edges(end - start)
    if attributes.motion in ("grows", "shrinks"):
        widths = track.half_width
        relative = (widths - widths.min()) / (widths.max() - widths.min())
        sound *= np.interp(time, np.arange(NUM_FRAMES) / FPS, 0.15 + 0.85 * relative)
    return (sound * (_PEAK * plan.loudness)).astype(np.float32)


def _edges(length: int) -> NDArray[np.float64]:
    """A gain that rises and falls within 4 ms, so that no note clicks at its ends."""
    ramp = min(64, max(1, length // 4))
    gain = np.ones(length)
    gain[:ramp] = np.linspace(0, 1, ramp)
    gain[-ramp:] *= np.linspace(1, 0, ramp)
    return gain


def _note(timbre: str, frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """One note that follows `frequency` (Hz, a value a sample), with peaks near 1."""
    if timbre == CONCEPT["timbre"]:
        return _note("buzzer", frequency) * tremolo(len(frequency), SAMPLE_RATE)
    cycles = np.cumsum(frequency) / SAMPLE_RATE
    phase = 2 * np.pi * cycles
    if timbre == "flute":
        return (np.sin(phase) + 0.2 * np.sin(2 * phase)) / 1.15
    if timbre == "buzzer":
        highest = int(0.45 * SAMPLE_RATE / frequency.max())
        harmonics = np.arange(1, highest + 1)[:, None]
        return np.asarray((np.sin(harmonics * phase) / harmonics).sum(axis=0) / 1.85)
    if timbre == "bell":
        time = np.arange(len(frequency)) / SAMPLE_RATE
        partials = ((1.0, 1.0, 0.45), (2.76, 0.55, 0.3), (5.40, 0.3, 0.2), (8.93, 0.15, 0.12))
        audible = [partial for partial in partials if partial[0] * frequency.max() < 0.45 * SAMPLE_RATE]
        struck = [level * np.sin(ratio * phase) * np.exp(-time / decay) for ratio, level, decay in audible]
        return np.sum(struck, axis=0) / 2.0
    pluck = _pluck(round(_OVERSAMPLING * SAMPLE_RATE / float(np.exp(np.log(frequency).mean()))))
    position = cycles * pluck.period
    note: NDArray[np.float64] = np.interp(position, np.arange(len(pluck.samples)), pluck.samples)
    return note


@dataclasses.dataclass(frozen=True)
class _Pluck:
    samples: NDArray[np.float32]
    period: float  # samples a cycle


@functools.lru_cache(maxsize=256)
def _pluck(delay: int) -> _Pluck:
    """A Karplus-Strong pluck on a delay line of `delay` samples; always the same burst, so a string sounds alike.

    Source: Karplus and Strong, "Digital synthesis of plucked-string and drum timbres", Computer Music Journal 7(2).
    """
    burst = np.random.default_rng(0).uniform(-1, 1, delay)
    excitation = np.zeros(math.ceil(1.6 * _OVERSAMPLING * NUM_SAMPLES))
    excitation[:delay] = burst - burst.mean()
    loss = math.exp(-5.0 * delay / (_OVERSAMPLING * SAMPLE_RATE))
    feedback = np.zeros(delay + 2)
    feedback[0], feedback[delay], feedback[delay + 1] = 1, -0.5 * loss, -0.5 * loss
    samples = lfilter([1.0], feedback, excitation)
    return _Pluck(samples=(samples / np.abs(samples).max()).astype(np.float32), period=delay + 0.5)
