"""Where clips come from: a folder of media files, a manifest that lists them, or Toybox. Knows pixels, never codes."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from poet.errors import ConfigError, MediaError
from poet.media import Clip, probe, read_clip

__all__ = [
    "MEDIA_SUFFIXES",
    "CaptionedClip",
    "ClipSource",
    "FolderSource",
    "FolderSurvey",
    "SourceClip",
    "open_source",
    "survey_folder",
]

MEDIA_SUFFIXES: Final = frozenset(
    {".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".gif", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}
)
"""Files that a folder is searched for. A manifest may name any file."""


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


@dataclasses.dataclass(frozen=True)
class _Entry:
    key: str
    path: Path
    caption: str | None


class FolderSource:
    """Media files, all brought to one size and rate.

    A folder is searched with its subfolders, in the order of the names; the caption of `a/b.mp4` is `a/b.txt` beside
    it. A manifest lists paths, relative to itself, and captions: `.jsonl` with an object a line, `.csv` with a header;
    the columns `path` and, if wanted, `caption` count, others are left alone. Where it has no caption, a `.txt` beside
    the file is looked for likewise.

    Args:
        path: a folder, or a .jsonl or .csv file.
        fps: video frames per second.
        height: pixels.
        width: pixels.
        num_frames: frames from the start of each file; shorter files cannot be read, files with sound alone may be
            shorter. None takes all.
        sample_rate: of the sound, per second.

    Raises:
        ConfigError: there is nothing there, or a line of the manifest cannot be used.
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
    ) -> None:
        path = Path(path)
        if path.is_dir():
            self._entries = [_Entry(file.relative_to(path).as_posix(), file, None) for file in _media_files(path)]
        elif path.suffix.lower() in (".jsonl", ".csv"):
            self._entries = list(_read_manifest(path))
        else:
            raise ConfigError(
                "clips must come from a folder, a .jsonl or .csv manifest, toybox:SPLIT or toybox-films:SPLIT; got "
                f"{path}"
                f"{'' if path.exists() else ', which does not exist'}."
            )
        if not self._entries:
            raise ConfigError(f"{path} must hold at least one clip, got none. Known files: {sorted(MEDIA_SUFFIXES)}.")
        self._fps, self._height, self._width = fps, height, width
        self._num_frames, self._sample_rate = num_frames, sample_rate
        content = [(entry.key, entry.caption) for entry in self._entries]
        settings = (fps, height, width, num_frames, sample_rate)
        digest = hashlib.sha256(json.dumps([content, settings]).encode()).hexdigest()
        # Without the folder's own path: the same files at another place are the same clips.
        self.name = f"files:{path.resolve().name}#{digest[:16]}"

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> SourceClip:
        if not 0 <= index < len(self):
            raise IndexError(f"a clip must lie in [0, {len(self)}), got {index}.")
        entry = self._entries[index]
        try:
            clip = self._read(entry.path)
            caption = entry.caption if entry.caption is not None else _read_caption(entry.path.with_suffix(".txt"))
        except MediaError as error:
            error.filename = entry.key
            raise
        return SourceClip(entry.key, clip, caption)

    def _read(self, path: Path) -> Clip:
        clip = read_clip(
            path,
            fps=self._fps,
            height=self._height,
            width=self._width,
            sample_rate=self._sample_rate,
            duration=None if self._num_frames is None else self._num_frames / self._fps,
        )
        if self._num_frames is not None and clip.frames is not None and len(clip.frames) != self._num_frames:
            raise MediaError(
                f"{path} must have at least {self._num_frames} frames at {self._fps} a second, got {len(clip.frames)}. "
                "Leave it out, or ask for fewer frames."
            )
        return clip


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
    files = _media_files(path)
    if not files:
        raise ConfigError(f"{path} must hold at least one clip, got none. Known files: {sorted(MEDIA_SUFFIXES)}.")
    for done, file in enumerate(files, start=1):
        num_bytes += file.stat().st_size
        try:
            facts = probe(file)
            caption = _read_caption(file.with_suffix(".txt"))
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


def _media_files(folder: Path) -> list[Path]:
    """In the order of their names, those of subfolders included."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in MEDIA_SUFFIXES and path.is_file()]


def _read_caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{path} must be a caption in UTF-8: {error}. Mend it or take it away.") from error


def _read_manifest(path: Path) -> Iterator[_Entry]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if path.suffix.lower() == ".csv" else _read_json_lines(path, file)
            for number, row in enumerate(rows, start=1):
                name, caption = row.get("path"), row.get("caption")
                if not isinstance(name, str) or not name:
                    raise ConfigError(f"entry {number} of {path} must have a path, got {row}.")
                if not isinstance(caption, str | None):
                    raise ConfigError(f"the caption of entry {number} of {path} must be a text, got {caption!r}.")
                yield _Entry(name, path.parent / name, (caption or "").strip() or None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Name a manifest in UTF-8.") from error


def _read_json_lines(path: Path, lines: Iterator[str]) -> Iterator[dict[str, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {path} must be a JSON object, got {line.strip()[:80]!r}.") from error
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} of {path} must be a JSON object, got {line.strip()[:80]!r}.")
        yield row


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
) -> ClipSource:
    """The source that a name stands for.

    Args:
        name: `toybox:SPLIT`, `toybox-films:SPLIT`, a folder, or a .jsonl or .csv manifest.
        count: how many clips of it, or films; needed for Toybox, which has no end. None: all.
        start: number of the first clip, or film.
        fps: see `FolderSource`, here and below; Toybox has its own, and is drawn square at multiples of 64 pixels.
        height: pixels.
        width: pixels.
        num_frames: frames from the start of each file.
        sample_rate: of the sound.

    Raises:
        ConfigError: there is no such source, or not so many clips.
    """
    kind, colon, split = name.partition(":") if isinstance(name, str) else ("", "", "")
    if colon and kind in ("toybox", "toybox-films"):
        if count is None:
            raise ConfigError(f"{name} has no end: say how many clips, with a count.")
        from poet.data.toybox import ToyboxSource  # scipy, which reading files does not need
        from poet.data.toybox_films import ToyboxFilmSource

        if height != width:
            raise ConfigError(f"{name} is drawn square, got a height of {height} and a width of {width} pixels.")
        drawn = ToyboxSource if kind == "toybox" else ToyboxFilmSource
        return drawn(split, count, start, height)
    source = FolderSource(name, fps=fps, height=height, width=width, num_frames=num_frames, sample_rate=sample_rate)
    return source if count is None and start == 0 else _Range(source, start, count)


class _Range:
    """A part of a source."""

    def __init__(self, source: ClipSource, start: int, count: int | None) -> None:
        count = len(source) - start if count is None else count
        if start < 0 or count < 1 or start + count > len(source):
            raise ConfigError(f"{source.name} has {len(source)} clips, got start={start} and count={count}.")
        self._source, self._start, self._count = source, start, count
        self.name = f"{source.name}?start={start}"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> CaptionedClip:
        if not 0 <= index < self._count:
            raise IndexError(f"a clip must lie in [0, {self._count}), got {index}.")
        return self._source[self._start + index]
