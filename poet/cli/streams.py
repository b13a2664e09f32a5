"""`--stream`: a clip or a film into a file that can be played while it is being written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poet.cli.output import progress
from poet.errors import ConfigError

if TYPE_CHECKING:
    from poet.generation.streaming import Piece
    from poet.tasks import ClipGeometry

__all__ = ["check_stream", "stream_to_file"]


def check_stream(targets: Sequence[Path]) -> None:
    """Raise unless what is asked for can be written piece by piece.

    Raises:
        ConfigError: several files, or one of another format.
    """
    if len(targets) > 1:
        raise ConfigError(f"--stream writes one clip, got --num-samples {len(targets)}. Leave one of them out.")
    if targets[0].suffix.lower() != ".mp4":
        raise ConfigError(
            f"--stream writes .mp4, which plays while it grows, got {targets[0]}. Change the file's name."
        )


def stream_to_file(
    pieces: Generator[Piece, None, None],
    geometry: ClipGeometry,
    target: Path,
    sources: Mapping[str, str],
    *,
    has_sound: bool,
    num_frames: int,
    keep_metadata: bool,
) -> dict[str, Any]:
    """Write a clip or a film into a file that grows.

    Args:
        pieces: of it.
        geometry: its size and rates.
        target: an .mp4.
        sources: what it is made from, for its metadata.
        has_sound: whether it will have sound.
        num_frames: about as many as there will be, for the progress bar.
        keep_metadata: whether to write metadata.

    Returns:
        Its file, duration and metadata, and `first_frame`: seconds until there was a frame.
    """
    from poet.media import ClipStream

    started, first_frame, done = time.monotonic(), 0.0, 0
    piece = next(pieces)  # a request that cannot be is refused before there is a file
    facts = (piece.metadata or {}) | dict(sources)
    rate = geometry.sample_rate if has_sound else None
    height, width = geometry.resolution
    with (
        contextlib.closing(pieces),  # the writer has stopped before its engine is closed
        ClipStream(target, fps=geometry.fps, height=height, width=width, sample_rate=rate) as file,
        progress("writing frames") as advance,
    ):
        file.metadata = facts if keep_metadata else None
        while not piece.is_last:
            if piece.frames is not None:
                file.write(frames=piece.frames)
                first_frame = first_frame or time.monotonic() - started
                done += len(piece.frames)
                advance(done, max(done, num_frames), "")
            if piece.samples is not None:
                file.write(samples=piece.samples)
            piece = next(pieces)
        facts = (piece.metadata or {}) | dict(sources)
        file.metadata = facts if keep_metadata else None
    return {
        "file": str(target),
        "duration": round(done / geometry.fps, 3),
        **facts,
        "first_frame": round(first_frame, 2),
    }
