"""Carries out batches: their lines become jobs, and the jobs' results two files.

A line's job has a key made of the batch's id and the line's number, and what became of a line is written down as soon
as it ends. So a server that was killed goes on where it was: it does no line twice, and loses none whose job is gone.
The files, of lines that were completed and of lines that were not, are written when the last job has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from poet.errors import PoetError
from poet_serving.api.guard import TooMany
from poet_serving.batch import BatchLine, read_lines
from poet_serving.file_store import Batch
from poet_serving.jobs import Job, JobStatus
from poet_serving.schema import RequestError, VideoBody

if TYPE_CHECKING:
    from poet_serving.api.service import Service

__all__ = ["BatchRunner"]

_log = logging.getLogger(__name__)
_AGAIN: Final = 1.0  # seconds after which it is tried again where there is no room; doubled each time where it fails,
_LONGEST: Final = 60.0  # up to these
MAX_TRIES: Final = 5  # of a line that the server fails at

Answer = TypeVar("Answer")


class BatchRunner:
    """Carries out the batches of a service. To be made in its event loop.

    Args:
        service: keeps jobs and files.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._running: dict[str, _Running] = {}

    def resume(self) -> None:
        """Go on with what an earlier server left."""
        for batch in self._service.files.open_batches():
            self._start(batch, is_resumed=True)

    def start(self, batch: Batch) -> None:
        """Begin a new batch."""
        self._start(batch, is_resumed=False)

    def _start(self, batch: Batch, *, is_resumed: bool) -> None:
        running = _Running(self._service, batch, is_resumed=is_resumed)
        self._running[batch.id] = running
        running.task.add_done_callback(lambda _: self._running.pop(batch.id, None))

    def cancel(self, id: str) -> None:
        """A batch is to end now."""
        if id in self._running:
            self._running[id].cancelled.set()

    async def stop(self) -> None:
        """End; what is open goes on after the next start."""
        ending = [running.task for running in self._running.values()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Heading:
    """What a result says of its line. The line itself, which may hold a clip, is let go while its job is carried out.

    Attributes:
        batch: id of its batch.
        number: of the line, from 1.
        custom_id: the caller's own name for it, or None.
        digest: of the line.
    """

    batch: str
    number: int
    custom_id: str | None
    digest: str

    @classmethod
    def of(cls, batch: Batch, line: BatchLine) -> Self:
        """That of a line of a batch."""
        return cls(batch=batch.id, number=line.number, custom_id=line.custom_id, digest=line.digest)

    @property
    def key(self) -> str:
        """The Idempotency-Key of its job."""
        return f"{self.batch}/{self.number}"

    def result(self, status: int, body: Mapping[str, Any]) -> str:
        """A line of a file of results.

        Args:
            status: of HTTP.
            body: of the answer.
        """
        value = {
            "id": f"batch_req_{self.digest[:24]}",
            "custom_id": self.custom_id,
            "response": {"status_code": status, "request_id": f"req_{self.digest[24:48]}", "body": body},
            "error": None,
            "poet": {"line": self.number, "batch": self.batch},
        }
        return json.dumps(value) + "\n"


class _Running:
    """One batch that is being carried out.

    Args:
        service: keeps jobs and files.
        batch: an open one.
        is_resumed: whether an earlier server began it, so that lines may have jobs.
    """

    def __init__(self, service: Service, batch: Batch, *, is_resumed: bool) -> None:
        self._service, self._batch, self._is_resumed = service, batch, is_resumed
        self._watchers: dict[asyncio.Task[None], tuple[_Heading, str]] = {}  # of open jobs: whose, and their ids
        self.cancelled = asyncio.Event()
        if batch.status == "cancelling":
            self.cancelled.set()
        self.task = asyncio.create_task(self._carry_out())

    async def _carry_out(self) -> None:
        try:
            trouble = await self._do_lines()
            await self._drop()
            await self._finish(trouble)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, the batch must end with its reason
            errors = [self._reason(error)]
            await self._store(self._service.files.note, self._batch.id, status="failed", errors=errors)
        finally:
            await self._stop_watching()

    async def _do_lines(self) -> dict[str, Any] | None:
        """Begin every line and wait until their jobs have ended or the batch is cancelled; why it failed, or None."""
        try:
            await self._begin_lines()
            await self._wait(0)
        except Exception as error:  # noqa: BLE001 - what has ended until then is kept
            return self._reason(error)
        return None

    def _reason(self, error: Exception) -> dict[str, Any]:
        """Why a batch failed, for its owner; the log has it too."""
        if isinstance(error, RequestError):
            _log.error("batch %s failed: %s", self._batch.id, error)
            return {"code": error.code, "message": str(error), "param": error.param}
        _log.error("batch %s failed", self._batch.id, exc_info=error)
        return {"code": "server_error", "message": "the server could not carry out the batch; its log says why."}

    async def _begin_lines(self) -> None:
        """Hand in every line as soon as there is room for it; once the batch is cancelled, only look for their jobs."""
        files, batch = self._service.files, self._batch
        ended = await self._store(files.ended_lines, batch.id) if self._is_resumed else set()
        lines, names = read_lines(await self._store(files.input_path, batch)), set[str]()
        while (line := await asyncio.to_thread(next, lines, None)) is not None:
            if self.cancelled.is_set() and not self._is_resumed:
                return
            if line.error is None and line.key in names:
                message = f"custom_id must be the line's own, {line.custom_id!r} was named before."
                error = RequestError(message, code="duplicate_custom_id", param="custom_id")
                line = dataclasses.replace(line, error=error)
            names.add(line.key)
            if line.number in ended:
                continue
            heading = _Heading.of(batch, line)
            try:
                await self._begin(line, heading)
            except RequestError as error:
                await self._end(heading, error)

    async def _begin(self, line: BatchLine, heading: _Heading) -> None:
        """Find the job of a line, or hand the line in.

        Raises:
            RequestError: it cannot be carried out.
        """
        service, owner = self._service, self._batch.owner
        if self._is_resumed:
            job = await self._store(service.store.job_of_key, owner, heading.key)
            if job is not None:
                await self._take(heading, job)
                return
        if self.cancelled.is_set():
            return
        if line.error is not None:
            raise line.error
        _check_unicode(line.body)
        body, tries = VideoBody.parse(line.body), 0
        while await self._wait(service.limits.open_jobs - 1):
            try:
                await service.check_room(owner)
                video = await service.submit(owner, body, idempotency_key=heading.key)
            except TooMany:
                await self._pause(_AGAIN)
            except (PoetError, OSError) as error:  # the latter: of an upload that is deleted just now
                if isinstance(error, RequestError) and error.status < 500:
                    raise
                tries += 1
                _log.warning("line %d of batch %s, try %d: %s", line.number, self._batch.id, tries, error)
                if tries >= MAX_TRIES:
                    raise _last(error) from error
                await self._pause(_AGAIN * 2 ** (tries - 1))
            else:
                self._watch(heading, video.id)
                return

    async def _take(self, heading: _Heading, job: Job) -> None:
        """Go on with a job that a line had before."""
        if _has_ended(job):
            await self._end(heading, job)
        else:
            self._watch(heading, job.id)

    def _watch(self, heading: _Heading, id: str) -> None:
        """Have it written down what becomes of a line's job."""
        self._watchers[asyncio.create_task(self._follow(heading, id))] = heading, id

    async def _follow(self, heading: _Heading, id: str) -> None:
        try:
            await self._end(heading, await self._insist(self._service.wait, self._batch.owner, id))
        except RequestError as error:  # it was deleted meanwhile
            await self._end(heading, error)

    async def _end(self, heading: _Heading, answer: Job | RequestError) -> None:
        """Write down what became of a line."""
        is_completed = isinstance(answer, Job) and answer.status is JobStatus.COMPLETED
        if isinstance(answer, Job):
            result = heading.result(200, self._service.show(answer).model_dump(mode="json"))
        else:
            result = heading.result(answer.status, answer.body)
        arguments = self._batch.id, heading.number, result
        await self._store(self._service.files.end_line, *arguments, is_completed=is_completed)

    async def _wait(self, most: int) -> bool:
        """Until at most so many jobs are open, or the batch is cancelled; says whether it is to go on."""
        cancelled = asyncio.create_task(self.cancelled.wait())
        try:
            self._collect()
            while len(self._watchers) > most and not self.cancelled.is_set():
                await asyncio.wait([*self._watchers, cancelled], return_when=asyncio.FIRST_COMPLETED)
                self._collect()
        finally:
            cancelled.cancel()
        return not self.cancelled.is_set()

    def _collect(self) -> None:
        """Forget the jobs of which is written down what became of them."""
        for watcher in [watcher for watcher in self._watchers if watcher.done()]:
            watcher.result()
            del self._watchers[watcher]

    async def _drop(self) -> None:
        """Of jobs that are still open: take those that have ended meanwhile, delete the others."""
        await self._stop_watching()
        for heading, id in self._watchers.values():
            with contextlib.suppress(RequestError):  # gone already
                job = await self._store(self._service.store.get, id, self._batch.owner)
                if _has_ended(job):
                    await self._end(heading, job)
                else:
                    await self._insist(self._service.delete, self._batch.owner, id)
        self._watchers.clear()

    async def _stop_watching(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def _finish(self, trouble: Mapping[str, Any] | None) -> None:
        """Write the files of results, then say that the batch has ended, and why if it failed."""
        files, batch = self._service.files, self._batch
        values: dict[str, Any] = {}
        for name, count, is_completed in (("output_file", "completed", True), ("error_file", "failed", False)):
            results = await self._store(files.results, batch.id, is_completed=is_completed)
            values[count] = len(results)
            if results:
                arguments = batch.owner, "batch_output", f"{batch.id}_{name}.jsonl", "".join(results).encode()
                values[name] = (await self._store(files.put, *arguments)).id
        status = "cancelled" if self.cancelled.is_set() else "completed"
        if trouble is not None:
            status, values["errors"] = "failed", [trouble]
        await self._store(files.note, batch.id, status=status, **values)

    async def _store(self, method: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """`Service.with_store`, as `_insist` calls it."""
        return await self._insist(self._service.with_store, method, *arguments, **keywords)

    async def _insist(self, ask: Callable[..., Awaitable[Answer]], *arguments: Any, **keywords: Any) -> Answer:
        """Call what belongs to no one line, for as long as the server fails at it: what is done is not lost over that.

        Raises:
            RequestError: an error below 500.
        """
        pause = _AGAIN
        while True:
            try:
                return await ask(*arguments, **keywords)
            except RequestError as error:
                if error.status < 500:
                    raise
                _log.warning("batch %s waits %g s: %s", self._batch.id, pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    async def _pause(self, seconds: float) -> None:
        """Let some time pass, less where the batch is cancelled."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.cancelled.wait(), seconds)


def _has_ended(job: Job) -> bool:
    return job.status not in (JobStatus.QUEUED, JobStatus.IN_PROGRESS)


def _last(error: PoetError | OSError) -> RequestError:
    """The server's trouble as the answer to a line."""
    if isinstance(error, RequestError):
        return error
    message = "the server failed at the line again and again; its log says why."
    return RequestError(message, code="server_error", status=500)


def _check_unicode(body: Mapping[str, Any]) -> None:
    """Refuse half a surrogate pair, which nothing can store: JSON's escapes have it.

    Raises:
        RequestError: there is one.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError("a text must not hold half a surrogate pair.", code="invalid_value") from error
