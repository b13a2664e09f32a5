"""Which scenes are worth keeping: not black, frozen, silent or seen before. Decides by numbers, never by pixels.

Two scenes are duplicates if their first, middle and last pictures, in 8 x 8 colours each, differ by little in root mean
square, and their sounds too, in 24 bands of four quarters; so the same film at another size or compression is one, and
the same picture with another sound is none. The first of them is kept.

Legend: D numbers of a fingerprint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poet.data.clips import check_requirements, missing_parts
from poet.data.scene_facts import PICTURE_SHAPE, FileFacts, SceneFacts
from poet.errors import ConfigError

__all__ = ["DROPS", "Choice", "ChosenScene", "DropSettings", "DroppedScene", "choose_scenes"]

DROPS: Final = ("black", "frozen", "silent", "duplicate")
"""Tests, in the order in which they are made; a scene is dropped by the first that it fails."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropSettings:
    """Which scenes are dropped.

    Attributes:
        drops: some of `DROPS`.
        black_level: a scene is black if no part (one of 8 x 8) of its median picture is brighter; 0 to 255.
        frozen_level: frozen if no part of its picture changes by more; 0 to 255.
        silent_level: silent if no sixteenth of a second is louder, in dB of full scale; a scene without sound is.
        duplicate_level: a duplicate of an earlier one if their pictures differ by no more, in root mean square of 0
            to 255.
        duplicate_decibels: and their sounds by no more, in root mean square of dB.
        required: files without one of these are left out; see `poet.data.clips`.
        caption: of files that have none of their own.

    Raises:
        ConfigError: an unknown test, or a level out of range.
    """

    drops: Collection[str] = ()
    black_level: float = 24.0
    frozen_level: float = 2.0
    silent_level: float = -60.0
    duplicate_level: float = 4.0
    duplicate_decibels: float = 6.0
    required: Collection[str] = ()
    caption: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.drops) - set(DROPS))
        if unknown:
            raise ConfigError(f"scenes can be dropped that are {', '.join(DROPS)}; got {', '.join(unknown)}.")
        check_requirements(self.required)
        for name in ("black_level", "frozen_level", "duplicate_level"):
            if not 0 <= getattr(self, name) <= 255:
                raise ConfigError(f"{name} must be in 0 to 255, got {getattr(self, name)}.")
        if not -100 <= self.silent_level <= 0:
            raise ConfigError(f"silent_level must be in -100 to 0 dB of full scale, got {self.silent_level}.")
        if not 0 <= self.duplicate_decibels <= 100:
            raise ConfigError(f"duplicate_decibels must be in 0 to 100 dB, got {self.duplicate_decibels}.")

    @property
    def levels(self) -> dict[str, float]:
        """Test -> its threshold, for those tests that are made."""
        known = dict(
            zip(DROPS, (self.black_level, self.frozen_level, self.silent_level, self.duplicate_level), strict=True)
        )
        return {name: known[name] for name in DROPS if name in self.drops}


@dataclasses.dataclass(frozen=True)
class ChosenScene:
    """A scene to keep: number of its file, where it begins, and its caption."""

    file: int
    start: float
    caption: str | None


@dataclasses.dataclass(frozen=True)
class DroppedScene:
    """A scene to drop: number of its file, where it begins, which test it failed, by what measure, and for a
    duplicate the scene that is kept in its place.
    """

    file: int
    start: float
    reason: str
    measure: float
    original: ChosenScene | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What became of all files.

    Attributes:
        chosen: scenes to encode, in order.
        dropped: scenes that failed a test, in order.
        unusable: number of a file -> why nothing of it is used.
    """

    chosen: tuple[ChosenScene, ...]
    dropped: tuple[DroppedScene, ...]
    unusable: dict[int, str]


def choose_scenes(files: Sequence[FileFacts], settings: DropSettings) -> Choice:
    """Choose among the scenes of all files; the same files give the same choice."""
    chosen: list[ChosenScene] = []
    dropped: list[DroppedScene] = []
    unusable: dict[int, str] = {}
    seen = _Seen(settings.duplicate_level, settings.duplicate_decibels)
    for number, file in enumerate(files):
        caption = file.caption if file.caption is not None else settings.caption
        missing = missing_parts(file.has_picture, file.has_sound, caption) & set(settings.required)
        if file.problem is not None:
            unusable[number] = file.problem
        elif missing:
            unusable[number] = (
                f"{file.key}: has no {' and no '.join(sorted(missing))}, which is required. Add it, or ask for less."
            )
        else:
            for scene in file.scenes:
                kept = ChosenScene(number, scene.start, caption)
                failed = _fails(scene, settings)
                if failed is None and "duplicate" in settings.drops:
                    like = seen.find(scene)
                    if like is None:
                        seen.add(scene, len(chosen))
                    else:
                        dropped.append(DroppedScene(number, scene.start, "duplicate", like[1], chosen[like[0]]))
                        continue
                if failed is None:
                    chosen.append(kept)
                else:
                    dropped.append(DroppedScene(number, scene.start, *failed))
    return Choice(chosen=tuple(chosen), dropped=tuple(dropped), unusable=unusable)


def _fails(scene: SceneFacts, settings: DropSettings) -> tuple[str, float] | None:
    """The first test of a single scene that it fails, and the measure."""
    if "black" in settings.drops and scene.brightness is not None and scene.brightness <= settings.black_level:
        return "black", scene.brightness
    if "frozen" in settings.drops and scene.change is not None and scene.change <= settings.frozen_level:
        return "frozen", scene.change
    loudness = -100.0 if scene.loudness is None else scene.loudness
    if "silent" in settings.drops and loudness <= settings.silent_level:
        return "silent", loudness
    return None


class _Seen:
    """Fingerprints of the scenes that were kept, found by nearness.

    The distance of two fingerprints is at least that of their averages. So those of a similar average brightness are
    compared by nine averages (three pictures, three colours) first, and what is left in full.
    """

    def __init__(self, level: float, decibels: float) -> None:
        self._level, self._decibels = level, decibels
        self._shelves: dict[tuple[bool, bool, int], _Shelf] = {}

    def find(self, scene: SceneFacts) -> tuple[int, float] | None:
        """Number and distance of the first scene that this one is a duplicate of."""
        averages, numbers = _fingerprint(scene)
        place, reach = self._place(scene, averages), math.ceil(self._level)
        found: list[tuple[int, float]] = []
        for step in range(-reach - 1, reach + 2):
            shelf = self._shelves.get((*place[:2], place[2] + step))
            if shelf is not None:
                found += shelf.find(averages, numbers, scene.sound, self._level, self._decibels)
        return min(found, default=None)

    def add(self, scene: SceneFacts, number: int) -> None:
        averages, numbers = _fingerprint(scene)
        shelf = self._shelves.setdefault(self._place(scene, averages), _Shelf(len(numbers)))
        shelf.add(number, averages, numbers, scene.sound)

    def _place(self, scene: SceneFacts, averages: NDArray[np.float32]) -> tuple[bool, bool, int]:
        return scene.picture is not None, scene.sound is not None, int(averages.mean())


def _fingerprint(scene: SceneFacts) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(9,) averages and (D,) numbers of the picture; zeros and none where there is no picture."""
    if scene.picture is None:
        return np.zeros(PICTURE_SHAPE[0] * PICTURE_SHAPE[3], np.float32), np.zeros(0, np.uint8)
    return scene.picture.mean((1, 2), dtype=np.float32).reshape(-1), scene.picture.reshape(-1)


class _Shelf:
    """Fingerprints in arrays that grow."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._numbers = np.zeros(4, np.int64)
        self._averages = np.zeros((4, PICTURE_SHAPE[0] * PICTURE_SHAPE[3]), np.float32)
        self._pictures = np.zeros((4, size), np.uint8)
        self._sounds: list[NDArray[np.uint8] | None] = []

    def add(
        self,
        number: int,
        averages: NDArray[np.float32],
        picture: NDArray[np.uint8],
        sound: NDArray[np.uint8] | None,
    ) -> None:
        if self._count == len(self._numbers):
            for name in ("_numbers", "_averages", "_pictures"):
                grown: NDArray[np.generic] = getattr(self, name)
                setattr(self, name, np.concatenate([grown, np.zeros_like(grown)]))
        self._numbers[self._count], self._averages[self._count] = number, averages
        self._pictures[self._count] = picture
        self._sounds.append(sound)
        self._count += 1

    def find(
        self,
        averages: NDArray[np.float32],
        picture: NDArray[np.uint8],
        sound: NDArray[np.uint8] | None,
        level: float,
        decibels: float,
    ) -> list[tuple[int, float]]:
        """Number and distance of the first here that is near enough, if one is."""
        coarse = np.sqrt(np.mean((self._averages[: self._count] - averages) ** 2, axis=1))
        for place in np.flatnonzero(coarse <= level + 0.01):
            distance = _root_mean_square(self._pictures[place], picture) if len(picture) else 0.0
            other = self._sounds[place]
            apart = 0.0 if sound is None or other is None else _root_mean_square(sound, other)
            if distance <= level and apart <= decibels:
                return [(int(self._numbers[place]), distance)]
        return []


def _root_mean_square(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.sqrt(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2)))
