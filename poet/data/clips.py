"""Where clips come from: media files in a folder, a manifest or archives, or Toybox. Knows pixels, never codes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Protocol

from poet.data.listing import MEDIA_SUFFIXES, Listing, list_clips, media_files, read_caption
from poet.errors import ConfigError, MediaError
from poet.media import Clip, MediaPath, probe, read_clip

__all__ = [
    "MEDIA_SUFFIXES",
    "REQUIREMENTS",
    "CaptionedClip",
    "ClipSource",
    "FolderSource",
    "FolderSurvey",
    "SourceClip",
    "caption_of",
    "check_requirements",
    "lacking",
    "missing_parts",
    "open_source",
    "survey_folder",
    "too_short",
]

REQUIREMENTS: Final = ("picture", "sound", "caption")
"""What a clip may be asked to have."""


class CaptionedClip(Protocol):
    """What a source yields: `SourceClip`, or a drawn clip."""

    @property
    def key(self) -> str:
        """What the source calls the clip."""

    @property
    def clip(self) -> Clip:
        """Its picture, its sound, or both."""

    @property
    def caption(self) -> str | None:
        """What it shows, in words, where that is known."""


class ClipSource(Protocol):
    """Clips by number. Several threads may ask at once; a source for worker processes must be picklable."""

    @property
    def name(self) -> str:
        """What the clips are, the same for the same clips only: encoding goes on under the same name alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CaptionedClip:
        """Clip `index` in [0, len).

        Raises:
            MediaError: it cannot be read; `filename` says which one.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class SourceClip:
    """A clip with what its source calls it, and its caption if there is one."""

    key: str
    clip: Clip
    caption: str | None = None


class FolderSource:
    """Media files, all brought to one size and rate.

    A folder is searched with its subfolders, in the order of the names; the caption of `a/b.mp4` is `a/b.txt` beside
    it. A manifest lists paths, relative to itself, and captions: `.jsonl` with an object a line, `.csv` with a header;
    the columns `path` and, if wanted, `caption` and `start`, the seconds at which the clip begins in its file, count,
    others are left alone. Where it has no caption, a `.txt` beside the file is looked for likewise. Archives are those
    of WebDataset: see `poet.data.listing`.

    Args:
        path: a folder, a .jsonl or .csv file, a .tar file, or a folder of .tar files.
        fps: video frames per second.
        height: pixels.
        width: pixels.
        num_frames: frames from the start of each file; shorter files cannot be read, files with sound alone may be
            shorter. None takes all.
        sample_rate: of the sound, per second.
        caption: of the clips that have none of their own.
        required: clips without one of these cannot be read: `picture`, `sound`, `caption`.

    Raises:
        ConfigError: there is nothing there, a line of the manifest cannot be used, or an unknown requirement.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        height: int,
        width: int,
        num_frames: int | None,
        sample_rate: int,
        caption: str | None = None,
        required: Collection[str] = (),
    ) -> None:
        path = Path(path)
        self._listed = list_clips(path)
        self._fps, self._height, self._width = fps, height, width
        self._num_frames, self._sample_rate = num_frames, sample_rate
        self._caption, self._required = caption, frozenset(required)
        check_requirements(self._required)
        content = [(clip.key, clip.caption) for clip in self._listed]
        settings = (fps, height, width, num_frames, sample_rate)
        said: list[object] = [content, settings]
        if caption is not None or required:
            said.append([caption, sorted(self._required)])
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        # Without the folder's own path: the same files at another place are the same clips.
        self.name = f"files:{path.resolve().name}#{digest[:16]}"

    def __len__(self) -> int:
        return len(self._listed)

    def __getitem__(self, index: int) -> SourceClip:
        if not 0 <= index < len(self):
            raise IndexError(f"a clip must lie in [0, {len(self)}), got {index}.")
        listed = self._listed[index]
        try:
            if listed.problem is not None:
                raise MediaError(listed.problem)
            clip = self._read(listed.path, listed.start)
            caption = caption_of(listed, self._caption)
            missing = missing_parts(clip.frames is not None, clip.samples is not None, caption) & self._required
            if missing:
                raise lacking(listed, missing)
        except MediaError as error:
            error.filename = listed.key
            raise
        return SourceClip(listed.key, clip, caption)

    def places(self, indices: range) -> list[MediaPath]:
        """The files that the clips of some numbers are read from, those of captions included."""
        listed = [self._listed[index] for index in indices]
        return [place for one in listed for place in (one.path, *(one.captions if one.caption is None else ()))]

    def _read(self, path: MediaPath, start: float) -> Clip:
        clip = read_clip(
            path,
            fps=self._fps,
            height=self._height,
            width=self._width,
            sample_rate=self._sample_rate,
            start=start,
            duration=None if self._num_frames is None else self._num_frames / self._fps,
        )
        if self._num_frames is not None and clip.frames is not None and len(clip.frames) != self._num_frames:
            raise too_short(path, self._num_frames, self._fps, len(clip.frames))
        return clip


def check_requirements(required: Collection[str]) -> None:
    """Refuse what is not among `REQUIREMENTS`.

    Raises:
        ConfigError: one is not.
    """
    unknown = sorted(set(required) - set(REQUIREMENTS))
    if unknown:
        raise ConfigError(f"clips can be required to have {', '.join(REQUIREMENTS)}; got {', '.join(unknown)}.")


def caption_of(listed: Listing, otherwise: str | None) -> str | None:
    """A clip's own caption, or the one for those that have none.

    Raises:
        MediaError: it has one that cannot be read.
    """
    own = read_caption(listed)
    return own if own is not None else otherwise


def lacking(listed: Listing, missing: Collection[str]) -> MediaError:
    """The error for a clip that lacks something that is required."""
    return MediaError(
        f"{listed.path}: has no {' and no '.join(sorted(missing))}, which is required. Add it, or ask for less."
    )


def too_short(path: MediaPath, num_frames: int, fps: float, found: int) -> MediaError:
    """The error for a file with fewer frames than a clip must have."""
    return MediaError(
        f"{path} must have at least {num_frames} frames at {fps} a second, got {found}. Leave it out, or ask for fewer "
        "frames."
    )


def missing_parts(has_picture: bool, has_sound: bool, caption: str | None) -> set[str]:
    """Which of `REQUIREMENTS` a clip does not meet."""
    has = {"picture": has_picture, "sound": has_sound, "caption": caption is not None}
    return {name for name, is_there in has.items() if not is_there}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSurvey:
    """What a folder of clips holds, by the files' headers.

    Attributes:
        kinds: `picture_and_sound`, `picture_alone` and `sound_alone` -> how many files there are of each, those with a
            caption and those without.
        unreadable: (key, reason) of every file that is no clip or whose caption cannot be read.
        num_bytes: of all files, the unreadable ones included.
    """

    kinds: dict[str, tuple[int, int]]
    unreadable: tuple[tuple[str, str], ...]
    num_bytes: int


def survey_folder(path: str | Path, progress: Callable[[int, int], None] | None = None) -> FolderSurvey:
    """Look at every clip that `FolderSource` would find in a folder, decoding none: damage further in is not found.

    Args:
        path: a folder.
        progress: called with the files done and the files in all.

    Raises:
        ConfigError: the folder holds no clips.
    """
    path = Path(path)
    counts = {kind: [0, 0] for kind in ("picture_and_sound", "picture_alone", "sound_alone")}
    unreadable, num_bytes = [], 0
    files = media_files(path)
    if not files:
        raise ConfigError(f"{path} must hold at least one clip, got none. Known files: {sorted(MEDIA_SUFFIXES)}.")
    for done, file in enumerate(files, start=1):
        num_bytes += file.stat().st_size if file.is_file() else 0
        try:
            facts = probe(file)
            caption = read_caption(Listing(file.name, file, captions=(file.with_suffix(".txt"),)))
        except MediaError as error:
            unreadable.append((file.relative_to(path).as_posix(), str(error)))
        else:
            alone = "picture_alone" if facts.has_video else "sound_alone"
            kind = "picture_and_sound" if facts.has_video and facts.has_audio else alone
            counts[kind][0 if caption is not None else 1] += 1
        if progress is not None:
            progress(done, len(files))
    kinds = {kind: (captioned, uncaptioned) for kind, (captioned, uncaptioned) in counts.items()}
    return FolderSurvey(kinds=kinds, unreadable=tuple(unreadable), num_bytes=num_bytes)


def open_source(
    name: str | Path,
    *,
    count: int | None = None,
    start: int = 0,
    fps: float = 8.0,
    height: int = 64,
    width: int = 64,
    num_frames: int | None = 17,
    sample_rate: int = 16_000,
    caption: str | None = None,
    required: Collection[str] = (),
) -> ClipSource:
    """The source that a name stands for.

    Args:
        name: `toybox:SPLIT`, `toybox-films:SPLIT`, a folder, a .jsonl or .csv manifest, or a .tar archive.
        count: how many clips of it, or films; needed for Toybox, which has no end. None: all.
        start: number of the first clip, or film.
        fps: see `FolderSource`, here and below; Toybox has its own, and is drawn square at multiples of 64 pixels.
        height: pixels.
        width: pixels.
        num_frames: frames from the start of each file.
        sample_rate: of the sound.
        caption: of files that have none of their own.
        required: what files must have; see `FolderSource`.

    Raises:
        ConfigError: there is no such source, or not so many clips, or Toybox is given what only files take.
    """
    kind, colon, split = name.partition(":") if isinstance(name, str) else ("", "", "")
    if colon and kind in ("toybox", "toybox-films"):
        if count is None:
            raise ConfigError(f"{name} has no end: say how many clips, with a count.")
        if caption is not None or required:
            raise ConfigError(f"{name} has its own captions, pictures and sound; a caption or demands are for files.")
        from poet.data.toybox import ToyboxSource  # scipy, which reading files does not need
        from poet.data.toybox_films import ToyboxFilmSource

        if height != width:
            raise ConfigError(f"{name} is drawn square, got a height of {height} and a width of {width} pixels.")
        drawn = ToyboxSource if kind == "toybox" else ToyboxFilmSource
        return drawn(split, count, start, height)
    source = FolderSource(
        name,
        fps=fps,
        height=height,
        width=width,
        num_frames=num_frames,
        sample_rate=sample_rate,
        caption=caption,
        required=required,
    )
    return source if count is None and start == 0 else _Range(source, start, count)


class _Range:
    """A part of a source."""

    def __init__(self, source: FolderSource, start: int, count: int | None) -> None:
        count = len(source) - start if count is None else count
        if start < 0 or count < 1 or start + count > len(source):
            raise ConfigError(f"{source.name} has {len(source)} clips, got start={start} and count={count}.")
        self._source, self._start, self._count = source, start, count
        self.name = f"{source.name}?start={start}"

    def __len__(self) -> int:
        return self._count

    def places(self, indices: range) -> list[MediaPath]:
        """The files that the clips of some numbers are read from."""
        return self._source.places(range(indices.start + self._start, indices.stop + self._start))

    def __getitem__(self, index: int) -> CaptionedClip:
        if not 0 <= index < self._count:
            raise IndexError(f"a clip must lie in [0, {self._count}), got {index}.")
        return self._source[self._start + index]
