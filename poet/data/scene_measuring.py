"""Looks a media file through once: where its scenes are, and how bright, moving and loud each of them is.

Memory grows by some 300 bytes a picture, so a film of hours is looked through in tens of megabytes.

Legend: N pictures, W windows of sound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poet.data.clips import too_short
from poet.data.listing import Listing
from poet.data.scene_facts import SOUND_SHAPE, FileFacts, SceneFacts
from poet.data.shot_cuts import SHOT_THRESHOLD, ShotCuts
from poet.data.stamps import Stamp, file_stamp
from poet.errors import ConfigError, MediaError, PoetError
from poet.media import HeardSound, SeenPicture, scan_media

__all__ = ["SPLITS", "SurveySettings", "look_through", "stamp_of"]

SPLITS: Final = ("shots", "length")
"""How files are cut into scenes: at shot cuts and then by length, or by length alone."""

_SIDE: Final = 96  # of the small pictures, in pixels
_PARTS, _FINE_PARTS = 8, 16  # along a side
_WINDOWS_A_SECOND: Final = 16
_SILENCE: Final = -100.0
_LOWEST_HERTZ: Final = 60.0
_FLOOR: Final = 80.0  # dB below full scale from which on sounds are alike
_ROUNDING: Final = 1e-6
_GRAY: Final = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurveySettings:
    """How files are looked through.

    Attributes:
        split: one of `SPLITS`; None takes the beginning of each file as its only scene.
        shot_threshold: see `poet.data.shot_cuts`.
        num_frames: of a scene.
        fps: of a scene.
        sample_rate: at which sound is measured.

    Raises:
        ConfigError: an unknown split, or a threshold that cannot be used.
    """

    split: str | None = None
    shot_threshold: float = SHOT_THRESHOLD
    num_frames: int
    fps: float
    sample_rate: int

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise ConfigError(f"films are split by {' or '.join(SPLITS)}, got {self.split!r}.")
        if self.split == "shots":
            ShotCuts(self.shot_threshold)  # says what is wrong before any file is opened

    @property
    def scene_seconds(self) -> float:
        """How long a scene lasts."""
        return self.num_frames / self.fps


def stamp_of(listed: Listing) -> Stamp:
    """The stamps of a clip's file and of the files that may hold its caption."""
    return tuple(number for place in (listed.path, *listed.captions) for number in file_stamp(place))


def look_through(listed: Listing, settings: SurveySettings, stamp: Stamp) -> FileFacts:
    """Look a file through, but for its caption. What is wrong with it becomes its `problem`; nothing is raised."""
    try:
        if listed.problem is not None:
            raise MediaError(listed.problem)
        return _look_through(listed, settings, stamp)
    except PoetError as error:
        return FileFacts(key=listed.key, stamp=stamp, problem=str(error))


def _look_through(listed: Listing, settings: SurveySettings, stamp: Stamp) -> FileFacts:
    length = settings.scene_seconds
    pictures, sounds = _Pictures(), _Sounds(settings.sample_rate)
    cuts = ShotCuts(settings.shot_threshold) if settings.split == "shots" else None
    needed = Fraction(length) if settings.split is None else None
    with contextlib.closing(
        scan_media(listed.path, height=_SIDE, width=_SIDE, sample_rate=settings.sample_rate, duration=needed)
    ) as found:
        for one in found:
            if isinstance(one, SeenPicture):
                pictures.add(one)
                if cuts is not None:
                    cuts.add(float(one.time), one.pixels)
            else:
                sounds.add(one)
    has_picture, has_sound = pictures.end is not None, sounds.end is not None
    end = pictures.end if pictures.end is not None else sounds.end
    assert end is not None
    times = cuts.times if cuts is not None else []
    # A last frame may last half as long as one of the scene's; sound alone may be shorter than a scene.
    end_of_scenes = end + 0.5 / settings.fps if has_picture else max(end, length)
    starts = _cut(times, end_of_scenes, length)
    if settings.split is None:
        starts = starts[:1]
    if not starts and settings.split is None:
        found_frames = math.floor(end * settings.fps + 0.5)
        raise too_short(listed.path, settings.num_frames, settings.fps, found_frames)
    if not starts:
        raise MediaError(
            f"{listed.path}: none of its {len(times) + 1} shots lasts the {length:g} s of a scene. Leave it out, or "
            "split by length alone."
        )
    scenes = []
    for start in starts:
        loudness, sound = sounds.measure(start, length)
        seen = pictures.measure(start, length, settings.fps)
        scenes.append(dataclasses.replace(seen, loudness=loudness, sound=sound))
    return FileFacts(
        key=listed.key,
        stamp=stamp,
        duration=round(end, 3),
        has_picture=has_picture,
        has_sound=has_sound,
        num_cuts=len(times),
        left_over=0.0 if settings.split is None else round(max(0.0, end - len(starts) * length), 3),
        scenes=tuple(scenes),
    )


def _cut(times: Sequence[float], end: float, length: float) -> list[float]:
    """Where scenes begin, each wholly within a shot."""
    starts: list[float] = []
    for begin, stop in itertools.pairwise([0.0, *sorted({time for time in times if 0 < time < end}), end]):
        count = math.floor((stop - begin + _ROUNDING) / length)
        starts += [begin + number * length for number in range(count)]
    return starts


class _Pictures:
    """Keeps 8 x 8 colours of each picture, and how much each differs from the one before."""

    def __init__(self) -> None:
        self.end: float | None = None
        self._times: list[float] = []
        self._colours = bytearray()
        self._changes: list[float] = []
        self._before: NDArray[np.float32] | None = None

    def add(self, seen: SeenPicture) -> None:
        edge = _SIDE // _FINE_PARTS
        fine = seen.pixels.reshape(_FINE_PARTS, edge, _FINE_PARTS, edge, 3).mean((1, 3), dtype=np.float32)
        self._changes.append(0.0 if self._before is None else float(np.abs(fine - self._before).max()))
        self._before = fine
        edge = _FINE_PARTS // _PARTS
        self._colours += np.rint(fine.reshape(_PARTS, edge, _PARTS, edge, 3).mean((1, 3))).astype(np.uint8).tobytes()
        self._times.append(float(seen.time))
        self.end = float(seen.end)

    def measure(self, start: float, length: float, fps: float) -> SceneFacts:
        if not self._times:
            return SceneFacts(start=start)
        times = np.asarray(self._times)
        # As in reading, a picture is shown where it is the nearest, so the first may have come before the scene.
        ticks = [start, start + length / 2, start + length - 1 / fps]
        shown = np.searchsorted((times[:-1] + times[1:]) / 2, ticks)
        first, stop = int(shown[0]), int(shown[-1]) + 1
        colours = np.frombuffer(self._colours, np.uint8).reshape(-1, _PARTS, _PARTS, 3)
        inside = colours[first:stop].astype(np.float32)
        brightest = (inside @ _GRAY).max((1, 2))
        drift = float(np.abs(inside - inside[0]).max())
        jumps = max(self._changes[first + 1 : stop], default=0.0)
        return SceneFacts(
            start=start,
            brightness=float(np.median(brightest)),
            change=max(drift, jumps),
            picture=colours[shown].copy(),
        )


class _Sounds:
    """Keeps the power of each sixteenth of a second, as a whole and in bands a third of an octave wide."""

    def __init__(self, sample_rate: int) -> None:
        self.end: float | None = None
        self._rate = sample_rate
        self._size = max(32, sample_rate // _WINDOWS_A_SECOND)
        self._waiting = np.zeros(0, np.float32)
        self._place = 0  # of the first waiting sample
        self._powers: dict[int, tuple[float, NDArray[np.float32]]] = {}
        hertz = np.fft.rfftfreq(self._size, 1 / sample_rate)
        edges = np.geomspace(_LOWEST_HERTZ, sample_rate / 2, SOUND_SHAPE[1] + 1)
        self._band_of = np.clip(np.searchsorted(edges, hertz, "right") - 1, 0, SOUND_SHAPE[1] - 1)
        self._taper = np.hanning(self._size).astype(np.float32)

    def add(self, heard: HeardSound) -> None:
        if self.end is None or abs(float(heard.time) - self.end) > _ROUNDING:
            self._place, self._waiting = round(float(heard.time) * self._rate), np.zeros(0, np.float32)
        self.end = float(heard.end)
        self._waiting = np.concatenate([self._waiting, heard.samples])
        while True:
            number = -(-self._place // self._size)  # the first window that begins here or later
            skipped = number * self._size - self._place
            if len(self._waiting) < skipped + self._size:
                return
            self._take(number, self._waiting[skipped : skipped + self._size])
            self._waiting = self._waiting[skipped + self._size :]
            self._place += skipped + self._size

    def _take(self, number: int, window: NDArray[np.float32]) -> None:
        spectrum = np.abs(np.fft.rfft(window * self._taper)) ** 2 * (4 / self._size**2)
        bands = np.bincount(self._band_of, spectrum, SOUND_SHAPE[1]).astype(np.float32)
        self._powers[number] = float(np.mean(window.astype(np.float64) ** 2)), bands

    def measure(self, start: float, length: float) -> tuple[float | None, NDArray[np.uint8] | None]:
        """`loudness` and `sound` of a scene; None for a file without sound."""
        if self.end is None:
            return None, None
        window = self._size / self._rate
        quarters, loudest = [], 0.0
        for quarter in range(SOUND_SHAPE[0]):
            begin = start + quarter * length / SOUND_SHAPE[0]
            numbers = range(round(begin / window), max(round((begin + length / SOUND_SHAPE[0]) / window), 1))
            inside = [self._powers[number] for number in numbers if number in self._powers]
            loudest = max([loudest, *(power for power, _ in inside)])
            bands = np.mean([bands for _, bands in inside], axis=0) if inside else np.zeros(SOUND_SHAPE[1])
            quarters.append(10 * np.log10(np.maximum(bands, 1e-12)))
        sound = np.rint(np.clip(np.stack(quarters) + _FLOOR, 0, _FLOOR)).astype(np.uint8)
        return max(_SILENCE, 10 * math.log10(max(loudest, 1e-12))), sound
