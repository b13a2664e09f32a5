"""Token shards: encoded clips in Parquet files beside a manifest. Knows codes and captions, never ids or pixels.

A directory of shards grows file by file. Each file is written beside its place, synced and renamed, and only then does
the manifest (replaced atomically) name it; so whatever stops the writer, the manifest names whole files only, and the
next writer goes on after the last of them. The files are plain Parquet: `datasets.load_dataset("parquet", ...)`, DuckDB
or pandas read them as well.

Legend: T, H, W latent frames, height and width of video codes; K codebooks of audio.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from poet.data.manifest import MANIFEST_NAME, Manifest, Shard, compare_fingerprints, sha256_of
from poet.errors import CheckpointError, ConfigError, ShapeError

__all__ = ["EncodedClip", "ShardReader", "ShardWriter", "count_uncaptioned", "lock_directory", "open_shards"]

_LOCK_NAME: Final = ".lock"
_SHARD_FILE: Final = re.compile(r"shard-\d{6}\.parquet(\.part)?|manifest\.json\.part")
_CODES: Final = pa.list_(pa.int32())
_SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("video_codes", _CODES),
        pa.field("video_shape", _CODES),
        pa.field("audio_codes", _CODES),
        pa.field("audio_shape", _CODES),
        pa.field("fps", pa.float64()),
        pa.field("resolution", _CODES),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedClip:
    """One clip as codes.

    Attributes:
        key: what the source calls it.
        text: its caption, or None.
        video_codes: (T, H, W) int32, or None for a clip without a picture.
        audio_codes: (K, T) int32, or None for a clip without sound.
        fps: video frames per second; with a picture only.
        resolution: (height, width) in pixels; with a picture only.

    Raises:
        ShapeError: codes of another shape or type, or a picture without fps and resolution.
    """

    key: str
    text: str | None = None
    video_codes: NDArray[np.int32] | None = None
    audio_codes: NDArray[np.int32] | None = None
    fps: float | None = None
    resolution: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, codes, letters in (
            ("video_codes", self.video_codes, "(T, H, W)"),
            ("audio_codes", self.audio_codes, "(K, T)"),
        ):
            if codes is not None and (codes.ndim != letters.count(",") + 1 or codes.dtype != np.int32):
                raise ShapeError(
                    f"{name} of one clip must be {letters} int32, got {codes.shape} {codes.dtype}. "
                    "Take one clip of the batch and cast it."
                )
        if not (self.video_codes is None) == (self.fps is None) == (self.resolution is None):
            raise ShapeError(
                f"a clip has fps and a resolution exactly when it has a picture; {self.key} has video codes: "
                f"{self.video_codes is not None}, fps: {self.fps}, resolution: {self.resolution}. Give all or none."
            )


class ShardWriter:
    """Write a directory of shards, or go on with one that was begun. A context manager: it holds the directory's lock.

    Args:
        directory: made if missing. Leftovers of a killed writer are removed.
        fingerprint: of the vocabulary that the codes belong to.
        source: name of the clip source.
        source_length: clips in it.
        settings: whatever else decides the files' bytes.

    Raises:
        CheckpointError: the directory holds shards of another fingerprint or source, is being written by another
            process, or cannot be written.
        ConfigError: it was begun with other settings.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        fingerprint: str,
        source: str,
        source_length: int,
        settings: Mapping[str, int] | None = None,
    ) -> None:
        self.directory = Path(directory)
        wanted = Manifest(
            fingerprint=fingerprint, source=source, source_length=source_length, settings=dict(settings or {})
        )
        # From the innermost out, for `discard`.
        self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be written: {error.strerror}. Choose another directory for the shards."
            ) from error
        try:
            self.manifest = self._begin(wanted)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, wanted: Manifest) -> Manifest:
        leftovers = {path.name for path in self.directory.iterdir() if _SHARD_FILE.fullmatch(path.name)}
        if not (self.directory / MANIFEST_NAME).exists():
            if any(name.endswith(".parquet") for name in leftovers):
                raise CheckpointError(
                    f"{self.directory} holds shards without a {MANIFEST_NAME}. Choose an empty directory."
                )
            found = wanted
            self._replace(MANIFEST_NAME, lambda path: path.write_text(found.to_json(), encoding="utf-8"))
        else:
            found = Manifest.load(self.directory)
            compare_fingerprints(self.directory, found.fingerprint, wanted.fingerprint)
            theirs, ours = (found.source, found.source_length), (wanted.source, wanted.source_length)
            if theirs != ours:
                raise CheckpointError(
                    f"{self.directory} was begun with {theirs[1]} clips of {theirs[0]}, not {ours[1]} of {ours[0]}. "
                    "Choose another directory, or go on with the same source."
                )
            if dict(found.settings) != dict(wanted.settings):
                raise ConfigError(
                    f"{self.directory} was begun with {dict(found.settings)}, got {dict(wanted.settings)}. "
                    "Go on with the same settings, or choose another directory."
                )
        for name in leftovers - {shard.file for shard in found.shards}:
            (self.directory / name).unlink(missing_ok=True)
        return found

    @property
    def next_index(self) -> int:
        """The first index of the source that has yet to be written."""
        return self.manifest.next_index

    def write(self, clips: Sequence[EncodedClip], stop: int, skipped: Sequence[tuple[str, str]] = ()) -> Shard:
        """Write the next shard; when this returns, it is on the disk and in the manifest.

        Args:
            clips: in the source's order.
            stop: the shard covers the source's indices from `next_index` to `stop`, without it.
            skipped: (key, reason) of those clips in the range that could not be read.

        Raises:
            CheckpointError: the disk is full or fails; nothing half written is left behind.
            ConfigError: the range and the clips disagree.
        """
        start = self.next_index
        if not start < stop <= self.manifest.source_length or len(clips) + len(skipped) != stop - start:
            raise ConfigError(
                f"a shard of the indices {start} to {stop} needs {stop - start} clips, written or skipped, within "
                f"{self.manifest.source_length}; got {len(clips)} and {len(skipped)}."
            )
        name = f"shard-{len(self.manifest.shards):06d}.parquet"
        table = _to_table(clips)
        # Codes are near random: a dictionary or heavier compression costs time and gains nothing.
        self._replace(name, lambda path: pq.write_table(table, path, compression="zstd", use_dictionary=False))
        shard = Shard(file=name, rows=len(clips), sha256=sha256_of(self.directory / name), start=start, stop=stop)
        manifest = dataclasses.replace(
            self.manifest, shards=(*self.manifest.shards, shard), skipped=(*self.manifest.skipped, *skipped)
        )
        self._replace(MANIFEST_NAME, lambda path: path.write_text(manifest.to_json(), encoding="utf-8"))
        self.manifest = manifest
        return shard

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        """Write beside the place, sync, rename, sync the directory."""
        part = self.directory / f"{name}.part"
        try:
            write(part)
            _sync(part)
            part.replace(self.directory / name)
            _sync(self.directory)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.directory / name} could not be written: {error.strerror or error}. Make room and start again: "
                "the finished shards are kept."
            ) from error

    def discard(self) -> None:
        """Take away all that was written, by this writer or an earlier one, and the directories that this one made."""
        # The manifest goes last, so that a directory left half discarded is still known as ours.
        for name in (*(shard.file for shard in self.manifest.shards), MANIFEST_NAME, _LOCK_NAME):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else put something there
            for path in self._made:
                path.rmdir()

    def close(self) -> None:
        """Release the directory."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock_directory(directory: Path) -> BinaryIO:
    """Keep other processes from writing into a directory until the file that is returned is closed.

    Raises:
        CheckpointError: another process writes there.
        OSError: the directory cannot be written.
    """
    lock = (directory / _LOCK_NAME).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise CheckpointError(
            f"{directory} is being written by another process. Wait for it, or choose another directory."
        ) from error
    return lock


class ShardReader:
    """Random access to the clips of one directory or several. Built by `open_shards`; safe to share among threads."""

    def __init__(
        self, directories: Sequence[Path], manifests: Sequence[Manifest], batches: list[pa.RecordBatch]
    ) -> None:
        self.manifests = tuple(manifests)
        self._directories = tuple(directories)
        self._chunks = [_Chunk(batch) for batch in batches if batch.num_rows]
        self._ends = list(itertools.accumulate(len(chunk) for chunk in self._chunks))

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary that the codes belong to."""
        return self.manifests[0].fingerprint

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> EncodedClip:
        if not 0 <= row < len(self):
            raise IndexError(f"a row must lie in [0, {len(self)}), got {row}.")
        place = bisect.bisect_right(self._ends, row)
        chunk = self._chunks[place]
        return chunk[row - self._ends[place] + len(chunk)]

    def __iter__(self) -> Iterator[EncodedClip]:
        return (self[row] for row in range(len(self)))

    def verify(self) -> None:
        """Read every file again and compare its checksum; some seconds for a gigabyte.

        Raises:
            CheckpointError: a file differs from what was written.
        """
        for directory, manifest in zip(self._directories, self.manifests, strict=True):
            for shard in manifest.shards:
                found = sha256_of(directory / shard.file)
                if found != shard.sha256:
                    raise CheckpointError(
                        f"{directory / shard.file} must have the sha256 {shard.sha256}, got {found}: the file is "
                        "damaged. Encode the clips again."
                    )


def open_shards(
    directories: str | Path | Sequence[str | Path],
    fingerprint: str | None,
    *,
    allow_incomplete: bool = False,
    cache_directory: str | Path | None = None,
) -> ShardReader:
    """Open shards for reading.

    Args:
        directories: one, or several that follow each other.
        fingerprint: of the vocabulary in use, compared with the shards'; None looks without comparing.
        allow_incomplete: accept a directory whose encoding has not come to its end.
        cache_directory: where `datasets` keeps a memory-mapped copy, for shards larger than memory. Without it the
            codes are read into memory: four bytes a code, half a second for 30,000 clips of 500 codes.

    Raises:
        CheckpointError: the fingerprints differ, or a file is missing, damaged or incomplete.
    """
    paths = [Path(d) for d in ([directories] if isinstance(directories, str | Path) else directories)]
    if not paths:
        raise ConfigError("at least one directory of shards must be named, got none.")
    manifests = [Manifest.load(path) for path in paths]
    batches: list[pa.RecordBatch] = []
    for path, manifest in zip(paths, manifests, strict=True):
        compare_fingerprints(
            path, manifest.fingerprint, manifests[0].fingerprint if fingerprint is None else fingerprint
        )
        if not manifest.complete and not allow_incomplete:
            raise CheckpointError(
                f"{path} must cover {manifest.source_length} clips of {manifest.source}, got {manifest.next_index}: "
                "its encoding was interrupted. Run `poet encode` with the same arguments to finish it."
            )
        if cache_directory is None:
            batches += _read(path, manifest)
        elif manifest.count:
            batches += _map(path, manifest, Path(cache_directory))
    return ShardReader(paths, manifests, batches)


def count_uncaptioned(directory: str | Path, manifest: Manifest) -> int:
    """How many clips of a directory have no caption, so that no task with a text can use them. Reads captions alone.

    Args:
        directory: of shards.
        manifest: of that directory.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    texts = (_read_shard(Path(directory), shard, ["text"])["text"] for shard in manifest.shards)
    return sum(text.null_count for text in texts)


def _read(directory: Path, manifest: Manifest) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    for shard in manifest.shards:
        batches += _read_shard(directory, shard).combine_chunks().to_batches()
    return batches


def _read_shard(directory: Path, shard: Shard, columns: list[str] | None = None) -> pa.Table:
    path = directory / shard.file
    try:
        table = pq.read_table(path, schema=_SCHEMA, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Restore it or encode the clips again.") from error
    _compare_rows(path, table.num_rows, shard.rows)
    return table


def _map(directory: Path, manifest: Manifest, cache_directory: Path) -> list[pa.RecordBatch]:
    """A memory-mapped copy through Hugging Face `datasets`, which also notices when a file has changed."""
    import datasets  # a second of imports that reading into memory does not need

    files = [str(directory / shard.file) for shard in manifest.shards]
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        copy = datasets.Dataset.from_parquet(files, cache_dir=str(cache_directory))
    except (OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise CheckpointError(f"{directory} cannot be read ({error}). Restore it or encode the clips again.") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    _compare_rows(directory, len(copy), manifest.count)
    batches: list[pa.RecordBatch] = copy.data.table.select(_SCHEMA.names).to_batches()
    return batches


class _Chunk:
    """The rows of one record batch, their codes as views of Arrow's memory."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._rows: int = batch.num_rows
        self._key, self._text = batch["key"], batch["text"]
        self._video = _ListColumn(batch["video_codes"]), _ListColumn(batch["video_shape"])
        self._audio = _ListColumn(batch["audio_codes"]), _ListColumn(batch["audio_shape"])
        self._fps, self._resolution = batch["fps"], _ListColumn(batch["resolution"])

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> EncodedClip:
        height_width = self._resolution[row].tolist()
        return EncodedClip(
            key=self._key[row].as_py(),
            text=self._text[row].as_py(),
            video_codes=_reshape(*self._video, row),
            audio_codes=_reshape(*self._audio, row),
            fps=self._fps[row].as_py(),
            resolution=(height_width[0], height_width[1]) if height_width else None,
        )


class _ListColumn:
    def __init__(self, column: pa.ListArray) -> None:
        self.present: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
        self.offsets: NDArray[np.int32] = column.offsets.to_numpy()
        self.values: NDArray[np.int32] = column.values.to_numpy()

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


def _reshape(codes: _ListColumn, shape: _ListColumn, row: int) -> NDArray[np.int32] | None:
    return codes[row].reshape(shape[row]) if codes.present[row] else None


def _to_table(clips: Sequence[EncodedClip]) -> pa.Table:
    videos = [clip.video_codes for clip in clips]
    audios = [clip.audio_codes for clip in clips]
    columns = [
        pa.array([clip.key for clip in clips], pa.string()),
        pa.array([clip.text for clip in clips], pa.string()),
        *(
            pa.array([None if codes is None else part(codes) for codes in column], _CODES)
            for column in (videos, audios)
            for part in (np.ravel, lambda codes: np.array(codes.shape, np.int32))
        ),
        pa.array([clip.fps for clip in clips], pa.float64()),
        pa.array([clip.resolution for clip in clips], _CODES),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _compare_rows(path: Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise CheckpointError(f"{path} must hold {wanted} clips, got {found}. Encode the clips again.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
