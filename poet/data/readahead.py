"""Clips, or what else files give, read ahead by a thread or worker processes, in their order.

Imports no torch, so that workers start fast.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from poet.errors import MediaError

__all__ = ["InRuns", "Readable", "Unreadable", "read_ahead", "runs_of"]

_Item = TypeVar("_Item")
_Item_co = TypeVar("_Item_co", covariant=True)


class Readable(Protocol[_Item_co]):
    """Things by number; a `ClipSource` is one."""

    @property
    def name(self) -> str:
        """What they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _Item_co:
        """Thing `index` in [0, len).

        Raises:
            MediaError: it cannot be read; `filename` says which one.
        """


@runtime_checkable
class InRuns(Protocol):
    """A source whose neighbours are read faster together, as scenes of one film are."""

    @property
    def run_length(self) -> int:
        """How many are read together at most."""

    def read_run(self, indices: range) -> Sequence[Any]:
        """Those of some numbers, in order; an `Unreadable` in place of what cannot be read."""


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """In place of a clip: its key, and why it cannot be had."""

    key: str
    reason: str


def read_ahead(
    source: Readable[_Item],
    start: int,
    lookahead: int,
    num_processes: int,
    stride: int | None = None,
    stop: int | None = None,
) -> Generator[_Item | Unreadable, None, None]:
    """Things from `start` on, in order. Close the generator to stop the reading.

    Args:
        source: where they are read; picklable if there are processes. One that is `InRuns` is read in runs.
        start: number of the first.
        lookahead: things that may wait in memory, but at least two, and a run, for each process.
        num_processes: 0 reads in one thread of this process.
        stride: no run crosses a multiple of it, so that what is read together does not depend on `start` where that
            is one.
        stop: number behind the last; None reads all.

    Yields:
        Every thing, or an `Unreadable` where the source raises MediaError. Other errors are raised.

    Raises:
        MediaError: a worker process was killed, as happens where memory runs out.
    """
    executor: Executor
    if num_processes:
        executor = ProcessPoolExecutor(
            num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(source,)
        )
        read: Callable[[range], Sequence[_Item | Unreadable]] = _read_in_worker
    else:
        executor = ThreadPoolExecutor(1, thread_name_prefix="clips")
        read = _Reading(source)
    run_length = source.run_length if isinstance(source, InRuns) else 1
    most = max(1, num_processes, max(lookahead, 2 * num_processes) // run_length)
    pending: deque[Future[Sequence[_Item | Unreadable]]] = deque()
    try:
        for run in runs_of(range(start, len(source) if stop is None else stop), run_length, stride):
            ready = pending.popleft().result() if len(pending) == most else ()
            pending.append(executor.submit(read, run))
            yield from ready
        while pending:
            yield from pending.popleft().result()
    except BrokenExecutor as error:
        raise MediaError(
            "a process that reads clips was ended from outside, mostly because memory ran out. "
            "Start the same command again; it goes on after the last finished file."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def runs_of(indices: range, run_length: int, stride: int | None) -> Iterator[range]:
    """Cut consecutive numbers into runs of at most `run_length`, none of which crosses a multiple of `stride`."""
    start = indices.start
    while start < indices.stop:
        edge = indices.stop if stride is None else start - start % stride + stride
        stop = min(start + run_length, edge, indices.stop)
        yield range(start, stop)
        start = stop


@dataclasses.dataclass(frozen=True)
class _Reading(Generic[_Item]):
    source: Readable[_Item]

    def __call__(self, indices: range) -> Sequence[_Item | Unreadable]:
        if isinstance(self.source, InRuns):
            return self.source.read_run(indices)
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> _Item | Unreadable:
        try:
            return self.source[index]
        except MediaError as error:
            return Unreadable(str(error.filename or f"{self.source.name}[{index}]"), str(error))


_worker: list[_Reading[Any]] = []
"""What a worker process reads, once it has been started."""


def _start_worker(source: Readable[Any]) -> None:
    _worker[:] = [_Reading(source)]
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker whose parent was killed would wait for work for ever: nobody is left to close the queue.
        threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()


def _leave_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _read_in_worker(indices: range) -> Sequence[Any]:
    return _worker[0](indices)
