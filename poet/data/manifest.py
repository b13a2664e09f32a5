"""The manifest beside a directory of token shards: what was encoded, by which tokenizers, into which files.

It is written last and replaced atomically, so it only ever names whole files. It knows nothing of codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from poet.errors import CheckpointError

__all__ = ["MANIFEST_NAME", "Manifest", "Shard", "compare_fingerprints", "sha256_of"]

MANIFEST_NAME: Final = "manifest.json"
_VERSION: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One finished file.

    Attributes:
        file: its name in the directory.
        rows: clips in it.
        sha256: of the whole file, in hex.
        start, stop: the range of the source's indices that it covers; unreadable clips leave fewer rows than that.
    """

    file: str
    rows: int
    sha256: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says of a directory of shards.

    Attributes:
        fingerprint: of the vocabulary (layout and tokenizers) that the codes belong to.
        source: name of the clip source.
        source_length: clips in that source.
        settings: whatever else decides the files' bytes, such as the number of clips a shard covers.
        shards: the finished files, in order.
        skipped: (key, reason) of the clips that could not be read.
    """

    fingerprint: str
    source: str
    source_length: int
    settings: Mapping[str, int]
    shards: tuple[Shard, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """Clips in all finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def next_index(self) -> int:
        """The first index of the source that no finished shard covers."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def complete(self) -> bool:
        """Whether the shards cover the whole source."""
        return self.next_index == self.source_length

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        fields = dataclasses.asdict(self) | {"settings": dict(self.settings)}
        fields["skipped"] = [{"key": key, "reason": reason} for key, reason in self.skipped]
        head = {"version": _VERSION, "count": self.count, "complete": self.complete}
        return json.dumps(head | fields, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read the manifest of a directory.

        Raises:
            CheckpointError: there is none, or it is damaged or of a newer version.
        """
        path = Path(directory) / MANIFEST_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["version"] != _VERSION:
                raise CheckpointError(
                    f"{path} must be of version {_VERSION}, got {fields['version']!r}. Encode the clips again."
                )
            manifest = cls(
                fingerprint=fields["fingerprint"],
                source=fields["source"],
                source_length=fields["source_length"],
                settings=fields["settings"],
                shards=tuple(Shard(**shard) for shard in fields["shards"]),
                skipped=tuple((entry["key"], entry["reason"]) for entry in fields["skipped"]),
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} must exist beside the shards. Make it with `poet encode`.") from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is not a manifest of shards ({error!r}). Encode the clips again.") from error
        covered = [0, *(shard.stop for shard in manifest.shards)]
        if [shard.start for shard in manifest.shards] != covered[:-1] or fields["count"] != manifest.count:
            raise CheckpointError(f"{path} contradicts itself about its shards. Encode the clips again.")
        return manifest


def compare_fingerprints(directory: Path, found: str, wanted: str) -> None:
    """Refuse codes of another vocabulary.

    Raises:
        CheckpointError: `found`, the shards' fingerprint, is not `wanted`.
    """
    if found != wanted:
        raise CheckpointError(
            f"{directory} must hold codes of the vocabulary {wanted}, got {found}. Encode the clips again with these "
            "tokenizers, or use the bundle that the shards were made with."
        )


def sha256_of(path: Path) -> str:
    """The checksum of a whole file in hex.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest: str = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Restore it or encode the clips again."
        ) from error
    return digest
