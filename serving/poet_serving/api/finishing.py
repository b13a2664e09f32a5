"""From output ids to files, beside the event loop: one thread decodes, as many clips together as are waiting.

Knows the pipeline and files of clips; it does not know jobs or engines.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from poet.generation.pipeline import GeneratedClip, Pipeline, PreparedClip
from poet.media import Clip, write_clip

__all__ = ["Finisher", "clip_file", "encode_clip"]

MAX_TOGETHER: Final = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Waiting:
    prepared: PreparedClip
    ids: Sequence[int]
    future: asyncio.Future[GeneratedClip]


class Finisher:
    """Turns outputs into clips in a thread of its own. To be made in the event loop that awaits it.

    Args:
        pipeline: whose tokenizers decode.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="poet-finisher", daemon=True)
        self._thread.start()

    async def finish(self, prepared: PreparedClip, ids: Sequence[int]) -> GeneratedClip:
        """Decode an output.

        Args:
            prepared: what was asked for.
            ids: what an engine wrote.

        Raises:
            PoetError: it cannot be decoded.
        """
        future: asyncio.Future[GeneratedClip] = self._loop.create_future()
        self._queue.put(_Waiting(prepared=prepared, ids=ids, future=future))
        return await future

    def close(self) -> None:
        """End the thread once it has done what waits."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            together = [first]
            ending = False
            while len(together) < MAX_TOGETHER and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    ending = True
                    break
                together.append(more)
            self._finish_together([item for item in together if not item.future.cancelled()])
            if ending:
                return

    def _finish_together(self, items: Sequence[_Waiting]) -> None:
        if not items:
            return
        try:
            made = self._pipeline.finish_all([item.prepared for item in items], [list(item.ids) for item in items])
        except Exception as error:  # noqa: BLE001 - of any kind: whoever waits must hear of it
            if len(items) > 1:  # one of them is to blame; the others shall not suffer
                for item in items:
                    self._finish_together([item])
                return
            self._answer(items[0].future, error)
            return
        for item, clip in zip(items, made, strict=True):
            self._answer(item.future, clip)

    def _answer(self, future: asyncio.Future[GeneratedClip], answer: GeneratedClip | Exception) -> None:
        def settle() -> None:
            if future.done():  # nobody waits any longer
                return
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        self._loop.call_soon_threadsafe(settle)


def clip_file(clip: Clip) -> str:
    """Name of the file that a clip is kept in."""
    if clip.frames is None:
        return "clip.wav"
    return "clip.mp4"


def encode_clip(clip: Clip, suffix: str, metadata: dict[str, str] | None = None, folder: Path | None = None) -> bytes:
    """A clip as the bytes of a file.

    Args:
        clip: pictures, sound or both.
        suffix: of the format, as `poet.media.write_clip` knows it.
        metadata: what made it.
        folder: where the file is while it is written; None: where temporary files are, and one that is being written
            when the process is killed stays.

    Raises:
        MediaError: the format holds nothing of such a clip.
    """
    with tempfile.TemporaryDirectory(prefix="poet-", dir=folder) as directory:
        path = Path(directory) / f"clip{suffix}"
        write_clip(clip, path, metadata=metadata)
        return path.read_bytes()
