"""Toybox films: one object through several scenes, each with a motion or a sound of its own.

A scene is a Toybox clip. It begins in the picture that the one before ended with: the first frame of a scene is the
last one of its predecessor, so a film of N scenes shows 1 + 16 N different frames, and the sound of two scenes overlaps
for the length of a frame. Captions of later scenes name everything again, or speak of "it". Film `index` of a split is
a pure function of (split, index).

This file draws; it knows no codes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from poet.data.toybox import (
    ATTRIBUTE_VALUES,
    RESOLUTION,
    SPLITS,
    Attributes,
    ToyboxClip,
    Trajectory,
    draw_scene,
    go_on,
    is_held_out,
    move,
    scale_of,
)
from poet.data.toybox_captions import caption_for
from poet.errors import ConfigError

__all__ = ["FILM_SCENES", "ToyboxFilmSource", "draw_film"]

FILM_SCENES: Final = 8
"""Scenes of a drawn film; a shorter one is its beginning."""

_KEEPS = 0.25  # share of later scenes that keep the motion of the one before, and of those that keep its sound
_IT = 0.5  # share of later scenes whose caption speaks of "it"


def draw_film(
    split: str, index: int, num_scenes: int = FILM_SCENES, resolution: int = RESOLUTION
) -> tuple[ToyboxClip, ...]:
    """Draw the scenes of film `index` of `split`.

    Args:
        split: "train" or "seen", whose combinations of shape, colour and motion are those that training holds; or
            "unseen", all of whose are not.
        index: counted from 0.
        num_scenes: from the first on.
        resolution: pixels of height and width, a multiple of 64.

    Returns:
        One clip a scene; loudness and object are the film's.

    Raises:
        ConfigError: unknown split, negative index, no scene, or a resolution that is no multiple of 64.
    """
    if num_scenes < 1:
        raise ConfigError(f"a film must have at least one scene, got {num_scenes}.")
    scale_of(resolution)
    key = f"film-{split}-{index:07d}"
    return tuple(
        ToyboxClip(
            key=f"{key}.{number}",
            attributes=attributes,
            trajectory=track,
            loudness=loudness,
            caption=caption,
            clip=draw_scene(attributes, track, loudness, resolution),
        )
        for number, (attributes, track, loudness, caption) in enumerate(_plan(split, index, num_scenes))
    )


class ToyboxFilmSource:
    """The scenes of a range of films, one after another: a source for `poet encode`, whose clip i is scene i % 8.

    Args:
        split: see `draw_film`.
        count: films.
        start: number of the first film.
        resolution: see `draw_film`.

    Raises:
        ConfigError: as `draw_film`, or no film.
    """

    def __init__(self, split: str, count: int, start: int = 0, resolution: int = RESOLUTION) -> None:
        if count < 1 or start < 0:
            raise ConfigError(f"a source of films needs count >= 1 and start >= 0, got count={count}, start={start}.")
        _plan(split, start, 1)
        scale_of(resolution)
        self.split, self.start, self.resolution = split, start, resolution
        self._length = count * FILM_SCENES
        size = "" if resolution == RESOLUTION else f"&resolution={resolution}"
        self.name = f"toybox-films:{split}?start={start}{size}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> ToyboxClip:
        if not 0 <= index < self._length:
            raise IndexError(index)
        film, number = divmod(index, FILM_SCENES)
        attributes, track, loudness, caption = _plan(self.split, self.start + film, number + 1)[number]
        return ToyboxClip(
            key=f"film-{self.split}-{self.start + film:07d}.{number}",
            attributes=attributes,
            trajectory=track,
            loudness=loudness,
            caption=caption,
            clip=draw_scene(attributes, track, loudness, self.resolution),
        )


def _plan(split: str, index: int, num_scenes: int) -> list[tuple[Attributes, Trajectory, float, str]]:
    if split not in SPLITS:
        raise ConfigError(f"a Toybox split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if index < 0:
        raise ConfigError(f"a film's index must not be negative, got {index}.")
    rng = np.random.default_rng([zlib.crc32(f"film-{split}".encode()), index])
    while True:
        values = {name: _choose(choices, rng) for name, choices in ATTRIBUTE_VALUES.items()}
        motions = _motions(values["shape"], values["colour"], unseen=split == "unseen")
        if not motions - {"grows"}:  # nothing has shrunk yet
            continue
        values["motion"] = _choose(sorted(motions - {"grows"}), rng)
        attributes = Attributes(**values)
        scenes = [(attributes, move(attributes, rng))]
        while len(scenes) < FILM_SCENES and (following := _next_scene(*scenes[-1], motions, rng)) is not None:
            scenes.append(following)
        if len(scenes) == FILM_SCENES:
            break
    loudness = float(rng.uniform(0.5, 1.0))
    plan = []
    for number, (attributes, track) in enumerate(scenes):
        continues = number > 0 and bool(rng.random() < _IT)
        caption = caption_for(attributes.as_dict(), rng, continues=continues)
        plan.append((attributes, track, loudness, caption))
    return plan[:num_scenes]


def _motions(shape: str, colour: str, *, unseen: bool) -> set[str]:
    """Those that an object has in films of a split; what shrinks must be able to grow again."""
    motions = {motion for motion in ATTRIBUTE_VALUES["motion"] if is_held_out(shape, colour, motion) == unseen}
    return motions if {"grows", "shrinks"} <= motions else motions - {"grows", "shrinks"}


def _next_scene(
    before: Attributes, track: Trajectory, motions: set[str], rng: np.random.Generator
) -> tuple[Attributes, Trajectory] | None:
    """What comes after a scene: something else moves or sounds, from where that one ended. None: nothing can."""
    tracks = {motion: go_on(motion, before.size, track, rng) for motion in sorted(motions)}
    able = [motion for motion, found in tracks.items() if found is not None]
    if not able:
        return None
    others = [motion for motion in able if motion != before.motion]
    change = rng.random()
    keeps_motion = before.motion in able and (not others or change < _KEEPS)
    motion = before.motion if keeps_motion else _choose(others, rng)
    found = tracks[motion]
    assert found is not None
    values = before.as_dict() | {"motion": motion}
    if not keeps_motion and change < 2 * _KEEPS:  # the sound goes on
        return Attributes(**values), found
    sound = {name: values[name] for name in ("timbre", "pitch")}
    while (other := {name: _choose(ATTRIBUTE_VALUES[name], rng) for name in sound}) == sound:
        pass
    return Attributes(**values | other), found


def _choose(values: Sequence[str], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]
