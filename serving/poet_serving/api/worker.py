"""Carries out jobs: takes them from the store as there is room, and gives back what could not be done.

A job that was begun and never ended waits again after the next start (`JobStore.recover`). One that vLLM left in the
lurch, because the server ends, is given back at once. This module knows orders, the engine and the store; not HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from poet.errors import MediaError, PoetError
from poet.generation.engine import GenerationRequest
from poet.generation.pipeline import ClipRequest, GeneratedClip, Pipeline
from poet.grammar import max_output_length
from poet.media import Clip
from poet_serving.api.finishing import Finisher, clip_file, encode_clip
from poet_serving.api.metrics import Metrics
from poet_serving.api.orders import REFERENCE, Order, unpack_clip
from poet_serving.asynchronous import EngineGoneError
from poet_serving.jobs import Job, JobError, JobStatus, JobStore
from poet_serving.schema import RequestError

__all__ = ["Worker", "Writes"]

_log = logging.getLogger(__name__)

SWEEP_EVERY: Final = 60.0  # seconds
ENDING: Final = 2.0  # seconds, at most, from an engine's first error to its being known as gone
_EPSILON: Final = 1e-6


class Writes(Protocol):
    """What writes ids for a worker; `poet_serving.asynchronous.AsyncEngine` is such."""

    @property
    def is_running(self) -> bool:
        """Whether it can write at all; if not, what went wrong is no job's fault."""

    async def write(self, request: GenerationRequest, progress: Callable[[int], None] | None = None) -> list[int]:
        """Write one output; `progress` is told the ids written so far."""


class Worker:
    """Carries out the jobs of a store, several at a time. To be made in the event loop that runs it.

    Args:
        store: the jobs.
        pipeline: prepares and decodes.
        engine: writes.
        metrics: is told what happens.
        capacity: jobs at a time.
        lasts: seconds that a job's files are kept for; None: for ever.
        max_bytes: of all jobs' files together, beyond which the oldest go; None: no limit.
        engine_gone: called once when the engine is found to be gone by itself: nothing will be written any more.
        is_told_to_end: whether the server was asked to end; if so, that the engine is gone is no job's fault.
    """

    def __init__(
        self,
        store: JobStore,
        pipeline: Pipeline,
        engine: Writes,
        metrics: Metrics,
        *,
        capacity: int,
        lasts: float | None = None,
        max_bytes: int | None = None,
        engine_gone: Callable[[], None] = lambda: None,
        is_told_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store, self._pipeline, self._engine, self._metrics = store, pipeline, engine, metrics
        self._capacity, self._lasts, self._max_bytes = capacity, lasts, max_bytes
        self._engine_gone, self._is_told_to_end = engine_gone, is_told_to_end
        self._finisher = Finisher(pipeline)
        self._wake = asyncio.Event()
        self._is_ending = False  # without an engine every job would be begun and given back, again and again
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, int] = {}
        self._watchers: dict[str, list[asyncio.Future[None]]] = {}
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, with what an earlier server left."""
        again = self._store.recover(lasts=self._lasts)
        if again:
            _log.info("%d jobs of an earlier run wait again", again)
        self._loops = [asyncio.create_task(self._take()), asyncio.create_task(self._sweep())]

    async def stop(self) -> None:
        """End: what is being done is given back to the store."""
        ending = [*self._loops, *self._tasks.values()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.to_thread(self._finisher.close)

    def wake(self) -> None:
        """There is a new job."""
        self._wake.set()

    def progress(self, id: str) -> int | None:
        """Percent of a job that is being carried out; None of any other."""
        return self._progress.get(id)

    @contextlib.asynccontextmanager
    async def watched(self, id: str) -> Any:
        """A future that is done when a job ends; to be entered before the job can have ended."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.setdefault(id, []).append(future)
        try:
            yield future
        finally:
            watchers = self._watchers[id]
            watchers.remove(future)
            if not watchers:
                del self._watchers[id]

    async def cancel(self, id: str) -> None:
        """Stop carrying out a job that has been deleted; the engine is free of it when this returns."""
        task = self._tasks.get(id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._tell(id)

    async def _take(self) -> None:
        """Take jobs while there is room for them."""
        while True:
            self._wake.clear()
            room = 0 if self._is_ending else self._capacity - len(self._tasks)
            try:
                for job in await asyncio.to_thread(self._store.claim, room) if room > 0 else []:
                    task = asyncio.create_task(self._carry_out(job))
                    self._tasks[job.id] = task
                    task.add_done_callback(lambda _, id=job.id: self._ended(id))  # type: ignore[misc]
                self._metrics.running.set(len(self._tasks))
                self._metrics.queued.set(await asyncio.to_thread(self._store.count, JobStatus.QUEUED))
            except JobError as error:
                _log.error("%s", error)
                await asyncio.sleep(1)
                continue
            await self._wake.wait()

    def _ended(self, id: str) -> None:
        del self._tasks[id]
        self._progress.pop(id, None)
        self._tell(id)
        self.wake()

    def _tell(self, id: str) -> None:
        """Whoever watches a job looks again."""
        for future in self._watchers.get(id, ()):
            if not future.done():
                future.set_result(None)

    async def _carry_out(self, job: Job) -> None:
        begun = time.monotonic()
        self._progress[job.id] = 0
        try:
            order = Order.from_dict(job.body)
            made = await self._write(job, order)
            result, files = await asyncio.to_thread(self._describe, made)
            kept = await asyncio.to_thread(self._store.complete, job.id, result, files, lasts=self._lasts)
        except asyncio.CancelledError:  # the server ends, or the job was deleted
            await asyncio.shield(asyncio.to_thread(self._store.release, job.id))
            raise
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, the job must end with its reason
            if await self._has_gone(error):
                await self._give_back(job)
                return
            await self._fail(job, error)
            return
        if kept:
            self._metrics.ended.labels("completed").inc()
            self._metrics.clip.observe(time.monotonic() - begun)

    async def _has_gone(self, error: Exception) -> bool:
        """Whether an error is that of an engine that ends; its sockets are closed a moment before it says so."""
        if isinstance(error, EngineGoneError) or not self._engine.is_running:
            return True
        if isinstance(error, PoetError):
            return False
        await asyncio.sleep(ENDING)
        return not self._engine.is_running

    async def _give_back(self, job: Job) -> None:
        """The engine is gone: as the server was told to end, or because the job is more than it can bear."""
        suspect = not self._is_told_to_end()
        if not self._is_ending:
            self._is_ending = True
            if suspect:
                self._engine_gone()
        try:
            await asyncio.to_thread(self._store.release, job.id, suspect=suspect, lasts=self._lasts)
        except JobError as error:  # it waits again after the next start
            _log.error("%s", error)

    async def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, RequestError):
            code, message = error.code, str(error)
        elif isinstance(error, JobError | MediaError):  # of files and rows: no business of the client's
            _log.error("job %s failed: %s", job.id, error)
            code, message = "server_error", "the clip could not be kept; the server's log says why."
        elif isinstance(error, PoetError):
            code, message = "generation_failed", str(error)
        else:
            _log.exception("job %s failed", job.id, exc_info=error)
            code, message = "server_error", "the server could not carry out the job; its log says why."
        self._metrics.ended.labels("failed").inc()
        self._metrics.errors.labels(code).inc()
        try:
            await asyncio.to_thread(self._store.fail, job.id, code, message, lasts=self._lasts)
        except JobError as trouble:  # it is begun again after the next start
            _log.error("%s", trouble)

    async def _write(self, job: Job, order: Order) -> GeneratedClip:
        """Write what is asked for; an extension in as many pieces as its length needs."""
        order.check_adapter(self._pipeline.adapters)
        clip = await asyncio.to_thread(self._read_reference, job.id)
        request = order.to_request(self._pipeline.bundle, clip)
        if order.extend_by is None or clip is None:
            return await self._write_piece(job, request, 0.0, 1.0)
        piece = self._pipeline.geometry.duration / order.extend_by
        before, target = clip.duration, clip.duration + order.extend_by
        pieces = 0
        while True:
            done = (clip.duration - before) / order.extend_by
            pieces += 1
            made = await self._write_piece(job, dataclasses.replace(request, clip=clip), done, min(1.0, done + piece))
            if made.clip is None or made.clip.duration <= clip.duration + _EPSILON:
                raise RequestError("the clip cannot be extended by this model.", code="generation_failed")
            clip = made.clip
            if clip.duration >= target - _EPSILON:
                return dataclasses.replace(made, clip=_cut(clip, target))
            # The same seed would write the same motion again.
            sampling = dataclasses.replace(made.request.sampling, seed=(made.request.sampling.seed or 0) + pieces)
            request = dataclasses.replace(request, sampling=sampling)

    async def _write_piece(self, job: Job, request: ClipRequest, first: float, last: float) -> GeneratedClip:
        prepared = await asyncio.to_thread(self._pipeline.prepare, request)
        written = await self._engine.write(
            prepared.generation, self._follow(job, max_output_length(prepared.generation.grammar), first, last)
        )
        self._metrics.ids.inc(len(written))
        return await self._finisher.finish(prepared, written)

    def _follow(self, job: Job, longest: int, first: float, last: float) -> Callable[[int], None]:
        """What notes how far a job is."""
        first_frame = math.prod(self._pipeline.geometry.latent_shape[1:])
        shown = first > 0

        def tell(count: int) -> None:
            nonlocal shown
            share = first + (last - first) * min(1.0, count / max(1, longest))
            self._progress[job.id] = min(99, int(100 * share))
            if not shown and count >= first_frame:
                shown = True
                self._metrics.first_frame.observe(max(0.0, time.time() - job.created_at))

        return tell

    def _read_reference(self, id: str) -> Clip | None:
        path: Path = self._store.file(id, REFERENCE)
        return unpack_clip(path.read_bytes()) if path.exists() else None

    def _describe(self, made: GeneratedClip) -> tuple[dict[str, Any], dict[str, bytes]]:
        with self._store.workspace() as folder:
            return describe(made, folder)

    async def _sweep(self) -> None:
        while True:
            try:
                gone = await asyncio.to_thread(self._store.sweep, self._max_bytes)
            except JobError as error:
                _log.error("%s", error)
            else:
                if gone:
                    _log.info("%d videos were older or larger than is kept", len(gone))
            await asyncio.sleep(SWEEP_EVERY)


def describe(made: GeneratedClip, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a job became, for the store: plain values, and files by name, which are written in a folder first."""
    result: dict[str, Any] = {"metadata": made.metadata, "prompt": made.request.text, "num_ids": len(made.ids)}
    if made.text is not None:
        result["text"] = made.text
    if made.clip is None:
        return result, {}
    name = clip_file(made.clip)
    result |= {"file": name, "seconds": made.clip.duration, "has_sound": made.clip.samples is not None}
    if made.clip.frames is not None:
        result["size"] = f"{made.clip.frames.shape[2]}x{made.clip.frames.shape[1]}"
    return result, {name: encode_clip(made.clip, Path(name).suffix, made.metadata, folder)}


def _cut(clip: Clip, seconds: float) -> Clip:
    """The first seconds of a clip, in whole frames."""
    if clip.frames is None:
        samples = None if clip.samples is None else clip.samples[: round(seconds * clip.sample_rate)]
        return dataclasses.replace(clip, samples=samples)
    count = min(len(clip.frames), max(1, round(seconds * clip.fps)))
    samples = None if clip.samples is None else clip.samples[: round(count / clip.fps * clip.sample_rate)]
    return dataclasses.replace(clip, frames=clip.frames[:count], samples=samples)
