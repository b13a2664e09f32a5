"""Pictures of a source, decoded once: what a training goes through again and again is read from one file.

Knows frames by number, nothing of what they show. A file of a long film takes a decoder a tenth of a second and more a
clip, a training step has many clips, and the second time they are the same.

Legend: N frames of H x W pixels.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poet.training.video_tokenizer import FrameSource

__all__ = ["KeptFrames"]

LARGEST: Final = 16 * 2**30
"""Bytes that are kept of one source; of more, clips are decoded every time."""

_LOGGER = logging.getLogger(__name__)


class KeptFrames:
    """A `FrameSource` whose clips are decoded the first time that they are asked for, and kept.

    What was kept stays when the process is killed: a clip counts as kept only after all of it has been written.

    Args:
        source: of the clips, all of one shape.
        name: of the clips, the same for the same clips only.
        directory: where to keep them; two files for each source.

    Raises:
        OSError: there is no room for them.
    """

    def __init__(self, source: FrameSource, name: str, directory: Path) -> None:
        self._source = source
        first = source.frames(0)
        self._kept: NDArray[np.uint8] | None = None
        size = len(source) * first.nbytes
        if size > LARGEST:
            _LOGGER.warning("the frames of %s take %.0f GiB and are not kept", name, size / 2**30)
            return
        directory.mkdir(parents=True, exist_ok=True)
        mark = hashlib.sha256(f"{name} {len(source)} {first.shape}".encode()).hexdigest()[:16]
        self._kept = _mapped(directory / f"{mark}.frames", (len(source), *first.shape))
        self._is_kept = _mapped(directory / f"{mark}.kept", (len(source),))

    def __len__(self) -> int:
        return len(self._source)

    def frames(self, index: int) -> NDArray[np.uint8]:
        """(N, H, W, 3) uint8 of clip `index`.

        Raises:
            MediaError: it is not kept yet and cannot be read.
        """
        if self._kept is None:
            return self._source.frames(index)
        if not self._is_kept[index]:
            frames = self._source.frames(index)
            if frames.shape != self._kept.shape[1:]:
                return frames  # whoever asked says what is wrong with it
            self._kept[index] = frames
            self._is_kept[index] = 1
        kept: NDArray[np.uint8] = np.array(self._kept[index])
        return kept


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A file as an array, zero where it is new. All of its room is taken now: later a full disk would be a signal."""
    size = int(np.prod(shape))
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, np.uint8, mode="r+", shape=shape)
