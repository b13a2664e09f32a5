"""What was found out about files, kept from one run to the next: a line that says how they were looked through, then
one for each file. Other settings have a journal of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Final

from poet.data.manifest import MANIFEST_NAME
from poet.data.scene_facts import FileFacts
from poet.data.scene_measuring import SurveySettings
from poet.data.stamps import Stamp
from poet.errors import CheckpointError, ConfigError

__all__ = ["Journal", "journal_name"]

_VERSION: Final = 2


def journal_name(settings: SurveySettings) -> str:
    """Of the file that keeps what was found out with these settings."""
    return f"footage-{hashlib.sha256(_head(settings)).hexdigest()[:8]}.jsonl"


class Journal:
    """The journal of a directory, opened to be gone on with. A context manager.

    Args:
        directory: of the shards to be.
        settings: how files are looked through.

    Raises:
        ConfigError: there are shards, begun with other settings.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path, settings: SurveySettings) -> None:
        self.facts: dict[tuple[str, Stamp], FileFacts] = {}
        path, head = directory / journal_name(settings), _head(settings)
        others = sorted(directory.glob("footage-*.jsonl"))
        if others and not path.exists() and (directory / MANIFEST_NAME).exists():
            with others[0].open("rb") as file:
                begun = file.readline().decode(errors="replace").strip()
            raise ConfigError(
                f"the files of {directory} were looked through with {begun}, got {head.decode().strip()}. Go on with "
                "the same settings, or choose another directory."
            )
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = 0
        if self._file.readline() == head:
            whole = len(head)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._keep(FileFacts.from_json(line.decode()))
        self._file.truncate(whole)  # a killed writer leaves the last line without its end
        if not whole:
            self._file.write(head)
            self._file.flush()

    def add(self, facts: FileFacts) -> None:
        """Keep what was found out; it is in the file when this returns.

        Raises:
            CheckpointError: the file cannot be written.
        """
        try:
            self._file.write(facts.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name} could not be written: {error.strerror}. Make room and start again."
            ) from error
        self._keep(facts)

    def _keep(self, facts: FileFacts) -> None:
        self.facts[facts.key, facts.stamp] = facts

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


def _head(settings: SurveySettings) -> bytes:
    return json.dumps({"version": _VERSION, "settings": dataclasses.asdict(settings)}).encode() + b"\n"
