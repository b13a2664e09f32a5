"""Footage as a source of clips: files are looked through first, their good scenes chosen, and these read as clips.

What is found out about each file goes into a journal beside the shards, a line a file, in the order of the files. A
run that was stopped goes on behind the last line; one that was finished opens no file again. Which scenes are chosen
follows from the journal, the captions and the levels alone, so other levels or words need no new look at the files.
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
from poet.data.footage_journal import Journal
from poet.data.listing import Listing, list_clips, read_caption
from poet.data.readahead import Unreadable, read_ahead
from poet.data.scene_choice import Choice, ChosenScene, DropSettings, choose_scenes
from poet.data.scene_facts import FileFacts
from poet.data.scene_measuring import SurveySettings, look_through
from poet.data.shards import lock_directory
from poet.data.stamps import Stamp, file_stamp
from poet.errors import CheckpointError, ConfigError, MediaError
from poet.media import MediaPath, read_scenes

__all__ = ["FileSurveys", "Footage", "FootageSource", "SurveyMap", "scene_key", "survey_footage"]

_RUN_LENGTH: Final = 8  # scenes read in one pass over their file: 17 seconds of nano's

SurveyMap = Callable[["FileSurveys"], Any]
"""Looks files through elsewhere: an iterator of `FileFacts` in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footage:
    """Files, what is known of them, and what is made of that.

    Attributes:
        path: what was named.
        listed: the files.
        facts: of each, with its caption.
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
        MediaError: a process or machine that looked through files was lost; what it had found out is kept.
    """
    path, directory = Path(path), Path(directory)
    listed = tuple(list_clips(path))
    if cut := next((one.key for one in listed if one.start), None):
        raise ConfigError(f"{path} names scenes that are cut already, such as {cut}. Leave out --split and --drop.")
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_directory(directory))
            journal = stack.enter_context(Journal(directory, settings))
        except OSError as error:
            raise CheckpointError(
                f"{directory} cannot be written: {error.strerror}. Choose another directory for the shards."
            ) from error
        names = [(one.key, file_stamp(one.path)) for one in listed]
        num_resumed = sum(name in journal.facts for name in names)
        # Rows of a manifest may name one file several times.
        missing = {name: one for name, one in zip(names, listed, strict=True) if name not in journal.facts}
        surveys = FileSurveys(tuple(missing.values()), tuple(stamp for _, stamp in missing), settings)
        num_known = len(listed) - len(missing)
        found = survey(surveys) if survey is not None and missing else read_ahead(surveys, 0, 2, num_processes)
        with contextlib.closing(found) as items:
            for done, facts in enumerate(items, start=num_known + 1):
                if isinstance(facts, Unreadable):
                    raise MediaError(facts.reason)
                journal.add(facts)
                if progress is not None:
                    progress(done, len(listed))
        known = tuple(_captioned(journal.facts[name], one) for name, one in zip(names, listed, strict=True))
    return Footage(
        path=path,
        listed=listed,
        facts=known,
        choice=choose_scenes(known, drops),
        settings=settings,
        drops=drops,
        num_resumed=num_resumed,
    )


def _captioned(facts: FileFacts, listed: Listing) -> FileFacts:
    if facts.problem is not None:
        return facts
    try:
        return dataclasses.replace(facts, caption=read_caption(listed))
    except MediaError as error:
        return FileFacts(key=facts.key, stamp=facts.stamp, problem=str(error))


@dataclasses.dataclass(frozen=True)
class FileSurveys:
    """What is found out about files, by number.

    Attributes:
        listed: the files.
        stamps: of each, as it was when it was listed.
        settings: how they are looked through.
        name: for messages.
    """

    listed: Sequence[Listing]
    stamps: Sequence[Stamp]
    settings: SurveySettings
    name: str = "footage"

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> FileFacts:
        return look_through(self.listed[index], self.settings, self.stamps[index])


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
    def scenes(self) -> tuple[ChosenScene, ...]:
        """What the clips are read from, in their order."""
        return self._scenes

    def places(self, indices: range) -> list[MediaPath]:
        """The files that the clips of some numbers are read from."""
        return [self._listed[file].path for file in sorted({self._scenes[index].file for index in indices})]

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
