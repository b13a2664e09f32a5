"""Clips read ahead by a thread or worker processes, in their order. Imports no torch, so that workers start fast."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.process import BaseProcess

from poet.data.clips import CaptionedClip, ClipSource
from poet.errors import MediaError

__all__ = ["Unreadable", "read_ahead"]


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """In place of a clip: its key, and why it cannot be had."""

    key: str
    reason: str


def read_ahead(
    source: ClipSource, start: int, lookahead: int, num_processes: int
) -> Generator[CaptionedClip | Unreadable, None, None]:
    """Clips from `start` on, in order. Close the generator to stop the reading.

    Args:
        source: the clips; picklable if there are processes.
        start: number of the first.
        lookahead: clips that may wait in memory.
        num_processes: 0 reads in one thread of this process.

    Yields:
        Every clip, or an `Unreadable` where the source raises MediaError. Other errors are raised.

    Raises:
        MediaError: a worker process was killed, as happens where memory runs out.
    """
    executor: Executor
    if num_processes:
        executor = ProcessPoolExecutor(
            num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(source,)
        )
        read: Callable[[int], CaptionedClip | Unreadable] = _read_in_worker
    else:
        executor = ThreadPoolExecutor(1, thread_name_prefix="clips")
        read = _Reading(source)
    pending: deque[Future[CaptionedClip | Unreadable]] = deque()
    try:
        for index in range(start, len(source)):
            pending.append(executor.submit(read, index))
            if len(pending) == lookahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor as error:
        raise MediaError(
            "a process that reads clips was ended from outside, mostly because memory ran out. "
            "Start the same command again; it goes on after the last finished file."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Reading:
    source: ClipSource

    def __call__(self, index: int) -> CaptionedClip | Unreadable:
        try:
            return self.source[index]
        except MediaError as error:
            return Unreadable(str(error.filename or f"{self.source.name}[{index}]"), str(error))


_worker: list[_Reading] = []
"""What a worker process reads, once it has been started."""


def _start_worker(source: ClipSource) -> None:
    _worker[:] = [_Reading(source)]
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker whose parent was killed would wait for work for ever: nobody is left to close the queue.
        threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()


def _leave_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _read_in_worker(index: int) -> CaptionedClip | Unreadable:
    return _worker[0](index)
