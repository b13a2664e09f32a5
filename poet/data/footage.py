"""Footage as a source of clips: files are looked through first, their good scenes chosen, and these read as clips.

What is found out about each file goes into a journal beside the shards, a line a file, as soon as it is known. A run
that was stopped goes on behind the last line; one that was finished opens no file again. Which scenes are chosen
follows from the journal and the levels alone, so other levels need no new look at the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from poet.data.clips import SourceClip
from poet.data.listing import Listing, list_clips
from poet.data.manifest import MANIFEST_NAME
from poet.data.readahead import Unreadable, read_ahead
from poet.data.scene_choice import Choice, DropSettings, choose_scenes
from poet.data.scene_facts import FileFacts
from poet.data.scene_measuring import SurveySettings, look_through, stamp_of
from poet.data.shards import lock_directory
from poet.errors import CheckpointError, ConfigError, MediaError
from poet.media import read_scenes

__all__ = ["JOURNAL_NAME", "FileSurveys", "Footage", "FootageSource", "SurveyMap", "scene_key", "survey_footage"]

JOURNAL_NAME: Final = "footage.jsonl"
_VERSION: Final = 1
_RUN_LENGTH: Final = 8  # scenes read in one pass over their file: 17 seconds of nano's

SurveyMap = Callable[["FileSurveys"], Any]
"""Looks files through elsewhere: an iterator of `FileFacts` in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footage:
    """Files, what is known of them, and what is made of that.

    Attributes:
        path: what was named.
        listed: the files.
        facts: of each.
        choice: the scenes.
        settings: how they were looked through.
        drops: how scenes were chosen.
        num_resumed: files that an earlier run had looked through.
    """

    path: Path
    listed: tuple[Listing, ...]
    facts: tuple[FileFacts, ...]
    choice: Choice
    settings: SurveySettings
    drops: DropSettings
    num_resumed: int


def survey_footage(
    path: str | Path,
    directory: str | Path,
    settings: SurveySettings,
    drops: DropSettings,
    *,
    num_processes: int = 0,
    survey: SurveyMap | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Footage:
    """Look through the files that the journal in `directory` does not know yet, and choose among the scenes of all.

    Args:
        path: a folder, a manifest or archives: see `poet.data.listing`.
        directory: of the shards to be; made if missing.
        settings: how the files are looked through.
        drops: which scenes are left out.
        num_processes: that look through files; 0 does it in this one.
        survey: does it elsewhere instead.
        progress: called with the files done and the files in all.

    Raises:
        ConfigError: there are no files, or the shards in the directory were begun with other settings.
        CheckpointError: the directory cannot be written, or another process writes there.
        MediaError: no scene is left; `facts` of the files are in the journal.
    """
    path, directory = Path(path), Path(directory)
    listed = tuple(list_clips(path))
    if cut := next((one.key for one in listed if one.start), None):
        raise ConfigError(f"{path} names scenes that are cut already, such as {cut}. Leave out --split and --drop.")
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_directory(directory))
            journal = stack.enter_context(_Journal(directory, settings))
        except OSError as error:
            raise CheckpointError(
                f"{directory} cannot be written: {error.strerror}. Choose another directory for the shards."
            ) from error
        missing = [one for one in listed if not journal.knows(one)]
        surveys = FileSurveys(missing, settings)
        num_known = len(listed) - len(missing)
        found = survey(surveys) if survey is not None and missing else read_ahead(surveys, 0, 2, num_processes)
        with contextlib.closing(found) as items:
            for done, facts in enumerate(items, start=num_known + 1):
                if isinstance(facts, Unreadable):
                    raise MediaError(facts.reason)
                journal.add(facts)
                if progress is not None:
                    progress(done, len(listed))
        known = tuple(journal.facts[one.key] for one in listed)
    return Footage(
        path=path,
        listed=listed,
        facts=known,
        choice=choose_scenes(known, drops),
        settings=settings,
        drops=drops,
        num_resumed=num_known,
    )


@dataclasses.dataclass(frozen=True)
class FileSurveys:
    """What is found out about files, by number."""

    listed: Sequence[Listing]
    settings: SurveySettings
    name: str = "footage"

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> FileFacts:
        return look_through(self.listed[index], self.settings)


class _Journal:
    """The file of facts: a line that says how files were looked through, then one for each file."""

    def __init__(self, directory: Path, settings: SurveySettings) -> None:
        self.facts: dict[str, FileFacts] = {}
        path = directory / JOURNAL_NAME
        head = {"version": _VERSION, "settings": dataclasses.asdict(settings)}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = b"".join(line + b"\n" for line in lines[:-1])  # a killed writer leaves the last line without its end
        begun = _parse_head(lines[0]) if len(lines) > 1 else None
        if begun is not None and begun != head and (directory / MANIFEST_NAME).exists():
            raise ConfigError(
                f"the files of {directory} were looked through with {begun['settings']}, got {head['settings']}. Go on "
                "with the same settings, or choose another directory."
            )
        if begun == head:
            for line in lines[1:-1]:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    facts = FileFacts.from_json(line.decode())
                    self.facts[facts.key] = facts
        else:
            whole = json.dumps(head).encode() + b"\n"
        part = path.with_name(f"{path.name}.part")
        if not path.exists() or path.read_bytes() != whole:
            part.write_bytes(whole)
            part.replace(path)
        self._file = path.open("ab")

    def knows(self, listed: Listing) -> bool:
        """Whether the file has been looked through, and has not changed since."""
        facts = self.facts.get(listed.key)
        return facts is not None and facts.stamp == stamp_of(listed)

    def add(self, facts: FileFacts) -> None:
        """Keep what was found out; it is in the file when this returns."""
        try:
            self._file.write(facts.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name} could not be written: {error.strerror}. Make room and start again."
            ) from error
        self.facts[facts.key] = facts

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


def _parse_head(line: bytes) -> dict[str, Any] | None:
    try:
        head = json.loads(line)
        return head if isinstance(head, dict) and "settings" in head else None
    except ValueError:
        return None


def scene_key(key: str, start: float, seconds: float, is_whole: bool) -> str:
    """What a scene is called: its file, and behind that the seconds as in W3C's Media Fragments URI (`#t=1.5,3.6`)."""
    return key if is_whole else f"{key}#t={start:.3f},{start + seconds:.3f}"


class FootageSource:
    """The chosen scenes as clips of one size and rate, read in runs of neighbours.

    Args:
        footage: what was chosen.
        height: pixels.
        width: pixels.
        start: number of the first scene.
        count: how many; None takes all.

    Raises:
        MediaError: no scene was chosen.
        ConfigError: fewer scenes were chosen than are asked for.
    """

    def __init__(self, footage: Footage, *, height: int, width: int, start: int = 0, count: int | None = None) -> None:
        settings = footage.settings
        self._listed, self._scenes = footage.listed, footage.choice.chosen
        self._fps, self._height, self._width = settings.fps, height, width
        self._sample_rate, self._seconds = settings.sample_rate, settings.scene_seconds
        self._is_whole = settings.split is None
        if not self._scenes:
            problems = list(footage.choice.unusable.values())
            counts = f"{len(footage.listed)} files, {len(problems)} of them unusable, {len(footage.choice.dropped)} "
            raise MediaError(
                f"{footage.path} must hold at least one scene to keep, got none: {counts}scenes dropped. "
                f"{'; '.join(problems[:3])}"
            )
        stop = len(self._scenes) if count is None else start + count
        if not 0 <= start < stop <= len(self._scenes):
            raise ConfigError(f"{len(self._scenes)} scenes are kept, got start={start} and count={count}.")
        self._scenes = self._scenes[start:stop]
        digest = hashlib.sha256(json.dumps([settings.fps, height, width, settings.sample_rate, self._seconds]).encode())
        for scene in self._scenes:
            digest.update(json.dumps([self._listed[scene.file].key, scene.start, scene.caption]).encode())
        # Without the folder's own path: the same scenes of the same files at another place are the same clips.
        self.name = f"footage:{footage.path.resolve().name}#{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._scenes)

    @property
    def run_length(self) -> int:
        """How many neighbours are read together at most."""
        return 1 if self._is_whole else _RUN_LENGTH

    def __getitem__(self, index: int) -> SourceClip:
        if not 0 <= index < len(self):
            raise IndexError(f"a clip must lie in [0, {len(self)}), got {index}.")
        [found] = self.read_run(range(index, index + 1))
        if isinstance(found, Unreadable):
            error = MediaError(found.reason)
            error.filename = found.key
            raise error
        return found

    def read_run(self, indices: range) -> Sequence[SourceClip | Unreadable]:
        """The clips of some numbers, in order; one pass over each file that they are of."""
        found: list[SourceClip | Unreadable] = []
        numbers = list(indices)
        while numbers:
            file = self._scenes[numbers[0]].file
            length = next((n for n, index in enumerate(numbers) if self._scenes[index].file != file), len(numbers))
            found += self._read_file(file, numbers[:length])
            numbers = numbers[length:]
        return found

    def _read_file(self, file: int, numbers: Sequence[int]) -> list[SourceClip | Unreadable]:
        scenes, listed = [self._scenes[number] for number in numbers], self._listed[file]
        keys = [scene_key(listed.key, scene.start, self._seconds, self._is_whole) for scene in scenes]
        try:
            clips = read_scenes(
                listed.path,
                [scene.start for scene in scenes],
                self._seconds,
                fps=self._fps,
                height=self._height,
                width=self._width,
                sample_rate=self._sample_rate,
            )
        except MediaError as error:
            return [Unreadable(key, str(error)) for key in keys]
        return [SourceClip(key, clip, scene.caption) for key, clip, scene in zip(keys, clips, scenes, strict=True)]
