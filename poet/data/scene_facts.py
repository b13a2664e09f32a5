"""What is known of a media file and its scenes once it has been looked through. Knows no pixels and makes no choice."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["PICTURE_SHAPE", "SOUND_SHAPE", "FileFacts", "SceneFacts"]

PICTURE_SHAPE: Final = (3, 8, 8, 3)
"""Of what duplicates are known by: first, middle and last picture, in 8 x 8 colours."""
SOUND_SHAPE: Final = (4, 24)
"""Likewise: quarters of the scene and bands of its sound."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SceneFacts:
    """A scene of a file.

    Attributes:
        start: seconds from the file's beginning.
        brightness: of the brightest of 8 x 8 parts of the picture, in the median picture of the scene: 0 to 255.
        change: of that part of the picture that changes most: 0 to 255.
        loudness: of the loudest sixteenth of a second, in dB of full scale; -100 where nothing is heard.
        picture: (3, 8, 8, 3) uint8, see `PICTURE_SHAPE`.
        sound: (4, 24) uint8, dB above -80 of full scale in each quarter and band.

    Brightness, change and picture are None where the file has no picture; loudness and sound where it has no sound.
    """

    start: float
    brightness: float | None = None
    change: float | None = None
    loudness: float | None = None
    picture: NDArray[np.uint8] | None = None
    sound: NDArray[np.uint8] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields: dict[str, Any] = {"start": self.start}
        for name in ("brightness", "change", "loudness"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = round(value, 3)
        for name in ("picture", "sound"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = base64.b64encode(value.tobytes()).decode()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SceneFacts:
        """The inverse of `to_dict`."""
        arrays = {
            name: np.frombuffer(base64.b64decode(fields[name]), np.uint8).reshape(shape)
            for name, shape in (("picture", PICTURE_SHAPE), ("sound", SOUND_SHAPE))
            if name in fields
        }
        return cls(**{**fields, **arrays})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileFacts:
    """A file that was looked through.

    Attributes:
        key: what it is called.
        stamp: size and time of the file that this was read from; others mean that it must be read again.
        duration: seconds.
        has_picture: whether it holds one.
        has_sound: whether it holds any.
        caption: its own, which is added where it is listed and is not known from the journal.
        num_cuts: shot cuts that were found.
        left_over: seconds behind the last whole scene of each shot.
        scenes: in the order of time.
        problem: why it cannot be read; nothing else is known then.
    """

    key: str
    stamp: tuple[int, ...]
    duration: float = 0.0
    has_picture: bool = False
    has_sound: bool = False
    caption: str | None = None
    num_cuts: int = 0
    left_over: float = 0.0
    scenes: tuple[SceneFacts, ...] = ()
    problem: str | None = None

    def to_json(self) -> str:
        """One line."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        fields["scenes"] = [scene.to_dict() for scene in self.scenes]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> FileFacts:
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: the line is something else, or a part of one.
        """
        fields = json.loads(line)
        scenes = tuple(SceneFacts.from_dict(scene) for scene in fields["scenes"])
        return cls(**{**fields, "stamp": tuple(fields["stamp"]), "scenes": scenes})
