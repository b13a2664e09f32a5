"""Which clips there are: in a folder, a manifest, or WebDataset's tar archives. Opens no clip.

An archive holds a sample's files beside each other: `0001.mp4` with `0001.txt`, or `0001.json` with a "caption" in it.
What comes before the first dot of a file's name says which files belong together (github.com/webdataset/webdataset,
"The WebDataset Format").
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from poet.errors import ConfigError, MediaError
from poet.media import FilePart, MediaPath

__all__ = ["MEDIA_SUFFIXES", "Listing", "list_clips", "media_files", "read_caption"]

MEDIA_SUFFIXES: Final = frozenset(
    {".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".gif", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}
)
"""Files that a folder is searched for. A manifest may name any file."""

_MAX_CAPTION_BYTES: Final = 1 << 20
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Listing:
    """A clip that is said to be there.

    Attributes:
        key: what it is called.
        path: where it lies.
        caption: of a manifest.
        captions: where its caption may lie, in the order in which they are looked at: texts, or JSON in an archive.
        problem: why it cannot be read, where that is known without opening it.
        start: seconds to leave out at its beginning, of a manifest.
    """

    key: str
    path: MediaPath
    caption: str | None = None
    captions: tuple[MediaPath, ...] = ()
    problem: str | None = None
    start: float = 0.0


def list_clips(path: str | Path) -> list[Listing]:
    """List the clips of a folder, a manifest, an archive or a folder of archives.

    Args:
        path: a folder (its media files, those of subfolders included; where it has none, its .tar files), a .jsonl or
            .csv file, or a .tar file.

    Raises:
        ConfigError: there is nothing there, or a line of the manifest cannot be used.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        found = [_listed(file, file.relative_to(path).as_posix()) for file in media_files(path)]
        if not found:
            for archive in sorted(one for one in path.rglob("*") if one.suffix.lower() == ".tar"):
                found += _list_archive(archive, archive.relative_to(path).as_posix())
    elif suffix in (".jsonl", ".csv"):
        found = list(_read_manifest(path))
    elif suffix == ".tar" and path.exists():
        found = list(_list_archive(path, path.name))
    else:
        raise ConfigError(
            "clips must come from a folder, a .jsonl or .csv manifest, a .tar archive, toybox:SPLIT or "
            f"toybox-films:SPLIT; got {path}{'' if path.exists() else ', which does not exist'}."
        )
    if not found:
        raise ConfigError(
            f"{path} must hold at least one clip, got none. Known files: {sorted(MEDIA_SUFFIXES)}, alone or in .tar."
        )
    return [_usable(one) for one in found]


def media_files(folder: Path) -> list[Path]:
    """In the order of their names, those of subfolders included; also links that lead nowhere, and empty folders.

    A folder that is called like a media file and holds media files is a folder like any other. Names that begin with a
    dot are left out: they are what other programs hide, or have not finished.
    """
    named = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in MEDIA_SUFFIXES and not path.name.startswith(".")
    ]
    parents = {parent for path in named if not path.is_dir() for parent in path.parents}
    return [path for path in named if path not in parents]


def read_caption(clip: Listing) -> str | None:
    """The caption of a clip, None where it has none.

    Raises:
        MediaError: it has one that cannot be read.
    """
    if clip.caption is not None:
        return clip.caption
    for place in clip.captions:
        try:
            text = _read_text(place)
            is_json = isinstance(place, FilePart) and place.name.lower().endswith(".json")
            caption = _caption_of_json(text) if is_json and text is not None else text
        except (OSError, ValueError) as error:  # a UnicodeDecodeError, a JSONDecodeError
            raise MediaError(f"{place} must be a caption in UTF-8: {error}. Mend it or take it away.") from error
        if caption is not None and caption.strip():
            return caption.strip()
    return None


def _read_text(place: MediaPath) -> str | None:
    if not isinstance(place, FilePart):
        try:
            return Path(place).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
    if place.size > _MAX_CAPTION_BYTES:
        raise ValueError(f"it has {place.size} bytes, more than {_MAX_CAPTION_BYTES}")
    with place.path.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size).decode("utf-8")


def _caption_of_json(text: str) -> str | None:
    fields = json.loads(text)
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or not isinstance(caption, str | None) or not _is_text(caption or ""):
        raise ValueError('it must be a JSON object whose "caption" is a text')
    return caption


def _usable(one: Listing) -> Listing:
    """With an absolute path, which means the same in every process; a name that is no text becomes a problem."""
    one = dataclasses.replace(one, path=_absolute(one.path), captions=tuple(map(_absolute, one.captions)))
    if _is_text(one.key):
        return one
    key = _SURROGATES.sub("\ufffd", one.key)
    return dataclasses.replace(
        one, key=key, captions=(), problem=f"{key}: its name must be text in UTF-8. Rename the file."
    )


def _absolute(place: MediaPath) -> MediaPath:
    if isinstance(place, FilePart):
        return dataclasses.replace(place, path=place.path.absolute())
    return Path(place).absolute()


def _is_text(text: str) -> bool:
    """Whether it can be written down: bytes of a name that are no UTF-8 are lone surrogates in Python."""
    return _SURROGATES.search(text) is None


def _listed(path: Path, key: str, caption: str | None = None) -> Listing:
    return Listing(key, path, caption, (path.with_suffix(".txt"),))


def _list_archive(path: Path, name: str) -> list[Listing]:
    """The samples of an archive in their order; a broken one ends with an entry that says so."""
    members: list[tarfile.TarInfo] = []
    problem = None
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                members += (member for member in archive if member.isfile())
            except (tarfile.TarError, OSError, ValueError) as error:
                problem = str(error)
            size = path.stat().st_size
    except (tarfile.TarError, OSError, ValueError) as error:
        problem, size = str(error), 0
    texts: dict[tuple[str, str], FilePart] = {}
    clips: list[tuple[str, tarfile.TarInfo]] = []
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        if file.startswith("."):  # as in folders
            continue
        stem, _, kind = file.partition(".")
        sample = f"{folder}{slash}{stem}"
        if f".{kind.lower().rpartition('.')[2]}" in MEDIA_SUFFIXES:
            clips.append((sample, member))
        elif kind.lower() in ("txt", "json"):
            texts[sample, kind.lower()] = FilePart(path, member.name, member.offset_data, member.size)
    listed = []
    for sample, member in clips:
        captions = tuple(texts[sample, kind] for kind in ("txt", "json") if (sample, kind) in texts)
        part = FilePart(path, member.name, member.offset_data, member.size)
        cut = member.offset_data + member.size > size
        why = f"{part}: the archive ends within it. Make or download {path} again." if cut else None
        listed.append(Listing(f"{name}/{member.name}", part, None, captions, why))
    if problem is not None:
        why = (
            f"{path}: must be a .tar archive without compression that is whole ({problem}). Make or download it again."
        )
        listed.append(Listing(name, path, problem=why))
    return listed


def _read_manifest(path: Path) -> Iterator[Listing]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if path.suffix.lower() == ".csv" else _read_json_lines(path, file)
            for number, row in enumerate(rows, start=1):
                name, caption = row.get("path"), row.get("caption")
                if not isinstance(name, str) or not name:
                    raise ConfigError(f"entry {number} of {path} must have a path, got {row}.")
                if not isinstance(caption, str | None) or not _is_text(caption or ""):
                    raise ConfigError(f"the caption of entry {number} of {path} must be a text, got {caption!a}.")
                start = _start_of(row, f"entry {number} of {path}")
                key = f"{name}#t={start:.3f}" if start else name  # as in W3C's Media Fragments URI
                yield dataclasses.replace(
                    _listed(path.parent / name, key, (caption or "").strip() or None), start=start
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Name a manifest in UTF-8.") from error


def _start_of(row: dict[str, object], entry: str) -> float:
    """The seconds in a manifest's column `start`, 0 where there are none."""
    said = row.get("start")
    try:
        start = 0.0 if said is None or said == "" else float(said)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        start = math.nan
    if not 0 <= start < math.inf:
        raise ConfigError(f"the start of {entry} must be seconds, 0 or more, got {str(said)[:80]}.")
    return start


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
