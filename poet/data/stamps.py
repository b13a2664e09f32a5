"""Whether a file is the one that was seen before or elsewhere, by its size and time. Opens none."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from poet.errors import ConfigError
from poet.media import FilePart, MediaPath

__all__ = ["Stamp", "check_stamps", "file_stamp", "stamps_of"]

Stamp = tuple[int, ...]
"""A file's bytes and its last change in nanoseconds, 0 and 0 where there is none; of a part, its place and size too."""


def file_stamp(place: MediaPath) -> Stamp:
    """The stamp of a file, or of a part of one."""
    try:
        status = (place.path if isinstance(place, FilePart) else Path(place)).stat()
        stamp = (status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: a NUL character in the path
        stamp = (0, 0)
    return (*stamp, place.offset, place.size) if isinstance(place, FilePart) else stamp


def stamps_of(places: Iterable[MediaPath]) -> dict[MediaPath, Stamp]:
    """The stamp of each file."""
    return {place: file_stamp(place) for place in places}


def check_stamps(stamps: Mapping[MediaPath, Stamp]) -> None:
    """Refuse to work where files are not those of the machine that the stamps come from.

    Raises:
        ConfigError: this machine lacks one, or has another in its place.
    """
    for place, there in stamps.items():
        here = file_stamp(place)
        if _in_seconds(here) == _in_seconds(there):
            continue
        raise ConfigError(
            f"the machine {socket.gethostname()} must have the {place} of the machine that gave it work: "
            f"{_told(there)}; it has {_told(here)}. Share the files, or copy them with their times (rsync -a)."
        )


def _in_seconds(stamp: Stamp) -> Stamp:
    """Without the parts of a second, which not every copy keeps."""
    return (stamp[0], stamp[1] // 10**9, *stamp[2:])


def _told(stamp: Stamp) -> str:
    return f"{stamp[0]} bytes, changed at {stamp[1] // 10**9}" if any(stamp[:2]) else "none"
